"""Launchers: their recorded variables are read right, real processes with them find each other, and errors help."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recorded_environments as recorded
from fabriclite import ConfigError, DDPStrategy, Fabric, FabricError, Precision, WorldError
from fabriclite.arguments import this_environment, this_world
from fabriclite.collectives import gather_objects
from fabriclite.devices import Machine, pick_devices
from fabriclite.environments import (
    Described,
    Environment,
    KubeflowEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    NoEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from fabriclite.launch import meeting
from fabriclite.launch.environment import prepare_for_deepspeed
from fabriclite.launch.environments.choose import ENVIRONMENTS, find
from fabriclite.launch.environments.nodelist import expand, tasks_per_node
from fabriclite.launch.stores import serve
from worlds import run

LOOPBACK = "127.0.0.1"
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="seconds each; asked for by FULL=1")

# -- recorded variables ------------------------------------------------------------------------------------------------

READ: dict[str, dict[str, Any]] = {
    "SRUN": dict(
        name="slurm",
        why="SLURM, because SLURM_JOB_ID, SLURM_STEP_ID and SLURM_PROCID are set",
        rank=5,
        size=8,
        size_name="SLURM_STEP_NUM_TASKS",
        local_rank=1,
        local_size=4,
        node_rank=1,
        master_address="gnode010",
        master_port=15000 + 200505 % 15000,
        run_id="200505.0",
    ),
    "SRUN_UNEVEN": dict(
        name="slurm", rank=4, size=8, local_rank=1, local_size=2, node_rank=1, master_address="b2", run_id="200505.0"
    ),
    "SRUN_ARRAY": dict(name="slurm", rank=5, master_port=15000 + 200508 % 15000, run_id="200508.0"),
    "SRUN_ONE_HOST": dict(
        name="slurm",
        rank=1,
        size=2,
        local_rank=1,
        local_size=2,
        node_rank=0,
        master_address=LOOPBACK,
        master_port=15000 + (200505 + 3 * 331) % 15000,
        own_device=True,
        restart_count=2,
    ),
    "SALLOC": dict(name="none", launched=False, why="none, because no launcher's variables are set"),
    "SALLOC_STEP": dict(name="none", launched=False),
    "SRUN_BASH": dict(name="none", launched=False),
    "SRUN_IN_SALLOC": dict(name="slurm", rank=5, size=8),
    "SBATCH_ONE": dict(name="none", launched=False),
    "SRUN_PMI": dict(name="slurm", rank=5, size=8, local_size=4),
    "WORLD_SIZE_IN_SRUN": dict(name="slurm", rank=5, size=8, master_address="gnode010", master_port=29501),
    "OPEN_MPI": dict(
        name="mpi",
        why="Open MPI, because OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are set",
        rank=3,
        size=4,
        size_name="OMPI_COMM_WORLD_SIZE",
        local_rank=1,
        local_size=2,
        node_rank=1,
        master_address="n1",
        master_port=23456,
        run_id="prterun-n1-31337@1",
    ),
    "OPEN_MPI_IN_SLURM": dict(name="mpi", rank=3, size=4, local_size=2, master_address="gnode010"),
    "HYDRA": dict(
        name="mpi",
        why="MPI (Hydra), because PMI_RANK and PMI_SIZE are set",
        rank=1,
        size=2,
        local_rank=1,
        local_size=2,
        node_rank=0,
        master_address=LOOPBACK,
        master_port=29500,
    ),
    "INTEL_MPI": dict(name="mpi", rank=2, size=4, local_rank=1, local_size=2, node_rank=0, master_address="n1"),
    "JSRUN": dict(
        name="lsf",
        why="LSF, because LSB_JOBID, JSM_NAMESPACE_RANK and JSM_NAMESPACE_SIZE are set",
        rank=7,
        size=12,
        size_name="JSM_NAMESPACE_SIZE",
        local_rank=1,
        local_size=6,
        node_rank=1,
        master_address="h41n03",
        master_port=15000 + 774411 % 15000,
        own_device=True,
        run_id="774411[0]",
    ),
    "POD_MASTER": dict(
        name="kubeflow",
        why="Kubeflow, because KUBERNETES_PORT, MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE are set without"
        " LOCAL_RANK",
        rank=0,
        size=3,
        local_rank=0,
        local_size=1,
        node_rank=0,
        master_address="train-master-0",
        master_port=23456,
    ),
    "POD_WORKER": dict(name="kubeflow", rank=2, size=3, local_rank=0, local_size=1, node_rank=2),
    "TORCHRUN": dict(
        name="torchrun",
        why="torchrun, because TORCHELASTIC_RUN_ID, RANK, WORLD_SIZE and LOCAL_RANK are set",
        rank=3,
        size=4,
        local_rank=1,
        local_size=2,
        node_rank=1,
        master_address="n1",
        master_port=40513,
        store_is_served=True,
        restart_count=1,
        run_id="0e3a7b1c",
    ),
    "TORCHRUN_IN_SLURM": dict(name="torchrun", rank=3, size=4),
    "TORCHRUN_IN_A_POD": dict(name="torchrun", rank=3, size=4),
    "SHELL": dict(name="none", launched=False),
}
RECORDED: dict[str, dict[str, str]] = {name: value for name, value in vars(recorded).items() if name.isupper()}


@pytest.mark.parametrize("name", READ)
def test_recorded(name: str) -> None:
    found = find(None, RECORDED[name])
    assert {field: getattr(found, field) for field in READ[name]} == READ[name]
    assert found.launched is (found.name != "none")


def test_every_recording_is_read() -> None:
    unread = {name for name in RECORDED if not name.startswith("_")} - set(READ)
    assert unread == {"SBATCH"}, "its error is below"
    assert {f.name for f in fields(Described)} == set().union(*READ.values()), "every field is looked at somewhere"


def test_named() -> None:
    """A name outranks the order, in the script or in the variable; the processes of our own starters outrank a name."""
    inside = recorded.TORCHRUN_IN_SLURM
    assert find(SLURMEnvironment(), inside).rank == 5
    assert find(SLURMEnvironment(), inside).why == "slurm, because `plugins` names it"
    named = find(None, {**inside, "FABRICLITE_ENVIRONMENT": "slurm"})
    assert (named.rank, named.why) == (5, "slurm, because FABRICLITE_ENVIRONMENT names it")
    assert find(SLURMEnvironment(), {**inside, "FABRICLITE_ENVIRONMENT": "slurm"}).rank == 5
    assert not find(NoEnvironment(), inside).launched
    assert not find(None, {**recorded.SBATCH, "FABRICLITE_ENVIRONMENT": "none"}).launched
    assert find(None, {**inside, "FABRICLITE_ENVIRONMENT": ""}).name == "torchrun"
    own = {**recorded.TORCHRUN, "FABRICLITE_STARTER": "40513"}
    del own["TORCHELASTIC_RUN_ID"]
    assert find(NoEnvironment(), own).name == "fabriclite"
    assert find(None, {**own, "MASTER_PORT": "1234"}).name == "torchrun", "started by one of our ranks"


def test_a_user_s_own_environment() -> None:
    """Anything of the protocol can be named."""

    @dataclass(frozen=True)
    class Ring:
        name: str = "ring"
        needs: str = "RING"

        def describes(self, env: Mapping[str, str]) -> bool:
            return True

        def read(self, env: Mapping[str, str]) -> Described:
            return Described(name="ring", why="", rank=0, size=1)

    assert isinstance(Ring(), Environment)
    fabric = Fabric(accelerator="cpu", plugins=[Ring(), Precision.parse("bf16-true")])
    assert (fabric.environment.name, fabric.environment.why) == ("ring", "ring, because `plugins` names it")
    assert fabric.precision.name == "bf16-true"


def test_every_environment_is_of_the_protocol() -> None:
    for name, environment in ENVIRONMENTS.items():
        assert isinstance(environment, Environment)
        assert environment.name == name
        assert environment.needs
    own = [KubeflowEnvironment, LSFEnvironment, MPIEnvironment, NoEnvironment, SLURMEnvironment]
    assert {type(e) for e in ENVIRONMENTS.values()} == {*own, TorchElasticEnvironment}


def test_a_library_s_local_rank_is_no_launcher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed needs LOCAL_RANK: what we set for it does not make a pod a process of torchrun."""
    for name in (*recorded.TORCHRUN, *recorded.POD_WORKER):
        monkeypatch.delenv(name, raising=False)
    for name, value in recorded.POD_WORKER.items():
        monkeypatch.setenv(name, value)
    prepare_for_deepspeed("cpu", 0)
    try:
        assert os.environ["LOCAL_RANK"] == "0"
        assert this_environment(None).name == "kubeflow"
    finally:
        del os.environ["LOCAL_RANK"]


def test_devices_that_each_task_sees_alone() -> None:
    one, four = Machine(cuda=1), Machine(cuda=4)
    assert [str(d) for d in pick_devices("auto", "cuda", one, 3, own=True).values()] == ["cuda:0"] * 3
    assert [str(d) for d in pick_devices("auto", "cuda", four, 3, own=True).values()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(d) for d in pick_devices(2, "cuda", one, 2, own=True).values()] == ["cuda:0"] * 2
    with pytest.raises(ConfigError, match=r"among the 1 of.*index 1\. Launch 1 processes on it instead of 3"):
        pick_devices("auto", "cuda", one, 3)


# -- SLURM's short forms -----------------------------------------------------------------------------------------------


def compressed(hosts: list[str]) -> str:
    """Another way round, written for the test: neighbours whose numbers follow each other become a range."""
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    for host in hosts:
        stem = host.rstrip("0123456789")
        number = host[len(stem) :]
        if number and parts and parts[-1][0] == stem and parts[-1][1]:
            first, last = parts[-1][1][-1]
            if len(last) == len(number) and int(number) == int(last) + 1:
                parts[-1][1][-1] = (first, number)
            else:
                parts[-1][1].append((number, number))
        else:
            parts.append((stem, [(number, number)] if number else []))
    written = []
    for stem, ranges in parts:
        inside = ",".join(a if a == b else f"{a}-{b}" for a, b in ranges)
        plain = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
        written.append(f"{stem}{inside}" if plain or not ranges else f"{stem}[{inside}]")
    return ",".join(written)


HOST = st.builds(
    lambda stem, number, width: f"{stem}{str(number).zfill(width)}" if width else stem,
    st.sampled_from(["n", "gpu-a", "rack1-n", "b2x"]),
    st.integers(0, 30),
    st.integers(0, 3),
)


@given(st.lists(HOST, min_size=1, max_size=20))
def test_node_lists_come_back(hosts: list[str]) -> None:
    assert expand(compressed(hosts)) == hosts


@given(st.text("n0123456789[]-, ", max_size=12))
def test_node_lists_of_any_text(text: str) -> None:
    """Read, or refused with our error; never anything else."""
    try:
        hosts = expand(text)
    except WorldError:
        hosts = []
    assert not any(c in host for host, c in product(hosts, "[], "))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[001-003,7],b2", ["node001", "node002", "node003", "node7", "b2"]),
        ("gnode[10,20,25,37]", ["gnode10", "gnode20", "gnode25", "gnode37"]),
        ("r[1-2]n[08-10]-ib", ["r1n08-ib", "r1n09-ib", "r1n10-ib", "r2n08-ib", "r2n09-ib", "r2n10-ib"]),
        ("host0 host1", ["host0", "host1"]),
        ("a", ["a"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("1") == [1]


# -- errors ------------------------------------------------------------------------------------------------------------


def without(env: Mapping[str, str], *names: str, **others: str) -> dict[str, str]:
    return {**{k: v for k, v in env.items() if k not in names}, **others}


def named(name: str, env: Mapping[str, str] = recorded.SHELL) -> Described:
    return find(None, {**env, "FABRICLITE_ENVIRONMENT": name})


ALONE = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
ERRORS: dict[str, tuple[Callable[[], object], type[FabricError], str]] = {
    "sbatch without srun": (
        lambda: find(None, recorded.SBATCH),
        WorldError,
        "SLURM job of 8 tasks must be started with srun … batch script alone … srun python … ENVIRONMENT=none",
    ),
    "slurm against devices": (
        lambda: this_world("cpu", 2, 1, find(None, recorded.SRUN)),
        WorldError,
        "`devices` must be … launched on this machine (4) … 2 means 2 x cpu … devices='auto'",
    ),
    "one task against devices": (
        lambda: this_world("cpu", 2, 1, find(None, ALONE)),
        WorldError,
        "(1), but 2 means 2 x cpu … launch that many. FABRICLITE_ENVIRONMENT=none has fabriclite start them",
    ),
    "slurm against num_nodes": (
        lambda: this_world("cpu", 4, 3, find(None, recorded.SRUN)),
        WorldError,
        "launched (8) … 4 x 3 is 12 … Pass both as launched: SLURM_STEP_NUM_TASKS is 8",
    ),
    "slurm without a size": (
        lambda: find(None, without(recorded.SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        WorldError,
        "SLURM_NTASKS must be set when SLURM_PROCID, SLURM_LOCALID are set … lacks it … srun",
    ),
    "slurm rank beyond": (
        lambda: find(None, without(recorded.SRUN, SLURM_PROCID="8")),
        WorldError,
        "SLURM_PROCID must be in [0, 8), as SLURM_STEP_NUM_TASKS says, but is 8 … srun",
    ),
    "slurm tasks per node": (
        lambda: find(None, without(recorded.SRUN, SLURM_STEP_TASKS_PER_NODE="4 each")),
        WorldError,
        "tasks per node … '4(x2),3' … '4 each' … srun",
    ),
    "slurm uneven and unknown": (
        lambda: find(
            None,
            without(recorded.SRUN, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", SLURM_STEP_NUM_NODES="3"),
        ),
        WorldError,
        "SLURM_STEP_TASKS_PER_NODE must be set for 8 tasks on 3 nodes, but is None … srun",
    ),
    "node list": (
        lambda: find(None, without(recorded.SRUN, SLURM_STEP_NODELIST="n[1-")),
        WorldError,
        "node list must … 'node[001-003,7],b2' … 'n[1-' … MASTER_ADDR",
    ),
    "node list backwards": (lambda: expand("n[3-1]"), WorldError, "node list must … 'n[3-1]'"),
    "open mpi incomplete": (
        lambda: find(None, without(recorded.OPEN_MPI, "OMPI_COMM_WORLD_SIZE")),
        WorldError,
        "OMPI_COMM_WORLD_SIZE must be set when OMPI_COMM_WORLD_RANK, … mpirun",
    ),
    "hydra incomplete": (
        lambda: find(None, without(recorded.HYDRA, "PMI_SIZE", "MPI_LOCALNRANKS")),
        WorldError,
        "PMI_SIZE, MPI_LOCALNRANKS must be set when PMI_RANK, MPI_LOCALRANKID are set … lacks them … mpiexec",
    ),
    "mpi4py is not there": (
        lambda: find(MPIEnvironment(mpi4py=True), recorded.SHELL),
        WorldError,
        "mpi4py must be importable … No module named 'mpi4py' … Install mpi4py",
    ),
    "lsf hosts": (
        lambda: find(None, without(recorded.JSRUN, LSB_MCPU_HOSTS="a b")),
        WorldError,
        "LSB_MCPU_HOSTS must list hosts and slots, as in 'a 4 b 4', but is 'a b' … MASTER_ADDR",
    ),
    "lsf rank file": (
        lambda: find(None, without(recorded.JSRUN, "LSB_MCPU_HOSTS", LSB_DJOB_RANKFILE="/not/there")),
        WorldError,
        "LSB_DJOB_RANKFILE must name a file … /not/there … MASTER_ADDR",
    ),
    "lsf local size": (
        lambda: find(None, without(recorded.JSRUN, "JSM_NAMESPACE_LOCAL_SIZE")),
        WorldError,
        "JSM_NAMESPACE_LOCAL_SIZE must be set … jsrun",
    ),
    "kubeflow rank beyond": (
        lambda: find(None, without(recorded.POD_WORKER, RANK="3")),
        WorldError,
        "RANK must be in [0, 3), as WORLD_SIZE says, but is 3 … PyTorchJob",
    ),
    "port": (
        lambda: find(None, without(recorded.TORCHRUN, MASTER_PORT="70000")),
        WorldError,
        "MASTER_PORT must be a port number from 1 to 65535, but is '70000' … the same on all ranks",
    ),
    "port word": (
        lambda: find(None, without(recorded.TORCHRUN, MASTER_PORT="auto")),
        WorldError,
        "MASTER_PORT must be a port number from 1 to 65535, but is 'auto' … the same on all ranks",
    ),
    "unknown name": (
        lambda: named("lsf2"),
        ConfigError,
        "FABRICLITE_ENVIRONMENT must be one of torchrun, kubeflow, lsf, mpi, slurm, none, but is 'lsf2' … Unset it",
    ),
    **{
        f"named, but not {name}": (
            lambda name=name: named(name),  # type: ignore[misc]
            WorldError,
            f"must have started this process when FABRICLITE_ENVIRONMENT names it, but {name!r} finds nothing … {needs}"
            " … Leave the name out",
        )
        for name, needs in {
            "torchrun": "RANK, WORLD_SIZE and LOCAL_RANK",
            "kubeflow": "PyTorchJob",
            "lsf": "jsrun",
            "mpi": "OMPI_COMM_WORLD_RANK … PMI_RANK … mpi4py",
            "slurm": "SLURM_PROCID and SLURM_STEP_ID",
        }.items()
    },
    "plugin, but not slurm": (
        lambda: find(SLURMEnvironment(), recorded.SHELL),
        WorldError,
        "when `plugins` names it, but 'slurm' finds nothing … srun",
    ),
    "two names": (
        lambda: find(SLURMEnvironment(), {**recorded.SRUN, "FABRICLITE_ENVIRONMENT": "none"}),
        ConfigError,
        "`plugins` and FABRICLITE_ENVIRONMENT must not name different … 'slurm' and 'none' … Keep one",
    ),
    "two plugins": (
        lambda: Fabric(accelerator="cpu", plugins=[NoEnvironment(), SLURMEnvironment()]),
        ConfigError,
        "`plugins` must name one environment at most … SLURMEnvironment() … Keep one",
    ),
    "class as plugin": (
        lambda: Fabric(accelerator="cpu", plugins=SLURMEnvironment),
        ConfigError,
        "`plugins` … fabriclite.environments, but holds type",
    ),
}


def check(error: BaseException, says: str) -> None:
    assert [part for part in says.split(" … ") if part not in str(error)] == [], str(error)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    act, kind, says = ERRORS[name]
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    check(caught.value, says)


def test_rank_file(tmp_path: Path) -> None:
    file = tmp_path / "ranks"
    file.write_text("batch5\nh1\nh1\nh2\nh2\n")
    env = without(recorded.JSRUN, "LSB_MCPU_HOSTS", LSB_DJOB_RANKFILE=str(file))
    assert find(None, env).master_address == "h1"
    file.write_text("h1\nh1\nh2\nh2\n")
    assert find(None, env).master_address == "h1"


# -- meeting -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def as_rank(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    for name in set(os.environ) & {name for known in RECORDED.values() for name in known}:
        if name not in ("HOME", "PATH"):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def by_hand(rank: int, port: int) -> dict[str, str]:
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR=LOOPBACK, MASTER_PORT=port)
    return {name: str(value) for name, value in names.items()}


def two(seconds: float = 2.0) -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=seconds)))


def test_port_in_use(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, by_hand(0, taken))
    with pytest.raises(WorldError) as caught:
        two()
    check(
        caught.value,
        f"MASTER_PORT must be a free port of 127.0.0.1, but {taken} is in use by another process. Choose another",
    )


def test_port_in_use_on_all_networks(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, {**by_hand(0, taken), "MASTER_ADDR": socket.gethostname()})
    with socket.socket() as everywhere:
        everywhere.bind(("", 0))
        everywhere.listen()
        monkeypatch.setenv("MASTER_PORT", str(everywhere.getsockname()[1]))
        with pytest.raises(WorldError, match="MASTER_PORT must be a free port of"):
            two()


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, by_hand(0, free_port()))
    monkeypatch.setattr(meeting, "SHORTEST", timedelta(seconds=2))
    with pytest.raises(WorldError) as caught:
        two()
    check(
        caught.value, "All 2 ranks must meet within 2 s, but rank 1 did not come. … whether every process was started"
    )


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, by_hand(1, free_port()))
    monkeypatch.setattr(meeting, "SHORTEST", timedelta(seconds=2))
    with pytest.raises(WorldError) as caught:
        two()
    check(
        caught.value,
        "The store of the run must answer at MASTER_ADDR 127.0.0.1, MASTER_PORT … within 2 s … rank 0 started",
    )


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ("HYDRA", None),
        ("OPEN_MPI", "MASTER_ADDR must be set for 4 processes to meet … mpirun -x MASTER_ADDR="),
        ("JSRUN", "MASTER_ADDR must be set for 12 processes … jsrun -E MASTER_ADDR="),
        ("TORCHRUN", "MASTER_ADDR and MASTER_PORT must be set for 4 processes … lacks them. Launch with torchrun"),
    ],
)
def test_no_address(env: str, says: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = ("MASTER_ADDR", "LSB_MCPU_HOSTS", *(("MASTER_PORT",) if env == "TORCHRUN" else ()))
    as_rank(monkeypatch, without(RECORDED[env], *left_out))
    found = this_environment(None)
    if says is None:
        assert found.master_address == LOOPBACK
        return
    with pytest.raises(WorldError) as caught:
        Fabric(accelerator="cpu", strategy="ddp", devices=found.local_size, num_nodes=found.size // found.local_size)
    check(caught.value, says)


def test_our_store_is_on_the_loopback_alone() -> None:
    store = serve()
    with socket.create_connection((LOOPBACK, store.port), timeout=5):
        pass
    with pytest.raises(OSError, match="refused") as caught:
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
    assert caught.value.errno == errno.ECONNREFUSED


# -- real processes ----------------------------------------------------------------------------------------------------

MEET = """
import json, os, socket, sys
import torch
from fabriclite import Fabric

def make():
    fabric = Fabric(accelerator="cpu", strategy=sys.argv[3], num_nodes=int(sys.argv[1]), devices=int(sys.argv[2]))
    fabric.launch()
    model = torch.nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    return fabric, fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum").item()

fabric, total = make()
found = fabric.environment
open_elsewhere = socket.socket().connect_ex(("127.0.0.2", found.master_port)) == 0
ranks = [fabric.global_rank, fabric.local_rank, fabric.node_rank]
# In one piece: `print` may write the end of a line by itself, and another rank writes to the same pipe.
sys.stdout.write(json.dumps([found.name, *ranks, total, open_elsewhere, found.why]) + "\\n")
if sys.argv[3] == "ddp":  # the others come to a second meeting too
    for _ in range(2):
        torch.distributed.destroy_process_group()
        assert make()[1] == total
"""


def slurm(rank: int, hosts: str, per_host: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(int(time.time() * 10) % 15000),
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2" if per_host == 2 else "1(x2)",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_host),
        "SLURM_NODEID": str(rank // per_host),
    }


def open_mpi(rank: int) -> dict[str, str]:
    names = dict(RANK=rank, SIZE=2, LOCAL_RANK=rank, LOCAL_SIZE=2)
    return {"PMIX_NAMESPACE": f"t-{os.getpid()}@1", **{f"OMPI_COMM_WORLD_{n}": str(v) for n, v in names.items()}}


def hydra(rank: int, port: int) -> dict[str, str]:
    env = {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    return {**env, "MASTER_PORT": str(port)}


def jsrun(rank: int) -> dict[str, str]:
    names = dict(RANK=rank, SIZE=2, LOCAL_RANK=rank, LOCAL_SIZE=2)
    job = {"LSB_JOBID": str(int(time.time() * 10) % 15000), "LSB_MCPU_HOSTS": "h1 2"}
    return {**job, **{f"JSM_NAMESPACE_{n}": str(v) for n, v in names.items()}}


def pod(rank: int, port: int) -> dict[str, str]:
    return {
        "KUBERNETES_PORT": "tcp://10.96.0.1:443",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
    }


def mpi4py(rank: int, port: int) -> dict[str, str]:
    path = f"{Path(__file__).parent / 'standins'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    standin = {"STANDIN_RANK": str(rank), "STANDIN_SIZE": "2", "STANDIN_PORT": str(port)}
    return {**standin, "FABRICLITE_ENVIRONMENT": "mpi", "PYTHONPATH": path}


@dataclass(frozen=True)
class Launcher:
    """Two processes as a launcher would start them.

    Attributes:
        name: of the environment that is found.
        variables: of both processes, given a port.
        nodes: how many machines the variables speak of.
        strategy: what they train with.
    """

    name: str
    variables: Callable[[int], list[dict[str, str]]]
    nodes: int
    strategy: str = "ddp"


LAUNCHERS = {
    "srun": Launcher("slurm", lambda _: [slurm(rank, "localhost", 2) for rank in range(2)], 1),
    "srun on two nodes": Launcher("slurm", lambda _: [slurm(rank, "127.0.0.[1-2]", 1) for rank in range(2)], 2),
    "Open MPI": Launcher("mpi", lambda _: [open_mpi(rank) for rank in range(2)], 1),
    "Open MPI, DeepSpeed": Launcher("mpi", lambda _: [open_mpi(rank) for rank in range(2)], 1, "deepspeed"),
    "MPICH": Launcher("mpi", lambda port: [hydra(rank, port) for rank in range(2)], 1),
    "mpi4py": Launcher("mpi", lambda port: [mpi4py(rank, port) for rank in range(2)], 1),
    "jsrun": Launcher("lsf", lambda _: [jsrun(rank) for rank in range(2)], 1),
    "PyTorchJob": Launcher("kubeflow", lambda port: [pod(rank, port) for rank in range(2)], 2),
    "by hand": Launcher("torchrun", lambda port: [by_hand(rank, port) for rank in range(2)], 1),
}


def started(commands: list[list[str]], environments: list[dict[str, str]], limit: float = 90.0) -> list[list[Any]]:
    """Run all commands at once; the JSON that each printed. None is left behind."""
    plain = {
        k: v for k, v in os.environ.items() if not any(k in known for known in RECORDED.values()) or k in ("PATH",)
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**plain, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        deadline = time.monotonic() + limit
        ended = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(err for _, err in ended)
    return [json.loads(line) for out, _ in ended for line in out.splitlines() if line.startswith("[")]


USUAL = ("srun on two nodes", "mpi4py", "PyTorchJob")
"""One that works out its address, one that asks for it, one that is told."""


@pytest.mark.parametrize("case", [c if c in USUAL else pytest.param(c, marks=FULL) for c in LAUNCHERS])
def test_processes_meet(case: str, tmp_path: Path) -> None:
    launcher = LAUNCHERS[case]
    (tmp_path / "meet.py").write_text(MEET)
    command = [str(tmp_path / "meet.py"), str(launcher.nodes), str(2 // launcher.nodes), launcher.strategy]
    before = time.monotonic()
    reports = sorted(started([command, command], launcher.variables(free_port())), key=lambda r: r[1])
    assert time.monotonic() - before < 60
    for rank, (name, global_rank, local_rank, node_rank, total, open_elsewhere, _) in enumerate(reports):
        node = rank if launcher.nodes == 2 else 0
        assert (name, global_rank, local_rank, node_rank) == (launcher.name, rank, rank - node, node)
        assert total == 3.0
        assert not open_elsewhere
    assert len(reports) == 2


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ((), ["fabriclite", "fabriclite's own starter, because fabric.launch began this process"]),
        (TORCHRUN, ["torchrun", "torchrun, because TORCHELASTIC_RUN_ID, RANK, WORLD_SIZE and LOCAL_RANK are set"]),
    ],
    ids=["own", "torchrun"],
)
def test_starters_say_who_they_are(way: tuple[str, ...], why: list[str], tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    reports = started([[*way, str(tmp_path / "meet.py"), "1", "2", "ddp"]], [{}])
    assert [[report[0], report[-1]] for report in reports] == [why, why]


def environment_of(fabric: Fabric) -> list[Any]:
    return gather_objects(fabric._ready_world, fabric.environment)


def test_functions_say_who_started_them() -> None:
    found: list[Described] = run(environment_of, "ddp", 2)
    assert [(f.name, f.rank, f.launched, f.store_is_served) for f in found] == [
        ("fabriclite", 0, True, True),
        ("fabriclite", 1, True, True),
    ]
    assert Fabric(accelerator="cpu").environment.name == "none"

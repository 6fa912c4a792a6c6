"""Starting processes: every way trains the same, a failing rank ends them all, and each process knows who it is."""

import gc
import json
import math
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import fabriclite
from fabriclite import DDPStrategy, Fabric, LaunchError
from fabriclite.collectives import gather_objects
from fabriclite.launch.choose import Situation, Way, choose
from fabriclite.launch.stores import serve
from fabriclite.strategy import StartMethod
from worlds import run

FROM_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
ENDED_S = 15.0
"""How long after a rank failed all processes must have ended, in seconds."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# -- real scripts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A command that has run.

    Attributes:
        status: its exit status.
        out: standard output.
        err: standard error.
        left: whether any process of its session was still there, and had to be killed.
    """

    status: int
    out: str
    err: str
    left: bool


def python(*command: object, limit: float = 90.0) -> Ended:
    """Run ``python *command`` in a session of its own, without what a launcher would have set."""
    env = {k: v for k, v in os.environ.items() if k not in FROM_A_LAUNCHER and not k.startswith("TORCHELASTIC")}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        left = end_session(process.pid)
        process.wait()
    return Ended(process.returncode, out, err, left)


def end_session(leader: int) -> bool:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], within: float) -> bool:
    """Whether all of these processes end in time. One that its parent has not yet asked about has ended too."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + within
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


TRAIN = """
import json, os, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fabriclite import Fabric

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=devices)
fabric.launch()
fabric.seed_everything(1)
x = torch.randn(32, 3)
options = dict(batch_size=8 // fabric.world_size, shuffle=True, num_workers=1)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), **options)
loader = fabric.setup_dataloaders(loader)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
losses = []
for epoch in range(2):
    for a, b in loader:
        loss = (model(a) - b).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss).item())
who = ["global_rank", "local_rank", "node_rank", "world_size", "is_global_zero"]
facts = {name: getattr(fabric, name) for name in who}
facts.update(device=str(fabric.device), pid=os.getpid())
(folder / f"{fabric.global_rank}.json").write_text(json.dumps(facts))
fabric.print(json.dumps(losses))
"""


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    ranks: list[dict[str, Any]]


def train(folder: Path, *way: str, devices: int) -> Trained:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(TRAIN)
    ended = python(*way, folder / "train.py", folder, devices)
    assert ended.status == 0, ended.err
    assert not ended.left
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = [line for line in ended.out.splitlines() if line.startswith("[")]
    assert len(lines) == 1, "one process printed"
    return Trained(json.loads(lines[0]), ranks)


@pytest.mark.skipif(not os.environ.get("FULL"), reason="as test_the_same_example_everywhere; asked for by FULL=1")
def test_every_starter_trains_the_same(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", devices=1)
    by_itself = train(tmp_path / "by_itself", devices=2)
    by_torchrun = train(tmp_path / "by_torchrun", *TORCHRUN, devices=2)
    assert len(alone.losses) == 8
    assert alone.losses[-1] < alone.losses[0] / 2
    assert by_itself.losses == pytest.approx(alone.losses, rel=1e-5)
    assert by_torchrun.losses == by_itself.losses
    for ended in (alone, by_itself, by_torchrun):
        size = len(ended.ranks)
        for rank, facts in enumerate(ended.ranks):
            pid = facts.pop("pid")
            assert gone([pid], within=0)
            assert facts == {
                "global_rank": rank,
                "local_rank": rank,
                "node_rank": 0,
                "world_size": size,
                "is_global_zero": rank == 0,
                "device": "cpu",
            }
    assert (len(alone.ranks), len(by_itself.ranks), len(by_torchrun.ranks)) == (1, 2, 2)


LAUNCHED = """
import os, sys
from fabriclite import DDPStrategy, Fabric, WorldError

def work(fabric, a, b):
    return [os.getpid(), fabric.global_rank, a, b]

if __name__ == "__main__":
    found = []
    for strategy in ("ddp", "fsdp", "tensor_parallel"):
        try:
            Fabric(accelerator="cpu", strategy=strategy, devices=4)
        except WorldError as error:
            found.append(str(error).startswith("`devices` must be") and "(2)" in str(error) and "4 x cpu" in str(error))
    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(start_method="spawn"), devices="auto")
    started = fabric.launch() is not None
    right = fabric.launch(work, 5, b=6) == [os.getpid(), fabric.global_rank, 5, 6]
    results = fabric.broadcast([found, started, right, fabric.world_size], src=1)
    fabric.print("result", results)
"""


def test_under_a_launcher(tmp_path: Path) -> None:
    """Nothing is started twice, and a contradiction is an error under every strategy."""
    (tmp_path / "script.py").write_text(LAUNCHED)
    ended = python(*TORCHRUN, tmp_path / "script.py")
    assert ended.status == 0, ended.err
    assert ended.out.count("result [[True, True, True], False, True, 2]") == 1
    assert not ended.left


# -- a rank that fails -------------------------------------------------------------------------------------------------

FAIL = """
import os, sys, time
from pathlib import Path
from fabriclite import DDPStrategy, Fabric

def work(fabric, folder, plan):
    (folder / f"{fabric.global_rank}.pid").write_text(str(os.getpid()))
    fabric.barrier()
    if plan == "sleep":
        time.sleep(600)
    if plan == f"{fabric.global_rank} raises":
        raise ZeroDivisionError("gave up here")
    fabric.barrier()
    if plan == f"{fabric.global_rank} raises late":
        time.sleep(1)
        raise ZeroDivisionError("gave up here")

if __name__ == "__main__":
    folder, plan, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    (folder / "starter.pid").write_text(str(os.getpid()))
    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(start_method=method), devices=2)
    fabric.launch(work, folder, plan)
"""


def pids(folder: Path) -> dict[str, int]:
    found = {file.stem: file.read_text() for file in folder.glob("*.pid")}
    return {name: int(text) for name, text in found.items() if text}


@pytest.mark.parametrize("plan", ["1 raises", *(["0 raises", "1 raises late"] if os.environ.get("FULL") else [])])
def test_failing_script(plan: str, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL)
    before = time.monotonic()
    ended = python(tmp_path / "fail.py", tmp_path, plan, "auto")
    took = time.monotonic() - before
    assert ended.status != 0
    assert "ZeroDivisionError: gave up here" in ended.err
    assert set(pids(tmp_path)) == {"starter", "0", "1"}
    assert not ended.left
    assert took < ENDED_S + 10, "starting takes some seconds too"


@pytest.mark.parametrize("method", ["popen", "spawn"])
def test_ranks_end_with_a_killed_starter(method: str, tmp_path: Path) -> None:
    """They are busy, in no collective that would tell them."""
    (tmp_path / "fail.py").write_text(FAIL)
    env = {k: v for k, v in os.environ.items() if k not in FROM_A_LAUNCHER}
    command = [sys.executable, tmp_path / "fail.py", tmp_path, "sleep", method]
    starter = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(pids(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        started = pids(tmp_path)
        time.sleep(0.5)  # past the barrier
        assert set(started) == {"starter", "0", "1"}
        assert not any(gone([pid], within=0) for pid in started.values())
        starter.kill()
        starter.wait()
        assert gone(list(started.values()), ENDED_S)
    finally:
        end_session(starter.pid)
        starter.wait()


def fails_on_one(fabric: Fabric, folder: Path, how: str) -> None:
    (folder / f"{fabric.global_rank}.pid").write_text(str(os.getpid()))
    fabric.barrier()
    if fabric.global_rank == 1:
        if how == "exits":
            os._exit(3)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("gave up here")
    fabric.barrier()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "in fails_on_one … ZeroDivisionError: gave up here"),
        ("exits", "Rank 1 of 2 exited with status 3"),
        ("killed", "Rank 1 of 2 was ended by signal 9 (SIGKILL)"),
    ],
)
def test_failing_function(how: str, says: str, tmp_path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        run(fails_on_one, "ddp", 2, tmp_path, how)
    assert time.monotonic() - before < ENDED_S
    assert str(caught.value).startswith("Rank 1 of 2 "), "what the other rank says follows from it"
    assert [part for part in says.split(" … ") if part not in str(caught.value)] == [], str(caught.value)
    assert "\nThen rank 0 on " in str(caught.value)
    started = pids(tmp_path)
    assert set(started) == {"0", "1"}
    assert gone(list(started.values()), within=1)


def hangs_on_zero(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise ZeroDivisionError("gave up here")
    time.sleep(600)


def test_a_rank_that_notices_nothing_is_ended() -> None:
    before = time.monotonic()
    with pytest.raises(LaunchError, match="ZeroDivisionError: gave up here"):
        run(hangs_on_zero, "ddp", 2)
    assert time.monotonic() - before < ENDED_S


# -- functions in new processes ----------------------------------------------------------------------------------------


def own_everything(fabric: Fabric, base: torch.Tensor, *, model: torch.nn.Linear) -> list[Any]:
    """What each rank was given, and whether it is its own."""
    fabric.barrier()
    base += 1 + fabric.global_rank
    with torch.no_grad():
        model.weight += 1
    fabric.barrier()
    how = mp.get_start_method(allow_none=True)
    facts = [fabric.global_rank, os.getpid(), how, base.item(), model.weight.item(), torch.rand(1).item()]
    return gather_objects(fabric._ready_world, facts)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_function_in_new_processes(method: StartMethod) -> None:
    """Seeds go along, arguments are copies, data loaders start workers as ever, and rank 0's result comes back."""
    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(start_method=method), devices=2)
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    base = torch.zeros(())
    fabric.seed_everything(5)
    result = fabric.launch(own_everything, base, model=model)
    assert result is not None
    drawn, usual = torch.rand(1).item(), mp.get_start_method(allow_none=True)
    assert [facts[0] for facts in result] == [0, 1]
    assert len({os.getpid(), *(facts[1] for facts in result)}) == 3
    assert [facts[2:] for facts in result] == [[usual, 1.0, 1.0, drawn], [usual, 2.0, 1.0, drawn]]
    assert base.item() == 0.0
    assert model.weight.item() == 0.0


def test_closure_under_fork() -> None:
    offset = 40

    def work(fabric: Fabric) -> int:
        def inner() -> int:
            return offset + fabric.world_size

        return inner() if fabric.is_global_zero else -1

    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(start_method="fork"), devices=2)
    assert fabric.launch(work) == 42
    assert fabric.launch(lambda fabric: fabric.global_rank) == 0


def collects(fabric: Fabric) -> int:
    gc.collect()
    fabric.barrier()
    return fabric.world_size


def raises(fabric: Fabric) -> None:
    raise ZeroDivisionError


@pytest.mark.timeout(60)
def test_fork_after_a_failure() -> None:
    """A forked process holds what its parent left to the collector, and must not wait for threads it has not."""
    fabric = Fabric(accelerator="cpu", strategy=DDPStrategy(start_method="fork"), devices=2)
    with pytest.raises(LaunchError):
        fabric.launch(raises)
    left: list[Any] = [serve()]
    left.append(left)
    del left
    assert fabric.launch(collects) == 2


def test_one_process_starts_nothing() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp")
    assert fabric.launch() is None
    assert fabric.launch(lambda fabric, a, b: (fabric, a, b), 1, b=2) == (fabric, 1, 2)
    assert (fabric.global_rank, fabric.world_size, fabric.is_global_zero) == (0, 1, True)


WAYS: list[tuple[dict[str, Any], StartMethod, Way]] = [
    ({"launched": True}, "spawn", "nothing"),
    ({"processes": 1, "script": False}, "auto", "nothing"),
    ({}, "auto", "rerun"),
    ({"function": True}, "auto", "rerun"),
    ({"function": True, "script": False}, "auto", "fork"),
    ({"function": True}, "spawn", "spawn"),
    ({"function": True}, "forkserver", "forkserver"),
    ({}, "popen", "rerun"),
    ({"launched": True, "nodes": 4}, "auto", "nothing"),
]


@pytest.mark.parametrize(("situation", "method", "way"), WAYS)
def test_choice(situation: dict[str, Any], method: StartMethod, way: Way) -> None:
    usual = {"launched": False, "processes": 2, "nodes": 1, "script": True, "function": False}
    assert choose(Situation(**{**usual, **situation}), method) == way


# -- working together --------------------------------------------------------------------------------------------------


def take_turns(fabric: Fabric, folder: Path) -> list[Any]:
    facts: dict[str, Any] = {"rank": fabric.global_rank, "local": fabric.local_rank, "zero": fabric.is_global_zero}
    with fabric.rank_zero_first():
        facts["first"] = not (folder / "data").exists()
        if facts["first"]:
            time.sleep(0.3)
            (folder / "data").write_text("here")
        facts["read"] = (folder / "data").read_text()
    with fabric.rank_zero_first(local=True):
        facts["locally first"] = not (folder / "cache").exists()
        time.sleep(0.1 * (fabric.local_rank == 0))
        (folder / "cache").touch()
    try:
        with fabric.rank_zero_first():
            if fabric.is_global_zero:
                raise ZeroDivisionError
            facts["went on"] = True
    except ZeroDivisionError:
        facts["went on"] = False
    if fabric.global_rank == 1:
        time.sleep(0.3)
        (folder / "late").touch()
    fabric.barrier("late is there")
    facts["after barrier"] = (folder / "late").exists()
    facts["from 1"] = fabric.broadcast({"who": fabric.global_rank, "t": torch.full((2,), fabric.global_rank)}, src=1)
    facts["from 0"] = fabric.broadcast(fabric.global_rank)
    return gather_objects(fabric._ready_world, facts)


@pytest.fixture
def limited() -> Iterator[None]:
    before = time.monotonic()
    yield
    assert time.monotonic() - before < 30


@pytest.mark.usefixtures("limited")
def test_order_of_ranks(tmp_path: Path) -> None:
    zero, one = run(take_turns, "ddp", 2, tmp_path)
    assert (zero["rank"], zero["local"], zero["zero"]) == (0, 0, True)
    assert (one["rank"], one["local"], one["zero"]) == (1, 1, False)
    assert (zero["first"], one["first"]) == (True, False)
    assert (zero["locally first"], one["locally first"]) == (True, False)
    assert (zero["went on"], one["went on"]) == (False, True)
    for facts in (zero, one):
        assert facts["read"] == "here"
        assert facts["after barrier"]
        assert facts["from 1"]["who"] == 1
        assert facts["from 1"]["t"].tolist() == [1, 1]
        assert facts["from 0"] == 0


# -- the package -------------------------------------------------------------------------------------------------------

HEAVY = (
    "deepspeed",
    "transformers",
    "tensorboard",
    "rich",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
)


def test_import_is_light() -> None:
    look = f"import sys, torch, fabriclite; print('heavy', [name for name in {HEAVY!r} if name in sys.modules])"
    ended = python("-c", look)
    assert ended.out.strip() == "heavy []", ended


def test_public_names() -> None:
    names = fabriclite.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(fabriclite, name)] == []
    public: dict[str, Callable[..., Any]] = {}
    exec("from fabriclite import *", public)
    assert set(names) <= set(public)


def trains_with_zero(fabric: Any) -> float:
    module = torch.nn.Linear(3, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 3)).sum())
    optimizer.step()
    return float(model(torch.ones(1, 3)).sum())


def test_deepspeed_in_a_second_group() -> None:
    """As in a notebook: DeepSpeed itself keeps a group that is gone."""
    first = run(trains_with_zero, "zero3", 1)
    torch.distributed.destroy_process_group()
    second = run(trains_with_zero, "zero3", 1)
    assert math.isfinite(first)
    assert math.isfinite(second)

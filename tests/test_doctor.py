"""``fabriclite doctor`` in real processes: what it finds, what it warns of, and what it never shows."""

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import recorded_environments as recorded
from fabriclite.doctor import machine
from fabriclite.doctor.facts import Fact, Section, look
from fabriclite.doctor.problems import Seen, problems
from fabriclite.doctor.secrets import allowed, hidden

SECRET = "sesame-4711"
TITLES = ["machine", "devices", "torch", "packages", "environment"]
LAUNCHERS = {name for known in vars(recorded).values() if isinstance(known, dict) for name in known} - {"HOME", "PATH"}
TUNING = re.compile("(TORCH_)?NCCL_|TORCH_DISTRIBUTED|GLOO_|CUDA_|DS_|MKL_")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def plain(env: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS and not TUNING.match(name)}
    return {**kept, "OMP_NUM_THREADS": "1", **env}


def doctor(*options: str, **env: str) -> Ended:
    command = [sys.executable, "-m", "fabriclite", "doctor", *options]
    done = subprocess.run(command, env=plain(env), capture_output=True, text=True, timeout=90, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def as_json(*options: str, **env: str) -> tuple[int, dict[str, Any]]:
    ended = doctor("--json", *options, **env)
    assert ended.err == ""
    found: dict[str, Any] = json.loads(ended.out)
    return ended.status, found


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_with_bandwidth() -> None:
    before = time.monotonic()
    status, found = as_json()
    took = time.monotonic() - before
    assert (status, found["problems"]) == (0, [])
    assert list(found) == [*TITLES, "all_reduce", "problems"]
    gloo = found["all_reduce"]["gloo"]
    assert gloo["processes"] == 2
    assert gloo["tensor_bytes"] == 16 * 2**20
    assert gloo["bytes_per_second"] == pytest.approx(gloo["tensor_bytes"] / gloo["large_s"], rel=0.01)
    assert 1e6 < gloo["bytes_per_second"] < 1e12
    assert 0 < gloo["small_s"] < gloo["large_s"]
    assert took < 60
    assert found["machine"]["host"] == socket.gethostname()
    assert 1 <= found["machine"]["cores_usable"] <= found["machine"]["cores"]
    assert found["machine"]["memory_bytes"] > found["machine"]["memory_available_bytes"] > 0
    assert "lo" in found["machine"]["network_interfaces"]
    assert found["torch"]["torch"] == torch.__version__
    assert "gloo" in found["torch"]["backends"]
    assert len(found["devices"]["cuda"]) == torch.cuda.device_count()
    assert re.match(r"\d+\.\d+", found["packages"]["numpy"])
    assert found["environment"]["name"] == "none"
    assert found["environment"]["described"] is None
    assert found["environment"]["variables"] == {"OMP_NUM_THREADS": "1"}


def test_lines() -> None:
    ended = doctor("--no-bandwidth")
    assert ended.status == 0
    assert [line for line in ended.out.splitlines() if not line.startswith(" ")] == [
        *TITLES,
        "problems",
        "No problem found.",
    ]
    assert re.search(r"^  torch +2\.", ended.out, re.MULTILINE)
    assert re.search(r"^  memory +\d+\.\d GiB$", ended.out, re.MULTILINE)
    assert re.search(r"^  why +none, because no launcher's variables are set$", ended.out, re.MULTILINE)
    assert re.search(r"^    OMP_NUM_THREADS +1$", ended.out, re.MULTILINE)


def test_tables_on_a_terminal() -> None:
    pytest.importorskip("rich")
    shown = on_a_terminal("doctor", "--no-bandwidth", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert "│" in shown
    assert "TORCH_DISTRIBUTED_DEBUG is DETAIL" in " ".join(shown.split())
    assert "1 error, 0 warnings." in shown


def on_a_terminal(*arguments: str, **env: str) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fabriclite", *arguments]
    process = subprocess.Popen(command, env=plain({"COLUMNS": "200", **env}), stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 1.0)
            try:
                piece = os.read(ours, 65536) if ready else b"-"
            except OSError:  # Linux: the other side was closed
                break
            if not piece:
                break
            shown += piece if ready else b""
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode()


def test_an_error_is_in_the_exit_status() -> None:
    status, found = as_json("--no-bandwidth", TORCH_DISTRIBUTED_DEBUG="DETAIL", NCCL_P2P_DISABLE="1")
    assert status == 1
    error, warning = found["problems"]
    assert (error["level"], warning["level"]) == ("error", "warning")
    assert error["what"].startswith("TORCH_DISTRIBUTED_DEBUG is DETAIL: building DDP under it crashes")
    assert error["mend"] == "Unset it, or set INFO."
    assert "NCCL_P2P_DISABLE" in warning["what"]
    assert "all_reduce" not in found


def test_under_a_launcher() -> None:
    env = {**recorded.SRUN, "OMP_NUM_THREADS": "1"}
    status, found = as_json("--no-bandwidth", **env)
    assert (status, found["problems"]) == (0, [])
    assert found["environment"]["name"] == "slurm"
    assert found["environment"]["why"] == "SLURM, because SLURM_JOB_ID, SLURM_STEP_ID and SLURM_PROCID are set"
    assert found["environment"]["described"]["master_address"] == "gnode010"
    if not torch.cuda.is_available():
        assert found["environment"]["world"] == "rank 5 of 8 on cpu"


def test_measures_under_a_launcher() -> None:
    """The two processes are the doctor's own, whoever started it."""
    status, found = as_json(**recorded.SRUN)
    assert found["all_reduce"]["gloo"]["processes"] == 2
    assert status == 0


def test_a_launch_that_is_wrong() -> None:
    """The error of the environment is shown, and all other facts are found."""
    ended = doctor("--no-bandwidth", **recorded.SBATCH)
    assert ended.status == 1
    assert ended.err == ""
    assert re.search(r"^  name +could not be found: A SLURM job of 8 tasks must be started", ended.out, re.MULTILINE)
    assert re.search(r"^  error +The environment cannot be read: A SLURM job of 8 tasks", ended.out, re.MULTILINE)
    assert re.search(r"^  torch +2\.", ended.out, re.MULTILINE)
    assert ended.out.endswith("1 error, 0 warnings.\n")


SECRETS = {
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "NCCL_MADE_UP": SECRET,
    "SLURM_JWT": SECRET,
    "RANK_OF_MINE": SECRET,
    "HTTPS_PROXY": f"http://user:{SECRET}@proxy:3128",
    "KUBERNETES_PORT": f"tcp://user:{SECRET}@10.96.0.1:443/?token={SECRET}",
    "MASTER_ADDR": f"user:{SECRET}@n1",
}


@pytest.mark.parametrize("options", [("--json",), ()])
def test_no_secret_is_shown(options: tuple[str, ...]) -> None:
    ended = doctor("--no-bandwidth", *options, **SECRETS)
    assert SECRET not in ended.out + ended.err
    assert "tcp://***@10.96.0.1:443/?***" in ended.out, "what is beside the secret is shown"


def test_no_secret_in_an_error() -> None:
    """An error that quotes a variable."""
    ended = doctor("--no-bandwidth", FABRICLITE_ENVIRONMENT=f"https://user:{SECRET}@host/?key={SECRET}")
    assert ended.status == 1
    assert SECRET not in ended.out + ended.err
    assert "FABRICLITE_ENVIRONMENT must be one of" in ended.out


def test_without_rich(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('not installed')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    shown = on_a_terminal("doctor", "--no-bandwidth", PYTHONPATH=path, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert "│" not in shown
    assert "1 error, 0 warnings." in shown


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_one_fact_that_fails_stops_no_other() -> None:
    def broken() -> str:
        raise OSError(f"cannot reach https://user:{SECRET}@host/x?key={SECRET}")

    def silent() -> str:
        raise ZeroDivisionError

    found = look("room", {"first": broken, "second": lambda: 2, "third": silent})
    assert found.facts == (
        Fact("first", None, "cannot reach https://***@host/x?***"),
        Fact("second", 2),
        Fact("third", None, "ZeroDivisionError"),
    )
    assert found.facts[0].as_json() == {"could_not_be_found": "cannot reach https://***@host/x?***"}


def test_hidden() -> None:
    assert hidden("tcp://10.0.0.1:29500") == "tcp://10.0.0.1:29500"
    assert hidden({"a": ["s3://key:pa/ss@bucket/x"], "b": 3}) == {"a": ["s3://***@bucket/x"], "b": 3}
    assert allowed({"RANK": "1", "HF_TOKEN": SECRET}) == {"RANK": "1"}


def seen(env: Mapping[str, str] | None = None, **sections: Mapping[str, Any]) -> Seen:
    made = {t: Section(t, tuple(Fact(name, v) for name, v in facts.items())) for t, facts in sections.items()}
    return Seen(env or {}, made)


def launched(**described: Any) -> dict[str, Any]:
    usual = {"size": 2, "local_size": 2, "node_rank": 0, "master_address": "127.0.0.1"}
    return {"name": "slurm", "described": {**usual, **described}}


BAD: dict[str, tuple[Seen, str, str]] = {
    "old torch": (seen(torch={"torch": "2.10.1+cu128"}), "error", "torch is 2.10.1+cu128, but must be 2.11"),
    "old deepspeed": (seen(packages={"deepspeed": "0.17.2"}), "error", "deepspeed is 0.17.2"),
    "no threads": (
        seen(environment=launched(), machine={"cores_usable": 8}),
        "warning",
        "OMP_NUM_THREADS is not set for 2 ranks … Set it to the cores of a rank, 4",
    ),
    "many threads": (
        seen({"OMP_NUM_THREADS": "8"}, environment=launched(), machine={"cores_usable": 8}),
        "warning",
        "OMP_NUM_THREADS is 8 for 2 ranks on 8 cores … Set it to 4",
    ),
    "loopback": (
        seen({"OMP_NUM_THREADS": "1"}, environment=launched(local_size=1, node_rank=1)),
        "error",
        "MASTER_ADDR is 127.0.0.1 on a machine that is not the first",
    ),
    "old name": (seen({"NCCL_BLOCKING_WAIT": "1"}), "warning", "another name … TORCH_NCCL_BLOCKING_WAIT"),
    "no error handling": (seen({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}), "error", "for ever"),
    "no monitoring": (seen({"TORCH_NCCL_ENABLE_MONITORING": "0"}), "warning", "TORCH_NCCL_ENABLE_MONITORING is 0"),
    "blocking": (seen({"TORCH_NCCL_BLOCKING_WAIT": "true"}), "warning", "every collective is waited for"),
    "launch blocking": (seen({"CUDA_LAUNCH_BLOCKING": "1"}), "warning", "every kernel is waited for"),
    "no shared memory": (seen({"NCCL_SHM_DISABLE": "1"}), "warning", "NCCL_SHM_DISABLE is set … by shared memory"),
    "no nccl": (
        seen(devices={"cuda": [{"name": "H200"}] * 2}, torch={"backends": ["gloo"]}),
        "error",
        "2 CUDA devices, but this torch has no NCCL",
    ),
    "no driver": (seen(devices={"cuda": []}, torch={"cuda": "13.0"}), "warning", "built for CUDA … nvidia-smi"),
    "interface": (
        seen({"GLOO_SOCKET_IFNAME": "ib0"}, machine={"network_interfaces": ["lo", "eth0"]}),
        "error",
        "GLOO_SOCKET_IFNAME names ib0, but this machine has lo, eth0",
    ),
    "no address": (
        Seen({}, {"machine": Section("machine", (Fact("host", "n7"), Fact("address", None, "not known")))}),
        "error",
        "name of this host, n7, has no address … /etc/hosts",
    ),
    "nccl on lo": (
        seen(
            {"NCCL_SOCKET_IFNAME": "=lo", "OMP_NUM_THREADS": "1"},
            environment=launched(local_size=1, master_address="n1"),
        ),
        "error",
        "NCCL_SOCKET_IFNAME is lo in a run of several machines",
    ),
    "small shared memory": (seen(machine={"shared_memory_bytes": 64 * 2**20}), "warning", "/dev/shm has 64 MiB"),
    "no reduction": (
        Seen({}, {"all_reduce": Section("all_reduce", (Fact("gloo", None, "Rank 0 …\nboom\nThen rank 1: x"),))}),
        "error",
        "cannot reduce a tensor by gloo: boom",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_combinations(name: str) -> None:
    found, level, says = BAD[name]
    (problem,) = problems(found)
    assert problem.level == level
    text = f"{problem.what} {problem.mend}"
    assert [part for part in says.split(" … ") if part not in text] == [], text


def test_good_combinations() -> None:
    good = seen(
        {
            "OMP_NUM_THREADS": "4",
            "TORCH_DISTRIBUTED_DEBUG": "INFO",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_P2P_DISABLE": "0",
        },
        environment=launched(size=4, master_address="n1"),
        machine={"cores_usable": 8, "network_interfaces": ["lo", "eth0"], "shared_memory_bytes": 2**33, "address": "x"},
        torch={"torch": "2.13.0", "cuda": "13.0", "backends": ["gloo", "nccl"]},
        devices={"cuda": [{"name": "H200"}]},
        packages={"deepspeed": "0.19.8"},
        all_reduce={"gloo": {"bytes_per_second": 1}},
    )
    assert problems(good) == ()


def test_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest limit on the way up, of both versions; the files are as the kernel writes them."""
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/job/7\n1:cpu,cpuacct:/job\n0::/slice/7\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUPS", groups)
    for path, text in {
        "memory/job/7/memory.limit_in_bytes": "9223372036854771712",
        "memory/job/memory.limit_in_bytes": "1048576",
        "slice/memory.max": "max",
        "slice/7/memory.max": "2097152",
        "cpu/job/cpu.cfs_quota_us": "150000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "slice/cpu.max": "300000 100000",
        "slice/7/cpu.max": "max 100000",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
    found = machine.machine()
    assert (found.value("cgroup_memory_bytes"), found.value("cgroup_cores")) == (1048576, 1.5)
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text("-1\n")
    assert machine.machine().value("cgroup_cores") == 3

"""Stopping on a signal: every rank at the same step, with a whole checkpoint and status 75, whoever got the signal."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fabriclite import ConfigError, Fabric, SetupOrderError, WorldError
from fabriclite.collectives import gather_objects
from fabriclite.launch.requeue import job_of
from worlds import run

SCRIPT = Path(__file__).parent / "preempted.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HANDS_ON = (*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGUSR1")
LIMIT_S = 60.0
FSDP = ("--strategy", "fsdp")
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="seconds each; asked for by FULL=1")


@pytest.fixture(autouse=True)
def _handlers_are_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def one() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


# -- in one process ----------------------------------------------------------------------------------------------------


def test_a_world_of_one_knows_at_once() -> None:
    with one().preemption() as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested()
        assert stop.signal == signal.SIGUSR1
        assert stop.requested(), "it stays so"


def test_only_every_so_often() -> None:
    with one().preemption(every=3) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert [stop.requested() for _ in range(4)] == [False, False, True, True]


def test_an_ending_signal_asks_for_most() -> None:
    with one().preemption() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested()
        assert stop.signal == signal.SIGTERM


def test_handlers_of_the_user_are_called_and_put_back() -> None:
    heard: list[int] = []

    def mine(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with one().preemption() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested()
            assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is mine
        stop.close()  # once more does nothing
        with one().preemption():
            pass
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_may_be_one_of_them() -> None:
    with one().preemption(signals=(signal.SIGINT,)) as stop:
        signal.raise_signal(signal.SIGINT)  # no KeyboardInterrupt
        assert stop.requested()


def test_only_in_the_main_thread() -> None:
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            one().preemption()
        except ConfigError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere, name="side")
    thread.start()
    thread.join(LIMIT_S)
    assert "must be called in the main thread" in str(found[0])
    assert "but was in 'side'. Call it before" in str(found[0])


def test_only_once() -> None:
    with one().preemption(), pytest.raises(SetupOrderError, match=r"must be called once, but .* close\(\) it"):
        one().preemption()


def test_beside_an_event_loop_that_takes_signals() -> None:
    """Both hear what is theirs, as often as it comes, and the loop is left as it was."""
    heard: list[str] = []

    async def within() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, lambda: heard.append("loop"))
        with one().preemption() as stop:
            signal.raise_signal(signal.SIGUSR2)
            await asyncio.sleep(0.2)
            assert not stop.requested()
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested()
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.sleep(0.2)

    asyncio.run(within())
    assert heard == ["loop", "loop"]


def test_exit_only_when_asked() -> None:
    with one().preemption() as stop, pytest.raises(SetupOrderError, match=r"after requested\(\) was true, but it was"):
        stop.exit()


@pytest.mark.parametrize("signals", [(), 15, (signal.SIGKILL,), (9999,), ("SIGTERM",)], ids=str)
def test_signals_that_nobody_can_handle(signals: Any) -> None:
    with pytest.raises(ConfigError, match=r"`signals` must be signals that a process can handle, but is .* Write "):
        one().preemption(signals)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_count(every: Any) -> None:
    with pytest.raises(ConfigError, match=rf"`every` must be a whole number of steps of at least 1, but is {every}"):
        one().preemption(every=every)


def test_before_launch() -> None:
    with pytest.raises(SetupOrderError, match="`launch` must be called before"):
        Fabric(accelerator="cpu", strategy="ddp", devices=2).preemption()


# -- agreement ---------------------------------------------------------------------------------------------------------


def told_at(fabric: Fabric, when: dict[int, int], every: int) -> list[Any]:
    """Rank ``r`` gets its signal during step ``when[r]``. When each rank knew, and of what."""
    with fabric.preemption(every=every) as stop:
        for step in range(1, 30):
            time.sleep(random.Random(f"{step}/{fabric.global_rank}").random() / 200)
            if when.get(fabric.global_rank) == step:
                signal.raise_signal(signal.SIGTERM if fabric.global_rank == 2 else signal.SIGUSR1)
            if stop.requested():
                break
    return gather_objects(fabric._ready_world, (step, stop.signal))


@pytest.mark.parametrize(
    ("when", "every", "known"),
    [
        ({1: 4}, 1, (5, signal.SIGUSR1)),
        ({0: 4}, 1, (5, signal.SIGUSR1)),
        ({0: 7, 1: 6, 2: 6}, 1, (7, signal.SIGTERM)),  # the one that asks for most
        ({0: 6, 2: 7}, 1, (7, signal.SIGUSR1)),  # known before the other came
        ({1: 4}, 3, (9, signal.SIGUSR1)),  # sent at 6
        ({}, 1, (29, None)),
    ],
    ids=str,
)
def test_all_ranks_know_at_the_same_step(when: dict[int, int], every: int, known: Any) -> None:
    assert run(told_at, "ddp", 3, when, every) == [known] * 3


def test_many_times() -> None:
    """Whenever the signals come: all ranks stop together, one step after the first."""
    draw = random.Random(5)
    for _ in range(8):
        when = {rank: draw.randrange(1, 20) for rank in draw.sample(range(4), draw.randrange(1, 5))}
        answers = run(told_at, "ddp", 4, when, 1)
        assert answers == [answers[0]] * 4
        assert answers[0][0] == min(when.values()) + 1


# -- real scripts ------------------------------------------------------------------------------------------------------


class Stopped:
    """A run of the script.

    Attributes:
        status: exit status of what was started.
        steps: where each rank stopped.
    """

    def __init__(self, folder: Path, *command: object, **env: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(name, None)
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**kept, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.out, self.err = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.status = process.returncode
        self.ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
        self.steps = [rank["stopped"] for rank in self.ranks]

    def left(self) -> list[int]:
        """Ranks that still run."""
        return [rank["pid"] for rank in self.ranks if Path(f"/proc/{rank['pid']}").exists()]


def loads(path: Path) -> int:
    """The step that a checkpoint is of."""
    state: dict[str, Any] = {"step": 0}
    one().load(path, state, strict=False)
    return int(state["step"])


@pytest.mark.parametrize(
    ("way", "options", "status", "step"),
    [
        pytest.param((), ["--devices", "2", "--during", "backward"], 75, 4, id="script run again, rank 1"),
        pytest.param((), ["--devices", "2", "--to", "family", "--workers", "1"], 75, 4, id="the whole session"),
        pytest.param(TORCHRUN, [*FSDP, "--to", "all", "--during", "save"], 1, 4, id="torchrun, all", marks=FULL),
        pytest.param(TORCHRUN, ["--to", "parent"], 1, None, id="torchrun's agent"),
        pytest.param((), ["--devices", "1"], 75, 3, id="one process", marks=FULL),
        pytest.param((), ["--devices", "1", "--during", "save", "--asynchronous"], 75, 3, id="a save", marks=FULL),
        pytest.param(TORCHRUN, ["--strategy", "fsdp", "--asynchronous"], 1, 4, id="torchrun, rank 1", marks=FULL),
        pytest.param(TORCHRUN, ["--to", "parent", "--workers", "1"], 1, None, id="agent, workers", marks=FULL),
        pytest.param((), ["--devices", "2", "--to", "all", "--number", "SIGUSR1"], 75, 4, id="all", marks=FULL),
        pytest.param(HANDS_ON, ["--to", "parent", "--number", "SIGUSR1"], 1, None, id="agent, SIGUSR1", marks=FULL),
    ],
)
def test_all_ranks_stop_and_save(
    tmp_path: Path, way: tuple[str, ...], options: list[str], status: int, step: int | None
) -> None:
    ended = Stopped(tmp_path, *way, SCRIPT, tmp_path, *options)
    assert ended.status == status, ended.err
    world = 1 if "1" in options[:2] else 2
    assert len(ended.steps) == world, ended.err
    stopped = ended.steps[0] if step is None else step  # the agent passes its signal on when it comes to it
    assert stopped is not None
    assert ended.steps == [stopped] * world, ended.err
    assert loads(tmp_path / "latest") == stopped
    if status == 1:
        assert "exitcode  : 75" in ended.err or "parent" in options, ended.err
    assert ended.left() == []


def test_without_a_signal(tmp_path: Path) -> None:
    ended = Stopped(tmp_path, SCRIPT, tmp_path, "--devices", "2", "--to", "nobody", "--steps", "5")
    assert (ended.status, ended.steps) == (0, [None, None])
    assert ended.err == ""


HUNG = """
import os, signal, sys, threading, time
from fabriclite import Fabric
stop = Fabric(accelerator="cpu", devices=1).preemption()
lock = threading.Lock()
lock.acquire()
print("ready", flush=True)
while True:  # never comes to requested()
    time.sleep(60)
"""


def test_a_second_one_ends_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", HUNG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)  # what a launcher hands on is the same request
        process.send_signal(signal.SIGUSR1)
        time.sleep(2.0)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=5)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "fabriclite: SIGTERM came a second time; ending at once.\n"


CHILD = """
import os, signal, sys, time
from fabriclite import Fabric
stop = Fabric(accelerator="cpu", devices=1).preemption()
child = os.fork()
if child == 0:
    print("forked", flush=True)
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGUSR1)  # ignored
time.sleep(0.2)
os.kill(child, signal.SIGTERM)  # as it would be without us
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested())
"""


def test_a_forked_process_is_not_asked() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout == "forked\n-15 False\n"


# -- SLURM -------------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, status: int = 0) -> str:
    """A ``scontrol`` that notes its arguments; PATH with it in front."""
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\necho "not now" >&2\nexit {status}\n')
    program.chmod(0o700)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("number", "refused", "called"),
    [
        ("SIGUSR1", 1, "requeue 41_7\n"),
        pytest.param("SIGUSR1", 0, "requeue 41_7\n", marks=FULL),
        pytest.param("SIGTERM", 0, None, marks=FULL),
    ],
)
def test_requeue(tmp_path: Path, number: str, refused: int, called: str | None) -> None:
    job = {"SLURM_JOB_ID": "48", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "7"}
    path = stand_in(tmp_path / "bin", refused)
    ended = Stopped(tmp_path, SCRIPT, tmp_path, "--devices", "2", "--number", number, "--requeue", PATH=path, **job)
    assert (ended.status, ended.steps) == (75, [4, 4]), ended.err
    file = tmp_path / "bin" / "called"
    assert (file.read_text() if file.exists() else None) == called
    said = f"fabriclite: {tmp_path}/bin/scontrol requeue 41_7 ended with status 1: not now. Submit the job again.\n"
    assert ended.err == (said if refused else "")


def test_which_job() -> None:
    assert job_of({"SLURM_JOB_ID": "48"}) == "48"
    assert job_of({"SLURM_JOB_ID": "48", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "7"}) == "41_7"
    with pytest.raises(WorldError, match=r"`requeue` must be asked for within a job of SLURM's, but SLURM_JOB_ID is"):
        job_of({})


def test_requeue_needs_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "48")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorldError, match=r"`requeue` must find scontrol on PATH .* but there is none\. Leave"):
        one().preemption(requeue=True)


# -- together with failures --------------------------------------------------------------------------------------------


def stops(fabric: Fabric) -> None:
    stop = fabric.preemption()
    for _ in range(10):
        if fabric.global_rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        if stop.requested():
            stop.exit()


def test_a_function_in_new_processes_ends_the_starter_too() -> None:
    with pytest.raises(SystemExit) as ended:
        run(stops, "ddp", 2)
    assert ended.value.code == 75


FAILS = """
import sys, time
from pathlib import Path
from fabriclite import Fabric
fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.launch()
stop = fabric.preemption()
stop.requested()
if fabric.global_rank == 1:
    time.sleep(1)
    Path(sys.argv[1]).touch()
    raise ZeroDivisionError("the reason")
time.sleep(60)  # nothing tells this rank; torchrun sends it SIGTERM
"""


def test_a_failure_of_another_rank_is_no_request(tmp_path: Path) -> None:
    script, stamp = tmp_path / "fails.py", tmp_path / "stamp"
    script.write_text(FAILS)
    ended = Stopped(tmp_path, *TORCHRUN, script, stamp)
    assert ended.status == 1
    assert time.time() - stamp.stat().st_mtime < 10.0
    assert "ZeroDivisionError: the reason" in ended.err

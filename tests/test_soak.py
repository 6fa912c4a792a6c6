"""Killed again and again, a run ends as the one that nobody touched: the same weights, the same samples per epoch."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from soaked import GLOBAL_BATCH, SAMPLES

SCRIPT = Path(__file__).parent / "soaked.py"
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="a minute or more each; asked for by FULL=1")
LONG = [FULL, pytest.mark.timeout(600)]
SAME = 1e-5
"""Relative difference of losses where another number of ranks adds the same numbers in another order."""
TORCHRUN = ("-m", "torch.distributed.run")
RUN = ("-m", "fabriclite", "run")
Kills = list[tuple[int, int, str]]


@contextmanager
def started(
    folder: Path, *options: object, launcher: tuple[str, ...], by: tuple[str, ...] = TORCHRUN
) -> Iterator["subprocess.Popen[str]"]:
    """The script under a launcher in ``folder``; what is left of it is killed at the end."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *by, *launcher, SCRIPT, folder, *options]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [*map(str, command)],
            env={**env, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_host(process)


def kill_host(agent: "subprocess.Popen[str]") -> None:
    """All at once, the agent first, as when a machine goes."""
    try:
        family = [*psutil.Process(agent.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    agent.kill()
    for process in family:
        process.kill()
    agent.wait()


def soak(
    folder: Path,
    ranks: int,
    kills: Kills,
    *options: object,
    restarts: int = 0,
    limit: float = 150.0,
    by: tuple[str, ...] = TORCHRUN,
) -> int:
    """Train in ``folder``; the exit status."""
    launcher = ("--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts))
    with started(folder, "--kills", json.dumps(kills), *options, launcher=launcher, by=by) as process:
        return process.wait(limit)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()[-4000:]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What each step left, in order."""
    count = len(list((folder / "steps").glob("*.json")))
    return [json.loads((folder / "steps" / f"{step}.json").read_text()) for step in range(1, count + 1)]


def losses_of(folder: Path) -> list[float]:
    return [step["loss"] for step in steps_of(folder)]


def digests_of(folder: Path, ranks: int) -> list[str]:
    return [json.loads((folder / f"result-{rank}.json").read_text())["digest"] for rank in range(ranks)]


def check_epochs(folder: Path, steps: int) -> None:
    """Every epoch has every sample once, also the last as far as it went."""
    per_epoch = SAMPLES // GLOBAL_BATCH
    seen = [step["samples"] for step in steps_of(folder)]
    assert len(seen) == steps
    for first in range(0, steps, per_epoch):
        samples = [number for step in seen[first : first + per_epoch] for number in step]
        assert len(samples) == len(set(samples)), f"twice in epoch {first // per_epoch}"
        if first + per_epoch <= steps:
            assert sorted(samples) == list(range(SAMPLES)), f"lost in epoch {first // per_epoch}"


def plan(steps: int, ranks: int, seed: int) -> Kills:
    """A kill every 20 to 40 steps, of any rank, in the middle of anything. Those in a save come at the next save."""
    draw = random.Random(seed)
    kills: Kills = []
    step = draw.randrange(20, 41)
    while step < steps:
        what = draw.choice(["forward", "backward", "step", "save"])
        kills.append((-(-step // 5) * 5 if what == "save" else step, draw.randrange(ranks), what))
        step += draw.randrange(20, 41)
    return kills


# -- one machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "strategy", "steps", "ranks", "kills"),
    [
        pytest.param(RUN, "ddp", 60, 2, [(22, 1, "backward"), (45, 0, "save")], id="ddp"),
        pytest.param(TORCHRUN, "ddp", 200, 2, plan(200, 2, seed=1), id="ddp-200", marks=LONG),
        pytest.param(RUN, "fsdp", 200, 3, plan(200, 3, seed=2), id="fsdp-200", marks=LONG),
    ],
)
def test_the_weights_of_the_run_that_nobody_killed(
    tmp_path: Path, by: tuple[str, ...], strategy: str, steps: int, ranks: int, kills: Kills
) -> None:
    """Bit for bit, with dropout: every rank's random numbers go on, too.

    DDP on more than two ranks adds the same gradients in another order in its first step after a start.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--steps", steps, "--dropout", 0.2, "--strategy", strategy)
    assert soak(whole, ranks, [], *options, by=by) == 0, log_of(whole)
    assert soak(killed, ranks, kills, *options, restarts=len(kills), limit=500.0, by=by) == 0, log_of(killed)
    assert len(list(killed.glob("killed-*"))) == len(kills)
    assert steps_of(killed) == steps_of(whole)
    assert digests_of(killed, ranks) == digests_of(whole, ranks)
    check_epochs(killed, steps)


@FULL
@pytest.mark.timeout(600)
def test_another_number_of_ranks_after_each_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert soak(whole, 2, [], "--steps", 200) == 0, log_of(whole)
    ends = plan(200, 1, seed=3)
    worlds = [2, 1, 3, 2, 4, 1, 3][: len(ends)]
    for ranks, kill in zip(worlds, ends, strict=True):
        assert soak(killed, ranks, [kill], "--steps", 200) != 0
        assert len(list(killed.glob("killed-*"))) == ends.index(kill) + 1, log_of(killed)
    assert soak(killed, 2, [], "--steps", 200) == 0, log_of(killed)
    assert {step["ranks"] for step in steps_of(killed)} == {*worlds, 2}
    check_epochs(killed, 200)
    assert [sorted(s["samples"]) for s in steps_of(killed)] == [sorted(s["samples"]) for s in steps_of(whole)]
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=SAME)


# -- two machines ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(file: Path, agents: "list[subprocess.Popen[str]]", limit: float = 90.0) -> None:
    deadline = time.monotonic() + limit
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come: {log_of(file.parent.parent)}"
        assert all(agent.poll() is None for agent in agents), log_of(file.parent.parent)
        time.sleep(0.05)


def one_or_two_machines(last_call_s: int) -> tuple[str, ...]:
    """A rendezvous on the loopback. Once there is one machine, it waits so many seconds for the other."""
    return (
        *("--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3", "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "soak"),
        *("--rdzv-conf", f"last_call_timeout={last_call_s},keep_alive_interval=1,keep_alive_max_attempt=3"),
    )


@FULL
@pytest.mark.timeout(400)
def test_a_machine_goes_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Two agents of torchrun, two ranks each. One and its ranks are killed; the other two take over their part."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert soak(whole, 4, [], "--steps", 60) == 0, log_of(whole)
    launcher = one_or_two_machines(last_call_s=15)
    options = ("--steps", 60, "--sleep", 0.1)
    with started(rest, *options, launcher=launcher) as stays:
        time.sleep(2)  # the first agent there serves the rendezvous
        with started(rest, *options, launcher=launcher) as goes:
            wait_for(rest / "steps" / "22.json", [stays, goes])
            kill_host(goes)
        assert stays.wait(150) == 0, log_of(rest)
    assert [step["ranks"] for step in steps_of(rest)[:20]] == [4] * 20
    assert steps_of(rest)[-1]["ranks"] == 2
    check_epochs(rest, 60)
    assert losses_of(rest) == pytest.approx(losses_of(whole), rel=SAME)


@FULL
@pytest.mark.timeout(400)
@pytest.mark.parametrize("by", [pytest.param(TORCHRUN, id="torchrun"), pytest.param(RUN, id="run")])
def test_a_machine_comes_and_takes_its_part(
    by: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent stops the ranks for it by SIGTERM: they save, and no step is lost."""
    if by is TORCHRUN:  # whose agent tells where ranks meet in its first round alone: one that comes later waits
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    whole, grows = tmp_path / "whole", tmp_path / "grows"
    assert soak(whole, 4, [], "--steps", 60) == 0, log_of(whole)
    launcher = one_or_two_machines(last_call_s=5)
    options = ("--steps", 60, "--sleep", 0.5, "--save-every", 1000)  # saved for the other machine alone
    with started(grows, *options, launcher=launcher, by=by) as first:
        wait_for(grows / "steps" / "3.json", [first])
        with started(grows, *options, launcher=launcher, by=by) as second:
            assert first.wait(200) == 0, log_of(grows)
            assert second.wait(60) == 0, log_of(grows)
    ranks = [step["ranks"] for step in steps_of(grows)]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (2, 4)
    check_epochs(grows, 60)
    assert losses_of(grows) == pytest.approx(losses_of(whole), rel=SAME)

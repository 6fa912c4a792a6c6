"""A rank that fails ends all of them, soon, and is told of once, last; whatever started them.

Real processes of ``failing.py``. Importing torch takes seconds, so that the usual run covers every starter, place and
kind of failure at least once; ``FULL=1`` runs all. ``python tests/failures_table.py`` writes the guide's table.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabriclite import ConfigError, DDPStrategy, Fabric, LaunchError
from fabriclite.launch import command, meeting, stores
from fabriclite.launch.command import Program
from fabriclite.launch.failures import members, verdict
from fabriclite.launch.failures.page import page
from fabriclite.launch.failures.record import Failure, Note, Told
from fabriclite.launch.failures.verdict import Exit
from starters import HOW, LIMIT_S, STARTERS, WHERE, Ended, Start, free_port, plain, told
from worlds import run

FULL = bool(os.environ.get("FULL"))
SOON_S = 10.0
"""How long after a failure all processes must have ended, in seconds."""
TIMEOUT_S = 5.0
"""Of collectives in ``failing.py``: a hang is noticed only then."""
AGENT_S = 30.0
"""How long torchrun's agent waits for a stopped process to heed its SIGTERM."""
MEETING_S = meeting.SHORTEST.total_seconds()
SHORT = DDPStrategy(start_method="fork", timeout=timedelta(seconds=3))
ROOT = Path(__file__).parent.parent


def possible(starter: str, where: str, how: str) -> bool:
    """Whether there is such a case, and it is ours to handle."""
    if where == "import":
        # A function's module is imported before it is a rank. Without any starter, nothing of ours is there yet.
        return starter not in ("fork", "spawn", "plain")
    return not (starter in ("fork", "spawn") and where == "launch")  # it is the same as init


def limit_s(starter: str, where: str, how: str) -> float:
    if how != "stop":
        return SOON_S
    if where == "import" and starter in ("torchrun", "run"):  # the others wait for it to meet them
        return SOON_S + MEETING_S + (AGENT_S if starter == "torchrun" else 0)
    return SOON_S + TIMEOUT_S + members.LONGER_S


def check(ended: Ended, starter: str, where: str, how: str) -> None:
    assert ended.left == [], ended.err
    assert all(ended.status), ended
    assert ended.after_s is not None, ended.err
    assert ended.after_s < limit_s(starter, where, how)
    assert told(ended, starter, where, how) == [], ended.err


ALL = [case for case in itertools.product(STARTERS, WHERE, HOW) if possible(*case)]
# Every starter, most places, and every kind.
USUAL = [
    ("rerun", "import", "raise"),
    ("fork", "setup", "raise"),
    ("fork", "init", "kill"),
    ("fork", "save", "exit"),
    ("torchrun", "collective", "raise"),
    ("run", "import", "raise"),
    ("run", "save", "kill"),
    ("run", "collective", "stop"),
    ("plain", "launch", "raise"),
]


@pytest.mark.parametrize(("starter", "where", "how"), ALL if FULL else USUAL)
def test_a_rank_that_fails(starter: str, where: str, how: str, tmp_path: Path) -> None:
    with Start(tmp_path, starter, where, how) as start:
        check(start.end(), starter, where, how)


@pytest.mark.skipif(not FULL, reason="seconds each; asked for by FULL=1")
@pytest.mark.parametrize("starter", ["plain", "rerun"])
def test_rank_zero_is_stopped(starter: str, tmp_path: Path) -> None:
    """The store is in it, and does not answer."""
    with Start(tmp_path, starter, "collective", "stop", rank=0) as start:
        ended = start.end()
    assert ended.left == [], ended.err
    assert ended.after_s is not None
    assert ended.after_s < SOON_S + TIMEOUT_S
    assert re.search(r"Rank 0 of 2 was stopped|rank 0: stopped \(state T\)", ended.err), ended.err
    assert ended.err.count("fabriclite: ") == 1


@pytest.mark.parametrize("starter", ["rerun", *(["plain"] if FULL else [])])
def test_rank_zero_is_killed(starter: str, tmp_path: Path) -> None:
    """It served the store, and printed: another rank does."""
    with Start(tmp_path, starter, "asleep", "kill", rank=0, size=3) as start:
        ended = start.end()
    page = re.findall("fabriclite: .*", ended.err)
    assert ended.left == []
    assert len(page) == 1
    assert ended.after_s is not None
    assert ended.after_s < SOON_S
    assert re.search(r"Rank 0 of 3 ended without a word \(killed, or os\._exit\), on host \S+ \(pid \d+\)", page[0])


@pytest.mark.parametrize(("starter", "rank"), [("rerun", 0), ("plain", 1)])
def test_a_rank_that_quits(starter: str, rank: int, tmp_path: Path) -> None:
    """By ``sys.exit``, while the other is in no collective that would tell."""
    with Start(tmp_path, starter, "asleep", "quit", rank=rank) as start:
        ended = start.end()
    assert ended.left == [], ended.err
    assert ended.after_s is not None
    assert ended.after_s < SOON_S
    assert ended.status[0 if starter == "rerun" else rank] == 4
    assert len(re.findall("fabriclite: Rank . of 2 exited with status 4", ended.err)) == 1, ended.err


def test_a_quit_that_is_caught_is_none(tmp_path: Path) -> None:
    script = tmp_path / "caught.py"
    script.write_text(CAUGHT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


CAUGHT = """
import sys
from fabriclite import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
for status in (3, "why", None):
    try:
        sys.exit(status)
    except SystemExit as error:
        assert error.code == status
fabric.barrier()
"""


def test_what_the_others_did_is_told(tmp_path: Path) -> None:
    """With a hang: two of three wait for one that has gone to sleep elsewhere."""
    started = time.monotonic()
    fabric = Fabric(accelerator="cpu", strategy=SHORT, devices=3)
    with pytest.raises(LaunchError) as caught:
        fabric.launch(_waits_for_two)
    text = str(caught.value)
    assert time.monotonic() - started < 3 + SOON_S
    assert re.match(r"Rank [01] of 3 waited in vain for the others, on host \S+ \(pid \d+\):\n\nTraceback", text)
    assert "What the others were doing:" in text
    assert re.search(
        r"rank 2:\n.*, in _waits_for_two\n.*\n.*, in _sleeps\n +time.sleep\(600\)  # here it hangs", text
    ), text


def _waits_for_two(fabric: Fabric) -> None:
    if fabric.global_rank == 2:
        _sleeps()
    fabric.barrier()


def _sleeps() -> None:
    time.sleep(600)  # here it hangs


def _different_collectives(fabric: Fabric) -> None:
    fabric.barrier()
    if fabric.global_rank == 1:
        fabric.all_reduce(torch.ones(3))  # one of three elements
    fabric.broadcast("the others send words")


def test_different_collectives() -> None:
    fabric = Fabric(accelerator="cpu", strategy=SHORT, devices=2)
    with pytest.raises(LaunchError) as caught:
        fabric.launch(_different_collectives)
    text = str(caught.value)
    assert "fabric.all_reduce(torch.ones(3))" in text, text
    assert 'fabric.broadcast("the others send words")' in text, text


# -- being told to end -------------------------------------------------------------------------------------------------


TOLD = [
    ("fork", "asleep", True, signal.SIGINT, (130, -2)),
    ("run", "asleep", False, signal.SIGTERM, (143,)),
]
TOLD_TOO = [
    ("rerun", "blocked", False, signal.SIGINT, (130,)),
    ("rerun", "asleep", True, signal.SIGINT, (130,)),
    ("rerun", "asleep", False, signal.SIGTERM, (-15, 143)),
    ("fork", "asleep", False, signal.SIGTERM, (-15, 143)),
    ("run", "asleep", False, signal.SIGINT, (130,)),
]


@pytest.mark.parametrize(("starter", "where", "to_all", "number", "status"), TOLD + (TOLD_TOO if FULL else []))
def test_told_to_end(
    starter: str, where: str, to_all: bool, number: int, status: tuple[int, ...], tmp_path: Path
) -> None:
    with Start(tmp_path, starter, where, "nothing", rank=1) as start:
        start.asleep()
        (tmp_path / "at").write_text(str(time.time()))
        pid = start.processes[0].pid
        (os.killpg if to_all else os.kill)(pid, number)
        ended = start.end()
    assert ended.left == []
    assert ended.status[0] in status, ended.err
    assert ended.after_s is not None
    assert ended.after_s < SOON_S
    assert ended.err.count("Traceback") <= (starter == "fork"), ended.err


# -- starting again ----------------------------------------------------------------------------------------------------


def test_attempts(tmp_path: Path) -> None:
    """Each starts anew on gloo, whatever the one before left in the agent's store; one line says why."""
    failures = 6 if FULL else 2
    options = ["--max-restarts", str(failures)]
    with Start(tmp_path, "run", "backward", "raise", failures=failures, options=options) as start:
        ended = start.end()
    assert list(ended.status) == [0], ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("fabriclite: ")]
    assert len(lines) == failures, ended.err
    for number, line in enumerate(lines, start=1):
        assert f"attempt {number} of {failures}: rank 1 on " in line
        assert line.endswith("failed with ZeroDivisionError: gave up in backward")
    assert ended.out.count("trained") == 1


@pytest.mark.skipif(not FULL, reason="seconds; asked for by FULL=1")
def test_attempts_under_torchrun(tmp_path: Path) -> None:
    options = ["--max-restarts", "1"]
    with Start(tmp_path, "torchrun", "collective", "kill", failures=1, options=options) as start:
        ended = start.end()
    assert list(ended.status) == [0], ended.err
    assert ended.out.count("trained") == 1


@pytest.mark.parametrize("starter", ["rerun", "fork", "run"])
def test_preempted(starter: str, tmp_path: Path) -> None:
    """Status 75 of all ranks is no failure: it is passed on, nothing is started again and nothing told."""
    options = ["--max-restarts", "1"] if starter == "run" else []
    with Start(tmp_path, starter, "preempted", "nothing", options=options) as start:
        ended = start.end()
    assert list(ended.status) == [75], ended.err
    assert "Rank" not in ended.err
    assert ended.left == []


# -- clear errors on start ---------------------------------------------------------------------------------------------


def script_in_two(tmp_path: Path, text: str, *, port: int | None = None) -> list[str]:
    """Standard error of two processes that run ``text`` without a starter; both must fail."""
    (tmp_path / "script.py").write_text(text)
    port = port or free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "script.py"],
            env={**os.environ, **plain(rank, 2, port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [1, 1], errors
    return errors


def test_ranks_that_differ(tmp_path: Path) -> None:
    errors = script_in_two(
        tmp_path,
        "import os\nfrom fabriclite import Fabric\n"
        "Fabric(accelerator='cpu', devices=2, strategy=['ddp', 'fsdp'][int(os.environ['RANK'])])\n",
    )
    said = "`strategy` must be the same on all ranks, but is DDPStrategy on rank 0 and FSDPStrategy on rank 1."
    assert sum(said in error for error in errors) >= 1, errors


def test_one_that_fails_before_it_meets_the_others(tmp_path: Path) -> None:
    """The others wait for it, and nobody else could tell them."""
    text = (
        "import os\nfrom fabriclite import Fabric\n"
        "Fabric(accelerator='cpu', devices=[2, 0][int(os.environ['RANK'])], strategy='ddp')\n"
    )
    started = time.monotonic()
    waited, failed = script_in_two(tmp_path, text)
    assert time.monotonic() - started < MEETING_S / 2
    assert failed.count("fabriclite: Rank 1 of 2 failed first") == 1
    assert "ConfigError: `devices` must be at least 1" in failed
    assert "Rank" not in waited


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Exception, match=r"MASTER_PORT must be a free port of 127\.0\.0\.1, but \d+ is in use"):
            stores.serve(port=taken.getsockname()[1])


def test_an_address_of_another_machine() -> None:
    with pytest.raises(Exception, match=r"MASTER_ADDR must be an address of the machine of rank 0, but '192\.0\.2\.1'"):
        stores.serve("192.0.2.1")


def test_nobody_serves() -> None:
    said = r"The store of the run must answer at MASTER_ADDR 127\.0\.0\.1, MASTER_PORT \d+ within 1 s, but does not"
    with pytest.raises(Exception, match=said):
        stores.connect("127.0.0.1", free_port(), timedelta(seconds=1))


@pytest.mark.parametrize("port", ["none", "0", "70000", ""])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in plain(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("FABRICLITE_FAILURES", "/nonexistent")  # nobody is told
    with pytest.raises(Exception, match=r"MASTER_PORT must be a port number from 1 to 65535, but is '"):
        Fabric(accelerator="cpu", strategy="ddp", devices=2)


def test_the_store_listens_on_the_loopback_alone() -> None:
    store = stores.serve()
    with socket.socket() as other:
        other.bind(("127.0.0.2", store.port))  # free, as nobody listens at every address


def _models_that_differ(fabric: Fabric) -> None:
    model = nn.Linear(3 + fabric.global_rank, 2)
    fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_models_that_differ(strategy: str) -> None:
    with pytest.raises(LaunchError, match="All ranks must build the same model") as caught:
        run(_models_that_differ, strategy, 2)
    assert "weight" in str(caught.value)
    assert "[2, 3]" in str(caught.value)
    assert "[2, 4]" in str(caught.value)


# -- fabriclite run ----------------------------------------------------------------------------------------------------


def fabriclite(*words: object, env: dict[str, str] | None = None, folder: Path | None = None) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "fabriclite", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        cwd=folder,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "2", "--nproc-per-node", "3", "x.py"], "--devices and --nproc-per-node must not say different"),
        (["--devices", "two", "x.py"], "--devices must be a whole number of at least 1 or auto, but is 'two'"),
        (
            ["--nproc-per-node", "some", "failing.py"],
            "--nproc-per-node must be a number, auto, cpu or gpu, but",
        ),
        (["--nnodes", "a:b", "failing.py"], "--nnodes must be N or MIN:MAX, but is 'a:b'"),
        (["nowhere.py"], "The script must be a file, but 'nowhere.py' is none"),
    ],
)
def test_bad_options(words: list[str], says: str) -> None:
    done = fabriclite("run", *words, folder=ROOT / "tests")
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


SAYS = """
import os, sys, threading
from fabriclite import Fabric
import beside

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", **eval(sys.argv[1]))
    fabric.launch()
    facts = [type(fabric.strategy).__name__, fabric.precision.name, fabric.world_size, os.environ["OMP_NUM_THREADS"]]
    is_main = sys.modules["__main__"].__file__ == os.path.abspath(__file__)
    fabric.print("facts", *facts, sys.argv[2:], beside.HERE, is_main)
"""


def said(folder: Path, arguments: str, *options: str) -> Any:
    (folder / "beside.py").write_text("HERE = 'beside'\n")
    (folder / "says.py").write_text(SAYS)
    env = {"OMP_NUM_THREADS": "3"}
    script = ["says"] if "-m" in options else [folder / "says.py"]
    return fabriclite("run", "--devices", "2", *options, *script, arguments, "--own", "1", env=env, folder=folder)


def test_the_command_line_fills_in(tmp_path: Path) -> None:
    done = said(tmp_path, "{}", "--strategy", "fsdp", "--precision", "bf16-true", "-m")
    assert "facts FSDPStrategy bf16-true 2 3 ['--own', '1'] beside True" in done.stdout, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ("dict(strategy='ddp')", ["--strategy", "fsdp"], "`strategy` must be the same … 'ddp' … --strategy fsdp"),
        (
            "dict(precision='32-true')",
            ["--precision", "16-mixed"],
            "`precision` must be … --precision 16-mixed",
        ),
        ("dict(devices=4)", [], "`devices` must be the number of processes that were launched … (2) … 4"),
    ],
)
def test_the_command_line_contradicts(arguments: str, options: list[str], says: str, tmp_path: Path) -> None:
    done = said(tmp_path, arguments, *options)
    assert done.returncode == 1
    assert [part for part in says.split(" … ") if part not in done.stderr] == [], done.stderr


def test_the_same_example_everywhere(tmp_path: Path) -> None:
    """As a script by itself, by torchrun, by fabriclite run, and as a function at a prompt."""
    example = ROOT / "examples" / "train_gpt.py"
    small = ["--accelerator", "cpu", "--steps", "2", "--dim", "32", "--layers", "1", "--heads", "2", "--context", "16"]
    small += ["--strategy", "ddp", "--out", tmp_path / "out"]
    cell = (
        "import sys, train_gpt\nfrom fabriclite import DDPStrategy, Fabric\n"
        f"sys.argv[1:] = {[str(word) for word in small]!r}\n"
        "def train(fabric):\n    train_gpt.Fabric = lambda **_: fabric\n    train_gpt.main()\n\n"
        "Fabric(accelerator='cpu', devices=2, strategy=DDPStrategy(start_method='fork')).launch(train)\n"
    )
    ways: dict[str, tuple[list[object], str]] = {
        "script": ([example, *small, "--devices", "2"], ""),
        "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example, *small], ""),
        "run": (["-m", "fabriclite", "run", "--devices", "2", example, *small], ""),
        "prompt": (["-i", "-q"], cell),
    }
    losses = {}
    for way, (words, given) in ways.items():
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            input=given,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'examples'}:{os.environ.get('PYTHONPATH', '')}"},
        )
        assert done.returncode == 0, done.stderr
        losses[way] = re.findall(r"validation loss (\S+)", done.stdout)
    assert len(losses["script"]) == 1
    assert set(map(tuple, losses.values())) == {tuple(losses["script"])}, losses


# -- what is known of a failure, as values -----------------------------------------------------------------------------

RAISED = Failure(
    rank=1, size=3, host="here", pid=7, at=100.0, kind="raised", line="ValueError: x", text="Traceback ...", by=1
)


def note(rank: int, **fields: Any) -> Note:
    return Note(rank=rank, host="here", pid=rank, **fields)


def test_page() -> None:
    text = page(RAISED, [note(2, line="RuntimeError: gone"), note(0), note(1, line="ValueError: x")])
    assert text == (
        "Rank 1 of 3 failed first, on host here (pid 7):\n\nTraceback ...\n"
        "\nThen rank 2 on here (pid 2): RuntimeError: gone"
    )


def test_verdict_of_what_is_known() -> None:
    """What was recorded comes first; an end without a word where an error only follows from it."""
    own = Told(rank=1, first=RAISED, own=RAISED, note=note(1))
    follows = Failure(**{**_fields(RAISED), "rank": 0, "by": 0, "follows": True})
    judged = [
        verdict.judge([own], [Exit(0, 5, -6, 99.0), Exit(1, 7, 1, 101.0)], "here", 3),
        verdict.judge([Told(rank=0, first=follows, own=follows, note=note(0))], [Exit(2, 9, -9, 100.2)], "here", 3),
        verdict.judge([], [Exit(2, 9, -15, 100.0, True), Exit(1, 7, 3, 101.0)], "here", 3),
        verdict.judge([], [Exit(0, 5, 75, 100.0), Exit(1, 7, 0, 101.0)], "here", 3),
    ]
    assert [None if v is None else (v.first.rank, v.status) for v in judged] == [(1, 1), (2, 137), (1, 3), None]


def _fields(failure: Failure) -> dict[str, Any]:
    return {name: getattr(failure, name) for name in Failure.__dataclass_fields__}


@pytest.mark.parametrize("value", [RAISED, Told(rank=2, first=RAISED, own=None, note=note(2, seen={1: "stopped"}))])
def test_json(value: Any) -> None:
    assert type(value).from_json(value.to_json()) == value


PROGRAMS = [
    ("python train.py --lr 1", Program(name="train.py", arguments=["--lr", "1"])),
    ("python -u -X dev train.py", Program(options=["-u", "-X", "dev"], name="train.py")),
    ("python -Wignore -m pkg.train -m", Program(options=["-Wignore"], module=True, name="pkg.train", arguments=["-m"])),
    ("python -um pkg", Program(options=["-u"], module=True, name="pkg")),
    ("python -mpkg 1", Program(module=True, name="pkg", arguments=["1"])),
    ("python -c pass", None),
    ("python -Ic pass", None),
    ("python", None),
]


@pytest.mark.parametrize(("line", "program"), PROGRAMS, ids=[line for line, _ in PROGRAMS])
def test_command_line(line: str, program: Program | None) -> None:
    found = command.parse(line.split())
    assert found == program or (found is not None and program is not None and _lists(found) == _lists(program))


def _lists(program: Program) -> list[Any]:
    return [list(program.options), program.module, program.name, list(program.arguments)]


def test_config_error_is_raised_here() -> None:
    """What only this process can know ends it alone, without a page."""
    with pytest.raises(ConfigError, match="`devices`"):
        Fabric(accelerator="cpu", devices=0)

"""Running ``failing.py`` by every starter, and what came of it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SCRIPT = Path(__file__).with_name("failing.py")
STARTERS = ("rerun", "fork", "spawn", "torchrun", "run", "plain")
WHERE = ("import", "launch", "init", "setup", "collective", "backward", "save", "exit")
HOW = ("raise", "exit", "kill", "stop")
_FROM_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LIMIT_S = 130.0


@dataclass(frozen=True)
class Ended:
    """A start that is over.

    Attributes:
        status: exit status of the starter, or of each rank where there is none.
        out: standard output of all.
        err: standard error of all.
        after_s: from the failure to the end of the last process, in seconds; ``None`` if nothing failed.
        left: processes of ranks that had to be killed.
    """

    status: Sequence[int]
    out: str
    err: str
    after_s: float | None
    left: Sequence[int]

    @property
    def page(self) -> str:
        """What was printed last of the run, from its head on."""
        return self.err[self.err.rfind("Rank ") :] if "Rank " in self.err else ""


class Start:
    """One start; ``with`` sees to it that nothing stays behind."""

    def __init__(
        self,
        folder: Path,
        starter: str,
        where: str,
        how: str,
        rank: int = 1,
        size: int = 2,
        *,
        failures: int = 1000,
        options: Sequence[str] = (),
    ) -> None:
        self.folder, self.size = folder, size
        (folder / "failures").write_text(str(failures))
        # `failing.py` uses its method for launching a function only where it starts that itself.
        method = starter if starter in ("fork", "spawn", "forkserver") else "auto"
        script = [SCRIPT, folder, where, how, rank, size, method]
        ways: dict[str, list[object]] = {
            "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, *options],
            "run": ["-m", "fabriclite", "run", "--devices", size, *options],
        }
        command = [*ways.get(starter, []), *script]
        self._out, self._err = (open(folder / name, "w+b") for name in ("out", "err"))  # noqa: SIM115  # closed in `end`
        port = free_port()
        self.processes = [
            self._popen(command, {} if starter != "plain" else plain(index, size, port))
            for index in range(size if starter == "plain" else 1)
        ]

    def _popen(self, command: Sequence[object], env: dict[str, str]) -> "subprocess.Popen[bytes]":
        usual = {k: v for k, v in os.environ.items() if k not in _FROM_LAUNCHERS and not k.startswith("TORCHELASTIC")}
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**usual, "OMP_NUM_THREADS": "1", **env},
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._out.close()
        self._err.close()

    @property
    def pids(self) -> list[int]:
        """Of all ranks that have begun."""
        return [int(text) for file in self.folder.glob("rank-*.pid") if (text := file.read_text())]

    def asleep(self) -> None:
        """Wait until every rank has come to the place where nothing more happens."""
        deadline = time.monotonic() + LIMIT_S
        while len(list(self.folder.glob("asleep-*"))) < self.size:
            assert time.monotonic() < deadline, "the ranks did not come that far"
            time.sleep(0.05)
        time.sleep(0.3)

    def end(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the end of all."""
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        while any(map(runs, self.pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        at = self.folder / "at"
        after = time.time() - float(at.read_text()) if at.exists() else None
        left = self.kill()
        return Ended(
            status=[process.returncode for process in self.processes],
            out=(self.folder / "out").read_text(),
            err=(self.folder / "err").read_text(errors="replace"),
            after_s=after,
            left=left,
        )

    def kill(self) -> list[int]:
        """End what is left; its process numbers."""
        left = [pid for pid in self.pids if runs(pid)]
        for process in self.processes:
            if process.poll() is None:
                left.append(process.pid)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pid in left:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        return left


def runs(pid: int) -> bool:
    """Whether a process runs; one that its parent has not yet asked about has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def plain(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher that only starts processes tells each."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def head(starter: str, where: str, how: str) -> str:
    """A pattern of how the failure of rank 1 is told first. ``""``: nothing of ours is there yet to tell."""
    if where == "import" and starter in ("torchrun", "run") and how == "stop":
        return r"WorldError: All 2 ranks must meet in time, but rank 1 did not come"
    if where == "import" and starter == "torchrun":
        return ""
    if starter == "torchrun" and how in ("exit", "kill"):
        return rf"rank +: 1 .*\n +exitcode +: {3 if how == 'exit' else -9} "
    return {
        "raise": r"Rank 1 of \d failed first, on host \S+ \(pid \d+\):",
        "exit": r"Rank 1 of \d (exited with status 3|ended without a word)",
        "kill": r"Rank 1 of \d (was ended by signal 9 \(SIGKILL\)|ended without a word)",
        "stop": r"Rank 1 of \d was stopped \(state T\)|Rank 0 of \d waited in vain[^$]*rank 1: stopped \(state T\)",
    }[how]


def told(ended: Ended, starter: str, where: str, how: str) -> list[str]:
    """What is wrong with what was printed: nothing, if the first failure is there once, and last."""
    wrong = []
    pattern = head(starter, where, how)
    found = list(re.finditer(pattern, ended.err)) if pattern else []
    if pattern and len(found) != 1:
        wrong.append(f"the head is there {len(found)} times")
    if how == "raise" and ended.err.count(f"ZeroDivisionError: gave up in {where}\n") != 1:
        wrong.append("the traceback is not there exactly once")
    after = ended.err[found[-1].start() :] if found else ""
    if re.search(r"^(\[W|\[E|\[rank|fabriclite: )", after, re.M):
        wrong.append("something else is printed after it")
    return wrong

"""Who the ranks of a run are on their machines, and whether their processes still run."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Final, Literal

State = Literal["runs", "stopped", "gone"]
LONGER_S: Final = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One rank's process.

    Attributes:
        rank: which.
        host: name of its machine.
        place: what those share who can see each other's processes: the machine and, in containers, the namespace.
        pid: its process, as numbered in that place.
        started: when the process started, in the system's own unit: a number that is used again tells another process.
    """

    rank: int
    host: str
    place: str
    pid: int
    started: str


def this_process(rank: int, pid: int | None = None) -> Member:
    """This process, or the one of number ``pid`` in the same place, as ``rank``."""
    pid = pid or os.getpid()
    return Member(rank=rank, host=host(), place=_place(), pid=pid, started=_read(pid)[1])


@cache
def host() -> str:
    return socket.gethostname()


@cache
def _place() -> str:
    try:
        return f"{host()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no such thing on macOS
        return host()


def look(member: Member) -> State:
    """Whether the process of a member in the same place runs. A zombie has ended."""
    if not sys.platform.startswith("linux"):
        return "runs" if _exists(member.pid) else "gone"
    state, started = _read(member.pid)
    if started != member.started or state in "ZX":
        return "gone"
    return "stopped" if state in "Tt" else "runs"


class StoppedTooLong:
    """Which processes are stopped (SIGSTOP, a debugger) for longer than collectives wait.

    While ranks work they see to it themselves, and say more of it; so a starter waits a little longer.

    Args:
        timeout: how long collectives wait.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._limit_s = timeout.total_seconds() + LONGER_S
        self._since: dict[int, float] = {}

    def look(self, members: Sequence[Member]) -> list[tuple[Member, str]]:
        """Those of ``members``, and what is to be said of each."""
        now = time.monotonic()
        self._since = {m.rank: self._since.get(m.rank, now) for m in members if look(m) == "stopped"}
        return [
            (m, f"was stopped (state T) for {now - self._since[m.rank]:.0f} s, and is ended now")
            for m in members
            if now - self._since.get(m.rank, now) > self._limit_s
        ]


def _read(pid: int) -> tuple[str, str]:
    """State and start time from ``/proc``; state ``"X"`` where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
    except OSError:
        return "X", ""
    return fields[0].decode(), fields[19].decode()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

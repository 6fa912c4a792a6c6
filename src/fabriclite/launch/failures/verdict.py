"""What a starter makes of all that its ranks told and of how their processes ended. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from fabriclite.launch.failures.page import page
from fabriclite.launch.failures.record import PREEMPTED, Failure, Note, Told, of_status, shell_status


@dataclass(frozen=True, slots=True)
class Exit:
    """How one rank's process ended.

    Attributes:
        rank: which.
        pid: its process.
        status: exit status; minus the number of a signal.
        at: when that was noticed, in seconds since 1970.
        by_us: the starter ended it, because of another one.
        why: what to say of it instead of ``status``.
    """

    rank: int
    pid: int
    status: int
    at: float
    by_us: bool = False
    why: str = ""

    @property
    def line(self) -> str:
        return self.why or of_status(self.status)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to print, and the exit status of the run."""

    first: Failure
    text: str
    status: int


def judge(told: Sequence[Told], exits: Sequence[Exit], host: str, size: int) -> Verdict | None:
    """The first failure and its page, or ``None`` if there was none."""
    explained = {t.rank for t in told} | {rank for t in told for rank in t.note.seen}
    wordless = sorted(
        (e for e in exits if e.status not in (0, PREEMPTED) and not e.by_us and e.rank not in explained),
        key=lambda e: e.at,
    )
    first = _first(told)
    if first is not None and first.kind == "vanished":
        known = [e for e in exits if e.rank == first.rank and e.status]
        first = _of_exit(known[0], host, size, first.at) if known else first
    elif wordless and (first is None or first.follows):
        first = _of_exit(wordless[0], host, size, wordless[0].at)
    if first is None:
        return None
    notes = [t.note for t in told]
    notes += [_note(e, host) for e in wordless if e.rank != first.rank]
    return Verdict(first, page(first, notes), shell_status(first.status))


def _first(told: Sequence[Told]) -> Failure | None:
    agreed = [t.first for t in told if t.first is not None]
    known = agreed or [t.own for t in told if t.own is not None]
    return min(known, key=lambda failure: failure.at, default=None)


def _of_exit(ended: Exit, host: str, size: int, at: float) -> Failure:
    return Failure(
        rank=ended.rank,
        size=size,
        host=host,
        pid=ended.pid,
        at=at,
        kind="ended",
        line=ended.line,
        status=ended.status,
    )


def _note(ended: Exit, host: str) -> Note:
    return Note(rank=ended.rank, host=host, pid=ended.pid, line=ended.line)

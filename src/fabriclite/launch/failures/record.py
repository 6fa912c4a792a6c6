"""What is known of a failure, as values that travel as JSON. Pure."""

import json
from dataclasses import asdict, dataclass, field
from signal import Signals
from typing import Any, Final, Literal, Self

Kind = Literal["raised", "ended", "vanished", "hung", "stopped", "silent", "interrupted"]
"""What happened: an exception; a known exit status; gone without one; a wait that timed out; halted by a signal; a host
or store that says nothing any more; Ctrl-C."""

PREEMPTED: Final = 75
"""Exit status (EX_TEMPFAIL) of a rank that saved and wants to be started again: no failure."""
INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: which, or -1 where it had no rank yet.
        size: number of ranks.
        host: name of its machine.
        pid: its process.
        at: when, in seconds since 1970.
        kind: what happened.
        line: that in one line: ``"ZeroDivisionError: division by zero"``.
        text: the traceback, or nothing.
        status: exit status of the run that this means.
        by: the rank that recorded it: itself, or one that noticed.
        follows: it may only say that another rank is gone, of which nothing was known.
    """

    rank: int
    size: int
    host: str
    pid: int
    at: float
    kind: Kind
    line: str
    text: str = ""
    status: int = 1
    by: int = -1
    follows: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a rank says when it ends because of another one's failure.

    Attributes:
        rank: which.
        host: name of its machine.
        pid: its process.
        line: its own error in one line, or nothing if it had none.
        doing: the user's lines it was at, as a traceback prints them, or nothing.
        seen: of other ranks that cannot speak, such as stopped ones: rank to what was seen.
    """

    rank: int
    host: str
    pid: int
    line: str = ""
    doing: str = ""
    seen: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "seen": {int(rank): what for rank, what in fields["seen"].items()}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that one rank has to say at its end, for who started it.

    Attributes:
        rank: which.
        first: the first failure of the run as this rank knows it, or ``None`` if it could not ask.
        own: its own, or ``None`` if it ends only because of the first.
        note: see :class:`Note`.
    """

    rank: int
    first: Failure | None
    own: Failure | None
    note: Note

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        fields: dict[str, Any] = json.loads(text)
        return cls(
            rank=fields["rank"],
            first=None if fields["first"] is None else Failure(**fields["first"]),
            own=None if fields["own"] is None else Failure(**fields["own"]),
            note=Note.from_json(json.dumps(fields["note"])),
        )


def of_status(status: int) -> str:
    """An exit status as multiprocessing and subprocess give it (minus a signal's number) in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by signal {-status} ({Signals(-status).name})"
    except ValueError:  # a real-time signal has no name
        return f"was ended by signal {-status}"


def shell_status(status: int) -> int:
    """What a shell would report for the same: 128 and the number of the signal."""
    return status if status >= 0 else 128 - status

"""Where a rank tells its failure, for who started it."""

import json
import os
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from fabriclite.launch.failures.record import Told

FOLDER: Final = "FABRICLITE_FAILURES"
"""Names the private folder of a starter of ours."""
_ELASTIC: Final = "TORCHELASTIC_ERROR_FILE"
_PREEMPTED: Final = "preempted"


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where to.

    Attributes:
        folder: of a starter of ours, which prints what it finds there; or ``None``.
        elastic: the file that torchrun's agent prints; or ``None``.
    """

    folder: Path | None = None
    elastic: Path | None = None

    @classmethod
    def taken_from(cls, env: MutableMapping[str, str]) -> Self:
        """As ``env`` says. Our folder is taken out: what this process starts is not of the same starter."""
        folder, elastic = env.pop(FOLDER, None), env.get(_ELASTIC)
        return cls(None if folder is None else Path(folder), None if elastic is None else Path(elastic))

    @property
    def starter_prints(self) -> bool:
        return self.folder is not None or self.elastic is not None

    def tell(self, told: Told, page: str) -> None:
        """Write what ``told`` holds; ``page`` is what torchrun shall print of it. A full disk is no further failure."""
        try:
            if self.folder is not None:
                _write(self.folder / f"rank-{told.rank}.json", told.to_json())
            if self.elastic is not None:
                _write(self.elastic, _for_torchrun(told, page))
        except OSError:
            pass

    def tell_preempted(self) -> bool:
        """Say that this rank wants to be started again; whether there is a starter of ours to hear it."""
        if self.folder is None:
            return False
        (self.folder / f"{_PREEMPTED}-{os.getpid()}").touch()
        return True


def read(folder: Path) -> list[Told]:
    """What the ranks of one start told."""
    return [Told.from_json(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]


def any_preempted(folder: Path, pids: Iterable[int]) -> bool:
    """Whether one of these processes, ranks of any attempt, wants to be started again."""
    return any(next(folder.glob(f"**/{_PREEMPTED}-{pid}"), None) is not None for pid in pids)


def _for_torchrun(told: Told, page: str) -> str:
    """The form of ``torch.distributed.elastic.multiprocessing.errors``, whose agent prints the one of lowest time.

    Its times are whole seconds: what follows from the first failure is put after it.
    """
    own, first = told.own, told.first
    about = first if first is not None and (own is None or first.by == told.rank) else own
    at, line = (0, "") if about is None else (int(about.at), about.line)
    if first is not None and first.by != told.rank:
        at = max(at, int(first.at) + 1)
    return json.dumps({"message": {"message": line, "extraInfo": {"py_callstack": page, "timestamp": str(at)}}})


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and readable by this user alone."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)

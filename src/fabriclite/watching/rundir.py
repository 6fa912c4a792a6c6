"""A run's folder on disk: appending lines to it, and reading them back."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from fabriclite.errors import ConfigError
from fabriclite.watching.records import VERSION, Event, RunFacts, StepRecord

R = TypeVar("R", RunFacts, StepRecord, Event)

_RUN: Final = "run.jsonl"
_STEPS: Final = "steps.jsonl"


@dataclass(frozen=True, slots=True)
class Run:
    """All that a folder tells, in the order in which it was written.

    Attributes:
        path: the folder.
        starts: one for each time it was started.
        steps: logged steps. After a restart from a checkpoint some come again: the later ones count.
        events: of all ranks, by time.
        torn: lines that could not be read (a process was killed while it wrote), as ``file:line``.
    """

    path: Path
    starts: tuple[RunFacts, ...]
    steps: tuple[StepRecord, ...]
    events: tuple[Event, ...]
    torn: tuple[str, ...] = ()


def append(folder: Path, record: RunFacts | StepRecord | Event) -> None:
    """Add one line, whole: what is killed in between leaves a last line that reading passes over.

    After such a line a new one is begun first, so that it swallows nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(asdict(record)), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with open(folder / _file_of(record), "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def attempts(folder: Path) -> int:
    """How often a run of this folder was started."""
    file = folder / _RUN
    return sum(1 for _ in _records(file, RunFacts, []))


def read(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigError: there is none, or it was written by a newer version.
    """
    path = Path(folder)
    if not (path / _RUN).is_file():
        raise ConfigError(
            f"`RUN_DIR` must be a folder that fabric.monitor wrote to, but {str(path)!r} holds no {_RUN}."
            " Give the folder that was passed as fabric.monitor(run_dir)."
        )
    torn: list[str] = []
    starts = tuple(_records(path / _RUN, RunFacts, torn))
    if any(start.version > VERSION for start in starts):
        raise ConfigError(
            f"`RUN_DIR` must be of version {VERSION} at most, but {str(path)!r} is of a newer one. Update fabriclite."
        )
    steps = tuple(_records(path / _STEPS, StepRecord, torn))
    events = [event for file in sorted(path.glob("events-*.jsonl")) for event in _records(file, Event, torn)]
    return Run(path, starts, steps, tuple(sorted(events, key=lambda event: event.time)), tuple(torn))


def _file_of(record: RunFacts | StepRecord | Event) -> str:
    match record:
        case RunFacts():
            return _RUN
        case StepRecord():
            return _STEPS
        case Event():
            return f"events-{record.rank}.jsonl"


def _records(file: Path, kind: type[R], torn: list[str]) -> Iterator[R]:
    known = {field.name for field in fields(kind)}
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            values: dict[str, Any] = _numbers(json.loads(line))
            given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
            yield kind(**given)
        except (ValueError, TypeError, AttributeError):
            torn.append(f"{file.name}:{number}")


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and the infinities: strings that :func:`_numbers` takes back."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"<{value}>"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, str) and value in ("<nan>", "<inf>", "<-inf>"):
        return float(value[1:-1])
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value

"""A run's folder on disk: appending lines to it, and reading them back."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from fabriclite.errors import ConfigError
from fabriclite.watching.fitting import fitted
from fabriclite.watching.records import VERSION, Event, RunFacts, StepRecord

R = TypeVar("R", RunFacts, StepRecord, Event)

_RUN: Final = "run.jsonl"
_STEPS: Final = "steps.jsonl"
_NOT_FINITE: Final = ("<nan>", "<inf>", "<-inf>")
_NAMES: Final = {kind: tuple(field.name for field in fields(kind)) for kind in (RunFacts, StepRecord, Event)}


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
    """Add one line, whole: what is killed in between leaves a line that reading passes over.

    The file is opened anew each time (about 20 microseconds on a local disk): nothing is left open in forked processes,
    and a folder that was moved or removed is noticed. Nothing is synced: a line outlives its process, and not the
    machine.
    """
    line = _line_of(record)
    path = folder / _file_of(record)
    try:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
    with file:
        if file.tell() > 0:  # where a line was torn, the next one begins on its own
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        rest = memoryview(line)
        while rest:  # one call, unless the disk is nearly full or a signal comes
            rest = rest[file.write(rest) or 0 :]


def attempts(folder: Path) -> int:
    """How often a run of this folder was started."""
    return sum(1 for _ in _records(folder / _RUN, RunFacts, []))


def read(folder: str | Path) -> Run:
    """Read a run's folder, also one that is being written to.

    Raises:
        ConfigError: there is none, or it was written by a newer version.
    """
    torn: list[str] = []
    path, starts, events = _without_steps(folder, torn)
    steps = tuple(_records(path / _STEPS, StepRecord, torn))
    return Run(path, starts, steps, events, tuple(sorted(torn, key=_place)))


def read_without_steps(folder: str | Path) -> Run:
    """The same with no steps, for who takes them from :func:`steps_of` one by one."""
    torn: list[str] = []
    path, starts, events = _without_steps(folder, torn)
    return Run(path, starts, (), events, tuple(sorted(torn, key=_place)))


def steps_of(folder: str | Path, torn: list[str]) -> Iterator[StepRecord]:
    """The logged steps one by one, as a million of them on many ranks would not fit into memory.

    Args:
        folder: the run's.
        torn: gets the lines that could not be read.
    """
    return _records(Path(folder) / _STEPS, StepRecord, torn)


def _without_steps(folder: str | Path, torn: list[str]) -> tuple[Path, tuple[RunFacts, ...], tuple[Event, ...]]:
    path = Path(folder)
    if not (path / _RUN).is_file():
        raise ConfigError(
            f"`RUN_DIR` must be a folder that fabric.monitor wrote to, but {str(path)!r} holds no {_RUN}."
            " Give the folder that was passed as fabric.monitor(run_dir)."
        )
    starts = tuple(_records(path / _RUN, RunFacts, torn))
    if any(start.version > VERSION for start in starts):
        raise ConfigError(
            f"`RUN_DIR` must be of version {VERSION} at most, but {str(path)!r} is of a newer one. Update fabriclite."
        )
    events = [event for file in sorted(path.glob("events-*.jsonl")) for event in _records(file, Event, torn)]
    return path, starts, tuple(sorted(events, key=lambda event: event.time))


def _place(torn: str) -> tuple[str, int]:
    file, _, line = torn.rpartition(":")
    return file, int(line)


def _file_of(record: RunFacts | StepRecord | Event) -> str:
    match record:
        case RunFacts():
            return _RUN
        case StepRecord():
            return _STEPS
        case Event():
            return f"events-{record.rank}.jsonl"


# -- lines ------------------------------------------------------------------------------------------------------------


def _line_of(record: RunFacts | StepRecord | Event) -> bytes:
    """JSON in ASCII. The encoder's own speed, where all numbers are finite and no string looks like one that is not."""
    values: Any = {name: getattr(record, name) for name in _NAMES[type(record)]}
    try:
        line = json.dumps(values, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError):
        line = ""
    if not line or '"<' in line:
        line = json.dumps(_plain(values), separators=(",", ":"), allow_nan=False)
    return line.encode("ascii") + b"\n"


def _records(file: Path, kind: type[R], torn: list[str]) -> Iterator[R]:
    if not file.is_file():
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                yield fitted(kind, _numbers(values) if b'"<' in line else values)
            except (ValueError, TypeError, OverflowError, RecursionError):
                if line != b"\n":
                    torn.append(f"{file.name}:{number}")


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and the infinities: strings that :func:`_numbers` takes back.

    A string that looks like one of those gets a second ``<``, and so on.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"<{value}>"
    if isinstance(value, str) and "<" + value.lstrip("<") in _NOT_FINITE and value[:1] == "<":
        return "<" + value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, str):
        if value in _NOT_FINITE:
            return float(value[1:-1])
        return value[1:] if value[:2] == "<<" and "<" + value.lstrip("<") in _NOT_FINITE else value
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value

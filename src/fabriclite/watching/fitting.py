"""Whether what a line says is a record: anything may stand in a file, and who draws it must not stumble."""

from array import array
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Final, TypeVar, get_args

from fabriclite.watching.records import Event, EventKind, RunFacts, StepRecord

R = TypeVar("R", RunFacts, StepRecord, Event)

_LARGEST: Final = 2**53  # of counts: as numbers of any JSON reader, exactly


def fitted(kind: type[R], values: Any) -> R:
    """The record of ``kind`` that ``values`` describes. Fields that it does not know are passed over.

    Raises:
        TypeError: a field is missing, or of another type.
        ValueError: a count is negative, or too large to be one.
        OverflowError: a number is too large for a float.
    """
    if not isinstance(values, dict):
        raise TypeError(f"a line must be a dictionary, but is {type(values).__name__}")
    checks, required = _CHECKS[kind]
    if not required <= values.keys():
        raise TypeError(f"{kind.__name__} must have {', '.join(sorted(required))}")
    given: Any = {name: check(values[name]) for name, check in checks.items() if name in values}
    return kind(**given)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"must be a number, but is {type(value).__name__}")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"must be a whole number, but is {type(value).__name__}")
    if not 0 <= value <= _LARGEST:
        raise ValueError("must be a count")
    return value


def _count_or_none(value: Any) -> int | None:
    return None if value is None else _count(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be text, but is {type(value).__name__}")
    return value


def _kind(value: Any) -> str:
    if value not in get_args(EventKind):
        raise ValueError("must be a kind of event")
    return str(value)


def _dictionary(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"must be a dictionary, but is {type(value).__name__}")
    return value


def _dictionary_or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else _dictionary(value)


def _texts(value: Any) -> dict[str, str]:
    return {name: _text(text) for name, text in _dictionary(value).items()}


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(number) for name, number in _dictionary(value).items()}


def _by_rank(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"must be a list, but is {type(value).__name__}")
    array("d", value)  # the fastest way to ask whether all are numbers that a float can hold
    return tuple(value)


_Checks = dict[str, Callable[[Any], Any]]
_RUN: Final[_Checks] = {
    "started": _number,
    "attempt": _count,
    "first_step": _count,
    "name": _text,
    "strategy": _text,
    "precision": _text,
    "world_size": _count,
    "nodes": _count,
    "device": _text,
    "parameters": _count_or_none,
    "versions": _texts,
    "total_steps": _count_or_none,
    "plan": _dictionary_or_none,
    "report": _text,
    "version": _count,
}
_STEP: Final[_Checks] = {
    "step": _count,
    "time": _number,
    "metrics": _numbers,
    "phases": _numbers,
    "seconds": _by_rank,
    "own": _by_rank,
    "memory": _by_rank,
    "peak": _by_rank,
}
_EVENT: Final[_Checks] = {
    "time": _number,
    "kind": _kind,
    "rank": _count,
    "step": _count_or_none,
    "text": _text,
    "details": _dictionary,
}


def _with_required(kind: type[Any], checks: _Checks) -> tuple[_Checks, frozenset[str]]:
    required = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return checks, frozenset(required)


_CHECKS: Final = {
    RunFacts: _with_required(RunFacts, _RUN),
    StepRecord: _with_required(StepRecord, _STEP),
    Event: _with_required(Event, _EVENT),
}

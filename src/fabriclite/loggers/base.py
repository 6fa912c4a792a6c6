"""What our loggers have in common: one rank writes, and what it writes to is opened late and closed at the end."""

import argparse
import atexit
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from numbers import Real
from types import TracebackType
from typing import Any, Literal, Self

from fabriclite.arguments import number
from fabriclite.errors import ConfigError
from fabriclite.launch.failures import quits
from fabriclite.launch.failures.record import PREEMPTED

Status = Literal["success", "failed"]


class RankZeroLogger(ABC):
    """Writes on rank 0, and does nothing on others.

    A process that was forked from one that had opened something opens its own; pickling keeps only how it was made.

    Args:
        prefix: put before the name of each metric, with ``/`` between.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = f"{prefix}/" if prefix else ""
        self._writes = True
        self._opened: Any = None
        self._opened_in: int | None = None
        self._next = 0

    # -- of each kind ------------------------------------------------------------------------------
    @abstractmethod
    def _open(self) -> Any:
        """Open what is written to; called once per process, on rank 0."""

    @abstractmethod
    def _write(self, opened: Any, metrics: Mapping[str, Any], step: int) -> None: ...

    @abstractmethod
    def _write_params(self, opened: Any, params: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _close(self, opened: Any, status: Status) -> None: ...

    # -- for everybody -----------------------------------------------------------------------------
    def on_rank(self, rank: int) -> bool:
        """Say which rank this process is; whether it writes here."""
        self._writes = rank == 0
        return self._writes

    @property
    def experiment(self) -> Any:
        """What is written to, as its library knows it. On other ranks an object whose methods do nothing."""
        if not self._writes:
            return Nobody()
        if self._opened is None or self._opened_in != os.getpid():
            self._opened, self._opened_in = self._open(), os.getpid()
            atexit.register(self._at_exit)  # after what the library itself registered, so before it in turn
        return self._opened

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers, or tensors of one element. Without ``step`` it is one more than that of the last call.

        Raises:
            ConfigError: a tensor has more elements, or the kind of logger takes no such value.
        """
        if not self._writes:
            return
        opened = self.experiment
        step = self._next if step is None else int(step)
        self._next = step + 1
        self._write(opened, {f"{self._prefix}{name}": number(name, value) for name, value in metrics.items()}, step)

    def log_hyperparams(self, params: Mapping[str, Any] | argparse.Namespace) -> None:
        """Write what the run was started with; nested mappings become names with ``/``."""
        given = vars(params) if isinstance(params, argparse.Namespace) else params
        if self._writes:
            self._write_params(self.experiment, flat(given))

    def finalize(self, status: Status = "success") -> None:
        """Write all that is not written yet, and close. A second call does nothing; logging again opens again."""
        if self._opened is None or self._opened_in != os.getpid():
            return
        opened, self._opened = self._opened, None
        atexit.unregister(self._at_exit)
        self._close(opened, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finalize("success" if error is None else status_of(error))

    def _at_exit(self) -> None:
        self.finalize(status_at_exit())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_opened_in": None}


class Nobody:
    """Stands for what rank 0 writes to: methods, items and attributes are there, and do nothing."""

    def __getattr__(self, name: str) -> "Nobody":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "Nobody":
        return self

    def __getitem__(self, key: Any) -> "Nobody":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def status_at_exit() -> Status:
    """How the script ended, as far as is known: a run that was asked to stop, and saved, did not fail."""
    ended = quits.heard()
    if ended is not None:
        return status_of(ended)
    return "success" if getattr(sys, "last_value", None) is None else "failed"


def status_of(error: BaseException) -> Status:
    """Of a script that ``error`` ended."""
    well = isinstance(error, SystemExit) and quits.status_of(error) in (0, PREEMPTED)
    return "success" if well else "failed"


def flat(params: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a/b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        found.update(flat(value, f"{before}{key}/") if isinstance(value, Mapping) else {f"{before}{key}": value})
    return found


def imported(package: str, logger: str) -> Any:
    """An optional package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ConfigError(f"{logger} must find {name}, but: {error}. Run: pip install fabriclite[loggers]") from error


def as_number(logger: str, name: str, value: Any) -> float:
    """A value as a float.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, Real):
        return float(value)
    raise ConfigError(
        f"A metric must be a number for {logger}, but {name!r} is {value!r}. Write text through logger.experiment."
    )

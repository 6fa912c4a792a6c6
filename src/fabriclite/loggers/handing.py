"""The loggers of one ``Fabric``: who is called on this rank, and who is closed at the end."""

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from lightning_utilities.core.rank_zero import rank_zero_only

from fabriclite.arguments import number
from fabriclite.launch.failures import hooks
from fabriclite.loggers.base import Status, status_at_exit, status_of


class Loggers:
    """Hands on what the script logs.

    Args:
        items: as the user passed them.

    Attributes:
        process: in which they are to be closed; one that is forked from it closes none of them.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self._all = list(items)
        self._here = list(items)
        self.process: int | None = None

    def start(self, rank: int) -> None:
        """This process is ``rank``. From now on loggers are closed when it ends, also by a failure."""
        if not self._all:
            return
        # What Lightning's loggers ask. Its launchers set it, and they are not here.
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        self._here = [logger for logger in self._all if _takes_part(logger, rank)]
        if not _STARTED:
            atexit.register(_close_at_exit)
        self.process = os.getpid()
        _STARTED.append(self)
        watched = hooks.current()
        if watched is not None:
            watched[0].closers.append(self._close_failed)

    def hand(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Give numbers to each logger that writes on this rank.

        Raises:
            ConfigError: a tensor has more than one element.
        """
        if not self._here:
            return
        numbers = {name: number(name, value) for name, value in metrics.items()}
        for logger in self._here:
            logger.log_metrics(metrics=numbers, step=step)

    def close(self, status: Status) -> None:
        """Close each that can be closed; one that fails to does not keep the others from it."""
        errors: list[Exception] = []
        for logger in self._here:
            finalize = getattr(logger, "finalize", None)
            if callable(finalize):
                try:
                    finalize(status)
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _close_failed(self) -> None:
        if self in _STARTED:
            _STARTED.remove(self)
            self.close("failed")


_STARTED: Final[list[Loggers]] = []
"""Those of this process that are still to be closed; a ``Fabric`` may be gone by then."""


def _close_all(status: Status) -> None:
    while _STARTED:
        loggers = _STARTED.pop()
        if loggers.process == os.getpid():
            loggers.close(status)


def _close_at_exit() -> None:
    _close_all(status_at_exit())


@contextmanager
def closed_after() -> Iterator[None]:
    """Close the loggers of this process after it: around a function in a process that may end without ``atexit``."""
    try:
        yield
    except BaseException as error:
        with suppress(Exception):  # what is told is the cause
            _close_all(status_of(error))
        raise
    _close_all("success")


def _takes_part(logger: Any, rank: int) -> bool:
    on_rank = getattr(logger, "on_rank", None)
    return bool(on_rank(rank)) if callable(on_rank) else True

"""From the moment a process is a rank of several: what nobody catches in it is recorded."""

import os
import sys
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

from fabriclite.launch.failures import quits
from fabriclite.launch.failures.members import this_process
from fabriclite.launch.failures.monitor import Monitor
from fabriclite.launch.failures.outlet import Outlet
from fabriclite.launch.failures.watch import Watch

_here: tuple[int, Watch, Monitor] | None = None
"""The process these are of (a fork inherits them, and is no rank), what it takes part with, and what looks."""
_before: Callable[[type[BaseException], BaseException, TracebackType | None], Any] | None = None
"""The hook that ours took the place of."""


def begin(
    rank: int, size: int, env: MutableMapping[str, str], starter_gone: Callable[[], bool] | None = None
) -> tuple[Watch, Monitor]:
    """Record what fails in this process from now on, as that of ``rank``; a second call changes nothing but the rank.

    Args:
        rank: of this process.
        size: number of ranks.
        env: says where failures are told; usually ``os.environ``, from which our own variable is taken.
        starter_gone: whether the process of ours that started this one has ended.
    """
    global _here, _before
    if (here := current()) is not None:
        here[0].me, here[0].size = this_process(rank), size
        return here
    watch = Watch(this_process(rank), size, Outlet.taken_from(env), starter_gone)
    _here = (os.getpid(), watch, Monitor(watch))
    if _before is None:
        _before, sys.excepthook = sys.excepthook, _hook
        quits.listen()
    return _here[1:]


def current() -> tuple[Watch, Monitor] | None:
    """What :func:`begin` began in this very process."""
    return None if _here is None or _here[0] != os.getpid() else _here[1:]


def forget() -> None:
    """No failure of what follows is one of the run."""
    global _here
    if (here := current()) is not None:
        here[1].stop()
    _here = None


def _hook(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    here = None if hasattr(sys, "ps1") or sys.flags.interactive else current()  # at a prompt nothing ends
    before = _before or sys.__excepthook__
    if here is None or before is not sys.__excepthook__:  # one of the user's sends reports, say
        before(kind, error, tb)
    if here is not None:
        here[0].failed(error)

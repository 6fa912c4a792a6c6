"""What an exception or a stack means for the run. Pure but for the clock."""

import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
import torch.distributed as dist

from fabriclite.launch.failures.members import Member
from fabriclite.launch.failures.record import INTERRUPTED, Failure

_OURS: Final = str(Path(__file__).parents[2]) + os.sep
_NOT_THE_USERS: Final = (
    *(os.path.dirname(str(module.__file__)) + os.sep for module in (torch, multiprocessing)),
    _OURS,
    "<frozen ",
)
_STARTING: Final = (
    os.path.join(_OURS, "launch", "rank.py"),
    os.path.join(_OURS, "launch", "spawn.py"),
    "<frozen runpy>",
)
_FROM_PEERS: Final = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|tcpstore|timed? ?out|recvbytes|sendbytes",
    re.I,
)
_LATE: Final = re.compile(
    r"(gloo|nccl|store|watchdog).*timed? ?out|timed? ?out.*(gloo|nccl|store|watchdog)", re.I | re.S
)
_PLACE: Final = re.compile(r"\[\S+\.(cc|cpp|h):\d+\] ")  # of torch's C++
_FRAMES: Final = 4
"""Innermost lines of the user's that tell what a rank is at."""


def failure_of(error: BaseException, me: Member, size: int) -> Failure:
    """``error``, which nobody caught, as the failure of ``me``."""
    interrupted, late = isinstance(error, KeyboardInterrupt), is_late(error)
    return Failure(
        rank=me.rank,
        size=size,
        host=me.host,
        pid=me.pid,
        at=time.time(),
        kind="interrupted" if interrupted else "hung" if late else "raised",
        line="interrupted" if interrupted else one_line(error),
        text="" if interrupted else trace(error),
        status=INTERRUPTED if interrupted else 1,
        by=me.rank,
        follows=not late and from_peers(error),
    )


def from_peers(error: BaseException) -> bool:
    """Whether ``error`` may only say that another rank is gone or late: a collective, or the store, failed."""
    return any(
        isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and _FROM_PEERS.search(str(e)))
        for e in _chain(error)
    )


def is_late(error: BaseException) -> bool:
    """Whether ``error`` says that a collective waited longer than it may."""
    return any(isinstance(e, RuntimeError) and _LATE.search(str(e)) for e in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def one_line(error: BaseException) -> str:
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return _PLACE.sub("", last)


def trace(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames that started the user's code."""
    return "".join(traceback.format_exception(type(error), error, _inner(error.__traceback__)))


def _inner(tb: TracebackType | None) -> TracebackType | None:
    at = tb
    while at is not None and at.tb_frame.f_code.co_filename in _STARTING:
        at = at.tb_next
    return at if at is not None else tb


def users_lines(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost lines of a stack that are neither torch's nor ours, as a traceback prints them."""
    begun = max((i + 1 for i, frame in enumerate(stack) if frame.filename in _STARTING), default=0)
    inner = list(stack[begun:])  # a forked process has its parent's before
    own = [frame for frame in inner if not frame.filename.startswith(_NOT_THE_USERS)]
    return "".join(traceback.format_list((own or inner)[-_FRAMES:]))

"""Signals that ask this process to stop: noted when they arrive, answered by the training when it can."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any, Final

from fabriclite.errors import ConfigError, SetupOrderError

ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
"""Those that mean the end of the process wherever nobody handles them. The others are only a message."""
ONE_REQUEST_S: Final = 2.0
"""Within this time after the first, the same signal is the same request: a launcher hands on what its ranks got too."""
DEFAULT: Final = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """Notes signals from when it is made until it is closed. At most one is open in a process.

    A handler in Python runs between two lines of the main thread, so a signal during a backward or a save is noted
    after it. That an ending signal came a second time is seen by a thread of its own, since the main thread may hang in
    a collective: the process then ends at once, with status 128 + signal.

    Attributes:
        order: the signals by what they ask: the last asks for most.
    """

    def __init__(self, signals: object) -> None:
        self.order = checked(signals)
        _check_free()
        self.came: set[signal.Signals] = set()
        self._armed = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # There is one such descriptor in a process. Who had it before, an event loop say, is told by our thread.
        self._others = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in self.order}
        _handle(dict.fromkeys(self.order, self._note))
        _Open.requests = self
        _follow_forks()
        threading.Thread(target=self._watch, name="fabriclite-signals", daemon=True).start()

    @property
    def level(self) -> int:
        """0 if none came, else the place of the one that asks for most, from 1."""
        return max((place for place, number in enumerate(self.order, start=1) if number in self.came), default=0)

    def named(self, level: int) -> signal.Signals | None:
        """The signal of a :attr:`level`; ``None`` for 0."""
        return self.order[level - 1] if level else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came.add(signal.Signals(number))
        before = self._before[signal.Signals(number)]
        if callable(before) and number != signal.SIGINT:  # that one would raise KeyboardInterrupt
            before(number, frame)

    def _watch(self) -> None:
        first: dict[int, float] = {}
        ending = ENDING.intersection(self.order)
        while numbers := self._reader.recv(64):
            now = time.monotonic()
            for number in ending.intersection(numbers):
                if now - first.setdefault(number, now) >= ONE_REQUEST_S and self._armed:
                    _end(signal.Signals(number))
            if self._others != -1:
                _hand_on(bytes(n for n in numbers if n != signal.SIGINT or n not in self.order), self._others)
        self._reader.close()

    def answered(self) -> None:
        """The request is being answered: from now on a second signal does not end the process."""
        self._armed = False

    def ignore(self) -> None:
        """This process is about to end. What a launcher sends to it until then changes nothing."""
        self._close({number: signal.SIG_IGN for number in self.order})

    def close(self) -> None:
        """Put back the handlers that were there before. A second call does nothing."""
        self._close(self._before)

    def _close(self, handlers: dict[signal.Signals, Any]) -> None:
        if _Open.requests is not self:
            return
        _Open.requests = None
        signal.set_wakeup_fd(self._others, warn_on_full_buffer=False)
        _handle(handlers)
        self._writer.shutdown(socket.SHUT_RDWR)  # also of copies in forked processes: the thread reads that it is over
        self._writer.close()

    def left_to_parent(self) -> None:
        """In a process that this one forked: the request is not for it. It ends as it would, and ignores messages."""
        _Open.requests = None
        signal.set_wakeup_fd(-1)  # what arrives here must not look as if it had arrived there
        _handle({n: before if n in ENDING else signal.SIG_IGN for n, before in self._before.items()})


class _Open:
    """The one that is open in this process: handlers are one per process, too."""

    requests: Requests | None = None


def asked() -> tuple[signal.Signals, ...]:
    """The signals that are noted in this process now."""
    return () if _Open.requests is None else _Open.requests.order


def checked(signals: object) -> tuple[signal.Signals, ...]:
    """The signals, by what they ask; ending ones last.

    Raises:
        ConfigError: they are none, or cannot be handled.
    """
    try:
        numbers = {signal.Signals(number) for number in signals}  # type: ignore[attr-defined]  # what if not: below
    except (TypeError, ValueError):
        numbers = set()
    if not numbers or numbers & {signal.SIGKILL, signal.SIGSTOP}:
        shown = ", ".join(_name(s) for s in signals) if isinstance(signals, Sequence) and signals else repr(signals)
        raise ConfigError(
            f"`signals` must be signals that a process can handle, but is {shown}. Write signals=(signal.SIGTERM,"
            " signal.SIGUSR1), say."
        )
    return tuple(sorted(numbers, key=lambda number: (number in ENDING, number)))


def _name(number: object) -> str:
    return number.name if isinstance(number, signal.Signals) else repr(number)


def _check_free() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "`preemption` must be called in the main thread, the only one that can handle signals, but was in"
            f" {threading.current_thread().name!r}. Call it before you start the thread."
        )
    if _Open.requests is not None:
        raise SetupOrderError(
            "`preemption` must be called once, but signals are noted already. Use what the first call returned, or"
            " close() it."
        )


def _handle(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: what was there was not set by Python, and cannot be set again by it
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _hand_on(numbers: bytes, descriptor: int) -> None:
    with suppress(OSError):  # it is full, as the kernel's own writes would find it, or its owner has gone
        os.write(descriptor, numbers)


def _end(number: signal.Signals) -> None:
    with suppress(OSError):
        os.write(2, f"fabriclite: {number.name} came a second time; ending at once.\n".encode())
    os._exit(128 + number)


@cache
def _follow_forks() -> None:
    def in_child() -> None:
        if _Open.requests is not None:
            _Open.requests.left_to_parent()

    os.register_at_fork(after_in_child=in_child)


class ShieldedWorker:
    """A ``worker_init_fn``: what asks a rank to stop does not end the worker that still has to bring its batches.

    A signal to all processes of a job reaches data-loading workers as well, and torch makes the end of one an error.
    The worker goes on until its rank ends it, or has ended.
    """

    def __init__(self, signals: tuple[signal.Signals, ...], inner: Callable[[int], None] | None) -> None:
        self.signals = signals
        self.inner = inner

    def __call__(self, worker: int) -> None:
        for number in self.signals:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        if signal.SIGTERM in self.signals and hasattr(signal, "sigwaitinfo"):  # not on macOS: nothing tells who sent it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_by_parent, daemon=True).start()
        if self.inner is not None:
            self.inner(worker)


def _end_by_parent() -> None:
    """SIGTERM is how a loader ends workers that are slow to leave; from others it is meant for the rank."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def shielded(inner: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """``inner``, a ``worker_init_fn``, for workers that start now."""
    signals = asked()
    return ShieldedWorker(signals, inner) if signals and not isinstance(inner, ShieldedWorker) else inner

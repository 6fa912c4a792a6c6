"""Talking to a store without ever waiting for it longer than one wants to."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from queue import SimpleQueue
from typing import Final, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

T = TypeVar("T")
_AGAIN_S: Final = 0.1


class SilentError(Exception):
    """The store has not answered in time: its process is stopped, or the network is away."""


class LostError(Exception):
    """The store is gone: its process has ended."""


class Line:
    """One connection and the one thread that uses it: torch's stores block without limit, and serve one at a time.

    Args:
        connect: makes the connection; called in that thread.
        gone: whether the store's process is known to have ended: torch prints a page when it finds out by asking.
    """

    def __init__(self, connect: Callable[[], Store], gone: Callable[[], bool]) -> None:
        self._gone = gone
        self._lost = False
        self._late: Future[object] | None = None
        """What was asked last without an answer in time: until it comes, nobody waits long for another."""
        self._asked: SimpleQueue[tuple[Callable[[Store], object], Future[object]]] = SimpleQueue()
        threading.Thread(target=self._serve, args=(connect,), name="fabriclite line", daemon=True).start()

    def ask(self, act: Callable[[Store], T], limit_s: float = 2.0) -> T:
        """``act(store)``.

        Raises:
            SilentError: no answer within ``limit_s`` seconds.
            LostError: the connection broke, or could not be made.
        """
        if self._lost or self._gone():
            raise LostError
        answer: Future[object] = Future()
        self._asked.put((act, answer))
        try:
            late = self._late is not None and not self._late.done()
            return answer.result(_AGAIN_S if late else limit_s)  # type: ignore[return-value]  # of this very act
        except LateError as error:
            self._late = answer
            raise SilentError from error
        except RuntimeError as error:  # torch's DistNetworkError and kin
            self._lost = True
            raise LostError(str(error)) from error

    def _serve(self, connect: Callable[[], Store]) -> None:
        store, broken = None, None
        try:
            store = connect()
        except RuntimeError as error:
            broken = error
        while True:
            act, answer = self._asked.get()
            try:
                if store is None:
                    raise broken or RuntimeError
                answer.set_result(act(store))
            except Exception as error:
                answer.set_exception(error)
            del act, answer  # a finished answer is not kept until the next one

"""A rank lives no longer than the process that started it, also where that one was killed."""

import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Final

KEY: Final = "FABRICLITE_PARENT"
"""Holds the id of the process that re-ran the script for this rank."""
_LOOK_S: Final = 0.5


def end_with_starter() -> None:
    """In a process that was started to run the script again: end when its starter ends. Elsewhere nothing."""
    starter = os.environ.pop(KEY, None)  # popped: what this process starts is not started by the starter
    if starter is not None and int(starter) == os.getppid():
        _when(lambda: _gone(int(starter)))


def end_with(process: BaseProcess | None) -> None:
    """In a process that multiprocessing started: end when ``process``, its parent, ends."""
    if process is not None:
        _when(lambda: wait([process.sentinel]))


def _gone(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_LOOK_S)


def _when(ended: Callable[[], object]) -> None:
    def follow() -> None:
        ended()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

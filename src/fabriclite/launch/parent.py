"""Whether the process that started this rank is still there, also where it was killed."""

import os
from collections.abc import Callable, MutableMapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Final

KEY: Final = "FABRICLITE_PARENT"
"""Holds the id of the process that started this rank, where that was a starter of ours."""


def of_environment(env: MutableMapping[str, str]) -> Callable[[], bool] | None:
    """Whether the starter that ``env`` names has ended; ``None`` if it names none, or one that is not this parent.

    Its name is taken out: what this process starts is not started by that one.
    """
    starter = env.pop(KEY, None)
    if starter is None or int(starter) != os.getppid():
        return None
    return lambda: os.getppid() != int(starter)


def of_multiprocessing(process: BaseProcess | None) -> Callable[[], bool] | None:
    """Whether ``process``, which started this one by multiprocessing, has ended."""
    return None if process is None else lambda: bool(wait([process.sentinel], timeout=0))

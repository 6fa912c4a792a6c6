"""What a run writes into its folder: rank 0 its starts and steps, every rank its own events."""

import platform
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from fabriclite.watching import rundir
from fabriclite.watching.records import Event, EventKind, RunFacts, StepRecord

_TRACE: Final = 4000
"""Letters of a traceback that are kept, from its end."""


class Journal:
    """Appends to a run's folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._folder = folder
        self._rank = rank

    def start(self, **facts: Any) -> None:
        """The run was started, for the first time or again."""
        if self._folder is not None and self._rank == 0:
            begun = RunFacts(started=time.time(), attempt=rundir.attempts(self._folder), versions=versions(), **facts)
            rundir.append(self._folder, begun)
            self.event("start", begun.first_step, f"attempt {begun.attempt}")

    def step(self, record: StepRecord) -> None:
        if self._folder is not None and self._rank == 0:
            rundir.append(self._folder, record)

    def event(self, kind: EventKind, step: int | None, text: str, details: Mapping[str, Any] | None = None) -> None:
        """Something happened on this rank."""
        if self._folder is not None:
            told = Event(time=time.time(), kind=kind, rank=self._rank, step=step, text=text, details=details or {})
            rundir.append(self._folder, told)

    def failure(self, step: int, error: BaseException) -> None:
        """This rank leaves by an error."""
        first = str(error).partition("\n")[0]
        trace = "".join(traceback.format_exception(error))[-_TRACE:]
        text = f"{type(error).__name__}: {first}" if first else type(error).__name__
        self.event("failure", step, text, {"traceback": trace})


def versions() -> dict[str, str]:
    """Of what a run's results depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):  # a checkout that is not installed
        found["fabriclite"] = version("fabriclite")
    return found

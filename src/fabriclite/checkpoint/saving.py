"""Saves that go on beside the training: one at a time, in a thread and a process group of their own."""

import atexit
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from fabriclite.checkpoint.agree import Crew
from fabriclite.errors import CheckpointError
from fabriclite.world import World


class SaveHandle:
    """A save that has begun. Its content is a copy: the training may go on.

    Attributes:
        path: what is being saved.
    """

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        self.path = path
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._raised = False
        _UNDER_WAY.add(self)
        # no daemon: the interpreter waits for it before it ends
        self._thread = threading.Thread(target=self._run, name=f"fabriclite-save-{path.name}")
        self._thread.start()

    def _run(self) -> None:
        work, self._work = self._work, None  # it holds the copy, which is to go when this returns
        assert work is not None  # a thread runs once
        try:
            work()
        except BaseException as error:
            self._error = error
            atexit.register(self._at_exit)  # a script may end without another call that could tell

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is whole and on the disk.

        Args:
            timeout: seconds; ``None`` waits as long as it takes.

        Raises:
            CheckpointError: it could not be written; raised once, on every rank.
            TimeoutError: it has not ended in time. It goes on.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"Saving {self.path} must end within {timeout} s to be waited for, but goes on.")
        _UNDER_WAY.discard(self)
        if self._error is not None and not self._raised:
            self._raised = True
            raise CheckpointError(f"The asynchronous save of {self.path} failed. {self._error}") from self._error

    def _at_exit(self) -> None:
        if self._error is not None and not self._raised:
            print(f"The asynchronous save of {self.path} failed. {self._error}", file=sys.stderr)


_UNDER_WAY: Final[set[SaveHandle]] = set()


def wait_for_all() -> None:
    """Wait for the saves of this process, whoever began them.

    Raises:
        CheckpointError: one failed, and nobody was told.
    """
    for handle in list(_UNDER_WAY):
        handle.wait()


class Saver:
    """The asynchronous saves of one ``Fabric``. At most one is under way."""

    def __init__(self) -> None:
        self._group: Any = None
        self._last: SaveHandle | None = None

    def crew(self, world: World) -> Crew:
        """The ranks with a process group of their own. Every rank must call this.

        Two threads that talk through one group get each other's messages, or wait for ever.
        """
        if self._group is None and world.size > 1:
            self._group = dist.new_group(backend="gloo")
        return Crew(world, self._group)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed, and nobody was told.
        """
        last, self._last = self._last, None
        if last is not None:
            last.wait()

    def start(self, path: Path, work: Callable[[], None]) -> SaveHandle:
        """Begin a save; none is under way."""
        self._last = SaveHandle(path, work)
        return self._last

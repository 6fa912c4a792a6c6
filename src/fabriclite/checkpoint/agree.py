"""Failing together: what goes wrong on one rank is raised on all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from fabriclite.collectives import broadcast, gather_objects
from fabriclite.errors import CheckpointError, FabricError
from fabriclite.world import World

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Crew:
    """The ranks that write or read one checkpoint together.

    Attributes:
        world: all of them.
        group: the process group they talk through; ``None`` is the default one, which the training uses.
        advice: what to do about what the file system refuses.
    """

    world: World
    group: Any = None
    advice: str = "Choose a path that can be written and has room."

    def on_rank_zero(self, act: Callable[[], T], what: str) -> T:
        """Run ``act`` on rank 0; every rank gets what it returned. Every rank must call this.

        Raises:
            CheckpointError: ``act`` failed, with its reason.
        """
        result: Any = None
        failure: str | None = None
        if self.world.is_global_zero:
            try:
                result = act()
            except CheckpointError as error:
                failure = str(error)
            except BaseException as error:
                failure = f"Rank 0 must be able to {what}, but could not: {self._reason(_cause(error)[1])}"
        failure, result = broadcast(self.world, (failure, result), group=self.group)
        if failure is not None:
            raise CheckpointError(failure)
        return result  # type: ignore[no-any-return]

    def on_all(self, act: Callable[[], T], what: str) -> T:
        """Run ``act`` on every rank, and raise on every rank if it failed on any. Every rank must call this.

        Returns:
            What ``act`` returned on this rank.

        Raises:
            CheckpointError: ``act`` failed somewhere; names the first such rank and its reason.
        """
        return self._agreed(act, what, lambda result: None)[0]

    def gathered(self, act: Callable[[], T], what: str) -> list[T]:
        """As :meth:`on_all`, but every rank gets what ``act`` returned on each, in rank order.

        Raises:
            CheckpointError: as there.
        """
        return self._agreed(act, what, lambda result: result)[1]

    def _agreed(self, act: Callable[[], T], what: str, shown: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """What ``act`` returned here, and what ``shown`` makes of it on each rank, which is sent with the failures."""
        result: Any = None
        own: FabricError | None = None
        failure: tuple[int, str] | None = None
        try:
            result = act()
        except FabricError as error:
            own, failure = error, (self.world.rank, str(error))
        except BaseException as error:
            first, cause = _cause(error)
            failure = self.world.rank if first is None else first, self._reason(cause)
        sent = failure, None if failure is not None else shown(result)
        told = gather_objects(self.world, sent, group=self.group)
        for of_one, _ in told:
            if of_one is not None:
                if own is not None:
                    raise own
                raise CheckpointError(f"Every rank must be able to {what}, but rank {of_one[0]} could not: {of_one[1]}")
        return result, [of_one for _, of_one in told]

    def _reason(self, error: BaseException) -> str:
        """What happened and, of the file system's reasons, how to mend it. Leaves what is no failure of the work."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        text = f"{type(error).__name__}: {str(error).rstrip('.')}."
        return f"{text} {self.advice}" if isinstance(error, OSError) else text


READER_S_ADVICE: Final = "Make it readable for this user, or load another checkpoint."


def _cause(error: BaseException) -> tuple[int | None, BaseException]:
    """What was raised first and, where torch told every rank of it, by which one."""
    from torch.distributed.checkpoint.api import CheckpointException  # only for failures: it costs 0.6 s to import

    if isinstance(error, CheckpointException):  # no Exception: it holds what the ranks raised
        rank, (cause, _) = next(iter(error.failures.items()))
        return rank, cause
    return None, error

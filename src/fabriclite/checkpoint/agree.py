"""Failing together: what goes wrong on one rank is raised on all."""

from collections.abc import Callable

from fabriclite.collectives import broadcast, gather_objects
from fabriclite.errors import CheckpointError, FabricError
from fabriclite.world import World


def on_rank_zero(world: World, act: Callable[[], None], what: str) -> None:
    """Run ``act`` on rank 0; every rank learns how it went. Every rank must call this.

    Raises:
        CheckpointError: ``act`` failed, with its reason.
    """
    failure: str | None = None
    if world.is_global_zero:
        try:
            act()
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).rstrip('.')}."
            if isinstance(error, OSError):
                failure += " Choose a path that can be written."
    failure = broadcast(world, failure)
    if failure is not None:
        raise CheckpointError(f"Rank 0 must be able to {what}, but could not: {failure}")


def on_all(world: World, act: Callable[[], None], what: str) -> None:
    """Run ``act`` on every rank, and raise on every rank if it failed on any. Every rank must call this.

    Raises:
        CheckpointError: ``act`` failed somewhere; names the first such rank and its reason.
    """
    own: FabricError | None = None
    failure: str | None = None
    try:
        act()
    except FabricError as error:
        own, failure = error, str(error)
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        failure = f"{type(error).__name__}: {error}"
    for rank, reason in enumerate(gather_objects(world, failure)):
        if reason is not None:
            if own is not None:
                raise own
            raise CheckpointError(f"Every rank must be able to {what}, but rank {rank} could not: {reason}")

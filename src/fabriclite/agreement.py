"""A number that all ranks agree on, learnt one call later: nobody waits for a message on its way."""

from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fabriclite.world import World

_CLOSING: Final = timedelta(seconds=5)
"""How long the last message may take before the group goes."""


class Agreement:
    """The highest of what the ranks gave. Every rank must make it, and must make the same calls.

    It has a gloo group of its own, so its messages meet no others: not those of the training, nor of a save beside it.
    Each :meth:`exchange` begins one all-reduce and ends the one before, which had a whole step for its way. As every
    rank has its result from the same all-reduce, no two ranks can get different answers from the same call.
    """

    def __init__(self, world: World, timeout: timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._value: Tensor | None = None
        self._work: Any = None

    def exchange(self, value: int) -> int:
        """Give ``value``; get the highest of what the ranks gave in the call before.

        The first call gets 0. A world of one agrees with itself: it gets ``value``.

        Raises:
            RuntimeError: a rank has gone, or did not come within the timeout.
        """
        if self._group is None:
            return value
        highest = self._arrived()
        self._value = torch.tensor([value], dtype=torch.int32)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return highest

    def _arrived(self) -> int:
        if self._work is None or self._value is None:
            return 0
        self._work.wait()
        return int(self._value.item())

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self._group is not None:
            self._arrived()
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Let the message that is under way arrive, if it can: a group that goes before would break it."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.wait(_CLOSING)
        except RuntimeError:
            return  # a rank has gone: its own error says why, and nobody waits for this answer any more

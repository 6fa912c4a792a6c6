"""Who am I: rank, size and device of this process, as a value."""

from dataclasses import dataclass

import torch

from fabriclite.errors import WorldError
from fabriclite.spelling import as_code


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes of one run, seen from one of them. ``World(rank=3, size=8)`` needs no process to exist.

    Attributes:
        rank: index of this process among all, in ``[0, size)``.
        size: number of processes.
        local_rank: index of this process on its machine.
        local_size: number of processes on this machine.
        node_rank: index of this machine.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    device: torch.device = torch.device("cpu")

    __repr__ = as_code

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise WorldError(f"`rank` must be in [0, {self.size}), but is {self.rank}. Check RANK and WORLD_SIZE.")
        if not 0 <= self.local_rank < self.local_size:
            raise WorldError(
                f"`local_rank` must be in [0, {self.local_size}), but is {self.local_rank}."
                " Check LOCAL_RANK and LOCAL_WORLD_SIZE."
            )

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

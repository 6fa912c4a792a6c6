"""How one strategy spreads a model over a world, as numbers: what planning has to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fabriclite.spelling import as_code


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are gathered together.

    Attributes:
        module: at whose forward and backward they are; ``""`` is the root.
        parameters: their names.
        dtype: they are gathered in it; ``None``: in that which they have at rest.
    """

    module: str
    parameters: tuple[str, ...]
    dtype: torch.dtype | None = None


Groups = Callable[[nn.Module], tuple[Group, ...]]
"""Chooses the groups of a model: innermost first, the root last, every parameter at most once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What each rank holds, gathers and sends. Made by ``config.layout(size, precision)``; holds no process.

    Attributes:
        replicate: groups of ranks that each hold the model once.
        shard: ranks of such a group over which data parallelism splits it.
        tensor: ranks that share one matrix product.
        shards_parameters, shards_gradients, shards_optimizer: what is split over ``shard``.
        gathers: parameters are gathered a group at a time to compute with (FSDP, ZeRO-3).
        groups: chooses what is gathered together; ``None`` where nothing is.
        reshard_after_forward: gathered groups are freed between forward and backward; ``None``: all but the root.
        flat: what is split lies in one buffer, which is cut evenly (ZeRO).
        persistent_numel: parameters of fewer elements stay gathered.
        ahead_numel: elements that are gathered ahead of the module that computes, where modules gather their own.
        reuse_numel: what is used again within so many elements stays gathered until then.
        live_numel: nothing is gathered ahead while so many elements are gathered.
        flat_numel: elements that an optimizer steps at a time, at most.
        bucket_numel: elements of the buffer for gradients on their way, at most.
        bucket_bytes: size of the buffers in which gradients travel, in bytes; 0: none are kept.
        gradients_in_buckets: gradients live in those buffers, and take no memory of their own.
        master: parameters are kept a second time, in float32, for the optimizer.
        param_dtype: of parameters at rest.
        compute_dtype: of gathered parameters.
        reduce_dtype: of gradients on the wire.
        grad_dtype: of gradients at rest.
        parameters_on_host, optimizer_on_host: kept in host memory.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    shards_parameters: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    gathers: bool = False
    groups: Groups | None = None
    reshard_after_forward: bool | None = None
    flat: bool = False
    persistent_numel: int = 0
    ahead_numel: int = 0
    reuse_numel: int = 0
    live_numel: int = 0
    flat_numel: int = 0
    bucket_numel: int = 0
    bucket_bytes: int = 0
    gradients_in_buckets: bool = False
    master: bool = False
    param_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    parameters_on_host: bool = False
    optimizer_on_host: bool = False

    __repr__ = as_code

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard


Link = Literal["node", "network", "host"]
"""Between devices of one machine, between machines, between a device and its host."""

"""Full tensors and this rank's part of them. Pure but for ``full``, which gathers."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabriclite import _torch
from fabriclite.boxes import Box, all_of, flat_boxes, lengths
from fabriclite.stored import Stored
from fabriclite.stretch import Stretch


def pieces(value: "Tensor | Stretch") -> list[tuple[Box, Tensor]]:
    """What this rank holds of ``value``: boxes of the whole, each with its live memory. Empty ones are left out."""
    if isinstance(value, Stretch):
        found, done = [], 0
        for part in flat_boxes(value.shape, value.start, value.values.numel()):
            shape = torch.Size(lengths(part))
            found.append((part, value.values[done : done + shape.numel()].view(shape)))
            done += shape.numel()
        return found
    if isinstance(value, DTensor):
        return [(box(value), value.to_local())] if value.to_local().numel() else []
    return [(all_of(value.shape), value)]


def local(tensor: Tensor) -> Tensor:
    """The memory this rank holds of ``tensor``: its local part if it is sharded, else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(value: Any) -> Any:
    """The whole of a sharded tensor; anything else as it is. Every rank must call this."""
    if isinstance(value, Stretch):
        return value.gather()
    return value.full_tensor() if isinstance(value, DTensor) else value


def box(like: DTensor) -> Box:
    """Which part of the whole this rank holds of ``like``: ``(start, length)`` in every dimension, maybe empty."""
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None  # this rank is in the mesh, or it would hold no DTensor
    part = [(0, length) for length in like.shape]
    for mesh_dim, dim in _torch.local_pieces_in_order(like):
        start, length = part[dim]
        each = -(-length // like.device_mesh.size(mesh_dim))  # as torch.chunk cuts: the last pieces may be short
        first = min(each * coordinate[mesh_dim], length)
        part[dim] = (start + first, min(each, length - first))
    return tuple(part)


def cut(whole: Tensor, like: DTensor) -> Tensor:
    """The part of ``whole`` that this rank holds of ``like``, without communication.

    Args:
        whole: of ``like``'s global shape, equal on all ranks.
        like: tells mesh and placements.

    Returns:
        A view of ``whole`` with the shape of ``like.to_local()``, maybe empty.
    """
    part = whole
    for dim, (start, length) in enumerate(box(like)):
        part = part.narrow(dim, start, length)
    return part


@torch.no_grad()
def write(target: Tensor, value: Tensor | Stored) -> None:
    """Copy ``value`` into ``target``: of a full tensor a sharded one keeps only this rank's part."""
    if isinstance(value, Stored):
        part = box(target) if isinstance(target, DTensor) else all_of(target.shape)
        if local(target).numel():
            value.read(part, local(target))
    elif isinstance(target, DTensor) and not isinstance(value, DTensor):
        target.to_local().copy_(cut(value, target))
    elif isinstance(value, DTensor) and not isinstance(target, DTensor):
        target.copy_(value.full_tensor())
    else:
        target.copy_(value)


def is_extra(name: str) -> bool:
    """Whether an item of a module's state is what its ``get_extra_state`` gave: of any kind, a tensor included."""
    return name.rpartition(".")[2] == "_extra_state"

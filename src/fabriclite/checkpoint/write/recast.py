"""Trees of tensors in files: in another dtype, and in parts small enough to be in memory."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from fabriclite import _torch
from fabriclite.boxes import Box, all_of
from fabriclite.stored import InMemory, Stored

PIECE: Final = 16 << 20
"""Bytes of a tensor that are in memory at once, where it is written value by value."""
BOX: Final = 64 << 20
"""Bytes of a tensor that are in memory at once, where it is written box by box."""


class Cast(Stored):
    """A tensor that lies in a checkpoint, with its values in another dtype."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self.shape = stored.shape
        self.dtype = dtype
        self._stored = stored

    @override
    def read(self, box: Box, out: Tensor) -> None:
        if out.dtype == self.dtype:
            self._stored.read(box, out)
            return
        rounded = torch.empty(out.shape, dtype=self.dtype)
        self._stored.read(box, rounded)
        out.copy_(rounded)

    @override
    def flat(self, start: int, count: int) -> Tensor:
        same = self._stored.dtype == self.dtype
        return self._stored.flat(start, count) if same else super().flat(start, count)

    @override
    def mapped(self) -> Tensor | None:
        return None


def replaced(tree: Any, change: Callable[[Stored], Any]) -> Any:
    """The same tree with each :class:`Stored` in it changed."""
    if isinstance(tree, Stored):
        return change(tree)
    if isinstance(tree, dict):
        same = copy(tree)  # with what a subclass keeps beside its items
        same.update({key: replaced(item, change) for key, item in tree.items()})
        return same
    if type(tree) in (list, tuple):
        return type(tree)(replaced(item, change) for item in tree)
    return tree


def casting(dtype: torch.dtype) -> Callable[[Stored], Stored]:
    """Gives floating-point tensors in ``dtype``, others as they are. What is one tensor stays one."""
    made: dict[Any, tuple[Stored, Stored]] = {}

    def change(stored: Stored) -> Stored:
        if not stored.dtype.is_floating_point or stored.dtype == dtype:
            return stored
        key = _identity(stored)
        if key not in made:
            made[key] = stored, Cast(stored, dtype)  # kept: its address is the key
        return made[key][1]

    return change


def alone(stored: Stored) -> Stored:
    """The same, but of a tensor that looks into more memory than its own without that memory."""
    shares = isinstance(stored, InMemory) and stored.tensor.untyped_storage().nbytes() != stored.nbytes
    return Cast(stored, stored.dtype) if shares else stored


def _identity(stored: Stored) -> Any:
    if not isinstance(stored, InMemory) or stored.nbytes == 0:
        return id(stored)
    tensor = stored.tensor
    return _torch.storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def pieces(stored: Stored) -> Iterator[Tensor]:
    """All values in row-major order, as flat tensors of at most :data:`PIECE` bytes, each read when it is asked for."""
    step = max(1, PIECE // stored.dtype.itemsize)
    count = stored.shape.numel()
    for start in range(0, count, step):
        yield stored.flat(start, min(step, count - start))


def boxes(shape: Sequence[int], at_most: int) -> Iterator[Box]:
    """Boxes of at most so many values that make up a tensor, in order. Pure."""
    if prod(shape) <= at_most:
        yield all_of(shape)
        return
    row = prod(shape[1:])
    if row <= at_most:
        step = at_most // row
        for start in range(0, shape[0], step):
            yield ((start, min(step, shape[0] - start)), *all_of(shape[1:]))
        return
    for index in range(shape[0]):
        for inner in boxes(shape[1:], at_most):
            yield ((index, 1), *inner)

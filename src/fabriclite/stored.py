"""A tensor that lies in a checkpoint: what it is, and how any part of it is read."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fabriclite.boxes import Box, all_of, flat_boxes, lengths


class Stored(ABC):
    """A tensor in a file. Nothing is read before :meth:`read`.

    Attributes:
        shape: of the whole tensor.
        dtype: of its values in the file.
    """

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def read(self, box: Box, out: Tensor) -> None:
        """Copy one part into memory.

        Args:
            box: ``(start, length)`` in every dimension; empty for a tensor without dimensions.
            out: of shape ``lengths``, of any dtype (values are converted), device and strides.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """

    @abstractmethod
    def mapped(self) -> Tensor | None:
        """The whole tensor over the file itself, read as it is used; what is written to it stays in this process.

        ``None`` where that is not safe or not possible: on a file system of the network, in pieces, not aligned.
        """

    def read_flat(self, start: int, out: Tensor) -> None:
        """Copy values ``start`` and following, in row-major order, into ``out`` of shape ``(length,)``."""
        done = 0
        for box in flat_boxes(self.shape, start, out.numel()):
            shape = torch.Size(lengths(box))
            self.read(box, out[done : done + shape.numel()].view(shape))
            done += shape.numel()

    def flat(self, start: int, count: int) -> Tensor:
        """Values ``start`` and following, in row-major order, on the host. Not to be written to."""
        out = torch.empty(count, dtype=self.dtype)
        self.read_flat(start, out)
        return out

    def whole(self) -> Tensor:
        """All of it, in memory of its own on the host."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read(all_of(self.shape), out)
        return out

    def sample(self) -> Tensor:
        """Its first values, at most 1024: equal where the tensors are, and cheap to read."""
        out = torch.empty(min(self.shape.numel(), 1024), dtype=self.dtype)
        self.read_flat(0, out)
        return out

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class InMemory(Stored):
    """A tensor that was read already, or that torch mapped."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.shape = tensor.shape
        self.dtype = tensor.dtype

    @override
    def read(self, box: Box, out: Tensor) -> None:
        part = self.tensor
        for dim, (start, length) in enumerate(box):
            part = part.narrow(dim, start, length)
        out.copy_(part)

    @override
    def flat(self, start: int, count: int) -> Tensor:
        tensor = self.tensor
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            return tensor.view(-1)[start : start + count]
        return super().flat(start, count)

    @override
    def mapped(self) -> Tensor | None:
        return None


def in_memory(tree: Any) -> Any:
    """A tree of mappings and lists with every :class:`Stored` read."""
    if isinstance(tree, Stored):
        return tree.whole()
    if isinstance(tree, dict):
        return type(tree)((key, in_memory(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(in_memory(item) for item in tree)
    return tree

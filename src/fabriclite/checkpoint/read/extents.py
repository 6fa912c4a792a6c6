"""Tensors that lie in files, in one or more pieces, and how a part of one gets into memory with little reading."""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from fabriclite import _torch
from fabriclite.boxes import Box
from fabriclite.checkpoint.read.ranges import File
from fabriclite.stored import Stored

_BLOCK: Final = 16 << 20
"""Bytes of the scratch memory through which values of another dtype, device or order go."""
_LONG: Final = 32 << 10
"""Bytes in a row from which on a read call of their own is cheaper than the page faults of a mapping."""

Fetch = Callable[[int, int], Tensor]
"""Gives ``count`` values from the file, from value ``start`` of an extent on, as a flat tensor."""


class Extent:
    """A box of a tensor that lies in one file, its values one after the other.

    Args:
        box: of the whole tensor.
        file: where it lies.
        offset: of its first value, in bytes.
        strides: in values, if they do not lie in row-major order.
    """

    def __init__(self, box: Box, file: File, offset: int, strides: Sequence[int] | None = None) -> None:
        self.box = box
        self.file = file
        self._place = offset, None if strides is None else tuple(strides)

    def place(self) -> tuple[int, tuple[int, ...] | None]:
        """Offset and strides."""
        return self._place


class OnDisk(Stored):
    """A tensor in one or more extents, which cover it and do not overlap."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, extents: Sequence[Extent]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.extents = tuple(extents)

    @override
    def read(self, box: Box, out: Tensor) -> None:
        assert tuple(out.shape) == tuple(length for _, length in box), (out.shape, box)
        if out.numel() == 0:
            return
        out = out.detach()
        for extent in self.extents:
            common = _common(extent.box, box)
            if common is None:
                continue
            target = out
            for dim, ((start, length), (first, _)) in enumerate(zip(common, box, strict=True)):
                target = target.narrow(dim, start - first, length)
            inner = [(start - first, n) for (start, n), (first, _) in zip(common, extent.box, strict=True)]
            _copy(extent, self.dtype, inner, target)

    @override
    def mapped(self) -> Tensor | None:
        if len(self.extents) != 1 or self.nbytes == 0:
            return None
        [extent] = self.extents
        offset, strides = extent.place()
        if strides not in (None, _row_major(self.shape)) or offset % self.dtype.itemsize:
            return None
        storage = extent.file.give(offset, self.nbytes)
        if storage is None:
            return None
        with _torch.no_modes():  # nothing is made here that anybody could record
            return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, _row_major(self.shape))


def _common(one: Box, other: Box) -> Box | None:
    """The box that both hold, or ``None``."""
    both = []
    for (a, n), (b, m) in zip(one, other, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        both.append((start, end - start))
    return tuple(both)


def _copy(extent: Extent, dtype: torch.dtype, inner: Sequence[tuple[int, int]], target: Tensor) -> None:
    """Copy a box of an extent, in the way that reads the least in the fewest calls."""
    offset, strides = extent.place()
    shape = [n for _, n in extent.box]
    if strides is None:
        strides = _row_major(shape)
    else:  # a dense tensor of another order is row-major with its dimensions in that order
        order = [dim for _, dim in sorted((-stride, dim) for dim, stride in enumerate(strides))]
        shape, inner = [shape[dim] for dim in order], [inner[dim] for dim in order]
        strides, target = tuple(strides[dim] for dim in order), target.permute(order)
    item = dtype.itemsize
    outer, run = _runs(shape, inner, strides)
    direct = _is_plain(target, dtype) and target[(0,) * outer].is_contiguous()
    long = run * item >= _LONG or prod(n for _, n in inner[:outer]) == 1
    if long and direct:
        first, _ = _span(inner, strides)
        for index in itertools.product(*(range(n) for _, n in inner[:outer])):
            start = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
            part = target[index]
            extent.file.read_into(offset + start * item, _memory(part.data_ptr(), run * item))
        return
    mapping = None if long else extent.file.mapping()
    if mapping is not None and offset + sum(_span(inner, strides)) * item <= mapping.nbytes():
        _in_blocks(_from_mapping(mapping, offset, dtype), inner, strides, target, dtype, may_waste=True)
    else:
        _in_blocks(_from_reads(extent.file, offset, dtype), inner, strides, target, dtype, may_waste=not long)


def _is_plain(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of ``target`` can be filled with bytes of a file."""
    return target.device.type == "cpu" and target.dtype == dtype and not target.is_conj() and not target.is_neg()


def _runs(shape: Sequence[int], inner: Sequence[tuple[int, int]], strides: Sequence[int]) -> tuple[int, int]:
    """How many leading dimensions have to be walked, and how many values then lie in a row in the file."""
    run, outer = 1, len(shape)
    while outer > 0 and (strides[outer - 1] == run or inner[outer - 1][1] == 1):
        outer -= 1
        run *= inner[outer][1]
        if inner[outer][1] != shape[outer]:
            break
    return outer, run


def _in_blocks(
    fetch: Fetch,
    inner: Sequence[tuple[int, int]],
    strides: Sequence[int],
    target: Tensor,
    dtype: torch.dtype,
    may_waste: bool,
) -> None:
    """Copy in pieces of no more than a block of the file, unwanted values between wanted ones included."""
    start, count = _span(inner, strides)
    few = count * dtype.itemsize <= _BLOCK
    if count == 1 or (few and (may_waste or target.numel() >= 0.95 * count)):
        target.copy_(fetch(start, count).as_strided(target.shape, strides))
        return
    dim = max(range(len(inner)), key=lambda d: (inner[d][1] > 1) * strides[d])
    first, length = inner[dim]
    step = (length + 1) // 2
    for at in range(0, length, step):
        n = min(step, length - at)
        box = [*inner[:dim], (first + at, n), *inner[dim + 1 :]]
        _in_blocks(fetch, box, strides, target.narrow(dim, at, n), dtype, may_waste)


def _from_reads(file: File, offset: int, dtype: torch.dtype) -> Fetch:
    scratch = bytearray()

    def fetch(start: int, count: int) -> Tensor:
        nonlocal scratch
        wanted = count * dtype.itemsize
        if len(scratch) < wanted:
            scratch = bytearray(wanted)
        file.read_into(offset + start * dtype.itemsize, memoryview(scratch)[:wanted])
        return torch.frombuffer(scratch, dtype=dtype, count=count)

    return fetch


def _from_mapping(mapping: torch.UntypedStorage, offset: int, dtype: torch.dtype) -> Fetch:
    scratch = bytearray()

    def fetch(start: int, count: int) -> Tensor:
        nonlocal scratch
        wanted = count * dtype.itemsize
        source = _memory(mapping.data_ptr() + offset + start * dtype.itemsize, wanted)
        if (offset + mapping.data_ptr()) % dtype.itemsize == 0:
            return torch.frombuffer(source, dtype=dtype, count=count)  # `mapping` outlives it
        if len(scratch) < wanted:
            scratch = bytearray(wanted)
        memoryview(scratch)[:wanted] = source
        return torch.frombuffer(scratch, dtype=dtype, count=count)

    return fetch


def _span(inner: Sequence[tuple[int, int]], strides: Sequence[int]) -> tuple[int, int]:
    """The first value of a box that is not empty, and how many there are from it to the last one."""
    start = sum(first * stride for (first, _), stride in zip(inner, strides, strict=True))
    return start, 1 + sum((n - 1) * stride for (_, n), stride in zip(inner, strides, strict=True))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")

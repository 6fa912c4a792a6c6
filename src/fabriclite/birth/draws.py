"""How many numbers torch's CPU kernels draw, and how to draw a part of a tensor as it would be in the whole.

These are facts of torch 2.11 to 2.13. :func:`trusted` compares them with the running torch once; what disagrees is
drawn for real while recording instead: slower, and right.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fabriclite.birth import facts

Kind = Literal["normal", "uniform"]

_KINDS: Final[dict[str, Kind]] = {
    "normal_": "normal",
    "randn": "normal",
    "randn_like": "normal",
    "uniform_": "uniform",
    "rand": "uniform",
    "rand_like": "uniform",
}
_HALF: Final = (torch.bfloat16, torch.float16)
_BLOCK: Final = 16
"""``normal_`` makes 16 values from 16 numbers at once."""
_LARGEST_SHUFFLE: Final = 10**7
_NARROW: Final = 2**28
"""Ranges of whole numbers from which on some dtypes take two numbers per value."""


def kind_of(name: str) -> Kind | None:
    """Which distribution an operation fills a tensor from, if it is one that can be drawn in parts."""
    return _KINDS.get(name)


def count(
    name: str, overload: str, out: Tensor, args: tuple[Any, ...], keeps_a_normal: Callable[[], bool]
) -> int | None:
    """32-bit numbers that a CPU operation draws; ``None`` if unknown.

    Args:
        name, overload: of the operation.
        out: what it fills, or a meta tensor like it.
        args: its arguments.
        keeps_a_normal: see ``Stream.keeps_a_normal``.
    """
    if kind := kind_of(name):
        return _count(kind, out, keeps_a_normal)
    if name == "randint" and overload in ("default", "low"):
        low, high = (0, args[0]) if overload == "default" else (args[0], args[1])
        return out.numel() if high - low < _NARROW else None
    if name == "randperm" and out.numel() < _LARGEST_SHUFFLE:
        return max(out.numel() - 1, 0)
    return None


def _count(kind: Kind, out: Tensor, keeps_a_normal: Callable[[], bool]) -> int | None:
    n, dtype = out.numel(), out.dtype
    if (kind, dtype) not in trusted():
        return None
    if kind == "uniform":
        return n * _numbers_per_value(dtype)
    if n >= _BLOCK and out.is_contiguous():
        return normal_count(n, dtype)
    # One by one in pairs, the second of a pair kept for the next draw.
    return 2 * n if n % 2 == 0 and not keeps_a_normal() else None


def normal_count(n: int, dtype: torch.dtype) -> int:
    """Numbers for ``n`` >= 16 normals: if 16 does not divide ``n``, the last 16 values are drawn once more."""
    if dtype in _HALF:
        return -(-n // _BLOCK) * _BLOCK
    return (n + (_BLOCK if n % _BLOCK else 0)) * _numbers_per_value(dtype)


def _numbers_per_value(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float64 else 1


def by_parts(kind: Kind, n: int, dtype: torch.dtype) -> bool:
    """Whether :func:`fill_part` can draw a part of ``n`` such values."""
    return (kind, dtype) in trusted() and (kind == "uniform" or n >= _BLOCK)


Seek = Callable[[int, int], torch.Generator]
"""``seek(place, count)`` gives a generator whose next number is the draw's ``place``-th; ``count`` will be drawn."""


def fill_part(kind: Kind, out: Tensor, begin: int, n: int, args: tuple[Any, ...], seek: Seek) -> None:
    """Fill ``out`` with values ``begin`` and following of a draw of ``n``.

    Args:
        kind: of distribution.
        out: contiguous, of shape ``(length,)``.
        begin: place of its first value in the whole.
        n: values of the whole.
        args: mean and standard deviation, or bounds.
        seek: see :data:`Seek`.
    """
    if out.numel() == 0:
        return
    if kind == "uniform":
        per = _numbers_per_value(out.dtype)
        out.uniform_(*args, generator=seek(begin * per, out.numel() * per))
    else:
        _fill_normal(out, begin, n, args, seek)


def _fill_normal(out: Tensor, begin: int, n: int, args: tuple[Any, ...], seek: Seek) -> None:
    length, end = out.numel(), begin + out.numel()
    redrawn = n - _BLOCK if n % _BLOCK else n  # from here on values are drawn once more, at the very end
    whole_blocks = end == n or (end % _BLOCK == 0 and end <= redrawn)
    if begin % _BLOCK == 0 and length >= _BLOCK and whole_blocks:
        numbers = normal_count(length, out.dtype)
        out.normal_(*args, generator=seek(begin * _numbers_per_value(out.dtype), numbers))
        return
    low = -(-begin // _BLOCK) * _BLOCK
    high = n if end == n and n - low >= _BLOCK else min(end, redrawn) // _BLOCK * _BLOCK
    if low < high:
        for first, last in ((begin, low), (low, high), (high, end)):
            if first < last:
                _fill_normal(out[first - begin : last - begin], first, n, args, seek)
        return
    # Less than two blocks: draw the blocks around.
    around_end = n if end > redrawn else -(-end // _BLOCK) * _BLOCK
    around = begin // _BLOCK * _BLOCK if end <= redrawn else min(begin, redrawn) // _BLOCK * _BLOCK
    blocks = out.new_empty(around_end - around)
    _fill_normal(blocks, around, n, args, seek)
    out.copy_(blocks[begin - around : end - around])


@cache
def trusted() -> frozenset[tuple[Kind, torch.dtype]]:
    """What the running torch draws as this file says: compared once, in about 5 ms."""
    dtypes = (torch.float32, torch.float64, *_HALF)
    return frozenset((kind, dtype) for kind in ("normal", "uniform") for dtype in dtypes if _holds(kind, dtype))


def _holds(kind: Kind, dtype: torch.dtype) -> bool:
    generator, ours = torch.Generator(), torch.Generator()
    for n in (16, 17, 20, 47, 64, 100):
        start = generator.manual_seed(n).get_state()
        whole = getattr(torch.empty(n, dtype=dtype, device="cpu"), f"{kind}_")(0.0, 2.0, generator=generator)
        numbers = normal_count(n, dtype) if kind == "normal" else n * _numbers_per_value(dtype)
        if not torch.equal(generator.get_state(), _stepped(start, numbers)):
            return False

        def seek(place: int, numbers: int, start: Tensor = start) -> torch.Generator:
            return ours.set_state(_stepped(start, place))

        for begin, end in ((0, n), (0, 16), (1, n), (5, 13), (n - 3, n), (n // 3, n - 1)):
            part = torch.empty(end - begin, dtype=dtype, device="cpu")
            if kind == "normal":
                _fill_normal(part, begin, n, (0.0, 2.0), seek)
            else:
                per = _numbers_per_value(dtype)
                part.uniform_(0.0, 2.0, generator=seek(begin * per, 0))
            if not torch.equal(part, whole[begin:end]):
                return False
    return True


def _stepped(state: Tensor, numbers: int) -> Tensor:
    generator = torch.Generator().set_state(state)
    if numbers:
        torch.empty(numbers, device="cpu").uniform_(generator=generator)
    return generator.get_state()


_measured: dict[tuple[Any, ...], int] = {}


def measured(func: Any, target: Tensor, args: tuple[Any, ...], device: torch.device) -> int | None:
    """How far a CUDA operation moves its generator, seen by running it once on scratch memory; ``None`` if unknown.

    It depends on the kernel and on the device's number of multiprocessors: nothing to be worked out here.

    Args:
        func: the operation.
        target: what it fills, or a meta tensor like it.
        args: its arguments.
        device: a CUDA device.
    """
    known = facts.of(func)
    kind = kind_of(known.name)
    if any(isinstance(arg, Tensor) for arg in args[1:]) or not (kind or known.name in facts.FILLS | facts.DRAWN_FILLS):
        return None
    scalars = tuple(args[1:]) if known.written else ()
    key = (func, target.dtype, tuple(target.shape), target.stride(), scalars, device)
    if key not in _measured:
        generator = torch.Generator(device)
        scratch = torch.empty_strided(target.size(), target.stride(), dtype=target.dtype, device=device)
        fill = func if known.written else (Tensor.normal_ if kind == "normal" else Tensor.uniform_)
        fill(scratch, *scalars, generator=generator)
        _measured[key] = generator.get_offset()
    return _measured[key]

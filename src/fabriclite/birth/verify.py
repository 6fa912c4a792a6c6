"""A net under births: does every rank hold what it should? Pure, but for looking at tensors.

Every rank looks at its own part of every tensor; what all saw is compared, in numbers that thousands of ranks can send.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fabriclite.birth import replay
from fabriclite.birth.births import Births, named_tensors
from fabriclite.birth.tape import Ref

Where = tuple[tuple[int, int], ...]
"""Which part of a tensor: ``(start, length)`` in every dimension, or one pair for a flat part."""
Parts = Mapping[str, tuple[Tensor, Where]]
"""By name, this rank's part of every parameter and buffer."""

Column = np.ndarray[Any, np.dtype[np.int64]]
_SEGMENTS: Final = 16
_WORD: Final = 8
_ENOUGH: Final = 16
"""Values from which on two random parts are never equal by chance."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a module was when it was set up.

    Attributes:
        dtypes: by name of parameter or buffer.
        ties: names that are one parameter.
        random: names of parameters whose values were drawn one by one, so that no two parts are equal.
    """

    dtypes: Mapping[str, torch.dtype]
    ties: Sequence[Sequence[str]]
    random: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, births: Births) -> "Promise":
        return cls(
            dtypes={name: tensor.dtype for name, tensor in named_tensors(module)},
            ties=ties_of(module),
            random=births.random_names(),
        )


def ties_of(module: nn.Module) -> list[list[str]]:
    """Names that are one parameter or buffer."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


_COLUMNS: Final = 4
_NO_MEMORY, _UNWRITTEN, _TELLING = 1, 2, 4
"""Flags: without memory; left as it was handed out; of so many values that random ones are never equal by chance."""


def look(parts: Parts) -> Tensor:
    """Look at this rank's parts: two passes over memory.

    Returns:
        int64 of shape ``(names, 4)``: which part, dtype, digest of the bytes, flags. The same names in the same order
        on every rank, see :func:`names_digest`.
    """
    rows = [_look(tensor.detach(), where) for tensor, where in parts.values()]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), _COLUMNS)


def names_digest(parts: Parts) -> bytes:
    """Of the names, and of their order."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _look(tensor: Tensor, where: Where) -> tuple[int, int, int, int]:
    dtype = _short(str(tensor.dtype))
    if tensor.is_meta:
        return _short(repr(where)), dtype, 0, _NO_MEMORY
    unwritten = tensor.numel() > 0 and replay.poisoned(tensor.untyped_storage(), Ref.of(0, tensor))
    flags = _UNWRITTEN * unwritten + _TELLING * (tensor.numel() >= _ENOUGH)
    return _short(repr(where)), dtype, _short(repr((tuple(tensor.shape), digest(tensor)))), flags


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def digest(tensor: Tensor) -> tuple[int, ...]:
    """Sums of the bits of ``tensor`` over 16 stretches: equal tensors have equal ones, others hardly ever."""
    values = tensor.contiguous()
    raw = (torch.view_as_real(values) if values.is_complex() else values).view(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % _WORD else raw
    words = raw.numel() // _WORD * _WORD
    sums = [part.sum() for part in raw[:words].view(torch.int64).chunk(_SEGMENTS)] if words else []
    rest = raw[words:].to(torch.int64)
    sums.append((rest << torch.arange(0, 8 * rest.numel(), 8, device=rest.device)).sum())
    return tuple(torch.stack(sums).tolist())


def findings(
    promise: Promise, names: Sequence[str], looks: Tensor, tied: Sequence[Sequence[str]], now: Mapping[str, torch.dtype]
) -> list[str]:
    """What is wrong, each with the name of the tensor and the cause.

    Args:
        promise: what the module was.
        names: of what was looked at.
        looks: int64 of shape ``(ranks, names, 4)``: what all ranks saw.
        tied: names that are one parameter now.
        now: dtypes now, by name.
    """
    groups = [set(group) for group in tied]
    found = [
        f"{' and '.join(group)} were one parameter and are not any more"
        for group in promise.ties
        if not any(set(group) <= names for names in groups)
    ]
    table = looks.cpu().numpy()
    for column, name in enumerate(names):
        where, dtype, digests, flags = table[:, column].T
        wanted = promise.dtypes.get(name, now[name])
        problem = _problem(where, digests, flags, name in promise.random)
        if (dtype != _short(str(wanted))).any() and problem is None:
            problem = f"is {now[name]}, but was {wanted}"
        if problem is not None:
            found.append(f"{name} {problem}")
    return found


def _problem(where: Column, digests: Column, flags: Column, random: bool) -> str | None:
    """Of one tensor; every argument by rank."""
    if (nowhere := np.flatnonzero(flags & _NO_MEMORY)).size:
        return f"has no memory on rank {nowhere[0]}: nothing gave it its value"
    if (unwritten := np.flatnonzero(flags & _UNWRITTEN)).size:
        return f"holds memory on rank {unwritten[0]} that was never written"
    _, first, part = np.unique(where, return_index=True, return_inverse=True)
    if (odd := np.flatnonzero(digests != digests[first[part]])).size:
        return f"should be the same on ranks {first[part[odd[0]]]} and {odd[0]}, and is not"
    if random:
        owners = first[(flags[first] & _TELLING) != 0]  # one rank for each part
        _, again, drawn = np.unique(digests[owners], return_index=True, return_inverse=True)
        if (repeated := np.flatnonzero(again[drawn] != np.arange(owners.size))).size:
            one, other = owners[again[drawn[repeated[0]]]], owners[repeated[0]]
            return f"was drawn from the same numbers on ranks {one} and {other}"
    return None

"""A net under births: does every rank hold what it should? Pure, but for looking at tensors.

Every rank looks at its own part of every tensor; what all saw is compared, in numbers that thousands of ranks can send.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fabriclite.birth import replay
from fabriclite.birth.births import Births
from fabriclite.birth.places import is_lazy, named_tensors
from fabriclite.birth.tape import Ref

Where = tuple[tuple[int, int], ...]
"""Which part of a tensor: ``(start, length)`` in every dimension, or one pair for a flat part."""
Parts = Mapping[str, tuple[Tensor, Where | None]]
"""By name, this rank's part of every parameter and buffer; ``None`` for a plain tensor, which no library cut."""

Column = np.ndarray[Any, np.dtype[np.int64]]
_SEGMENTS: Final = 16
_WORD: Final = 8
_ENOUGH: Final = 16
"""Values from which on two random parts are never equal by chance."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a module was when it was set up.

    Attributes:
        kind: its class's name.
        statistics: names of buffers that follow each rank's own data, as those of BatchNorm do.
        dtypes, shapes: by name of parameter or buffer.
        ties: names that are one parameter.
        random: names of parameters whose values were drawn one by one, so that no two parts are equal.
        loaded: names of those that are tensors of a file.
        recorded: names of parameters and buffers that ``setup`` made, rather than their own code at once.
    """

    kind: str
    statistics: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Sequence[Sequence[str]]
    random: frozenset[str]
    loaded: frozenset[str] = frozenset()
    recorded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, module: nn.Module, births: Births) -> "Promise":
        named = named_tensors(module)
        return cls(
            kind=type(module).__name__,
            statistics=frozenset(_statistics(module)),
            dtypes={name: tensor.dtype for name, tensor in named},
            shapes={name: tuple(tensor.shape) for name, tensor in named if not is_lazy(tensor)},
            ties=_ties(named),
            random=births.random_names(),
            loaded=births.loaded_names(),
            recorded=births.names(),
        )


def _statistics(module: nn.Module) -> Iterator[str]:
    for prefix, sub in module.named_modules(remove_duplicate=False):
        names = {name for name, buffer in sub._buffers.items() if buffer is not None}
        if {"running_mean", "running_var"} <= names:
            yield from (f"{prefix}.{name}" if prefix else name for name in names)


def ties_of(module: nn.Module) -> list[list[str]]:
    """Names that are one parameter or buffer."""
    return _ties(named_tensors(module))


def _ties(named: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


_COLUMNS: Final = 3
_NO_MEMORY, _UNWRITTEN, _TELLING, _OWN = 1, 2, 4, 8
"""Flags: without memory; left as it was handed out; of so many values that random ones are equal by no chance; cut by
the user's hand, so that nobody else can say which part it is."""


def own_findings(promise: Promise, parts: Parts, tied: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong on this rank that it can tell alone: ties and dtypes.

    ``tied``: names that are one parameter now.
    """
    groups = [set(group) for group in tied]
    found = [
        f"{' and '.join(group)} were one parameter and are not any more"
        for group in promise.ties
        if not any(set(group) <= names for names in groups)
    ]
    wanted = promise.dtypes
    return found + [
        f"{name} is {tensor.dtype}, but was {wanted[name]}"
        for name, (tensor, _) in parts.items()
        if tensor.dtype != wanted.get(name, tensor.dtype)
    ]


def of_all(told: Sequence[tuple[bytes, Sequence[str]]]) -> list[str]:
    """What all ranks told, with the first rank that did: digests of names, and :func:`own_findings`."""
    first: dict[str, int] = {}
    for rank, (names, own) in enumerate(told):
        if names != told[0][0]:
            first.setdefault("parameters or buffers have other names than on rank 0", rank)
        for finding in own:
            first.setdefault(finding, rank)
    return [f"{finding} (rank {rank})" for finding, rank in first.items()]


def look(parts: Parts, promise: Promise, just_read: bool = False) -> Tensor:
    """Look at this rank's parts: two passes over memory.

    Args:
        parts: of every tensor.
        promise: what the module was.
        just_read: all ranks loaded the same names a moment ago: leave out the values of those that a library cut.

    Returns:
        int64 of shape ``(names, 3)``: which part, digest of the bytes, flags. The same names in the same order on every
        rank, see :func:`names_digest`.
    """
    rows = [
        (_short(repr(where)), 0, 0)
        if just_read and where is not None and name in promise.loaded and not tensor.is_meta
        else _look(tensor.detach(), where, promise.shapes.get(name), name in promise.random)
        for name, (tensor, where) in parts.items()
    ]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), _COLUMNS)


def names_digest(parts: Parts) -> bytes:
    """Of the names, and of their order."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _look(tensor: Tensor, where: Where | None, shape: tuple[int, ...] | None, random: bool) -> tuple[int, int, int]:
    own = where is None and shape is not None and tuple(tensor.shape) != shape
    if tensor.is_meta:
        return _short(repr(where)), 0, _NO_MEMORY
    unwritten = tensor.numel() > 0 and replay.poisoned(tensor.untyped_storage(), Ref.of(0, tensor))
    # Parts of one value, as of an initialisation with a gain of 0, are equal and tell nothing.
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    telling = random and tensor.numel() >= _ENOUGH and bool(values.amin() != values.amax())
    flags = _UNWRITTEN * unwritten + _TELLING * telling + _OWN * own
    return _short(repr(where)), _short(repr((str(tensor.dtype), tuple(tensor.shape), digest(tensor)))), flags


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


def findings(promise: Promise, names: Sequence[str], looks: Tensor, at_birth: bool) -> list[str]:
    """What is wrong that ranks can only tell together, each with the name of the tensor and the cause.

    Args:
        promise: what the module was.
        names: of what was looked at.
        looks: int64 of shape ``(ranks, names, 3)``: what all ranks saw.
        at_birth: whether statistics have to agree too.
    """
    table, found = looks.cpu().numpy(), []
    for column, name in enumerate(names):
        where, digests, flags = table[:, column].T
        alike = at_birth or name not in promise.statistics
        problem = _problem(where, digests, flags, alike)
        if problem is not None:
            found.append(f"{name} {problem}")
    return found


def _problem(where: Column, digests: Column, flags: Column, alike: bool) -> str | None:
    """Of one tensor; every argument but the last by rank. ``alike``: whether equal parts have to be equal."""
    if (nowhere := np.flatnonzero(flags & _NO_MEMORY)).size:
        return f"has no memory on rank {nowhere[0]}: nothing gave it its value"
    if (unwritten := np.flatnonzero(flags & _UNWRITTEN)).size:
        return f"holds memory on rank {unwritten[0]} that was never written"
    if (flags & _OWN).any():
        return None
    _, first, part = np.unique(where, return_index=True, return_inverse=True)
    if alike and (odd := np.flatnonzero(digests != digests[first[part]])).size:
        return f"should be the same on ranks {first[part[odd[0]]]} and {odd[0]}, and is not"
    owners = np.sort(first[(flags[first] & _TELLING) != 0])  # one rank for each part
    _, again, drawn = np.unique(digests[owners], return_index=True, return_inverse=True)
    if (repeated := np.flatnonzero(again[drawn] != np.arange(owners.size))).size:
        one, other = owners[again[drawn[repeated[0]]]], owners[repeated[0]]
        return f"was drawn from the same numbers on ranks {one} and {other}"
    return None

"""A net under births: does every rank hold what it should? Pure, but for looking at tensors.

Every rank looks at its own part of every tensor; what all saw is compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fabriclite.birth import replay
from fabriclite.birth.births import Births, named_tensors
from fabriclite.birth.tape import Ref

Where = tuple[tuple[int, int], ...]
"""Which part of a tensor: ``(start, length)`` in every dimension, or one pair for a flat part."""
Parts = Mapping[str, tuple[Tensor, Where]]
"""By name, this rank's part of every parameter and buffer."""

_SEGMENTS: Final = 16
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


@dataclass(frozen=True, slots=True)
class Look:
    """What one rank saw of one tensor.

    Attributes:
        where: which part it holds.
        dtype: of the tensor.
        digest: of the part's bytes; ``None`` if it has no memory.
        unwritten: whether memory was left as it was handed out.
    """

    where: Where
    dtype: torch.dtype
    digest: tuple[int, ...] | None
    unwritten: bool


def ties_of(module: nn.Module) -> list[list[str]]:
    """Names that are one parameter or buffer."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def look(parts: Parts) -> dict[str, Look]:
    """Look at this rank's parts: two passes over memory."""
    return {name: _look(tensor, where) for name, (tensor, where) in parts.items()}


def _look(tensor: Tensor, where: Where) -> Look:
    tensor = tensor.detach()
    if tensor.is_meta:
        return Look(where, tensor.dtype, None, unwritten=False)
    ref = Ref.of(0, tensor)
    unwritten = tensor.numel() > 0 and replay.poisoned(tensor.untyped_storage(), ref)
    return Look(where, tensor.dtype, digest(tensor), unwritten)


def digest(tensor: Tensor) -> tuple[int, ...]:
    """Sums of the bits of ``tensor`` over 16 stretches: equal tensors have equal ones, others hardly ever."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = values.contiguous().view(-1)
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    sums = [part.sum(dtype=torch.int64) for part in flat.view(whole).chunk(_SEGMENTS)]
    return (tensor.numel(), *(int(s) for s in torch.stack(sums).tolist())) if flat.numel() else (0,)


def findings(promise: Promise, looks: Sequence[Mapping[str, Look]], tied: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong, each with the name of the tensor and the cause.

    Args:
        promise: what the module was.
        looks: of every rank, in order.
        tied: names that are one parameter now.
    """
    found = []
    now = [set(group) for group in tied]
    for group in promise.ties:
        if not any(set(group) <= names for names in now):
            found.append(f"{' and '.join(group)} were one parameter and are not any more")
    for name in looks[0]:
        seen = [ranks[name] for ranks in looks if name in ranks]
        found += [f"{name} {problem}" for problem in _problems(name, seen, promise)]
    return found


def _problems(name: str, seen: Sequence[Look], promise: Promise) -> list[str]:
    """Of one tensor; ``seen`` by rank."""
    nowhere = [rank for rank, look in enumerate(seen) if look.digest is None]
    if nowhere:
        return [f"has no memory on rank {nowhere[0]}: nothing gave it its value"]
    problems = []
    unwritten = [rank for rank, look in enumerate(seen) if look.unwritten]
    if unwritten:
        problems.append(f"holds memory on rank {unwritten[0]} that was never written")
    wanted = promise.dtypes.get(name, seen[0].dtype)
    if seen[0].dtype != wanted:
        problems.append(f"is {seen[0].dtype}, but was {wanted}")
    by_part: dict[Where, tuple[int, Look]] = {}
    for rank, look in enumerate(seen):
        first, other = by_part.setdefault(look.where, (rank, look))
        if other.digest != look.digest:
            problems.append(f"should be the same on ranks {first} and {rank}, and is not")
            break
    if name in promise.random:
        problems += _repeated([(rank, look) for rank, look in by_part.values()])
    return problems


def _repeated(parts: Sequence[tuple[int, Look]]) -> list[str]:
    """Different parts of a random tensor that hold the same."""
    owners: dict[tuple[int, ...], int] = {}
    for rank, look in parts:
        assert look.digest is not None
        if look.digest[0] >= _ENOUGH and owners.setdefault(look.digest, rank) != rank:
            return [f"was drawn from the same numbers on ranks {owners[look.digest]} and {rank}"]
    return []

"""Numbers of one step, made one over all ranks."""

import zlib
from collections.abc import Mapping, Sequence
from math import nan
from numbers import Real
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from fabriclite import collectives
from fabriclite.errors import ConfigError
from fabriclite.world import World

Reduce = Literal["mean", "sum", "max", "min"]
_BLOCK: Final = 32
"""Numbers are sent in a multiple of so many: ranks with a few names more or less find out, and do not read amiss."""


def over_ranks(world: World, metrics: Mapping[str, Any], reduce: object) -> dict[str, float]:
    """Reduce numbers, and tensors of one element, in one collective of float64. Every rank must call this.

    Args:
        world: the processes.
        metrics: the same names on every rank, in any order.
        reduce: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.

    Raises:
        ConfigError: ``reduce`` is none of them, a value is no number, or names differ between ranks.
    """
    if reduce not in get_args(Reduce):
        known = ", ".join(map(repr, get_args(Reduce)))
        raise ConfigError(f"`reduce` must be None or one of {known}, but is {reduce!r}.")
    names = sorted(metrics)
    mark = float(zlib.crc32("\n".join(names).encode()))
    numbers = [*(_number(name, metrics[name]) for name in names), mark, -mark]
    values = _reduced(world, numbers, str(reduce))
    factor = world.size if reduce == "sum" else 1
    _check_names(world, names, values[len(names) :], [mark * factor, -mark * factor])
    return dict(zip(names, values, strict=False))


def _reduced(world: World, numbers: Sequence[Tensor | float], reduce: str) -> list[float]:
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    own = torch.stack([torch.as_tensor(n, dtype=dtype, device=world.device).detach().reshape(()) for n in numbers])
    absent = own.isnan()  # the greatest and the least of gloo may pass over it
    flags = absent.to(dtype) * (-1 if reduce == "min" else 1)
    padding = own.new_zeros(-2 * len(numbers) % _BLOCK)
    found = collectives.all_reduce(world, torch.cat([own.where(~absent, 0), flags, padding]), reduce).tolist()
    flagged = found[len(numbers) : 2 * len(numbers)]
    return [nan if flag else value for value, flag in zip(found, flagged, strict=False)]


def _number(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value
        found = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    elif isinstance(value, Real):
        return float(value)
    else:
        found = repr(value)
    raise ConfigError(
        f"A metric must be a number or a tensor of one element to be reduced over ranks, but {name!r} is {found}."
        " Log it without `reduce`, or reduce it first."
    )


def _check_names(world: World, names: list[str], marks: list[float], wanted: list[float]) -> None:
    """Marks of the same names are equal: then their greatest, least, mean and sum are what one rank can tell."""
    if world.size > 1 and marks != wanted:
        raise ConfigError(
            f"`metrics` must have the same names on every rank to be reduced, but another rank has others than"
            f" {', '.join(map(repr, names)) or 'none'}, which rank {world.rank} has. Log the same names everywhere."
        )

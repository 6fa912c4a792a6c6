"""Numbers of one step, made one over all ranks."""

import zlib
from collections.abc import Mapping
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
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    mark = float(zlib.crc32("\n".join(names).encode()))
    numbers = [_number(name, metrics[name]) for name in names]
    sent = [torch.as_tensor(n).detach().to(world.device, dtype).reshape(()) for n in [*numbers, mark, -mark]]
    padding = torch.zeros(-len(sent) % _BLOCK, dtype=dtype, device=world.device)
    packed = torch.cat([torch.stack(sent), padding])
    found = collectives.all_reduce(world, packed, str(reduce)).tolist()
    _check_names(world, names, found[len(names) : len(names) + 2], mark * (world.size if reduce == "sum" else 1))
    return dict(zip(names, found, strict=False))


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


def _check_names(world: World, names: list[str], marks: list[float], wanted: float) -> None:
    """Marks of the same names are equal: then their greatest, least, mean and sum are what one rank can tell."""
    if world.size > 1 and marks != [wanted, -wanted]:
        raise ConfigError(
            f"`metrics` must have the same names on every rank to be reduced, but another rank has others than"
            f" {', '.join(map(repr, names)) or 'none'}, which rank {world.rank} has. Log the same names everywhere."
        )

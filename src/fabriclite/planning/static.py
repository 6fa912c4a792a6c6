"""What a model's state takes on one rank: parameters, gradients and optimizer, from a layout and counts alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

from fabriclite.errors import ConfigError
from fabriclite.layout import Layout
from fabriclite.planning.values import Kind, Memory

MOMENTS: Final[Mapping[str, int]] = {
    "adam": 2,
    "adamw": 2,
    "amsgrad": 3,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
    "sgd-momentum": 1,
}
"""Tensors as large as the parameter that torch's optimizers keep for it."""

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one rank.

    Attributes:
        device: on the device.
        host: in host memory, by offloading.
    """

    device: Memory
    host: Memory


def moments(optimizer: str) -> int:
    """How many tensors as large as a parameter the optimizer keeps for it.

    Raises:
        ConfigError: the name is unknown.
    """
    if optimizer not in MOMENTS:
        raise ConfigError(f"`optimizer` must be one of {', '.join(MOMENTS)}, but is {optimizer!r}.")
    return MOMENTS[optimizer]


def states(layout: Layout, parameters: int, *, optimizer: str = "adamw", trainable: int | None = None) -> States:
    """What stays between two steps, as if every tensor could be split evenly.

    A tensor-parallel plan splits matrices and leaves norms whole, and a shard of rows is rounded up: both are small,
    and an :class:`~fabriclite.planning.values.Estimate` knows them. Buffers of communication are not states.

    Args:
        layout: of a strategy, ``config.layout(size, precision)``.
        parameters: of the whole model.
        optimizer: a name of ``MOMENTS``.
        trainable: of the parameters, those that get gradients; ``None`` is all.

    Raises:
        ConfigError: the optimizer is unknown.
    """
    learned = parameters if trainable is None else trainable
    state_item = _FLOAT32 if layout.master else layout.param_dtype.itemsize
    per_parameter = moments(optimizer) * state_item + (_FLOAT32 if layout.master else 0)
    sizes: dict[Kind, int] = {
        "parameters": _part(parameters, layout, layout.shards_parameters) * layout.param_dtype.itemsize,
        "gradients": _part(learned, layout, layout.shards_gradients) * layout.grad_dtype.itemsize,
        "optimizer": _part(learned, layout, layout.shards_optimizer) * per_parameter,
    }
    away: set[Kind] = set()
    if layout.parameters_on_host:
        away.add("parameters")
    if layout.optimizer_on_host:
        away |= {"optimizer", "gradients"} if layout.shards_gradients else {"optimizer"}
    return States(
        device=Memory({kind: 0 if kind in away else size for kind, size in sizes.items()}),
        host=Memory({kind: size for kind, size in sizes.items() if kind in away}),
    )


def _part(numel: int, layout: Layout, sharded: bool) -> int:
    return ceil(numel / (layout.tensor * (layout.shard if sharded else 1)))

"""From what a user names as an optimizer to a function that makes one."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabriclite.errors import ConfigError
from fabriclite.planning.models import imported

Maker = Callable[[Iterable[nn.Parameter]], Optimizer]


def maker(optimizer: object) -> Maker:
    """A function from parameters to an optimizer.

    Args:
        optimizer: ``None`` (AdamW), a name in ``torch.optim`` in any case (``"adamw"``; also ``"sgd-momentum"``),
            ``"package.module:Name"``, a class or function of the parameters, or an optimizer whose like is made.

    Raises:
        ConfigError: it is none of them.
    """
    if optimizer is None:
        return torch.optim.AdamW
    if isinstance(optimizer, Optimizer):
        known = inspect.signature(type(optimizer)).parameters  # `defaults` also holds what it worked out from them
        return functools.partial(type(optimizer), **{k: v for k, v in optimizer.defaults.items() if k in known})
    if isinstance(optimizer, str):
        return _named(optimizer)
    if callable(optimizer):
        return optimizer
    raise ConfigError(
        f"`optimizer` must be a name, an optimizer or a function from parameters to one, but is {optimizer!r}."
    )


def name_of(optimizer: object) -> str:
    """What people call it."""
    if optimizer is None:
        return "AdamW"
    if isinstance(optimizer, str):
        return optimizer
    kind = type(optimizer) if isinstance(optimizer, Optimizer) else optimizer
    return str(getattr(kind, "__name__", None) or getattr(getattr(kind, "func", None), "__name__", "optimizer"))


def _named(name: str) -> Maker:
    if name == "sgd-momentum":
        return functools.partial(torch.optim.SGD, momentum=0.9)
    if ":" in name:
        found: Any = imported(name, "optimizer")
        return maker(found)
    known: dict[str, Maker] = {key.lower(): value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    if name.lower() not in known:
        raise ConfigError(
            f"`optimizer` must be one of {', '.join(sorted([*known, 'sgd-momentum']))} or package.module:Name, but is"
            f" {name!r}."
        )
    return known[name.lower()]


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer

"""From what a user names to what a checkpoint holds."""

from typing import Any

from torch import nn

from fabriclite.books import Books
from fabriclite.checkpoint.parts import LooseModulePart, ModulePart, OptimizerPart, Part, StatefulPart, ValuePart
from fabriclite.errors import ConfigError
from fabriclite.strategy import Strategy


def parts_of(state: Any, strategy: Strategy, books: Books) -> dict[str, Part]:
    """The entries of a ``state``.

    Raises:
        ConfigError: it is no dictionary with names.
    """
    odd = [key for key in state if not isinstance(key, str)] if isinstance(state, dict) else []
    if odd or not isinstance(state, dict):
        found = f"has the key {odd[0]!r}" if odd else f"is {type(state).__name__}"
        raise ConfigError(f"`state` must be a dictionary with names, such as {{'model': model}}, but {found}.")
    return {key: part_of(state, key, strategy, books) for key in state}


def part_of(state: dict[str, Any], key: str, strategy: Strategy, books: Books) -> Part:
    """One entry."""
    value = state[key]
    if books.knows_module(value):
        return ModulePart(strategy, books.engine(value))
    if books.knows_optimizer(value):
        return OptimizerPart(strategy, books.all_of(value, strategy), value)
    if isinstance(value, nn.Module):
        return LooseModulePart(value)
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return StatefulPart(value)
    return ValuePart(state, key)

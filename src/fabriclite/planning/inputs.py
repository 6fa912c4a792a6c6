"""What a model is called with: said by the user, or guessed from what it takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fabriclite import _torch
from fabriclite.errors import ConfigError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Inputs = Callable[[int, int | None], Arguments]

_TOKENS: Final = ("input_ids", "tokens", "token_ids", "idx", "ids")
_FORM: Final = "Pass inputs=..., the arguments themselves or a function (batch, sequence) -> arguments."


def made_by(inputs: Any) -> Inputs:
    """From what a user says: arguments (a tensor, a tuple, a dictionary), or a function that makes them."""

    def make(batch: int, sequence: int | None) -> Arguments:
        made = inputs(batch, sequence) if callable(inputs) else _torch.tree_map(_without_values, inputs)
        if isinstance(made, Mapping):
            return (), dict(made)
        if isinstance(made, Tensor):
            return (made,), {}
        if isinstance(made, tuple | list):
            return tuple(made), {}
        raise ConfigError(
            "`inputs` must be or return a tensor, a tuple of arguments or a dictionary of them, but is"
            f" {type(made).__name__}."
        )

    return make


def guess(model: nn.Module) -> Inputs:
    """Tokens for a model that takes them, numbers for one whose first layer is linear, pixels for Hugging Face's.

    Args:
        model: its parameters may have no memory.

    Raises:
        ConfigError: nothing says what it takes.
    """
    names = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind not in _STARRED]
    takes_tokens = next((name for name in names if name in _TOKENS), None)
    first = _first_layer(model)
    if takes_tokens is not None:
        return lambda batch, sequence: ((), _tokens(model, names, takes_tokens, batch, sequence))
    config = getattr(model, "config", None)
    if "pixel_values" in names and isinstance(getattr(config, "image_size", None), int):
        side, channels = config.image_size, getattr(config, "num_channels", 3)  # type: ignore[union-attr]
        return lambda batch, sequence: ((), {"pixel_values": torch.zeros(batch, channels, side, side)})
    if isinstance(first, nn.Embedding) and names:
        return lambda batch, sequence: ((_ids(model, batch, sequence),), {})
    if isinstance(first, nn.Linear) and names:
        width = first.in_features
        return lambda batch, sequence: ((torch.zeros(*_lead(batch, sequence), width),), {})
    raise ConfigError(
        f"`inputs` must be given for {type(model).__name__}, whose forward({', '.join(names)}) does not say what it"
        f" takes. {_FORM}"
    )


_STARRED: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _tokens(model: nn.Module, names: list[str], name: str, batch: int, sequence: int | None) -> dict[str, Any]:
    ids = _ids(model, batch, sequence)
    found = {name: ids}
    if "labels" in names and hasattr(model, "config"):  # Hugging Face: the model works out its loss
        found["labels"] = ids
    return found


def _ids(model: nn.Module, batch: int, sequence: int | None) -> Tensor:
    if sequence is None:
        raise ConfigError(
            f"`sequence` must be given for {type(model).__name__}, which takes tokens, but is None. Say how many tokens"
            " a sample has."
        )
    return torch.zeros(batch, sequence, dtype=torch.long)


def _lead(batch: int, sequence: int | None) -> tuple[int, ...]:
    return (batch,) if sequence is None else (batch, sequence)


def _first_layer(model: nn.Module) -> nn.Module | None:
    """The first module with parameters of its own, in the order of definition."""
    owners = (sub for sub in model.modules() if next(sub.parameters(recurse=False), None) is not None)
    return next(owners, None)


def _without_values(item: Any) -> Any:
    return torch.empty_like(item, device="meta") if isinstance(item, Tensor) else item

"""What is planned: a model that is not built yet, and what it is fed."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fabriclite import _torch
from fabriclite.errors import ConfigError

Inputs = Callable[[int, int | None], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, its inputs and its loss, as functions: nothing is made before a trace asks.

    Attributes:
        name: for people.
        build: makes the model. It is called where new tensors take no memory.
        inputs: ``(batch, sequence) -> (args, kwargs)`` of ``model(*args, **kwargs)``; only shapes and dtypes of the
            tensors in them count, so they may be on the meta device.
        loss: of the model's output, a tensor of shape ``()``. ``None``: its ``.loss`` if it has one, else the mean of
            its largest floating-point tensor in float32.
        checkpointed: modules that are computed again in backward (activation checkpointing): their names, or
            ``predicate(name, module)``; ``None``: none.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    loss: Callable[[Any], Tensor] | None = None
    checkpointed: Collection[str] | Callable[[str, nn.Module], bool] | None = None

    def recomputed(self, module: nn.Module) -> list[str]:
        """Names of the modules that :attr:`checkpointed` means.

        Raises:
            ConfigError: it means none, or names one that is not there.
        """
        chosen = self.checkpointed
        if chosen is None:
            return []
        there = [name for name, _ in module.named_modules() if name]
        if callable(chosen):
            names = [name for name, sub in module.named_modules() if name and chosen(name, sub)]
        else:
            missing = sorted(set(chosen) - set(there))
            if missing:
                raise ConfigError(
                    f"`checkpointed` must name submodules of {type(module).__name__}, but {missing[0]!r} is none."
                    f" The first of its names are: {', '.join(there[:8])}."
                )
            names = [name for name in there if name in set(chosen)]
        if not names:
            raise ConfigError(
                f"`checkpointed` must mean at least one submodule of {type(module).__name__}, but means none."
                " Leave it out to keep all activations."
            )
        return names


def default_loss(output: Any) -> Tensor:
    """``output.loss``, else the mean of the largest floating-point tensor of ``output``, in float32.

    Raises:
        ConfigError: there is neither.
    """
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    floating = [leaf for leaf in _torch.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floating:
        raise ConfigError(
            f"A model's output must hold a floating-point tensor to make a loss of, but is {type(output).__name__}"
            " without one. Give `loss`."
        )
    return max(floating, key=torch.numel).float().mean()

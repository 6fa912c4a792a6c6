"""What one entry of a checkpoint is, and how its state is taken out and put back."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite import module_state, optim_state, shards
from fabriclite._torch import tree_leaves, tree_map
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.stored import Stored, in_memory
from fabriclite.strategy import Strategy
from fabriclite.stretch import Stretch


class Part(Protocol):
    """One entry of the ``state`` that a user saves or loads."""

    def state(self) -> Any:
        """What to save. Every rank must call this. Tensors are live, and may be sharded."""

    def checked(self, value: Any, strict: bool) -> Any:
        """``value``, which :meth:`state` gave once, in the form that :meth:`load` wants. Changes nothing.

        Raises:
            CheckpointError: it does not fit.
        """

    def load(self, value: Any) -> None:
        """Put back what :meth:`checked` returned. Every rank must call this. Tensors may be in a file."""


@dataclass(frozen=True, slots=True)
class ModulePart:
    """A module that was set up."""

    strategy: Strategy
    engine: nn.Module

    def state(self) -> dict[str, Any]:
        return self.strategy.state_dict(self.engine)

    def layout(self) -> dict[str, Any]:
        return self.strategy.layout(self.engine)

    def module(self) -> nn.Module:
        return self.strategy.user_module(self.engine)

    def checked(self, value: Any, strict: bool) -> Mapping[str, Any]:
        state = _mapping(value, "a module")
        module_state.check_fits(self.layout(), state, strict)
        return state

    def load(self, value: Mapping[str, Any]) -> None:
        self.strategy.load_state_dict(self.engine, _extras_in_memory(value))


@dataclass(frozen=True, slots=True)
class LooseModulePart:
    """A module that was not set up: loaded before it is, or used without."""

    loose: nn.Module

    def state(self) -> dict[str, Any]:
        return self.loose.state_dict()

    def layout(self) -> dict[str, Any]:
        return self.loose.state_dict(keep_vars=True)  # of what was recorded, detaching is an operation to look at

    def module(self) -> nn.Module:
        return self.loose

    def checked(self, value: Any, strict: bool) -> Mapping[str, Any]:
        state = _mapping(value, "a module")
        module_state.check_fits(self.layout(), state, strict)
        return state

    def load(self, value: Mapping[str, Any]) -> None:
        module_state.load_into(self.loose, _extras_in_memory(value))


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """An optimizer of a module that was set up."""

    strategy: Strategy
    engine: nn.Module
    optimizer: Optimizer

    def state(self) -> dict[str, Any]:
        return self.strategy.optimizer_state(self.engine, self.optimizer)

    def checked(self, value: Any, strict: bool) -> dict[str, Any]:
        state = _mapping(value, "an optimizer")
        if "state" not in state or "param_groups" not in state:
            raise CheckpointError(
                f"An optimizer's entry must hold 'state' and 'param_groups', but holds {sorted(map(str, state))}."
            )
        own = self.strategy.optimizer_layout(self.engine, self.optimizer)
        return optim_state.checked(own, {**state, "param_groups": in_memory(state["param_groups"])})

    def load(self, value: dict[str, Any]) -> None:
        self.strategy.load_optimizer_state(self.engine, self.optimizer, value)


@dataclass(frozen=True, slots=True)
class StatefulPart:
    """Anything else with ``state_dict`` and ``load_state_dict``: a scheduler, a loader, an object of the user's."""

    obj: Any

    def state(self) -> Any:
        return self.obj.state_dict()

    def checked(self, value: Any, strict: bool) -> Any:
        return value

    def load(self, value: Any) -> None:
        self.obj.load_state_dict(in_memory(value))


@dataclass(frozen=True, slots=True)
class ValuePart:
    """A plain value: a number, a string, a tensor, a tree of them. Replaced in the user's ``state`` on load."""

    holder: dict[str, Any]
    key: str

    def state(self) -> Any:
        value = self.holder[self.key]
        inside = [type(leaf).__name__ for leaf in tree_leaves(value) if isinstance(leaf, nn.Module | Optimizer)]
        if inside:
            raise ConfigError(
                f"`state` must name each module and optimizer itself, but {self.key!r} holds a {inside[0]} inside a"
                f" {type(value).__name__}. Write {{'{self.key}_0': ..., '{self.key}_1': ...}}."
            )
        return value

    def checked(self, value: Any, strict: bool) -> Any:
        return value

    def load(self, value: Any) -> None:
        self.holder[self.key] = in_memory(value)


def taken(key: str, part: Part, keep: Callable[[str, Any], bool] | None) -> Any:
    """What to save of one entry: all, or the items that ``keep(name, value)`` wants. Every rank must call this.

    Raises:
        ConfigError: there is something to keep by, but no names in the entry.
    """
    state = part.state()
    if keep is None:
        return state
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"`filter` must be for entries with names in them, but {key!r} is {type(state).__name__}. Leave it out."
        )
    return {name: value for name, value in state.items() if keep(name, _shown(value))}


def _shown(value: Any) -> Any:
    """What a filter sees: of a flat part a tensor of full shape, without memory."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Stretch) else value


def whole(tree: Any, keep: bool, copied: bool) -> Any:
    """The same tree with whole tensors on the host. Every rank must call this.

    Args:
        tree: sharded tensors among anything else.
        keep: whether this rank needs the result; else it only takes part, and has no tensors.
        copied: nothing in the result is what the training goes on to change.
    """

    def leaf(value: Any) -> Any:
        gathered = shards.full(value)
        if not isinstance(gathered, Tensor):
            return copy.deepcopy(gathered) if copied and keep else gathered
        return gathered.detach().to("cpu", copy=copied) if keep else None

    return tree_map(leaf, tree)


def _extras_in_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    """Extra state is for its module, which knows no tensors in files."""
    return {name: in_memory(value) if shards.is_extra(name) else value for name, value in state.items()}


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if isinstance(value, Stored) or not isinstance(value, Mapping):
        found = "tensor" if isinstance(value, Stored) else type(value).__name__
        raise CheckpointError(f"The entry of {what} must be a dictionary, but is {found}.")
    return value

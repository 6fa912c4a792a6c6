"""What one entry of a checkpoint is, and how its state is taken out and put back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite import shards
from fabriclite._torch import tree_leaves, tree_map
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.strategy import Strategy


class Part(Protocol):
    """One entry of the ``state`` that a user saves or loads."""

    def state(self) -> Any:
        """What to save. Every rank must call this. Tensors may be sharded."""

    def load(self, value: Any, strict: bool) -> None:
        """Put back what :meth:`state` gave. Every rank must call this."""


@dataclass(frozen=True, slots=True)
class ModulePart:
    """A module that was set up."""

    strategy: Strategy
    engine: nn.Module

    def state(self) -> dict[str, Any]:
        return self.strategy.state_dict(self.engine)

    def load(self, value: Any, strict: bool) -> None:
        self.strategy.load_state_dict(self.engine, _mapping(value, "a module"), strict)


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """An optimizer of a module that was set up."""

    strategy: Strategy
    engine: nn.Module
    optimizer: Optimizer

    def state(self) -> dict[str, Any]:
        return self.strategy.optimizer_state(self.engine, self.optimizer)

    def layout(self) -> Mapping[str, Any]:
        """Per parameter name, a tensor with the shape and sharding that its moments have."""
        return self.strategy.state_dict(self.engine)

    def load(self, value: Any, strict: bool) -> None:
        state = _mapping(value, "an optimizer")
        if "state" not in state or "param_groups" not in state:
            raise CheckpointError(
                f"An optimizer's entry must hold 'state' and 'param_groups', but holds {sorted(map(str, state))}."
            )
        self.strategy.load_optimizer_state(self.engine, self.optimizer, state)


@dataclass(frozen=True, slots=True)
class StatefulPart:
    """Anything else with ``state_dict`` and ``load_state_dict``: a scheduler, a module that was not set up."""

    obj: Any

    def state(self) -> Any:
        return self.obj.state_dict()

    def load(self, value: Any, strict: bool) -> None:
        if isinstance(self.obj, nn.Module):
            self.obj.load_state_dict(value, strict=strict)
        else:
            self.obj.load_state_dict(value)


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

    def load(self, value: Any, strict: bool) -> None:
        self.holder[self.key] = value


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
    return {name: value for name, value in state.items() if keep(name, value)}


def whole(tree: Any, keep: bool) -> Any:
    """The same tree with whole tensors on the host. Every rank must call this.

    Args:
        tree: sharded tensors among anything else.
        keep: whether this rank needs the result; else it only takes part, and has no tensors.
    """

    def leaf(value: Any) -> Any:
        gathered = shards.full(value)
        if not isinstance(gathered, Tensor):
            return gathered
        return gathered.detach().cpu() if keep else None

    return tree_map(leaf, tree)


def tensors_of(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor in nested mappings under its dotted name."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, Mapping):
            found.update({f"{key}.{name}": tensor for name, tensor in tensors_of(value).items()})
    return found


def rest_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree without its tensors."""
    return {
        key: rest_of(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not isinstance(value, Tensor)
    }


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"The entry of {what} must be a dictionary, but is {type(value).__name__}.")
    return value

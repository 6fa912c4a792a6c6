"""What one entry of a checkpoint is, and how its state is taken out and put back."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import module_state, optim_state, shards
from fabriclite._torch import tree_leaves, tree_map
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.stored import Stored, in_memory
from fabriclite.strategy import Strategy
from fabriclite.stretch import Stretch

Split = tuple[dict[str, Tensor | Stretch], Any]
"""Tensors, each of which every rank writes its part of, by name; and the rest, which rank 0 writes."""

SMALL: Final = 64
"""Elements up to which a moment that is not sharded goes to the rest: a step counter takes 1 KB as a shard."""


class Part(ABC):
    """One entry of the ``state`` that a user saves or loads.

    Attributes:
        resumes: whether a load of it goes on with the run: loss scale and random states are put back too.
    """

    resumes: ClassVar[bool] = False

    def module(self) -> nn.Module | None:
        """The module whose state it is; ``None`` for anything else."""
        return None

    def layout(self) -> dict[str, Any]:
        """What a module's state has, without its values; nothing for anything else."""
        return {}

    @abstractmethod
    def state(self) -> Any:
        """What to save. Every rank must call this. Tensors are live, and may be sharded."""

    def split(self, state: Any) -> Split:
        """``state``, which :meth:`state` gave, as a folder holds it."""
        return {}, state

    @abstractmethod
    def checked(self, value: Any, strict: bool) -> Any:
        """``value``, which :meth:`state` gave once, in the form that :meth:`load` wants. Changes nothing.

        Raises:
            CheckpointError: it does not fit.
        """

    @abstractmethod
    def load(self, value: Any) -> None:
        """Put back what :meth:`checked` returned. Every rank must call this. Tensors may be in a file."""


@final
@dataclass(frozen=True, slots=True)
class ModulePart(Part):
    """A module that was set up."""

    strategy: Strategy
    engine: nn.Module

    @override
    def state(self) -> dict[str, Any]:
        return self.strategy.state_dict(self.engine)

    @override
    def layout(self) -> dict[str, Any]:
        return self.strategy.layout(self.engine)

    @override
    def module(self) -> nn.Module:
        return self.strategy.user_module(self.engine)

    @override
    def split(self, state: Any) -> Split:
        return _split_module(state)

    @override
    def checked(self, value: Any, strict: bool) -> Mapping[str, Any]:
        return _checked_module(self.layout(), value, strict)

    @override
    def load(self, value: Mapping[str, Any]) -> None:
        self.strategy.load_state_dict(self.engine, _extras_in_memory(value))


@final
@dataclass(frozen=True, slots=True)
class LooseModulePart(Part):
    """A module that was not set up: loaded before it is, or used without."""

    loose: nn.Module

    @override
    def state(self) -> dict[str, Any]:
        return self.loose.state_dict()

    @override
    def layout(self) -> dict[str, Any]:
        return self.loose.state_dict(keep_vars=True)  # of what was recorded, detaching is an operation to look at

    @override
    def module(self) -> nn.Module:
        return self.loose

    @override
    def split(self, state: Any) -> Split:
        return _split_module(state)

    @override
    def checked(self, value: Any, strict: bool) -> Mapping[str, Any]:
        return _checked_module(self.layout(), value, strict)

    @override
    def load(self, value: Mapping[str, Any]) -> None:
        module_state.load_into(self.loose, _extras_in_memory(value))


@final
@dataclass(frozen=True, slots=True)
class OptimizerPart(Part):
    """An optimizer of a module that was set up."""

    resumes: ClassVar[bool] = True
    strategy: Strategy
    engine: nn.Module
    optimizer: Optimizer

    @override
    def state(self) -> dict[str, Any]:
        return self.strategy.optimizer_state(self.engine, self.optimizer)

    @override
    def split(self, state: Any) -> Split:
        found = {name: tensor for name, tensor in _tensors_of(state).items() if not _is_small(tensor)}
        return found, _without(state, "", found)

    @override
    def checked(self, value: Any, strict: bool) -> dict[str, Any]:
        state = _mapping(value, "an optimizer")
        if "state" not in state or "param_groups" not in state:
            raise CheckpointError(
                f"An optimizer's entry must hold 'state' and 'param_groups', but holds {sorted(map(str, state))}."
            )
        own = self.strategy.optimizer_layout(self.engine, self.optimizer)
        return optim_state.checked(own, {**state, "param_groups": in_memory(state["param_groups"])})

    @override
    def load(self, value: dict[str, Any]) -> None:
        self.strategy.load_optimizer_state(self.engine, self.optimizer, value)


@final
@dataclass(frozen=True, slots=True)
class StatefulPart(Part):
    """Anything else with ``state_dict`` and ``load_state_dict``: a scheduler, a loader, an object of the user's."""

    obj: Any

    @override
    def state(self) -> Any:
        return self.obj.state_dict()

    @override
    def checked(self, value: Any, strict: bool) -> Any:
        return value

    @override
    def load(self, value: Any) -> None:
        self.obj.load_state_dict(in_memory(value))


@final
@dataclass(frozen=True, slots=True)
class ValuePart(Part):
    """A plain value: a number, a string, a tensor, a tree of them. Replaced in the user's ``state`` on load."""

    holder: dict[str, Any]
    key: str

    @override
    def state(self) -> Any:
        value = self.holder[self.key]
        inside = [type(leaf).__name__ for leaf in tree_leaves(value) if isinstance(leaf, nn.Module | Optimizer)]
        if inside:
            raise ConfigError(
                f"`state` must name each module and optimizer itself, but {self.key!r} holds a {inside[0]} inside a"
                f" {type(value).__name__}. Write {{'{self.key}_0': ..., '{self.key}_1': ...}}."
            )
        return value

    @override
    def checked(self, value: Any, strict: bool) -> Any:
        return value

    @override
    def load(self, value: Any) -> None:
        self.holder[self.key] = in_memory(value)


def _split_module(state: Mapping[str, Any]) -> Split:
    found = {k: v for k, v in state.items() if isinstance(v, Tensor | Stretch) and not shards.is_extra(k)}
    return found, {k: v for k, v in state.items() if k not in found}


def _checked_module(layout: dict[str, Any], value: Any, strict: bool) -> Mapping[str, Any]:
    state = _mapping(value, "a module")
    module_state.check_fits(layout, state, strict)
    return state


def _is_small(value: Tensor | Stretch) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor) and value.numel() <= SMALL


def _tensors_of(tree: Mapping[str, Any]) -> dict[str, Tensor | Stretch]:
    """Every tensor in nested mappings under its dotted name."""
    found: dict[str, Tensor | Stretch] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor | Stretch):
            found[key] = value
        elif isinstance(value, Mapping):
            found.update({f"{key}.{name}": tensor for name, tensor in _tensors_of(value).items()})
    return found


def _without(tree: Mapping[str, Any], before: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree without the tensors of these dotted names."""
    return {
        key: _without(value, f"{before}{key}.", names) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if f"{before}{key}" not in names
    }


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

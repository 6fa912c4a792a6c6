"""Where a module holds recorded tensors: parameters, buffers, and plain tensors anywhere in its attributes."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite import _torch
from fabriclite.birth.recording import Recording
from fabriclite.birth.tape import Ref

Kind = Literal["parameter", "buffer", "attribute"]
_DEEP: Final = 5
"""Levels of lists and dictionaries in which a module's plain tensors are looked for."""
_LONG: Final = 10_000
"""Items from which on a list or dictionary is somebody's data, and not looked into."""
_PLAIN: Final = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, FunctionType})
_HOLDERS: Final = frozenset({dict, OrderedDict, list, tuple, set})
"""Most of what a module has is one of the former, or one of these and empty: told at once."""
_LAZY: Final = (nn.UninitializedParameter, nn.UninitializedBuffer)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a module holds a recorded tensor, and what it holds.

    Attributes:
        name: in full, as ``named_parameters`` gives it.
        owner: the module that holds it.
        leaf: its name there.
        kind: how it is held.
        tensor: the object, as it was recorded.
        ref: the tensor.
    """

    name: str
    owner: nn.Module
    leaf: str
    kind: Kind
    tensor: Tensor
    ref: Ref

    def now(self) -> Tensor | None:
        """What is held there now: sharding replaces parameters."""
        if self.kind == "attribute":
            return self.tensor
        held = self.owner._parameters if self.kind == "parameter" else self.owner._buffers
        return held.get(self.leaf)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, with every name a shared one has.

    What torch's own ``named_parameters`` and ``named_buffers`` give, without their nested generators; setup asks often.
    """
    owners: list[tuple[str, nn.Module]] = []
    _walk(module, "", owners)
    parameters = [(dot + leaf, p) for dot, owner in owners for leaf, p in owner._parameters.items() if p is not None]
    buffers = [(dot + leaf, b) for dot, owner in owners for leaf, b in owner._buffers.items() if b is not None]
    return [*parameters, *buffers]


def _walk(module: nn.Module, dot: str, owners: list[tuple[str, nn.Module]]) -> None:
    owners.append((dot, module))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{dot}{name}.", owners)


def give_lazy_ones_a_device(module: nn.Module) -> None:
    """Parameters that get their shape from the first batch have nothing to replay, but must not stay on meta."""
    for _, tensor in named_tensors(module):
        if isinstance(tensor, _LAZY) and tensor.data.is_meta:
            _torch.become(tensor, torch.empty(0, dtype=tensor.dtype, device=torch.get_default_device()))


def places_of(recording: Recording, module: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Place]:
    """Parameters, then buffers, then plain tensors of ``module``, then those of optimizers, that are recorded."""
    held: dict[Kind, list[tuple[str, nn.Module, str, Tensor]]] = {"parameter": [], "buffer": [], "attribute": []}
    seen = {id(owner) for owner in module.modules()}
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        held["parameter"] += [(dot + leaf, owner, leaf, p) for leaf, p in owner._parameters.items() if p is not None]
        held["buffer"] += [(dot + leaf, owner, leaf, b) for leaf, b in owner._buffers.items() if b is not None]
        held["attribute"] += [(dot + leaf, owner, leaf, t) for leaf, t in _plain_tensors(vars(owner), _DEEP, seen)]
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for state in optimizer.state.values():
            held["attribute"] += [(f"{name}.{key}", module, key, t) for key, t in state.items()]
    for kind, items in held.items():
        for full_name, owner, leaf, tensor in items:
            if not isinstance(tensor, _LAZY) and recording.knows(tensor):
                yield Place(full_name, owner, leaf, kind, tensor, recording.ref(tensor))


def plain_tensors(owner: nn.Module) -> list[Tensor]:
    """Tensors in the plain attributes of ``owner``, and in lists and dictionaries there."""
    seen = {id(sub) for sub in owner.modules()}
    return [tensor for _, tensor in _plain_tensors(vars(owner), _DEEP, seen)]


def _plain_tensors(holder: Any, deep: int, seen: set[int], registered: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a module's own attributes, and in lists, dictionaries and objects there, with a name.

    Args:
        holder: a dictionary, list or tuple.
        deep: levels to look into.
        seen: ids of what was looked into.
        registered: ``holder`` is what a module's attributes are; what it registered is left out.
    """
    for key, value in _items(holder):
        kind = type(value)
        if kind in _PLAIN or (kind in _HOLDERS and not value):
            continue
        if registered and key in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, Tensor):
            yield str(key), value
            continue
        inner = value if isinstance(value, list | tuple | dict) else vars(value) if _holds_things(value) else None
        if not inner or deep <= 1 or id(value) in seen or len(inner) > _LONG:
            continue
        seen.add(id(value))
        # a module in a plain list counts as one level less: its own dictionaries are levels of their own
        levels = deep if isinstance(value, nn.Module) else deep - 1
        for name, tensor in _plain_tensors(inner, levels, seen, registered=False):
            yield f"{key}.{name}", tensor


def _holds_things(value: Any) -> bool:
    """Whether it is somebody's object, not one of Python's or torch's kinds."""
    return hasattr(value, "__dict__") and not isinstance(
        value, type | FunctionType | MethodType | BuiltinFunctionType | ModuleType | torch.Generator | partial
    )


def _items(holder: Any) -> list[tuple[Any, Any]]:
    return list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))


def is_lazy(tensor: Tensor) -> bool:
    """Whether it gets its shape from the first batch."""
    return isinstance(tensor, _LAZY)


def replace(owner: nn.Module, old: Tensor, new: Tensor | None) -> None:
    """Where the plain attributes of ``owner`` hold ``old``, put ``new``."""
    _replace(vars(owner), old, new, _DEEP)


def _replace(holder: Any, old: Tensor, new: Tensor | None, deep: int) -> None:
    for key, value in _items(holder):
        if key in ("_parameters", "_buffers", "_modules"):
            continue
        if value is old and isinstance(holder, dict | list):
            holder[key] = new
        elif deep > 1 and isinstance(value, list | tuple | dict):
            _replace(value, old, new, deep - 1)


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

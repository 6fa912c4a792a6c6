"""Everything a module holds, as values that can be compared: tensors to the bit, ties, plain attributes, generators."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from patterns import OUTSIDE

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Held:
    """One tensor under one name.

    Attributes:
        role: ``"parameter"``, ``"buffer"`` or ``"attribute"``.
        cls: its class.
        is_parameter: as ``isinstance`` says, which it also does of a sharded one.
        value: a whole copy on the host.
        has_memory: its elements lie somewhere; a recorded tensor that nobody filled has none, whatever it answers.
        stride: as the module holds it.
        requires_grad: ``None`` for the result of a computation, which says nothing about how it was made.
        marks: Python attributes on the tensor object.
    """

    role: str
    cls: type
    is_parameter: bool
    value: Tensor
    has_memory: bool
    stride: tuple[int, ...]
    requires_grad: bool | None
    marks: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A module at one moment.

    Attributes:
        modules: names of all modules, with duplicates.
        tensors: by name, parameters and buffers in order, then plain attributes.
        plain: other attributes by name: numbers, texts, states of generators.
        keys: of the state dict.
        ties: groups of names that are one object.
        storages: groups of names that share memory.
    """

    modules: list[str]
    tensors: dict[str, Held]
    plain: dict[str, Any]
    keys: list[str]
    ties: set[frozenset[str]]
    storages: set[frozenset[str]]


def whole(tensor: Tensor) -> Tensor:
    """A full copy of what may be sharded, through public ways. Every rank must call this."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor().clone()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().clone()


def snapshot(module: nn.Module) -> Snapshot:
    """What ``module`` (or the pane that stands for it) holds. Every rank must call this."""
    inner = dict(module.named_modules())[""]
    leaves = [("parameter", n, p) for n, p in module.named_parameters(remove_duplicate=False)]
    leaves += [("buffer", n, b) for n, b in module.named_buffers(remove_duplicate=False)]
    plain: dict[str, Any] = {}
    for name, leaf in _attributes(inner):
        if isinstance(leaf, Tensor):
            leaves.append(("attribute", name, leaf))
        elif (value := _as_plain(leaf)) is not None:
            plain[name] = value
    copies: dict[int, Tensor] = {}  # a tie is gathered once
    for _, _, tensor in leaves:
        if id(tensor) not in copies:
            copies[id(tensor)] = whole(tensor)
    objects = [(name, tensor) for _, name, tensor in leaves]
    return Snapshot(
        modules=[name for name, _ in module.named_modules(remove_duplicate=False)],
        tensors={name: _held(role, tensor, copies[id(tensor)]) for role, name, tensor in leaves},
        plain=plain,
        keys=list(inner.state_dict()),
        ties=_groups(objects, id),
        storages=_groups(((n, t) for n, t in objects if _shares(t)), lambda t: t.untyped_storage().data_ptr()),
    )


def _held(role: str, tensor: Tensor, value: Tensor) -> Held:
    return Held(
        role=role,
        cls=type(tensor),
        is_parameter=isinstance(tensor, nn.Parameter),
        value=value,
        has_memory=_has_memory(tensor),
        # Nothing lies behind the only element of a dimension: torch's own kernels disagree on the stride of such a one.
        stride=tuple(1 if length == 1 else step for length, step in zip(tensor.shape, tensor.stride(), strict=True)),
        requires_grad=tensor.requires_grad if tensor.is_leaf else None,
        marks=dict(vars(tensor)),
    )


def _has_memory(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() == 0 or local.untyped_storage().data_ptr() != 0


def _shares(tensor: Tensor) -> bool:
    """Whether its memory can be another's as well."""
    return not isinstance(tensor, DTensor) and tensor.untyped_storage().data_ptr() != 0


def _groups(items: Iterable[tuple[str, Tensor]], key: Callable[[Tensor], int]) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, tensor in items:
        places.setdefault(key(tensor), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for prefix, sub in module.named_modules():
        for key, value in vars(sub).items():
            if key not in _OF_EVERY_MODULE:
                yield from _leaves(f"{prefix}:{key}", value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        yield f"{name}#", len(value)
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    elif isinstance(value, dict):
        yield f"{name}#", len(value)
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    elif isinstance(value, torch.distributions.Normal):
        yield from ((f"{name}.loc", value.loc), (f"{name}.scale", value.scale))
    else:
        yield name, value


def _as_plain(value: Any) -> Any:
    """What can be compared with ``==``; ``None`` for what says nothing about tensors."""
    if isinstance(value, bool | int | float | complex | str | torch.Size | torch.dtype | torch.device):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return None


def rng_states() -> dict[str, Any]:
    """Where every generator stands that a pattern may draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (kind, np.asarray(keys).tobytes(), *rest),
        "python": random.getstate(),
        "the user's own": OUTSIDE.get_state().numpy().tobytes(),
    }


@dataclass
class Comparison:
    """Differences between two snapshots, in words.

    Attributes:
        layout: also compare what sharding changes: classes, strides, marks, shared memory, ties with plain attributes.
    """

    layout: bool
    problems: list[str] = field(default_factory=list)

    def same(self, what: str, expected: Any, actual: Any) -> None:
        if expected != actual:
            self.problems.append(f"{what}: {_short(expected)} expected, but is {_short(actual)}")

    def tensors(self, expected: dict[str, Held], actual: dict[str, Held]) -> None:
        for role in ("parameter", "buffer"):
            names = [[n for n, h in side.items() if h.role == role] for side in (expected, actual)]
            self.same(f"names of {role}s", *names)
        for name, held in expected.items():
            if name in actual:
                self.tensor(name, held, actual[name])
            elif held.role == "attribute":
                self.problems.append(f"{name} is missing")

    def tensor(self, name: str, expected: Held, actual: Held) -> None:
        self.same(f"role of {name}", expected.role, actual.role)
        self.same(f"memory of {name}", expected.has_memory, actual.has_memory)
        self.same(f"dtype of {name}", expected.value.dtype, actual.value.dtype)
        self.same(f"shape of {name}", expected.value.shape, actual.value.shape)
        if None not in (expected.requires_grad, actual.requires_grad):
            self.same(f"requires_grad of {name}", expected.requires_grad, actual.requires_grad)
        if self.layout:
            self.same(f"class of {name}", expected.cls, actual.cls)
            self.same(f"stride of {name}", expected.stride, actual.stride)
            marks = {key: actual.marks.get(key) for key in expected.marks}  # a strategy may add its own
            self.same(f"marks on {name}", expected.marks, marks)
        if expected.role != "attribute":  # the plain name of a parameter may outlive its sharding
            self.same(f"{name} is a Parameter", expected.is_parameter, actual.is_parameter)
        same_form = (expected.value.dtype, expected.value.shape) == (actual.value.dtype, actual.value.shape)
        if same_form and actual.has_memory and not bits_equal(expected.value, actual.value):
            self.problems.append(f"value of {name}: {_first_difference(expected.value, actual.value)}")

    def groups(self, what: str, expected: set[frozenset[str]], actual: set[frozenset[str]]) -> None:
        sides = [
            {frozenset(n for n in names if self.layout or ":" not in n) for names in g} for g in (expected, actual)
        ]
        lost, found = ({g for g in a - b if len(g) > 1} for a, b in (sides, sides[::-1]))
        self.same(what, sorted(map(sorted, lost)), sorted(map(sorted, found)))


def differences(expected: Snapshot, actual: Snapshot, layout: bool) -> list[str]:
    """What ``actual`` has otherwise than ``expected``. Plain attributes that only ``actual`` has are a library's."""
    comparison = Comparison(layout)
    comparison.same("names of modules", expected.modules, actual.modules)
    comparison.same("keys of the state dict", expected.keys, actual.keys)
    comparison.tensors(expected.tensors, actual.tensors)
    for name, value in expected.plain.items():
        if not (_is_nan(value) and _is_nan(actual.plain.get(name))):
            comparison.same(name, value, actual.plain.get(name))
    comparison.groups("one object", expected.ties, actual.ties)
    if layout:
        comparison.groups("one storage", expected.storages, actual.storages)
    return comparison.problems


def moved(expected: dict[str, Any], actual: dict[str, Any], when: str) -> list[str]:
    """Which generators stand elsewhere."""
    return [f"{name} generator after {when}" for name in expected if expected[name] != actual[name]]


def _first_difference(expected: Tensor, actual: Tensor) -> str:
    pairs = list(zip(expected.flatten(), actual.flatten(), strict=True))
    wrong = [i for i, (a, b) in enumerate(pairs) if not bits_equal(a, b)]
    a, b = pairs[wrong[0]]
    return f"{len(wrong)} of {len(pairs)} differ, first at {wrong[0]}: {a.item()!r} expected, but is {b.item()!r}"


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Every bit: a NaN equals itself, and minus zero is not zero."""
    first, second = (t.new_empty(t.numel()).copy_(t.reshape(-1)).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."

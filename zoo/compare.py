"""What differs between two models that should be one and the same, bit for bit."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 6  # of containers and plain objects that hang off a module
_OWN = ("_parameters", "_buffers", "_modules")  # of nn.Module: compared by themselves


def differences(expected: nn.Module, actual: nn.Module, ignore: Iterable[str] = ()) -> list[str]:
    """Sentences that each name one difference; none where the two are equal.

    Compared are modules, parameters and buffers (names, order, kind, dtype, shape, strides, device, requires_grad,
    bits), which of them are one object or share memory, the keys of the state dict, and every tensor, array, number and
    text that a module holds as a plain attribute. Of the tensors named by ``ignore`` the bits may differ.
    """
    found = [*_listing("modules", _modules(expected), _modules(actual))]
    found += _listing("parameters", _names(expected.named_parameters), _names(actual.named_parameters))
    found += _listing("buffers", _names(expected.named_buffers), _names(actual.named_buffers))
    found += _listing("state dict", list(expected.state_dict()), list(actual.state_dict()))
    if found:
        return found
    ours, theirs = tensors(expected), tensors(actual)
    found += _listing("tensors", list(ours), list(theirs))
    for name in ours.keys() & theirs.keys():
        found += [f"{name}: {text}" for text in _tensor_differences(ours[name], theirs[name], name not in set(ignore))]
    if list(ours) == list(theirs):
        found += _listing("ties", _ties(ours), _ties(theirs))
    for (name, one), (_, other) in zip(expected.named_modules(), actual.named_modules(), strict=True):
        found += _attribute_differences(name or "model", one, other)
    return found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor a model holds, by name: parameters and buffers with their repetitions, then plain attributes."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in _OWN:
                found.update(_tensors_in(f"{name}.{key}".removeprefix("."), value, _DEPTH))
    return found


def _tensors_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth == 0 or isinstance(value, nn.Module):
        return
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors_in(f"{name}[{i}]", inner, depth - 1)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", inner, depth - 1)
    elif _is_plain_object(value):
        for key, inner in vars(value).items():
            yield from _tensors_in(f"{name}.{key}", inner, depth - 1)


def _is_plain_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value)


def _modules(model: nn.Module) -> list[str]:
    return [f"{name} ({type(m).__qualname__})" for name, m in model.named_modules(remove_duplicate=False)]


def _names(named: Any) -> list[str]:
    return [name for name, _ in named(remove_duplicate=False)]


def _listing(what: str, expected: list[str], actual: list[str]) -> list[str]:
    if expected == actual:
        return []
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected]
    if not missing and not extra:
        return [f"{what}: in another order"]
    return [f"{what}: missing {missing[:3]}, too many {extra[:3]}"]


def _tensor_differences(expected: Tensor, actual: Tensor, bits: bool) -> list[str]:
    facts = ("dtype", "shape", "device", "requires_grad", "is_leaf", "layout")
    pairs = [(fact, getattr(expected, fact), getattr(actual, fact)) for fact in facts]
    pairs.append(("type", type(expected), type(actual)))
    pairs.append(("attributes", _plain(vars(expected), 2), _plain(vars(actual), 2)))
    if expected.layout == actual.layout == torch.strided and expected.shape == actual.shape:
        pairs.append(("strides", expected.stride(), actual.stride()))
    found = [f"{fact} {one} is {other}" for fact, one, other in pairs if one != other]
    if bits and not found:
        found += _bit_differences(expected.detach(), actual.detach())
    return found


def _bit_differences(expected: Tensor, actual: Tensor) -> list[str]:
    if expected.device.type == "meta":  # a model may hold meta tensors of its own
        return []
    one, other = _bytes(expected), _bytes(actual)
    if torch.equal(one, other):
        return []
    each = max(one.numel() // max(expected.numel(), 1), 1)
    wrong = int((one != other).reshape(-1, each).any(1).sum())
    return [f"{wrong} of {expected.numel()} elements have other bits"]


def _bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _ties(named: dict[str, Tensor]) -> list[str]:
    """For each tensor the first that is the same object, and the first in the same memory with the distance to it."""
    objects: dict[int, str] = {}
    storages: dict[int, str] = {}
    lines = []
    for name, tensor in named.items():
        line = f"{name} is {objects.setdefault(id(tensor), name)}"
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel() > 0:
            storage = tensor.untyped_storage()
            line += f" in {storages.setdefault(storage.data_ptr(), name)}+{tensor.storage_offset()}/{storage.nbytes()}"
        lines.append(line)
    return lines


def _attribute_differences(name: str, expected: nn.Module, actual: nn.Module) -> list[str]:
    one, other = vars(expected), vars(actual)
    found = _listing(f"{name}: attributes", sorted(one), sorted(other))
    for key in one.keys() & other.keys() - set(_OWN):
        before, after = (_plain(_without_ids(key, holder[key]), _DEPTH) for holder in (one, other))
        if before != after:
            found.append(f"{name}.{key}: {str(before)[:80]} is {str(after)[:80]}")
    return found


def _without_ids(key: str, value: Any) -> Any:
    """Hooks without the numbers they are filed under: torch counts those through the whole process."""
    return list(value.values()) if key.endswith("_hooks") and isinstance(value, Mapping) else value


def _plain(value: Any, depth: int) -> Any:
    """A value that can be compared: numbers and texts by ``repr`` (NaN equals NaN), what has no value by its type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return (type(value).__name__, repr(value))
    if isinstance(value, torch.dtype | torch.device | torch.Size | type):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Tensor | nn.Module) or depth == 0:
        return type(value).__qualname__
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return (type(value).__name__, [_plain(item, depth - 1) for item in items])
    if isinstance(value, Mapping):
        return (type(value).__name__, [(_plain(k, depth - 1), _plain(v, depth - 1)) for k, v in value.items()])
    if isinstance(value, functools.partial):
        return ("partial", _plain(value.func, depth - 1), _plain((value.args, value.keywords), depth - 1))
    if _is_plain_object(value):
        return (type(value).__qualname__, _plain(vars(value), depth - 1))
    return getattr(value, "__qualname__", type(value).__qualname__)

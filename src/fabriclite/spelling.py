"""Values written as the code that makes them."""

from dataclasses import fields
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn


def as_code(value: Any) -> str:
    """A frozen dataclass as the call that makes it, with what differs from the defaults only. For ``__repr__``."""
    given = [
        f"{field.name}={spelt(getattr(value, field.name))}"
        for field in fields(value)
        if not _same(getattr(value, field.name), field.default)
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def spelt(value: Any) -> str:
    """``value`` as code: classes and functions by qualified name, sets in a stable order."""
    match value:
        case type() | FunctionType() | MethodType() | BuiltinFunctionType():
            return value.__qualname__
        case Enum():
            return str(value)
        case torch.device():
            return f"torch.device({str(value)!r})"
        case set() | frozenset() if value:  # a frozen set equals the plain one, which is shorter to write
            return "{" + ", ".join(sorted(map(spelt, value))) + "}"
        case list() if type(value) is list:
            return f"[{', '.join(map(spelt, value))}]"
        case tuple() if type(value) is tuple:
            return f"({', '.join(map(spelt, value))}{',' if len(value) == 1 else ''})"
        case dict() if type(value) is dict:
            return "{" + ", ".join(f"{spelt(key)}: {spelt(item)}" for key, item in value.items()) + "}"
        case partial():
            named = [f"{key}={spelt(item)}" for key, item in value.keywords.items()]
            return f"functools.partial({', '.join([spelt(value.func), *map(spelt, value.args), *named])})"
    return repr(value)


def _same(value: Any, default: Any) -> bool:
    # Equal is not enough: True is 1, and an object may say that it equals anything.
    return value is default or (type(value) is type(default) and bool(value == default))


def class_name(module: nn.Module) -> str:
    """The class that its author wrote: ``fully_shard`` puts one of its own, ``FSDP...``, in its place."""
    cls = type(module)
    return cls.__bases__[-1].__name__ if cls.__name__ == f"FSDP{cls.__bases__[-1].__name__}" else cls.__name__

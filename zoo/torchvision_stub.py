"""Stands in for the few names of torchvision that timm imports at its top.

torchvision is compiled against one build of torch and is not installed here. Of what timm imports from it only
`FrozenBatchNorm2d` is ever looked at while a model is built (``isinstance`` checks); the rest are image transforms and
data sets, which no constructor touches.
"""

import importlib.util
import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.boxes",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class FrozenBatchNorm2d(nn.Module):
    """A type to compare with; no model of the zoo makes one."""


class InterpolationMode(Enum):
    """timm and transformers make tables of these when they are imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


_NAMES: dict[str, type] = {"FrozenBatchNorm2d": FrozenBatchNorm2d, "InterpolationMode": InterpolationMode}


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _NAMES.get(name) or type(name, (), {})
        setattr(self, name, made)
        return made


def install() -> None:
    """Put the stand-in in place, unless torchvision is there. Only ever in a process of the zoo's own."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    for name in _MODULES:
        module = _Stub(name)
        # A spec, because transformers asks `find_spec` whether torchvision is there; a path, because it is a package.
        module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        module.__path__ = []
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]  # transformers compares it
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

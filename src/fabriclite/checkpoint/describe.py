"""What a checkpoint holds, as plain data to print. No tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fabriclite.checkpoint.formats import OWN
from fabriclite.checkpoint.read.kinds import Found, Kind, opened
from fabriclite.stored import InMemory, Stored

_LONGEST: Final = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class TensorItem:
    """A tensor."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "bytes": self.nbytes}


@dataclass(frozen=True, slots=True)
class ValueItem:
    """Anything else, in short."""

    text: str
    type: str
    nbytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.text, "type": self.type}


@dataclass(frozen=True, slots=True)
class GroupItem:
    """A mapping or list, with the number and bytes of all tensors in it."""

    items: Mapping[str, "Item"]
    tensors: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        items = {name: item.as_dict() for name, item in self.items.items()}
        return {"tensors": self.tensors, "bytes": self.nbytes, "items": items}

    def cut(self, depth: int) -> "GroupItem":
        """The same without what lies deeper than ``depth`` levels; totals stay."""
        shown = {
            name: item.cut(depth - 1) if isinstance(item, GroupItem) else item
            for name, item in self.items.items()
            if depth > 0
        }
        return GroupItem(shown, self.tensors, self.nbytes)


Item = TensorItem | ValueItem | GroupItem


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint.

    Attributes:
        path: of the file or folder.
        kind: what it is.
        ranks: how many processes saved it, if it says so.
        root: what it holds.
        files: that it is made of, and their sizes.
    """

    path: Path
    kind: Kind
    ranks: int | None
    root: GroupItem
    files: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "kind": str(self.kind),
            "ranks": self.ranks,
            **self.root.as_dict(),
            "files": dict(self.files),
        }


def describe(path: str | Path, weights_only: bool = True) -> Description:
    """Say what a checkpoint of any kind is and holds.

    Args:
        path: of a file or folder.
        weights_only: refuse objects that only code could restore.

    Raises:
        CheckpointError: it is none, is incomplete, or needs code that is refused.
    """
    found = opened(path, weights_only)
    ranks = _ranks(found)
    tree = dict(found.tree)
    if ranks is not None:
        tree[OWN] = {**tree[OWN], "rng": f"random states of {ranks} ranks"}
    return Description(found.path, found.kind, ranks, _group({str(k): v for k, v in tree.items()}), found.files())


def _ranks(found: Found) -> int | None:
    own = found.tree.get(OWN)
    states = own.get("rng") if isinstance(own, Mapping) else None
    return len(states) if isinstance(states, list) and states else None


def _item(value: Any) -> Item:
    if isinstance(value, Stored):
        return TensorItem(tuple(value.shape), _name(value.dtype), value.nbytes)
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized:
            return _item(InMemory(value))
        kind = "quantized" if value.is_quantized else "sparse"
        return ValueItem(f"{kind}, {list(value.shape)}, {_name(value.dtype)}", "Tensor")
    items = _items(value)
    if items is None:
        return ValueItem(_short(value), type(value).__name__)
    group = _group(items)
    if group.tensors == 0 and len(text := repr(value)) <= _LONGEST:
        return ValueItem(text, type(value).__name__)
    return group


def _items(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): item for index, item in enumerate(value)}
    return None


def _group(items: Mapping[str, Any]) -> GroupItem:
    shown = {name: _item(item) for name, item in items.items()}
    counts = (item.tensors if isinstance(item, GroupItem) else isinstance(item, TensorItem) for item in shown.values())
    return GroupItem(shown, sum(counts), sum(item.nbytes for item in shown.values()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

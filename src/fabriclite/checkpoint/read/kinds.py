"""Which kind of checkpoint a path holds: every one that can be read, told apart, and opened alike."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fabriclite.checkpoint import disk, place, sums
from fabriclite.checkpoint.formats import OWN
from fabriclite.checkpoint.read.index import INDEX
from fabriclite.checkpoint.read.source import is_module, open_checkpoint, open_state
from fabriclite.errors import CheckpointError
from fabriclite.stored import Stored

Progress = Callable[[int, int], None]
"""Told the bytes that are done, and how many there are."""


class Kind(StrEnum):
    """What wrote a checkpoint, as far as it can be told: a file of Lightning Fabric is one of ``torch.save``."""

    FILE = "fabriclite file"
    FOLDER = "fabriclite folder"
    LIGHTNING_FILE = "PyTorch Lightning file"
    LIGHTNING_FOLDER = "Lightning Fabric folder"
    DISTRIBUTED = "torch.distributed.checkpoint folder"
    PRETRAINED = "Hugging Face folder"
    SAFETENSORS = ".safetensors file"
    STATE = "state dict file"
    TORCH = "torch.save file"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint of any kind, opened. No tensor was read.

    Attributes:
        path: of the file or folder; where ``latest`` leads.
        kind: what it is.
        tree: what it holds; tensors are :class:`Stored`, but for those of the run itself.
        alone: whether the tree is the state of one module, and not entries of which one is.
    """

    path: Path
    kind: Kind
    tree: dict[str, Any]
    alone: bool

    def files(self) -> dict[str, int]:
        """The files that it is made of, and their sizes."""
        if self.path.is_file():
            return {self.path.name: self.path.stat().st_size}
        return {file.name: file.stat().st_size for file in sorted(self.path.iterdir()) if file.is_file()}


class Tally:
    """Adds up what threads have done, and tells it."""

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._done, self._total, self._tell = 0, total, tell
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        with self._lock:
            self._done += count
            if self._tell is not None:
                self._tell(self._done, self._total)


def opened(path: str | Path, weights_only: bool = True) -> Found:
    """Open whatever checkpoint ``path`` is.

    Args:
        path: of a file or folder.
        weights_only: refuse objects that only code could restore.

    Raises:
        CheckpointError: it is none, is incomplete or damaged, or needs code that is refused.
    """
    where = located(path)
    if where.is_file() and where.name.endswith(".safetensors"):
        return _state(where, Kind.SAFETENSORS, weights_only)
    if where.is_dir() and not (where / INDEX).is_file():
        return _state(where, Kind.PRETRAINED, weights_only)  # or nothing, which is told there
    tree = open_checkpoint(where, weights_only).tree
    alone = _is_state(tree)
    if where.is_dir():
        foreign = Kind.LIGHTNING_FOLDER if (where / place.META).is_file() else Kind.DISTRIBUTED
        return Found(where, Kind.FOLDER if OWN in tree else foreign, tree, alone)
    return Found(where, _kind_of_file(tree, alone), tree, alone)


def located(path: str | Path) -> Path:
    """Where the newest whole checkpoint of that name is.

    Raises:
        CheckpointError: there is none.
    """
    where = place.found(disk.located(path))
    if not where.exists():
        led = "" if where.name == disk.located(path).name else f" ({path} leads there)"
        raise CheckpointError(f"{where} must be a checkpoint, but does not exist{led}. Pass the path of one.")
    return where


def verify(path: str | Path, weights_only: bool = True, progress: Progress | None = None) -> tuple[Found, int]:
    """Compare a checkpoint with its checksums, then open it, which looks at the sizes of its files.

    Args:
        path: of a file or folder.
        weights_only: refuse objects that only code could restore.
        progress: told of every block.

    Returns:
        It, and the bytes that were compared: none where it carries no checksums.

    Raises:
        CheckpointError: it is damaged or incomplete, or is no checkpoint.
    """
    where = located(path)
    compared = sums.verify(where, done=Tally(sums.size_of(where), progress).add)
    return opened(where, weights_only), compared


def modules(tree: Mapping[str, Any]) -> list[str]:
    """Entries that are the state of a module each."""
    return [key for key, value in tree.items() if key != OWN and is_module(key, value)]


def is_optimizer(value: Any) -> bool:
    """Whether an entry is the state of an optimizer."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _state(path: Path, kind: Kind, weights_only: bool) -> Found:
    state = open_state(path, weights_only)
    return Found(path, kind, {**state.tensors, **state.other}, alone=True)


def _is_state(tree: Mapping[str, Any]) -> bool:
    if OWN in tree or modules(tree) or any(is_optimizer(value) for value in tree.values()):
        return False
    return any(isinstance(value, Stored) for value in tree.values())


def _kind_of_file(tree: Mapping[str, Any], alone: bool) -> Kind:
    if OWN in tree:
        return Kind.FILE
    if "pytorch-lightning_version" in tree:
        return Kind.LIGHTNING_FILE
    return Kind.STATE if alone else Kind.TORCH

"""The tensors of a ``torch.distributed.checkpoint`` folder: each chunk is a file of ``torch.save`` inside a file."""

from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from fabriclite.boxes import Box, lengths
from fabriclite.checkpoint.read.blob import Range, look_into
from fabriclite.checkpoint.read.extents import Extent, OnDisk
from fabriclite.checkpoint.read.index import INDEX, Index, Spot, read_index
from fabriclite.checkpoint.read.ranges import File
from fabriclite.checkpoint.read.torch_file import read_torch_bytes
from fabriclite.errors import CheckpointError
from fabriclite.stored import Stored


@dataclass(frozen=True, slots=True)
class Distributed:
    """A folder that was opened: every file is there and as long as it must be.

    Attributes:
        tensors: by flat name.
        objects: other values, where they lie.
        paths: keys on the way to each flat name in the nested form.
    """

    tensors: dict[str, Stored]
    objects: dict[str, "Blob"]
    paths: dict[str, tuple[str | int, ...]]

    def nested(self, weights_only: bool) -> dict[str, Any]:
        """Everything as it was before names were made flat: mappings and lists. Values that are no tensors are read.

        Raises:
            CheckpointError: a value needs code to be restored, or two names contradict each other.
        """
        places = {name: place for place, name in enumerate(self.paths)}
        root: dict[str | int, Any] = {}
        for name in sorted(self.tensors.keys() | self.objects.keys(), key=lambda name: (places.get(name, 0), name)):
            value = self.tensors[name] if name in self.tensors else self.objects[name].load(weights_only)
            *before, last = self.paths.get(name, (name,))
            at = root
            for key in before:
                at = at.setdefault(key, _Branch())
                if not isinstance(at, _Branch):
                    raise CheckpointError(
                        f"{name!r} must have a place of its own, but {key!r} is a value already."
                        " Its index is damaged: load another checkpoint."
                    )
            at[last] = value
        return {str(key): _with_lists(value) for key, value in root.items()}


class _Branch(dict[str | int, Any]):
    """A mapping or list on the way to values."""


def _with_lists(value: Any) -> Any:
    if not isinstance(value, _Branch):
        return value
    if value and all(type(key) is int for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {key: _with_lists(item) for key, item in value.items()}


def open_distributed(folder: Any) -> Distributed:
    """Read the index of a folder, and look at its files. No data is read.

    Raises:
        CheckpointError: the index cannot be read, or a file is missing or too short.
    """
    index = read_index(folder)
    files = _files(folder, index)
    tensors: dict[str, Stored] = {}
    for name, entry in index.tensors.items():
        chunks = [ChunkBlob(box, Blob(name, files[spot.file], spot), entry.dtype) for box, spot in entry.chunks]
        tensors[name] = OnDisk(entry.shape, entry.dtype, chunks)
    objects = {name: Blob(name, files[spot.file], spot) for name, spot in index.objects.items()}
    return Distributed(tensors, objects, index.paths)


def _files(folder: Any, index: Index) -> dict[str, File]:
    ends: dict[str, int] = {}
    spots = [spot for entry in index.tensors.values() for _, spot in entry.chunks]
    for spot in [*spots, *index.objects.values()]:
        ends[spot.file] = max(ends.get(spot.file, 0), spot.offset + spot.length)
    missing = [name for name in ends if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} must hold all {len(ends)} files that {INDEX} names, but lacks {', '.join(sorted(missing)[:5])}"
            f"{' and others' if len(missing) > 5 else ''}. It is incomplete: load another checkpoint."
        )
    files = {name: File(folder / name) for name in ends}
    for name, end in ends.items():
        if files[name].size < end:
            raise CheckpointError(
                f"{folder / name} must hold {end} bytes, as {INDEX} says, but holds {files[name].size}."
                " It was cut short: load another checkpoint."
            )
    return files


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of ``torch.save`` inside a file."""

    name: str
    file: File
    spot: Spot

    def load(self, weights_only: bool) -> Any:
        """The object in it."""
        content = self.file.read(self.spot.offset, self.spot.length)
        return read_torch_bytes(content, f"{self.name} in {self.file.path}", weights_only)


class ChunkBlob(Extent):
    """A chunk of a tensor. Where its values begin is found when they are first read.

    Args:
        box: which part of the tensor it is.
        blob: the file of ``torch.save`` that it is in.
        dtype: what the index says.
    """

    def __init__(self, box: Box, blob: Blob, dtype: torch.dtype) -> None:
        super().__init__(box, blob.file, 0)
        self._blob = blob
        self._dtype = dtype
        self._found = False

    @override
    def place(self) -> tuple[int, tuple[int, ...] | None]:
        if not self._found:  # two threads may both find it: they find the same
            self._place = self._find()
            self._found = True
        return self._place

    def _find(self) -> tuple[int, tuple[int, ...]]:
        blob, spot = self._blob, self._blob.spot
        try:
            at, plain = look_into(Range(blob.file, spot.offset, spot.length))
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive or pickle can raise anything
            raise CheckpointError(
                f"{blob.file.path} must hold a part of {blob.name!r} at {spot.offset}, but {type(error).__name__}:"
                f" {str(error).rstrip('.')}. It is damaged: load another checkpoint."
            ) from error
        shape = lengths(self.box)
        if plain.dtype != self._dtype or plain.shape != shape:
            raise CheckpointError(
                f"{blob.file.path} must hold a part of {blob.name!r} of shape {list(shape)} and {self._dtype} at"
                f" {spot.offset}, but it has the shape {list(plain.shape)} and {plain.dtype}."
                " It was changed: load another checkpoint."
            )
        return spot.offset + at + plain.offset * plain.dtype.itemsize, plain.strides

"""The index of a ``torch.distributed.checkpoint`` folder, read without running any code that it may hold."""

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from fabriclite.boxes import Box
from fabriclite.errors import CheckpointError

INDEX: Final = ".metadata"
_SMALL: Final = 1 << 20
"""Bytes of an index that are read in less than half a second in any case."""
_DCP: Final = "torch.distributed.checkpoint"


@dataclass(frozen=True, slots=True)
class Spot:
    """Where one item lies: a file of the folder, and its bytes there."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the index: its chunks cover it and do not overlap."""

    shape: torch.Size
    dtype: torch.dtype
    chunks: list[tuple[Box, Spot]]


@dataclass(frozen=True, slots=True)
class Index:
    """What an index says.

    Attributes:
        tensors: by flat name.
        objects: where other values lie, by flat name.
        paths: for names that were made from nested mappings and lists, the keys on the way.
    """

    tensors: dict[str, TensorEntry]
    objects: dict[str, Spot]
    paths: dict[str, tuple[str | int, ...]]


class _Record:
    """Stands for every class of an index: keeps what it was pickled with, and can do nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


_RECORDS: Final = {
    (f"{_DCP}.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),  # called with a string
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),  # before torch 2.3
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
}
_PATHS: Final = {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}


class _Refusing:
    """Of an unpickler: makes records and plain values alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS or (module in ("pathlib", "pathlib._local") and name in _PATHS):
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset")):
            return frozenset
        raise _RefusedError(f"{module}.{name}")


class _Fast(_Refusing, pickle.Unpickler):
    """In C. A changed byte can make it reserve all memory of the machine for its list of objects."""


class _Careful(_Refusing, pickle._Unpickler):
    """In Python, three times slower, with a dictionary of objects."""


class _RefusedError(Exception):
    """A global that an index has no need of."""


class _WrongError(Exception):
    """What an index says cannot be."""


def read_index(folder: Any) -> Index:
    """Read and check the index.

    Raises:
        CheckpointError: it is damaged, holds code, or does not describe whole tensors.
    """
    path = folder / INDEX
    try:
        content = path.read_bytes()
        with _no_collection():
            unpickler = _Careful if len(content) <= _SMALL else _Fast
            return _checked(unpickler(io.BytesIO(content)).load())
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} must hold descriptions of tensors alone, but holds code: {error}."
            " Whoever wrote it could run anything here: load a checkpoint of another origin."
        ) from None
    except _WrongError as error:
        raise CheckpointError(
            f"{path} must describe whole tensors, but {error}. It is damaged: load another checkpoint."
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} must be a readable index, but {type(error).__name__}: {str(error).rstrip('.')}."
            " It was cut short or is damaged: load another checkpoint."
        ) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, nobody looks for cycles: an index of many objects without any takes five times as long else."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _checked(content: Any) -> Index:
    spots = {
        (key.fqn, None if getattr(key, "offset", None) is None else _numbers(key.offset)): _spot(key.fqn, info)
        for key, info in content.storage_data.items()
    }
    tensors, objects = {}, {}
    for name, item in content.state_dict_metadata.items():
        if not isinstance(name, str):
            raise _WrongError(f"a name is {name!r}")
        if hasattr(item, "properties"):
            tensors[name] = _tensor(name, item, spots)
        elif (name, None) in spots:
            objects[name] = spots[name, None]
        else:
            raise _WrongError(f"it does not say where {name!r} lies")
    paths = getattr(content, "planner_data", None)
    known = {name: _keys(path) for name, path in paths.items()} if isinstance(paths, dict) else {}
    return Index(tensors, objects, known)


def _keys(path: Any) -> tuple[str | int, ...]:
    if not isinstance(path, tuple) or not path or not all(isinstance(key, str | int) for key in path):
        raise _WrongError(f"a name has the keys {path!r}")
    return path


def _spot(name: str, info: Any) -> Spot:
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{name!r} must be stored as it is, but went through {', '.join(map(str, info.transform_descriptors))}."
            " Load it with torch.distributed.checkpoint and save it without extensions."
        )
    file = info.relative_path
    offset, length = _numbers((info.offset, info.length))
    if not isinstance(file, str) or file.startswith("/") or ".." in file:
        raise _WrongError(f"{name!r} lies outside of the folder, in {file}")
    return Spot(file, offset, length)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise _WrongError(f"{value!r} should be sizes")
    for n in value:
        if type(n) is not int or not 0 <= n < 1 << 62:
            raise _WrongError(f"{value!r} should be sizes")
    return value


def _tensor(name: str, item: Any, spots: dict[tuple[str, tuple[int, ...] | None], Spot]) -> TensorEntry:
    state = getattr(item.properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else getattr(item.properties, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        raise _WrongError(f"{name!r} has the dtype {dtype!r}")
    shape = _numbers(item.size)
    chunks = []
    for chunk in item.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if not len(offsets) == len(sizes) == len(shape):
            raise _WrongError(f"{name!r} has chunks of other dimensions")
        if prod(sizes) == 0:
            continue
        if (name, offsets) not in spots:
            raise _WrongError(f"it does not say where the part of {name!r} at {list(offsets)} lies")
        chunks.append((tuple(zip(offsets, sizes, strict=True)), spots[name, offsets]))
    if not _tile([box for box, _ in chunks], shape):
        raise _WrongError(f"the {len(chunks)} parts of {name!r} do not make up its shape {list(shape)}")
    return TensorEntry(torch.Size(shape), dtype, chunks)


def _tile(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether boxes, none of them empty, cover a tensor and do not overlap."""
    if any(start + length > whole for box in boxes for (start, length), whole in zip(box, shape, strict=True)):
        return False
    if sum(prod(length for _, length in box) for box in boxes) != prod(shape):
        return False
    # Of the right volume in all: they cover it unless two overlap. Sorted, a box can meet those alone that begin
    # before it ends in the first dimension.
    ahead = sorted(boxes)
    for index, box in enumerate(ahead):
        for other in ahead[index + 1 :]:
            if box and other[0][0] >= box[0][0] + box[0][1]:
                break
            if all(a < b + m and b < a + n for (a, n), (b, m) in zip(box, other, strict=True)):
                return False
    return True

"""The header of a ``.safetensors`` file: which tensors lie where. No data is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from fabriclite.boxes import all_of
from fabriclite.checkpoint.read.extents import Extent, OnDisk
from fabriclite.checkpoint.read.ranges import File
from fabriclite.errors import CheckpointError

_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, known) for name, known in _NAMES.items() if hasattr(torch, known)
}
_LONGEST: Final = 100_000_000
"""Bytes of a header, as the format allows."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a ``.safetensors`` file holds.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: the strings that were written beside them.
    """

    tensors: dict[str, OnDisk]
    metadata: dict[str, str]


class _WrongError(Exception):
    """What is wrong with a header."""


def read_header(path: Any) -> Header:
    """Read and check the header.

    Raises:
        CheckpointError: the file is cut short, too long, or no safetensors file.
    """
    file = File(path)
    try:
        return _parse(file)
    except _WrongError as error:
        raise CheckpointError(
            f"{path} must be a whole .safetensors file, but {error}. Load another checkpoint."
        ) from None


def _parse(file: File) -> Header:
    if file.size < 8:
        raise _WrongError(f"has {file.size} bytes, and the length of its header takes 8")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _LONGEST):
        raise _WrongError(f"its header of {length} bytes is longer than the file, or than the format allows")
    try:
        content = json.loads(file.read(8, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _WrongError(f"its header is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise _WrongError(f"its header is a {type(content).__name__} instead of an object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _WrongError("its __metadata__ holds more than strings")
    data = 8 + length
    entries = {name: _entry(name, entry) for name, entry in content.items()}
    _check_offsets(entries, file.size - data)
    tensors = {
        name: OnDisk(shape, dtype, [Extent(all_of(shape), file, data + begin)])
        for name, (dtype, shape, begin, _) in entries.items()
    }
    return Header(tensors, metadata)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


_Entry = tuple[torch.dtype, list[int], int, int]


def _entry(name: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _WrongError(f"its entry {name!r} does not hold just dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _WrongError(f"{name!r} has the dtype {entry['dtype']!r}, which this torch lacks")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _WrongError(f"{name!r} has the shape {shape!r} and the data_offsets {offsets!r}")
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        raise _WrongError(f"{name!r} has {end - begin} bytes, and {dtype} of the shape {shape} takes others")
    return dtype, shape, begin, end


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_offsets(entries: Mapping[str, _Entry], size: int) -> None:
    """Raise unless the tensors lie one after the other and fill the rest of the file."""
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise _WrongError(f"{name!r} begins at {begin} of the data instead of {at}: tensors overlap or leave a gap")
        at = end
    if at != size:
        kind = "shorter" if at > size else "longer"
        raise _WrongError(f"its tensors take {at} bytes, and {size} follow the header: it is {kind} than it should be")

"""A tensor that ``torch.save`` wrote, described without making it and without running any code."""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from typing_extensions import Buffer, override

from fabriclite.checkpoint.read.ranges import File


class Range(io.RawIOBase):
    """A range of a file as a file that can be read."""

    def __init__(self, file: File, start: int, length: int) -> None:
        self._file, self._start, self.length, self._at = file, start, length, 0

    @override
    def seekable(self) -> bool:
        return True

    @override
    def readable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")  # what zipfile expects when it looks for the end of a short file
        self._at = base + offset
        return self._at

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        memory = memoryview(buffer).cast("B")
        count = max(0, min(memory.nbytes, self.length - self._at))
        self._file.read_into(self._start + self._at, memory[:count])
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor as ``torch.save`` describes it: values of a record of the archive."""

    record: str
    dtype: torch.dtype
    values: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: torch.dtype | None
    values: int


def look_into(file: Range) -> tuple[int, Plain]:
    """Where in an archive the record of its one tensor begins, and what the tensor is."""
    with zipfile.ZipFile(file) as archive:
        names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        plain = _Unpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        if not isinstance(plain, Plain):
            raise ValueError(f"a {type(plain).__name__} is no tensor")
        if "byteorder" in names and archive.read(names["byteorder"]).decode() != sys.byteorder:
            raise ValueError(f"its byte order is not {sys.byteorder}")
        record = names[f"data/{plain.record}"]
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    last = plain.offset + sum((n - 1) * s for n, s in zip(plain.shape, plain.strides, strict=True))
    if min(plain.offset, *plain.strides, 0) < 0 or (last + 1) * plain.dtype.itemsize > record.file_size:
        raise ValueError(f"its values do not lie in its {record.file_size} bytes")
    file.seek(record.header_offset)
    header = file.read(30)
    if not header or header[:4] != b"PK\x03\x04":
        raise ValueError("its record has no header")
    at = record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if at + record.file_size > file.length:
        raise ValueError("its record has no end")
    return at, plain


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, *more: Any) -> Plain:
    dtype = next((item for item in more if isinstance(item, torch.dtype)), storage.dtype)
    flags = next((item for item in more if isinstance(item, dict)), {})
    if not isinstance(dtype, torch.dtype) or any(flags.values()):
        raise ValueError("it is no plain tensor")
    return Plain(storage.record, dtype, storage.values, int(offset), tuple(shape), tuple(strides))


def _parameter(plain: Any, *_more: Any) -> Any:
    return plain


STORAGES: Final[Mapping[str, torch.dtype]] = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
"""Names that torch gives storages in files; newer dtypes are named themselves."""
_TENSORS: Final[Mapping[tuple[str, str], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "UntypedStorage"): None,
    ("torch", "UntypedStorage"): None,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors and nothing else, and makes none."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TENSORS:
            return _TENSORS[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ValueError(f"{module}.{name} is no part of a tensor")

    @override
    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, record, _, values = pid
        return _Storage(str(record), dtype, int(values))

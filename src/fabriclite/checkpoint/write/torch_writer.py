"""A file of torch, written as it is read: whole checkpoints go through in pieces.

``torch.save`` wants every tensor in memory. Its file is a zip archive without compression: a pickle that describes the
tensors, and a record of bytes for each storage, at a multiple of 64 so that it can be mapped.
"""

import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import Buffer, override

from fabriclite import _torch
from fabriclite.checkpoint.read.blob import STORAGES
from fabriclite.checkpoint.write import recast
from fabriclite.stored import InMemory, Stored

_ALIGNMENT: Final = 64
_ROOT: Final = "archive"
_VERSION: Final = b"3\n"
"""Of the layout, as torch counts."""
_PADDING: Final = b"FB"
"""What torch calls the field of a header that it fills up."""
_LARGE: Final = 1 << 30
"""Bytes from which a record has a header for any size: well below what a small one can hold."""


@dataclass(frozen=True, slots=True)
class _Record:
    """The bytes of a storage, and the storage in a tree's pickle."""

    key: str
    kind: Any
    count: int
    nbytes: int
    pieces: Callable[[], Iterator[Tensor]]


class TorchFile:
    """A file of torch to be written.

    Args:
        tree: of mappings, lists and values; tensors in it may be :class:`Stored`.

    Attributes:
        nbytes: of all storages; what several tensors share counts once.
    """

    def __init__(self, tree: Mapping[Any, Any]) -> None:
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(tree)
        self._pickled = pickled.getvalue()
        self._records = pickler.records
        self._kept = pickler.kept
        self.nbytes = sum(record.nbytes for record in self._records)

    def write(self, file: Any, done: Callable[[int], None]) -> None:
        """Write it from its beginning to its end.

        Args:
            file: opened for writing, without a byte in it.
            done: called with the bytes of every piece of a storage.
        """
        counted = _Counted(file)
        with zipfile.ZipFile(counted, "w") as archive:
            _write(archive, counted, "data.pkl", len(self._pickled), iter([self._pickled]))
            _write(archive, counted, "byteorder", len(sys.byteorder), iter([sys.byteorder.encode()]))
            for record in self._records:
                _write(archive, counted, f"data/{record.key}", record.nbytes, _telling(record, done))
            _write(archive, counted, "version", len(_VERSION), iter([_VERSION]))


class _Counted(io.RawIOBase):
    """A file that knows its place and cannot go back: checksums then follow what they are of."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._at = 0

    @override
    def writable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def write(self, data: Buffer, /) -> int:
        count = memoryview(data).nbytes
        self._file.write(data)
        self._at += count
        return count


def _write(archive: zipfile.ZipFile, file: _Counted, name: str, size: int, parts: Iterator[Any]) -> None:
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # of 1980, as torch's: equal trees make equal files
    large = size >= _LARGE
    ahead = file.tell() + 30 + len(info.filename) + (20 if large else 0) + 4
    fill = -ahead % _ALIGNMENT
    info.extra = _PADDING + fill.to_bytes(2, "little") + b"Z" * fill
    with archive.open(info, "w", force_zip64=large) as record:
        for part in parts:
            record.write(part)


def _telling(record: _Record, done: Callable[[int], None]) -> Iterator[Any]:
    for piece in record.pieces():
        yield piece.view(torch.uint8).numpy()
        done(piece.nbytes)


class _Pickler(pickle.Pickler):
    """Describes tensors as ``torch.save`` does, and notes where the bytes of each come from."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.records: list[_Record] = []
        self.kept: list[Any] = []
        self._known: dict[tuple[int, int], _Record] = {}

    @override
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, InMemory):  # with all that shares its memory
            return _reduced(obj.tensor)
        if isinstance(obj, Stored):
            function, (storage, _, _, _, *more) = _reduced(torch.empty(0, dtype=obj.dtype))
            record = self._add(_kind(storage), _count(storage, obj.nbytes), obj.nbytes, lambda: recast.pieces(obj))
            return function, (record, 0, tuple(obj.shape), _row_major(obj.shape), *more)
        return NotImplemented

    @override
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Record):
            record = obj
        elif isinstance(obj, torch.TypedStorage | torch.UntypedStorage):
            record = self._storage(obj)
        else:
            return None
        return "storage", record.kind, record.key, "cpu", record.count

    def _storage(self, storage: Any) -> _Record:
        plain = _torch.untyped(storage)
        place = plain.data_ptr(), plain.nbytes()
        if place not in self._known or place[1] == 0:
            record = self._add(
                _kind(storage), _count(storage, plain.nbytes()), plain.nbytes(), lambda: _pieces_of(plain)
            )
            self._known[place] = record
            self.kept.append(plain)  # no other storage may come to its address
        return self._known[place]

    def _add(self, kind: Any, count: int, nbytes: int, pieces: Callable[[], Iterator[Tensor]]) -> _Record:
        record = _Record(str(len(self.records)), kind, count, nbytes, pieces)
        self.records.append(record)
        return record


def _pieces_of(storage: torch.UntypedStorage) -> Iterator[Tensor]:
    values = torch.empty(0, dtype=torch.uint8).set_(storage)
    return (values[start : start + recast.PIECE] for start in range(0, values.numel(), recast.PIECE))


def _reduced(tensor: Tensor) -> Any:
    """The function that makes it of a storage, and its arguments."""
    return tensor.__reduce_ex__(2)  # type: ignore[no-untyped-call]


def _kind(storage: Any) -> Any:
    """The class that stands for a storage in files."""
    return getattr(torch, _KINDS[storage.dtype]) if isinstance(storage, torch.TypedStorage) else torch.UntypedStorage


def _count(storage: Any, nbytes: int) -> int:
    return nbytes // (storage.dtype.itemsize if isinstance(storage, torch.TypedStorage) else 1)


def _row_major(shape: torch.Size) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


_KINDS: Final = {dtype: name for name, dtype in STORAGES.items()}

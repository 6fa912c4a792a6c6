"""A file of torch, written as it is read: whole checkpoints go through in pieces.

It is a zip archive: a pickle that describes the tensors, and a record of bytes for each storage. ``torch.save`` wants
every tensor in memory, and takes its checksums, which we would have to take again over the file, at 1.6 GB/s.
"""

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from fabriclite import _torch
from fabriclite.checkpoint.read.blob import STORAGES
from fabriclite.checkpoint.write import recast
from fabriclite.checkpoint.write.archive import Archive
from fabriclite.checkpoint.write.stream import Stream
from fabriclite.errors import CheckpointError
from fabriclite.stored import InMemory, Stored

_VERSION: Final = b"3\n"
"""Of the layout, as torch counts."""

Done = Callable[[int], None]
"""Called with the bytes of every piece that was written."""


@dataclass(frozen=True, slots=True)
class _Record:
    """The bytes of a storage, and the storage in a tree's pickle."""

    key: str
    location: str
    kind: Any
    count: int
    nbytes: int
    pieces: Callable[[], Iterator[Tensor]]


class TorchFile:
    """A file of torch to be written.

    Args:
        tree: a value, or mappings and lists of them; tensors in it may be :class:`Stored`.

    Attributes:
        nbytes: of all storages; what several tensors share counts once.
    """

    def __init__(self, tree: Any) -> None:
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(tree)
        self._pickled = pickled.getvalue()
        self._records = pickler.records
        self._kept = pickler.kept
        self.nbytes = sum(record.nbytes for record in self._records)

    def write(self, file: Stream, done: Done | None = None) -> None:
        """Write it behind what is in ``file``.

        Args:
            file: which goes on from here. Tensors in memory must not change before it is closed.
            done: called for every piece of a storage; ``None`` if nobody looks on.
        """
        archive = Archive(file)
        archive.add("data.pkl", [self._pickled])
        archive.add("byteorder", [sys.byteorder.encode()])
        for record in self._records:
            archive.add(f"data/{record.key}", _telling(record, done))
        archive.add("version", [_VERSION])
        archive.close()


def _telling(record: _Record, done: Done | None) -> Iterator[Any]:
    for piece in record.pieces():
        yield piece.view(torch.uint8).numpy()
        if done is not None:
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
        return "storage", record.kind, record.key, record.location, record.count

    def _storage(self, storage: Any) -> _Record:
        plain = _torch.untyped(storage)
        place = plain.data_ptr(), plain.nbytes()
        kind = _kind(storage)
        if place not in self._known or place[1] == 0:
            record = self._add(kind, _count(storage, place[1]), place[1], lambda: _pieces_of(plain), plain)
            self._known[place] = record
            self.kept.append(plain)  # no other storage may come to its address
        if self._known[place].kind is not kind:
            raise CheckpointError(
                f"Tensors that share memory must have one dtype to be saved, but are {self._known[place].kind.__name__}"
                f" and {kind.__name__}. Clone one of them."
            )
        return self._known[place]

    def _add(
        self, kind: Any, count: int, nbytes: int, pieces: Callable[[], Iterator[Tensor]], storage: Any = None
    ) -> _Record:
        location = "cpu" if storage is None else str(torch.serialization.location_tag(storage))
        record = _Record(str(len(self.records)), location, kind, count, nbytes, pieces)
        self.records.append(record)
        return record


def _pieces_of(storage: torch.UntypedStorage) -> Iterator[Tensor]:
    values = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())  # type: ignore[no-untyped-call]
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


_KINDS: Final = {
    **{dtype: name for name, dtype in STORAGES.items()},
    torch.qint8: "QInt8Storage",
    torch.quint8: "QUInt8Storage",
    torch.qint32: "QInt32Storage",
    torch.quint4x2: "QUInt4x2Storage",
    torch.quint2x4: "QUInt2x4Storage",
}

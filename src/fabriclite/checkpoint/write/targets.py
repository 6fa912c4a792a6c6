"""What a conversion writes: each form, planned from an opened checkpoint, and written tensor by tensor."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fabriclite import shards
from fabriclite.boxes import Box, lengths
from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.formats import OWN, VERSION
from fabriclite.checkpoint.parts import SMALL
from fabriclite.checkpoint.read import kinds
from fabriclite.checkpoint.read.kinds import Found
from fabriclite.checkpoint.write import recast
from fabriclite.checkpoint.write.file import write_file
from fabriclite.checkpoint.write.folder import Shard, prefix, write_rest, write_shards
from fabriclite.checkpoint.write.safetensors_writer import Entry, SafetensorsWriter, in_order
from fabriclite.checkpoint.write.torch_writer import Done, TorchFile
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.stored import Stored
from fabriclite.world import World

_DOCUMENTS: Final = ("config.json", "generation_config.json")


class Target(Protocol):
    """What is to be written. No tensor was read.

    Attributes:
        nbytes: of all tensors.
        left_out: names of what the form has no place for.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def left_out(self) -> tuple[str, ...]: ...

    def write(self, path: Path, done: Done) -> None:
        """Write it under a name that nothing has, and have it on the disk."""


class FileTarget:
    """One file of torch."""

    left_out: tuple[str, ...] = ()

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._file = TorchFile(tree)
        self.nbytes = self._file.nbytes

    def write(self, path: Path, done: Done) -> None:
        write_file(self._file, path, done)


# -- a folder of ours -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FolderTarget:
    """A folder of ours: tensors of modules and optimizers are shards, all else is in one file."""

    tensors: Mapping[str, Stored]
    rest: TorchFile
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "FolderTarget":
        tensors: dict[str, Stored] = {}
        rest: dict[Any, Any] = {}
        for key, value in tree.items():
            found = _sharded(value) if isinstance(key, str) and key != OWN else {}
            tensors.update({f"{prefix(key)}{'.'.join(way)}": tensor for way, tensor in found.items()})
            rest[key] = _without(value, found) if found else value
        own = rest.get(OWN)
        rest[OWN] = {**(own if isinstance(own, Mapping) else {}), "version": VERSION}
        return cls(tensors, TorchFile(recast.replaced(rest, recast.alone)))  # what shards share is theirs

    @property
    def nbytes(self) -> int:
        return self.rest.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path, done: Done) -> None:
        found = [shard for name, tensor in self.tensors.items() for shard in _shards_of(name, tensor, done)]
        files = write_shards(found, path, Crew(World()))
        write_rest(self.rest, files, path, done)


def _sharded(value: Any) -> dict[tuple[str, ...], Stored]:
    """Tensors of an entry that a folder can keep as shards, under the keys that lead to each."""
    if not isinstance(value, Mapping):
        return {}
    if kinds.is_optimizer(value):
        state = value["state"]
        if not isinstance(state, Mapping) or not all(isinstance(values, Mapping) for values in state.values()):
            return {}
        ways = {("state", param, name): t for param, values in state.items() for name, t in values.items()}
        named = {way: t for way, t in ways.items() if _is_named(way, t) and "." not in way[2]}
        return {way: t for way, t in named.items() if t.shape.numel() > SMALL}
    if "state" in value:  # read back, it would be an optimizer
        return {}
    return {(name,): t for name, t in value.items() if _is_named((name,), t) and not shards.is_extra(name)}


def _is_named(way: Sequence[Any], value: Any) -> bool:
    return isinstance(value, Stored) and all(isinstance(key, str) for key in way)


def _without(tree: Mapping[Any, Any], ways: Collection[tuple[Any, ...]]) -> dict[Any, Any]:
    """The same tree less what ``ways`` lead to."""
    further: dict[Any, list[tuple[Any, ...]]] = {}
    for first, *more in ways:
        further.setdefault(first, []).append(tuple(more))
    kept = {key: value for key, value in tree.items() if () not in further.get(key, ())}
    return {key: _without(value, further[key]) if key in further else value for key, value in kept.items()}


def _shards_of(name: str, tensor: Stored, done: Done) -> Iterator[Shard]:
    for box in recast.boxes(tensor.shape, max(1, recast.BOX // tensor.dtype.itemsize)):
        yield Shard(name, tensor.shape, box, tensor.dtype, partial(_read, tensor, box, done))


def _read(tensor: Stored, box: Box, done: Done) -> Tensor:
    values = torch.empty(lengths(box), dtype=tensor.dtype)
    tensor.read(box, values)
    done(values.nbytes)
    return values


# -- weights for other libraries --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """A folder of safetensors files."""

    tensors: Mapping[str, Stored]
    documents: Mapping[str, bytes]
    max_file_bytes: int
    left_out: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, found: Found, key: str | None, max_file_bytes: int, dtype: torch.dtype | None) -> "ExportTarget":
        """The weights of the one module, or of the entry ``key``.

        Raises:
            CheckpointError: there is no such module, or more than one.
        """
        state = _one_module(found, key)
        tensors = {
            name: value for name, value in state.items() if isinstance(value, Stored) and not shards.is_extra(name)
        }
        if not tensors:
            raise CheckpointError(f"{found.path} must hold tensors to be exported, but holds none. Pass another one.")
        left_out = tuple(str(name) for name in state if name not in tensors)
        return cls(tensors, _documents(found.path, dtype), max_file_bytes, left_out)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path, done: Done) -> None:
        path.mkdir()
        entries = list(in_order([Entry(name, t.shape, t.dtype) for name, t in self.tensors.items()]))
        writer = SafetensorsWriter(path, entries, self.max_file_bytes)
        try:
            for entry in entries:
                writer.begin(entry.name)
                for piece in recast.pieces(self.tensors[entry.name]):
                    writer.add(piece)
                    done(piece.nbytes)
            writer.finish(self.documents)
        finally:
            writer.close()


def _one_module(found: Found, key: str | None) -> Mapping[str, Any]:
    if found.alone:
        if key is not None:
            raise ConfigError(f"`key` must be left out for {found.path}, a {found.kind}, but is {key!r}.")
        return found.tree
    known = kinds.modules(found.tree)
    if key is None and len(known) != 1:
        raise CheckpointError(
            f"{found.path} must hold the state of one module, but holds {', '.join(known) or 'none'}."
            " Pass key='...' (--key) to say which."
        )
    value = found.tree.get(known[0] if key is None else key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"`key` must be one of {', '.join(known) or 'no entries'} in {found.path}, but is {key!r}.")
    return value


def _documents(folder: Path, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The configuration of a Hugging Face model, which says the dtype of its weights."""
    if not folder.is_dir():
        return {}
    found = {name: (folder / name).read_bytes() for name in _DOCUMENTS if (folder / name).is_file()}
    if dtype is not None:
        found = {name: _with_dtype(content, str(dtype).removeprefix("torch.")) for name, content in found.items()}
    return found


def _with_dtype(content: bytes, dtype: str) -> bytes:
    try:
        document = json.loads(content)
    except ValueError:
        return content
    told = [name for name in ("dtype", "torch_dtype") if isinstance(document, dict) and name in document]
    return json.dumps({**document, **dict.fromkeys(told, dtype)}, indent=2).encode() if told else content

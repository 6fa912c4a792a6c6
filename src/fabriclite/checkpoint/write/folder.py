"""A checkpoint in a folder: every rank writes its part (torch.distributed.checkpoint), rank 0 all the rest."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from typing_extensions import override

from fabriclite import _torch, shards
from fabriclite.boxes import Box, all_of, lengths
from fabriclite.checkpoint import disk, place, sums
from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.parts import Part, taken, whole
from fabriclite.checkpoint.sums import FileSum
from fabriclite.checkpoint.write import recast
from fabriclite.checkpoint.write.stream import Stream
from fabriclite.checkpoint.write.torch_writer import Done, TorchFile
from fabriclite.stored import InMemory
from fabriclite.stretch import Stretch
from fabriclite.world import World


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A part of a tensor that this process writes.

    Attributes:
        name: of the tensor in the folder.
        shape: of the whole tensor.
        box: which part.
        dtype: of its values.
        values: gives them, in the box's shape. Called when they are written, so that one shard is in memory at a time.
    """

    name: str
    shape: torch.Size
    box: Box
    dtype: torch.dtype
    values: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class FolderContent:
    """What this rank writes of a folder: its shards, and on rank 0 the rest."""

    shards: Sequence[Shard]
    rest: Mapping[str, Any]

    @classmethod
    def take(
        cls, world: World, parts: Mapping[str, Part], filters: Mapping[str, Any], extra: Mapping[str, Any], copied: bool
    ) -> "FolderContent":
        """Find this rank's part of every tensor; nothing is gathered but what is in no module or optimizer.

        Every rank must call this. ``copied``: keep nothing that the training goes on to change.
        """
        first = world.is_global_zero
        mine: list[Shard] = []
        rest: dict[str, Any] = {}
        for key, part in parts.items():
            tensors, others = part.split(taken(key, part, filters.get(key)))
            for name, value in tensors.items():
                mine += _shards_of(f"{prefix(key)}{name}", value, first, copied)
            rest[key] = whole(others, keep=first, copied=copied)
        return cls(mine, {**rest, **extra} if first else {})

    def write(self, crew: Crew, path: Path) -> None:
        """Write the folder, have it on the disk, and look at it again. Every rank must call this."""
        written = crew.gathered(lambda: write_shards(self.shards, path, crew), f"write the checkpoint {path}")

        def finish() -> None:
            files = {name: file for of_one in written for name, file in of_one.items()}
            write_rest(TorchFile(self.rest), files, path)

        crew.on_rank_zero(finish, f"write the checkpoint {path}")


def prefix(key: str) -> str:
    """What the names of an entry's tensors begin with. A dot in the key would make two entries' names one."""
    return f"{key.replace('%', '%25').replace('.', '%2E')}."


def _shards_of(name: str, value: Tensor | Stretch, first: bool, copied: bool) -> Iterator[Shard]:
    """What this rank writes. What is not sharded can differ between ranks (running statistics): it is rank 0's."""
    plain = not isinstance(value, DTensor | Stretch)
    if plain or value.shape.numel() == 0:
        if first:
            whole_value = shards.local(value) if isinstance(value, Tensor) else value.values.view(value.shape)
            yield Shard(name, value.shape, all_of(value.shape), value.dtype, _held(whole_value, copied))
        return
    for box, values in shards.pieces(value):
        yield Shard(name, value.shape, box, value.dtype, _held(values, copied))


def _held(values: Tensor, copied: bool) -> Callable[[], Tensor]:
    held = values.detach().to("cpu", copy=True) if copied else values.detach()
    return lambda: held


# -- writing ----------------------------------------------------------------------------------------------------------


def write_shards(shards: Sequence[Shard], path: Path, crew: Crew) -> dict[str, FileSum]:
    """Make the folder, and write this rank's shards and, on rank 0, the index of all. Every rank must call this.

    Returns:
        Size and checksums of the files that this rank wrote.
    """
    files = _Files()
    writer = _Writer("", sync_files=False)  # our files are on the disk when they are closed
    writer.fs, writer.path = cast(FileSystem, files), path
    alone = crew.world.size == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # writing alone is meant
        dcp_save({}, storage_writer=writer, planner=_Planner(shards), process_group=crew.group, no_dist=alone)
    return {name.removesuffix(".tmp"): file for name, file in files.written.items()}


def write_rest(rest: TorchFile, files: Mapping[str, FileSum], path: Path, done: Done | None = None) -> None:
    """Write what is no shard, and list the checksums; have all on the disk, and look at it again."""
    out = _Files()
    with out.create_stream(path / place.META, "wb") as file:
        rest.write(file, done)
    (path / sums.SUMS).write_bytes(sums.dump({**files, **out.written}))
    disk.sync(path / sums.SUMS)
    disk.sync(path)
    sums.check_sizes(path, sums.listed(path) or {})


class _Writer(FileSystemWriter):
    """Writes shards one after the other. Torch's own keeps every one in memory until the last is written."""

    @override
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch would pickle the path: of this machine, and of the name before publication

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        path = cast(Path, self.path) / name
        results = []
        with self.fs.create_stream(path, "wb") as stream:
            file = cast(Stream, stream)
            for item in plan.items:
                start = file.tell()
                values = InMemory(cast(Tensor, planner.resolve_data(item)))
                TorchFile(recast.Cast(values, values.dtype)).write(file)  # not all that a view looks into
                results.append(_torch.shard_written(item.index, name, start, file.tell() - start))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _Files(FileSystemBase):
    """The files of a folder for torch's writer; sums up each as it is written."""

    def __init__(self) -> None:
        self.written: dict[str, FileSum] = {}

    @override
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        def note(file: FileSum) -> None:
            self.written[path.name] = file

        with Stream(path, note) as file:  # `mode`: its writer only writes
            yield file

    @override
    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    @override
    def rename(self, path: Any, new_path: Any) -> None:
        disk.rename(path, new_path)

    @override
    def init_path(self, path: Any) -> Any:
        return path

    @override
    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    @override
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @override
    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    @override
    def rm_file(self, path: Any) -> None:
        path.unlink()


class _Planner(DefaultSavePlanner):
    """Tells torch which shards this rank has. Of equal ones on several ranks, torch has one write each."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._values = {(s.name, tuple(start for start, _ in s.box)): s.values for s in shards}

    @override
    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(shard) for shard in self._shards])
        return self.plan

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self._values[index.fqn, tuple(index.offset)]()


def _write_item(shard: Shard) -> WriteItem:
    offsets = torch.Size([start for start, _ in shard.box])
    return WriteItem(
        index=MetadataIndex(shard.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(lengths(shard.box))),
            properties=TensorProperties(dtype=shard.dtype),
            size=shard.shape,
        ),
    )

"""A checkpoint in one file: whole tensors, gathered and written by rank 0."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.parts import Part, taken, whole
from fabriclite.checkpoint.write.stream import Stream
from fabriclite.checkpoint.write.torch_writer import Done, TorchFile
from fabriclite.world import World


@dataclass(frozen=True, slots=True)
class FileContent:
    """All that a file will hold, on rank 0; nothing on the others."""

    content: Mapping[str, Any]

    @classmethod
    def take(
        cls, world: World, parts: Mapping[str, Part], filters: Mapping[str, Any], extra: Mapping[str, Any], copied: bool
    ) -> "FileContent":
        """Gather every part, one tensor at a time. Every rank must call this.

        ``copied``: keep nothing that the training goes on to change.
        """
        content = {
            key: whole(taken(key, part, filters.get(key)), keep=world.is_global_zero, copied=copied)
            for key, part in parts.items()
        }
        return cls({**content, **extra})

    def write(self, crew: Crew, path: Path) -> None:
        """Write the file, have it on the disk, and look at it again. Every rank must call this."""

        def act() -> None:
            write_file(TorchFile(self.content), path)

        crew.on_rank_zero(act, f"write the checkpoint {path}")


def write_file(file: TorchFile, path: Path, done: Done | None = None) -> None:
    """Write one file of torch, with a checksum for each record, have it on the disk, and look at it again.

    Raises:
        OSError: the disk is full, or the path cannot be written.
    """
    with Stream(path) as out:
        file.write(out, done)
    with path.open("rb") as written, zipfile.ZipFile(written):  # its directory, at the very end, can be read
        pass

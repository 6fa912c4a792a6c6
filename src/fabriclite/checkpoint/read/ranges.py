"""A file that is read in pieces."""

import os
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch

from fabriclite.checkpoint import disk
from fabriclite.errors import CheckpointError

_REMOTE: Final = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "beegfs", "afs", "glusterfs", "ocfs")
"""How the kernel names file systems whose files another machine can take away, or their beginnings."""


class File:
    """A file that is read in pieces, by any number of threads. Opened at the first read.

    Args:
        path: a ``pathlib.Path``, or an object like one for a file elsewhere (``upath.UPath``).

    Raises:
        CheckpointError: there is no such file.
    """

    def __init__(self, path: Any) -> None:
        self.path = path
        self.local = disk.is_local(path)
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} must be a readable file, but {_reason(error)}.") from error
        self.size: int = found.st_size
        self._identity = _identity(found) if self.local else None
        self._lock = threading.RLock()
        self._opened: int | BinaryIO | None = None
        self._mapping: torch.UntypedStorage | None = None
        self._given: tuple[torch.UntypedStorage, set[int]] | None = None

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill ``memory`` with the bytes from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        done, length = 0, memory.nbytes
        try:
            while done < length:
                got = self._read_some(offset + done, memory[done : done + (1 << 30)])
                if got == 0:
                    raise CheckpointError(
                        f"{self.path} must hold {length} bytes at {offset}, but ends at {offset + done}."
                        " Load another checkpoint."
                    )
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{self.path} must hold {length} readable bytes at {offset}, but {_reason(error)}."
                " Load another checkpoint."
            ) from error

    def _read_some(self, offset: int, memory: memoryview) -> int:
        opened = self._open()
        if isinstance(opened, int):
            return os.preadv(opened, [memory], offset)
        with self._lock:  # a stream has one place
            opened.seek(offset)
            return opened.readinto(memory) or 0  # type: ignore[attr-defined]

    def _open(self) -> int | BinaryIO:
        with self._lock:
            if self._opened is None:
                if self.local:
                    fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    weakref.finalize(self, os.close, fd)
                    if _identity(os.fstat(fd)) != self._identity:
                        raise CheckpointError(
                            f"{self.path} must stay until it is read, but was replaced since it was found. Load again."
                        )
                    self._opened = fd
                else:
                    stream: BinaryIO = self.path.open("rb")
                    weakref.finalize(self, stream.close)
                    self._opened = stream
            return self._opened

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on. Raises as :meth:`read_into`."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def mapping(self) -> torch.UntypedStorage | None:
        """The file as memory to read from, or ``None`` where a page that cannot be read would end the process."""
        with self._lock:
            if self._mapping is None:
                self._mapping = self._map()
            return self._mapping

    def give(self, offset: int, length: int) -> torch.UntypedStorage | None:
        """Memory over a range of the file to keep and to write to; never the same twice, nor that of a reader."""
        with self._lock:
            if self._given is None or offset in self._given[1]:
                mapping = self._map()
                if mapping is None:
                    return None
                self._given = mapping, set()
            mapping, offsets = self._given
            offsets.add(offset)
            return cast(torch.UntypedStorage, mapping[offset : offset + length])

    def _map(self) -> torch.UntypedStorage | None:
        if not self.local or self.size == 0 or not _on_local_disk(self.path):
            return None
        opened = self._open()
        assert isinstance(opened, int)
        if os.fstat(opened).st_size < self.size:
            return None
        name = f"/proc/self/fd/{opened}"  # what is open: another file may have its name by now
        try:
            return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(name, shared=False, nbytes=self.size))
        except RuntimeError:  # no address space, or a limit on it: read calls need none
            return None


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _on_local_disk(path: Path) -> bool:
    """Whether the file lies where reading does not depend on another machine, as far as Linux tells."""
    try:
        here = os.stat(path).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    kinds = []
    for line in lines:
        fields, _, kind = line.partition(" - ")
        major, _, minor = fields.split()[2].partition(":")
        if os.makedev(int(major), int(minor)) == here:
            kinds.append(kind.split()[0])
    return bool(kinds) and not any(kind.startswith(_REMOTE) for kind in kinds)

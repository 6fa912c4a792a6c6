"""What one save or load took: the page cache before it, and memory, read calls and disk of this process during it."""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final

_EVERY_S: Final = 0.004
"""Between two looks at the memory."""
_PIECE: Final = 16 << 20
_STATUS: Final = "/proc/self/status"
_IO: Final = "/proc/self/io"


def files_of(path: Path) -> list[Path]:
    """A file, or all files in a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


# -- page cache --------------------------------------------------------------------------------------------------------


def fill_cache(path: Path) -> None:
    """Have the kernel hold all of it in memory."""
    buffer = bytearray(_PIECE)
    for file in files_of(path):
        if cached(file) < 1:
            with file.open("rb", buffering=0) as raw:
                while raw.readinto(buffer):
                    pass


def drop_cache(path: Path) -> None:
    """Have the kernel hold none of it, as far as a user can ask. A host below a virtual machine may still hold it."""
    for file in files_of(path):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cached(path: Path) -> float:
    """The part of it that the kernel holds in memory, from 0 to 1, by ``mincore``."""
    held = pages = 0
    for file in files_of(path):
        size = file.stat().st_size
        if size:
            found = _held(file, size)
            held, pages = held + found.count(1), pages + len(found)
    return held / max(1, pages)


def _held(file: Path, size: int) -> bytes:
    """One byte for each page: whether it is held."""
    states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), states)
        del anchor  # the mapping cannot be closed while something points into it
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return bytes(states)


# -- this process ------------------------------------------------------------------------------------------------------


class Gauge:
    """Looks at this process from its beginning to its end.

    Attributes:
        peak: the most anonymous memory (``RssAnon``, every 4 ms), less what there was at the beginning. Pages of files
            are not in it: the kernel takes them back whenever it wants.
        called: bytes that read calls returned (``rchar``), those of this gauge left out.
        fetched: bytes that came from the disk for this process (``read_bytes``), also for pages of mapped files.
    """

    def __init__(self) -> None:
        self.peak = self.called = self.fetched = 0
        self._own = 0
        self._over = threading.Event()

    def __enter__(self) -> "Gauge":
        self._base = self._anonymous()
        self._begin = self._counters()
        self._own = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        own = self._own
        after = self._counters()
        self.called = after["rchar"] - self._begin["rchar"] - own
        self.fetched = after["read_bytes"] - self._begin["read_bytes"]

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._anonymous() - self._base)

    def _anonymous(self) -> int:
        return next(int(line.split()[1]) for line in self._lines(_STATUS) if line.startswith("RssAnon:")) * 1024

    def _counters(self) -> dict[str, int]:
        return {name: int(value) for name, value in (line.split(": ") for line in self._lines(_IO))}

    def _lines(self, path: str) -> Iterable[str]:
        with open(path, encoding="ascii") as file:
            text = file.read()
        self._own += len(text)
        return text.splitlines()

"""Checksums: taken while a file is written, compared before it is loaded. CRC-32 of blocks, so that ranks share them.

A folder carries them in ``checksums.json``; a file of torch has one inside for each of its records.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from typing_extensions import Buffer, override

from fabriclite.errors import CheckpointError

SUMS: Final = "checksums.json"
BLOCK: Final = 64 << 20
"""Bytes that one checksum is of."""
_AT_ONCE: Final = 1 << 20
_FORMAT: Final = "fabriclite checksums 1"


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and checksums of one file.

    Attributes:
        size: in bytes.
        blocks: CRC-32 of each :data:`BLOCK` bytes; of the last, of what is left.
    """

    size: int
    blocks: tuple[int, ...]


class Summing(io.RawIOBase):
    """A file that is written from its beginning to its end, and knows its checksums then.

    Args:
        raw: opened for writing.
        done: called with the result when it is closed.
    """

    def __init__(self, raw: Any, done: Callable[[FileSum], None]) -> None:
        self._raw = raw
        self._done = done
        self._size = 0
        self._blocks: list[int] = []
        self._helper = ThreadPoolExecutor(1)

    @override
    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        summed = self._beside(view) if len(view) >= _AT_ONCE else None
        if summed is None:
            self._sum(view)
        try:
            written = 0
            while written < len(view):  # an unbuffered file may take less than it was given
                written += self._raw.write(view[written:])
        finally:
            if summed is not None:
                summed.result()  # the bytes are the caller's, and gone when this returns
        return len(view)

    def _beside(self, view: memoryview) -> "Future[None] | None":
        """Sum up while the bytes are being written: neither holds the interpreter's lock."""
        try:
            return self._helper.submit(self._sum, view)
        except RuntimeError:  # a save that is under way when the interpreter ends may start no thread
            return None

    def _sum(self, rest: memoryview) -> None:
        while len(rest):
            begun = self._size % BLOCK
            if begun == 0:
                self._blocks.append(0)
            part = rest[: BLOCK - begun]
            self._blocks[-1] = zlib.crc32(part, self._blocks[-1])
            self._size += len(part)
            rest = rest[len(part) :]

    @override
    def tell(self) -> int:
        return self._size

    @override
    def fileno(self) -> int:
        return int(self._raw.fileno())

    @override
    def writable(self) -> bool:
        return True

    @override
    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    @override
    def close(self) -> None:
        if not self._raw.closed:
            self._raw.close()
            self._helper.shutdown()
            self._done(FileSum(self._size, tuple(self._blocks)))
        super().close()


# -- the list in a folder ---------------------------------------------------------------------------------------------


def dump(files: Mapping[str, FileSum]) -> bytes:
    """The content of ``checksums.json``."""
    body = {name: {"size": f.size, "crc32": list(f.blocks)} for name, f in sorted(files.items())}
    document = {"format": _FORMAT, "block": BLOCK, "files": body}
    return json.dumps({**document, "crc32": _own(document)}, indent=1).encode()


def _own(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def listed(folder: Path) -> dict[str, FileSum] | None:
    """What ``checksums.json`` says; ``None`` where there is none.

    Raises:
        CheckpointError: it was changed, or cut short.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
        own = document.pop("crc32")
        files = {name: FileSum(int(f["size"]), tuple(f["crc32"])) for name, f in document["files"].items()}
        if own != _own(document) or document["block"] != BLOCK or document["format"] != _FORMAT:
            raise ValueError("its own checksum differs")
    except OSError:
        raise
    except Exception as error:
        raise _damaged(path, f"{error}") from error
    return files


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} must be as it was written, but {what}. It is damaged: load another checkpoint.")


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Block:
    path: Path
    start: int
    length: int
    crc: int


def verify(path: Path, share: tuple[int, int] = (0, 1), done: Callable[[int], None] | None = None) -> int:
    """Compare a checkpoint, file or folder, with its checksums. What carries none is taken as it is.

    Args:
        path: of the checkpoint.
        share: ``(index, count)``: look at every ``count``-th block, from block ``index`` on.
        done: called with the bytes of each block that was compared.

    Returns:
        Bytes that were compared.

    Raises:
        CheckpointError: a file is missing or of another size, or bytes differ; names the file and the bytes.
    """
    blocks = list(_of_folder(path) if path.is_dir() else _of_archive(path))
    mine = blocks[share[0] :: share[1]]

    def compare(block: _Block) -> None:
        _compare(block)
        if done is not None:
            done(block.length)

    threads = max(1, min(4, torch.get_num_threads()))
    with ThreadPoolExecutor(threads) as pool:
        for result in [pool.submit(compare, block) for block in mine]:
            result.result()
    return sum(block.length for block in mine)


def size_of(path: Path) -> int:
    """Bytes that :func:`verify` compares."""
    return sum(block.length for block in (_of_folder(path) if path.is_dir() else _of_archive(path)))


def check_sizes(folder: Path, files: Mapping[str, FileSum]) -> None:
    """Raise unless every file is there with its size."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        if path.stat().st_size != expected.size:
            raise _damaged(path, f"has {path.stat().st_size} bytes instead of {expected.size}")


def _of_folder(folder: Path) -> Iterator[_Block]:
    files = listed(folder)
    if files is None:
        return
    check_sizes(folder, files)
    for name, file in files.items():
        for index, crc in enumerate(file.blocks):
            start = index * BLOCK
            yield _Block(folder / name, start, min(BLOCK, file.size - start), crc)


def _of_archive(path: Path) -> Iterator[_Block]:
    """The records of a file of torch, none of them compressed. Other kinds of files carry no checksums."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
            for record in records:
                yield _Block(path, _data_start(file, record), record.file_size, record.CRC)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise _damaged(path, f"{error}") from error


def _data_start(file: Any, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"the record {record.filename} has no header")
    names, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return int(record.header_offset + 30 + names + extra)


def _compare(block: _Block) -> None:
    crc, left = 0, block.length
    buffer = memoryview(bytearray(min(_AT_ONCE, max(left, 1))))
    with block.path.open("rb", buffering=0) as file:
        file.seek(block.start)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))]) or 0
            if count == 0:
                raise _damaged(block.path, f"ends {left} bytes too early")
            crc = zlib.crc32(buffer[:count], crc)
            left -= count
    if crc != block.crc:
        end = block.start + block.length
        raise _damaged(block.path, f"its bytes {block.start} to {end} have another CRC-32 checksum")

"""Checksums: taken while a file is written, compared before it is loaded. CRC-32 of blocks, so that ranks share them.

A folder carries them in ``checksums.json``; a file of torch has one inside for each of its records.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from pathlib import Path
from typing import Any, Final

import torch

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


class Sum:
    """Checksums of bytes that pass in order: of a file's blocks, and of stretches of it that lie across their borders.

    Every byte is summed up once: what belongs to both is joined.

    Attributes:
        size: bytes so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[int] = []
        self._stretch = 0
        self._last = 0  # of the bytes since the last joint
        self._count = 0

    def add(self, data: memoryview) -> None:
        while len(data):
            if self.size % BLOCK == 0:
                self._join()
                self._blocks.append(0)
            part = data[: BLOCK - self.size % BLOCK]
            self._last = zlib.crc32(part, self._last)
            self._count += len(part)
            self.size += len(part)
            data = data[len(part) :]

    def begin(self) -> None:
        """A stretch begins."""
        self._join()
        self._stretch = 0

    def end(self) -> int:
        """CRC-32 of the stretch."""
        self._join()
        return self._stretch

    def of_file(self) -> FileSum:
        self._join()
        return FileSum(self.size, tuple(self._blocks))

    def _join(self) -> None:
        if self._count:
            self._blocks[-1] = joined(self._blocks[-1], self._last, self._count)
            self._stretch = joined(self._stretch, self._last, self._count)
        self._last = self._count = 0


# -- arithmetic: a CRC-32 is a polynomial over two elements, the highest power in the lowest bit -----------------------

_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31


def joined(first: int, second: int, count: int) -> int:
    """CRC-32 of two pieces of bytes, one behind the other, from that of each. Pure.

    ``count``: bytes of the second. What comes before them is moved up by as many places. It is zlib's
    ``crc32_combine``, which python's module lacks.
    """
    return (_times(first, _moved(count)) if first else 0) ^ second


@cache
def _square(times: int) -> int:
    """``x**8``, which moves by one byte, squared so often."""
    return _times(_square(times - 1), _square(times - 1)) if times else 1 << 23


@lru_cache(maxsize=4096)  # tensors of a model have few sizes
def _moved(count: int) -> int:
    """``x**(8 * count)``."""
    return reduce(_times, (_square(bit) for bit in range(count.bit_length()) if count >> bit & 1), _ONE)


def _times(one: int, two: int) -> int:
    product = 0
    while one:
        if one & _ONE:
            product ^= two
        one = (one << 1) & 0xFFFFFFFF
        two = two >> 1 ^ _POLYNOMIAL if two & 1 else two >> 1
    return product


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

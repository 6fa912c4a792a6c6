"""A zip archive without compression, as torch lays it out: every record begins at a multiple of 64, to be mapped.

Python's own writer would sum up every byte once more, and cannot do so while others are being written. As torch does,
all sizes and places are written as 64 bits wide, and what is known of a record only after it stands behind it.
"""

import struct
from collections.abc import Iterable
from typing import Any, Final

from fabriclite.checkpoint.write.stream import Stream

_ALIGNMENT: Final = 64
_ROOT: Final = "archive"
_PADDING: Final = b"FB"
"""What torch calls the field of a header that it fills up."""
_WIDE: Final = 0xFFFFFFFF
"""Stands where a number would have 32 bits, and is elsewhere with 64."""
_COMMON: Final = struct.pack("<5H", 45, 1 << 3, 0, 0, 0x21)
"""Version 4.5 is needed, sums and sizes follow, no compression, and 1980 as torch: equal contents make equal files."""


class Archive:
    """An archive at the place that a file has come to.

    Args:
        file: it goes on in.
    """

    def __init__(self, file: Stream) -> None:
        self._file = file
        self._start = file.tell()
        self._directory: list[bytes] = []

    def add(self, name: str, parts: Iterable[Any]) -> None:
        """Write a record. ``parts`` give its bytes, and must stay as they are until the file is closed."""
        path = f"{_ROOT}/{name}".encode()
        at = self._file.tell() - self._start
        wide = struct.pack("<2H2Q", 1, 16, 0, 0)
        fill = -(at + 30 + len(path) + len(wide) + 4) % _ALIGNMENT
        extra = wide + _PADDING + struct.pack("<H", fill) + b"Z" * fill
        lengths = struct.pack("<2H", len(path), len(extra))
        self._file.write(b"PK\3\4" + _COMMON + struct.pack("<3I", 0, _WIDE, _WIDE) + lengths + path + extra)
        begun = self._file.tell()
        self._file.begin()
        for part in parts:
            self._file.write(part)
        size, crc = self._file.tell() - begun, self._file.end()
        self._file.write(b"PK\7\10" + struct.pack("<I2Q", crc, size, size))
        wide = struct.pack("<2H3Q", 1, 24, size, size, at)
        numbers = struct.pack("<3I5H2I", crc, _WIDE, _WIDE, len(path), len(wide), 0, 0, 0, 0, _WIDE)
        self._directory.append(b"PK\1\2" + struct.pack("<H", 45) + _COMMON + numbers + path + wide)

    def close(self) -> None:
        """Write the directory. The file goes on, or ends, behind it."""
        directory, count = b"".join(self._directory), len(self._directory)
        at = self._file.tell() - self._start
        end = at + len(directory)
        last = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, len(directory), at)
        where = b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
        short = min(count, 0xFFFF)
        plain = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, short, short, min(len(directory), _WIDE), min(at, _WIDE), 0)
        self._file.write(directory + last + where + plain)

"""Writing safetensors files, one tensor after the other, in the folder that Hugging Face's libraries open."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fabriclite.checkpoint import disk, sums
from fabriclite.checkpoint.formats import DEFAULT_MAX_BYTES
from fabriclite.checkpoint.read.safetensors_file import DTYPES
from fabriclite.checkpoint.sums import FileSum
from fabriclite.checkpoint.write.stream import Stream
from fabriclite.errors import ConfigError

INDEX: Final = "model.safetensors.index.json"
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
_AT_ONCE: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def files_for(entries: Sequence[Entry], max_bytes: int) -> list[tuple[str, list[Entry]]]:
    """Which tensors go to which file, in order: each file holds at most ``max_bytes``, or one tensor. Pure."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


class SafetensorsWriter:
    """Writes a folder of safetensors files. Tensors come whole or in pieces, in the order that was announced.

    Args:
        folder: exists.
        entries: every tensor, in order.
        max_bytes: of one file.

    Raises:
        ConfigError: a dtype has no name in the format.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        odd = [entry for entry in entries if entry.dtype not in _CODES]
        if odd:
            raise ConfigError(
                f"{odd[0].name} must have a dtype that safetensors knows, but is {odd[0].dtype}. Cast it, or use"
                " another format."
            )
        self._folder = folder
        self._files = files_for(entries, max_bytes)
        self._begins = {group[0].name: (file, group) for file, group in self._files if group}
        self._total = sum(entry.nbytes for entry in entries)
        self._written: dict[str, FileSum] = {}
        self._now: Stream | None = None

    def begin(self, name: str) -> None:
        """The next tensor is ``name``."""
        if name in self._begins:
            self._close_file()
            self._open_file(*self._begins[name])

    def add(self, values: Tensor) -> None:
        """Its values, or the next of them in row-major order."""
        assert self._now is not None  # `begin` opened it
        flat = values.detach().contiguous().reshape(-1)
        step = max(1, _AT_ONCE // max(1, flat.element_size()))
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step].to("cpu")
            self._now.write(part.view(torch.uint8).numpy())

    def finish(self, others: Mapping[str, bytes]) -> None:
        """Write the index and ``others``, by name, then the checksums of all, and have all on the disk."""
        if not self._files[0][1]:
            self._open_file(*self._files[0])
        self._close_file()
        contents = dict(others)
        if len(self._files) > 1:
            where = {entry.name: file for file, group in self._files for entry in group}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            contents[INDEX] = json.dumps(index, indent=2).encode()
        for name, content in contents.items():
            with self._stream(name) as file:
                file.write(content)
        (self._folder / sums.SUMS).write_bytes(sums.dump(self._written))
        disk.sync(self._folder / sums.SUMS)
        disk.sync(self._folder)
        sums.check_sizes(self._folder, self._written)

    def close(self) -> None:
        """Let go of the file under way, after an error."""
        if self._now is not None:
            self._now.abandon()

    def _open_file(self, name: str, group: Sequence[Entry]) -> None:
        self._now = self._stream(name)
        self._now.write(header(group))

    def _close_file(self) -> None:
        now, self._now = self._now, None
        if now is not None:
            now.close()

    def _stream(self, name: str) -> Stream:
        def note(file: FileSum) -> None:
            self._written[name] = file

        return Stream(self._folder / name, note)


def header(entries: Sequence[Entry]) -> bytes:
    """Length and JSON before the data of a safetensors file; padded, so that the data begins at a multiple of 8."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        document[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_order(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Largest values first, so that every tensor lies at a multiple of its own size and can be mapped."""
    yield from sorted(entries, key=lambda entry: -entry.dtype.itemsize)

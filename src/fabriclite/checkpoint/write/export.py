"""Export of one module: a folder of safetensors files that ``from_pretrained`` opens. Never whole on one host."""

import copy
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fabriclite import module_state, shards
from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.formats import Safetensors
from fabriclite.checkpoint.parts import Part, taken
from fabriclite.checkpoint.write.safetensors_writer import Entry, SafetensorsWriter, in_order
from fabriclite.errors import ConfigError
from fabriclite.stretch import Stretch


@dataclass(frozen=True, slots=True)
class ExportContent:
    """One module, gathered tensor by tensor as it is written."""

    tensors: Mapping[str, Tensor | Stretch]
    others: Mapping[str, bytes]
    max_file_bytes: int

    @classmethod
    def take(cls, parts: Mapping[str, Part], filters: Mapping[str, Any], format: Any) -> "ExportContent":
        """Find what to write. Every rank must call this.

        Raises:
            ConfigError: there is not just one module, or it has state that is no tensor.
        """
        modules = {key: part.module() for key, part in parts.items()}
        [(key, module), *more] = [*modules.items(), ("", None)]
        if len(more) != 1 or module is None:
            raise ConfigError(
                f"`state` must hold one module alone to be exported, but holds {', '.join(parts) or 'nothing'}."
                " Write fabric.save(path, {'model': model}, format='safetensors')."
            )
        state = taken(key, parts[key], filters.get(key))
        odd = [
            name for name, value in state.items() if shards.is_extra(name) or not isinstance(value, Tensor | Stretch)
        ]
        if odd:
            raise ConfigError(
                f"What is exported must be tensors, but {odd[0]} is extra state. Leave it out:"
                f" filter={{{key!r}: lambda name, value: not name.endswith('_extra_state')}}."
            )
        twice = _names_to_leave_out(module, state)
        options = format if isinstance(format, Safetensors) else Safetensors()
        tensors = {name: value for name, value in state.items() if name not in twice}
        return cls(tensors, _documents(module, tensors), options.max_file_bytes)

    def write(self, crew: Crew, path: Path) -> None:
        """Write the folder. Every rank must call this."""
        writing = _Writing(self, path) if crew.world.is_global_zero else None
        for entry in in_order(self._entries()):
            value = shards.full(self.tensors[entry.name])  # all ranks go on, also when rank 0 cannot write any more
            if writing is not None:
                writing.add(entry.name, value)
        crew.on_rank_zero(lambda: None if writing is None else writing.finish(), f"write the export {path}")

    def _entries(self) -> list[Entry]:
        return [Entry(name, value.shape, value.dtype) for name, value in self.tensors.items()]


class _Writing:
    """Rank 0's side: keeps the first error for the end."""

    def __init__(self, content: ExportContent, path: Path) -> None:
        self._content = content
        self._error: BaseException | None = None
        self._writer: SafetensorsWriter | None = None
        try:
            path.mkdir()
            entries = list(in_order(content._entries()))
            self._writer = SafetensorsWriter(path, entries, content.max_file_bytes)
        except Exception as error:
            self._error = error

    def add(self, name: str, value: Tensor) -> None:
        if self._error is not None or self._writer is None:
            return
        try:
            self._writer.begin(name)
            self._writer.add(value)
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        try:
            if self._error is not None:
                raise self._error
            assert self._writer is not None  # else there is an error
            self._writer.finish(self._content.others)
        finally:
            if self._writer is not None:
                self._writer.close()


def _names_to_leave_out(module: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Of tied names all but one: the one that a Hugging Face model does not list as tied, else the first."""
    listed = [(f"{path}." if path else "", patterns) for path, patterns in _listed_as_tied(module)]

    def is_listed(name: str) -> bool:
        return any(
            name.startswith(prefix) and any(re.search(pattern, name.removeprefix(prefix)) for pattern in patterns)
            for prefix, patterns in listed
        )

    out: set[str] = set()
    for names in module_state.tied_names(module):
        present = [name for name in names if name in state]
        kept = next((name for name in present if not is_listed(name)), present[0] if present else None)
        out |= {name for name in present if name != kept}
    return out


def _listed_as_tied(module: nn.Module) -> list[tuple[str, list[str]]]:
    """Where in ``module`` Hugging Face models are, and the patterns of names in them that copy another's tensor."""
    found = ((path, getattr(sub, "_tied_weights_keys", None)) for path, sub in module.named_modules())
    return [(path, list(patterns)) for path, patterns in found if isinstance(patterns, dict | list | tuple)]


def _documents(module: nn.Module, tensors: Mapping[str, Tensor | Stretch]) -> dict[str, bytes]:
    """The configuration files of a Hugging Face model; nothing of another."""
    found: dict[str, bytes] = {}
    for attribute in ("config", "generation_config"):
        config: Any = getattr(module, attribute, None)
        if callable(getattr(config, "save_pretrained", None)):
            config = copy.deepcopy(config)
            if attribute == "config":
                config.architectures = [type(module).__name__.removeprefix("FSDP")]  # as `fully_shard` renames it
                dtypes = [value.dtype for value in tensors.values() if value.dtype.is_floating_point]
                if dtypes:  # else it says that of what was loaded once, and opens as that
                    config.dtype = str(dtypes[0]).removeprefix("torch.")
            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                found.update({file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()})
    return {name: content for name, content in found.items() if json.loads(content)}

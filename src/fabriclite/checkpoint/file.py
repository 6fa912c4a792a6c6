"""A checkpoint in one file: full tensors, written by rank 0, read by every rank through a memory map."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabriclite import optim_state
from fabriclite.checkpoint import place
from fabriclite.checkpoint.agree import on_rank_zero
from fabriclite.checkpoint.parts import OptimizerPart, Part, taken, whole
from fabriclite.errors import CheckpointError
from fabriclite.world import World


def save(world: World, path: Path, parts: Mapping[str, Part], filters: Mapping[str, Any], extra: Any) -> None:
    """Gather every part, one tensor at a time, and write one file beside ``path``, then rename it there."""
    content: dict[str, Any] = {}
    for key, part in parts.items():
        state = taken(key, part, filters.get(key))
        gather = optim_state.full_state if isinstance(part, OptimizerPart) else whole
        content[key] = gather(state, keep=world.is_global_zero)
    content.update(extra)

    def write() -> None:
        place.check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = place.beside(path)
        try:
            torch.save(content, beside)
            if path.is_dir():
                place.clear(path)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    on_rank_zero(world, write, f"write the checkpoint {path}")


def read(path: Path, weights_only: bool) -> dict[str, Any]:
    """The content of a checkpoint file. Tensors stay on disk until they are used.

    Raises:
        CheckpointError: it cannot be read, or holds objects that only code could restore.
    """
    try:
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=weights_only)
    except Exception as error:
        raise CheckpointError(f"{path} must be a readable checkpoint file, but {_reason(error, path)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, but holds {type(content).__name__}.")
    return content


def _reason(error: Exception, path: Path) -> str:
    """What torch found and how to mend it, less the advice it gives to every caller of ``torch.load``."""
    _, refused, text = str(error).rpartition("WeightsUnpickler error: ")
    text = text.strip().partition("\n")[0].rstrip(".")
    code = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    if code is not None or (refused and zipfile.is_zipfile(path)):  # the file is whole: only its content is refused
        return f"needs code to restore {code[1] if code else text}. Pass weights_only=False if you trust its author."
    return f"{type(error).__name__}: {text}. It was cut short or is of another kind: load another one."

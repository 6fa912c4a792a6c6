"""Checkpoints of any kind as one file, as a folder of shards, or as weights for Hugging Face's libraries.

Nothing is ever whole in memory: a tensor goes through in pieces, of which there is one at a time.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from fabriclite import shards
from fabriclite.checkpoint import disk, place
from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.formats import DEFAULT_MAX_BYTES, FORMATS, Format, Safetensors
from fabriclite.checkpoint.read import kinds
from fabriclite.checkpoint.read.kinds import Found, Progress, Tally
from fabriclite.checkpoint.write import recast
from fabriclite.checkpoint.write.targets import ExportTarget, FileTarget, FolderTarget, Target
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.world import World

DEFAULT_KEY: Final = "model"
"""The entry of a folder that weights alone become."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What :func:`convert` wrote.

    Attributes:
        path: of the result.
        nbytes: of its tensors.
        left_out: names of what the format has no place for: extra state, in an export.
    """

    path: Path
    nbytes: int
    left_out: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    max_file_bytes: int | None = None,
    overwrite: bool = False,
    weights_only: bool = True,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint of any kind in another form. The source is compared with its checksums, and stays.

    One process does this alone. If it is killed, ``target`` is absent, or what it was before.

    Args:
        source: whatever :meth:`Fabric.load` or :meth:`Fabric.load_raw` reads.
        target: of the result. Its parent folders are made.
        to: ``"file"``: one file of torch with all that the source holds. ``"folder"``: shards, as FSDP saves them.
            ``"safetensors"``: the weights of one module, in a folder that ``from_pretrained`` opens.
        dtype: of the floating-point tensors of modules; ``None`` leaves them. Optimizers keep theirs.
        key: the module to write, to safetensors. Else, where the source is weights alone: the entry that they become;
            by default they stay weights alone in a file, and are ``"model"`` in a folder.
        max_file_bytes: of each file of safetensors.
        overwrite: replace a checkpoint at ``target``.
        weights_only: refuse objects that only code could restore.
        progress: told of the bytes that are compared, then of those that are written.

    Raises:
        ConfigError: the arguments contradict each other, or the format has no such dtype.
        CheckpointError: the source cannot be read or is damaged, or the target cannot be written.
    """
    where = disk.located(target)
    size = Safetensors(max_file_bytes=DEFAULT_MAX_BYTES if max_file_bytes is None else max_file_bytes).max_file_bytes
    _check(source, where, to, dtype, max_file_bytes, overwrite)
    kinds.located(source)  # before anything is made for the target
    crew = Crew(World())
    crew.on_all(lambda: place.prepare(where), f"write the checkpoint {where}")
    found, _ = kinds.verify(source, weights_only, progress)
    plan = _planned(_cast(found, dtype), to, key, size, dtype)
    beside, tally = place.beside(where), Tally(plan.nbytes, progress)
    try:
        crew.on_all(lambda: plan.write(beside, tally.add), f"write the checkpoint {where}")
        crew.on_all(lambda: place.publish(beside, where), f"write the checkpoint {where}")
    finally:
        disk.remove(beside)  # if anything went wrong, Ctrl-C included
    return Converted(where, plan.nbytes, plan.left_out)


def _check(source: Any, target: Path, to: Any, dtype: Any, max_file_bytes: Any, overwrite: bool) -> None:
    if to not in FORMATS:
        raise ConfigError(f"`to` must be one of {', '.join(map(repr, FORMATS))}, but is {to!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype` must be a floating-point dtype, but is {dtype!r}. Example: torch.bfloat16.")
    if max_file_bytes is not None and to != "safetensors":
        raise ConfigError(f"`max_file_bytes` must be left out with to={to!r}, but is {max_file_bytes!r}.")
    origin = disk.located(source)
    if disk.is_local(origin) and disk.is_local(target) and origin.resolve() in target.resolve().parents:
        raise ConfigError(f"`target` must not be inside of the source {source}, but is {target}.")
    if not overwrite and (target.exists() or place.companion(target, "replaced").exists()):
        raise CheckpointError(
            f"{target} must be a new name, but exists. Choose another, or pass overwrite=True (--overwrite)."
        )


def _cast(found: Found, dtype: torch.dtype | None) -> Found:
    if dtype is None:
        return found
    change = recast.casting(dtype)
    names = set(found.tree if found.alone else kinds.modules(found.tree))
    tree = {
        name: recast.replaced(value, change) if name in names and not shards.is_extra(name) else value
        for name, value in found.tree.items()
    }
    return replace(found, tree=tree)


def _planned(found: Found, to: Format, key: str | None, max_file_bytes: int, dtype: torch.dtype | None) -> Target:
    if to == "safetensors":
        return ExportTarget.of(found, key, max_file_bytes, dtype)
    if key is not None and not found.alone:
        raise ConfigError(
            f"`key` must be left out where the source has entries ({', '.join(map(str, found.tree))}), but is {key!r}."
        )
    if to == "folder":
        return FolderTarget.of({key or DEFAULT_KEY: found.tree} if found.alone else found.tree)
    return FileTarget({key: found.tree} if key is not None else found.tree)

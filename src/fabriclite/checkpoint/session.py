"""Saving and loading as ``Fabric`` offers it: either form, any strategy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fabriclite import seed
from fabriclite.checkpoint import file, folder, place
from fabriclite.checkpoint.agree import on_all
from fabriclite.checkpoint.parts import ModulePart, OptimizerPart, Part
from fabriclite.collectives import gather_objects
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.strategy import Strategy
from fabriclite.world import World

EXTRA: Final = "fabriclite"
"""The entry that holds what belongs to the run: loss scale, random states."""
_VERSION: Final = 1


def save(strategy: Strategy, path: str | Path, parts: Mapping[str, Part], filters: Mapping[str, Any] | None) -> None:
    """Write a checkpoint: a folder of shards if the strategy shards, else one file. Every rank must call this.

    Raises:
        ConfigError: a filter names nothing that is saved.
        CheckpointError: it cannot be written; raised on every rank.
    """
    if filters is not None and not isinstance(filters, Mapping):
        raise ConfigError(
            f"`filter` must map keys of the state to functions (name, value) -> bool, but is {filters!r}."
            " Write filter={'model': keep}."
        )
    filters = dict(filters or {})
    unknown = [key for key in filters if key not in parts]
    if unknown or any(not callable(f) for f in filters.values()):
        raise ConfigError(
            f"`filter` must map keys of the state ({', '.join(parts)}) to functions (name, value) -> bool, but is"
            f" {filters!r}."
        )
    if EXTRA in parts:
        raise ConfigError(f"`state` must not have the key {EXTRA!r}, which is fabriclite's own, but has it. Rename it.")
    states = gather_objects(strategy.world, seed.rng_state())
    extra = {EXTRA: {"version": _VERSION, "scaler": strategy.scaler.state_dict(), "rng": states}}
    write = folder.save if strategy.sharded_checkpoint else file.save
    write(strategy.world, Path(path), parts, filters, extra)


def load(
    strategy: Strategy, path: str | Path, parts: Mapping[str, Part] | None, strict: bool, weights_only: bool
) -> dict[str, Any]:
    """Read a checkpoint of either form into ``parts``. Every rank must call this.

    With an optimizer among the parts, the run goes on: loss scale and random states are put back too.

    Returns:
        What the checkpoint holds beyond ``parts``, less what is sharded there; without ``parts`` all, tensors whole.

    Raises:
        CheckpointError: it cannot be read, or does not fit; raised on every rank.
    """
    path = Path(path)
    content = _read(strategy.world, path, weights_only, whole=parts is None)
    if parts is None:
        return {key: value for key, value in content.items() if key != EXTRA}
    missing = [key for key in parts if key not in content]
    if missing and strict:
        raise CheckpointError(
            f"{path} must hold {', '.join(parts)}, but lacks {', '.join(missing)}. It holds:"
            f" {', '.join(k for k in content if k != EXTRA)}. Pass strict=False to load what is there."
        )
    # Modules first: an optimizer may hold master weights, which a module's would round.
    found = {key: part for key, part in parts.items() if key not in missing}
    for key, part in sorted(found.items(), key=lambda item: not isinstance(item[1], ModulePart)):
        if path.is_dir() and isinstance(part, ModulePart | OptimizerPart):
            folder.load_part(path, key, part, content[key], strict)
        else:
            part.load(content[key], strict)
    if any(isinstance(part, OptimizerPart) for part in parts.values()):
        _resume(strategy, content.get(EXTRA, {}))
    others = [key for key in content if key not in parts and key != EXTRA]
    sharded = folder.has_shards(path, others) if path.is_dir() else set()
    return {key: content[key] for key in others if key not in sharded}


def _read(world: World, path: Path, weights_only: bool, whole: bool) -> dict[str, Any]:
    """What the checkpoint holds; of a folder's sharded entries the tensors only if ``whole``."""
    content: dict[str, Any] = {}

    def act() -> None:
        if not path.exists():
            raise CheckpointError(f"{path} must be a checkpoint, but does not exist.")
        if path.is_dir() and not place.is_folder(path):
            raise CheckpointError(f"{path} must be a checkpoint folder, but lacks {place.META} or .metadata.")
        read = file.read if path.is_file() else folder.read_rest
        content.update(read(path, weights_only))

    on_all(world, act, f"read {path}")
    return folder.read_whole(path, content) if whole and path.is_dir() else content


def _resume(strategy: Strategy, extra: Mapping[str, Any]) -> None:
    if extra.get("scaler"):
        strategy.scaler.load_state_dict(extra["scaler"])
    states = extra.get("rng", [])
    if len(states) == strategy.world.size:  # another number of ranks has no streams to go on with
        seed.set_rng_state(states[strategy.world.rank])


def load_raw(path: str | Path, part: Part, strict: bool, weights_only: bool) -> None:
    """Load a file that holds nothing but a state dict (``torch.save(model.state_dict(), path)``)."""
    path = Path(path)
    content: dict[str, Any] = {}

    def act() -> None:
        if not path.is_file():
            found = "is a folder. Read what fabric.save wrote with fabric.load" if path.is_dir() else "does not exist"
            raise CheckpointError(f"{path} must be a file with a state dict, but {found}.")
        content.update(file.read(path, weights_only))

    if isinstance(part, ModulePart | OptimizerPart):
        on_all(part.strategy.world, act, f"read {path}")
    else:
        act()  # loading what was not set up is nobody else's business
    part.load(content, strict)

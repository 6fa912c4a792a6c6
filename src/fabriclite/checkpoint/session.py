"""Saving as ``Fabric`` offers it: any form, any strategy, at once or beside the training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fabriclite import seed
from fabriclite.checkpoint import disk, place
from fabriclite.checkpoint.agree import Crew
from fabriclite.checkpoint.formats import FORMATS, OWN, VERSION, Format, Safetensors
from fabriclite.checkpoint.parts import Part
from fabriclite.checkpoint.saving import SaveHandle, Saver
from fabriclite.checkpoint.write.export import ExportContent
from fabriclite.checkpoint.write.file import FileContent
from fabriclite.checkpoint.write.folder import FolderContent
from fabriclite.collectives import gather_objects
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.strategy import Strategy


class Content(Protocol):
    """What is to be written, taken from the objects of the run."""

    def write(self, crew: Crew, path: Path) -> None:
        """Write it under a name that nothing has. Every rank must call this."""


@dataclass(frozen=True, slots=True)
class Order:
    """How a checkpoint is to be saved.

    Attributes:
        path: where.
        filters: by entry, what of it to keep.
        format: ``None`` is the strategy's own.
        keep_last: how many of the series to keep; ``None`` keeps all.
        asynchronous: whether the training goes on meanwhile.
    """

    path: Path
    filters: Mapping[str, Callable[[str, Any], bool]]
    format: Format | Safetensors | None
    keep_last: int | None
    asynchronous: bool

    def form(self, strategy: Strategy) -> Format:
        if isinstance(self.format, Safetensors):
            return "safetensors"
        if self.format is not None:
            return self.format
        return "folder" if strategy.sharded_checkpoint else "file"


def ordered(
    path: str | Path, filters: Any, format: Any, keep_last: Any, asynchronous: bool, parts: Mapping[str, Part]
) -> Order:
    """The arguments of ``fabric.save``, checked. Pure.

    Raises:
        ConfigError: one has no meaning, or two contradict each other.
    """
    where = disk.located(path)
    _check_filters(filters, parts)
    if OWN in parts:
        raise ConfigError(f"`state` must not have the key {OWN!r}, which is fabriclite's own, but has it. Rename it.")
    if format is not None and format not in FORMATS and not isinstance(format, Safetensors):
        raise ConfigError(f"`format` must be None, {', '.join(map(repr, FORMATS))}, but is {format!r}.")
    if keep_last is not None:
        if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
            raise ConfigError(f"`keep_last` must be a count of at least 1, but is {keep_last!r}.")
        if not any(character.isdigit() for character in where.name):
            raise ConfigError(
                f"`path` must have a number in its name to be one of a series, but is {str(path)!r}."
                " Write f'step-{step}', or leave out keep_last."
            )
    if asynchronous and (format == "safetensors" or isinstance(format, Safetensors)):
        raise ConfigError(
            "An export is gathered and written tensor by tensor, so `asynchronous` must be False with"
            " format='safetensors', but is True. Save a checkpoint, and convert it."
        )
    return Order(where, dict(filters or {}), format, keep_last, bool(asynchronous))


def _check_filters(filters: Any, parts: Mapping[str, Part]) -> None:
    if filters is not None and not isinstance(filters, Mapping):
        raise ConfigError(
            f"`filter` must map keys of the state to functions (name, value) -> bool, but is {filters!r}."
            " Write filter={'model': keep}."
        )
    unknown = [key for key in filters or {} if key not in parts]
    if unknown or any(not callable(f) for f in (filters or {}).values()):
        raise ConfigError(
            f"`filter` must map keys of the state ({', '.join(parts)}) to functions (name, value) -> bool, but is"
            f" {filters!r}."
        )


def save(strategy: Strategy, saver: Saver, parts: Mapping[str, Part], order: Order) -> SaveHandle | None:
    """Write a checkpoint. Every rank must call this.

    Returns:
        A handle, if it goes on beside the training.

    Raises:
        CheckpointError: this, or the asynchronous save before it, cannot be written; raised on every rank.
    """
    saver.wait()
    world = strategy.world
    crew = saver.crew(world) if order.asynchronous else Crew(world)
    path = order.path
    crew.on_rank_zero(lambda: place.prepare(path, linked=order.keep_last is not None), f"write the checkpoint {path}")
    content = _take(strategy, parts, order)
    if not order.asynchronous:
        _write(crew, content, order)
        return None
    return saver.start(path, lambda: _write(crew, content, order))


def _take(strategy: Strategy, parts: Mapping[str, Part], order: Order) -> Content:
    world, form = strategy.world, order.form(strategy)
    if form == "safetensors":
        return ExportContent.take(parts, order.filters, order.format)
    states = gather_objects(world, seed.rng_state())
    extra = {OWN: {"version": VERSION, "scaler": strategy.scaler.state_dict(), "rng": states}}
    kind = FolderContent if form == "folder" else FileContent
    return kind.take(world, parts, order.filters, extra, copied=order.asynchronous)


def _write(crew: Crew, content: Content, order: Order) -> None:
    """Write beside, then take the name; whatever fails, what was there before is still there."""
    path, beside = order.path, place.beside(order.path)
    try:
        content.write(crew, beside)
        crew.on_rank_zero(lambda: _publish(order), f"write the checkpoint {path}")
    except CheckpointError:  # on every rank, and none is writing any more
        if crew.world.is_global_zero:
            disk.remove(beside)
        raise


def _publish(order: Order) -> None:
    place.publish(place.beside(order.path), order.path)
    if order.keep_last is not None:
        place.point_latest(order.path)
        place.keep_newest(order.path, order.keep_last)

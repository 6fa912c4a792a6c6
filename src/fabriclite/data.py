"""Data loaders: which part of the data this rank reads, in which order, and on which device it arrives."""

import copy
import dataclasses
from collections.abc import Iterator, Sized
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fabriclite.callbacks import Callbacks
from fabriclite.collectives import broadcast
from fabriclite.data_passes import Reading, checked, parts_of, passes_of
from fabriclite.data_samplers import EpochSampler, ShardedSampler
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.launch.signals import shielded
from fabriclite.seed import worker_init
from fabriclite.world import World


def shard(loader: DataLoader[Any], replicas: int, index: int, seed: int) -> DataLoader[Any]:
    """A loader like ``loader`` that reads only part ``index`` of ``replicas``.

    What the user chose stays: a sampler or batch sampler of theirs is split, not replaced; one that is distributed
    already is kept as it is; iterable datasets are theirs to split. Sequential and shuffled loaders get an
    :class:`EpochSampler`, the others a :class:`ShardedSampler`, also for one replica: the order must not depend on the
    strategy, and ranks that share one replica (tensor parallel) must read the same.
    """
    if isinstance(loader.dataset, IterableDataset) or _is_distributed(loader):
        return loader
    custom_batches = loader.batch_sampler is not None and loader.batch_size is None
    own = loader.batch_sampler if custom_batches else loader.sampler
    plain = type(loader.sampler) is SequentialSampler or (
        type(loader.sampler) is RandomSampler and not loader.sampler.replacement and _takes_all(loader.sampler)
    )
    if replicas == 1 and not isinstance(own, Sized):
        return loader
    if custom_batches:
        return _again(loader, batch_sampler=ShardedSampler(own, replicas, index, seed, batches=True))
    if plain:
        _check_length(loader.dataset)
        sampler: Any = EpochSampler(
            loader.dataset,
            num_replicas=replicas,
            rank=index,
            shuffle=type(loader.sampler) is RandomSampler,
            seed=seed,
            drop_last=loader.drop_last,
        )
    else:
        sampler = ShardedSampler(loader.sampler, replicas, index, seed)
    if loader.batch_size is None:
        return _again(loader, sampler=sampler, batch_size=None)
    return _again(loader, sampler=sampler, batch_size=loader.batch_size, drop_last=loader.drop_last)


def _check_length(dataset: object) -> None:
    if not isinstance(dataset, Sized):
        raise ConfigError(
            f"The dataset of a data loader must have a length to be split over ranks, but {type(dataset).__name__} has"
            " none. Give it __len__, or make it an IterableDataset that splits itself."
        )


def _is_distributed(loader: DataLoader[Any]) -> bool:
    inner = getattr(loader.batch_sampler, "sampler", None)
    return any(
        isinstance(s, DistributedSampler | ShardedSampler) or (hasattr(s, "num_replicas") and hasattr(s, "rank"))
        for s in (loader.sampler, loader.batch_sampler, inner)
    )


def _takes_all(sampler: RandomSampler) -> bool:
    return sampler.num_samples == len(sampler.data_source)


_CARRIED: Final = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def _again(loader: DataLoader[Any], **choice: Any) -> DataLoader[Any]:
    """Build ``loader`` again with another sampler: the public attributes of a ``DataLoader`` are its arguments."""
    kwargs: dict[str, Any] = {name: getattr(loader, name) for name in _CARRIED if hasattr(loader, name)}
    if loader.num_workers > 0:
        kwargs["prefetch_factor"] = loader.prefetch_factor
    if not kwargs.get("pin_memory_device"):
        kwargs.pop("pin_memory_device", None)
    if type(loader) is DataLoader:
        return DataLoader(loader.dataset, **kwargs, **choice)
    try:
        return type(loader)(loader.dataset, **kwargs, **choice)
    except TypeError as error:
        raise ConfigError(
            f"A {type(loader).__name__} must accept DataLoader's arguments to be split over ranks, but does not:"
            f" {error}. Give it a DistributedSampler yourself and pass use_distributed_sampler=False."
        ) from error


def check_loader(loader: object) -> None:
    """Raise unless ``loader`` is a ``DataLoader`` that was not set up yet.

    Raises:
        ConfigError: it is something else.
        SetupOrderError: it was set up already.
    """
    if type(loader) is FabricDataLoader:
        raise SetupOrderError(
            "A data loader must be set up once, but this one was already. Use what setup_dataloaders returned."
        )
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"`dataloaders` must be DataLoader objects, but one is {type(loader).__name__}.")


def set_up(
    loader: DataLoader[Any],
    world: World,
    parts: tuple[int, int] | None,
    device: torch.device | None,
    callbacks: Callbacks,
) -> "FabricDataLoader":
    """The loader that this rank reads. Every rank must call this.

    Args:
        loader: as the user made it.
        world: the processes; rank 0's seed decides the order on all of them.
        parts: ``(replicas, index)`` of the data this rank reads; ``None`` leaves that to the user.
        device: where batches go; ``None`` leaves them where they are.
        callbacks: who is told of batches.
    """
    if parts is not None:
        generator = getattr(loader.sampler, "generator", None) or loader.generator
        own = torch.initial_seed() if generator is None else generator.initial_seed()
        loader = shard(loader, *parts, broadcast(world, own) % 2**32)
    init = worker_init(world.rank)
    if init is not None and loader.num_workers > 0 and loader.worker_init_fn is None:
        loader.worker_init_fn = init
    return FabricDataLoader(loader, device, world, callbacks)


class FabricDataLoader:
    """A data loader after ``setup_dataloaders``: the same batches, on this rank's device. Made by ``Fabric``.

    Its state is an exact place in the data, between the batches that were handed out and those that were not, whatever
    workers have read ahead. In another run, the first loop after loading it goes on there, without reading what came
    before; the passes after it are whole, and so is ``len(loader)``. The rules:

    - Until a new pass begins or ``set_epoch`` is called, the place is that of the last batch, also of a loop that was
      left in the middle. If it was the last batch of all, the loop that goes on is empty.
    - ``set_epoch`` with the epoch of the loaded place keeps it; any other begins that pass at its beginning.
    - Places are counted in samples over all replicas. With other ranks or another batch size the pass goes on with the
      very next sample and has new batches from there: no sample comes twice or is lost, but for those that fill up or
      are dropped at the end of a pass as in any other. Batches of a batch sampler stay as they are; only of one that
      was partly seen just the rest comes.
    - What you split yourself goes on in the order that its sampler gives. A sampler that draws from the random numbers
      of the process draws the same again, on the same number of ranks. Between passes its ``generator`` is yours.
    - Nothing can leave out batches of an ``IterableDataset``: they are read again, with the random numbers of then, on
      the same number of ranks. If it has ``state_dict`` and ``load_state_dict``, these are used instead when
      ``num_workers`` is 0, within a pass; a last batch that is short counts as the end of it.
    - The random numbers of the process are those of the run that never stopped, if the checkpoint restored them; those
      of workers are others. With ``in_order=False``, which batches came first is not known: their number counts.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | None,
        world: World | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._loader = loader
        self._callbacks = callbacks or Callbacks()
        self._device = device  # None: batches stay where they are
        self._passes = passes_of(loader, world or World())

    @property  # type: ignore[misc]  # what stands for an object answers isinstance as it would
    def __class__(self) -> type:
        return type(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._loader.num_workers > 0:
            self._loader.worker_init_fn = shielded(self._loader.worker_init_fn)
        return Reading(self._passes, self._asked, self._arrived)

    def _asked(self) -> None:
        self._callbacks.call("on_before_batch", loader=self)

    def _arrived(self, batch: Any) -> Any:
        if self._device is not None and self._device.type != "cpu":
            batch = to_device(batch, self._device)
        self._callbacks.call("on_after_batch", loader=self, batch=batch)
        return batch

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes next; it goes on from there by itself.

        Raises:
            ConfigError: neither sampler nor dataset knows epochs.
        """
        setters = [part.set_epoch for part in parts_of(self._loader) if hasattr(part, "set_epoch")]
        if not setters:
            raise ConfigError(
                "`set_epoch` must find a sampler or dataset that knows epochs, but neither has a set_epoch method."
            )
        for setter in setters:
            setter(epoch)
        self._passes.run = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what the loader itself would save, which then is its place.

        Every rank must call this where reading is left to you, as it is by an ``IterableDataset``.
        """
        own = getattr(self._loader, "state_dict", None)
        state = {**self._passes.state(), "loader": None if own is None else own()}
        return state if own is None else {**state, "seen": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the place that :meth:`state_dict` named.

        Raises:
            CheckpointError: ``state`` is none, or names a place that this loader's data does not have.
        """
        state = checked(state)
        place = self._passes.located(state)
        if state["epoch"] is not None:
            self.set_epoch(state["epoch"])
        self._passes.go_on(place, state["seed"])
        own = getattr(self._loader, "load_state_dict", None)
        if own is not None and state["loader"] is not None:
            own(state["loader"])

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: unpickling asks before __init__ ran
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_loader", "_device", "_passes", "_callbacks"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor (or anything with ``.to``) in a tree of dicts, lists, tuples and dataclasses."""

    def move(item: Any) -> Any:
        if not isinstance(item, _Movable):
            return _moved_fields(item, device)
        return item.to(device, non_blocking=device.type == "cuda") if isinstance(item, Tensor) else item.to(device)

    return apply_to_collection(batch, dtype=(_Movable, _Dataclass), function=move)


def _moved_fields(item: Any, device: torch.device) -> Any:
    """A dataclass, frozen or not, with moved fields; ``apply_to_collection`` itself refuses frozen ones."""
    if isinstance(item, type):
        return item
    moved = copy.copy(item)
    for field in dataclasses.fields(item):
        object.__setattr__(moved, field.name, to_device(getattr(item, field.name), device))
    return moved


@runtime_checkable
class _Movable(Protocol):
    """Tensors, and objects that can move themselves, such as tokenizers' batches."""

    def to(self, device: torch.device) -> Any: ...


@runtime_checkable
class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

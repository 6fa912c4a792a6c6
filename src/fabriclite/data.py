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
    Sampler,
    SequentialSampler,
)
from typing_extensions import override

from fabriclite.collectives import broadcast
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.seed import seeded, worker_init
from fabriclite.world import World


class EpochSampler(DistributedSampler[Any]):
    """Torch's ``DistributedSampler`` whose epoch goes on by itself.

    Each pass over the data shuffles anew; ``set_epoch(e)`` says which pass comes next, and it goes on from there. The
    order depends on seed, epoch and size alone, so every strategy reads the same.
    """

    @override
    def __iter__(self) -> Iterator[int]:
        order = super().__iter__()
        self.epoch += 1
        return iter(order)


class ShardedSampler(Sampler[Any]):
    """Every ``replicas``-th item of a user's sampler (indices or whole batches), starting at ``index``.

    All ranks must see the same items, so the sampler runs under random numbers of ``(seed, epoch)``: torch's, NumPy's
    and Python's own, and its own ``generator``. What they were before is put back. If the count does not divide, the
    first items are given again, so that all ranks take the same number of steps.
    """

    def __init__(self, sampler: Any, replicas: int, index: int, seed: int) -> None:
        self.sampler = sampler
        self.replicas = replicas
        self.index = index
        self.seed = seed
        self.epoch = 0
        if not isinstance(sampler, Sized):
            raise ConfigError(
                f"The sampler of a data loader must have a length to be split over {replicas} ranks, but"
                f" {type(sampler).__name__} has none. Split it yourself and pass use_distributed_sampler=False."
            )

    @override
    def __iter__(self) -> Iterator[Any]:
        with seeded(self.seed + self.epoch, *_generators(self.sampler)):
            items = list(self.sampler)
        self.epoch += 1
        short = -len(items) % self.replicas
        items += (items * (short // max(len(items), 1) + 1))[:short]
        return iter(items[self.index :: self.replicas])

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.replicas)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next."""
        self.epoch = epoch
        inner = getattr(self.sampler, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet: unpickling asks before __init__ ran
            raise AttributeError(name)
        return getattr(self.sampler, name)


def _generators(sampler: object) -> list[torch.Generator]:
    """Those of a sampler, and of the sampler that a batch sampler draws from."""
    owners = (sampler, getattr(sampler, "sampler", None))
    return [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]


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
        return _again(loader, batch_sampler=ShardedSampler(loader.batch_sampler, replicas, index, seed))
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
    loader: DataLoader[Any], world: World, parts: tuple[int, int] | None, device: torch.device | None
) -> "FabricDataLoader":
    """The loader that this rank reads. Every rank must call this.

    Args:
        loader: as the user made it.
        world: the processes; rank 0's seed decides the order on all of them.
        parts: ``(replicas, index)`` of the data this rank reads; ``None`` leaves that to the user.
        device: where batches go; ``None`` leaves them where they are.
    """
    if parts is not None:
        generator = getattr(loader.sampler, "generator", None) or loader.generator
        own = torch.initial_seed() if generator is None else generator.initial_seed()
        loader = shard(loader, *parts, broadcast(world, own) % 2**32)
    init = worker_init(world.rank)
    if init is not None and loader.num_workers > 0 and loader.worker_init_fn is None:
        loader.worker_init_fn = init
    return FabricDataLoader(loader, device)


class FabricDataLoader:
    """A data loader after ``setup_dataloaders``: the same batches, on this rank's device. Made by ``Fabric``."""

    def __init__(self, loader: DataLoader[Any], device: torch.device | None) -> None:
        self._loader = loader
        self._device = device  # None: batches stay where they are

    @property  # type: ignore[misc]  # what stands for an object answers isinstance as it would
    def __class__(self) -> type:
        return type(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._device is None or self._device.type == "cpu":
            return iter(self._loader)
        return (to_device(batch, self._device) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes next; it goes on from there by itself.

        Raises:
            ConfigError: neither sampler nor dataset knows epochs.
        """
        found = False
        batches = self._loader.batch_sampler
        for part in (self._loader.sampler, batches, getattr(batches, "sampler", None), self._loader.dataset):
            setter = getattr(part, "set_epoch", None)
            if setter is not None:
                setter(epoch)
                found = True
        if not found:
            raise ConfigError(
                "`set_epoch` must find a sampler or dataset that knows epochs, but neither has a set_epoch method."
            )

    def state_dict(self) -> dict[str, Any]:
        """Which pass comes next, and what the loader itself would save. Save it after a pass, not within one."""
        own = getattr(self._loader, "state_dict", None)
        return {"epoch": getattr(self._epochs(), "epoch", None), "loader": None if own is None else own()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the pass that :meth:`state_dict` named."""
        if state["epoch"] is not None:
            self.set_epoch(state["epoch"])
        own = getattr(self._loader, "load_state_dict", None)
        if own is not None and state["loader"] is not None:
            own(state["loader"])

    def _epochs(self) -> Any:
        """The sampler that counts passes; ``None`` where none does."""
        batches = self._loader.batch_sampler
        candidates = (self._loader.sampler, batches, getattr(batches, "sampler", None))
        return next((s for s in candidates if hasattr(s, "set_epoch")), None)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: unpickling asks before __init__ ran
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_loader", "_device"):
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

"""Samplers of every kind of loader, and places within a pass where they can begin.

A place is counted in samples over all replicas, so that another number of ranks can go on from it.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler
from typing_extensions import override

from fabriclite._torch import tree_leaves
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.seed import host_rng_state, seeded, set_rng_state


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the data.

    Attributes:
        epoch: which pass; ``None`` where nothing counts them.
        seen: samples of it that were handed out, over all replicas.
        own: what only this rank knows: the random numbers that its order came from, the state of its dataset.
    """

    epoch: int | None
    seen: int
    own: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Pass:
    """A pass that has begun. ``epoch``, ``seen`` and ``own`` are those of a :class:`Place`.

    Attributes:
        sizes: samples of a batch and those beside it on other replicas: of every batch, or of the next ones in turn.
        end: samples there are; the last batch may be short.
    """

    epoch: int | None
    seen: int
    own: Mapping[str, Any] | None = None
    sizes: int | deque[int] = 0
    end: int = sys.maxsize

    def hand_out(self) -> None:
        """Count one batch."""
        if isinstance(self.sizes, int):
            self.seen += self.sizes
        elif self.sizes:
            self.seen += self.sizes.popleft()
        self.seen = min(self.seen, self.end)


class Placed:
    """What can begin a pass in its middle.

    Attributes:
        place: where the next pass goes on, if it is of the same epoch.
        begun: the newest pass.
        step: items of a sampler that make a batch.
    """

    place: Place | None = None
    begun: Pass | None = None
    step: int = 1

    @property
    def total(self) -> int | None:
        """Samples in a pass, where that is known before."""
        return None

    def goes_on(self, epoch: int | None) -> Place | None:
        """The place where the next pass goes on; ``None`` if it begins at its beginning."""
        return self.place if self.place is not None and self.place.epoch == epoch else None

    def take(self, epoch: int | None) -> Place | None:
        """:meth:`goes_on`, for the pass that begins now: those after it are whole."""
        place = self.goes_on(epoch)
        self.place = None
        return place


def after(items: Iterator[Any], seen: int, size: Callable[[Any], int], all_told: bool = False) -> Iterator[Any]:
    """``items`` without the first ``seen`` samples. Of a batch that holds seen and unseen samples, those are left.

    Raises:
        CheckpointError: there are not as many, unless ``all_told``: then the others were dropped at the end.
    """
    rest = seen
    for item in items:
        if rest < size(item) or rest == 0:
            return chain([list(item)[rest:] if rest else item], items)
        rest -= size(item)
    if rest and not all_told:
        raise beyond(seen, seen - rest)
    return iter(())


def dealt(rest: list[Any], order: list[Any], replicas: int, index: int, drop_last: bool = False) -> list[Any]:
    """Every ``replicas``-th of ``rest``, as many for all: the end is cut, or filled up from the start of ``order``."""
    over = len(rest) % replicas
    if over and not drop_last:
        return [*rest, *islice(cycle(order), replicas - over)][index::replicas]
    return rest[index : len(rest) - over : replicas]


def generators_of(parts: Iterable[object]) -> list[torch.Generator]:
    """Those that samplers draw from."""
    return [g for g in (getattr(part, "generator", None) for part in parts) if isinstance(g, torch.Generator)]


def epoch_of(parts: Iterable[object]) -> int | None:
    """Which pass comes next, says the first that can be told; ``None`` if nothing counts passes."""
    counter = next((part for part in parts if hasattr(part, "set_epoch")), None)
    epoch = getattr(counter, "epoch", None)
    return epoch if isinstance(epoch, int) else None


def drawing(generators: list[torch.Generator]) -> dict[str, Any]:
    """Where the random numbers of the host and ``generators`` stand."""
    return {"host": host_rng_state(), "generators": [generator.get_state() for generator in generators]}


@contextmanager
def drawing_again(state: Mapping[str, Any] | None, generators: list[torch.Generator]) -> Iterator[None]:
    """Draw as from ``state``. What the host's were before is put back after; ``generators`` go on from there.

    The host's random numbers belong to the whole run, which has gone on since; a generator to its sampler alone.
    """
    if state is None:
        yield
        return
    before = host_rng_state()
    set_rng_state(state["host"])
    for generator, own in zip(generators, state["generators"], strict=False):
        generator.set_state(own)
    try:
        yield
    finally:
        set_rng_state(before)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


class EpochSampler(Placed, DistributedSampler[Any]):
    """Torch's ``DistributedSampler`` whose epoch goes on by itself.

    Each pass over the data shuffles anew; ``set_epoch(e)`` says which pass comes next, and it goes on from there. The
    order depends on seed, epoch and size alone, so every strategy reads the same.
    """

    @override
    def __iter__(self) -> Iterator[int]:
        yield from self._begin()  # no sooner than the first is asked for: torch makes iterators that it does not use

    def _begin(self) -> list[int]:
        place = self.take(self.epoch) or Place(self.epoch, 0)
        whole: DistributedSampler[Any] = DistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, seed=self.seed
        )
        whole.set_epoch(self.epoch)
        order = list(whole)
        self.begun = Pass(self.epoch, place.seen, sizes=self.step * self.num_replicas, end=len(order))
        self.epoch += 1
        rest = order[place.seen :] if place.seen else order
        return dealt(rest, order, self.num_replicas, self.rank, self.drop_last)

    @property
    def total(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # a Dataset need not have a length, but this one has


class ShardedSampler(Placed, Sampler[Any]):
    """Every ``replicas``-th item of a user's sampler (indices or whole batches), starting at ``index``.

    All ranks must see the same items, so the sampler runs under random numbers of ``(seed, epoch)``: torch's, NumPy's
    and Python's own, and its own ``generator``. What they were before is put back. If the count does not divide, the
    first items are given again, so that all ranks take the same number of steps.
    """

    def __init__(self, sampler: Any, replicas: int, index: int, seed: int, batches: bool = False) -> None:
        self.sampler = sampler
        self.replicas = replicas
        self.index = index
        self.seed = seed
        self.batches = batches
        self.epoch = 0
        if not isinstance(sampler, Sized):
            raise ConfigError(
                f"The sampler of a data loader must have a length to be split over {replicas} ranks, but"
                f" {type(sampler).__name__} has none. Split it yourself and pass use_distributed_sampler=False."
            )

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from self._begin()

    def _begin(self) -> list[Any]:
        place = self.take(self.epoch) or Place(self.epoch, 0)
        with seeded(self.seed + self.epoch, *generators_of((self.sampler, getattr(self.sampler, "sampler", None)))):
            order = list(self.sampler)
        if self.batches:
            rest = list(after(iter(order), place.seen, len))
            counts = [len(batch) for batch in rest]
            sizes = deque(sum(counts[i : i + self.replicas]) for i in range(0, len(counts), self.replicas))
            self.begun = Pass(self.epoch, place.seen, sizes=sizes)
        else:
            rest = order[place.seen :]
            self.begun = Pass(self.epoch, place.seen, sizes=self.step * self.replicas, end=len(order))
        self.epoch += 1
        return dealt(rest, order, self.replicas, self.index)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.replicas)

    @property
    def total(self) -> int | None:
        return None if self.batches else len(self.sampler)

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


class KeptSampler(Placed, Sampler[Any]):
    """A sampler that was left as its user made it, counted, and begun in the middle where a run goes on there.

    It stands in the place of what gives a loader its batches of indices (or single ones), and looks like it. If the
    order comes from random numbers of the process, the same are drawn again.
    """

    def __init__(self, inner: Any, batches: bool, dataset: object) -> None:
        self.inner = inner
        self.batches = batches
        self.parts = (inner, getattr(inner, "sampler", None))
        self.counters = (*self.parts, dataset)
        self.split = next((p for p in self.parts if hasattr(p, "num_replicas") and hasattr(p, "rank")), None)
        self.replicas: int | None = getattr(self.split, "num_replicas", None)  # None: nothing tells

    @override
    def __iter__(self) -> Iterator[Any]:
        self.begun, items = self._begin()
        sizes = self.begun.sizes = deque[int]()
        for item in items:
            sizes.append(self._size(item) * (self.replicas or 1))
            yield item

    def _begin(self) -> tuple[Pass, Iterator[Any]]:
        epoch, total = epoch_of(self.counters), self.total
        place = self.take(epoch) or Place(epoch, 0)
        seen = sys.maxsize if place.seen == total else place.seen // (self.replicas or 1)
        generators = generators_of(self.parts)
        before = drawing(generators)
        with drawing_again(place.own, generators):
            items = after(iter(self.inner), seen, self._size, all_told=total is not None)
        own = place.own
        if own is None and not _same(before, drawing(generators)):  # the order comes from what stood there
            own = before
        return Pass(epoch, place.seen, own, end=sys.maxsize if total is None else total), items

    @property
    def total(self) -> int | None:
        if isinstance(self.split, DistributedSampler):
            return len(self.split.dataset)  # type: ignore[arg-type]  # such a sampler took its length, too
        single = self.parts[1] if type(self.inner) is BatchSampler else None if self.batches else self.inner
        return len(single) * (self.replicas or 1) if isinstance(single, Sized) else None

    def _size(self, item: Any) -> int:
        return len(item) if self.batches else 1

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: unpickling asks before __init__ ran
            raise AttributeError(name)
        return getattr(self.inner, name)


def beyond(seen: int, total: int) -> CheckpointError:
    return CheckpointError(
        f"`seen` of a data loader's state must be at most {total}, the samples of a pass, but is {seen}. Load it for"
        " the data that it was saved for."
    )

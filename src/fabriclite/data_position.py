"""Places within a pass over data, and samplers that begin there.

A place is counted in samples over all replicas, so that another number of ranks can go on from it.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from typing_extensions import override

from fabriclite._torch import tree_leaves
from fabriclite.errors import CheckpointError
from fabriclite.seed import host_rng_state, set_rng_state


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
            self.seen = min(self.seen + self.sizes, self.end)
        elif self.sizes:
            self.seen += self.sizes.popleft()


class Placed:
    """What can begin a pass in its middle.

    Attributes:
        place: where the next pass goes on, if it is of the same epoch.
        begun: the newest pass.
        step: items of a sampler that make a batch.
        replicas: how many read beside each other; ``None`` where that is not known.
    """

    place: Place | None = None
    begun: Pass | None = None
    step: int = 1
    replicas: int | None = None

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


def after(items: Iterator[Any], seen: int, size: Callable[[Any], int]) -> Iterator[Any]:
    """``items`` without the first ``seen`` samples. Of a batch that holds seen and unseen samples, those are left."""
    rest = seen
    for item in items:
        if rest < size(item) or rest == 0:
            return chain([list(item)[rest:] if rest else item], items)
        rest -= size(item)
    if rest:
        raise beyond(seen, seen - rest)
    return iter(())


def dealt(rest: Sequence[Any], order: Sequence[Any], replicas: int, index: int, drop_last: bool = False) -> list[Any]:
    """Every ``replicas``-th of ``rest``, as many for all: the end is dropped, or filled up with the first of ``order``."""
    over = len(rest) % replicas
    if drop_last:
        return list(rest[index : len(rest) - over : replicas])
    return list(chain(rest, islice(cycle(order), -len(rest) % replicas)))[index::replicas]


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
        split = next((part for part in self.parts if hasattr(part, "num_replicas") and hasattr(part, "rank")), None)
        self.replicas = getattr(split, "num_replicas", None)

    @override
    def __iter__(self) -> Iterator[Any]:
        self.begun, items = self._begin()
        sizes = self.begun.sizes = deque[int]()
        for item in items:
            sizes.append(self._size(item) * (self.replicas or 1))
            yield item

    def _begin(self) -> tuple[Pass, Iterator[Any]]:
        epoch = epoch_of(self.counters)
        place = self.take(epoch) or Place(epoch, 0)
        generators = generators_of(self.parts)
        before = drawing(generators)
        with drawing_again(place.own, generators):
            items = after(iter(self.inner), place.seen // (self.replicas or 1), self._size)
        own = place.own
        if own is None and not _same(before, drawing(generators)):  # the order comes from what stood there
            own = before
        return Pass(epoch, place.seen, own), items

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
        f"`seen` of a data loader's state must be at most {total}, the samples of a pass, but is {seen}. Load it for the"
        " data that it was saved for."
    )

"""The passes over a loader: begun, counted as they are handed out, saved, and gone on with in another run."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from fabriclite.collectives import gather_objects
from fabriclite.data_samplers import KeptSampler, Pass, Place, Placed, beyond, drawing, drawing_again, epoch_of
from fabriclite.errors import CheckpointError
from fabriclite.seed import host_rng_state, seeded, set_rng_state
from fabriclite.world import World

_KEYS: Final = ["epoch", "kind", "loader", "ranks", "seed", "seen"]
_OLD_KEYS: Final = ["epoch", "loader"]
"""Of a state that names only the pass that comes next."""
_RETURNED: Final = "Load what its state_dict() returned."
_FIRST: Final = "first"
_NOTHING: Final = object()


def parts_of(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """What may count the passes over a loader."""
    batches = loader.batch_sampler
    return (loader.sampler, batches, getattr(batches, "sampler", None), loader.dataset)


class Passes:
    """The passes over a loader that fabriclite splits: the newest, and the place where the next goes on.

    Attributes:
        run: the newest pass until it ends.
    """

    kind: ClassVar[str] = "split"

    def __init__(self, loader: DataLoader[Any], world: World, sampler: Placed) -> None:
        self.loader = loader
        self.world = world
        self.sampler = sampler
        self.run: Pass | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """What the loader draws its workers' seeds from, if not from the random numbers of the process."""
        return [] if self.loader.generator is None else [self.loader.generator]

    def begin(self) -> tuple[Iterator[Any], Pass]:
        """Begin a pass. The sampler may begin it later, and says then, in ``sampler.begun``, what it is."""
        epoch = epoch_of(parts_of(self.loader))
        place = self.sampler.goes_on(epoch)
        if place is None:
            return iter(self.loader), Pass(epoch, 0)
        with self.seeds_drawn_before(place):
            return iter(self.loader), Pass(epoch, place.seen, place.own)

    @contextmanager
    def seeds_drawn_before(self, place: Place) -> Iterator[None]:
        """The seed that a loader draws for its workers was drawn when the pass first began: not once more.

        Theirs is another one all the same, or they would use the random numbers of the pass's beginning again.
        """
        seed = random.Random(f"{torch.initial_seed()}/{place.epoch}/{place.seen}").getrandbits(63)
        with seeded(seed, *([] if place.own else self.generators)):
            yield

    def now(self) -> Place | None:
        """Where the newest pass is; ``None`` before and between passes."""
        if self.run is not None:
            return Place(self.run.epoch, self.run.seen, self.run.own)
        return self.sampler.goes_on(epoch_of(parts_of(self.loader)))

    def state(self) -> dict[str, Any]:
        """Which pass, and where in it. Every rank must call this, unless fabriclite splits the data."""
        place = self.now()
        return {
            "kind": self.kind,
            "epoch": epoch_of(parts_of(self.loader)) if place is None else place.epoch,
            "seen": None if place is None else place.seen,
            **self.order(None if place is None else place.own),
        }

    def order(self, own: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the order of a pass comes from, besides its number."""
        return {"seed": getattr(self.sampler, "seed", None), "ranks": None}

    def located(self, state: Mapping[str, Any]) -> Place | None:
        """Where in this loader the place of a state is; ``None`` if that is between passes. Changes nothing.

        Raises:
            CheckpointError: nowhere.
        """
        epoch, seen, total = state["epoch"], state["seen"], self.sampler.total
        if seen is None:
            return None
        if state["kind"] != self.kind:
            raise CheckpointError(
                f"A data loader must be read as the saved one was ({state['kind']}) to go on within a pass, but is"
                f" {self.kind}. Use the same dataset, sampler and use_distributed_sampler."
            )
        if (epoch is None) != (epoch_of(parts_of(self.loader)) is None):
            raise CheckpointError(
                "A data loader must count its passes, as the saved one did, or neither must, but only one of them does."
                " Use the same dataset and sampler."
            )
        if total is not None and seen > total:
            raise beyond(seen, total)
        own = self.own_of(state["ranks"])
        unit = self.unit(own)
        if seen % unit and seen != total:
            raise CheckpointError(
                f"`seen` of a data loader's state must be a multiple of {unit} to go on in data that you split, but is"
                f" {seen}. Use the batch size and the ranks that it was saved with."
            )
        return Place(epoch, seen, own)

    def own_of(self, ranks: Any) -> Mapping[str, Any] | None:
        """Of what every rank saved, this one's."""
        return None

    def unit(self, own: Mapping[str, Any] | None) -> int:
        """What a place must be a multiple of."""
        return 1

    def go_on(self, place: Place | None, seed: int | None) -> None:
        """Go on at ``place``; the order is that of the run which saved it, whatever seed this one began with."""
        self.run = None
        self.sampler.place = place
        if seed is not None and hasattr(self.sampler, "seed"):
            self.sampler.seed = seed


class KeptPasses(Passes):
    """The passes over a loader that was left as it is."""

    kind = "kept"

    @property
    def replicas(self) -> int | None:
        """How many read beside this one, where its sampler tells."""
        return getattr(self.sampler, "replicas", None)

    @override
    def order(self, own: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"seed": None, "ranks": gather_objects(self.world, own)}

    @override
    def own_of(self, ranks: Any) -> Mapping[str, Any] | None:
        if not isinstance(ranks, list) or any(not isinstance(own, Mapping | None) for own in ranks):
            raise CheckpointError(
                f"`ranks` of a data loader's state must be a list of what each rank knew, but is {type(ranks).__name__}"
                f" of another kind. {_RETURNED}"
            )
        if len(ranks) == self.world.size:
            own: Mapping[str, Any] | None = ranks[self.world.rank]
            return own
        if self.replicas is None or any(own is not None for own in ranks):
            raise CheckpointError(
                f"A place in data that you split must be loaded on as many ranks as saved it, {len(ranks)}, but there"
                f" are {self.world.size}. Start {len(ranks)}, or leave the loader out and begin a new pass."
            )
        return None

    @override
    def unit(self, own: Mapping[str, Any] | None) -> int:
        return self.replicas or 1


class StreamPasses(KeptPasses):
    """The passes over an ``IterableDataset``. Nothing gives indices: to go on, batches are read and thrown away.

    Meanwhile the random numbers of the pass's beginning are drawn again, also by workers. A dataset that has
    ``state_dict`` and ``load_state_dict``, and is read in this process (``num_workers=0``), goes on by itself.
    """

    kind = "stream"

    def __init__(self, loader: DataLoader[Any], world: World) -> None:
        super().__init__(loader, world, Placed())
        self.each = (loader.batch_size or 1) * world.size
        both = hasattr(loader.dataset, "state_dict") and hasattr(loader.dataset, "load_state_dict")
        self.dataset: Any = loader.dataset if both and loader.num_workers == 0 else None

    @override
    def begin(self) -> tuple[Iterator[Any], Pass]:
        epoch = epoch_of(parts_of(self.loader))
        place = self.sampler.take(epoch) or Place(epoch, 0)
        own = dict(place.own or drawing(self.generators))
        self.sampler.begun = run = Pass(epoch, place.seen, own, self.each)
        if place.own is None:
            inner: Iterator[Any] = iter(self.loader)
        elif self._goes_on_itself(own):
            self.dataset.load_state_dict(own["dataset"])
            with self.seeds_drawn_before(place):
                inner = iter(self.loader)
        else:
            inner = self._read_again(run.seen, own)
        here = self.loader.num_workers == 0
        return _noting(inner, own) if here and _FIRST not in own else inner, run

    def _read_again(self, seen: int, own: Mapping[str, Any]) -> Iterator[Any]:
        with drawing_again(own, self.generators):
            inner = iter(self.loader)
            if _FIRST in own:
                set_rng_state(own[_FIRST])
            for count in range(seen // self.each):
                if next(inner, _NOTHING) is _NOTHING:
                    raise beyond(seen, count * self.each)
        return inner

    @override
    def now(self) -> Place | None:
        place = super().now()
        if self.run is None or self.dataset is None or place is None:
            return place
        return replace(place, own={**(place.own or {}), "dataset": copy.deepcopy(self.dataset.state_dict())})

    @override
    def own_of(self, ranks: Any) -> Mapping[str, Any] | None:
        own = super().own_of(ranks)
        if own is None:
            raise CheckpointError(
                "`ranks` of a data loader's state must tell where the stream of this rank is, but does not."
                f" {_RETURNED}"
            )
        return own

    @override
    def unit(self, own: Mapping[str, Any] | None) -> int:
        return 1 if self._goes_on_itself(own) else self.each

    def _goes_on_itself(self, own: Mapping[str, Any] | None) -> bool:
        return self.dataset is not None and own is not None and "dataset" in own


def _noting(inner: Iterator[Any], own: dict[str, Any]) -> Iterator[Any]:
    """``inner``; where random numbers stand at its first batch, when most datasets begin to draw, is put in ``own``."""
    own[_FIRST] = host_rng_state()
    yield from inner


class Reading(Iterator[Any]):
    """One pass, handed out and counted batch by batch."""

    def __init__(self, passes: Passes, asked: Callable[[], None], move: Callable[[Any], Any]) -> None:
        self._passes = passes
        self._asked = asked
        self._move = move
        self._before = passes.sampler.begun
        self._inner, self._run = passes.begin()
        passes.run = self._run
        self._known = self._follow()

    def _follow(self) -> bool:
        """Count as the sampler says, once it has begun: with workers that is at once, else with the first batch."""
        begun = self._passes.sampler.begun
        if begun is None or begun is self._before:
            return False
        self._now_is(begun)
        return True

    def _now_is(self, run: Pass | None) -> None:
        if self._passes.run is self._run:  # no newer pass has begun
            self._passes.run = run
        self._run = run or self._run

    def _learn(self) -> None:
        """With the first batch in hand, the sampler has begun. A loader that never asks it cannot be counted."""
        self._known = True
        if self._follow():
            return
        if self._run.seen:
            raise CheckpointError(
                f"A {type(self._passes.loader).__name__} must read by its sampler to go on within a pass, but does not."
                " Call set_epoch to begin a new one."
            )
        self._now_is(None)

    @override
    def __next__(self) -> Any:
        self._asked()
        try:
            batch = next(self._inner)
        except StopIteration:
            self._now_is(None)
            raise
        if not self._known:
            self._learn()
        batch = self._move(batch)
        self._run.hand_out()
        return batch


def passes_of(loader: DataLoader[Any], world: World) -> Passes:
    """How the passes over a loader are counted. A sampler that is not fabriclite's is put into one that is."""
    if isinstance(loader.dataset, IterableDataset):
        return StreamPasses(loader, world)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    ours = loader.sampler if isinstance(loader.sampler, Placed) else getattr(loader, name)
    if not isinstance(ours, Placed):
        ours = KeptSampler(ours, loader.batch_sampler is not None, loader.dataset)
        if not hasattr(loader, "state_dict"):  # else it keeps its place itself, and may look at its sampler for that
            # Setting the attribute is refused, as another sampler would contradict the batch size. This one does not.
            vars(loader)[name] = ours
    if isinstance(ours, KeptSampler):
        return KeptPasses(loader, world, ours)
    ours.step = loader.batch_size or 1
    return Passes(loader, world, ours)


def checked(state: Any) -> dict[str, Any]:
    """A loader's state, complete: what an older one lacks is ``None``.

    Raises:
        CheckpointError: it is none.
    """
    keys = sorted(map(str, state)) if isinstance(state, Mapping) else None
    if keys not in (_KEYS, _OLD_KEYS):
        found = f"is {type(state).__name__}" if keys is None else f"holds {', '.join(keys) or 'nothing'}"
        raise CheckpointError(f"The state of a data loader must hold {', '.join(_KEYS)}, but {found}. {_RETURNED}")
    for name in ("epoch", "seed", "seen"):
        number = state.get(name)
        if number is None or (
            isinstance(number, int) and not isinstance(number, bool) and (number >= 0 or name == "epoch")
        ):
            continue
        raise CheckpointError(
            f"`{name}` of a data loader's state must be None or a count, but is {number!r}. {_RETURNED}"
        )
    return {**dict.fromkeys(_KEYS), **state}

"""Data loaders: every data-parallel rank reads its part, in an order that depends on nothing but seed and epoch."""

import copy
import multiprocessing as mp
import pickle
import random
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabriclite import CheckpointError, Fabric, LaunchError
from fabriclite.collectives import gather_objects
from fabriclite.data import FabricDataLoader, shard, to_device
from fabriclite.data_samplers import EpochSampler, ShardedSampler
from fabriclite.seed import host_rng_state, set_rng_state
from worlds import run

META = torch.device("meta")
WORLDS = [("single_device", 1, 1), ("ddp", 2, 2), ("fsdp", 2, 2), ("tp", 2, 1), ("tp", 4, 2)]
"""Strategy, world size, into how many parts the data goes."""

# -- what users have ---------------------------------------------------------------------------------------------------


class Shuffled(Sampler[int]):
    """A sampler that draws from Python's or NumPy's own random numbers."""

    def __init__(self, length: int, source: str) -> None:
        self.length = length
        self.source = source

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        if self.source == "python":
            random.shuffle(order)
            return iter(order)
        return iter(np.random.permutation(order).tolist())

    def __len__(self) -> int:
        return self.length


class Buckets(Sampler[list[int]]):
    """Batches of neighbours, of different sizes, in random order."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]]
        return iter([batches[i] for i in torch.randperm(4).tolist()])

    def __len__(self) -> int:
        return 4


class Aware(Sampler[int]):
    """Splits by itself, without being torch's class."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        self.num_replicas = num_replicas
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 16, self.num_replicas))

    def __len__(self) -> int:
        return 16 // self.num_replicas


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class OwnLoader(DataLoader[Any]):
    """A subclass with an argument of its own, that it can do without."""

    def __init__(self, *args: Any, factor: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def __iter__(self) -> Any:
        return (batch * self.factor for batch in super().__iter__())


def one() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def listed(loader: Any) -> list[Any]:
    """The batches, as lists of integers."""
    return [batch.tolist() for batch in loader]


# -- who reads what ----------------------------------------------------------------------------------------------------


def loaders(rank: int) -> dict[str, tuple[DataLoader[Any], bool]]:
    """Loaders by name, and whether each rank of a strategy reads a part of it."""
    generator = torch.Generator().manual_seed(50 + rank)
    weights = torch.arange(1.0, 17.0)
    data, odd = range(16), range(17)
    mine = DistributedSampler(odd, num_replicas=3, rank=rank % 3, shuffle=False)
    return {
        "in order": (DataLoader(data, batch_size=2), True),
        "shuffled": (DataLoader(data, batch_size=2, shuffle=True), True),
        "own generator": (DataLoader(data, batch_size=2, shuffle=True, generator=generator), True),
        "no batches": (DataLoader(torch.arange(16), batch_size=None, shuffle=True), True),
        "weighted": (DataLoader(data, batch_size=2, sampler=WeightedRandomSampler(weights, 12)), True),
        "weighted, own generator": (
            DataLoader(data, batch_size=2, sampler=WeightedRandomSampler(weights, 12, generator=generator)),
            True,
        ),
        "with replacement": (DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=10)), True),
        "subset": (DataLoader(data, sampler=SubsetRandomSampler([1, 3, 5, 7])), True),
        "python's": (DataLoader(data, batch_size=4, sampler=Shuffled(16, "python")), True),
        "numpy's": (DataLoader(data, batch_size=4, sampler=Shuffled(16, "numpy")), True),
        "buckets": (DataLoader(data, batch_sampler=Buckets()), True),
        "torch's batches": (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)), True),
        "distributed": (DataLoader(odd, batch_size=2, sampler=mine), False),
        "distributed batches": (DataLoader(odd, batch_sampler=BatchSampler(mine, 2, False)), False),
        "aware": (DataLoader(data, batch_size=2, sampler=Aware(4, rank)), False),
        "stream": (DataLoader(Stream(), batch_size=4), False),
    }


def host_numbers() -> list[Any]:
    """Where Python's and NumPy's random numbers stand. Torch's move with every pass over any loader."""
    return [random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]]


def read(fabric: Fabric) -> list[dict[str, Any]]:
    """Of every rank: three passes over each loader, then the third again on a new loader."""
    torch.manual_seed(1000 + fabric.global_rank)
    random.seed(fabric.global_rank)
    np.random.seed(fabric.global_rank)
    found: dict[str, Any] = {"index": fabric._running.sampler_shard()}
    again = {name: fabric.setup_dataloaders(loader) for name, (loader, _) in loaders(fabric.global_rank).items()}
    for name, (loader, divided) in loaders(fabric.global_rank).items():
        ready = fabric.setup_dataloaders(loader)
        before = host_numbers()
        passes = [listed(ready) for _ in range(3)]
        untouched = before == host_numbers()
        resumed, length = None, None
        if divided:
            length = len(ready)
            torch.rand(fabric.global_rank)  # whatever was drawn meanwhile
            again[name].set_epoch(2)
            resumed = listed(again[name])
        found[name] = (passes, resumed, length, untouched)
    plain = DataLoader(range(16), batch_size=2)
    left_alone = fabric.setup_dataloaders(plain, use_distributed_sampler=False)
    found["left alone"] = (listed(left_alone), left_alone.sampler is plain.sampler)
    return gather_objects(fabric._ready_world, found)


@cache
def outcome(strategy: str, world: int) -> list[dict[str, Any]] | str:
    try:
        result: list[dict[str, Any]] = run(read, strategy, world)
    except LaunchError as error:  # kept, or every test would start the failing world again
        return str(error)
    return result


def readings(strategy: str, world: int) -> list[dict[str, Any]]:
    result = outcome(strategy, world)
    assert not isinstance(result, str), result
    return result


def woven(parts: list[list[Any]]) -> list[Any]:
    """One of each in turn."""
    return [item for step in zip(*parts, strict=True) for item in step]


def flat(batches: list[Any]) -> list[int]:
    return [item for batch in batches for item in (batch if isinstance(batch, list) else [batch])]


DIVIDED = [name for name, (_, divided) in loaders(0).items() if divided]
BATCHED = ("buckets", "torch's batches")
"""Those that are split by whole batches."""


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize(("strategy", "world", "replicas"), WORLDS)
def test_parts_make_the_whole(strategy: str, world: int, replicas: int, name: str) -> None:
    """Together the parts are what one process reads, in its order; ranks that share a part read the same."""
    ranks = readings(strategy, world)
    assert {facts["index"][0] for facts in ranks} == {replicas}
    by_index: dict[int, Any] = {}
    for facts in ranks:
        passes, resumed, length, _ = facts[name]
        assert by_index.setdefault(facts["index"][1], passes) == passes
        assert resumed == passes[2], "a resumed run goes on in the order of that epoch"
        assert length == len(passes[0])
    whole = readings("single_device", 1)[0][name][0]
    for epoch in range(3):
        parts = [by_index[i][epoch] for i in range(replicas)]
        joined = woven(parts) if name in BATCHED else woven([flat(part) for part in parts])
        assert joined == (whole[epoch] if name in BATCHED else flat(whole[epoch]))
    assert (whole[0] == whole[1]) == (name == "in order"), "the order changes by itself"


@pytest.mark.parametrize("name", ["in order", "shuffled", "no batches", "python's", "numpy's", *BATCHED])
def test_nothing_is_lost_or_doubled(name: str) -> None:
    items = 10 if name == "buckets" else 16
    for batches in readings("single_device", 1)[0][name][0]:
        assert sorted(flat(batches)) == list(range(items))


@pytest.mark.parametrize(("strategy", "world", "replicas"), WORLDS)
def test_what_is_split_already_is_kept(strategy: str, world: int, replicas: int) -> None:
    for rank, facts in enumerate(readings(strategy, world)):
        mine = list(range(rank % 3, 17, 3)) + ([0] if rank % 3 == 2 else [])
        for name in ("distributed", "distributed batches"):
            assert [flat(batches) for batches in facts[name][0]] == [mine] * 3
        assert flat(facts["aware"][0][0]) == list(range(rank % 4, 16, 4))
        assert facts["stream"][0] == [[[0, 1, 2, 3], [4, 5]]] * 3
        assert facts["left alone"] == ([[2 * i, 2 * i + 1] for i in range(8)], True)


@pytest.mark.parametrize(("strategy", "world", "replicas"), WORLDS)
def test_random_numbers_are_left_as_they_were(strategy: str, world: int, replicas: int) -> None:
    for facts in readings(strategy, world):
        assert [name for name in DIVIDED if not facts[name][3]] == []


def test_set_epoch_is_respected() -> None:
    """Peers row 12: the user's epoch counts, and goes on from there."""
    fabric = one()
    fabric.seed_everything(7)
    straight = fabric.setup_dataloaders(DataLoader(range(16), shuffle=True))
    orders = [listed(straight) for _ in range(5)]
    assert len({str(order) for order in orders}) == 5
    fabric.seed_everything(7)
    loader = fabric.setup_dataloaders(DataLoader(range(16), shuffle=True))
    for epoch in (3, 1, 1, 4):
        loader.set_epoch(epoch)
        assert listed(loader) == orders[epoch]
    loader.set_epoch(2)
    assert [listed(loader) for _ in range(3)] == orders[2:]
    fabric.seed_everything(8)
    other = fabric.setup_dataloaders(DataLoader(range(16), shuffle=True))
    assert listed(other) != orders[0]


def test_epoch_reaches_sampler_and_dataset_of_the_user() -> None:
    class Told(Dataset[int]):
        def __init__(self) -> None:
            self.epoch = -1

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return 10 * self.epoch + index

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Told()
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = one().setup_dataloaders(DataLoader(data, batch_size=4, sampler=sampler))
    loader.set_epoch(3)
    assert (data.epoch, sampler.epoch) == (3, 3)
    assert sorted(listed(loader)[0]) == [30, 31, 32, 33]


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last(drop_last: bool) -> None:
    loader = one().setup_dataloaders(DataLoader(range(11), batch_size=4, drop_last=drop_last))
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert listed(loader) == expected[: len(loader)]
    assert len(loader) == (2 if drop_last else 3)


def odd_ends(fabric: Fabric) -> list[Any]:
    """17 samples on two ranks."""
    found = {}
    for drop_last in (False, True):
        loader = fabric.setup_dataloaders(DataLoader(range(17), batch_size=3, drop_last=drop_last))
        found[drop_last] = (listed(loader), len(loader))
    return gather_objects(fabric._ready_world, found)


def test_ends_that_do_not_divide() -> None:
    zero, one_ = run(odd_ends, "ddp", 2)
    assert zero[False] == ([[0, 2, 4], [6, 8, 10], [12, 14, 16]], 3)
    assert one_[False] == ([[1, 3, 5], [7, 9, 11], [13, 15, 0]], 3)
    assert zero[True] == ([[0, 2, 4], [6, 8, 10]], 2)
    assert one_[True] == ([[1, 3, 5], [7, 9, 11]], 2)


# -- samplers, by property ---------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 60)
REPLICAS = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(LENGTHS, REPLICAS, st.booleans(), st.booleans(), SEEDS, st.integers(0, 50))
def test_epoch_samplers_share_the_data(
    length: int, replicas: int, drop_last: bool, shuffle: bool, seed: int, epoch: int
) -> None:
    samplers = [
        EpochSampler(range(length), replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        for rank in range(replicas)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [list(sampler) for sampler in samplers]
    check_parts(parts, list(range(length)), drop_last)
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]
    following = [list(sampler) for sampler in samplers]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert [list(sampler) for sampler in samplers] == parts
    assert [list(sampler) for sampler in samplers] == following


@settings(deadline=None)
@given(st.integers(0, 60), REPLICAS, SEEDS, st.booleans())
def test_sharded_samplers_share_the_items(length: int, replicas: int, seed: int, own: bool) -> None:
    items = list(range(length))
    samplers = []
    for rank in range(replicas):
        generator = torch.Generator().manual_seed(rank) if own else None
        samplers.append(ShardedSampler(SubsetRandomSampler(items, generator=generator), replicas, rank, seed))
    parts = []
    for rank, sampler in enumerate(samplers):
        torch.manual_seed(rank)
        parts.append(list(sampler))
    check_parts(parts, items, drop_last=False)
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]


def check_parts(parts: list[list[int]], items: list[int], drop_last: bool) -> None:
    """Equally long; together everything, but for less than one item a rank that is lost or doubled."""
    assert len({len(part) for part in parts}) == 1
    counts = Counter(item for part in parts for item in part)
    doubled = sum(counts.values()) - len(counts)
    lost = len(items) - len(counts)
    assert set(counts) <= set(items)
    assert (lost == len(items) % len(parts)) if drop_last else (lost == 0)
    assert doubled == (0 if drop_last else -len(items) % len(parts))
    assert max(counts.values(), default=1) - min(counts.values(), default=1) <= 1, "padding goes round evenly"


# -- workers -----------------------------------------------------------------------------------------------------------


class Draws(Dataset[list[float]]):
    """What each item's worker draws, from each of the three sources."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]


def collate(items: list[Any]) -> list[Any]:
    return items


def draw(fabric: Fabric) -> list[Any]:
    """Per rank, by `workers`: two passes; each item is read by the worker of its number."""
    found = {}
    for workers in (False, True):
        fabric.seed_everything(3, workers=workers)
        loader = DataLoader(Draws(), num_workers=2, collate_fn=collate)
        loader = fabric.setup_dataloaders(loader)
        found[workers] = [[batch[0] for batch in loader] for _ in range(2)]
    return gather_objects(fabric._ready_world, found)


def test_worker_streams() -> None:
    """Told apart by rank, worker and epoch where `workers=True` asks for it; by worker and epoch where not."""
    zero, one_ = run(draw, "ddp", 2)
    assert zero[False] == one_[False]
    streams = [
        (workers, source, rank, epoch, worker, facts[workers][epoch][worker][source])
        for rank, facts in enumerate((zero, one_))
        for workers in (False, True)
        for source in range(3)
        for epoch in range(2)
        for worker in range(2)
    ]
    assert len({value for workers, *_, value in streams if workers}) == 3 * 2 * 2 * 2
    assert len({value for workers, *_, value in streams if not workers}) == 3 * 2 * 2
    assert zero == run(draw, "ddp", 2)[0], "the same again"


def test_worker_init_of_the_user_is_kept() -> None:
    fabric = one()
    loader = DataLoader(range(4), num_workers=1, worker_init_fn=print)
    try:
        fabric.seed_everything(1, workers=True)
        assert fabric.setup_dataloaders(loader).worker_init_fn is print
        seeded = fabric.setup_dataloaders(DataLoader(range(4), num_workers=1))
        assert seeded.worker_init_fn is not None
    finally:
        fabric.seed_everything(1)
    assert fabric.setup_dataloaders(DataLoader(range(4), num_workers=1)).worker_init_fn is None


# -- what stays --------------------------------------------------------------------------------------------------------


def test_arguments_are_carried() -> None:
    choice: dict[str, Any] = {
        "batch_size": 3,
        "num_workers": 1,
        "collate_fn": collate,
        "drop_last": True,
        "pin_memory": True,
        "timeout": 60.0,
        "worker_init_fn": collate,
        "multiprocessing_context": mp.get_context("forkserver"),
        "generator": torch.Generator().manual_seed(4),
        "prefetch_factor": 5,
        "persistent_workers": True,
        "in_order": False,
    }
    data = list(range(9))
    loader = one().setup_dataloaders(DataLoader(data, shuffle=True, **choice))
    assert {name: getattr(loader, name) for name in choice} == choice
    assert loader.dataset is data


def test_persistent_workers_live_on() -> None:
    loader = one().setup_dataloaders(DataLoader(range(8), num_workers=1, persistent_workers=True, shuffle=True))
    orders = [flat(listed(loader)) for _ in range(3)]
    assert len({str(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(8)) for order in orders)
    loader.set_epoch(1)
    assert flat(listed(loader)) == orders[1]


def test_subclass() -> None:
    loader = one().setup_dataloaders(OwnLoader(range(4), batch_size=2))
    assert isinstance(loader, OwnLoader)
    assert listed(loader) == [[0, 2], [4, 6]]
    assert loader.factor == 2


def test_looks_like_its_loader() -> None:
    fabric = one()
    first, second = fabric.setup_dataloaders(DataLoader(range(7), batch_size=2), DataLoader(Stream(), batch_size=6))
    assert isinstance(first, DataLoader)
    assert isinstance(second, DataLoader)
    assert (len(first), first.batch_size, first.drop_last) == (4, 2, False)
    assert listed(second) == [[0, 1, 2, 3, 4, 5]]
    first.note = "mine"
    assert first.note == "mine"
    with pytest.raises(AttributeError, match="nothing"):
        _ = first.nothing
    iterator = iter(first)
    assert next(iterator).tolist() == [0, 1]
    assert next(iter(first)).tolist() == [0, 1], "two passes at once"
    assert next(iterator).tolist() == [2, 3]


# -- onto the device ---------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    name: str
    inner: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    inner: Any


class Encoding:
    """As tokenizers give: knows how to move itself."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> "Encoding":
        return Encoding(str(device))


def test_trees_are_moved() -> None:
    def t() -> Tensor:
        return torch.ones(2, dtype=torch.float64)

    record, frozen = Record(t(), "a", [t()]), Frozen(t(), Frozen(t(), None))
    tree = {"d": {"t": t(), "n": None}, "l": [t(), 1], "u": (t(), "s"), "p": Pair(t(), 2.5), "e": Encoding()}
    moved = to_device({**tree, "r": record, "f": frozen}, META)
    tensors = [moved["d"]["t"], moved["l"][0], moved["u"][0], moved["p"].x]
    tensors += [moved["r"].x, moved["r"].inner[0], moved["f"].x, moved["f"].inner.x]
    assert all(item.device == META and item.dtype == torch.float64 and item.shape == (2,) for item in tensors)
    assert (moved["d"]["n"], moved["l"][1], moved["u"][1], moved["p"].y) == (None, 1, "s", 2.5)
    assert (type(moved["p"]), type(moved["u"]), type(moved["r"]), type(moved["f"])) == (Pair, tuple, Record, Frozen)
    assert (moved["r"].name, moved["f"].inner.inner, moved["e"].device) == ("a", None, "meta")
    for untouched in (record.x, record.inner[0], frozen.x, frozen.inner.x, tree["d"]["t"]):  # type: ignore[index]
        assert untouched.device.type == "cpu"
    assert to_device("text", META) == "text"
    assert to_device(Record, META) is Record


def test_loader_moves_its_batches() -> None:
    data = [{"x": torch.ones(3), "y": i} for i in range(4)]
    loader = FabricDataLoader(DataLoader(data, batch_size=2), META)
    batches = list(loader)
    assert [batch["x"].device for batch in batches] == [META, META]
    assert [batch["y"].shape for batch in batches] == [(2,), (2,)]
    still = FabricDataLoader(DataLoader(data, batch_size=2), None)
    assert next(iter(still))["x"].device.type == "cpu"


# -- going on within a pass --------------------------------------------------------------------------------------------


class Seen(Dataset[int]):
    """Numbers, and which of them were read, in this process."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Uneven(Sampler[list[int]]):
    """Batches of the given sizes, in an order of their own each pass."""

    def __init__(self, sizes: list[int]) -> None:
        ends = np.cumsum(sizes).tolist()
        self.batches = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])

    def __len__(self) -> int:
        return len(self.batches)


def rank_loader(loader: DataLoader[Any], replicas: int = 1, index: int = 0, seed: int = 0) -> Any:
    """What a rank gets from ``setup_dataloaders``, without the other ranks."""
    return FabricDataLoader(shard(loader, replicas, index, seed), None)


def taken(loader: Any, batches: int) -> list[Any]:
    """The first batches of a loop that is then left."""
    return [as_lists(batch) for batch in islice(iter(loader), batches)]


def as_lists(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, Tensor) else batch


def by_step(ranks: list[list[Any]]) -> list[list[int]]:
    """What all ranks read in each step, as one global batch."""
    return [sorted(flat(list(step))) for step in zip(*ranks, strict=True)]


SETUPS = st.tuples(st.integers(1, 4), st.integers(1, 5))
"""Replicas, batch size."""


@settings(deadline=None)
@given(st.integers(1, 60), SETUPS, SETUPS, st.booleans(), st.booleans(), st.integers(0, 9), st.data())
def test_another_set_up_goes_on_with_the_next_sample(
    length: int,
    saved: tuple[int, int],
    loaded: tuple[int, int],
    drop_last: bool,
    shuffle: bool,
    epoch: int,
    draw: st.DataObject,
) -> None:
    def loaders_of(setup: tuple[int, int], seed: int) -> list[Any]:
        def plain() -> DataLoader[Any]:
            return DataLoader(Seen(length), batch_size=setup[1], shuffle=shuffle, drop_last=drop_last)

        return [rank_loader(plain(), setup[0], rank, seed) for rank in range(setup[0])]

    straight, whole = loaders_of(saved, 7), loaders_of(loaded, 7)
    for loader in (*straight, *whole):
        loader.set_epoch(epoch)
    stop = draw.draw(st.integers(0, len(straight[0])), "stop")
    before = [taken(loader, stop) for loader in straight]
    states = [loader.state_dict() for loader in straight]
    assert all(state == states[0] for state in states), "whichever rank saves"

    resumed = loaders_of(loaded, 8)
    for loader in resumed:
        loader.load_state_dict(states[0])
        assert loader.state_dict() == states[0]
    parts = [listed(loader) for loader in resumed]
    straight_steps, whole_steps = by_step(before), by_step([listed(loader) for loader in whole])
    steps = by_step(parts)
    if stop == 0:
        assert steps == whole_steps
    elif saved[0] * saved[1] == loaded[0] * loaded[1] and (saved[0] == loaded[0] or drop_last):
        assert straight_steps + steps == whole_steps, "the run that never stopped"
    counts = Counter(flat(straight_steps) + flat(steps))
    doubled, lost = sum(counts.values()) - len(counts), length - len(counts)
    assert doubled <= (0 if drop_last else saved[0] - 1 + loaded[0] - 1)
    assert lost < (loaded[0] * loaded[1] + loaded[0] if drop_last else 1)
    for loader, part in zip(resumed, parts, strict=True):
        assert sorted(loader.dataset.read) == sorted(flat(part)), "nothing else is read"
        assert len(loader) == len(whole[0])
    assert [listed(loader) for loader in resumed] == [listed(loader) for loader in whole], "the next pass is whole"


@settings(deadline=None)
@given(
    st.integers(1, 80),
    st.lists(st.tuples(SETUPS, st.integers(0, 6)), min_size=2, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_any_number_of_restarts(
    length: int, runs: list[tuple[tuple[int, int], int]], shuffle: bool, drop_last: bool
) -> None:
    """Run after run, each with ranks and batches of its own, stopped after some steps, until the pass is through."""
    seen: list[int] = []
    state: Any = None
    left, fill = False, 0
    for number, ((replicas, batch), steps) in enumerate((*runs, ((2, 2), length))):
        plain = [
            DataLoader(Seen(length), batch_size=batch, shuffle=shuffle, drop_last=drop_last) for _ in range(replicas)
        ]
        loaders = [rank_loader(loader, replicas, rank, number) for rank, loader in enumerate(plain)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        parts = [taken(loader, steps) for loader in loaders]
        seen += flat([flat(list(step)) for step in zip(*parts, strict=True)])
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states), "whichever rank saves"
        state, fill = states[0], max(fill, replicas - 1)
        if state["epoch"] != 0 or state["seen"] == length:
            left = True
            break
    counts = Counter(seen)
    if drop_last:
        assert max(counts.values(), default=1) == 1
        most = max(replicas * (batch + 1) for (replicas, batch), _ in (*runs, ((2, 2), 0)))
        assert length - len(counts) < most
    else:
        assert left
        assert set(counts) == set(range(length)), "none lost"
        assert sum(counts.values()) - length <= fill, "none twice, but for what fills up the last batch of all"


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 3), st.data())
def test_batch_samplers_go_on(sizes: list[int], saved: int, loaded: int, draw: st.DataObject) -> None:
    def loaders_of(replicas: int) -> list[Any]:
        plain = [DataLoader(Seen(sum(sizes)), batch_sampler=Uneven(sizes)) for _ in range(replicas)]
        return [rank_loader(loader, replicas, rank, 7) for rank, loader in enumerate(plain)]

    straight = loaders_of(saved)
    wholes = [listed(loader) for loader in straight]
    for loader in straight:
        loader.set_epoch(0)
    stop = draw.draw(st.integers(0, len(wholes[0])), "stop")
    before = [taken(loader, stop) for loader in straight]
    resumed = loaders_of(loaded)
    for loader in resumed:
        loader.load_state_dict(straight[0].state_dict())
    parts = [listed(loader) for loader in resumed]
    if saved == loaded:
        assert [a + b for a, b in zip(before, parts, strict=True)] == wholes
    counts = Counter(flat(flat(before)) + flat(flat(parts)))
    assert set(counts) == set(range(sum(sizes)))
    assert sum(counts.values()) - len(counts) <= max(sizes) * (saved + loaded - 2), "only what fills up the last step"
    for loader, part in zip(resumed, parts, strict=True):
        assert sorted(loader.dataset.read) == sorted(flat(part))


def test_a_batch_that_was_partly_seen() -> None:
    """Two ranks with batches of 3 stop after 6; one rank with batches of 4 has the rest of its second one."""
    data = Seen(16)
    saved = rank_loader(DataLoader(data, batch_sampler=BatchSampler(range(16), 3, False)), 2, 0)
    taken(saved, 1)
    resumed = rank_loader(DataLoader(data, batch_sampler=BatchSampler(range(16), 4, False)))
    resumed.load_state_dict(saved.state_dict())
    assert listed(resumed) == [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    indices = rank_loader(DataLoader(data, batch_size=4))
    indices.load_state_dict(saved.state_dict())
    assert listed(indices) == [[6, 7, 8, 9], [10, 11, 12, 13], [14, 15]]


@settings(deadline=None)
@given(st.integers(1, 40), SETUPS, SETUPS, st.booleans(), st.booleans(), st.data())
def test_a_distributed_sampler_of_the_user_goes_on(
    length: int, saved: tuple[int, int], loaded: tuple[int, int], drop_last: bool, batched: bool, draw: st.DataObject
) -> None:
    def loader_of(replicas: int, batch: int, rank: int) -> Any:
        data = Seen(length)
        own = DistributedSampler(data, replicas, rank, seed=3)
        if batched:
            return rank_loader(DataLoader(data, batch_sampler=BatchSampler(own, batch, drop_last)))
        return rank_loader(DataLoader(data, batch, sampler=own, drop_last=drop_last))

    straight, resumed = ([loader_of(*setup, rank) for rank in range(setup[0])] for setup in (saved, loaded))
    for loader in straight:
        loader.set_epoch(2)
    wholes = [listed(loader) for loader in straight]
    stop = draw.draw(st.integers(0, len(straight[0])), "stop")
    for loader in straight:
        loader.set_epoch(2)
    before = [taken(loader, stop) for loader in straight]
    state = straight[0].state_dict()
    if state["seen"] not in (None, length) and state["seen"] % loaded[0]:
        with pytest.raises(CheckpointError, match="must be a multiple of"):
            resumed[0].load_state_dict(state)
        return
    for loader in resumed:
        loader.load_state_dict(state)
    parts = [listed(loader) for loader in resumed]
    if saved == loaded:
        assert [a + b for a, b in zip(before, parts, strict=True)] == wholes
    if not drop_last:
        assert set(flat(flat(before)) + flat(flat(parts))) == set(range(length))
    for loader, part in zip(resumed, parts, strict=True):
        assert sorted(loader.dataset.read) == sorted(flat(part))


class Endless(Sampler[int]):
    """Has no length, and no end."""

    def __iter__(self) -> Iterator[int]:
        return (i % 12 for i in count())


class DrawnStream(IterableDataset[int]):
    """Its order comes from the random numbers of the process or worker."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(14).tolist()


class OwnState(IterableDataset[int]):
    """Goes on by itself, and counts what it gave."""

    def __init__(self) -> None:
        self.at = 0
        self.given = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 16:
            self.at += 1
            self.given += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def left_alone(**workers: Any) -> dict[str, DataLoader[Any]]:
    """Loaders by name that no rank's part is taken of."""
    data, generator = range(16), torch.Generator().manual_seed(9)
    return {
        "shuffled": DataLoader(data, batch_size=3, shuffle=True, **workers),
        "own generator": DataLoader(data, batch_size=3, shuffle=True, generator=generator, **workers),
        "python's": DataLoader(data, batch_size=3, sampler=Shuffled(16, "python"), **workers),
        "numpy's": DataLoader(data, batch_size=3, sampler=Shuffled(16, "numpy"), **workers),
        "buckets": DataLoader(data, batch_sampler=Buckets(), **workers),
        "no batches": DataLoader(torch.arange(16), batch_size=None, shuffle=True, **workers),
        "endless": DataLoader(data, batch_size=5, sampler=Endless(), **workers),
        "drawn stream": DataLoader(DrawnStream(), batch_size=4, **workers),
        "own state": DataLoader(OwnState(), batch_size=4, **workers),
    }


def draws() -> list[float]:
    """Where all random numbers of the process stand, by what comes next."""
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def trained(batches: Any, limit: int) -> list[Any]:
    """What a run sees, drawing random numbers as a model does."""
    return [(as_lists(batch), draws()) for batch in islice(batches, limit)]


def fresh(make: Callable[[], DataLoader[Any]], alone: bool, seed: int) -> Any:
    Fabric(accelerator="cpu", devices=1).seed_everything(seed)
    return FabricDataLoader(make() if alone else shard(make(), 1, 0, seed), None)


def check_goes_on(make: Callable[[], DataLoader[Any]], alone: bool, stop: int) -> None:
    """A run that stops in its second pass, and is taken up in a new process, and the run that never stopped."""
    straight = fresh(make, alone, 1)
    length = len(trained(straight, 20))
    stop = min(stop, length)
    run = iter(straight)
    trained(run, stop)
    state, numbers = straight.state_dict(), host_rng_state()
    expected = [trained(run, length - stop), next(run, None) is None, trained(straight, length)]

    resumed = fresh(make, alone, 2)
    resumed.load_state_dict(state)
    set_rng_state(numbers)
    run = iter(resumed)
    part = trained(run, 1 if stop < length else 0)
    again, numbers = resumed.state_dict(), host_rng_state()
    rest = trained(run, length - stop - len(part))
    assert [part + rest, next(run, None) is None, trained(resumed, length)] == expected

    twice = fresh(make, alone, 3)
    twice.load_state_dict(again)
    set_rng_state(numbers)
    run = iter(twice)
    rest = trained(run, length - stop - len(part))
    assert [part + rest, next(run, None) is None, trained(twice, length)] == expected, "stopped again"


@pytest.mark.parametrize("stop", [0, 1, 3, 100])
@pytest.mark.parametrize("name", [*DIVIDED, "distributed", "distributed batches", "aware", "stream"])
def test_every_loader_goes_on(name: str, stop: int) -> None:
    check_goes_on(lambda: loaders(0)[name][0], False, stop)


@pytest.mark.parametrize("stop", [1, 3, 100])
@pytest.mark.parametrize("name", left_alone())
def test_what_was_left_alone_goes_on(name: str, stop: int) -> None:
    check_goes_on(lambda: left_alone()[name], True, stop)


@pytest.mark.parametrize(
    ("name", "persistent", "own"),
    [
        ("shuffled", True, False),
        ("no batches", True, False),
        ("buckets", False, True),
        ("own generator", False, True),
        ("drawn stream", False, True),
    ],
)
def test_workers_read_ahead_and_are_not_counted(name: str, persistent: bool, own: bool) -> None:
    workers = {"num_workers": 2, "persistent_workers": persistent}
    check_goes_on(lambda: left_alone(**workers)[name], own, 2)


@pytest.mark.parametrize("name", ["shuffled", "no batches", "buckets"])
def test_workers_read_the_same_order(name: str) -> None:
    straight, ahead = (rank_loader(left_alone(num_workers=workers)[name]) for workers in (0, 1))
    assert [listed(straight) for _ in range(2)] == [listed(ahead) for _ in range(2)]


def plain(seed: int = 0) -> Any:
    return rank_loader(DataLoader(Seen(10), batch_size=3, shuffle=True), seed=seed)


def test_a_loader_says_which_pass_comes_next() -> None:
    straight, first = plain(), plain()
    passes = [listed(straight) for _ in range(3)]
    assert (first.state_dict()["epoch"], first.state_dict()["seen"]) == (0, None)
    assert listed(first) == passes[0]
    state = first.state_dict()
    assert (state["epoch"], state["seen"]) == (1, None)
    for known in (state, {"epoch": 1, "loader": None}):
        resumed = plain()
        resumed.load_state_dict(known)
        assert [listed(resumed) for _ in range(2)] == passes[1:]


def test_the_place_is_that_of_the_newest_pass() -> None:
    straight, loader = plain(), plain()
    passes = [listed(straight) for _ in range(4)]
    old = iter(loader)
    assert next(old).tolist() == passes[0][0]
    assert taken(loader, 2) == passes[1][:2], "a loop that is left, and a new pass"
    assert [batch.tolist() for batch in old] == passes[0][1:], "the older goes on beside it, and ends"
    state = loader.state_dict()
    assert (state["epoch"], state["seen"]) == (1, 6)
    resumed = plain()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state, "saved again at once"
    assert [listed(resumed) for _ in range(3)] == [passes[1][2:], *passes[2:]]
    loader.load_state_dict(state)
    assert [listed(loader) for _ in range(3)] == [passes[1][2:], *passes[2:]], "in the same process"


@pytest.mark.parametrize("workers", [0, 1])
def test_set_epoch_keeps_the_place_of_its_epoch(workers: int) -> None:
    passes = [listed(loader) for loader in [plain()] for _ in range(3)]
    saved = plain()
    saved.set_epoch(1)
    taken(saved, 2)
    for epoch, expected in ((1, passes[1][2:]), (2, passes[2]), (0, passes[0])):
        resumed = rank_loader(DataLoader(range(10), batch_size=3, shuffle=True, num_workers=workers))
        resumed.load_state_dict(saved.state_dict())
        resumed.sampler.set_epoch(epoch)
        assert listed(resumed) == expected
        resumed.load_state_dict(saved.state_dict())
        resumed.set_epoch(epoch)
        assert [listed(resumed) for _ in range(1)] == [expected]
        resumed.set_epoch(1)
        assert listed(resumed) == passes[1], "taken once"
    saved.set_epoch(2)
    assert saved.state_dict()["seen"] is None, "a new pass was asked for"


def test_the_order_is_that_of_the_run_that_saved() -> None:
    passes = [listed(loader) for loader in [plain(5)] for _ in range(2)]
    saved, resumed = plain(5), plain(6)
    taken(saved, 1)
    resumed.load_state_dict(saved.state_dict())
    assert [listed(resumed) for _ in range(2)] == [passes[0][1:], passes[1]]


def test_a_loader_in_use_is_copied_and_lets_its_workers_go() -> None:
    loader = FabricDataLoader(DataLoader(Seen(12), batch_size=2, num_workers=1), None)
    before = len(mp.active_children())
    assert taken(loader, 2) == [[0, 1], [2, 3]]
    assert len(mp.active_children()) == before
    twin = pickle.loads(pickle.dumps(loader._passes))
    assert (twin.now(), len(listed(twin.loader))) == (loader._passes.now(), 6)
    for used in (plain(), rank_loader(DataLoader(Seen(10), batch_sampler=Buckets()))):
        taken(used, 2)
        assert copy.deepcopy(used._passes.loader).sampler is not used.sampler


class SavesItself(DataLoader[Any]):
    """Has a place of its own, as torchdata's loaders do."""

    skip = 0
    given = 0

    def __iter__(self) -> Any:
        self.given, self.skip = self.skip, 0
        for batch in islice(super().__iter__(), self.given, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_loader_that_saves_its_place_itself(alone: bool) -> None:
    def loader() -> Any:
        made = SavesItself(range(10), batch_size=3, shuffle=not alone)
        return FabricDataLoader(made, None) if alone else rank_loader(made)

    straight, saved, resumed = loader(), loader(), loader()
    passes = [listed(straight) for _ in range(3)]
    listed(saved)
    taken(saved, 2)
    state = saved.state_dict()
    assert (state["epoch"], state["seen"], state["loader"]) == (None if alone else 1, None, {"given": 2})
    resumed.load_state_dict(state)
    assert [listed(resumed) for _ in range(2)] == [passes[1][2:], passes[2]]


@pytest.mark.filterwarnings("ignore:'set_vital'")  # of torchdata itself
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_keeps_its_place(workers: int) -> None:
    """On each of two ranks, in the middle of a pass; together they see every sample once."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(rank: int) -> FabricDataLoader:
        made: Any = StatefulDataLoader(range(24), batch_size=2, shuffle=True, num_workers=workers)
        return FabricDataLoader(shard(made, 2, rank, 7), None)

    seen: list[int] = []
    for rank in range(2):
        passes = [listed(straight) for straight in [loader(rank)] for _ in range(2)]
        saved, resumed = loader(rank), loader(rank)
        run = iter(saved)
        begun = [next(run).tolist() for _ in range(4)]
        resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert [begun + listed(resumed), listed(resumed)] == passes
        seen += [number for batch in passes[0] for number in batch]
    assert sorted(seen) == list(range(24))


class Unasked(DataLoader[Any]):
    """Reads without its sampler."""

    def __iter__(self) -> Any:
        return iter(torch.arange(8).split(2))


def test_a_loader_that_does_not_ask_its_sampler_has_no_place() -> None:
    saved = rank_loader(Unasked(range(8), batch_size=2))
    taken(saved, 1)
    assert saved.state_dict()["seen"] is None
    other = rank_loader(DataLoader(range(8), batch_size=2))
    taken(other, 1)
    saved.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match=r"A Unasked must read by its sampler to go on .* Call set_epoch"):
        next(iter(saved))


def test_streams_that_go_on_themselves_are_not_read_again() -> None:
    saved, resumed = (FabricDataLoader(DataLoader(OwnState(), batch_size=4), None) for _ in range(2))
    taken(saved, 3)
    resumed.load_state_dict(saved.state_dict())
    assert listed(resumed) == [[12, 13, 14, 15]]
    assert resumed.dataset.given == 4
    other = FabricDataLoader(DataLoader(OwnState(), batch_size=5), None)
    other.load_state_dict(saved.state_dict())
    assert listed(other) == [[12, 13, 14, 15]], "it needs no multiple of its batch"
    ahead = FabricDataLoader(DataLoader(OwnState(), batch_size=4, num_workers=1), None)
    ahead.load_state_dict(saved.state_dict())
    assert listed(ahead) == [[12, 13, 14, 15]], "in a worker it is read again"


def test_a_stream_that_has_ended_before() -> None:
    saved, resumed = (FabricDataLoader(DataLoader(stream, batch_size=4), None) for stream in (DrawnStream(), Stream()))
    taken(saved, 3)
    resumed.load_state_dict(saved.state_dict())
    with pytest.raises(CheckpointError, match=r"`seen` of a data loader's state must be at most 8, .* but is 12"):
        next(iter(resumed))


def state_of(loader: Any, **changes: Any) -> dict[str, Any]:
    taken(loader, 2)
    return {**loader.state_dict(), **changes}


def alone(loader: DataLoader[Any]) -> Any:
    return FabricDataLoader(loader, None)


def stream(batch: int = 2) -> Any:
    return alone(DataLoader(Stream(), batch_size=batch))


SPLIT_BY_USER = partial(DistributedSampler, range(20), 2, 0)
BAD_STATES: list[tuple[str, Callable[[], Any], Any, str]] = [
    ("list", plain, [1], "must hold epoch, kind, loader, ranks, seed, seen, but is list. Load what"),
    ("empty", plain, {}, "must hold epoch, kind, loader, ranks, seed, seen, but holds nothing."),
    ("keys", plain, {"epoch": 1, "step": 2}, "must hold epoch, kind, .* but holds epoch, step. Load what its"),
    ("negative", plain, state_of(plain(), seen=-3), "`seen` .* must be None or a count, but is -3. Load what its"),
    ("fraction", plain, state_of(plain(), seen=1.5), "`seen` .* must be None or a count, but is 1.5."),
    ("epoch", plain, {"epoch": "1", "loader": None}, "`epoch` .* must be None or a count, but is '1'."),
    ("seed", plain, state_of(plain(), seed=True), "`seed` .* must be None or a count, but is True."),
    ("beyond", plain, state_of(plain(), seen=11), "`seen` .* must be at most 10, .* but is 11. Load it for the data"),
    ("kind", plain, state_of(stream()), r"must be read as the saved one was \(stream\) .* but is split. Use the same"),
    (
        "no epochs",
        lambda: alone(DataLoader(range(20), batch_size=2)),
        state_of(alone(DataLoader(range(20), 2, sampler=SPLIT_BY_USER()))),
        "must count its passes, as the saved one did, or neither must",
    ),
    ("ranks", stream, state_of(stream(), ranks=3), "`ranks` .* must be a list of what each rank knew, but is int of"),
    ("no own", stream, state_of(stream(), ranks=[None]), "`ranks` .* must tell where the stream of this rank is"),
    (
        "more ranks",
        stream,
        state_of(stream(), ranks=[{}, {}]),
        "must be loaded on as many ranks as saved it, 2, but there are 1. Start 2, or leave the loader out",
    ),
    ("batches", partial(stream, 3), state_of(stream()), "`seen` .* must be a multiple of 3 .* but is 4. Use the batch"),
    (
        "replicas",
        lambda: alone(DataLoader(range(20), 2, sampler=DistributedSampler(range(20), 3, 0))),
        state_of(alone(DataLoader(range(20), 2, sampler=SPLIT_BY_USER()))),
        "`seen` .* must be a multiple of 3 .* but is 8.",
    ),
]


@pytest.mark.parametrize(("make", "state", "says"), [row[1:] for row in BAD_STATES], ids=[row[0] for row in BAD_STATES])
def test_bad_states_are_refused_and_change_nothing(make: Callable[[], Any], state: Any, says: str) -> None:
    loader, twin = make(), make()
    with pytest.raises(CheckpointError, match=says):
        loader.load_state_dict(state)
    assert listed(loader) == listed(twin)


def test_batches_beyond_are_found_when_the_pass_begins() -> None:
    loader = rank_loader(DataLoader(range(10), batch_sampler=Buckets()))
    loader.load_state_dict(state_of(rank_loader(DataLoader(range(10), batch_sampler=Buckets())), seen=11))
    with pytest.raises(CheckpointError, match=r"`seen` of a data loader's state must be at most 10, .* but is 11"):
        listed(loader)


# -- runs that are saved and taken up ----------------------------------------------------------------------------------


class Noisy(Dataset[Tensor]):
    """Samples with noise from the random numbers of the process or worker that reads them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / 20) + torch.rand(4) + random.random()


def learner(fabric: Fabric) -> tuple[Any, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    ready: tuple[Any, Any] = fabric.setup(model, torch.optim.SGD(model.parameters(), 1e-3))
    return ready


def losses(
    fabric: Fabric, model: Any, optimizer: Any, batches: Any, at: int = 0, then: Callable[[], None] = list
) -> list[float]:
    """Of training on ``batches``; ``then`` is called before number ``at``."""
    found = []
    for step, batch in enumerate(batches, 1):
        loss = model(batch.float()).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if step == at:
            then()
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", [True, False])
def test_losses_go_on_as_if_the_run_had_not_stopped(tmp_path: Path, split: bool, workers: int) -> None:
    """With dropout, and with noise in the data where this process reads it."""
    data: Any = Noisy() if workers == 0 else torch.rand(20, 4)

    def begun(seed: int) -> tuple[Any, Any, Any, Any]:
        fabric = one()
        fabric.seed_everything(seed)
        loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
        ready = fabric.setup_dataloaders(loader, use_distributed_sampler=split)
        return fabric, *learner(fabric), ready

    fabric, model, optimizer, loader = begun(1)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    losses(fabric, model, optimizer, loader)
    straight = losses(fabric, model, optimizer, loader, 3, lambda: fabric.save(tmp_path / "saved", state))
    straight += losses(fabric, model, optimizer, loader)

    fabric, model, optimizer, loader = begun(2)
    fabric.load(tmp_path / "saved", {"model": model, "optimizer": optimizer, "loader": loader})
    resumed = losses(fabric, model, optimizer, loader)
    assert resumed + losses(fabric, model, optimizer, loader) == straight[3:]


class RankStream(IterableDataset[int]):
    """Each rank reads numbers of its own, and those of rank 1 have other places."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 12:
            self.at += 1 + self.rank
            yield 100 * self.rank + self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def rank_loaders(fabric: Fabric, batch: int, seed: int) -> dict[str, Any]:
    """Split by fabriclite or by the user; the last three only go on on as many ranks."""
    fabric.seed_everything(seed + fabric.global_rank)  # ranks that draw must each draw their own again
    rank, size = fabric.global_rank, fabric.world_size
    own = DistributedSampler(range(20), size, rank)
    split = [
        DataLoader(range(20), batch_size=batch, shuffle=True),
        DataLoader(range(20), batch_sampler=BatchSampler(RandomSampler(range(20)), 4, False)),
    ]
    user = [
        DataLoader(range(20), batch_size=batch, sampler=own),
        DataLoader(range(20), batch_size=2, shuffle=True),
        DataLoader(DrawnStream(), batch_size=2),
        DataLoader(RankStream(rank), batch_size=2),
    ]
    ready = fabric.setup_dataloaders(*split) + fabric.setup_dataloaders(*user, use_distributed_sampler=False)
    return dict(zip(["split", "batches", "own", "drawn", "stream", "own state"], ready, strict=True))


def stop_in_the_middle(fabric: Fabric, path: str) -> list[Any]:
    """Of every rank, what it reads after it saved, and what one that loads that reads."""
    ready = rank_loaders(fabric, 2, 5)
    model, optimizer = learner(fabric)
    begun = {name: iter(loader) for name, loader in ready.items()}
    for batches in begun.values():
        trained(batches, 2)
    fabric.save(path, {"model": model, "optimizer": optimizer, **ready})
    rest = {name: [as_lists(batch) for batch in batches] for name, batches in begun.items()}
    return gather_objects(fabric._ready_world, ((rest, draws()), take_up(fabric, path, 2, list(ready))))


def take_up(fabric: Fabric, path: str, batch: int, names: list[str]) -> tuple[dict[str, Any], list[float]]:
    ready = rank_loaders(fabric, batch, 8)
    model, optimizer = learner(fabric)
    fabric.load(path, {"model": model, "optimizer": optimizer, **{name: ready[name] for name in names}})
    return {name: listed(ready[name]) for name in names}, draws()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_go_on(tmp_path: Path, strategy: str) -> None:
    path = str(tmp_path / "saved")
    ranks = run(stop_in_the_middle, strategy, 2, path)
    for straight, resumed in ranks:
        assert resumed == straight
    rest, _ = run(take_up, "single_device", 1, path, 4, ["split", "batches", "own"])
    for name in ("split", "own"):
        together = by_step([straight[name] for (straight, _), _ in ranks])
        assert [sorted(batch) for batch in rest[name]] == together, "one rank reads what two read in each step"
    assert rest["batches"] == woven([straight["batches"] for (straight, _), _ in ranks])[: len(rest["batches"])]
    with pytest.raises(CheckpointError, match="must be loaded on as many ranks as saved it, 2, but there are 1"):
        run(take_up, "single_device", 1, path, 2, ["stream"])

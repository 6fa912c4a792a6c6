"""Data loaders: every data-parallel rank reads its part, in an order that depends on nothing but seed and epoch."""

import multiprocessing as mp
import random
from collections import Counter, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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

from fabriclite import Fabric, LaunchError
from fabriclite.collectives import gather_objects
from fabriclite.data import EpochSampler, FabricDataLoader, ShardedSampler, to_device
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


def test_a_loader_says_which_pass_comes_next() -> None:
    def loader() -> Any:
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        return fabric.setup_dataloaders(DataLoader(list(range(20)), shuffle=True, batch_size=20))

    straight, first = loader(), loader()
    passes = [next(iter(straight)).tolist() for _ in range(3)]
    assert next(iter(first)).tolist() == passes[0]
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert [next(iter(resumed)).tolist() for _ in range(2)] == passes[1:]

"""``fabric.verify`` on real worlds: what is sound passes, and each kind of damage is found on every rank.

One world of processes does all damages of one strategy, one after the other, each undone before the next; what every
rank said is what the tests look at. Damage that is done on one rank alone must be an error on all: ranks that go on
while another raised wait for it for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor, nn

from fabriclite import Fabric, MaterializeError, ModelParallelStrategy, SetupOrderError
from fabriclite.birth import replay
from fabriclite.collectives import broadcast_tensor_, gather_objects
from fabriclite.shards import local
from worlds import STRATEGIES

WORLDS: Final = {"ddp": 2, "fsdp": 2, "tp": 2, "zero3": 2, "hsdp": 4}
SHARDED: Final = ("fsdp", "tp", "zero3", "hsdp")
SEED: Final = 11
PATIENCE: Final = timedelta(seconds=20)
"""How long a rank waits for one that failed alone."""


class Net(nn.Module):
    """Random weights whose parts are large enough to be told apart, a tie, and buffers of two kinds."""

    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.up = nn.Linear(12, 32)
        self.down = nn.Linear(32, 12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(12))
        self.register_buffer("table", torch.rand(12))
        self.register_buffer("count", torch.arange(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(tokens)).relu()) * self.scale + self.table)


# -- damages -----------------------------------------------------------------------------------------------------------


def mine(param: Any) -> Tensor:
    """The memory this rank holds of a parameter under any strategy."""
    return param.ds_tensor.detach() if hasattr(param, "ds_tensor") else local(param.detach())


def unwritten(like: Tensor) -> Tensor:
    """Memory as it is handed out. A parameter's own storage may hold others as well, so it is copied into place."""
    memory = torch.empty_like(like)
    replay.poison(memory.untyped_storage())
    return memory


@contextmanager
def kept(memory: Tensor) -> Iterator[Tensor]:
    """``memory`` to be written into; it is as before afterwards."""
    before = memory.clone()
    try:
        yield memory
    finally:
        memory.copy_(before)


@contextmanager
def held(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it ``owner`` holds something else."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def other_buffer(model: Any, rank: int) -> Iterator[None]:
    """The last bit of one value on the last rank."""
    with kept(model.table) as table:
        if rank == 1:
            table[3] = torch.nextafter(table[3], torch.tensor(2.0))
        yield


@contextmanager
def other_count(model: Any, rank: int) -> Iterator[None]:
    with kept(model.count) as count:
        if rank == 1:
            count[4] += 1
        yield


@contextmanager
def other_replica(model: Any, rank: int) -> Iterator[None]:
    """Of a parameter that is (as ``hsdp``: in part) the same on several ranks."""
    with kept(mine(model.up.weight)) as weight:
        if rank == dict.fromkeys(("hsdp",), 2).get(model.strategy, 1):
            weight[0] += 1
        yield


@contextmanager
def same_shard(model: Any, rank: int) -> Iterator[None]:
    """All ranks hold rank 0's part, as if all had drawn it from the beginning of the stream."""
    with kept(mine(model.up.weight)) as weight:
        broadcast_tensor_(model.world, weight)
        yield


@contextmanager
def poisoned_on_one(model: Any, rank: int) -> Iterator[None]:
    with kept(mine(model.down.weight)) as weight:
        if rank == 1:
            weight.copy_(unwritten(weight))
        yield


@contextmanager
def poisoned_value(model: Any, rank: int) -> Iterator[None]:
    """One value that was left out is as bad as all."""
    with kept(mine(model.down.weight)) as weight:
        if rank == 0:
            weight.view(-1)[-1] = unwritten(weight).view(-1)[-1]
        yield


@contextmanager
def poisoned_buffer(model: Any, rank: int) -> Iterator[None]:
    """Integers have no NaN: their poison is a number."""
    with kept(model.count) as count:
        count.copy_(unwritten(count))
        yield


def broken_tie(model: Any, rank: int) -> AbstractContextManager[None]:
    return held(model.head, "weight", nn.Parameter(torch.ones(40, 12)))


def broken_tie_on_one(model: Any, rank: int) -> AbstractContextManager[None]:
    return broken_tie(model, rank) if rank == 1 else nullcontext()


def other_dtype(model: Any, rank: int) -> AbstractContextManager[None]:
    return held(model, "table", model.table.double())


def other_dtype_on_one(model: Any, rank: int) -> AbstractContextManager[None]:
    return other_dtype(model, rank) if rank == 1 else nullcontext()


def parameter_of_other_dtype(model: Any, rank: int) -> AbstractContextManager[None]:
    return held(model.up, "bias", nn.Parameter(torch.ones(32, dtype=torch.bfloat16)))


def parameter_of_other_dtype_on_one(model: Any, rank: int) -> AbstractContextManager[None]:
    return parameter_of_other_dtype(model, rank) if rank == 1 else nullcontext()


def meta_buffer(model: Any, rank: int) -> AbstractContextManager[None]:
    return held(model, "table", model.table.to("meta"))


def meta_buffer_on_one(model: Any, rank: int) -> AbstractContextManager[None]:
    return meta_buffer(model, rank) if rank == 1 else nullcontext()


def meta_parameter_on_one(model: Any, rank: int) -> AbstractContextManager[None]:
    on_meta = nn.Parameter(torch.empty(12, device="meta"))
    return held(model.down, "bias", on_meta) if rank == 1 else nullcontext()


@dataclass(frozen=True)
class Damage:
    """What is done to a model on each rank until the context ends, and what verify has to say then."""

    do: Callable[[Any, int], AbstractContextManager[None]]
    says: str
    on: tuple[str, ...] = tuple(WORLDS)


DAMAGES: Final = [
    Damage(other_buffer, "table should be the same on ranks 0 and 1"),
    Damage(other_count, "count should be the same on ranks 0 and 1"),
    Damage(other_replica, "up.weight should be the same on ranks 0 and 1", on=("ddp",)),
    Damage(other_replica, "up.weight should be the same on ranks 0 and 2", on=("hsdp",)),
    Damage(same_shard, "up.weight was drawn from the same numbers on ranks ", on=SHARDED),
    Damage(poisoned_on_one, "down.weight holds memory on rank 1 that was never written"),
    Damage(poisoned_value, "down.weight holds memory on rank 0 that was never written"),
    Damage(poisoned_buffer, "count holds memory on rank 0 that was never written"),
    Damage(broken_tie, "embed.weight and head.weight were one parameter and are not any more"),
    Damage(broken_tie_on_one, "embed.weight and head.weight were one parameter and are not any more"),
    Damage(other_dtype, "table is torch.float64, but was torch.float32"),
    Damage(other_dtype_on_one, "table is torch.float64, but was torch.float32"),
    Damage(parameter_of_other_dtype, "up.bias is torch.bfloat16, but was torch.float32"),
    Damage(parameter_of_other_dtype_on_one, "up.bias is torch.bfloat16, but was torch.float32"),
    Damage(meta_buffer, "table has no memory on rank 0"),
    Damage(meta_buffer_on_one, "table has no memory on rank 1"),
    Damage(meta_parameter_on_one, "down.bias has no memory on rank 1"),
]
CASES: Final = [(strategy, damage) for strategy in WORLDS for damage in DAMAGES if strategy in damage.on]


# -- in a rank ---------------------------------------------------------------------------------------------------------


class Handle:
    """The model, and what damages ask beside it."""

    def __init__(self, model: Any, fabric: Fabric, strategy: str) -> None:
        self.__dict__.update(model=model, world=fabric._ready_world, strategy=strategy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)


def said(fabric: Fabric, model: Any) -> list[str]:
    """What verify says on each rank; empty where it passes. Every rank must call this."""
    return refusals(fabric, lambda: fabric.verify(model))


def refusals(fabric: Fabric, act: Callable[[], object]) -> list[str]:
    """The text of each rank's error; empty where there was none. Every rank must call this."""
    text = ""
    try:
        act()
    except MaterializeError as error:
        text = str(error)
    return gather_objects(fabric._ready_world, text)  # type: ignore[no-any-return]


def train_step(fabric: Fabric, model: Any, optimizer: Any, strategy: str) -> None:
    """On data of each rank's own, but for ranks that split the same products."""
    tokens = torch.arange(40).view(4, 10) + (0 if strategy == "tp" else fabric.global_rank)
    loss = model(tokens % 40).square().mean()
    fabric.backward(loss, model=model)
    optimizer.step()
    optimizer.zero_grad()


def set_up(fabric: Fabric, build: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    fabric.seed_everything(SEED)
    with fabric.init_module(empty_init=True):
        net = build()
    return fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))


def damage_all(fabric: Fabric, strategy: str) -> dict[str, list[str]]:
    """What verify says after setup, after a step, after each damage, and when all of them were undone."""
    model, optimizer = set_up(fabric)
    found = {"setup": said(fabric, model)}
    train_step(fabric, model, optimizer, strategy)
    found["step"] = said(fabric, model)
    handle = Handle(model, fabric, strategy)
    for name, damage in CASES:
        if name == strategy:
            with torch.no_grad(), damage.do(handle, fabric.global_rank):
                found[damage.do.__name__] = said(fabric, model)
    found["undone"] = said(fabric, model)
    train_step(fabric, model, optimizer, strategy)
    found["next step"] = said(fabric, model)
    return found | (harmless(fabric, strategy) if strategy != "hsdp" else {})


# -- in the test's process ---------------------------------------------------------------------------------------------


def launch(strategy: str, function: Callable[..., Any], *args: Any) -> Any:
    config = replace(STRATEGIES[strategy], timeout=PATIENCE)
    return Fabric(accelerator="cpu", strategy=config, devices=WORLDS[strategy]).launch(function, *args)


@cache
def found_under(strategy: str) -> dict[str, list[str]]:
    return launch(strategy, damage_all, strategy)  # type: ignore[no-any-return]


@pytest.mark.parametrize("when", ["setup", "step", "undone", "next step"])
@pytest.mark.parametrize("strategy", WORLDS)
def test_a_sound_model_passes(strategy: str, when: str) -> None:
    assert found_under(strategy)[when] == [""] * WORLDS[strategy]


@pytest.mark.parametrize(("strategy", "damage"), [pytest.param(s, d, id=f"{s}-{d.do.__name__}") for s, d in CASES])
def test_damage_is_found_on_every_rank(strategy: str, damage: Damage) -> None:
    texts = found_under(strategy)[damage.do.__name__]
    assert len(texts) == WORLDS[strategy]
    for text in texts:
        assert damage.says in text, texts
        assert "Net must hold the values that its code gives, on every rank, but:" in text


# -- what is no damage -------------------------------------------------------------------------------------------------


class Zeros(Net):
    """Weights that were drawn, and are equal all the same: as users write a branch that begins as nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "gain of zero":
            nn.init.xavier_uniform_(self.up.weight, gain=0.0)
        elif kind == "deviation of zero":
            nn.init.normal_(self.up.weight, std=0.0)
        elif kind == "times zero":
            with torch.no_grad():
                self.up.weight.mul_(0)
        elif kind == "drawn whole numbers":
            self.up.weight.data.bernoulli_(0.0)


KINDS: Final = ("gain of zero", "deviation of zero", "times zero", "drawn whole numbers")


class Statistics(Net):
    """Holds buffers of each rank's own data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(40)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(super().forward(tokens).flatten(0, 1))


class TwoPieces(nn.Module):
    """A random weight of 8 values: too few for equal parts to mean anything."""

    _tp_plan: ClassVar[dict[str, str]] = {"lin": "colwise_gather_output"}

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def write_constants(model: Any) -> None:
    """As a user does who starts a branch at nothing after setup; alike on all ranks."""
    with torch.no_grad():
        for param in (model.up.weight, model.down.weight):
            mine(param).fill_(0.25)


def harmless(fabric: Fabric, strategy: str) -> dict[str, list[str]]:
    """What setup and verify say of models in which nothing is wrong."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        found[kind] = refusals(fabric, lambda kind=kind: fabric.verify(set_up(fabric, lambda: Zeros(kind))[0]))
    model, _ = set_up(fabric)
    write_constants(model)
    found["constants after setup"] = said(fabric, model)
    model, optimizer = set_up(fabric, Statistics)
    train_step(fabric, model, optimizer, strategy)
    found["statistics"] = said(fabric, model)
    model, optimizer = set_up(fabric, TwoPieces)
    mine(model.lin.weight).fill_(1.0)
    found["few values"] = said(fabric, model)
    fabric.seed_everything(SEED)
    plain = Net()  # real tensors, not recorded
    found["plain"] = said(fabric, fabric.setup(plain, torch.optim.AdamW(plain.parameters()))[0])
    return found


HARMLESS: Final = (*KINDS, "constants after setup", "statistics", "few values", "plain")


@pytest.mark.parametrize("what", HARMLESS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "zero3"])
def test_no_false_alarm(strategy: str, what: str) -> None:
    assert found_under(strategy)[what] == [""] * WORLDS[strategy]


# -- setup verifies by itself ------------------------------------------------------------------------------------------


def replaces_a_buffer(module: Any, mesh: Any) -> nn.Module:
    """A function of the user's that goes wrong on one rank."""
    module.table = torch.full((12,), float(mesh.get_rank()))
    return module  # type: ignore[no-any-return]


def spreads_badly(fabric: Fabric) -> list[str]:
    return refusals(fabric, lambda: set_up(fabric))


def test_setup_finds_what_went_wrong_in_it() -> None:
    config = ModelParallelStrategy(parallelize_fn=replaces_a_buffer, start_method="forkserver", timeout=PATIENCE)
    texts = Fabric(accelerator="cpu", strategy=config, devices=2).launch(spreads_badly)
    assert texts is not None
    assert len(texts) == 2
    assert all("table should be the same on ranks 0 and 1, and is not" in text for text in texts)


# -- one process -------------------------------------------------------------------------------------------------------


def test_one_process() -> None:
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    model, optimizer = set_up(fabric)
    fabric.verify(model)
    train_step(fabric, model, optimizer, "single_device")
    fabric.verify(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fabric.verify(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it only reads"
    with held(model.head, "weight", nn.Parameter(torch.ones(40, 12))), pytest.raises(MaterializeError) as caught:
        fabric.verify(model)
    assert "embed.weight and head.weight were one parameter" in str(caught.value)
    with torch.no_grad(), kept(model.up.weight.detach()) as weight:
        weight.view(-1)[5] = unwritten(weight).view(-1)[5]
        with pytest.raises(MaterializeError, match=r"up\.weight holds memory on rank 0 that was never written"):
            fabric.verify(model)
    fabric.verify(model)


def test_several_findings_are_all_named() -> None:
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    model, _ = set_up(fabric)
    model.table, model.scale = model.table.double(), nn.Parameter(model.scale.detach().to("meta"))
    with pytest.raises(MaterializeError) as caught:
        fabric.verify(model)
    assert "table is torch.float64, but was torch.float32" in str(caught.value)
    assert "scale has no memory on rank 0" in str(caught.value)


def test_only_what_was_set_up() -> None:
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    with pytest.raises(SetupOrderError, match=r"must be one that fabric\.setup returned, but is a Net that was not"):
        fabric.verify(Net())

"""Checkpoints: a run that goes on as if it had never stopped, under the strategy that saved it or another.

One world of processes per size (and one more for DeepSpeed) trains and saves all cases of that size; a second one, of
new processes, loads them and goes on, and loads what other strategies saved. Each case is a test of its own. Small rules
about what a checkpoint holds, refuses and replaces follow, a function each, all of one strategy in one world.
"""

import random
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from fabriclite import CheckpointError, ConfigError, Fabric, FSDPStrategy, LaunchError, ModelParallelStrategy
from fabriclite.collectives import gather_objects
from fabriclite.shards import cut, full
from models import Bare, Tied, loss_of
from worlds import STRATEGIES, run

STEPS, SAVED_AT = 6, 3
SAMPLES = 12
"""Per step, over all ranks: 1, 2, 3 and 4 of them divide it."""

HERE: dict[str, Any] = {
    **STRATEGIES,
    "fsdp_full": FSDPStrategy(state_dict_type="full", start_method="forkserver"),
    "tp_full": ModelParallelStrategy(save_distributed_checkpoint=False, start_method="forkserver"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Dropout, so that random states matter; a buffer that counts, one that is not saved, and extra state."""

    _tp_plan: ClassVar = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self, width: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor([1.5]), persistent=False)
        self.note = "new"

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale.to(x.dtype))

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": self.note, "table": torch.arange(3)}

    def set_extra_state(self, state: Any) -> None:
        assert state["table"].tolist() == [0, 1, 2]
        self.note = state["note"]


# -- a run, straight and resumed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run: where, how, and whether module and optimizer are set up together (``joint``) or one after the other."""

    strategy: str
    world: int
    precision: str = "32-true"
    form: str = "joint"

    @property
    def kind(self) -> str:
        """Which processes run it: DeepSpeed changes torch where it is imported."""
        return "zero3" if self.strategy.startswith("zero") else "ddp"

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.world}-{self.precision}-{self.form}"


@dataclass
class Script:
    """What a training script holds."""

    fabric: Fabric
    model: Any
    optimizer: Any
    state: dict[str, Any]


def fabric_like(fabric: Fabric, strategy: str, precision: str = "32-true") -> Fabric:
    """Another one in the same processes."""
    return Fabric(accelerator="cpu", strategy=HERE[strategy], devices=fabric.world_size, precision=precision)


def script(fabric: Fabric, case: Case, seed: int) -> Script:
    """Built at ``seed``; then every data-parallel rank draws from a stream of its own."""
    mine = fabric_like(fabric, case.strategy, case.precision)
    Fabric.seed_everything(seed)
    with mine.init_module():
        module = Net()
    if case.form == "late":
        model = mine.setup_module(module)
        optimizer = mine.setup_optimizers(AdamW(model.parameters(), lr=1e-2, eps=1e-3))
        scheduler = StepLR(optimizer, 2, 0.5)
    else:
        made = AdamW(module.parameters(), lr=1e-2, eps=1e-3)
        model, optimizer, scheduler = mine.setup(module, made, scheduler=StepLR(made, 2, 0.5))
    Fabric.seed_everything(100 * seed + mine._running.sampler_shard()[1])
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0, "best": {"loss": 0.0}, "t": 0}
    return Script(mine, model, optimizer, state)


def train(run: Script, steps: int) -> list[list[float]]:
    """Losses of every rank at every step. The second step overflows where there is a loss scale."""
    replicas, index = run.fabric._running.sampler_shard()
    losses = []
    for step in range(run.state["step"], run.state["step"] + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(SAMPLES, 8, generator=generator).chunk(replicas)[index]
        y = torch.randint(0, 4, (SAMPLES,), generator=generator).chunk(replicas)[index]
        loss = loss_of(run.model(x), y)
        factor = 1e6 if step == 1 and run.fabric._running.scaler.is_enabled() else 1.0
        run.fabric.backward(loss * factor, model=run.model)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.state["scheduler"].step()
        run.state["step"] = step + 1
        losses.append(run.fabric.all_gather(loss.detach()).tolist())
    return losses


def draws(fabric: Fabric) -> list[list[float]]:
    """The next number of every generator on every rank."""
    numpy = pytest.importorskip("numpy")
    return gather_objects(fabric._running.world, [random.random(), torch.rand(()).item(), float(numpy.random.rand())])


@dataclass(frozen=True)
class Outcome:
    """What one run did from step 3 on, and what it knew then."""

    losses: list[list[float]]
    next_draws: list[list[float]]
    learning_rate: float
    scale: float
    note: str
    seen: int
    values: dict[str, Any]

    @property
    def means(self) -> list[float]:
        return [sum(step) / len(step) for step in self.losses]


def go_on(run: Script) -> Outcome:
    known = dict(
        learning_rate=run.optimizer.param_groups[0]["lr"],
        scale=run.fabric._running.scaler.get_scale(),
        note=run.model.note,
        seen=run.model.seen.item(),
        values={"step": run.state["step"], "best": run.state["best"], "t": torch.as_tensor(run.state["t"]).tolist()},
    )
    losses = train(run, STEPS - SAVED_AT)
    return Outcome(losses=losses, next_draws=draws(run.fabric), **known)


def straight(fabric: Fabric, cases: list[Case], folder: Path) -> dict[Case, Any]:
    """Train, save on the way, go on; then load the checkpoint into the living objects and go on from it again."""

    def one(case: Case) -> tuple[list[list[float]], Outcome, Outcome, dict[str, Tensor]]:
        run = script(fabric, case, seed=1)
        first = train(run, SAVED_AT)
        run.model.note = "saved"
        run.state.update(best={"loss": 0.25, "at": (1, "b")}, t=torch.arange(4))
        run.fabric.save(folder / case.name, run.state)
        weights = {k: full(v).clone() for k, v in run.model.state_dict().items() if isinstance(v, Tensor)}
        uninterrupted = go_on(run)
        run.model.note = "later"
        run.fabric.load(folder / case.name, run.state)
        return first, uninterrupted, go_on(run), weights

    return {case: caught(one, case) for case in cases}


def resumed(fabric: Fabric, pairs: list[tuple[Case, Case]], folder: Path) -> dict[tuple[Case, Case], Any]:
    """For each (saved by, loaded by): load into new objects, save again, go on."""

    def one(source: Case, target: Case) -> Outcome:
        run = script(fabric, target, seed=5)
        run.fabric.load(folder / source.name, run.state)
        random_states = torch.get_rng_state()
        run.fabric.save(folder / f"{source.name}-by-{target.name}", run.state)
        assert torch.equal(random_states, torch.get_rng_state()), "saving drew random numbers"
        return go_on(run)

    return {pair: caught(one, *pair) for pair in pairs}


def caught(function: Callable[..., Any], *args: Any) -> Any:
    """Its result, or the traceback: shown by the case's own test, while the other cases go on."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


def launch(function: Callable[..., Any], strategy: str, world: int, *args: Any) -> Any:
    fabric = Fabric(accelerator="cpu", strategy=HERE[strategy], devices=world)
    return fabric.launch(function, *args)


def own_cases(strategy: str, world: int) -> list[Case]:
    base = Case(strategy, world)
    cases = [base]
    if not strategy.startswith("zero"):
        cases.append(replace(base, form="late"))
    if strategy in ("ddp", "fsdp", "zero3") and world == 2:
        cases.append(replace(base, precision="bf16-true"))
    if strategy in ("ddp", "fsdp") and world == 2:
        cases.append(replace(base, precision="16-mixed"))
    return cases


RESUMES = [
    ("single_device", 1),
    ("ddp", 2),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp_full", 2),
    ("fsdp_offload", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("tp", 4),
    ("tp_full", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
]
CROSSES = [
    (Case(*source), Case(*target))
    for source, target in [
        (("single_device", 1), ("fsdp", 2)),
        (("single_device", 1), ("zero1", 2)),
        (("single_device", 1), ("tp", 4)),
        (("ddp", 2), ("fsdp", 2)),
        (("ddp", 2), ("zero1", 2)),
        (("ddp", 2), ("zero2", 2)),
        (("fsdp", 2), ("single_device", 1)),
        (("fsdp", 2), ("ddp", 2)),
        (("fsdp", 2), ("hsdp", 4)),
        (("fsdp", 2), ("tp", 2)),
        (("fsdp", 2), ("zero3", 2)),
        (("fsdp", 3), ("fsdp", 2)),
        (("fsdp_full", 2), ("tp", 4)),
        (("hsdp", 4), ("fsdp", 2)),
        (("tp", 2), ("fsdp", 2)),
        (("tp", 4), ("single_device", 1)),
        (("tp", 4), ("fsdp", 3)),
        (("zero1", 2), ("ddp", 2)),
        (("zero3", 2), ("fsdp", 2)),
        (("zero3", 2), ("tp_full", 2)),
        (("zero3", 2), ("zero1", 2)),
    ]
]
IN_16_BITS = [
    (replace(source, precision="bf16-true"), replace(target, precision="bf16-true"))
    for source, target in [(Case("zero3", 2), Case("fsdp", 2)), (Case("fsdp", 2), Case("zero3", 2))]
]


class Worlds:
    """Runs each world once, when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.straight = cache(self._straight)
        self.resumed = cache(self._resumed)
        self.content = cache(self._content)

    def _straight(self, kind: str, world: int) -> dict[Case, Any]:
        cases = [c for s, w in RESUMES for c in own_cases(s, w) if (c.kind, c.world) == (kind, world)]
        try:
            return launch(straight, kind, world, cases, self.folder)
        except LaunchError as error:  # kept, or every case would start the failing world again
            return dict.fromkeys(cases, str(error))

    def _resumed(self, kind: str, world: int) -> dict[tuple[Case, Case], Any]:
        pairs = [(c, c) for s, w in RESUMES for c in own_cases(s, w)] + CROSSES + IN_16_BITS
        pairs = [(source, target) for source, target in pairs if (target.kind, target.world) == (kind, world)]
        for source, _ in pairs:
            self.straight(source.kind, source.world)
        try:
            return launch(resumed, kind, world, pairs, self.folder)
        except LaunchError as error:
            return dict.fromkeys(pairs, str(error))

    def _content(self, name: str) -> dict[str, Any]:
        return Fabric(accelerator="cpu", devices=1, strategy="single_device").load(self.folder / name)

    def pair(self, source: Case, target: Case) -> tuple[Any, Outcome, Any]:
        """The straight run of the source; what the target did; both checkpoints' content."""
        before = self.straight(source.kind, source.world)[source]
        after = self.resumed(target.kind, target.world)[source, target]
        for result in (before, after):
            assert not isinstance(result, str), result
        return before, after, (self.content(source.name), self.content(f"{source.name}-by-{target.name}"))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    folder = tmp_path_factory.mktemp("checkpoints")
    yield Worlds(folder)
    assert not list(folder.glob(".*")), "something is left from writing"


@pytest.mark.parametrize("case", [c for s, w in RESUMES for c in own_cases(s, w)], ids=lambda case: case.name)
def test_goes_on_as_if_never_stopped(worlds: Worlds, case: Case) -> None:
    (first, uninterrupted, rewound, weights), other, (content, again) = worlds.pair(case, case)
    assert other == uninterrupted
    assert rewound == uninterrupted
    assert uninterrupted.learning_rate == 0.005
    assert uninterrupted.note == "saved"
    assert uninterrupted.seen == SAVED_AT
    assert uninterrupted.values == {"step": SAVED_AT, "best": {"loss": 0.25, "at": (1, "b")}, "t": [0, 1, 2, 3]}
    assert uninterrupted.scale == (2.0**14 if case.precision == "16-mixed" else 1.0)
    different = {step[0] for step in first + uninterrupted.losses}
    assert len(different) == STEPS, "losses must differ from step to step, or equal ones prove nothing"
    same_state(content, again)
    assert all(torch.equal(content["model"][k], v) for k, v in weights.items())


@pytest.mark.parametrize(("source", "target"), CROSSES, ids=lambda case: case.name.removesuffix("-32-true-joint"))
def test_loads_what_another_strategy_saved(worlds: Worlds, source: Case, target: Case) -> None:
    (_, uninterrupted, _, weights), other, (content, again) = worlds.pair(source, target)
    same_state(content, again)
    assert all(torch.equal(content["model"][k], v) for k, v in weights.items())
    assert set(content["optimizer"]["state"]) == {k for k in weights if k != "seen"}
    assert replace(other, losses=[], next_draws=[]) == replace(uninterrupted, losses=[], next_draws=[])
    if source.world == target.world and "tp" not in source.name + target.name:
        assert other.means == pytest.approx(uninterrupted.means, rel=1e-5)
        assert other.next_draws == uninterrupted.next_draws


@pytest.mark.parametrize(("source", "target"), IN_16_BITS, ids=lambda case: case.name)
def test_16_bits_with_and_without_masters(worlds: Worlds, source: Case, target: Case) -> None:
    """ZeRO keeps float32 masters and moments of 16-bit weights, FSDP 16-bit moments: weights agree, and both train."""
    _, other, (content, again) = worlds.pair(source, target)
    same_tree(content["model"], again["model"])
    for name, values in again["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                values[key].bfloat16(), content["optimizer"]["state"][name][key].bfloat16(), rtol=0, atol=0
            )
    masters = [name for name, values in again["optimizer"]["state"].items() if "fp32_master" in values]
    assert bool(masters) == (target.strategy == "zero3"), "a master that nobody updates is stale"
    assert all(torch.tensor(step).isfinite().all() for step in other.losses)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, moments and settings of two checkpoints, bit for bit."""
    same_tree(one["model"], other["model"])
    same_tree(one["optimizer"]["state"], other["optimizer"]["state"])
    groups = [
        [
            {k: v for k, v in group.items() if k not in ("foreach", "fused")}
            for group in content["optimizer"]["param_groups"]
        ]
        for content in (one, other)
    ]
    assert groups[0] == groups[1]


def same_tree(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_tree(one[key], other[key])
    elif isinstance(one, Tensor):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other

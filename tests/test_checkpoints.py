"""Checkpoints: a run that goes on as if it had never stopped, under the strategy that saved it or another.

One world of processes per size (and one more for DeepSpeed) trains and saves all cases of that size; a second one, of
new processes, loads them and goes on, and loads what other strategies saved. Each case is a test of its own. Rules of
what a checkpoint holds, refuses and replaces follow, a function each, for every strategy.
"""

import itertools
import random
import traceback
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
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
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from fabriclite import CheckpointError, ConfigError, Fabric, FSDPStrategy, LaunchError, ModelParallelStrategy
from fabriclite.collectives import gather_objects
from fabriclite.shards import cut, full
from models import Bare, ConvNet, Tied, loss_of
from worlds import STRATEGIES, run

STEPS, SAVED_AT = 6, 3
SAMPLES = 12
"""Per step, over all ranks: 1, 2, 3 and 4 of them divide it."""

IMPATIENT = timedelta(seconds=30)
"""How long a rank waits for one that failed alone."""
HERE: dict[str, Any] = {
    **{k: replace(v, timeout=IMPATIENT) if v.distributed else v for k, v in STRATEGIES.items()},
    "fsdp_full": FSDPStrategy(state_dict_type="full", timeout=IMPATIENT, start_method="forkserver"),
    "tp_full": ModelParallelStrategy(save_distributed_checkpoint=False, timeout=IMPATIENT, start_method="forkserver"),
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


def without_dropout(run: Script) -> Script:
    """Worlds of different sizes draw different masks; without any their losses can be compared."""
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return run


def draw_alike(source: Case, target: Case) -> bool:
    """Whether every rank of the target goes on with the random numbers of the same rank of the source."""
    return source.world == target.world and "tp" not in source.name + target.name


def straight(fabric: Fabric, cases: list[Case], folder: Path) -> dict[Case, Any]:
    """Train, save on the way, go on; then load the checkpoint into the living objects and go on from it again."""

    def one(case: Case) -> tuple[list[list[float]], Outcome, Outcome, dict[str, Tensor], list[float]]:
        run = script(fabric, case, seed=1)
        first = train(run, SAVED_AT)
        run.model.note = "saved"
        run.state.update(best={"loss": 0.25, "at": (1, "b")}, t=torch.arange(4))
        run.fabric.save(folder / case.name, run.state)
        weights = {k: full(v).clone() for k, v in run.model.state_dict().items() if isinstance(v, Tensor)}
        uninterrupted = go_on(run)
        run.model.note = "later"
        run.fabric.load(folder / case.name, run.state)
        rewound = go_on(run)
        run.fabric.load(folder / case.name, run.state)
        return first, uninterrupted, rewound, weights, go_on(without_dropout(run)).means

    return {case: caught(one, case) for case in cases}


def resumed(fabric: Fabric, pairs: list[tuple[Case, Case]], folder: Path) -> dict[tuple[Case, Case], Any]:
    """For each (saved by, loaded by): load into new objects, save again, go on."""

    def one(source: Case, target: Case) -> Outcome:
        run = script(fabric, target, seed=5)
        run.fabric.load(folder / source.name, run.state)
        random_states = torch.get_rng_state()
        run.fabric.save(folder / f"{source.name}-by-{target.name}", run.state)
        assert torch.equal(random_states, torch.get_rng_state()), "saving drew random numbers"
        same = source == target or draw_alike(source, target)
        return go_on(run if same else without_dropout(run))

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
    ("ddp", 4),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("fsdp_full", 2),
    ("fsdp_offload", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("tp", 4),
    ("tp_full", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
]
"""As source and as target of one another, each with each, if they are among the crossed."""
_ALIKE = ("fsdp_full", "fsdp_offload", "tp_full", "zero2")
"""Their checkpoints are those of others."""
CROSSED = [pair for pair in RESUMES if pair[0] not in _ALIKE]
CROSSES = [
    *((Case(*source), Case(*target)) for source, target in itertools.permutations(CROSSED, 2)),
    (Case("fsdp_full", 2), Case("tp", 4)),
    (Case("zero3", 2), Case("tp_full", 2)),
    (Case("ddp", 2), Case("zero2", 2)),
    (Case("zero2", 2), Case("fsdp_offload", 2)),
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


def near(outcome: Outcome, expected: Outcome) -> Outcome:
    """With the expected losses, if its own are within rounding of them."""
    for step, other in zip(outcome.losses, expected.losses, strict=True):
        assert step == pytest.approx(other, rel=1e-5)
    return replace(outcome, losses=expected.losses)


@pytest.mark.parametrize("case", [c for s, w in RESUMES for c in own_cases(s, w)], ids=lambda case: case.name)
def test_goes_on_as_if_never_stopped(worlds: Worlds, case: Case) -> None:
    (first, uninterrupted, rewound, weights, _), other, (content, again) = worlds.pair(case, case)
    if (case.strategy, case.world) == ("ddp", 4):
        # DDP orders its buckets anew after its first step, and gloo's sum over four depends on the place in one.
        other, rewound = (near(outcome, uninterrupted) for outcome in (other, rewound))
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
    (_, uninterrupted, _, weights, dry), other, (content, again) = worlds.pair(source, target)
    same_state(content, again)
    assert all(torch.equal(content["model"][k], v) for k, v in weights.items())
    assert set(content["optimizer"]["state"]) == {k for k in weights if k != "seen"}
    assert replace(other, losses=[], next_draws=[]) == replace(uninterrupted, losses=[], next_draws=[])
    if draw_alike(source, target):
        assert other.means == pytest.approx(uninterrupted.means, rel=1e-5)
        assert other.next_draws == uninterrupted.next_draws
    else:
        assert other.means == pytest.approx(dry, rel=1e-5)


@pytest.mark.parametrize(("source", "target"), IN_16_BITS, ids=lambda case: case.name)
def test_16_bits_with_and_without_masters(worlds: Worlds, source: Case, target: Case) -> None:
    """ZeRO keeps float32 masters and moments of 16-bit weights, FSDP 16-bit moments: weights agree, and both train."""
    _, other, (content, again) = worlds.pair(source, target)
    same_tree(content["model"], again["model"])
    for name, values in again["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            same_tree(values[key].bfloat16(), content["optimizer"]["state"][name][key].bfloat16())
    masters = [name for name, values in again["optimizer"]["state"].items() if "fp32_master" in values]
    assert bool(masters) == (target.strategy == "zero3"), "a master that nobody updates is stale"
    assert all(torch.tensor(step).isfinite().all() for step in other.losses)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, moments and settings of two checkpoints, bit for bit."""
    same_tree(one["model"], other["model"])
    same_tree(one["optimizer"]["state"], other["optimizer"]["state"])
    groups = [content["optimizer"]["param_groups"] for content in (one, other)]
    here_only = {"foreach": None, "fused": None}
    assert [{**group, **here_only} for group in groups[0]] == [{**group, **here_only} for group in groups[1]]


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


# -- small rules, each in every strategy -------------------------------------------------------------------------------

Made = Callable[[list[nn.Parameter]], Optimizer]
RULES: list[Callable[[Fabric, Path], None]] = []


def rule(function: Callable[[Fabric, Path], None]) -> Callable[[Fabric, Path], None]:
    """A test that runs on every rank of one world; its folder is empty."""
    RULES.append(function)
    return function


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=1e-2, eps=1e-3)


def build(fabric: Fabric, module: nn.Module | None = None, made: Made = adamw) -> tuple[Any, Any]:
    """A net (of other weights each time) and its optimizer, set up."""
    module = Net() if module is None else module
    return fabric.setup(module, made([p for p in module.parameters() if p.requires_grad]))


def steps(fabric: Fabric, model: Any, optimizer: Any, count: int = 1, inputs: Tensor | None = None) -> list[float]:
    """Losses of this rank, at the same data and random numbers in each call."""
    torch.manual_seed(7)
    losses = []
    for _ in range(count):
        x = torch.linspace(-1, 1, 32).view(4, 8) if inputs is None else inputs
        loss = loss_of(model(x), torch.arange(len(x)) % 4)
        fabric.backward(loss, model=model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: Any) -> dict[str, Tensor]:
    return {k: full(v).clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def refused(fabric: Fabric, act: Callable[[], Any], *says: str) -> None:
    """Every rank must raise ``CheckpointError``, and say all of ``says``."""
    found: Any = None
    try:
        act()
    except CheckpointError as error:
        found = str(error)
    for text in gather_objects(fabric._running.world, found):
        assert text is not None, "a rank raised nothing"
        for part in says:
            assert part in text, text


def rank_zero(fabric: Fabric, act: Callable[[], Any]) -> None:
    with fabric.rank_zero_first():
        if fabric.is_global_zero:
            act()
    fabric.barrier()


def goes_on(fabric: Fabric, path: Path, build_one: Callable[[], tuple[Any, Any]], inputs: Tensor | None = None) -> None:
    """Train, save, go on; load into a new pair: it goes on with the same losses and comes to the same weights."""
    model, optimizer = build_one()
    steps(fabric, model, optimizer, 2, inputs)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    expected = steps(fabric, model, optimizer, 3, inputs)
    other, other_optimizer = build_one()
    fabric.load(path, {"model": other, "optimizer": other_optimizer})
    assert steps(fabric, other, other_optimizer, 3, inputs) == expected
    same_tree(weights(other), weights(model))


@rule
def sgd_without_momentum(fabric: Fabric, folder: Path) -> None:
    goes_on(fabric, folder / "c", lambda: build(fabric, made=lambda p: SGD(p, lr=0.1)))


@rule
def sgd_with_momentum(fabric: Fabric, folder: Path) -> None:
    goes_on(fabric, folder / "c", lambda: build(fabric, made=lambda p: SGD(p, lr=0.1, momentum=0.9)))


@rule
def several_groups(fabric: Fabric, folder: Path) -> None:
    rates = iter([(0.1, 0.01), (0.5, 0.5)])

    def one() -> tuple[Any, Any]:
        module, (first, second) = Net(), next(rates)
        head = {"params": list(module.head.parameters()), "lr": first, "weight_decay": 0.0, "name": "head"}
        blocks = {"params": list(module.blocks.parameters()), "lr": second, "betas": (0.8, 0.9), "name": "blocks"}
        return fabric.setup(module, AdamW([head, blocks], lr=1.0, eps=1e-3))

    goes_on(fabric, folder / "c", one)


@rule
def tied_weights(fabric: Fabric, folder: Path) -> None:
    tokens = torch.arange(20).view(4, 5) % 12
    goes_on(fabric, folder / "c", lambda: build(fabric, Tied()), tokens)
    model, _ = build(fabric, Tied())
    fabric.load(folder / "c", {"model": model})
    assert model.out.weight is model.embed.weight


@rule
def frozen_parameters(fabric: Fabric, folder: Path) -> None:
    inputs = torch.linspace(-1, 1, 12).view(4, 3)
    goes_on(fabric, folder / "stepped", lambda: build(fabric, Bare()), inputs)

    def with_frozen_in_it() -> tuple[Any, Any]:
        module = Bare()
        return fabric.setup(module, adamw(module.parameters()))

    goes_on(fabric, folder / "listed", with_frozen_in_it, inputs)


@rule
def nothing_is_invented_before_the_first_step(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric)
    before = weights(model)
    fabric.save(folder / "c", {"model": model, "optimizer": optimizer})
    same_tree(weights(model), before)
    saved = fabric.load(folder / "c")["optimizer"]["state"]
    assert all(not t.any() for values in saved.values() for t in values.values() if isinstance(t, Tensor))
    expected = steps(fabric, model, optimizer, 3)
    other, other_optimizer = build(fabric)
    steps(fabric, other, other_optimizer, 2)  # its own moments must be forgotten
    fabric.load(folder / "c", {"model": other, "optimizer": other_optimizer})
    assert steps(fabric, other, other_optimizer, 3) == expected
    same_tree(weights(other), weights(model))


@rule
def two_optimizers_share_nothing(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric)
    steps(fabric, model, optimizer, 2)
    fabric.save(folder / "c", {"model": model, "optimizer": optimizer})
    pairs = [build(fabric), build(fabric)]
    for other, other_optimizer in pairs:
        fabric.load(folder / "c", {"model": other, "optimizer": other_optimizer})
    losses = [steps(fabric, *pair, 2) for pair in pairs]
    assert losses[0] == losses[1]
    same_tree(weights(pairs[0][0]), weights(pairs[1][0]))


@rule
def two_models_and_two_optimizers(fabric: Fabric, folder: Path) -> None:
    """Keys with a dot in them: one is the beginning of the other, and so are names inside."""
    made = [build(fabric), build(fabric, made=lambda p: SGD(p, lr=0.1, momentum=0.9))]
    for pair in made:
        steps(fabric, *pair, 2)
    keys = [("net", "opt"), ("net.blocks", "opt.state")]
    state = {key: value for pair, names in zip(made, keys, strict=True) for key, value in zip(names, pair, strict=True)}
    fabric.save(folder / "c", {**state, "step": 2})
    expected = [steps(fabric, *pair) for pair in made]
    others = [build(fabric), build(fabric, made=lambda p: SGD(p, lr=0.1, momentum=0.9))]
    state = {key: v for pair, names in zip(others, keys, strict=True) for key, v in zip(names, pair, strict=True)}
    fabric.load(folder / "c", state)
    assert [steps(fabric, *pair) for pair in others] == expected


@rule
def plain_copies(fabric: Fabric, folder: Path) -> None:
    """An average kept as a module that is not set up, and one kept as a dictionary of what ``state_dict`` gave."""
    module = Net()
    ema = deepcopy(module)
    model, optimizer = build(fabric, module)
    steps(fabric, model, optimizer, 2)
    now = weights(model)
    ema.load_state_dict(now, strict=False)
    shards = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    fabric.save(folder / "c", {"ema": ema, "list": [shards], "model": model})
    fresh, state = Net(), {"list": None}
    fabric.load(folder / "c", {"ema": fresh})
    fabric.load(folder / "c", state)
    same_tree({k: v for k, v in fresh.state_dict().items() if k in now}, now)
    same_tree(state["list"][0], now)


@rule
def names_must_agree(fabric: Fabric, folder: Path) -> None:
    small, _ = build(fabric)
    large, _ = build(fabric, Net(blocks=3))
    fabric.save(folder / "small", {"model": small})
    fabric.save(folder / "large", {"model": large})
    third = [f"blocks.2.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")]
    before = weights(small), weights(large)
    refused(fabric, lambda: fabric.load(folder / "small", {"model": large}), "missing", "unexpected: none", *third)
    refused(fabric, lambda: fabric.load(folder / "large", {"model": small}), "missing: none", "unexpected", *third)
    same_tree(weights(small), before[0])
    same_tree(weights(large), before[1])
    fabric.load(folder / "small", {"model": large}, strict=False)
    same_tree(weights(large), {**before[1], **before[0]})
    fabric.load(folder / "large", {"model": small}, strict=False)
    refused(fabric, lambda: fabric.load(folder / "small", {"model": small, "ema": 0}), "lacks ema", "strict=False")
    state = {"model": small, "ema": 0}
    fabric.load(folder / "small", state, strict=False)
    assert state["ema"] == 0


@rule
def shapes_must_agree(fabric: Fabric, folder: Path) -> None:
    model, _ = build(fabric)
    wide, _ = build(fabric, Net(width=6))
    fabric.save(folder / "c", {"model": model})
    before = weights(wide)
    for strict in (True, False):
        act = lambda: fabric.load(folder / "c", {"model": wide}, strict=strict)  # noqa: B023, E731  # called at once
        refused(fabric, act, "head.weight: (6, 8) here, (4, 8) in the checkpoint", "head.bias: (6,) here")
    same_tree(weights(wide), before)


@rule
def optimizers_must_be_of_one_kind(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric, made=lambda p: SGD(p, lr=0.1, momentum=0.9))
    steps(fabric, model, optimizer)
    fabric.save(folder / "sgd", {"optimizer": optimizer})
    adam, adam_optimizer = build(fabric)
    act = lambda: fabric.load(folder / "sgd", {"optimizer": adam_optimizer})  # noqa: E731
    refused(fabric, act, "dampening", "momentum", "lacks", "betas")
    steps(fabric, adam, adam_optimizer)
    fabric.save(folder / "adam", {"optimizer": adam_optimizer})
    refused(fabric, lambda: fabric.load(folder / "adam", {"optimizer": optimizer}), "betas", "lacks", "dampening")
    wide, wide_optimizer = build(fabric, Net(width=6))
    act = lambda: fabric.load(folder / "adam", {"optimizer": wide_optimizer})  # noqa: E731
    refused(fabric, act, "exp_avg of head.", "(6", "(4")
    expected = steps(fabric, adam, adam_optimizer)
    assert expected != steps(fabric, wide, wide_optimizer), "a refused load must leave an optimizer that steps"


@rule
def filters_keep_what_they_say(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric)
    steps(fabric, model, optimizer)
    ema = Net()
    state = {"model": model, "optimizer": optimizer, "ema": ema, "step": 3}
    keep = {
        "model": lambda name, value: "head" in name and isinstance(value, Tensor),
        "ema": lambda name, value: "blocks.0" in name,
        "optimizer": lambda name, value: name == "param_groups",
    }
    fabric.save(folder / "c", state, filter=keep)
    content = fabric.load(folder / "c")
    assert set(content["model"]) == {"head.weight", "head.bias"}
    assert set(content["ema"]) == {k for k in ema.state_dict() if "blocks.0" in k}
    assert set(content["optimizer"]) == {"param_groups"}
    refused(fabric, lambda: fabric.load(folder / "c", {"model": model}), "missing", "blocks.0.up.weight")
    other, _ = build(fabric)
    before = weights(other)
    fabric.load(folder / "c", {"model": other}, strict=False)
    heads = {k: v for k, v in weights(model).items() if "head" in k}
    same_tree(weights(other), {**before, **heads})
    with pytest.raises(ConfigError, match="'step'"):
        fabric.save(folder / "d", state, filter={"step": lambda name, value: True})


class Pickled:
    """An object that only its own code can restore."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pickled)

    __hash__ = None  # type: ignore[assignment]


@rule
def code_runs_only_when_asked(fabric: Fabric, folder: Path) -> None:
    model, _ = build(fabric)
    fabric.save(folder / "c", {"model": model, "config": Pickled()})
    for state in ({"model": model}, {"config": None}, None):
        act = lambda: fabric.load(folder / "c", state)  # noqa: B023, E731  # called at once
        refused(fabric, act, "Pickled", "weights_only=False")
    state = {"config": None}
    fabric.load(folder / "c", state, weights_only=False)
    assert state["config"] == Pickled()
    rank_zero(fabric, lambda: torch.save({"w": Pickled()}, folder / "raw.pt"))
    refused(fabric, lambda: fabric.load_raw(folder / "raw.pt", model), "Pickled", "weights_only=False")


@rule
def what_is_beyond_comes_back(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric)
    steps(fabric, model, optimizer)
    fabric.save(folder / "c", {"model": model, "optimizer": optimizer, "step": 3, "names": ["a"]})
    remainder = fabric.load(folder / "c", {"model": model})
    assert {k: v for k, v in remainder.items() if k != "optimizer"} == {"step": 3, "names": ["a"]}
    content = fabric.load(folder / "c")
    assert {"model", "optimizer", "step", "names"} <= set(content)
    same_tree({k: v for k, v in content["model"].items() if isinstance(v, Tensor)}, weights(model))
    stepped = {name for name, p in Net().named_parameters() if p.requires_grad}
    assert set(content["optimizer"]["state"]) == stepped
    if "optimizer" in remainder:
        same_tree(remainder["optimizer"], content["optimizer"])


@rule
def plain_files_of_torch(fabric: Fabric, folder: Path) -> None:
    """``torch.save(model.state_dict())`` and ``torch.save(optimizer.state_dict())`` of a script without fabriclite."""
    torch.manual_seed(3)
    plain = Net()
    plain.note = "plain"
    plain_optimizer = adamw(plain.parameters())
    loss_of(plain(torch.ones(4, 8)), torch.arange(4)).backward()
    plain_optimizer.step()
    rank_zero(fabric, lambda: torch.save(plain.state_dict(), folder / "model.pt"))
    rank_zero(fabric, lambda: torch.save(plain_optimizer.state_dict(), folder / "optimizer.pt"))
    rank_zero(fabric, lambda: torch.save(Net(blocks=3).state_dict(), folder / "large.pt"))
    model, optimizer = build(fabric)
    fabric.load_raw(folder / "model.pt", model)
    same_tree(weights(model), {k: v for k, v in plain.state_dict().items() if isinstance(v, Tensor)})
    assert model.note == "plain"
    fabric.load_raw(folder / "optimizer.pt", optimizer)
    fabric.save(folder / "c", {"optimizer": optimizer})
    content = fabric.load(folder / "c")["optimizer"]["state"]
    for i, (name, _) in enumerate(plain.named_parameters()):
        same_tree(content[name], plain_optimizer.state_dict()["state"][i])
    before = weights(model)
    refused(fabric, lambda: fabric.load_raw(folder / "large.pt", model), "missing: none", "blocks.2.down.bias")
    same_tree(weights(model), before)
    fabric.load_raw(folder / "large.pt", model, strict=False)
    assert not torch.equal(weights(model)["head.weight"], before["head.weight"])


@rule
def what_cannot_be_written_is_raised(fabric: Fabric, folder: Path) -> None:
    model, optimizer = build(fabric)
    fabric.save(folder / "c", {"model": model, "step": 1})
    rank_zero(fabric, lambda: (folder / "file").write_text("text"))
    refused(fabric, lambda: fabric.save(folder / "file" / "c", {"model": model}), "Rank 0", "file")
    assert (folder / "file").read_text() == "text"
    before = weights(model)
    steps(fabric, model, optimizer)
    refused(fabric, lambda: fabric.save(folder / "c", {"model": model, "step": lambda: 0}), "write the checkpoint")
    content = fabric.load(folder / "c")
    assert content["step"] == 1
    same_tree({k: v for k, v in content["model"].items() if isinstance(v, Tensor)}, before)
    assert sorted(p.name for p in folder.iterdir()) == ["c", "file"]


@rule
def only_checkpoints_are_replaced(fabric: Fabric, folder: Path) -> None:
    model, _ = build(fabric)

    def fill() -> None:
        (folder / "notes").mkdir()
        (folder / "notes" / "a.txt").write_text("a")
        (folder / "text").write_text("b")
        (folder / "empty").mkdir()

    rank_zero(fabric, fill)
    refused(fabric, lambda: fabric.save(folder / "notes", {"model": model}), "notes is a folder", "would be lost")
    refused(fabric, lambda: fabric.save(folder / "text", {"model": model}), "text is a file", "would be lost")
    assert (folder / "notes" / "a.txt").read_text() == "a"
    assert (folder / "text").read_text() == "b"
    fabric.save(folder / "empty", {"step": 1})
    fabric.save(folder / "empty", {"step": 2})
    assert fabric.load(folder / "empty")["step"] == 2
    # The other form: another strategy saved here before.
    for other in ("fsdp", "ddp", "fsdp"):
        saver = fabric_like(fabric, other)
        fresh, _ = build(saver)
        saver.save(folder / "empty", {"model": fresh, "step": other})
        fabric.load(folder / "empty", {"model": model})
        same_tree(weights(model), weights(fresh))
    fabric.save(folder / "empty", {"model": model})
    assert sorted(p.name for p in folder.iterdir()) == ["empty", "notes", "text"]


@rule
def parameters_are_whole(fabric: Fabric, folder: Path) -> None:
    """Every parameter in a checkpoint has its full size, and under a file that plain torch can read."""
    model, _ = build(fabric)
    fabric.save(folder / "c", {"model": model})
    content = fabric.load(folder / "c")["model"]
    if (folder / "c").is_file():
        same_tree(torch.load(folder / "c", weights_only=True)["model"], content)
    assert {k: v.shape for k, v in content.items() if isinstance(v, Tensor)} == {
        k: v.shape for k, v in Net().state_dict().items() if isinstance(v, Tensor)
    }
    same_tree(fabric.broadcast(content), content)


@rule
def buffers_are_of_rank_zero(fabric: Fabric, folder: Path) -> None:
    """Running statistics differ between ranks where nobody averages them."""
    model, _ = build(fabric, ConvNet())
    for buffer in model.buffers():
        buffer.fill_(3 + fabric.global_rank)
    fabric.save(folder / "c", {"model": model})
    fabric.load(folder / "c", {"model": model})
    assert {b.unique().item() for b in model.buffers()} == {3}


@rule
def order_of_entries_does_not_matter(fabric: Fabric, folder: Path) -> None:
    """With 16-bit weights the optimizer may hold float32 masters, which those weights, loaded later, would round."""
    half = fabric_like(fabric, type_name(fabric), "bf16-true")
    model, optimizer = build(half)
    steps(half, model, optimizer, 2)
    half.save(folder / "c", {"optimizer": optimizer, "model": model})
    expected = steps(half, model, optimizer, 3)
    other, other_optimizer = build(half)
    half.load(folder / "c", {"optimizer": other_optimizer, "model": other})
    assert steps(half, other, other_optimizer, 3) == expected
    same_tree(weights(other), weights(model))


def type_name(fabric: Fabric) -> str:
    return next(name for name, config in HERE.items() if config == fabric.strategy)


RULED = [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("fsdp_full", 2), ("tp", 2), ("zero1", 2), ("zero3", 2)]


def follow(fabric: Fabric, strategies: list[str], folder: Path) -> dict[tuple[str, str], Any]:
    outcomes = {}
    for strategy in strategies:
        for function in RULES:
            mine = folder / strategy / function.__name__
            mine.mkdir(parents=True, exist_ok=True)
            outcomes[strategy, function.__name__] = caught(function, fabric_like(fabric, strategy), mine)
            if fabric.is_global_zero and list(mine.glob(".*")):
                outcomes[strategy, function.__name__] = "something is left from writing"
    return outcomes


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("rules")

    @cache
    def outcomes(kind: str, world: int) -> dict[tuple[str, str], Any]:
        strategies = [s for s, w in RULED if (Case(s, w).kind, w) == (kind, world)]
        try:
            return launch(follow, kind, world, strategies, folder)
        except LaunchError as error:
            return {(s, function.__name__): str(error) for s in strategies for function in RULES}

    return lambda strategy, world: outcomes(Case(strategy, world).kind, world)


@pytest.mark.parametrize("name", [function.__name__ for function in RULES])
@pytest.mark.parametrize(("strategy", "world"), RULED)
def test_rule(followed: Callable[[str, int], dict[Any, Any]], strategy: str, world: int, name: str) -> None:
    outcome = followed(strategy, world)[strategy, name]
    assert outcome is None, outcome


# -- cutting whole tensors ---------------------------------------------------------------------------------------------


def cuts_that_differ(fabric: Fabric) -> tuple[int, list[str]]:
    """How many tensors were cut, and those where this is not what torch cuts, or gathers again."""
    dice = random.Random(0)
    found: list[str] = []
    count = 0

    def compare(whole: Tensor, sharded: DTensor) -> None:
        nonlocal count
        count += 1
        parts = torch.equal(cut(whole, sharded), sharded.to_local()), torch.equal(full(sharded), whole)
        if not all(parts):
            found.append(f"{tuple(whole.shape)} {sharded.placements} {sharded.device_mesh.shape}: {parts}")

    ways: list[Placement] = [Shard(0), Shard(1), Replicate()]
    torch.manual_seed(0)
    for sizes in ((4,), (2, 2), (1, 4), (4, 1)):
        mesh = init_device_mesh("cpu", sizes)
        for placements in itertools.product(ways, repeat=len(sizes)):
            for _ in range(3):
                whole = torch.rand(dice.randint(1, 11), dice.randint(1, 11))
                compare(whole, distribute_tensor(whole, mesh, placements, src_data_rank=None))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for style, _ in itertools.product((ColwiseParallel(), RowwiseParallel()), range(8)):
        layer = nn.Linear(dice.randint(2, 11), dice.randint(2, 11))
        wholes = {name: p.detach().clone() for name, p in layer.named_parameters()}
        parallelize_module(layer, mesh["tensor"], style)
        fully_shard(layer, mesh=mesh["data"])
        for name, p in layer.named_parameters():
            compare(wholes[name], p)
    return count, [text for texts in gather_objects(fabric._running.world, found) for text in texts]


def test_cuts_as_torch_does() -> None:
    count, found = launch(cuts_that_differ, "ddp", 4)
    assert count == 3 * (3 + 9 + 9 + 9) + 2 * 16
    assert found == []


class Remembers(nn.Module):
    """Extra state that is itself a tensor, of a size that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.seen = torch.zeros(1)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def remembers(fabric: Fabric, path: Path) -> list[float]:
    model = fabric.setup(Remembers())
    model.seen = torch.arange(3.0)
    fabric.save(path, {"model": model})
    fresh = fabric.setup(Remembers())
    fabric.load(path, {"model": fresh})
    seen: list[float] = fresh.seen.tolist()
    return seen


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_extra_state_may_be_a_tensor_of_any_size(strategy: str, tmp_path: Path) -> None:
    assert run(remembers, strategy, 1, tmp_path / "checkpoint") == [0.0, 1.0, 2.0]


def test_modules_inside_a_list_are_refused_at_save(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ConfigError, match="'models' holds a Linear inside a list"):
        fabric.save(tmp_path / "checkpoint", {"models": [nn.Linear(1, 1), nn.Linear(1, 1)]})


def test_a_folder_with_more_than_a_checkpoint_is_kept(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="fsdp")
    model = fabric.setup(nn.Linear(2, 2))
    fabric.save(tmp_path / "folder", {"model": model})
    fabric.save(tmp_path / "folder", {"model": model})
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds more than a checkpoint"):
        fabric.save(tmp_path / "folder", {"model": model})
    assert (tmp_path / "folder" / "tokenizer.json").read_text() == "{}"


def test_a_foreign_archive_is_kept(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "thesis.docx", "w") as archive:
        archive.writestr("word/document.xml", "mine")
    with pytest.raises(CheckpointError, match="holds more than a checkpoint"):
        Fabric(accelerator="cpu", devices=1).save(tmp_path / "thesis.docx", {"step": 1})


def test_the_run_s_own_entry_stays_inside(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "file", {"step": 1})
    assert fabric.load(tmp_path / "file") == {"step": 1}

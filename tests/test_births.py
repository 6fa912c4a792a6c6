"""Every way of making tensors in ``__init__`` gives, under every strategy, what plain construction gives: to the bit.

One world of processes runs all patterns of one (strategy, world size, ``empty_init``) and returns what differed; each
(strategy, ``empty_init``, pattern) is a test that looks at its worlds. Every rank compares with a plain build of its
own at the same seed. The second suite does to the module, before it is set up, what users do then.
"""

import copy
import gc
import io
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fabriclite import Fabric, LaunchError, ModelParallelStrategy
from fabriclite.shards import full
from patterns import PATTERNS, seed
from snapshots import differences, moved, rng_states, snapshot
from worlds import STRATEGIES

SEED = 5
ALL_WORLDS: Final = {
    "single_device": (1,),
    "ddp": (1, 2, 3),
    "fsdp": (1, 2, 3),
    "tp_only": (1, 2, 3),
    "zero3": (1, 2, 3),
}
FEW_WORLDS: Final = {"single_device": (1,), "ddp": (2,), "fsdp": (2, 3), "tp_only": (2,), "zero3": (3,)}
WORLDS: Final = ALL_WORLDS if os.environ.get("FULL") else FEW_WORLDS
"""``make test FULL=1`` asks all of them: 30 s each."""
UNSHARDED: Final = ("single_device", "ddp")
"""Where tensors stay the user's own objects: classes, strides, shared memory and marks must be eager's too."""
EXCEPT: Final[Mapping[tuple[str, str], str]] = {
    # DDP itself: on the CPU it takes no SyncBatchNorm, which cannot compute there either
    ("synchronised_norms", "ddp"): "SyncBatchNorm layers only work with GPU modules",
    # DeepSpeed 0.19 wants trainable parameters of one dtype, of which it can keep copies in float32
    ("double_inside", "zero3"): "trainable parameters must be of at most float32",
    ("complex_numbers", "zero3"): "trainable parameters must be of at most float32",
    ("mixed_dtypes", "zero3"): "assert len(set(t.dtype for t in tensors)) == 1",
}
"""Where the library under a strategy refuses a pattern, built plainly or not, and what its error says."""
RESTARTS: Final = 3
"""How often a world is started again after a pattern hung or killed it."""
PATIENCE: Final = timedelta(seconds=20)
"""How long a rank waits for one that failed alone, before its world is given up."""

Between = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def _warm_fork_server() -> None:
    """The models of transformers take seconds to import, in every rank of every world: once is enough."""
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "bert", "vit")]
    forkserver.set_forkserver_preload(["fabriclite.strategies.fsdp", "torch._dynamo", *models, "test_births"])
    forkserver.ensure_running()  # has no effect if another test started it: then each rank imports them


# -- in a rank ---------------------------------------------------------------------------------------------------------


def split_plan(module: nn.Module) -> dict[str, str]:
    """A tensor-parallel plan for whatever layers ``module`` has, by columns and by rows in turn.

    Layers that share a weight are all split along its first dimension. What a parametrization or hook computes stays
    whole, and so does what is shared with something that cannot be split.
    """
    users: dict[int, set[nn.Module]] = {}
    for sub in module.modules():
        for param in sub.parameters(recurse=False):
            users.setdefault(id(param), set()).add(sub)
    layers = {name: sub for name, sub in module.named_modules() if name and _is_plain_layer(sub)}
    while held_back := [
        name for name, sub in layers.items() if any(users[id(p)] - set(layers.values()) for p in sub.parameters())
    ]:
        for name in held_back:
            del layers[name]
    plan = {}
    for turn, (name, layer) in enumerate(layers.items()):
        first = turn % 2 == 0 or any(len(users[id(p)]) > 1 for p in layer.parameters())
        by_rows = "embedding_rowwise" if isinstance(layer, nn.Embedding) else "rowwise_split_input"
        plan[name] = "colwise_gather_output" if first != isinstance(layer, nn.Embedding) else by_rows
    return plan


def _is_plain_layer(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return isinstance(module, nn.Linear | nn.Embedding) and "weight" in names and names <= {"weight", "bias"}


def fabric_for(strategy: str, module: nn.Module, world: int) -> Fabric:
    """A Fabric of its own for each pattern: none has to look at what others set up before it."""
    config = STRATEGIES[strategy]
    if strategy == "tp_only":
        plan = split_plan(module)
        whole = None if plan else (lambda module, mesh: module)
        config = ModelParallelStrategy(plan=plan or None, parallelize_fn=whole, data_parallel_size=1)
    return Fabric(accelerator="cpu", strategy=config, devices=world)


def set_up(fabric: Fabric, strategy: str, module: nn.Module) -> Any:
    trainable = [p for p in module.parameters() if p.requires_grad]
    if strategy != "zero3" or not trainable:
        return fabric.setup(module)
    return fabric.setup(module, torch.optim.SGD(trainable, lr=0.1))[0]


def problem_of(work: Callable[[], list[str]]) -> str | None:
    try:
        return "\n".join(work()) or None
    except Exception:
        return traceback.format_exc()


def agreed(problem: str | None) -> str | None:
    """The problems of all ranks, alike on all. Every rank must call this."""
    if not dist.is_initialized():
        return problem
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, problem)
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(every) if text) or None


def check(strategy: str, world: int, build: Callable[[], nn.Module], between: Between, empty: bool | None) -> Any:
    """What differs from eager on any rank; ``None`` if nothing does. Every rank must call this."""
    seed(SEED)
    eager = build()
    after_init = rng_states()
    eager = between(eager)
    after_all, expected = rng_states(), snapshot(eager)
    fabric = fabric_for(strategy, eager, world)
    modules: list[nn.Module] = []

    def birth() -> list[str]:
        seed(SEED)
        with fabric.init_module(empty_init=empty):
            modules.append(build())
        problems = moved(after_init, rng_states(), "init_module")
        modules.append(between(modules.pop()))
        return problems

    def settle() -> list[str]:
        model = set_up(fabric, strategy, modules[0])
        return moved(after_all, rng_states(), "setup") + differences(
            expected, snapshot(model), layout=strategy in UNSHARDED
        )

    # Two steps: a rank that fails alone in its own code must not leave the others in a collective of setup's.
    return agreed(problem_of(birth)) or agreed(problem_of(settle))


def check_all(fabric: Fabric, suite: str, strategy: str, empty_init: bool | None, names: list[str], log: str) -> None:
    """Check one after the other; rank 0 writes down what was found as it goes."""
    for name in names:
        gc.freeze()  # DeepSpeed collects garbage in every set-up, and would look at all that was ever imported
        build, between = SUITES[suite][name]
        problem = check(strategy, fabric.world_size, build, between, empty_init)
        if fabric.is_global_zero:
            with open(log, "a") as file:
                file.write(json.dumps([name, problem]) + "\n")


# -- in the test's process ---------------------------------------------------------------------------------------------


def launch(strategy: str, world: int, function: Callable[..., Any], *args: Any) -> Any:
    config = STRATEGIES[strategy]
    if strategy != "single_device":
        config = replace(config, timeout=PATIENCE)
    return Fabric(accelerator="cpu", strategy=config, devices=world).launch(function, *args)


@cache
def problems_in(suite: str, strategy: str, world: int, empty_init: bool | None) -> dict[str, str | None]:
    """What differed, by name. A name that takes its world down has that as its problem, and the others go on."""
    waiting, found = list(SUITES[suite]), dict[str, str | None]()
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(RESTARTS + 1):
            log = Path(folder, str(attempt))
            log.touch()
            try:
                launch(strategy, world, check_all, suite, strategy, empty_init, waiting, str(log))
                error = "was never reached"
            except LaunchError as exception:
                error = str(exception)
            found.update(json.loads(line) for line in log.read_text().splitlines())
            waiting = [name for name in waiting if name not in found]
            if waiting:
                found[waiting.pop(0)] = error
            if not waiting:
                break
    return found | dict.fromkeys(waiting, f"not run: {RESTARTS + 1} worlds failed before")


# -- between init_module and setup -------------------------------------------------------------------------------------


class Small(nn.Module):
    """Something of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 7, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 7))
        self.head = nn.Linear(7, 33, bias=False)
        self.scale = nn.Parameter(torch.randn(7) * 0.02 + 1)
        self.register_buffer("table", torch.rand(7))
        self.register_buffer("hidden", torch.arange(5.0), persistent=False)
        nn.init.trunc_normal_(self.head.weight, std=0.5, a=-1, b=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) * self.scale) + self.table)


def saved_state() -> dict[str, Tensor]:
    """A checkpoint of ``Small`` from elsewhere; drawing it moves no generator of the run's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        return Small().state_dict()


def unchanged(module: nn.Module) -> nn.Module:
    return module


def loads(module: nn.Module) -> nn.Module:
    assert str(module.load_state_dict(saved_state())) == "<All keys matched successfully>"
    return module


def loads_a_part(module: nn.Module) -> nn.Module:
    """What is not loaded keeps what its own code gave it."""
    state = {k: v for k, v in saved_state().items() if k.startswith("body")}
    keys = module.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["scale", "table", "embed.weight", "head.weight"]
    return module


def assigns(module: nn.Module) -> nn.Module:
    module.load_state_dict(saved_state(), assign=True)
    return module


def assigns_a_part(module: nn.Module) -> nn.Module:
    state = {"head.weight": saved_state()["head.weight"], "table": torch.ones(7)}
    module.load_state_dict(state, strict=False, assign=True)
    return module


def loads_into_a_layer(module: Any) -> nn.Module:
    module.body[0].load_state_dict({"weight": torch.ones(13, 7), "bias": torch.arange(13.0)})
    module.body[2].load_state_dict({k: v.clone() * 2 for k, v in module.body[2].state_dict().items()})
    return module


def halves(module: nn.Module) -> nn.Module:
    return module.half()


def casts(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16)


def moves(module: nn.Module) -> nn.Module:
    return module.to("cpu").cpu().float().train().eval()


def applies(module: nn.Module) -> nn.Module:
    def init(layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)

    return module.apply(init)


def initialises(module: Any) -> nn.Module:
    nn.init.kaiming_normal_(module.head.weight)
    nn.init.trunc_normal_(module.body[0].weight, std=0.5, a=-0.5, b=0.5)
    nn.init.orthogonal_(module.body[2].weight)
    nn.init.zeros_(module.body[0].bias)
    return module


def writes(module: Any) -> nn.Module:
    module.head.weight.data[:3] = 0.5
    module.body[0].bias.data.mul_(2)
    with torch.no_grad():
        module.body[2].weight.copy_(torch.eye(7, 13))
        module.embed.weight[4:7].normal_()
    module.table.add_(1)
    return module


def freezes(module: Any) -> nn.Module:
    module.embed.requires_grad_(False)
    module.body[1].bias.requires_grad = False
    return module


def ties(module: Any) -> nn.Module:
    module.head.weight = module.embed.weight
    return module


def copies(module: nn.Module) -> nn.Module:
    """The copy is set up; what is done to the original later does not reach it."""
    copied = copy.deepcopy(module)
    for param in module.parameters():
        param.data.fill_(7)
    return copied


def adds_layers(module: Any) -> nn.Module:
    """Real tensors beside recorded ones; their numbers follow on what ``init_module`` drew."""
    module.extra = nn.Linear(7, 5)
    module.gain = nn.Parameter(torch.randn(17))
    module.register_buffer("late", torch.rand(3))
    return module


def replaces_layers(module: Any) -> nn.Module:
    module.head = nn.Linear(7, 5)
    module.scale = nn.Parameter(torch.ones(7))
    del module.table
    return module


def wraps(module: Any) -> nn.Module:
    """Into a root that was built outside; and a part of it is in an optimizer-style list."""
    root = nn.Sequential(nn.Linear(3, 7), module, nn.Linear(33, 2))
    root.held = [module.head.weight]
    return root


def adapts(module: Any) -> nn.Module:
    for param in module.parameters():
        param.requires_grad_(False)
    module.down, module.up = nn.Linear(7, 3, bias=False), nn.Linear(3, 7, bias=False)
    nn.init.zeros_(module.up.weight)
    return module


def normalises(module: Any) -> nn.Module:
    parametrizations.weight_norm(module.body[0])
    return module


def reads(module: Any) -> nn.Module:
    module.norm = module.head.weight.detach().norm().item()
    module.listed = module.scale.tolist()
    module.largest = float(module.body[0].bias.data.max())
    module.count = sum(p.numel() for p in module.parameters())
    module.array = module.table.numpy().copy()
    module.sums = {name: param.detach().double().sum().item() for name, param in module.named_parameters()}
    return module


def saves(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    module.load_state_dict({k: v * 0.5 for k, v in torch.load(file, weights_only=True).items()})
    return module


def seeds_again(module: Any) -> nn.Module:
    """What was recorded keeps its place in the old stream."""
    torch.manual_seed(77)
    module.late = nn.Parameter(torch.randn(17))
    nn.init.normal_(module.head.weight)
    return module


WORKS: Final[tuple[Between, ...]] = (
    loads,
    loads_a_part,
    assigns,
    assigns_a_part,
    loads_into_a_layer,
    halves,
    casts,
    moves,
    applies,
    initialises,
    writes,
    freezes,
    ties,
    copies,
    adds_layers,
    replaces_layers,
    wraps,
    adapts,
    normalises,
    reads,
    saves,
    seeds_again,
)
SUITES: Final[dict[str, dict[str, tuple[Callable[[], nn.Module], Between]]]] = {
    "births": {name: (build, unchanged) for name, build in PATTERNS.items()},
    "works": {work.__name__: (Small, work) for work in WORKS},
}
"""By suite and name: how to build a module, and what to do with it between ``init_module`` and ``setup``."""


# -- tests -------------------------------------------------------------------------------------------------------------


def worlds_of(strategy: str, empty_init: bool | None) -> tuple[int, ...]:
    """All of the strategy's; for ``None``, which promises what ``True`` does, one where something is shared out."""
    return WORLDS[strategy] if empty_init else ALL_WORLDS[strategy][:2][-1:]


@pytest.mark.parametrize("empty_init", [None, True])
@pytest.mark.parametrize("strategy", WORLDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_births(name: str, strategy: str, empty_init: bool | None) -> None:
    for world in worlds_of(strategy, empty_init):
        problem = problems_in("births", strategy, world, empty_init)[name]
        if (name, strategy) in EXCEPT:
            assert problem is not None, "works by now: take it out of EXCEPT"
            assert "Traceback" in problem, "is refused, and not wrong"
            assert EXCEPT[name, strategy] in problem
        else:
            assert problem is None, f"{world} ranks:\n{problem}"


@pytest.mark.parametrize("strategy", WORLDS)
@pytest.mark.parametrize("name", SUITES["works"])
def test_work_between_init_and_setup(name: str, strategy: str) -> None:
    (world,) = worlds_of(strategy, None)
    problem = problems_in("works", strategy, world, True)[name]
    assert problem is None, problem


def test_exceptions_name_patterns() -> None:
    assert all(name in PATTERNS and strategy in WORLDS for name, strategy in EXCEPT)


def steps(fabric: Fabric, strategy: str, kind: str) -> list[str]:
    """An optimizer of recorded parameters, made before ``setup``, steps what eager's steps."""

    def optimizer_of(module: Any) -> torch.optim.Optimizer:
        groups = [{"params": module.body.parameters(), "lr": 0.05}, {"params": [module.head.weight, module.scale]}]
        if kind == "adagrad":  # its state is there at once
            return torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.1)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    tokens = torch.arange(1, 31).view(6, 5)
    seed(SEED)
    eager = Small()
    plain = optimizer_of(eager)
    for _ in range(2):
        eager(tokens).square().mean().backward()
        plain.step()
        plain.zero_grad()
    own = fabric_for(strategy, eager, fabric.world_size)
    seed(SEED)
    with own.init_module(empty_init=True):
        module = Small()
    model, optimizer = own.setup(module, optimizer_of(module))
    for _ in range(2):
        own.backward(model(tokens).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    state = {name: full(value) for name, value in model.state_dict().items()}
    return [
        f"{name}: off by {(value - state[name]).abs().max().item()}"
        for name, value in eager.state_dict().items()
        if not torch.allclose(value, state[name], rtol=1e-5, atol=1e-6)
    ]


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [(s, k) for s in WORLDS for k in ("sgd", "adagrad") if (s, k) != ("zero3", "adagrad")],  # which we refuse
)
def test_an_optimizer_made_before_setup(strategy: str, kind: str) -> None:
    (world,) = worlds_of(strategy, None)
    assert launch(strategy, world, steps, strategy, kind) == []


def seeded_apart(fabric: Fabric, strategy: str) -> list[str]:
    """Ranks that were seeded differently hold one model: rank 0's."""
    seed(SEED)
    expected = snapshot(Small())
    own = fabric_for(strategy, Small(), fabric.world_size)
    seed(SEED + fabric.global_rank)
    with own.init_module(empty_init=True):
        module = Small()
    actual = snapshot(set_up(own, strategy, module))
    return (agreed("\n".join(differences(expected, actual, layout=False))) or "").splitlines()


@pytest.mark.parametrize("strategy", [s for s in WORLDS if s != "single_device"])
def test_ranks_seeded_apart_hold_rank_zeros_model(strategy: str) -> None:
    assert launch(strategy, 2, seeded_apart, strategy) == []


def two_models(fabric: Fabric, strategy: str) -> list[str]:
    """Two models of one context and one of another; set up in another order, with drawing between."""
    seed(SEED)
    first, second, third = Small(), Small(), Small()
    expected = [snapshot(module) for module in (first, second, third)]
    own = fabric_for(strategy, first, fabric.world_size)
    seed(SEED)
    with own.init_module(empty_init=True):
        modules = [Small(), Small()]
    with own.init_module(empty_init=True):
        modules.append(Small())
    problems = []
    for index in (2, 0, 1):
        torch.randn(5)
        model = set_up(own, strategy, modules[index])
        problems += differences(expected[index], snapshot(model), layout=strategy in UNSHARDED)
    return (agreed("\n".join(problems)) or "").splitlines()


@pytest.mark.parametrize("strategy", WORLDS)
def test_several_models_in_any_order(strategy: str) -> None:
    (world,) = worlds_of(strategy, None)
    assert launch(strategy, world, two_models, strategy) == []


def test_a_hook_on_a_parameter_stays() -> None:
    seen: list[str] = []

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(7, 3)
            self.lin.weight.register_hook(lambda grad: seen.append("gradient"))
            self.lin.bias.register_post_accumulate_grad_hook(lambda param: seen.append("accumulated"))

    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    with fabric.init_module(empty_init=True):
        module = Hooked()
    model = fabric.setup(module)
    model.lin(torch.ones(2, 7)).sum().backward()
    assert sorted(seen) == ["accumulated", "gradient"]


# -- materialize -------------------------------------------------------------------------------------------------------

needs_materialize = pytest.mark.skipif(not hasattr(Fabric, "materialize"), reason="there is no Fabric.materialize yet")


@needs_materialize
@pytest.mark.parametrize("name", PATTERNS)
def test_materialize(name: str) -> None:
    seed(SEED)
    eager = PATTERNS[name]()
    states, expected = rng_states(), snapshot(eager)
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    seed(SEED)
    with fabric.init_module(empty_init=True):
        module = PATTERNS[name]()
    assert fabric.materialize(module) is module
    assert moved(states, rng_states(), "materialize") == []
    assert differences(expected, snapshot(module), layout=True) == []


@needs_materialize
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_materialize_after_work(work: Between) -> None:
    seed(SEED)
    expected = snapshot(work(Small()))
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    seed(SEED)
    with fabric.init_module(empty_init=True):
        module = Small()
    assert differences(expected, snapshot(fabric.materialize(work(module))), layout=True) == []


def materialized(fabric: Fabric, strategy: str) -> list[str]:
    """Whole tensors on every rank, twice the same; work goes on, and ``setup`` shards what is there then."""
    seed(SEED)
    eager = Small()
    expected = snapshot(eager)
    own = fabric_for(strategy, eager, fabric.world_size)
    seed(SEED)
    with own.init_module(empty_init=True):
        module = Small()
    problems: list[str] = []
    for _ in range(2):
        problems += differences(expected, snapshot(own.materialize(module)), layout=True)
    for each in (eager, module):
        seed(SEED)  # it draws
        writes(each)
    problems += differences(snapshot(eager), snapshot(set_up(own, strategy, module)), layout=False)
    return (agreed("\n".join(problems)) or "").splitlines()


@needs_materialize
@pytest.mark.parametrize("strategy", WORLDS)
def test_materialize_on_every_rank(strategy: str) -> None:
    (world,) = worlds_of(strategy, None)
    assert launch(strategy, world, materialized, strategy) == []


# -- the yardstick itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_write_all_they_make(name: str) -> None:
    """Memory that nobody wrote would differ between any two builds; here torch fills it, with NaN or the largest."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        seed(SEED)
        filled = snapshot(PATTERNS[name]())
    finally:
        torch.use_deterministic_algorithms(False)
    seed(SEED)
    assert differences(snapshot(PATTERNS[name]()), filled, layout=True) == []
    assert not any(held.value.isnan().any() for held in filled.tensors.values())


def _set(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value(module))

    return change


def _unmark(module: Any) -> None:
    del module.head.weight.mark


CHANGES: Final[dict[str, tuple[Callable[[Any], None], bool]]] = {
    "value of head.weight": (lambda m: m.head.weight.data[-1, -1].neg_(), False),
    "value of table": (lambda m: m.table[0].add_(1e-7), False),
    "value of :plain": (lambda m: m.plain.neg_(), False),
    "memory of table": (_set("table", lambda m: m.table.to("meta")), False),
    "dtype of scale": (_set("scale", lambda m: nn.Parameter(m.scale.data.double())), False),
    "shape of scale": (_set("scale", lambda m: nn.Parameter(m.scale.data[:, None])), False),
    "requires_grad of head.weight": (lambda m: m.head.weight.requires_grad_(False), False),
    "names of parameters": (_set("late", lambda m: nn.Parameter(torch.ones(1))), False),
    "names of buffers": (lambda m: m.register_buffer("late", torch.ones(1)), False),
    "names of modules": (_set("body.3", lambda m: nn.Identity()), False),
    "keys of the state dict": (lambda m: m.register_buffer("table", m.table, persistent=False), False),
    "one object": (_set("embed.weight", lambda m: nn.Parameter(m.embed.weight.data)), False),
    ":number": (_set("number", lambda m: 1.0), False),
    ":listed[1]": (_set("listed", lambda m: [1.0, 3.0]), False),
    "class of scale": (_set("scale", lambda m: type("Own", (nn.Parameter,), {})(m.scale.data)), True),
    "stride of scale": (_set("scale", lambda m: nn.Parameter(m.scale.data.repeat(2).view(7, 2).t()[0])), True),
    "marks on head.weight": (_unmark, True),
    "one storage": (_set("plain", lambda m: m.plain.clone()), True),
}


def _yardstick(change: Callable[[Any], None] | None = None) -> nn.Module:
    seed(SEED)
    module: Any = Small()
    module.head.weight = module.embed.weight
    module.plain, module.number, module.listed = module.table[2:4], 0.5, [1.0, 2.0]
    module.scale = nn.Parameter(torch.arange(7.0))
    module.head.weight.mark = True
    if change is not None:
        change(module)
    return module


@pytest.mark.parametrize("what", CHANGES)
def test_the_comparison_sees(what: str) -> None:
    change, layout = CHANGES[what]
    expected, actual = snapshot(_yardstick()), snapshot(_yardstick(change))
    assert what in str(differences(expected, actual, layout=True))
    assert (what in str(differences(expected, actual, layout=False))) is not layout
    assert differences(expected, snapshot(_yardstick()), layout=True) == []


def test_the_comparison_sees_a_generator_that_moved() -> None:
    seed(SEED)
    before = rng_states()
    torch.rand(1)
    assert moved(before, rng_states(), "a draw") == ["torch generator after a draw"]


def test_split_plan_splits() -> None:
    """Both ways of cutting occur, ties are cut alike, and what shares a weight with a plain parameter stays whole."""
    module: Any = Small()
    assert split_plan(module) == {
        "embed": "embedding_rowwise",
        "body.0": "rowwise_split_input",
        "body.2": "colwise_gather_output",
        "head": "rowwise_split_input",
    }
    module.head.weight = module.embed.weight
    assert split_plan(module)["head"] == "colwise_gather_output"
    module.extra = module.embed.weight
    assert set(split_plan(module)) == {"body.0", "body.2"}

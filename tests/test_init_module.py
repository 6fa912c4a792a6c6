"""What ``init_module`` means and costs, and what may happen around it: contexts, errors, modes, loading, other tensors.

That values come out right pattern by pattern is in ``test_births``. One world of processes does all checks of one
strategy; every check is a test that looks at what it found.
"""

import copy
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from fabriclite import Fabric, LaunchError, MaterializeError, ModelParallelStrategy, SetupOrderError
from patterns import PATTERNS, seed
from snapshots import Snapshot, bits_equal, differences, moved, rng_states, snapshot, whole
from test_births import agreed, problem_of
from worlds import STRATEGIES

SEED: Final = 7
WORLDS: Final = {"single_device": 1, "ddp": 2, "fsdp": 2, "tp": 2, "zero1": 2, "zero3": 2, "fsdp_offload": 2, "hsdp": 4}
PATIENCE: Final = timedelta(seconds=20)
"""How long a rank waits for one that failed alone."""


class Small(nn.Module):
    """Something of each kind, and a plan to split it."""

    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 8, padding_idx=0)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 33, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(8) * 0.02 + 1)
        self.register_buffer("table", torch.rand(8))
        self.register_buffer("hidden", torch.arange(5.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(self.embed(tokens)).relu()) * self.scale + self.table))


class Hard(nn.Module):
    """Draws that are found only by drawing, or that factorise what they drew."""

    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.after = nn.Linear(12, 34), nn.Linear(34, 12), nn.Linear(12, 5)
        nn.init.orthogonal_(self.up.weight, gain=1.4)
        nn.init.trunc_normal_(self.down.weight, std=0.5, a=-0.3, b=0.6)
        nn.init.trunc_normal_(self.after.weight, std=1.0, a=0.5, b=1.0)
        self.mask = nn.Parameter(torch.bernoulli(torch.full((12, 5), 0.3)), requires_grad=False)
        nn.init.sparse_(self.after.weight, sparsity=0.3)


TOKENS: Final = torch.arange(1, 31).view(6, 5)


def one(strategy: str = "single_device", **arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", strategy=strategy, devices=1, **arguments)


def built(build: Callable[[], nn.Module], number: int = SEED) -> Any:
    """By plain construction."""
    seed(number)
    return build()


def recorded(fabric: Fabric, build: Callable[[], nn.Module] = Small, empty_init: bool | None = True) -> Any:
    seed(SEED)
    with fabric.init_module(empty_init=empty_init):
        return build()


def set_up(fabric: Fabric, module: nn.Module) -> Any:
    trainable = [p for p in module.parameters() if p.requires_grad]
    return fabric.setup(module, torch.optim.SGD(trainable, lr=0.1))[0]


def is_real(tensor: Tensor) -> bool:
    """Whether its elements lie somewhere, whatever it answers."""
    return tensor.untyped_storage().data_ptr() != 0


def modes_left() -> list[object]:
    """What is on torch's stacks of modes in this thread."""
    return [*dispatch_modes(), *function_modes()]


def values(model: Any) -> dict[str, Tensor]:
    """Whole parameters and buffers by name. Every rank must call this."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: whole(tensor) for name, tensor in named}


def unlike(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ, or that only one side has."""
    names = [n for n in expected if n not in actual or expected[n].dtype != actual[n].dtype]
    wrong = [n for n in expected if n not in names and not bits_equal(expected[n], actual[n])]
    return [*names, *wrong, *(n for n in actual if n not in expected)]


# -- checks that run on every rank of a world --------------------------------------------------------------------------

REAL_INSIDE: Final = {
    "single_device": (True, True, False),
    "ddp": (True, True, False),
    "zero1": (True, True, False),
    "fsdp": (False, True, False),
    "fsdp_offload": (False, True, False),
    "hsdp": (False, True, False),
    "tp": (False, True, False),
    "zero3": (False, True, False),
}
"""For ``empty_init`` of None, False and True: whether tensors have memory inside the context."""


def meaning(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Of ``empty_init``: real at once or not at all, told alike in both cases, and the same values after setup."""
    expected, problems = values(built(Small)), []
    for empty_init, real in zip((None, False, True), REAL_INSIDE[strategy], strict=True):
        seed(SEED)
        with fabric.init_module(empty_init=empty_init):
            module = Small()
            tensors = [*module.parameters(), *module.buffers()]
            if any(t.is_meta or t.device != fabric.device for t in tensors):
                problems.append(f"{empty_init}: answers that it is elsewhere")
        if any(is_real(t) is not real for t in tensors):
            problems.append(f"{empty_init}: memory inside")
        problems += [f"{empty_init}: {name}" for name in unlike(expected, values(set_up(fabric, module)))]
    return problems


def seeded_apart(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Rank 0's values are the model's, also those that no rank can work out in parts."""
    problems = []
    for build in (Small, Hard):
        expected = values(built(build))
        seed(SEED + fabric.global_rank)
        with fabric.init_module(empty_init=True):
            module = build()
        problems += unlike(expected, values(set_up(fabric, module)))
    return problems


def hard_draws(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    expected = values(built(Hard))
    return unlike(expected, values(set_up(fabric, recorded(fabric, Hard))))


def file_in(folder: Path, *without: str) -> tuple[Path, dict[str, Tensor]]:
    """A file that every rank writes under a name of its own: what ``torch.save`` writes, of another seed."""
    state = {k: v for k, v in built(Small, 123).state_dict().items() if k not in without}
    path = folder / f"{os.getpid()}-{'-'.join(without)}.pt"
    torch.save(state, path)
    return path, state


WAYS: Final[dict[str, Callable[[Fabric, Any, Path], object]]] = {
    "load_state_dict": lambda _, m, path: m.load_state_dict(torch.load(path), strict=False),
    "load_state_dict from a map": lambda _, m, path: m.load_state_dict(torch.load(path, mmap=True), strict=False),
    "load_state_dict assign": lambda _, m, path: m.load_state_dict(torch.load(path), strict=False, assign=True),
    "load_raw": lambda fabric, m, path: fabric.load_raw(path, m, strict=False),
}


def loaded(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """What is loaded before setup is the file's, and the rest its own code's, also where the file is gone by then."""
    own, problems = values(built(Small)), []
    for way, load in WAYS.items():
        for without in ((), ("up.weight", "table")):
            module = recorded(fabric)
            path, state = file_in(folder, *without)
            load(fabric, module, path)
            path.unlink()
            # assign replaces the parameter under each of its names, and so unties it, with recording or without
            model = set_up(fabric, module)
            problems += [f"{way} but {without}: {name}" for name in unlike({**own, **state}, values(model))]
    return problems


def computes(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """What was recorded trains as what was built."""
    losses = []
    for empty_init in (True, False):
        module = recorded(fabric, empty_init=empty_init)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for _ in range(2):
            loss = model(TOKENS).square().mean()
            fabric.backward(loss, model=model)
            optimizer.step()
            optimizer.zero_grad()
        losses.append((loss.item(), values(model)))
    (first, state), (second, other) = losses
    return unlike(state, other) + ([] if first == second else [f"loss {first} and {second}"])


def two_that_share(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Two recorded models that share a parameter, set up one after the other; the second needs more, or just that."""
    problems = []
    for more in ([nn.Linear], []):

        def pair(more: list[Any] = more) -> tuple[nn.Module, nn.Module]:
            one, two = nn.Sequential(nn.Embedding(33, 8)), nn.Sequential(nn.Linear(8, 33, bias=False))
            two.extend(layer(33, 5) for layer in more)
            two[0].weight = one[0].weight
            return one, two

        seed(SEED)
        expected = [values(module) for module in pair()]
        seed(SEED)
        with fabric.init_module(empty_init=True):
            modules = pair()
        models = [set_up(fabric, module) for module in modules]
        problems += [name for e, model in zip(expected, models, strict=True) for name in unlike(e, values(model))]
    return problems + [f"{mode} is left" for mode in modes_left()]


def offloaded(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    model = set_up(fabric, recorded(fabric))
    return [n for n, p in model.named_parameters() if p.to_local().device.type != "cpu" or p.to_local().is_meta]


def from_pretrained(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    from transformers import LlamaForCausalLM

    reference = built(PATTERNS["hf_llama"], 123)
    if fabric.is_global_zero:  # elsewhere it would write nothing
        reference.save_pretrained(folder / "llama")
    fabric.barrier()
    seed(SEED)
    with fabric.init_module(empty_init=True):
        module = LlamaForCausalLM.from_pretrained(folder / "llama")
    model = set_up(fabric, module)
    tokens = TOKENS[:, :4]
    with torch.no_grad():
        same = torch.equal(model.eval()(tokens).logits, reference.eval()(tokens).logits)
    return unlike(values(reference), values(model)) + ([] if same else ["logits"])


Check = Callable[[Fabric, str, Path], list[str]]
SHARED: Final = ("ddp", "fsdp", "tp", "zero3")
CHECKS: Final[list[tuple[Check, tuple[str, ...]]]] = [
    (meaning, tuple(WORLDS)),
    (computes, tuple(WORLDS)),
    (hard_draws, ("single_device", *SHARED, "hsdp")),
    (seeded_apart, (*SHARED, "hsdp")),
    (loaded, ("single_device", *SHARED)),
    (offloaded, ("fsdp_offload",)),
    (from_pretrained, ("single_device", "fsdp")),
    (two_that_share, ("single_device", "ddp", "fsdp")),  # two engines of DeepSpeed cannot share a parameter
]


def run_checks(fabric: Fabric, strategy: str, folder: Path) -> dict[str, str | None]:
    """Problems of all ranks by check. One that fails alone is waited for, and takes the world with it."""
    found = {}
    for check, strategies in CHECKS:
        if strategy in strategies:
            found[check.__name__] = agreed(problem_of(lambda check=check: check(fabric, strategy, folder)))
    return found


def launch(strategy: str, function: Callable[..., Any]) -> Any:
    config = STRATEGIES[strategy]
    config = config if strategy == "single_device" else replace(config, timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        fabric = Fabric(accelerator="cpu", strategy=config, devices=WORLDS[strategy])
        return fabric.launch(function, strategy, Path(folder))


@cache
def found_under(strategy: str) -> dict[str, str | None]:
    try:
        return launch(strategy, run_checks)  # type: ignore[no-any-return]
    except LaunchError as error:  # kept as well: the other checks of this world need not wait for the same end
        return {check.__name__: str(error) for check, _ in CHECKS}


@pytest.mark.parametrize(
    ("strategy", "check"),
    [pytest.param(s, check, id=f"{s}-{check.__name__}") for check, strategies in CHECKS for s in strategies],
)
def test_in_a_world(strategy: str, check: Check) -> None:
    problem = found_under(strategy)[check.__name__]
    assert problem is None, problem


def cuts_by_hand(module: Any, mesh: Any) -> nn.Module:
    """As code for Megatron-like layers does, without DTensor."""
    rank = mesh["tensor_parallel"].get_local_rank()
    for name, param in list(module.up.named_parameters()):
        setattr(module.up, name, nn.Parameter(param.detach()[10 * rank : 10 * rank + 10]))
    return module  # type: ignore[no-any-return]


def cut_by_hand(fabric: Fabric) -> str | None:
    def work() -> list[str]:
        whole_one = values(built(Small))
        mine = slice(10 * fabric.global_rank, 10 * fabric.global_rank + 10)
        expected = {name: v[mine] if name.startswith("up.") else v for name, v in whole_one.items()}
        return unlike(expected, values(set_up(fabric, recorded(fabric))))

    return agreed(problem_of(work))


def test_a_plan_that_cuts_by_hand() -> None:
    config = ModelParallelStrategy(parallelize_fn=cuts_by_hand, start_method="forkserver", timeout=PATIENCE)
    problem = Fabric(accelerator="cpu", strategy=config, devices=2).launch(cut_by_hand)
    assert problem is None, problem


# -- inside the context ------------------------------------------------------------------------------------------------


def test_contexts_inside_contexts() -> None:
    """``init_tensor`` and ``empty_init=False`` mean real memory also where a model is recorded; the stream is one."""

    def build(inside: Callable[[Any], Any]) -> nn.Module:
        model: Any = nn.ModuleList([nn.Linear(3, 4)])
        with inside(False):
            model.append(nn.Linear(3, 4))
            with inside(True):
                model.append(nn.Linear(3, 4))
            model.append(nn.Linear(3, 4))
        with inside("tensor"):
            model.noise = torch.randn(5)
        model.append(nn.Linear(3, 4))
        model.late = torch.randn(3) + model.noise[:3]
        return model  # type: ignore[no-any-return]

    fabric = one()
    expected = snapshot(built(lambda: build(lambda _: nullcontext())))
    seed(SEED)
    with fabric.init_module(empty_init=True):
        model: Any = build(lambda how: fabric.init_tensor() if how == "tensor" else fabric.init_module(how))
    assert [is_real(layer.weight) for layer in model] == [False, True, False, True, False]
    assert is_real(model.noise)
    assert not is_real(model.late)
    assert differences(expected, snapshot(fabric.materialize(model)), layout=True) == []
    assert modes_left() == []


def test_init_tensor_alone_is_real() -> None:
    fabric = one("fsdp", precision="bf16-true")
    with fabric.init_tensor():
        tensor = torch.randn(3)
    assert is_real(tensor)
    assert tensor.dtype == torch.bfloat16
    assert modes_left() == []


def patched() -> list[object]:
    return [
        nn.init._no_grad_trunc_normal_,
        *(owner.get_rng_state for owner in (torch, torch.random, torch.cuda, torch.cuda.random)),
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_inside_leaves_everything_as_it_should_be(nested: bool) -> None:
    def build() -> None:
        nn.init.trunc_normal_(nn.Linear(7, 13).weight, std=1.0, a=-1.0, b=1.0)
        torch.randn(20)
        raise KeyError("a user's mistake")

    fabric = one(precision="16-true")
    with pytest.raises(KeyError), default_dtype(torch.float16):
        built(build)
    expected, functions, dtype = rng_states(), patched(), torch.get_default_dtype()
    seed(SEED)
    with FlopCounterMode(display=False) as mine:  # pytest's `raises` would hold the model alive
        try:
            with fabric.init_module(empty_init=True), fabric.init_tensor() if nested else nullcontext():
                build()
        except KeyError:
            pass
        assert dispatch_modes()[-1] is mine.mode
    assert moved(expected, rng_states(), "the error") == []
    assert patched() == functions
    assert torch.get_default_dtype() == dtype
    gc.collect()
    tidied(fabric)
    assert is_real(torch.ones(3) + 1)
    model = fabric.setup(recorded(fabric))  # and what comes next is recorded as ever
    assert not any(not is_real(p) for p in model.parameters())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tidied(fabric: Fabric) -> None:
    """A backward ends the looking after models that are gone."""
    weight = torch.ones(1, requires_grad=True)
    fabric.backward(weight.sum())
    assert modes_left() == []


@pytest.mark.parametrize("call", ["setup", "materialize"])
def test_setup_inside_the_context(call: str) -> None:
    """It works, or is refused; it must not come back with a model without memory."""
    fabric = one()
    with fabric.init_module(empty_init=True):
        module = built(Small)
        try:
            getattr(fabric, call)(module)
        except SetupOrderError:
            return
    assert unlike(values(built(Small)), values(module)) == []


# -- after the context -------------------------------------------------------------------------------------------------


def test_no_mode_is_left_after_setup() -> None:
    fabric = one()
    module = recorded(fabric)
    assert len(modes_left()) == 2, "they note what is done to it"
    fabric.setup(nn.Linear(3, 4))  # another model does not end that
    assert len(modes_left()) == 2
    fabric.setup(module)
    assert modes_left() == []


def test_no_mode_is_left_after_a_model_was_dropped() -> None:
    fabric = one()
    model = fabric.setup(nn.Linear(3, 4))
    module = recorded(fabric)
    fabric.backward(model(torch.ones(1, 3)).sum())
    assert len(modes_left()) == 2, "it is alive"
    del module
    gc.collect()
    fabric.backward(model(torch.ones(1, 3)).sum())
    assert modes_left() == []


def test_refused_then_mended() -> None:
    """An error of ``setup`` leaves the model as it was: written, it sets up."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 4)
            self.own = nn.Parameter(torch.empty(3, 4))

    fabric = one()
    module = recorded(fabric, Empty)
    with pytest.raises(MaterializeError, match="own must be loaded or initialised"):
        fabric.setup(module)
    assert not is_real(module.own)
    nn.init.ones_(module.own)
    model = fabric.setup(module)
    assert torch.equal(model.own, torch.ones(3, 4))
    assert bits_equal(model.lin.weight, built(lambda: nn.Linear(3, 4)).weight)
    assert modes_left() == []


def test_two_pending_models_of_one_storage() -> None:
    """Views of one memory in two models: the second is filled as well."""
    fabric = one()

    def pair() -> tuple[nn.Module, nn.Module]:
        base, first, second = torch.randn(21), nn.Module(), nn.Module()
        first.weight, second.weight = nn.Parameter(base), nn.Parameter(base.view(7, 3))
        return first, second

    seed(SEED)
    expected = pair()
    seed(SEED)
    with fabric.init_module(empty_init=True):
        modules = pair()
    models = [fabric.setup(module) for module in modules]
    for plain, model in zip(expected, models, strict=True):
        assert bits_equal(plain.weight, model.weight)  # type: ignore[arg-type]
    assert modes_left() == []


# -- modes and contexts of the user's own ------------------------------------------------------------------------------


def flops_of(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
        assert dispatch_modes() == [counter.mode] or len(modes_left()) == 3
    return int(counter.get_total_flops())


def test_a_mode_around_everything() -> None:
    """It stays where it is, and sees what the user computes and not what setup does."""

    def work(fabric: Fabric | None) -> None:
        if fabric is None:
            module: Any = built(Small)
        else:
            module = recorded(fabric)
            torch.ones(2, 3) @ torch.ones(3, 2)
            module = fabric.setup(module)
        module(TOKENS)

    fabric = one()
    assert flops_of(lambda: work(fabric)) - flops_of(lambda: work(None)) == 2 * 2 * 2 * 3
    assert modes_left() == []


def test_modes_entered_around_setup() -> None:
    fabric = one()
    module = recorded(fabric)
    with FlopCounterMode(display=False) as counter, torch.device("cpu"):
        before = modes_left()[-1]
        model = fabric.setup(module)
        assert dispatch_modes() == [counter.mode]
        assert function_modes() == [before]
        model(TOKENS)
        assert counter.get_total_flops() > 0
    assert modes_left() == []
    assert unlike(values(built(Small)), values(model)) == []


def test_a_default_device_set_before_setup() -> None:
    fabric = one()
    module = recorded(fabric)
    torch.set_default_device("cpu")
    try:
        model = fabric.setup(module)
        assert len(modes_left()) == 1
    finally:
        torch.set_default_device(None)
    assert modes_left() == []
    assert unlike(values(built(Small)), values(model)) == []


@pytest.fixture(autouse=True)
def _nothing_is_pending() -> None:
    """What other tests recorded and left (in the frames of an error) would be looked after in these."""
    gc.collect()
    tidied(one())


def in_a_thread(work: Callable[[], object]) -> None:
    """Run it where nothing is spoilt if torch's state of this thread is: it has one for each."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("around", ["init_module", "setup", "materialize", "both"])
def test_without_gradients(around: str) -> None:
    fabric = one()
    with torch.no_grad() if around in ("init_module", "both") else nullcontext():
        module = recorded(fabric)
        module = fabric.setup(module) if around == "both" else module
    with torch.no_grad() if around != "init_module" else nullcontext():
        module = {"materialize": fabric.materialize, "both": lambda model: model}.get(around, fabric.setup)(module)
    assert modes_left() == []
    assert unlike(values(built(Small)), values(module)) == []
    module(TOKENS).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_all_in_inference_mode() -> None:
    def work() -> None:
        fabric = one()
        with torch.inference_mode():
            model = fabric.setup(recorded(fabric))
            assert unlike(values(built(Small)), values(model)) == []
            assert bool(model(TOKENS).isfinite().all())
        assert is_real(torch.ones(3) + 1), "torch still works"
        assert modes_left() == []

    in_a_thread(work)


@pytest.mark.parametrize("call", ["setup", "materialize"])
@pytest.mark.parametrize("inside", ["init_module", "the later part"])
def test_inference_mode_around_one_part(inside: str, call: str) -> None:
    """Torch sets its modes back when inference mode ends: refused, nothing is spoilt, and moved out it works."""

    def work() -> None:
        fabric = one()
        with torch.inference_mode(inside == "init_module"):
            module = recorded(fabric)
        with torch.inference_mode(inside != "init_module"):
            with pytest.raises(SetupOrderError) as caught:
                getattr(fabric, call)(module)
            assert "must be inside of one torch.inference_mode, or all outside, but only" in str(caught.value)
            assert inside in str(caught.value)
        assert is_real(torch.ones(3) + 1), "torch still works"
        with torch.inference_mode(inside == "init_module"):
            module = getattr(fabric, call)(module)
            assert unlike(values(built(Small)), values(module)) == []
        assert is_real(torch.ones(3) + 1), "torch still works"
        assert modes_left() == []

    in_a_thread(work)


# -- other tensors -----------------------------------------------------------------------------------------------------


def of_the_users_own() -> list[Any]:
    """Draws in many ways, and operations on tensors that have nothing to do with the model."""
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(list(range(8)), shuffle=True)
    weight = torch.randn(4, 4, requires_grad=True)
    (weight @ weight).sum().backward()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        forked = torch.rand(3)
    noisy = torch.zeros(9).normal_()
    noisy[2:4] = 1
    return [
        torch.randn(20),
        torch.rand(3, generator=own),
        torch.randperm(10),
        torch.dropout(torch.ones(20), 0.5, True),
        torch.bernoulli(torch.full((9,), 0.3)),
        torch.tensor([int(item) for item in loader]),
        weight.grad,
        forked,
        noisy,
        torch.get_rng_state(),
        nn.init.trunc_normal_(torch.empty(9), a=-0.5, b=0.5),
    ]


@pytest.mark.parametrize("when", ["inside", "between"])
def test_other_tensors_are_let_alone(when: str) -> None:
    """The user's own draws come out as in eager, and move the stream as they would."""
    fabric = one()
    seed(SEED)
    first, expected, second = nn.Linear(7, 13), of_the_users_own(), nn.Linear(3, 5)
    states = rng_states()
    seed(SEED)
    with fabric.init_module(empty_init=True):
        module = nn.ModuleList([nn.Linear(7, 13)])
        if when == "inside":
            with fabric.init_tensor():
                found = of_the_users_own()
            module.append(nn.Linear(3, 5))
    if when == "between":
        found = of_the_users_own()
        with fabric.init_module(empty_init=True):
            module.append(nn.Linear(3, 5))
    assert moved(states, rng_states(), "drawing") == []
    assert all(is_real(tensor) for tensor in found)
    assert [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if not bits_equal(a, b)] == []
    model = fabric.setup(module)
    assert moved(states, rng_states(), "setup") == []
    for plain, layer in zip((first, second), model, strict=True):
        assert bits_equal(plain.weight, layer.weight)


@pytest.mark.parametrize("numbers", [3, 5000])
def test_a_thread_draws_meanwhile(numbers: int) -> None:
    """As a loader that reads ahead may: nobody sees these draws, so the model's own cannot be placed. It is said."""
    fabric = one()

    seed(SEED)
    nn.Linear(7, 13)
    after = torch.get_rng_state()
    seed(SEED)

    def build() -> nn.Module:
        first = nn.Linear(7, 13)
        in_a_thread(lambda: torch.rand(numbers))
        return nn.Sequential(first, nn.Linear(3, 5))

    with pytest.raises(MaterializeError, match="another thread did"):
        recorded(fabric, build)
    assert torch.equal(after, torch.get_rng_state()), "the model's own draws stand"


def test_the_state_of_the_generator_object_inside() -> None:
    """Asked of the object itself, whose methods are C++."""
    fabric = one()

    def build() -> nn.Module:
        module: Any = nn.ModuleList([nn.Linear(7, 13)])
        state = torch.default_generator.get_state()
        module.append(nn.Linear(3, 5))
        torch.default_generator.set_state(state)
        module.append(nn.Linear(3, 5))
        return module  # type: ignore[no-any-return]

    expected = values(built(build))
    assert bits_equal(expected["1.weight"], expected["2.weight"])
    assert unlike(expected, values(fabric.setup(recorded(fabric, build)))) == []


# -- identity ----------------------------------------------------------------------------------------------------------


def test_references_stay_the_modules_own_objects() -> None:
    fabric = one()
    module = recorded(fabric, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(3, 4)))
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    marked = module[0].weight
    marked.mark = "mine"
    fabric.materialize(module)
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert all(is_real(tensor) for tensor in after.values())
    assert marked.mark == "mine"
    assert isinstance(marked, nn.Parameter)
    assert marked.is_leaf


def test_memory_that_was_taken_before_is_not_silently_empty() -> None:
    """A state dict of before shares the model's memory in eager. It may be refused; it must not be lost."""
    fabric = one()
    module = recorded(fabric)
    state = module.state_dict()
    fabric.materialize(module)
    try:
        total = state["up.weight"].sum()
    except MaterializeError:
        return
    assert is_real(total)
    assert total.item() == module.up.weight.sum().item()


def test_hooks_registered_before_setup_fire() -> None:
    fabric, seen = one(), []
    module = recorded(fabric)
    module.up.weight.register_hook(lambda grad: seen.append("gradient"))
    module.up.bias.register_post_accumulate_grad_hook(lambda param: seen.append("accumulated"))
    module.up.register_forward_pre_hook(lambda layer, args: seen.append("forward"))
    handle = module.down.weight.register_hook(lambda grad: seen.append("removed"))
    model = fabric.setup(module)
    handle.remove()
    model(TOKENS).sum().backward()
    assert sorted(seen) == ["accumulated", "forward", "gradient"]


def test_lazily_shaped_layers() -> None:
    fabric = one()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))

    def first_batch(model: Any) -> Any:
        seed(SEED + 1)
        return model(torch.arange(15.0).view(5, 3))

    plain = built(build)
    expected = first_batch(plain)
    model = fabric.setup(recorded(fabric, build))
    assert isinstance(model[1].weight, nn.UninitializedParameter)
    found = first_batch(model)
    assert bits_equal(expected, found)
    assert unlike(values(plain), values(model)) == []
    found.sum().backward()
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_materialised_module(copied: Callable[[nn.Module], nn.Module]) -> None:
    fabric = one()

    def build() -> nn.Module:
        module = Small()
        module.held = [module.up.weight, module.table[2:4]]
        return module

    expected: Snapshot = snapshot(built(build))
    module = copied(fabric.materialize(recorded(fabric, build)))
    assert differences(expected, snapshot(module), layout=copied is copy.deepcopy) == []
    assert module.head.weight is module.embed.weight
    module(TOKENS).sum().backward()


# -- precision ---------------------------------------------------------------------------------------------------------

DTYPES: Final = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}


@pytest.mark.parametrize("empty_init", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
def test_precision_at_birth(strategy: str, precision: str, empty_init: bool) -> None:
    """What plain construction gives under that default dtype: values are drawn in it, not rounded to it."""
    with default_dtype(DTYPES[precision]):
        expected = values(built(Small))
    assert {value.dtype for value in expected.values()} == {DTYPES[precision]}
    module = recorded(fabric := one(strategy, precision=precision), empty_init=empty_init)
    assert module.up.weight.dtype == DTYPES[precision]
    assert unlike(expected, values(set_up(fabric, module))) == []


# -- memory, in processes of their own ---------------------------------------------------------------------------------


def measured(code: str) -> list[float]:
    """What a new process prints: numbers, one on a line. ``rss()`` and ``peak()`` there are in MB."""
    ours = """
import resource, torch
from torch import nn
from fabriclite import Fabric
def rss(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 2**10
"""
    done = subprocess.run(
        [sys.executable, "-c", ours + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line) for line in done.stdout.split()]


LARGE = """
fabric = Fabric(accelerator='cpu', strategy='fsdp', devices=1, precision='bf16-true')
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(8192, 8192, bias=False), nn.Linear(8192, 8192, bias=False)
        self.k, self.v = nn.Linear(8192, 1024, bias=False), nn.Linear(8192, 1024, bias=False)
        self.gate, self.up = nn.Linear(8192, 28672, bias=False), nn.Linear(8192, 28672, bias=False)
        self.down, self.norm = nn.Linear(28672, 8192, bias=False), nn.LayerNorm(8192)
with fabric.init_module():
    nn.Linear(8, 8)  # what is imported at first use
before = rss()
with fabric.init_module():
    model = nn.Sequential(nn.Embedding(128256, 8192), *(Layer() for _ in range(80)), nn.Linear(8192, 128256))
    for layer in model[1:-1]:
        nn.init.trunc_normal_(layer.down.weight, std=0.02)
print(sum(p.numel() for p in model.parameters()))
print(rss() - before)
print(peak() - before)
"""


def test_recording_takes_no_memory() -> None:
    count, after, most = measured(LARGE)
    assert count > 70e9
    assert after < 40
    assert most < 60


HALF = """
fabric = Fabric(accelerator='cpu', strategy={strategy!r}, devices=1, precision={precision!r})
with fabric.init_module(empty_init={empty}):
    model = nn.Linear(64, 64)
fabric.setup(model)  # what is imported at first use
before = rss()
with fabric.init_module(empty_init={empty}):
    model = nn.Sequential(*(nn.Linear(4096, 2048) for _ in range(10)))
model = fabric.setup(model)
print(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("strategy", "precision", "empty"),
    [("single_device", "bf16-true", True), ("fsdp", "16-true", None)],
)
def test_half_precision_is_never_float32_memory(strategy: str, precision: str, empty: bool | None) -> None:
    size, most = measured(HALF.format(strategy=strategy, precision=precision, empty=empty))
    assert 150 < size < 170
    assert most < size + 40, "the model itself, and at most one layer more"

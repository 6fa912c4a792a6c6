"""Plans: what a rank holds is predicted without memory, and is what it then holds."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, AdamW
from torch.profiler import ProfilerActivity, profile

import fabriclite
from fabriclite import (
    ConfigError,
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from fabriclite.birth import session
from fabriclite.planning.estimate import at_rest, estimate, trace
from fabriclite.planning.recorder import in_order
from fabriclite.planning.subject import Subject, default_loss
from fabriclite.planning.trace import Mark, Trace
from fabriclite.planning.values import Estimate
from fabriclite.precision import Precision
from worlds import STRATEGIES, run

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig

BATCH, CONTEXT = 4, 64
SMALL = GPTConfig(dim=128, layers=3, heads=4, context=CONTEXT, vocab_size=512)


def gpt() -> nn.Module:
    return GPT(SMALL)


class Convolutions(nn.Module):
    """With batch normalisation, whose parameters stay float32 in mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3)) * self.scale


def tokens(batch: int, sequence: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(batch, sequence or 1, dtype=torch.long),), {}


def loss_of(logits: Tensor) -> Tensor:
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long, device=flat.device))


SUBJECT = Subject(name="gpt", build=gpt, inputs=tokens, loss=loss_of)
KNOWN: dict[tuple[str, int], Trace] = {}


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=1e-3)


def traced(precision: str = "32-true", tensor: int = 1, subject: Subject = SUBJECT, **changes: Any) -> Trace:
    options: dict[str, Any] = {"batch": BATCH, "sequence": CONTEXT, "optimizer": adamw, "tensor": tensor}
    if tensor > 1:
        options["config"] = ModelParallelStrategy()
    return trace(subject, precision=Precision.parse(precision), **{**options, **changes})


def known(precision: str = "32-true", tensor: int = 1) -> Trace:
    key = (precision, tensor)
    if key not in KNOWN:
        KNOWN[key] = traced(precision, tensor)
    return KNOWN[key]


def plan(config: Any, world: int, precision: str = "32-true", found: Trace | None = None) -> Estimate:
    value = Precision.parse(precision)
    found = found or known(precision, config.layout(world, value).tensor)
    return estimate(found, config, world_size=world, ranks_per_node=8, precision=value)


def held(found: Estimate, kind: Any, phase: Any = "step") -> int:
    return found.peaks[phase].memory.by_kind.get(kind, 0)


# -- rules ------------------------------------------------------------------------------------------------------------

CONFIGS: list[Callable[[], Any]] = [
    DDPStrategy,
    FSDPStrategy,
    lambda: FSDPStrategy(reshard_after_forward=False),
    lambda: DeepSpeedStrategy(stage=1),
    lambda: DeepSpeedStrategy(stage=2),
    lambda: DeepSpeedStrategy(stage=3),
]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(CONFIGS), st.sampled_from(["32-true", "bf16-true", "bf16-mixed"]), st.integers(0, 14))
def test_more_ranks_never_hold_more_at_rest_and_every_peak_holds_what_rests(
    config: Callable[[], Any], precision: str, power: int
) -> None:
    few, more = plan(config(), 2**power, precision), plan(config(), 2 ** (power + 1), precision)
    for kind in ("parameters", "optimizer"):
        assert held(more, kind) <= held(few, kind) + 8 * 2 ** (power + 1), kind  # ZeRO pads a part to two elements
    largest = 4 * SMALL.vocab_size * SMALL.dim
    assert held(more, "gradients") <= held(few, "gradients") + largest  # ZeRO keeps those it owns a part of whole
    for moment in (*few.peaks.values(), *few.timeline):
        assert moment.memory.total == sum(moment.memory.by_kind.values())
        assert min(moment.memory.by_kind.values(), default=0) >= 0
    assert few.peak == max(moment.memory.total for moment in few.peaks.values())
    assert few.peaks["step"].memory.total >= held(few, "parameters") + held(few, "optimizer")
    highest = {phase: max(m.memory.total for m in few.timeline if m.phase == phase) for phase in ("forward", "step")}
    assert highest == {phase: few.peaks[phase].memory.total for phase in ("forward", "step")}  # type: ignore[index]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_one_rank_of_fsdp_holds_what_a_single_device_does(precision: str) -> None:
    alone, sharded = plan(SingleDeviceStrategy(), 1, precision), plan(FSDPStrategy(), 1, precision)
    for kind in ("parameters", "optimizer", "gradients"):
        assert held(alone, kind) == held(sharded, kind)
    assert alone.flops == sharded.flops
    numel = sum(p.numel() for p in gpt().parameters())
    width = 4 if precision == "32-true" else 2
    assert alone.parameters == numel
    assert held(alone, "parameters") == held(alone, "gradients") == width * numel
    assert held(alone, "optimizer") == pytest.approx(2 * width * numel, rel=1e-3)


def test_zero_holds_what_its_paper_says() -> None:
    """2 bytes of parameters, 2 of gradients and 12 of masters and moments an element, divided as the stage says."""
    numel, ranks = known("bf16-true").parameters, 64
    for stage, parameters in ((1, 2.0), (2, 2.0), (3, 2.0 / ranks)):
        config = DeepSpeedStrategy(stage=stage)  # type: ignore[arg-type]
        found = plan(config, ranks, "bf16-true")
        assert held(found, "parameters", "forward") == pytest.approx(parameters * numel, rel=0.01)
        assert held(found, "optimizer", "forward") == pytest.approx(12 * numel / ranks, rel=0.01)


def test_what_each_choice_changes() -> None:
    kept = plan(FSDPStrategy(reshard_after_forward=False), 4)
    freed = plan(FSDPStrategy(reshard_after_forward=True), 4)
    assert freed.peaks["forward"].memory.total < kept.peaks["forward"].memory.total
    offloaded = plan(FSDPStrategy(cpu_offload=True), 4)
    assert held(offloaded, "optimizer") == held(offloaded, "parameters") == 0
    assert offloaded.host.by_kind["optimizer"] == held(freed, "optimizer")
    assert offloaded.host.by_kind["gradients"] == held(freed, "gradients")
    assert held(offloaded, "gradients") == 0
    views = plan(DDPStrategy(gradient_as_bucket_view=True), 4)
    assert held(views, "gradients") == 0 < held(plan(DDPStrategy(), 4), "gradients")
    hybrid = plan(FSDPStrategy(device_mesh=(4, 2)), 8)
    assert held(hybrid, "parameters") == held(plan(FSDPStrategy(), 2), "parameters")


def test_recomputed_modules_keep_less_and_compute_more() -> None:
    blocks = Subject(
        name="gpt",
        build=gpt,
        inputs=tokens,
        loss=loss_of,
        checkpointed=lambda name, sub: name.startswith("blocks.") and name.count(".") == 1,
    )
    plain, again = plan(SingleDeviceStrategy(), 1), plan(SingleDeviceStrategy(), 1, found=traced(subject=blocks))
    assert sum(again.by_module.values()) < 0.5 * sum(plain.by_module.values())
    assert again.peak < plain.peak
    assert again.flops is not None
    assert plain.flops is not None
    assert 1.2 * plain.flops < again.flops < 1.4 * plain.flops


def test_activations_are_named_by_the_module_that_made_them() -> None:
    found = plan(SingleDeviceStrategy(), 1)
    assert list(found.by_module.values()) == sorted(found.by_module.values(), reverse=True)
    assert set(found.by_module) <= {name for name, _ in gpt().named_modules()}
    assert next(iter(found.by_module)).endswith("mlp")


def test_the_end_of_one_backward_comes_before_the_begin_of_the_next() -> None:
    begins, ends = Mark("enter backward", "a"), Mark("leave backward", "b")
    assert in_order([(0, 4, ""), begins, ends, (1, 4, "")]) == [(0, 4, ""), ends, begins, (1, 4, "")]


# -- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_leaves_nothing_behind() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = traced(), traced()
    assert torch.equal(before, torch.get_rng_state())
    assert session.current() is None
    assert first == second
    assert torch.ones(1).sum().item() == 1


class Attending(nn.Module):
    """Attention with dropout, for which the CPU has no fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, None, 0.1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there CUDA's own kernels are traced")
def test_where_cuda_cannot_be_traced_the_cpu_takes_the_kind_of_kernel_that_cuda_has() -> None:
    subject = Subject(name="a", build=Attending, inputs=lambda b, s: ((torch.zeros(b, s or 1, 64),), {}))
    cpu, cuda = (traced(subject=subject, sequence=256, device=device) for device in ("cpu", "cuda"))
    assert (cuda.device, cuda.simulated) == ("cuda", "cpu")
    assert cpu.steps[torch.float32].kernels == ()
    assert cuda.steps[torch.float32].kernels == ("_scaled_dot_product_flash_attention_for_cpu",)
    assert max(b.peak.total for b in cuda.steps[torch.float32].beats) % 512 == 0
    assert cuda.optimizing.temporary > 0.9  # all parameters are stepped at once


def test_tensor_parallel_ranks_hold_their_cut() -> None:
    whole, cut = known(), known(tensor=2)
    weights = cut.named()
    assert weights["blocks.0.mlp.up.weight"].numel * 2 == whole.named()["blocks.0.mlp.up.weight"].numel
    assert weights["embed.weight"].numel == whole.named()["embed.weight"].numel
    assert cut.parameters == whole.parameters
    float32 = torch.float32
    assert cut.steps[float32].flops < whole.steps[float32].flops


def planned_among_others(fabric: Fabric) -> Any:
    """Rank 0 alone plans, while a process group exists; then that group makes another, splits a model and trains."""
    with fabric.init_module():
        model = gpt()
    optimizer = adamw(model.parameters())
    planned = None
    if fabric.is_global_zero:
        planned = fabric.plan(model, *tokens(BATCH, CONTEXT)[:1], loss=loss_of, optimizer=optimizer, batch=BATCH)
    new = dist.new_group()
    number = torch.ones(())
    dist.all_reduce(number, group=new)
    model, optimizer = fabric.setup(model, optimizer)
    fabric.backward(loss_of(model(*tokens(BATCH, CONTEXT)[0])))
    optimizer.step()
    return number.item(), planned and planned.peak, fabric.all_reduce(1.0, reduce_op="sum")


def test_tensor_parallelism_is_planned_also_where_a_process_group_exists() -> None:
    outside = fabriclite.plan(
        gpt,
        *tokens(BATCH, CONTEXT)[:1],
        strategy=ModelParallelStrategy(),
        devices=2,
        loss=loss_of,
        optimizer=adamw,
        batch=BATCH,
        device="cpu",
    )
    assert run(planned_among_others, "tp", 2) == (2.0, outside.peak, 2.0)


def test_groups_are_told_with_their_parameters() -> None:
    found, precision = known("bf16-mixed"), Precision.parse("bf16-mixed")
    groups = FSDPStrategy().layout(4, precision).groups
    assert groups is not None
    gathered = found.gathered(groups(found.skeleton))
    assert [(name, root) for name, _, root in gathered] == [(f"blocks.{i}", False) for i in range(3)] + [("", True)]
    assert sum(numel for _, sizes, _ in gathered for numel, _ in sizes) == found.parameters
    assert {dtype for _, sizes, _ in gathered for _, dtype in sizes} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from /proc")
def test_tracing_seven_billion_parameters_takes_no_memory() -> None:
    config = GPTConfig(dim=8192, layers=8, heads=64, context=2048, vocab_size=32000)
    large = Subject(name="7B", build=lambda: GPT(config), inputs=tokens, loss=loss_of)
    known()  # what is imported and made once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_mib()
    found = traced("bf16-true", subject=large, batch=1, sequence=2048)
    assert 6e9 < found.parameters < 8e9
    assert _peak_mib() - before < 200
    assert plan(FSDPStrategy(), 64, "bf16-true", found).peak < plan(FSDPStrategy(), 8, "bf16-true", found).peak


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


# -- measured ---------------------------------------------------------------------------------------------------------


def step_of(fabric: Any, name: str) -> dict[str, Any]:
    """Bytes that a rank holds, by kind, and the most at once in the forward and backward of a third step."""
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    with fabric.init_module():
        module = subject.build()
    optimizer = AdamW(module.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(module, optimizer)
    loss_function = subject.loss or default_loss
    for _ in range(3):  # DDP makes its buckets again in the second
        args, kwargs = subject.inputs(BATCH, CONTEXT)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = loss_function(model(*args, **kwargs))
            fabric.backward(loss)
        grads = [_local(p.grad) for p in module.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    states = [_local(t) for state in optimizer.state.values() for t in state.values()]
    groups = [
        (module_name, sorted(p._param_fqn for g in sub._get_fsdp_state()._fsdp_param_groups for p in g.fsdp_params))
        for module_name, sub in module.named_modules()
        if isinstance(sub, FSDPModule)
    ]
    return {
        "parameters": sum({id(p): _local(p).nbytes for p in module.parameters()}.values()),
        "gradients": sum(g.nbytes for g in grads),
        "optimizer": sum(t.nbytes for t in states),
        "added": _most(seen),
        "groups": groups,
    }


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _most(seen: Any) -> int:
    """The most bytes that were held at once of what was made meanwhile."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def images(batch: int, sequence: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(batch, 3, 32, 32),), {}


SUBJECTS = {"gpt": SUBJECT, "conv": Subject(name="conv", build=Convolutions, inputs=images)}
CASES = [
    ("single_device", 1, "32-true", "gpt"),
    ("fsdp", 2, "bf16-mixed", "gpt"),
    ("fsdp", 2, "bf16-mixed", "conv"),
    ("tp_only", 2, "bf16-true", "gpt"),
]


@pytest.mark.parametrize(("strategy", "world", "precision", "name"), CASES)
def test_a_rank_holds_what_was_planned(strategy: str, world: int, precision: str, name: str) -> None:
    config, value = STRATEGIES[strategy], Precision.parse(precision)
    layout = config.layout(world, value)
    found = traced(precision, layout.tensor, SUBJECTS[name])
    expected = estimate(found, config, world_size=world, ranks_per_node=8, precision=value)
    measured = run(step_of, strategy, world, name, precision=precision)
    for kind in ("parameters", "gradients", "optimizer"):
        assert held(expected, kind) == pytest.approx(measured[kind], rel=0.05), kind
    before = sum(at_rest(found, layout)[0].values()) + held(expected, "optimizer") + found.inputs
    peak = max(expected.peaks["forward"].memory.total, expected.peaks["backward"].memory.total) - before
    assert peak == pytest.approx(measured["added"], rel=0.15)
    if layout.groups is not None:
        groups = layout.groups(found.skeleton)
        assert sorted((g.module, sorted(g.parameters)) for g in groups if g.parameters) == sorted(
            (module, names) for module, names in measured["groups"] if names
        )


# -- errors -----------------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(2)


def broken(**changes: Any) -> Subject:
    return replace(SUBJECT, **changes)


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (broken(build=lambda: None), "`build` must return an nn.Module, but returned NoneType. Add a return."),
        (broken(build=Lazy), "must know its shapes to be planned, but fc.weight gets its own from the first batch"),
        (broken(inputs=lambda b, s: torch.zeros(b)), r"`inputs` must return \(args, kwargs\).*but returned FakeTensor"),
        (broken(loss=lambda out: out), r"`loss` must give one number.*a tensor of shape \(4, 64, 512\)"),
        (broken(loss=lambda out: 3), "`loss` must give one number that gradients flow from, but gives int"),
        (
            broken(loss=lambda out: out.sum() if out.sum().item() else out.mean()),
            "GPT must run on tensors that have shapes but no values to be planned, but raised DataDependentOutput",
        ),
        (broken(checkpointed={"blocks.9"}), "`checkpointed` must name submodules of GPT, but 'blocks.9' is none"),
        (broken(checkpointed=lambda n, m: False), "`checkpointed` must mean at least one submodule of GPT"),
    ],
)
def test_what_cannot_be_traced_says_so(subject: Subject, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        traced(subject=subject)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 0}, "`batch` must be a whole number of at least 1, but is 0"),
        ({"sequence": True}, "`sequence` must be a whole number of at least 1, but is True"),
        ({"tensor": 2, "config": None}, "`config` must be a ModelParallelStrategy when `tensor` is 2, but is None"),
        ({"optimizer": LBFGS}, "`optimizer` must step without a closure to be planned, but LBFGS does not"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        traced(**changes)


def test_a_trace_is_used_for_what_it_is_of() -> None:
    value = Precision.parse("bf16-true")
    with pytest.raises(ConfigError, match="`precision` must be that of the trace, 32-true, but is bf16-true"):
        estimate(known(), FSDPStrategy(), world_size=2, ranks_per_node=8, precision=value)
    with pytest.raises(ConfigError, match=r"must be of 2 ranks that share one matrix product.*is of 1\. Trace with"):
        estimate(known(), ModelParallelStrategy(), world_size=2, ranks_per_node=8, precision=Precision.parse(32))
    with pytest.raises(ConfigError, match=r"`precision` must be one of .* with DeepSpeedStrategy, but is 64-true"):
        plan(DeepSpeedStrategy(), 2, "64-true")


def test_a_loss_is_found_in_an_output() -> None:
    one = torch.ones(())
    assert default_loss({"loss": one, "logits": torch.zeros(9)}) is one
    assert default_loss((torch.zeros(2), torch.full((3,), 2.0))).item() == 2.0
    with pytest.raises(ConfigError, match="must hold a floating-point tensor to make a loss of, but is list"):
        default_loss([torch.zeros(2, dtype=torch.long)])


def test_optimizers_without_state_hold_none() -> None:
    found = traced(optimizer=lambda params: SGD(params, lr=0.1))
    assert held(plan(SingleDeviceStrategy(), 1, found=found), "optimizer") == 0

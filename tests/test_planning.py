"""Planning as users see it: states against published figures, traffic, search, models, the command, pictures.

What an estimate says of memory is compared with measured peaks elsewhere (tests of the estimate, and a benchmark).
"""

import json
import os
import random
import re
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fabriclite import (
    ConfigError,
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    Hardware,
    ModelParallelStrategy,
    Plan,
    Precision,
    SetupOrderError,
    SingleDeviceStrategy,
    find_layouts,
    plan,
)
from fabriclite.cli.main import main
from fabriclite.layout import Layout
from fabriclite.planning import what_if
from fabriclite.planning.api import planner_of
from fabriclite.planning.fit import largest
from fabriclite.planning.hardware import LINKS, parse_bandwidth, parse_bytes
from fabriclite.planning.models import model_of
from fabriclite.planning.plan import Choice, code
from fabriclite.planning.search import configs
from fabriclite.planning.static import MOMENTS, moments, states
from fabriclite.planning.traffic import Axis, Parcel, of_data_parallelism, timed, to_host
from fabriclite.planning.values import Traffic
from worlds import STRATEGIES
from worlds import run as in_world

FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="asked for by FULL=1: a minute and more")
GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "planning.md"
GB = 10**9
LLAMA_2_7B = 6_738_415_616
LLAMA_2_70B = 68_976_648_192
GPT_3 = 175 * GB
"""Billions of Table 2.1 of Brown et al. 2020 (arXiv:2005.14165); of Llama 2 the parameters of its published shapes."""


def layout(config: Any, size: int, precision: str = "bf16-true") -> Layout:
    made: Layout = config.layout(size, Precision.parse(precision))
    return made


def zero(stage: Any, size: int, parameters: int) -> float:
    """GB of one rank under our ZeRO, in true 16 bits with Adam: what the paper counts."""
    return states(layout(DeepSpeedStrategy(stage=stage), size), parameters, optimizer="adam").device.total / GB


# -- published: states -----------------------------------------------------------------------------------------------

# Rajbhandari, Rasley, Ruwase, He: ZeRO, SC 2020 (arXiv:1910.02054), Table 1: GB of a device by the degree of data
# parallelism, for stages 1, 2, 3. The paper rounds to the digits shown, large ones down.
ZERO_TABLE_1 = {
    int(7.5 * GB): {
        1: (120, 120, 120),
        4: (52.5, 41.3, 30),
        16: (35.6, 21.6, 7.5),
        64: (31.4, 16.6, 1.88),
        256: (30.4, 15.4, 0.47),
        1024: (30.1, 15.1, 0.12),
    },
    128 * GB: {
        1: (2048, 2048, 2048),
        4: (896, 704, 512),
        16: (608, 368, 128),
        64: (536, 284, 32),
        256: (518, 263, 8),
        1024: (513, 257, 2),
    },
    1000 * GB: {
        1: (16000, 16000, 16000),
        4: (7000, 5500, 4000),
        16: (4750, 2875, 1000),
        64: (4187, 2218, 250),
        256: (4046, 2054, 62.5),
        1024: (4011, 2013, 15.6),
    },
}


@pytest.mark.parametrize("parameters", ZERO_TABLE_1)
def test_states_are_those_of_the_zero_paper_s_table(parameters: int) -> None:
    for size, row in ZERO_TABLE_1[parameters].items():
        for stage, published in zip((1, 2, 3), row, strict=True):
            ours = zero(stage, size, parameters)
            digit = 10.0 ** -len(str(published).partition(".")[2])  # one unit of the last place that is printed
            assert abs(ours - published) < digit, (size, stage, ours, published)


@given(st.integers(1, 10**12), st.sampled_from([1, 2, 8, 64, 1024, 16384]))
def test_states_follow_the_zero_paper_s_formulae(psi: int, n: int) -> None:
    """(2 + 2 + K) Psi / N in its three forms, K = 12; Section 5 of the paper."""
    formulae = {1: 4 * psi + 12 * psi / n, 2: 2 * psi + 14 * psi / n, 3: 16 * psi / n}
    for stage, expected in formulae.items():
        assert abs(zero(stage, n, psi) * GB - expected) <= 16  # bytes: parts are rounded up to whole elements


@pytest.mark.parametrize(
    ("config", "precision", "per_parameter"),
    [
        (DDPStrategy(), "bf16-true", 2 + 2 + 4),  # torch's Adam keeps its moments in the parameters' dtype
        (DDPStrategy(), "32-true", 16),
        (DDPStrategy(), "bf16-mixed", 16),  # parameters stay float32, autocast rounds
        (FSDPStrategy(), "bf16-true", 8 / 64),
        (FSDPStrategy(), "bf16-mixed", 16 / 64),
        (FSDPStrategy(device_mesh=(8, 8)), "bf16-mixed", 16 / 8),
        (DeepSpeedStrategy(stage=1), "bf16-true", 4 + 12 / 64),
        (DeepSpeedStrategy(stage=2), "bf16-true", 2 + 14 / 64),
        (DeepSpeedStrategy(stage=3), "bf16-true", 16 / 64),
        (DeepSpeedStrategy(stage=3), "bf16-mixed", 20 / 64),  # ZeRO keeps masters beside float32 parameters too
        (ModelParallelStrategy(tensor_parallel_size=8), "bf16-true", 8 / 64),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str | float | int) else type(value).__name__,
)
@pytest.mark.parametrize("parameters", [LLAMA_2_7B, LLAMA_2_70B, GPT_3])
def test_states_of_published_shapes(config: Any, precision: str, per_parameter: float, parameters: int) -> None:
    ours = states(layout(config, 64, precision), parameters).device.total
    assert ours == pytest.approx(per_parameter * parameters, rel=1e-6)


def test_the_published_shape_has_these_parameters() -> None:
    transformers = pytest.importorskip("transformers")
    counts = []
    for layers in (1, 2):
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] + 79 * (counts[1] - counts[0]) == LLAMA_2_70B  # of 7B: test_no_weights_are_allocated


def test_the_guide_s_table_of_states_is_what_comes_out() -> None:
    """``| strategy | precision | 7B | 70B | GPT-3 |`` in GB, 64 ranks."""
    rows = re.findall(r"^\| (DDP|FSDP|FSDP, shards of 8|ZeRO \d) \| (\S+) \| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    assert len(rows) == 9
    for name, precision, cells in rows:
        config = {
            "DDP": DDPStrategy(),
            "FSDP": FSDPStrategy(),
            "FSDP, shards of 8": FSDPStrategy(device_mesh=(8, 8)),
        }.get(name) or DeepSpeedStrategy(stage=int(name[-1]))
        for cell, parameters in zip(cells.split(" | "), (LLAMA_2_7B, LLAMA_2_70B, GPT_3), strict=True):
            ours = states(layout(config, 64, precision), parameters).device.total / GB
            assert float(cell) == pytest.approx(ours, rel=0.005), (name, precision)


def test_offloaded_states_lie_on_the_host() -> None:
    for config in (FSDPStrategy(cpu_offload=True), DeepSpeedStrategy(offload_optimizer=True, offload_parameters=True)):
        found = states(layout(config, 8), LLAMA_2_7B)
        assert found.device.total == 0
        assert set(found.host.by_kind) == {"parameters", "gradients", "optimizer"}
    plain = states(layout(SingleDeviceStrategy(), 1), 100, trainable=10)
    assert plain.device.by_kind == {"parameters": 200, "gradients": 20, "optimizer": 40}
    assert plain.host.total == 0


def test_optimizers_keep_what_the_table_says() -> None:
    """Against torch itself: the elements of state as large as the parameter after a step."""
    makers = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    assert set(makers) == set(MOMENTS)
    for name, make in makers.items():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = make([param])
        optimizer.step()
        kept = [t for t in optimizer.state[param].values() if isinstance(t, torch.Tensor) and t.shape == param.shape]
        assert len(kept) == moments(name), name


# -- traffic ---------------------------------------------------------------------------------------------------------


def parcels(dtype: torch.dtype = torch.bfloat16, wire: torch.dtype | None = None) -> list[Parcel]:
    """Two blocks, and a root a tenth as large."""
    sizes = [(1000, False), (1000, False), (100, True)]
    return [Parcel({dtype: size}, {dtype: size}, root, wire) for size, root in sizes]


def sent(traffic: list[Traffic]) -> int:
    return sum(item.bytes for item in traffic)


def test_volumes_are_those_of_the_zero_paper() -> None:
    """Section 7 of the ZeRO paper: data parallelism and stages 1 and 2 send 2 Psi elements, stage 3 sends 3 Psi."""
    psi = 2 * 10**9
    whole = [Parcel({torch.bfloat16: psi}, {torch.bfloat16: psi})]
    for config, times in (
        (DDPStrategy(), 2),
        (DeepSpeedStrategy(stage=1), 2),
        (DeepSpeedStrategy(stage=2), 2),
        (DeepSpeedStrategy(stage=3), 3),
        (FSDPStrategy(reshard_after_forward=True), 3),
        (FSDPStrategy(reshard_after_forward=False), 2),
    ):
        for size in (2, 64, 1024):
            found = sent(of_data_parallelism(whole, layout(config, size), 8))
            assert found == pytest.approx(times * psi * 2 * (size - 1) / size, rel=1e-6)


def test_the_root_of_fsdp_is_gathered_once() -> None:
    found = {t.what: t for t in of_data_parallelism(parcels(), layout(FSDPStrategy(), 4), 4)}
    assert found["all-gather of parameters in forward"].bytes == 2100 * 2 * 3 // 4
    assert found["all-gather of parameters in forward"].calls == 3
    assert found["all-gather of parameters in backward"].bytes == 2000 * 2 * 3 // 4
    assert found["all-gather of parameters in backward"].calls == 2
    assert found["reduce-scatter of gradients"].bytes == 2100 * 2 * 3 // 4


def test_mixed_precision_gathers_in_16_bits_and_reduces_in_float32() -> None:
    found = of_data_parallelism(parcels(torch.float32, torch.bfloat16), layout(FSDPStrategy(), 2, "bf16-mixed"), 2)
    by_name = {t.what: t.bytes for t in found}
    assert by_name["all-gather of parameters in forward"] == 2100 * 2 // 2
    assert by_name["reduce-scatter of gradients"] == 2100 * 4 // 2


def test_hybrid_sharding_gathers_inside_a_node_and_reduces_between_them() -> None:
    found = of_data_parallelism(parcels(), layout(FSDPStrategy(device_mesh=(4, 8)), 32), 8)
    gathers = [t for t in found if "all-gather" in t.what]
    assert {t.link for t in gathers} == {"node"}
    (between,) = [t for t in found if t.link == "network"]
    assert between.what == "all-reduce of gradients' shards"
    assert between.bytes == round(2 * (2100 * 2 / 8) * 3 / 4)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]))
def test_the_shares_of_links_are_one(size: int, stride: int, per_node: int) -> None:
    shares = Axis(size, stride).shares(per_node)
    assert sum(shares.values()) == (0 if size == 1 else pytest.approx(1))
    assert ("network" in shares) == (size > 1 and size * stride > per_node)


def test_one_rank_sends_nothing_and_frozen_parameters_no_gradient() -> None:
    for config in (SingleDeviceStrategy(), DDPStrategy(), FSDPStrategy(), DeepSpeedStrategy()):
        assert sent(of_data_parallelism(parcels(), layout(config, 1), 8)) == 0
    frozen = [Parcel({torch.bfloat16: 100}, {})]
    assert sent(of_data_parallelism(frozen, layout(DDPStrategy(), 8), 8)) == 0
    assert sent(of_data_parallelism(frozen, layout(FSDPStrategy(reshard_after_forward=False), 2), 8)) == 100


def test_offloading_goes_over_the_host_s_link() -> None:
    found = {t.what: t for t in to_host(parcels(), layout(FSDPStrategy(cpu_offload=True), 4))}
    assert {t.link for t in found.values()} == {"host"}
    assert found["offloaded parameters"].bytes == (2100 + 2000) * 2 // 4
    assert found["offloaded gradients"].bytes == 2100 * 2 // 4
    stepped = {
        t.what: t.bytes for t in to_host(parcels(), layout(DeepSpeedStrategy(stage=2, offload_optimizer=True), 4))
    }
    assert stepped == {"offloaded gradients": 1050, "stepped parameters": 1050}
    assert to_host(parcels(), layout(FSDPStrategy(), 4)) == []


def test_seconds_follow_from_bandwidths_that_are_given() -> None:
    items = [Traffic("x", "node", 450 * GB, 1), Traffic("y", "network", 5, 1)]
    first, second = timed(items, Hardware(node=parse_bandwidth("nvlink4", "node_bandwidth")))
    assert first.seconds == 1.0
    assert second.seconds is None


def sent_for_real(fabric: Fabric) -> dict[str, int]:
    """Calls of each collective in the second step of a real run: the first one sets things up."""
    from torch.distributed.tensor.debug import CommDebugMode

    with fabric.init_module():
        model: Any = Stack()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        with CommDebugMode() as counted:
            fabric.backward(model(torch.zeros(2, 16)).sum())
        optimizer.step()
        optimizer.zero_grad()
    names = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
    return {names[str(operation).split(".")[-1]]: calls for operation, calls in counted.get_comm_counts().items()}


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_calls_are_those_of_a_real_step(strategy: str) -> None:
    world = 4 if strategy == "hsdp" else 2
    real = in_world(sent_for_real, strategy, world)
    made = plan(Stack, strategy=STRATEGIES[strategy], devices=world, batch=2)
    ours: Counter[str] = Counter()
    for item in made.estimate.traffic:
        ours[item.what.partition(" ")[0]] += item.calls
    assert real == ours


# -- hardware --------------------------------------------------------------------------------------------------------


def test_sizes_and_bandwidths_are_read() -> None:
    assert parse_bytes("80GB") == 80 * GB
    assert parse_bytes("80 GiB") == 80 * 2**30
    assert parse_bytes(1024) == 1024
    assert parse_bandwidth("50", "network_bandwidth") == LINKS["ib-400"] == 50e9


@pytest.mark.parametrize("text", ["80 apples", "", "-1GB", "0", "GB"])
def test_a_size_must_be_one(text: str) -> None:
    with pytest.raises(ConfigError, match="`memory` must be a size such as 80GB or 80GiB, but is"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["fast", "0", "-3"])
def test_a_bandwidth_must_be_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`node_bandwidth` must be GB/s above 0 or one of nvlink3, .*, but is"):
        parse_bandwidth(text, "node_bandwidth")


def test_an_optimizer_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"`optimizer` must be one of adam, .*, but is 'lamb'"):
        moments("lamb")


# -- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks of linear layers: ``8 width ** 2`` parameters each."""

    def __init__(self, width: int = 16, depth: int = 3, cold: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, a: torch.Tensor, b: int) -> torch.Tensor:
        return a * self.weight * b


SHAPE_70B = dict(width=16384, depth=32)
"""Of as many parameters as Llama 2 70B, give or take a hundredth."""


def stack_with_inputs(width: int = 16) -> tuple[nn.Module, Any, Any]:
    return Stack(width), lambda batch, sequence: {"x": torch.zeros(batch, sequence, width)}, lambda out: out.sum()


def test_a_model_is_a_module_a_function_or_both_with_inputs_and_loss() -> None:
    from_module = plan(Stack(), precision="bf16-true", batch=4)
    from_class = plan(Stack, precision="bf16-true", batch=4)
    with_all = plan(stack_with_inputs, precision="bf16-true", batch=2, sequence=2)
    as_tensor = plan(Stack, torch.zeros(4, 16), precision="bf16-true")
    peaks = {p.estimate.peaks["backward"].memory.by_kind["activations"] for p in (from_module, from_class, as_tensor)}
    assert len(peaks) == 1
    assert with_all.estimate.model == "stack_with_inputs"
    assert from_class.estimate.model == from_module.estimate.model == "Stack"
    assert from_class.estimate.parameters == 3 * 8 * 16**2 + 16 * 8
    assert plan(lambda: Stack(), batch=1).estimate.model == "model"


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (3, {}, "`model` must be a torch.nn.Module or a function that returns one, but is int"),
        (
            lambda: 3,
            {},
            "model must return a torch.nn.Module, (model, inputs) or (model, inputs, loss), but returned int",
        ),
        (lambda: (Stack(), 1, 2, 3), {}, "but returned (Stack, int, int, int)"),
        (Odd, {}, "`inputs` must be given for Odd, whose forward(a, b) does not say what it takes. Pass inputs=..."),
        (Stack, {"inputs": 3}, "`inputs` must be or return a tensor, a tuple of arguments or a dictionary of them"),
        (Stack, {"loss": 3}, "`loss` must be a function of the model's output, but is int"),
        (lambda: nn.Embedding(4, 4), {}, "`sequence` must be given for Embedding, which takes tokens, but is None."),
        (Odd(), {"checkpointing": True, "inputs": (torch.ones(3), 2)}, "`checkpointing` must be of a model with"),
        (Stack, {"devices": 0}, "`devices` must be a whole number of at least 1, but is 0."),
        (Stack, {"devices": 4, "per_node": True}, "`per_node` must be a whole number of at least 1, but is True."),
        (Stack, {"devices": 12, "strategy": "fsdp"}, "`devices` must be a multiple of those on one machine, but is 12"),
        (Stack, {"device": "tpu"}, "`device` must be 'cuda' or 'cpu', but is 'tpu'."),
        (Stack, {"optimizer": "lamb"}, "`optimizer` must be one of adadelta, "),
        (Stack, {"optimizer": 3}, "`optimizer` must be a name, an optimizer or a function from parameters to one, but"),
        (Stack, {"precision": "64-true", "strategy": "deepspeed"}, "`precision` must be one of 32-true, "),
    ],
)
def test_misuse_is_said(model: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan(model, arguments.pop("inputs", None), **arguments)


def test_a_model_that_was_set_up_is_refused() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(Stack())
    with pytest.raises(SetupOrderError, match="`model` must be planned before `setup`, but was set up already"):
        fabric.plan(model)


def test_optimizers_are_named_made_or_given() -> None:
    def state(optimizer: Any) -> int:
        made = plan(Stack, precision="32-true", optimizer=optimizer).estimate
        return made.peaks["step"].memory.by_kind.get("optimizer", 0) // (4 * made.parameters)

    given = torch.optim.SGD(Stack().parameters(), lr=0.1, momentum=0.9)
    for optimizer, moments_of in (
        (None, 2),
        ("adamw", 2),
        ("sgd", 0),
        ("sgd-momentum", 1),
        (given, 1),
        (torch.optim.RMSprop, 1),
        ("torch.optim:Adam", 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
    ):
        assert state(optimizer) == moments_of


# -- through Fabric --------------------------------------------------------------------------------------------------


def weights(planned: bool) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Of a model that was recorded, with or without a plan in between; and what is drawn next."""
    fabric = Fabric(accelerator="cpu", devices=1, strategy="fsdp", precision="bf16-true")
    fabric.seed_everything(7)
    with fabric.init_module():
        model = Stack()
    before = list(model.parameters())
    if planned:
        made = fabric.plan(model, batch=2, optimizer=torch.optim.SGD)
        assert made.estimate.batch == 2
        assert made.choice.config is fabric.strategy
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    drawn, python = torch.rand(3), random.random()
    ready = fabric.setup(model)
    return [p.detach().full_tensor() for p in ready.parameters()], drawn, python


def test_a_plan_changes_neither_model_nor_random_states() -> None:
    (plain, drawn, python), (planned, drawn_after, python_after) = weights(False), weights(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    assert torch.equal(drawn, drawn_after)
    assert python == python_after


def test_a_real_model_keeps_its_memory() -> None:
    model = Stack()
    held = [(p.data_ptr(), p.clone()) for p in model.parameters()]
    plan(model, batch=2, strategy="fsdp", devices=4)
    for param, (place, value) in zip(model.parameters(), held, strict=True):
        assert param.data_ptr() == place
        assert torch.equal(param, value)
        assert param.grad is None


def test_a_launch_is_not_needed() -> None:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=FSDPStrategy(device_mesh=(2, 2)), precision="bf16-mixed")
    made = fabric.plan(Stack, batch=3)
    assert (made.estimate.world_size, made.estimate.ranks_per_node) == (4, 4)
    assert made.layout.shard == 2
    assert not torch.distributed.is_initialized()


def test_no_weights_are_allocated() -> None:
    """7 B parameters: 13.5 GB of them, and as much again of gradients; the process grows by hardly anything."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = plan(
        lambda: transformers.LlamaForCausalLM(config),
        strategy=FSDPStrategy(),
        devices=64,
        precision="bf16-true",
        sequence=1024,
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert made.estimate.parameters == LLAMA_2_7B
    held = made.estimate.peaks["step"].memory.by_kind
    expected = states(made.layout, LLAMA_2_7B).device.by_kind
    for kind in ("parameters", "gradients", "optimizer"):
        assert held[kind] == pytest.approx(expected[kind], rel=0.01)
    assert grown * 1024 < GB


# -- what tensor parallelism sends -----------------------------------------------------------------------------------


def test_collectives_of_tensor_parallelism_are_those_that_torch_makes(tmp_path: Path) -> None:
    """Counted in a model that is really split over a pretended group, forward and backward."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import parallelize_module

    from fabriclite.launch.process_group import pretended
    from fabriclite.planning.hugging_face import model_from
    from fabriclite.strategies import tp_plan

    made = plan_of(model_from(tiny(tmp_path)), ModelParallelStrategy(tensor_parallel_size=2), devices=2)
    ours: Counter[str] = Counter()
    for item in made.estimate.traffic:
        ours[item.what.partition(" ")[0]] += item.calls

    model = model_from(tiny(tmp_path)).plain.build()
    torchs: Counter[str] = Counter()
    with pretended(2):
        mesh = DeviceMesh("cpu", torch.arange(2) + dist.get_rank())
        for name, style in tp_plan.expand(model, tp_plan.carried_by(model)).items():
            parallelize_module(model.get_submodule(name), mesh, style)
        ids = torch.zeros(1, 8, dtype=torch.long)
        with CommDebugMode() as counted:
            model(input_ids=ids, labels=ids).loss.backward()
        for operation, calls in counted.get_comm_counts().items():
            torchs["all-reduce" if "all_reduce" in str(operation) else "all-gather"] += calls
    assert ours == torchs


def tiny(folder: Path, **changed: Any) -> Path:
    shape = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    path = folder / "tiny.json"
    path.write_text(json.dumps(shape | changed))
    return path


def plan_of(model: Any, config: Any, devices: int, **changed: Any) -> Plan:
    planner = planner_of(
        model,
        optimizer=None,
        devices=devices,
        per_node=None,
        hardware=changed.pop("hardware", Hardware()),
        device="cpu",
    )
    values: dict[str, Any] = dict(config=config, precision=Precision.parse("bf16-true"), batch=1, sequence=8) | changed
    return planner.plan(Choice(**values))


def test_what_is_computed_again_is_sent_again(tmp_path: Path) -> None:
    from fabriclite.planning.hugging_face import model_from

    model, config = model_from(tiny(tmp_path)), ModelParallelStrategy(tensor_parallel_size=2)
    once = plan_of(model, config, 2)
    again = plan_of(model, config, 2, checkpointing=True)
    names = {t.what: t for t in again.estimate.traffic}
    assert (
        names["all-reduce of activations of tensor parallelism, recomputation"].calls == 2 * 2
    )  # layers x (attention, mlp)
    assert sum(t.bytes for t in again.estimate.traffic) > sum(t.bytes for t in once.estimate.traffic)


def test_a_split_that_breaks_the_model_is_said(tmp_path: Path) -> None:
    from fabriclite.planning.hugging_face import model_from

    with pytest.raises(
        ConfigError, match="`tensor_parallel_size` must split tiny so that it still runs, but is 4, and"
    ):
        plan_of(model_from(tiny(tmp_path)), ModelParallelStrategy(tensor_parallel_size=4), 4)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_the_least_time_is_that_of_the_slowest(tmp_path: Path) -> None:
    speeds = Hardware(flops=1e12, node=1e9, network=1e6)
    made = plan(Stack, strategy="fsdp", devices=16, batch=4, precision="bf16-true", hardware=speeds)
    assert made.estimate.flops is not None
    assert made.bound.compute == made.estimate.flops / 1e12
    assert made.bound.limited_by == "network"
    assert made.bound.step == made.bound.links["network"]
    assert made.bound.in_turn == pytest.approx(made.bound.compute + sum(made.bound.links.values()))
    alone = plan(Stack, batch=4, hardware=Hardware(flops=1e12))
    assert alone.bound.limited_by == "compute"
    assert plan(Stack, batch=4).bound.step is None


# -- search ----------------------------------------------------------------------------------------------------------


def test_a_70b_shape_on_eight_devices() -> None:
    found = find_layouts(lambda: Stack(**SHAPE_70B), devices=8, memory="80GB", precisions=("bf16-true",), sequence=4096)
    why = {type(each.config).__name__: each for each in found.refused}
    assert "DDPStrategy" in why
    assert re.search(r"too much \(optimizer 25\d.\d GiB, parameters 12\d.\d GiB", why["DDPStrategy"].reason)
    assert (
        why["DDPStrategy"].least or 0
    ) > 8 * LLAMA_2_70B * 0.99  # bytes of a parameter, its gradient and Adam's moments
    assert "carries no `_tp_plan`" in why["ModelParallelStrategy"].reason
    fits = {code(p.choice.config) for p in found.fitting}
    assert "FSDPStrategy(cpu_offload=True)" in fits
    assert all(p.fits for p in found.fitting)
    prices = [(p.bound.step or 0) / (p.choice.batch * p.layout.data) for p in found.fitting]
    assert prices == sorted(prices)


@FULL
def test_llama_70b_on_64_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    path = tiny(tmp_path, **shape, num_key_value_heads=8, vocab_size=32000)
    words = ("--devices", "64", "--per-node", "8", "--memory", "80GB", "--batch", "1", "--sequence", "4096", "--json")
    assert run("--hf-config", str(path), *words, "--precision", "bf16-true") == 0
    found = json.loads(capsys.readouterr().out)
    fitting = {each["strategy"]: each for each in found["fitting"]}
    assert fitting["FSDPStrategy()"]["parameters"] == LLAMA_2_70B
    assert fitting["FSDPStrategy()"]["checkpointing"]
    assert {"DDPStrategy()", "DeepSpeedStrategy(stage=1)"} <= {each["strategy"] for each in found["refused"]}


def test_checkpointing_is_looked_at_where_nothing_else_fits() -> None:
    wide = dict(width=64, depth=6)
    free = plan(lambda: Stack(**wide), strategy="fsdp", devices=2, batch=64, precision="bf16-true")
    less = plan(lambda: Stack(**wide), strategy="fsdp", devices=2, batch=64, precision="bf16-true", checkpointing=True)
    assert less.peak < free.peak
    found = find_layouts(
        lambda: Stack(**wide), devices=2, batch=64, memory=(less.peak + free.peak) // 2, precisions=("bf16-true",)
    )
    chosen = {code(p.choice.config): p for p in found.fitting}["FSDPStrategy()"]
    assert chosen.choice.checkpointing
    assert (chosen.estimate.flops or 0) > (free.estimate.flops or 0)


@given(st.sampled_from([1, 2, 4, 8, 16, 64, 1024, 16384]), st.sampled_from([1, 2, 4, 8]))
def test_every_strategy_that_is_looked_at_can_run(world: int, per_node: int) -> None:
    seen = list(configs(world, min(world, per_node)))
    for config in seen:
        config.check_world(world)
        assert config.layout(world, Precision.parse("bf16-true")).world == world
    assert len({code(config) for config in seen}) == len(seen)


@given(st.integers(0, 400), st.integers(1, 50), st.floats(1.0, 2.0), st.integers(1, 3000), st.sampled_from([1, 16]))
def test_the_largest_that_fits_is_found(fixed: int, slope: int, power: float, memory: int, unit: int) -> None:
    looks: list[int] = []

    def peak(count: int) -> int:
        looks.append(count)
        return fixed + int(slope * count**power)

    found = largest(peak, memory, unit, limit=64 * unit)
    fits = [n for n in range(unit, 64 * unit + 1, unit) if fixed + int(slope * n**power) <= memory]
    assert found == (max(fits) if fits else None)
    assert len(looks) <= 14


# -- how it reads ----------------------------------------------------------------------------------------------------


def test_what_one_change_would_do() -> None:
    def rows(config: Any, precision: str) -> dict[str, tuple[str, ...]]:
        planner = planner_of(
            model_of(Stack), optimizer=None, devices=4, per_node=None, hardware=Hardware(node=1e9), device="cpu"
        )
        choice = Choice(config=config, precision=Precision.parse(precision), batch=64, sequence=None)
        found = what_if.table(planner.plan(choice), planner.plan)
        return {row[0]: row[1:] for row in found.rows}

    sharded = rows(FSDPStrategy(), "bf16-mixed")
    assert sharded["activation checkpointing of blocks"][0].startswith("-")
    assert sharded["activation checkpointing of blocks"][2] > "x 1.00"
    assert sharded["reshard_after_forward=False"][1].startswith("-")  # nothing is gathered twice
    assert sharded["reshard_after_forward=True"][1].startswith("+")
    assert sharded["gradients sent in 16 bits"][1].startswith("-")
    assert sharded["gradients sent in 16 bits"][3].startswith("-")
    assert sharded["cpu_offload=True"][0].startswith("-")
    assert "linear layers and embeddings gathered one by one" in sharded
    replicas = rows(DDPStrategy(), "bf16-mixed")
    assert set(replicas) == {"activation checkpointing of blocks", "gradient_as_bucket_view=True"}
    assert replicas["gradient_as_bucket_view=True"][1] == "0"


def test_a_plan_reads_as_the_code_that_makes_it() -> None:
    made = plan(Stack, strategy=FSDPStrategy(device_mesh=(2, 4)), devices=8, precision="bf16-mixed", batch=2)
    names = {"plan": plan, "Stack": Stack, "FSDPStrategy": FSDPStrategy, "Hardware": Hardware}
    again = eval(repr(made), names)
    assert again.to_json() == made.to_json()
    assert repr(again) == repr(made)


def test_a_plan_prints_tables() -> None:
    made = plan(
        Stack, strategy="fsdp", devices=8, batch=2, precision="bf16-true", hardware=Hardware(memory=10**6, node=1e9)
    )
    shown = str(made)
    for words in (
        "Stack: 6.27 k parameters, FSDPStrategy(), bf16-true, AdamW, 8 processes, 8 a machine, batch 2 a rank",
        "It fits: one rank holds at most",
        "blocks.*",
        "all-gather of parameters in backward",
        "limited by node",
        "kept in 16 bits, with no float32 copy",
    ):
        assert words in shown
    assert "It does not fit in 1.0 KiB: " in str(plan(Stack, batch=2, hardware=Hardware(memory=1024)))
    big = plan(lambda: Stack(64, 1), batch=1, hardware=Hardware(memory=100))
    assert any(
        "A rule of thumb of the field asks for lazy initialisation where 4 x billions" in n for n in big.estimate.notes
    )
    if not torch.cuda.is_available():
        assert any("Kernels of cpu were looked at, since this torch has none of cuda" in n for n in big.estimate.notes)
    away = plan(Stack, strategy=FSDPStrategy(cpu_offload=True), devices=8, batch=1)
    assert any("Offloading keeps" in note and "a machine" in note for note in away.estimate.notes)


# -- the command -----------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    return main(["plan", *words])


def test_the_command_plans_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--hf-config", str(tiny(tmp_path)), "--devices", "8", "--sequence", "64", "--strategy", "fsdp")
    picture = tmp_path / "plan.png"
    fast = ("--node-bandwidth", "nvlink4", "--peak-tflops", "989", "--host-bandwidth", "pcie5")
    assert run(*words, "--memory", "1GB", *fast, "--what-if", "--picture", str(picture)) == 0
    shown = capsys.readouterr().out
    assert "tiny: 2" in shown
    for change in (
        "activation checkpointing of blocks",
        "reshard_after_forward=False",
        "cpu_offload=True",
        "gathered one",
    ):
        assert change in shown
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run(*words, "--precision", "bf16-true", "--gpu", "NVIDIA H100 80GB HBM3", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert run(*words, "--precision", "bf16-true", "--peak-tflops", "989.4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == named
    assert run(*words, "--memory", "100KB") == 1
    assert "It does not fit in 97.7 KiB: " in capsys.readouterr().out


def test_on_a_terminal_there_are_grids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    assert run("torch.nn:Linear", "--config", '{"in_features": 4, "out_features": 2}', "--strategy", "ddp") == 0
    shown = capsys.readouterr().out
    assert "┃" in shown
    assert "Linear: 10 parameters, DDPStrategy(), 32-true, adamw, 1 process, batch 1 a rank" in shown
    assert "backward" in shown


def test_the_command_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--hf-config", str(tiny(tmp_path)), "--devices", "2", "--sequence", "64", "--precision", "bf16-true")
    assert run(*words, "--memory", "1GB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"ModelParallelStrategy(tensor_parallel_size=2)", "FSDPStrategy()", "DDPStrategy()"} <= {
        each["strategy"] for each in found["fitting"]
    }
    assert run(*words, "--memory", "1KB") == 1
    shown = capsys.readouterr().out
    assert "These do not" in shown
    assert "too much" in shown


def test_the_command_s_json_holds_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef make(width, depth=1):\n    return nn.Linear(width, depth)\n"
    )
    (tmp_path / "net.json").write_text('{"width": 4}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "path", list(sys.path))
        config = ("--config", "net.json", "--config", '{"depth": 3}', "--config", "width=5")
        strategy = ("--strategy", "fsdp", "--devices", "4", "--set", "device_mesh=[2,2]", "--checkpointing")
        assert run("nets:make", *config, *strategy[:-1], "--json", "--batch", "7", "--memory", "1GiB") == 0
        found = json.loads(capsys.readouterr().out)
        assert run("nets:make", *config, *strategy) == 2  # a lone layer has no blocks
    assert found["parameters"] == 5 * 3 + 3
    assert found["strategy"] == "FSDPStrategy(device_mesh=(2, 2))"
    assert (found["memory"], found["fits"], found["batch"]) == (2**30, True, 7)
    assert found["peak"] == max(sum(m["memory"]["by_kind"].values()) for m in found["peaks"].values())
    assert {"model", "precision", "world_size", "ranks_per_node", "timeline", "host", "traffic", "flops", "by_module",
            "notes", "bound", "hardware", "checkpointing", "optimizer", "sequence"} <= set(found)  # fmt: skip
    assert {"what", "link", "bytes", "calls", "seconds"} == set(found["traffic"][0])


@pytest.mark.parametrize("what", ["batch", "sequence"])
def test_the_command_finds_the_largest_that_fits(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--hf-config", str(tiny(tmp_path)), "--sequence", "64", "--strategy", "single_device", "--memory", "4MB")
    assert run(*words, "--fit", what, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    largest_one = found[what]
    more = str(largest_one + (1 if what == "batch" else 128))
    assert largest_one > 1
    assert (
        run(
            *words[:2],
            *words[4:],
            *(("--batch", more, "--sequence", "64") if what == "batch" else ("--sequence", more)),
        )
        == 1
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Exactly one of MODEL and --hf-config must be given."),
        (("a:b", "--hf-config", "x"), "Exactly one of MODEL and --hf-config must be given."),
        (("--hf-config", "x", "--config", "a=1"), "--config must come with MODEL"),
        (("a:b",), "A search (no --strategy) must know the memory of a device, but --memory is missing."),
        (("a:b", "--strategy", "ddp", "--fit", "batch"), "--fit batch must know the memory of a device"),
        (("a:b", "--memory", "1GB", "--what-if"), "--what-if must come with --strategy"),
        (("a:b", "--strategy", "ddp", "--gpu", "H100", "--peak-tflops", "1"), "--gpu and --peak-tflops must not both"),
        (
            ("torch.nn:Identity", "--strategy", "ddp", "--gpu", "GeForce 256"),
            "--gpu must name a device whose rate in float32 is known, such as H100, B200 or MI300X, but is 'GeForce",
        ),
        (("a:b", "--memory", "1GB", "--set", "a=1"), "--set must come with --strategy"),
        (("a:b", "--memory", "1GB", "--fit", "batch"), "--fit must come with --strategy"),
        (("a:b", "--strategy", "ddp", "--precision", "32", "--precision", "64"), "--precision must be given once"),
        (("ab", "--strategy", "ddp"), "`MODEL` must be written package.module:Name, but is 'ab'."),
        (("json:nothing", "--strategy", "ddp"), "`MODEL` must name something that can be imported, but 'json:nothing'"),
        (
            ("json:__name__", "--strategy", "ddp"),
            "`MODEL` must name a class or a function, but 'json:__name__' is str.",
        ),
        (("torch.nn:Linear", "--strategy", "ddp"), "`--config` must hold the arguments of torch.nn:Linear, but"),
        (
            ("a:b", "--config", "none.json", "--strategy", "ddp"),
            "`--config` must be a JSON file, a JSON object or key=",
        ),
        (("a:b", "--config", "{", "--strategy", "ddp"), "'{' is no JSON"),
        (
            ("torch.nn:Linear", "--strategy", "ddp", "--set", "speed=1"),
            "`--set` must be KEY=VALUE with a field of DDPS",
        ),
        (
            ("--hf-config", "none.json", "--strategy", "ddp"),
            "`--hf-config` must be a config.json or a folder that holds",
        ),
        (
            ("a:b", "--strategy", "ddp", "--peak-tflops", "fast"),
            "`peak_tflops` must be a number above 0, but is 'fast'.",
        ),
    ],
)
def test_the_command_says_what_is_wrong(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    if words[:1] == ("a:b",):  # something that can be imported, so that what comes after is looked at
        words = ("torch.nn:Linear", *words[1:])
    assert run(*words) == 2
    assert said in capsys.readouterr().err


def test_a_hugging_face_config_must_be_one(tmp_path: Path) -> None:
    from fabriclite.planning.hugging_face import model_from

    for text, said in (
        ("{", "`--hf-config` must be JSON, but"),
        ('{"hidden_size": 1}', "`--hf-config` must say its `model_type`"),
        ('{"model_type": "no such"}', "`--hf-config` must be of a type that transformers knows, but is 'no such'"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            model_from(tmp_path)


def test_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabriclite.planning.hugging_face import model_from

    made = plan(Stack, batch=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"`picture` must find matplotlib.*pip install fabriclite\[plots\]"):
        made.picture(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"`--hf-config` must find transformers.*pip install transformers"):
        model_from(tiny(tmp_path))


# -- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_shows_every_kind_that_matters(tmp_path: Path) -> None:
    made = plan(lambda: Stack(128), strategy="fsdp", devices=4, batch=512, hardware=Hardware(memory=4 * 2**20))
    made.picture(tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    for colour in ("#0072b2", "#009e73", "#e69f00", "#cc79a7"):  # parameters, optimizer, gradients, activations
        assert colour in drawn.lower()
    made.picture(tmp_path / "plan.png")
    from matplotlib import image

    pixels = image.imread(tmp_path / "plan.png")
    assert len({tuple(pixel) for row in pixels[::7] for pixel in row[::7]}) > 8
    with pytest.raises(ConfigError, match=r"`picture` must end in .png or .svg, but is 'plan.pdf'"):
        made.picture("plan.pdf")

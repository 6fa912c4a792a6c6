"""What `fabric.report()` says is what was set up; values are written as the code that makes them."""

import datetime
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fabriclite
from fabriclite import (
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    LoadReport,
    ModelParallelStrategy,
    Precision,
    Safetensors,
    SetupOrderError,
    SingleDeviceStrategy,
    World,
)
from fabriclite.birth.plan import Birth, InitPlan
from fabriclite.collectives import gather_objects
from fabriclite.layout import Layout
from fabriclite.precision import NAMES
from fabriclite.watching.held import memory
from fabriclite.watching.report import ModuleReport, Range, Report
from fabriclite.watching.report_text import size
from gpt import Block
from models import MODELS, Bare, ConvNet, Tied
from worlds import STRATEGIES

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "watching-report.md"


def launched(strategy: Any, world: int, function: Any, *args: Any, precision: Any = "32-true") -> Any:
    config = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    return Fabric(accelerator="cpu", strategy=config, devices=world, precision=precision).launch(function, *args)


def one() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy="single_device")


def reported(fabric: Fabric, name: str, empty_init: bool | None) -> tuple[list[Report], int, int]:
    """The report of each rank, and this rank's own count of elements and bytes."""
    fabric.seed_everything(1)
    with fabric.init_module(empty_init):
        model = MODELS[name]()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    x = torch.zeros(4, 8, dtype=torch.int64) if name == "gpt" else torch.ones(4, 3)
    fabric.backward(model(x).float().square().mean())
    optimizer.step()
    return gather_objects(fabric._ready_world, fabric.report())


GPT_ELEMENTS = sum(p.numel() for p in MODELS["gpt"]().parameters())
CASES = {
    "single_device": (1, "32-true", {}, "nothing: one device holds it all"),
    "ddp": (2, "bf16-mixed", {"data": 2}, "DDP: GPT; gradients: 1 x bucket of at most 0.13 MiB"),
    "fsdp": (2, "bf16-mixed", {"shard": 2}, "FSDP: 2 x Block; FSDP root: GPT"),
    "hsdp": (4, "32-true", {"replicate": 2, "shard": 2}, "FSDP: 2 x Block; FSDP root: GPT"),
    "tp": (
        2,
        "32-true",
        {"data_parallel": 1, "tensor_parallel": 2},
        "ColwiseParallel: 10 x Linear; RowwiseParallel: 4 x Linear",
    ),
    "zero3": (2, "bf16-true", {"data": 2}, "ZeRO stage 3: GPT"),
}


@pytest.mark.parametrize("strategy", CASES)
def test_a_model_as_it_was_spread(strategy: str) -> None:
    world, precision, mesh, wrapped = CASES[strategy]
    first, *others = launched(strategy, world, reported, "gpt", None, precision=precision)
    assert all(other == first for other in others)
    (gpt,) = first.modules
    assert (first.mesh, first.world_size, first.precision) == (mesh, world, precision)
    assert first.strategy == repr(STRATEGIES[strategy])
    width = 2 if precision == "bf16-true" else 4
    assert (gpt.name, gpt.parameters, gpt.bytes) == ("GPT", GPT_ELEMENTS, GPT_ELEMENTS * width)
    shares = {"single_device": 1, "ddp": 1}.get(strategy, 2)
    assert GPT_ELEMENTS <= gpt.rank_parameters.most * shares < 1.1 * GPT_ELEMENTS  # tensor parallel keeps norms whole
    assert gpt.rank_parameters.least * shares <= GPT_ELEMENTS or strategy == "tp"
    assert gpt.rank_bytes == Range(gpt.rank_parameters.least * width, gpt.rank_parameters.most * width)
    assert gpt.tied == (("embed.weight", "lm_head.weight"),)
    assert gpt.frozen == ()
    recorded = strategy in ("fsdp", "hsdp", "tp", "zero3")
    assert len(gpt.initialised) + gpt.made == gpt.tensors + gpt.buffers
    assert bool(gpt.initialised) == recorded
    compute = "float32" if precision == "32-true" else "bfloat16"
    assert gpt.dtypes["compute"] == compute
    assert gpt.dtypes["parameters"] == ("bfloat16" if precision == "bf16-true" else "float32")
    assert gpt.dtypes["optimizer"] == "float32"
    assert gpt.optimizers == ("AdamW(lr=0.001)",)
    assert first.peak.most >= first.memory.most > 50 * 2**20
    assert sum(gpt.seconds.get(part, 0.0) for part in ("agree", "spread", "fill", "verify")) <= gpt.seconds["setup"]
    assert min(gpt.seconds.values()) >= 0
    assert ("verify" in gpt.seconds, "fill" in gpt.seconds) == (recorded, recorded)
    assert first.seconds["init_module"] > 0
    assert ("meeting" in first.seconds) == (strategy != "single_device")
    text = str(first)
    assert f"  wrapped    {wrapped}\n" in re.sub(r"\n {13}", " ", text)
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100


def cut_by_hand(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import Replicate

    style = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(module, mesh["tensor_parallel"], {"lin": style})


def partly(fabric: Fabric, saved: str) -> Report:
    """Loaded in part, frozen in part, and loaded again after; uneven over the ranks."""
    with fabric.init_module():
        model = Bare()
    loaded = fabric.load_raw(saved, model, strict=False)
    assert loaded is not None
    model = fabric.setup(model)
    fabric.load_raw(saved, model, strict=False)
    return fabric.report()


@pytest.mark.parametrize("strategy", ["fsdp", "function"])
def test_what_was_loaded_and_what_is_frozen(tmp_path: Path, strategy: str) -> None:
    torch.save({"scale": torch.ones(3), "lin.weight": torch.ones(4, 3)}, tmp_path / "w.pt")
    hand = ModelParallelStrategy(parallelize_fn=cut_by_hand, start_method="forkserver")
    report = launched("fsdp" if strategy == "fsdp" else hand, 2, partly, str(tmp_path / "w.pt"))
    (bare,) = report.modules
    assert bare.loaded == ("scale", "lin.weight")
    assert bare.initialised == ("frozen", "lin.bias")
    assert (bare.frozen, bare.frozen_parameters, bare.optimizers) == (("frozen",), 3, ())
    assert len(report.loads) == 2
    assert report.loads[0].startswith(f"load_raw {tmp_path}/w.pt: 2 loaded")
    text = re.sub(r"\n {13}", " ", str(report))
    assert "  values     2 initialised by setup as recorded; 2 loaded by setup: scale, lin.weight\n" in text
    assert "  frozen     3 parameters in 1 tensor: frozen\n" in text
    assert ", load 0." in text
    if strategy == "fsdp":
        assert bare.rank_parameters == Range(2 + 2 + 3 + 3 + 2 - 2, 2 + 2 + 6 + 2)
        assert "88 B; 40 B to 48 B on each rank" in text
    else:
        assert report.strategy == "ModelParallelStrategy(parallelize_fn=cut_by_hand, start_method='forkserver')"
        assert "  wrapped    split Shard(dim=0): 2 x parameters\n" in text.replace("S(0)", "Shard(dim=0)")


def test_several_modules_and_none(tmp_path: Path) -> None:
    fabric = one()
    before = fabric.report()
    assert (before.modules, before.mesh, before.loads) == ((), {}, ())
    assert "seconds      none" in str(before)
    conv, optimizer = fabric.setup(net := ConvNet(), torch.optim.SGD(net.parameters(), lr=0.5))
    tied = fabric.setup(Tied())
    fabric.save(tmp_path / "c", {"conv": conv, "optimizer": optimizer})
    fabric.load(tmp_path / "c", {"conv": conv, "optimizer": optimizer})
    report = fabric.report()
    assert [module.name for module in report.modules] == ["ConvNet", "Tied"]
    assert (report.modules[0].buffers, report.modules[0].buffer_bytes) == (3, 6 * 4 * 2 + 8)
    assert report.modules[0].made == 9
    assert report.loads == (f"load {tmp_path / 'c'}: conv, optimizer",)
    assert "setup of ConvNet 0." in str(report)
    assert "optimizer" not in report.modules[1].dtypes
    del conv, optimizer, tied, net
    assert fabric.report().modules == ()


def test_it_needs_the_others() -> None:
    with pytest.raises(SetupOrderError, match="`launch` must be called before the 2 processes can work together"):
        Fabric(accelerator="cpu", devices=2, strategy="ddp").report()


def test_mixed_dtypes_have_shares() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 1, bias=False)
            self.b = nn.Linear(1, 1, bias=False).to(torch.bfloat16)

    fabric = one()
    model = fabric.setup(Net())
    (net,) = fabric.report().modules
    assert net.dtypes["parameters"] == "75 % float32 + 25 % bfloat16"
    assert "75 % float32 + 25 % bfloat16: parameters; float32: compute, gradients, reduce" in str(fabric.report())
    assert model is not None


def test_memory_is_that_of_the_process() -> None:
    held = memory(torch.device("cpu"))
    assert held is not None
    now, peak = held
    block = torch.ones(2**25)  # 128 MiB
    more = memory(torch.device("cpu"))
    assert more is not None
    assert more[0] - now > 2**26
    assert more[1] >= more[0]
    assert peak >= now
    assert block.sum() > 0
    assert memory(torch.device("meta")) is None


def test_sizes_have_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 1024, 10 * 1024, 2**20 - 1, 5 * 2**30, 2**50)] == [
        *("0 B", "999 B", "0.98 KiB", "1.00 KiB", "10.0 KiB", "1.00 MiB", "5.00 GiB", "1024 TiB")
    ]


# -- the page ----------------------------------------------------------------------------------------------------------


def shape(text: str) -> list[str]:
    """Lines with every figure and version replaced, and what ranks may or may not have in common."""
    unwrapped = re.sub(r"\n {13}", " ", text.strip())
    numbered = re.sub(r"[\d.]+(\+\w+)?( [KMGT]iB| B)?\b", "#", unwrapped)
    return [line.strip() for line in numbered.replace("# to #", "#").splitlines()]


def as_on_the_page(fabric: Fabric) -> str:
    fabric.seed_everything(1)
    with fabric.init_module():
        model = MODELS["gpt"]()
    model, _ = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return str(fabric.report())


def test_the_page_shows_what_is_printed() -> None:
    config = FSDPStrategy(auto_wrap_policy={Block}, start_method="forkserver")
    text = launched(config, 2, as_on_the_page, precision="bf16-mixed")
    shown = PAGE.read_text().split("```text\n")[1].split("```")[0]
    assert shape(shown) == shape(text), text


# -- values as code ----------------------------------------------------------------------------------------------------

SCOPE = {
    **{name: getattr(fabriclite, name) for name in fabriclite.__all__},
    **{cls.__name__: cls for cls in (Birth, InitPlan, Layout, Block, nn.Linear, nn.Conv2d)},
    **{"torch": torch, "datetime": datetime, "functools": functools, "inf": float("inf")},
}


def hook(state: Any, bucket: Any) -> Any: ...


def predicate(name: str, module: nn.Module) -> bool:
    return False


SCOPE |= {"hook": hook, "predicate": predicate, "cut_by_hand": cut_by_hand}
COUNTS = st.integers(1, 4096)
TIMES = st.timedeltas(datetime.timedelta(seconds=1), datetime.timedelta(days=3))
STARTS = st.sampled_from(["auto", "popen", "spawn", "fork", "forkserver"])
POLICIES = (
    st.none() | st.sets(st.sampled_from([Block, nn.Linear, nn.Conv2d]), min_size=1).map(frozenset) | st.just(predicate)
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
COMMON = {
    "process_group_backend": st.none() | st.sampled_from(["gloo", "cpu:gloo,cuda:nccl"]),
    "timeout": TIMES,
    "start_method": STARTS,
}


def some(cls: Any, **given: Any) -> Any:
    """Values of ``cls`` with any of these arguments."""
    return st.fixed_dictionaries({}, optional=given).map(lambda arguments: cls(**arguments))


VALUES = st.one_of(
    some(SingleDeviceStrategy),
    some(
        DDPStrategy,
        static_graph=st.booleans(),
        gradient_as_bucket_view=st.booleans(),
        bucket_cap_mb=st.none() | COUNTS,
        ddp_comm_hook=st.just(hook),
        **COMMON,
    ),
    some(
        FSDPStrategy,
        auto_wrap_policy=POLICIES,
        reshard_after_forward=st.none() | st.booleans(),
        cpu_offload=st.booleans(),
        device_mesh=st.none() | st.tuples(COUNTS, COUNTS),
        state_dict_type=st.sampled_from(["sharded", "full"]),
        **COMMON,
    ),
    some(
        ModelParallelStrategy,
        plan=st.dictionaries(st.text(min_size=1), st.sampled_from(["colwise", "rowwise"]), min_size=1),
        data_parallel_size=st.just("auto") | COUNTS,
        auto_wrap_policy=POLICIES,
        **COMMON,
    ),
    some(ModelParallelStrategy, parallelize_fn=st.just(cut_by_hand)),
    some(DeepSpeedStrategy, stage=st.sampled_from([1, 2, 3]), offload_optimizer=st.booleans(), **COMMON),
    st.sampled_from(NAMES).map(Precision.parse),
    st.builds(Precision, name=st.sampled_from(NAMES), param_dtype=DTYPES, compute_dtype=DTYPES, reduce_dtype=DTYPES),
    st.integers(1, 99).flatmap(lambda n: st.builds(World, size=st.just(n), rank=st.integers(0, n - 1))),
    st.just(World(device=torch.device("cuda", 3), local_size=4, local_rank=2)),
    some(
        Layout, shard=COUNTS, gathers=st.booleans(), reshard_after_forward=st.none() | st.booleans(), grad_dtype=DTYPES
    ),
    some(Safetensors, max_file_bytes=COUNTS),
    st.builds(InitPlan, birth=st.sampled_from(Birth), device=st.just(torch.device("cuda:1")), dtype=DTYPES),
    st.builds(
        LoadReport,
        loaded=st.lists(st.text()).map(tuple),
        initialized=st.lists(st.text()).map(tuple),
        ignored=st.lists(st.text()).map(tuple),
        converted=st.dictionaries(st.text(), DTYPES),
    ),
)


@given(VALUES)
def test_a_value_reads_as_the_code_that_makes_it(value: Any) -> None:
    assert eval(repr(value), dict(SCOPE)) == value


def test_only_what_differs_from_the_default_is_written() -> None:
    class Local(nn.Module): ...

    five = functools.partial(predicate, module=None)
    shown = {
        "FSDPStrategy()": FSDPStrategy(cpu_offload=False, timeout=datetime.timedelta(minutes=30)),
        "FSDPStrategy(cpu_offload=True)": FSDPStrategy(cpu_offload=True),
        "FSDPStrategy(auto_wrap_policy={Block, Conv2d, Linear})": FSDPStrategy(
            auto_wrap_policy={nn.Linear, Block, nn.Conv2d}
        ),
        "FSDPStrategy(auto_wrap_policy=predicate, device_mesh=(2, 4))": FSDPStrategy(
            auto_wrap_policy=predicate, device_mesh=(2, 4)
        ),
        "FSDPStrategy(auto_wrap_policy=functools.partial(predicate, module=None))": FSDPStrategy(auto_wrap_policy=five),
        "DDPStrategy(ddp_comm_hook=hook, ddp_comm_state=[1])": DDPStrategy(ddp_comm_hook=hook, ddp_comm_state=[1]),
        "DeepSpeedStrategy(stage=2, timeout=datetime.timedelta(seconds=90))": DeepSpeedStrategy(
            stage=2, timeout=datetime.timedelta(seconds=90)
        ),
        "Precision.parse('bf16-mixed')": Precision.parse("bf16"),
        "World(rank=3, size=8)": World(rank=3, size=8),
        "Safetensors()": Safetensors(),
        "InitPlan(birth=Birth.RECORDED, device=torch.device('cpu'), dtype=torch.float32)": InitPlan(
            birth=Birth.RECORDED, device=torch.device("cpu"), dtype=torch.float32
        ),
    }
    assert [repr(value) for value in shown.values()] == list(shown)
    assert "Local" in repr(FSDPStrategy(auto_wrap_policy={Local}))


def test_reports_are_values() -> None:
    report = one().report()
    with pytest.raises(AttributeError):
        report.nodes = 3  # type: ignore[misc]
    assert ModuleReport.__dataclass_params__.frozen  # type: ignore[attr-defined]

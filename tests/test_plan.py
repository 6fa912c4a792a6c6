"""The table (strategy x precision x empty_init) -> plan: pure. docs/architecture.md shows this table."""

import re
from pathlib import Path

import pytest
import torch

from fabriclite import Fabric, Precision
from fabriclite.birth.plan import Birth, InitPlan, enter
from fabriclite.precision import NAMES
from fabriclite.registry import STRATEGIES

DOC = Path(__file__).parent.parent / "docs" / "architecture.md"
DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def plan(strategy: str, precision: str, empty_init: bool | None) -> InitPlan:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, precision=precision)
    return fabric._running.plan_init(empty_init)


def allowed() -> list[tuple[str, str]]:
    return [(s, p) for s, make in STRATEGIES.items() for p in NAMES if p in make().precisions]


@pytest.mark.parametrize(("strategy", "precision"), allowed())
@pytest.mark.parametrize("empty_init", [None, False, True])
def test_plan(strategy: str, precision: str, empty_init: bool | None) -> None:
    bits, kind = precision.split("-")
    dtype = torch.float32 if kind == "mixed" else DTYPES[bits]
    cheapest = Birth.INITIALISED if strategy in ("single_device", "ddp") else Birth.RECORDED
    birth = {None: cheapest, False: Birth.INITIALISED, True: Birth.RECORDED}[empty_init]
    wanted = InitPlan(birth=birth, device=torch.device("cpu"), dtype=dtype)
    assert plan(strategy, precision, empty_init) == wanted


def test_the_documented_table_is_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `([\w-]+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", DOC.read_text(), re.MULTILINE
    )
    documented = {(s, p): (dtype, [Birth[x.upper()] for x in births]) for s, p, dtype, *births in rows}
    actual = {
        (s, p): (str(plan(s, p, None).dtype).removeprefix("torch."), [plan(s, p, e).birth for e in (None, False, True)])
        for s, p in allowed()
    }
    assert documented == actual


def test_what_has_no_known_random_stream_is_not_recorded() -> None:
    plan = InitPlan.of(record=True, device=torch.device("mps"), dtype=torch.float32)
    assert plan.birth is Birth.INITIALISED


def test_init_module_is_inert_until_entered() -> None:  # peers row 5
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    context = fabric.init_module()
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(()).device.type == "cpu"
    with context:
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.nn.Linear(2, 2).weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_init_module_restores_everything_on_an_error() -> None:
    plan = InitPlan(birth=Birth.INITIALISED, device=torch.device("meta"), dtype=torch.float64)

    def fails() -> None:
        with enter(plan):
            assert torch.empty(()).is_meta
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(()).device.type == "cpu"


def test_init_modules_nest() -> None:
    half = Fabric(accelerator="cpu", devices=1, precision="16-true")
    double = Fabric(accelerator="cpu", devices=1, precision="64-true")
    with half.init_module():
        with double.init_module():
            assert torch.empty(()).dtype == torch.float64
        assert torch.empty(()).dtype == torch.float16


@pytest.mark.parametrize(
    ("written", "name"),
    [(None, "32-true"), (32, "32-true"), ("64", "64-true"), (16, "16-mixed"), ("bf16", "bf16-mixed"), ("16-true",) * 2],
)
def test_short_names_of_precisions(written: object, name: str) -> None:
    assert Precision.parse(written).name == name


def test_mixed_precision_reduces_in_float32() -> None:  # peers row 14
    for name in ("bf16-mixed", "16-mixed"):
        assert Precision.parse(name).reduce_dtype == torch.float32

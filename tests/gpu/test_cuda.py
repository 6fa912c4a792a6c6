"""The strategy matrix on one CUDA device: a world of one, for every strategy. Skipped where there is none."""

import importlib.util
from typing import Any

import pytest
import torch

import reference
from fabriclite import ConfigError, Fabric
from reference import STEPS, Case
from test_matrix import cases, train
from worlds import STRATEGIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ONE = ["single_device", "ddp", "fsdp", "fsdp_offload", "tp", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(("strategy", "case"), [pytest.param(s, c, id=f"{s}-{c}") for s in ONE for c in cases(s)])
def test_agrees_with_hand_written_pytorch_on_cuda(strategy: str, case: Case) -> None:
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    fabric = Fabric(accelerator="cuda", devices=1, strategy=STRATEGIES[strategy], precision=case.precision)
    different, actual = train(fabric, case)
    assert different == []
    wanted = reference.train(case, 1, "cuda")
    rel = 1e-5 if case.precision == "32-true" else (STEPS + 1) * 2**-8
    assert actual.losses == pytest.approx(wanted.losses, rel=rel)
    assert actual.norms == pytest.approx(wanted.norms, rel=rel)


@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
def test_init_module_creates_on_the_device(strategy: Any) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, strategy=strategy, precision="16-true")
    with fabric.init_module():
        module = torch.nn.Linear(4, 4)
    assert module.weight.device.type == "cuda"
    assert module.weight.dtype == torch.float16


def test_determinism_comes_before_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.zeros((), device="cuda")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"`deterministic` must be asked for before CUDA starts, .* but it has"):
        Fabric(accelerator="cuda", devices=1, deterministic=True)

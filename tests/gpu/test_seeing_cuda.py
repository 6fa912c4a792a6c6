"""Plans and the monitor on one CUDA device: what was predicted is what was then held. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fabriclite import Fabric, NonFiniteError
from fabriclite.watching import rundir
from gpt import GPT, GPTConfig
from worlds import STRATEGIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = GPTConfig(dim=512, layers=6, heads=8, context=512, vocab_size=8192)
BATCH = 8


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), torch.zeros(BATCH * SHAPE.context).long().to(logits.device))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_a_step_takes_what_was_planned(strategy: str, precision: str) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, strategy=STRATEGIES[strategy], precision=precision)
    with fabric.init_module():
        model: nn.Module = GPT(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    planned = fabric.plan(model, loss=loss_of, optimizer=optimizer, batch=BATCH, sequence=SHAPE.context)
    before = torch.cuda.memory_allocated()
    model, optimizer = fabric.setup(model, optimizer)
    tokens = torch.zeros(BATCH, SHAPE.context).long().cuda()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        fabric.backward(loss_of(model(tokens)))
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert planned.peak == pytest.approx(measured, rel=0.15)


def test_the_monitor_measures_on_the_device_and_stops_before_the_step(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cuda", devices=1)
    model, optimizer = fabric.setup(module := nn.Linear(64, 64), torch.optim.SGD(module.parameters(), lr=0.1))
    before: list[torch.Tensor] = []

    def train() -> None:
        with fabric.monitor(tmp_path, every=1, samples=8, bar=False) as monitor:
            for step in range(4):
                loss = model(torch.full((8, 64), 1.0 if step < 3 else float("nan"), device="cuda")).mean()
                fabric.backward(loss)
                before[:] = [p.detach().clone() for p in model.parameters()]
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(loss=loss)

    with pytest.raises(NonFiniteError, match="in step 4"):
        train()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    run = rundir.read(tmp_path)
    assert len(run.steps) == 3
    assert run.starts[0].device == torch.cuda.get_device_name()
    assert all(s.phases["forward"] > 0 and s.phases["backward"] > 0 for s in run.steps)
    assert run.steps[-1].memory[0] <= run.steps[-1].peak[0] == torch.cuda.max_memory_allocated()

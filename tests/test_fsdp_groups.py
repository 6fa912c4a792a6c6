"""FSDP and what ``fully_shard`` refuses by itself: parameters without dimensions, of other dtypes, not in rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import worlds

STEPS, SAMPLES = 4, 8


class Odd(nn.Module):
    """A learned scale as CLIP has, a convolution in channels-last, a transposed matrix, one layer in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.randn(()))
        self.conv = nn.Conv2d(2, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.mix = nn.Parameter((torch.randn(5, 6) * 0.3).t())
        self.exact = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mean((2, 3)) @ self.mix
        return self.exact(h.double()).float() * self.scale + self.shift


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 2, 4, 4, generator=generator), torch.randn(SAMPLES, 3, generator=generator)


def reference(accumulate: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Training on one process by hand."""
    torch.manual_seed(3)
    model, norms = Odd(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        for part in (step, step + 100) if accumulate else (step,):
            x, y = data(part)
            (model(x) - y).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False).item())
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.detach() for k, v in model.state_dict().items()}, norms


def train(fabric: Any, accumulate: bool) -> tuple[dict[str, Tensor], list[float]]:
    """The same through Fabric, each rank on its part of every batch."""
    torch.manual_seed(3)
    with fabric.init_module():
        model = Odd()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    norms = []
    for step in range(STEPS):
        parts = (step, step + 100) if accumulate else (step,)
        for part in parts:
            x, y = (t.chunk(fabric.world_size)[fabric.global_rank] for t in data(part))
            with fabric.no_backward_sync(model, enabled=part != parts[-1]):
                fabric.backward((model(x) - y).square().mean())
        norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    fabric.verify(model)
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}, norms


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 1), ("fsdp", 2), ("fsdp_offload", 2), ("hsdp", 4)])
def test_odd_parameters_train(strategy: str, world: int, accumulate: bool) -> None:
    weights, norms = worlds.run(train, strategy, world, accumulate)
    wanted, wanted_norms = reference(accumulate)
    assert norms == pytest.approx(wanted_norms, rel=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def evaluates(fabric: Any, change: Callable[[nn.Module], nn.Module]) -> list[float]:
    torch.manual_seed(3)
    model = fabric.setup(change(Odd()))
    with torch.no_grad():
        return model(data(0)[0]).flatten().tolist()  # type: ignore[no-any-return]


def test_a_frozen_model_of_real_tensors() -> None:
    """Built outside of ``init_module``: the same rules for tensors that are real."""
    torch.manual_seed(3)
    wanted = Odd()(data(0)[0]).flatten().tolist()
    assert worlds.run(evaluates, "fsdp", 2, frozen) == pytest.approx(wanted, rel=1e-6)

"""Hand-written PyTorch on one device: what every strategy must agree with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from models import MODELS, batch, loss_of

STEPS = 5
SAMPLES = 8
"""Per step, over all ranks."""
DTYPES = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Case:
    """One training run of the matrix.

    Attributes:
        model: key of ``MODELS``.
        precision: as ``Fabric`` takes it.
        form: ``"joint"`` or ``"late"`` set-up, ``"accumulate"`` two batches a step, ``"clip"`` to a small norm.
    """

    model: str
    precision: str
    form: str = "joint"


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]


def build(case: Case, device: str = "cpu") -> nn.Module:
    """Plain construction at seed 1 under the precision's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES.get(case.precision, torch.float32))
    try:
        torch.manual_seed(1)
        with torch.device(device):
            return MODELS[case.model]()
    finally:
        torch.set_default_dtype(before)


def optimizer_for(module: nn.Module) -> torch.optim.Optimizer:
    # eps 1e-3: Adam divides by the root of the second moment, and where a gradient is zero in exact arithmetic (the
    # bias of attention keys) a smaller eps turns rounding noise into whole steps.
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)


def micro_batches(case: Case, step: int) -> list[tuple[Tensor, Tensor]]:
    """The step's samples, split for accumulation, in the dtype the model takes."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = batch(case.model, generator, SAMPLES)
    parts = 2 if case.form == "accumulate" else 1
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def train(case: Case, replicas: int, device: str = "cpu") -> Run:
    """Train as ``replicas`` data-parallel ranks would, one after the other, averaging their gradients."""
    module = build(case, device)
    optimizer = optimizer_for(module)
    dtype = DTYPES.get(case.precision, torch.float32)
    mixed = case.precision.endswith("mixed")
    losses, norms = [], []
    for step in range(STEPS):
        micro = micro_batches(case, step)
        total = 0.0
        for x, y in micro:
            for rank, (xr, yr) in enumerate(zip(x.chunk(replicas), y.chunk(replicas), strict=True)):
                buffers = {k: v.clone() for k, v in module.named_buffers()}
                inputs = xr.to(device, dtype if xr.is_floating_point() else None)
                with torch.autocast(device, torch.bfloat16, enabled=mixed):
                    output = module(inputs)
                loss = loss_of(output, yr.to(device)) / len(micro)
                (loss / replicas).backward()
                total += loss.item() / replicas
                if rank > 0:  # rank 0's running statistics are the model's
                    for key, value in module.named_buffers():
                        value.copy_(buffers[key])
        if case.form == "clip":
            norms.append(clip_grad_norm_(module.parameters(), 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Run(losses, norms)

"""The same training step of a tiny model, written for plain PyTorch and for each front end, in one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from pairs import Row, compare, cpu, measure
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

STEPS: Final = 20
"""Steps of the tiny model in one block: enough to be warm, few enough to share what the machine does meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What a step calls. The loop around it is the same for every contender.

    Attributes:
        module: the module itself, whose parameters hold the gradients.
        model: what the step calls.
        optimizer: what it steps.
        backward: ``backward(loss)``.
        clip: clips all gradients to a norm of 1; ``None`` where the case has no clipping.
        data: the batch.
    """

    module: nn.Module
    model: Callable[[Tensor], Tensor]
    optimizer: Any
    backward: Callable[[Tensor], object] = Tensor.backward
    clip: Callable[[], object] | None = None
    data: Tensor

    def run(self, steps: int = STEPS) -> None:
        model, optimizer, backward, clip, data = self.model, self.optimizer, self.backward, self.clip, self.data
        for _ in range(steps):
            loss = model(data).float().square().mean()  # float: some front ends hand out float32, some do not
            backward(loss)
            if clip is not None:
                clip()
            optimizer.step()
            optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """What one step gives to the optimizer: this rank's part."""
        self.backward(self.model(self.data).float().square().mean())
        if self.clip is not None:
            self.clip()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        copies = [g.detach().clone() for g in local]
        self.optimizer.zero_grad()
        return copies


def check_same_work(trainers: dict[str, Trainer]) -> None:
    """Raise unless all contenders compute the same gradients."""
    (_, expected), *others = [(name, trainer.gradients()) for name, trainer in trainers.items()]
    for name, grads in others:
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


# -- one process -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """What one process trains."""

    name: str
    optimizer: Callable[..., Optimizer]
    mixed: bool = False
    clip: bool = False

    def birth(self) -> tuple[nn.Module, Optimizer, Tensor]:
        """A model, its optimizer and a batch; the same for every contender."""
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        return module, self.optimizer(module.parameters(), lr=1e-4), torch.randn(8, 32)


CASES: Final = (
    Case("SGD", SGD),
    Case("AdamW", AdamW),
    Case("AdamW, clipped", AdamW, clip=True),
    Case("AdamW, bf16-mixed", AdamW, mixed=True),
)


def plain(case: Case) -> Trainer:
    module, optimizer, data = case.birth()

    def mixed(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch)

    def clip() -> None:
        clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)

    model = mixed if case.mixed else module
    return Trainer(module=module, model=model, optimizer=optimizer, data=data, clip=clip if case.clip else None)


def fabriclite(case: Case) -> Trainer:
    from fabriclite import Fabric

    return _on_fabric(case, Fabric)


def lightning_fabric(case: Case) -> Trainer:
    from lightning_fabric import Fabric

    return _on_fabric(case, Fabric)


def _on_fabric(case: Case, fabric_class: Callable[..., Any]) -> Trainer:
    fabric = fabric_class(accelerator="cpu", devices=1, precision="bf16-mixed" if case.mixed else "32-true")
    module, optimizer, data = case.birth()
    model, optimizer = fabric.setup(module, optimizer)

    def clip() -> None:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)

    clipper = clip if case.clip else None
    return Trainer(module=module, model=model, optimizer=optimizer, backward=fabric.backward, clip=clipper, data=data)


def accelerate(case: Case) -> Trainer:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # a process has one precision, unless told like this
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case.mixed else "no")
    module, optimizer, data = case.birth()
    model, optimizer = accelerator.prepare(module, optimizer)

    def clip() -> None:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)

    clipper = clip if case.clip else None
    return Trainer(
        module=module, model=model, optimizer=optimizer, backward=accelerator.backward, clip=clipper, data=data
    )


CONTENDERS: Final = (fabriclite, lightning_fabric, accelerate)


def step_rows(rounds: int) -> Iterator[Row]:
    """CPU time per step in one process and one thread: on an idle machine, the time that passes."""
    torch.set_num_threads(1)
    for case in CASES:
        trainers = {"plain": plain(case), "plain, again": plain(case)}
        trainers |= {make.__name__: make(case) for make in CONTENDERS if find_spec(make.__name__)}
        check_same_work(trainers)
        (times,) = measure({name: trainer.run for name, trainer in trainers.items()}, rounds, [cpu])
        yield from compare(f"1 process, {case.name}", times, STEPS)

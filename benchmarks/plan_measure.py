"""What set-up and a training step take, as torch's allocators are asked: nothing of fabriclite measures."""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plan_models import BATCH, CONTEXT, SUBJECTS
from torch import Tensor
from torch.optim import AdamW

from fabriclite import Fabric
from fabriclite.planning.subject import default_loss

PARTS = ("init", "forward", "backward", "step")
STEPS = 2
Part = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of rank 0.

    Attributes:
        peaks: the most that was held, by part; of a step the last one.
        resting: what set-up leaves behind.
        optimizer: what the first step adds to that.
        gradients: what a backward adds.
    """

    peaks: dict[str, int]
    resting: int
    optimizer: int
    gradients: int


def counted(program: str, arguments: list[str]) -> None:
    """Start ``program`` again with the counting allocator in front, unless it is there."""
    if hasattr(ctypes.CDLL(None), "tensors_held"):
        return
    library = Path(tempfile.mkdtemp(prefix="plan-"), "allocations.so")
    source = Path(__file__).with_name("plan_allocations.c")
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True, timeout=60
    )
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, program, *arguments])


def measure(fabric: Fabric, name: str) -> Measured | None:
    """Set a model up, train two steps, and say what that took. Every rank must call this."""
    torch.set_num_threads(1)
    _run(fabric, name, lambda what: _Counter(fabric.device).part(what))  # imports, and what is made once a process
    gc.collect()
    counter = _Counter(fabric.device)
    _run(fabric, name, counter.part)
    return counter.measured() if fabric.global_rank == 0 else None


class _Counter:
    """Peaks and ends of the parts of a run, in bytes over what was held at the start."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._library: Any = ctypes.CDLL(None)
        if not self._cuda:
            self._library.tensors_held.restype = self._library.tensors_peak.restype = ctypes.c_longlong
        self._base = self._now()
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self._cuda else int(self._library.tensors_held())

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._library.tensors_rest_peak()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self._cuda else int(self._library.tensors_peak())
        self.peaks[what], self.ends[what] = peak - self._base, self._now() - self._base

    def measured(self) -> Measured:
        last = STEPS - 1
        return Measured(
            peaks={part: self.peaks[part if part == "init" else f"{part} {last}"] for part in PARTS},
            resting=self.ends["init"],
            optimizer=self.ends["zero 0"] - self.ends["init"],
            gradients=self.ends[f"backward {last}"] - self.ends[f"inputs {last}"],
        )


def _run(fabric: Fabric, name: str, part: Part) -> None:
    subject = SUBJECTS[name]
    with part("init"):
        with fabric.init_module():
            module = subject.build()
        optimizer = AdamW(module.parameters(), lr=1e-4)
        model, optimizer = fabric.setup(module, optimizer)
    del module
    loss_of = subject.loss or default_loss
    for step in range(STEPS):
        with part(f"inputs {step}"):
            args, kwargs = subject.inputs(BATCH, CONTEXT)
            args = tuple(_moved(value, fabric.device) for value in args)
            kwargs = {key: _moved(value, fabric.device) for key, value in kwargs.items()}
        with part(f"forward {step}"):
            loss = loss_of(model(*args, **kwargs))
        with part(f"backward {step}"):
            fabric.backward(loss, model=model)
        with part(f"step {step}"):
            optimizer.step()
        with part(f"zero {step}"):
            optimizer.zero_grad()
            del loss, args, kwargs


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

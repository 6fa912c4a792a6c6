"""What set-up and a training step take, from torch's own account of its allocators: nothing of fabriclite measures."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plan_models import BATCH, CONTEXT, SUBJECTS
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile, record_function

from fabriclite import Fabric
from fabriclite.planning.subject import default_loss

PARTS = ("init", "forward", "backward", "step")
STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of rank 0.

    Attributes:
        peaks: the most that was held, by part; of a step the last one.
        ends: what was held when a part ended.
        optimizer: what the first step left behind.
    """

    peaks: dict[str, int]
    ends: dict[str, int]
    optimizer: int


def measure(fabric: Fabric, name: str) -> Measured | None:
    """Set a model up, train two steps, and say what that took. Every rank must call this."""
    torch.set_num_threads(1)
    _run(fabric, name, _nothing)  # imports, and what is made once a process
    measured = _on_cuda(fabric, name) if fabric.device.type == "cuda" else _on_cpu(fabric, name)
    return measured if fabric.global_rank == 0 else None


@contextmanager
def _nothing(part: str) -> Iterator[None]:
    yield


def _run(fabric: Fabric, name: str, part: Any) -> None:
    subject = SUBJECTS[name]
    with part("init"):
        with fabric.init_module():
            module = subject.build()
        optimizer = AdamW(module.parameters(), lr=1e-4)
        model, optimizer = fabric.setup(module, optimizer)
    del module
    loss_of = subject.loss or default_loss
    for step in range(STEPS):
        args, kwargs = torch.utils._pytree.tree_map(lambda leaf: leaf.to(fabric.device), subject.inputs(BATCH, CONTEXT))
        with part(f"forward {step}"):
            loss = loss_of(model(*args, **kwargs))
        with part(f"backward {step}"):
            fabric.backward(loss)
        with part(f"step {step}"):
            optimizer.step()
        with part(f"zero {step}"):
            optimizer.zero_grad()
            del loss


def _on_cpu(fabric: Fabric, name: str) -> Measured:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run(fabric, name, lambda part: record_function(f"part:{part}"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == 0
    )
    peaks, ends = {}, {}
    for event in events:
        if event["name"].startswith("part:") and event.get("cat") == "user_annotation":
            within = [held for at, held in memory if event["ts"] <= at <= event["ts"] + event["dur"]]
            part = event["name"].removeprefix("part:")
            before = [held for at, held in memory if at < event["ts"]]
            peaks[part] = max(within, default=before[-1] if before else 0)
            ends[part] = within[-1] if within else before[-1]
    return _measured(peaks, ends)


def _on_cuda(fabric: Fabric, name: str) -> Measured:
    peaks: dict[str, int] = {}
    ends: dict[str, int] = {}
    base = torch.cuda.memory_allocated()

    @contextmanager
    def part(what: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        peaks[what] = torch.cuda.max_memory_allocated() - base
        ends[what] = torch.cuda.memory_allocated() - base

    _run(fabric, name, part)
    return _measured(peaks, ends)


def _measured(peaks: dict[str, int], ends: dict[str, int]) -> Measured:
    last = STEPS - 1
    own = {part: peaks[part if part == "init" else f"{part} {last}"] for part in PARTS}
    rest = {part: ends[part if part == "init" else f"{part} {last}"] for part in PARTS}
    rest["before"] = ends["zero 0"]
    return Measured(peaks=own, ends=rest, optimizer=ends["zero 0"] - ends["init"])

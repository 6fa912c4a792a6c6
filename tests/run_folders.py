"""Folders of runs, as fabric.monitor writes them: made up, with everything in them that a page can show."""

import math
import random
from pathlib import Path
from typing import Any

from fabriclite.planning.values import Estimate, Kind, Memory, Moment, Phase
from fabriclite.watching import rundir
from fabriclite.watching.records import Event, EventKind, RunFacts, StepRecord

BEGAN = 1_790_000_000.0
MIB = 2**20


def plan() -> dict[str, Any]:
    """What ``fabric.plan`` could have said of it: a peak of 200 MiB, in backward."""

    def moment(phase: Phase, module: str, **sizes: int) -> Moment:
        by_kind: dict[Kind, int] = {kind: size * MIB for kind, size in sizes.items()}  # type: ignore[misc]
        return Moment(phase, module, Memory(by_kind))

    return Estimate(
        model="GPT",
        parameters=10_788_096,
        strategy="FSDPStrategy()",
        precision="bf16-mixed",
        world_size=4,
        ranks_per_node=4,
        batch=8,
        peaks={
            "init": moment("init", "", parameters=11),
            "forward": moment("forward", "blocks.5", parameters=11, optimizer=22, activations=120, communication=9),
            "backward": moment("backward", "blocks.5.mlp", parameters=11, gradients=11, optimizer=22, activations=156),
            "step": moment("step", "", parameters=11, gradients=11, optimizer=22, temporary=6),
        },
        notes=("Activations are most of it: a smaller batch helps more than another strategy.",),
    ).to_json()


class Made:
    """Writes a run of ``steps`` steps on ``ranks`` ranks that fails, goes on from a checkpoint, and ends."""

    def __init__(self, folder: Path, ranks: int = 4, steps: int = 240) -> None:
        self.folder, self.ranks, self.steps = folder, ranks, steps
        self.time = BEGAN
        self._random = random.Random(ranks)

    def whole(self) -> Path:
        self.start(0, 0)
        self.train(0, self.steps // 2)
        self.event("failure", self.steps // 2, "OutOfMemoryError: 12 GiB", rank=2, traceback="line 1\nline 2")
        self.time += 20
        self.start(1, self.steps // 3)
        self.event("load", self.steps // 3, "run/latest")
        self.train(self.steps // 3, self.steps)
        self.event("profile", self.steps - 20, "steps 220 to 222")
        self.event("end", self.steps, "all steps are done")
        return self.folder

    def start(self, attempt: int, first_step: int, **other: Any) -> None:
        facts: dict[str, Any] = dict(
            name="GPT",
            strategy="FSDPStrategy()",
            precision="bf16-mixed",
            world_size=self.ranks,
            device="NVIDIA H200",
            parameters=10_788_096,
            versions={"python": "3.12.1", "torch": "2.13.0", "fabriclite": "0.1.0"},
            total_steps=self.steps,
            plan=plan(),
            report="GPT: 10,788,096 parameters\n  wrapped by  fully_shard",
        )
        facts.update(other)
        rundir.append(self.folder, RunFacts(started=self.time, attempt=attempt, first_step=first_step, **facts))
        self.event("start", first_step, f"attempt {attempt}")

    def event(self, kind: EventKind, step: int | None, text: str, rank: int = 0, **details: Any) -> None:
        rundir.append(self.folder, Event(time=self.time, kind=kind, rank=rank, step=step, text=text, details=details))

    def train(self, first: int, last: int) -> None:
        for step in range(first + 1, last + 1):
            self.time += 0.25
            rundir.append(self.folder, self.record(step))
            if step % (self.steps // 6) == 0:
                self.event("save", step, f"run/step-{step}")

    def record(self, step: int) -> StepRecord:
        noise, part = self._random.gauss, step / self.steps
        loss = 2.3 + 8 * math.exp(-6 * part) + noise(0, 0.05)
        if step == int(self.steps * 0.7):
            loss = math.nan
            self.event("nonfinite", step, "loss is NaN, first in blocks.3.attention", rank=1 % self.ranks)
        if step == int(self.steps * 0.85):
            loss = 6.0
            self.event("spike", step, "loss is 6.0, usual is 2.3")
        metrics = {"loss": loss, "learning_rate": 3e-4 * (0.5 + 0.5 * math.cos(math.pi * part))}
        metrics["gradient norm"] = math.exp(noise(0, 0.4)) * (60 if part < 0.05 else 1)
        if step % 20 == 0:
            metrics["val_loss"] = loss + 0.1
        for name, mean in (("samples", 128.0), ("tokens", 131_072.0), ("flops", 8.6e13)):
            metrics[f"{name}_per_second"] = mean * (1 + noise(0, 0.01))
        metrics["mfu"] = 0.31 * (1 + noise(0, 0.01))
        own = tuple(
            0.2 * (1.12 if rank == self.ranks - 1 else 1) * (1 + abs(noise(0, 0.02))) for rank in range(self.ranks)
        )
        slowest = max(own) + 0.02
        phases = {"data": 0.01, "forward": 0.06, "backward": 0.13 + abs(noise(0, 0.005)), "optimizer": 0.02}
        return StepRecord(
            step=step,
            time=self.time,
            metrics=metrics,
            phases={**phases, "other": slowest - sum(phases.values())},
            seconds=tuple(slowest + abs(noise(0, 0.001)) for _ in range(self.ranks)),
            own=own,
            memory=tuple(int((60 + rank + noise(0, 0.2)) * MIB) for rank in range(self.ranks)),
            peak=tuple(int((205 + rank) * MIB) if step > 2 else 90 * MIB for rank in range(self.ranks)),
        )

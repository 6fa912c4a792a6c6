"""Plans against what the same runs take: every case is planned, then run with as many processes as it says.

    $ python benchmarks/plan_accuracy.py              # all, into docs/guides/planning-accuracy.md and a JSON file
    $ python benchmarks/plan_accuracy.py --only fsdp  # those whose name has it; prints, writes nothing
    $ python benchmarks/plan_accuracy.py --accelerator cuda

About ten minutes on two cores. On the CPU it needs a C compiler: what torch's allocator takes is counted.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import torch
from plan_measure import Measured, counted, measure
from plan_models import BATCH, CONTEXT, LLAMA_PLAN, SUBJECTS
from torch.optim import AdamW

from fabriclite import (
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from fabriclite.planning.estimate import at_rest, estimate, trace
from fabriclite.planning.trace import Trace
from fabriclite.planning.values import Estimate
from fabriclite.precision import Precision

WAY: Final = {"start_method": "forkserver"}
CASES: Final[dict[str, tuple[str, Any, int, str]]] = {
    "single, GPT, float32": ("gpt", SingleDeviceStrategy(), 1, "32-true"),
    "single, GPT, bf16": ("gpt", SingleDeviceStrategy(), 1, "bf16-true"),
    "single, Llama, mixed": ("llama", SingleDeviceStrategy(), 1, "bf16-mixed"),
    "single, conv, float32": ("conv", SingleDeviceStrategy(), 1, "32-true"),
    "ddp x 2, GPT, float32": ("gpt", DDPStrategy(**WAY), 2, "32-true"),
    "ddp x 2 with bucket views, Llama, bf16": (
        "llama",
        DDPStrategy(gradient_as_bucket_view=True, **WAY),
        2,
        "bf16-true",
    ),
    "ddp x 2, conv, mixed": ("conv", DDPStrategy(**WAY), 2, "bf16-mixed"),
    "fsdp x 2, GPT, float32": ("gpt", FSDPStrategy(**WAY), 2, "32-true"),
    "fsdp x 4, Llama, mixed": ("llama", FSDPStrategy(**WAY), 4, "bf16-mixed"),
    "fsdp x 2 without resharding, Llama, float32": (
        "llama",
        FSDPStrategy(reshard_after_forward=False, **WAY),
        2,
        "32-true",
    ),
    "fsdp x 2, conv, mixed": ("conv", FSDPStrategy(**WAY), 2, "bf16-mixed"),
    "fsdp 2 x 2 hybrid, GPT, mixed": ("gpt", FSDPStrategy(device_mesh=(2, 2), **WAY), 4, "bf16-mixed"),
    "fsdp x 2 with offload, GPT, bf16": ("gpt", FSDPStrategy(cpu_offload=True, **WAY), 2, "bf16-true"),
    "tensor x 2, GPT, float32": ("gpt", ModelParallelStrategy(data_parallel_size=1, **WAY), 2, "32-true"),
    "tensor x 2, Llama, bf16": (
        "llama",
        ModelParallelStrategy(data_parallel_size=1, plan=LLAMA_PLAN, **WAY),
        2,
        "bf16-true",
    ),
    "tensor x 2, fsdp x 2, GPT, mixed": ("gpt", ModelParallelStrategy(**WAY), 4, "bf16-mixed"),
    "zero-1 x 2, GPT, bf16": ("gpt", DeepSpeedStrategy(stage=1, **WAY), 2, "bf16-true"),
    "zero-2 x 2, Llama, float32": ("llama", DeepSpeedStrategy(stage=2, **WAY), 2, "32-true"),
    "zero-2 x 2, GPT, mixed": ("gpt", DeepSpeedStrategy(stage=2, **WAY), 2, "bf16-mixed"),
    "zero-3 x 2, GPT, bf16": ("gpt", DeepSpeedStrategy(stage=3, **WAY), 2, "bf16-true"),
    "zero-3 x 2, GPT, mixed": ("gpt", DeepSpeedStrategy(stage=3, **WAY), 2, "bf16-mixed"),
    "zero-2 x 2 with offload, GPT, bf16": (
        "gpt",
        DeepSpeedStrategy(stage=2, offload_optimizer=True, **WAY),
        2,
        "bf16-true",
    ),
    "zero-3 x 2 with offload, GPT, bf16": (
        "gpt",
        DeepSpeedStrategy(stage=3, offload_optimizer=True, **WAY),
        2,
        "bf16-true",
    ),
    "zero-3 x 2, Llama, float32": ("llama", DeepSpeedStrategy(stage=3, **WAY), 2, "32-true"),
}
COLUMNS: Final = ("set-up peak", "after set-up", "optimizer state", "gradients", "forward", "backward", "step")
DOCS: Final = Path(__file__).parent.parent / "docs" / "guides" / "planning-accuracy.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One case: bytes of rank 0, predicted and measured, by column."""

    case: str
    predicted: dict[str, int]
    measured: dict[str, int]

    def off(self, column: str) -> float | None:
        """Relative error; ``None`` where nothing was to be held and nothing was."""
        predicted, measured = self.predicted[column], self.measured[column]
        if abs(predicted - measured) < 4096:  # the loss, a few counters
            return 0.0 if measured > 4096 else None
        return predicted / measured - 1 if measured else float("inf")


def planned(name: str, config: Any, world: int, precision: Precision, device: str) -> tuple[Trace, Estimate]:
    layout = config.layout(world, precision)
    found = trace(
        SUBJECTS[name],
        batch=BATCH,
        sequence=CONTEXT,
        precision=precision,
        optimizer=lambda params: AdamW(params, lr=1e-4),
        tensor=layout.tensor,
        config=config,
        device=device,
    )
    return found, estimate(found, config, world_size=world, ranks_per_node=world, precision=precision)


def compare(case: str, accelerator: str) -> Row:
    name, config, world, word = CASES[case]
    precision = Precision.parse(word)
    found, plan = planned(name, config, world, precision, accelerator)
    fabric = Fabric(accelerator=accelerator, strategy=config, devices=world, precision=word)
    measured: Measured = fabric.launch(measure, name)
    layout = config.layout(world, precision)
    device, host = at_rest(found, layout)
    counts_host = accelerator == "cpu"  # there offloading moves nothing: what is on the host is counted too
    beside = sum(host.values()) if counts_host else 0
    host_total = plan.host.total if counts_host else 0
    later = plan.host.by_kind.get("gradients", 0) - host.get("gradients", 0) if counts_host else 0
    stepping = plan.host.by_kind.get("temporary", 0) if counts_host else 0
    before = host_total - stepping - later
    others = {"forward": before, "backward": before, "step": host_total}
    begun = plan.peaks["init"].memory
    ended = all(kind in begun.by_kind for kind, size in device.items() if size)  # else offloading comes after it
    small = [w.bytes for w in found.weights if w.numel < layout.persistent_numel] if layout.gathers else []
    turn = next(moment.memory.by_kind for moment in plan.timeline if moment.phase == "step")
    predicted = {
        "set-up peak": max(begun.total + beside * ended, sum(device.values()) + beside),
        "after set-up": sum(device.values()) + beside,
        "optimizer state": sum(small)  # what then stays gathered
        + turn.get("optimizer", 0)
        - device.get("optimizer", 0)
        + (plan.host.by_kind.get("optimizer", 0) - host.get("optimizer", 0) if counts_host else 0),
        "gradients": turn.get("gradients", 0) - device.get("gradients", 0) + later,
        **{phase: plan.peaks[phase].memory.total + rest for phase, rest in others.items()},
    }
    return Row(
        case,
        predicted,
        {
            "set-up peak": measured.peaks["init"],
            "after set-up": measured.resting,
            "optimizer state": measured.optimizer,
            "gradients": measured.gradients,
            **{phase: measured.peaks[phase] for phase in ("forward", "backward", "step")},
        },
    )


def table(rows: list[Row], accelerator: str) -> str:
    where = torch.cuda.get_device_name() if accelerator == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    lines = [
        f"{date.today()}, {where}, torch {torch.__version__}, Python {platform.python_version()}."
        " MB of rank 0, predicted / measured.",
        "",
        "| case | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for row in rows:
        lines.append(f"| {row.case} | " + " | ".join(cell(row, column) for column in COLUMNS) + " |")
    return "\n".join(lines)


def cell(row: Row, column: str) -> str:
    off = row.off(column)
    if off is None:
        return "none"
    return f"{row.predicted[column] / 1e6:.1f} / {row.measured[column] / 1e6:.1f} ({off:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", default=str(Path(__file__).with_suffix(".json")))
    chosen = parser.parse_args()
    if chosen.accelerator == "cpu":
        counted(__file__, sys.argv[1:])
    rows = []
    for case in CASES:
        if chosen.only in case:
            rows.append(compare(case, chosen.accelerator))
            print(case, *(f"{column}: {cell(rows[-1], column)}" for column in COLUMNS), sep="\n    ", flush=True)
    text = table(rows, chosen.accelerator)
    if chosen.only or chosen.accelerator != "cpu":
        print(text)
        return
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    Path(chosen.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

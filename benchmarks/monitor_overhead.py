"""What `fabric.monitor` costs with everything on: the step of examples/gpt.py's model, watched and not.

    python benchmarks/monitor_overhead.py                       # one process, then DDP on two: under two minutes
    python benchmarks/monitor_overhead.py --rounds 40 --only 1

Everything: a bar drawn in a pseudo-terminal, the run's folder, a logger, throughput with counted FLOPs, phases, memory,
the look at losses before each optimizer step, spikes with their samples of activations, figures of all ranks each 10
steps. Watched and unwatched steps take turns in blocks of 10 (so each block of the watched holds one that is logged).
One model takes them all: two differ by more, for where their memory lies. "off, again" is not watched either: what it
differs by is noise.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from pairs import Row, compare, cpu, elapsed, measure, table
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from fabriclite import DDPStrategy, Fabric
from gpt import GPT, GPTConfig

STEPS: Final = 10
ROUNDS: Final = 15
BATCH: Final = 8


class Memory:
    """A logger that keeps the last metrics."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.last = (step, metrics)


def trainer(fabric: Fabric) -> tuple[Callable[[], None], Callable[[Any], None]]:
    """``STEPS`` steps of a model, unwatched and watched: the same one, as two differ by where their memory lies."""
    config = GPTConfig()
    torch.manual_seed(0)
    with fabric.init_module():
        module = GPT(config)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-4))
    generator = torch.Generator().manual_seed(fabric.global_rank)
    tokens = torch.randint(config.vocab_size, (BATCH, config.context + 1), generator=generator)

    def step() -> torch.Tensor:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def unwatched() -> None:
        for _ in range(STEPS):
            step()

    def watched(monitor: Any) -> None:
        fabric._callbacks.add(monitor)  # as entering it does, without beginning a run each time
        for _ in range(STEPS):
            monitor.step(loss=step(), lr=1e-4)
        fabric._callbacks.remove(monitor)

    return unwatched, watched


@contextmanager
def terminal() -> Iterator[None]:
    """Standard output is a terminal that somebody reads, as under a person's eyes."""
    here, there = os.openpty()
    reader = threading.Thread(target=_drain, args=(here,), daemon=True)
    reader.start()
    before, sys.stdout = sys.stdout, os.fdopen(there, "w")
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout = before


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        pass


def rows(fabric: Fabric, rounds: int, where: str, options: dict[str, Any]) -> list[Row]:
    """Seconds per step, watched and not, on rank 0. Every rank must call this."""
    torch.set_num_threads(1)
    fabric = Fabric(**options, loggers=Memory())
    unwatched, watched = trainer(fabric)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(terminal())
        tokens = BATCH * GPTConfig().context
        monitor = fabric.monitor(folder, total_steps=100_000, samples=BATCH, tokens=tokens, peak_flops=1e12)
        stack.enter_context(monitor)
        fabric._callbacks.remove(monitor)
        contenders = {"off": unwatched, "off, again": unwatched, "on": partial(watched, monitor)}
        clocks = (cpu, elapsed)
        by_clock = measure(contenders, rounds, clocks, before=fabric.barrier)
    return [
        row
        for clock, times in zip(clocks, by_clock, strict=True)
        for row in compare(f"GPT step, {where}, {clock.__name__}", times, STEPS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each contender (default: {ROUNDS})")
    parser.add_argument("--only", type=int, choices=(1, 2), help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, in seconds")
    asked = parser.parse_args()
    found: list[Row] = []
    for processes in [asked.only] if asked.only else (1, 2):
        strategy: Any = "single_device" if processes == 1 else DDPStrategy(start_method="forkserver")
        options = {"accelerator": "cpu", "devices": processes, "strategy": strategy}
        where = "one process" if processes == 1 else "DDP on two"
        result = Fabric(**options).launch(rows, asked.rounds, where, options)
        print(f"\n{table(result or [])}", flush=True)
        found += result or []
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

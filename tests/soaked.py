"""A training script that is killed, by a plan, and goes on by itself when it is started again.

Each step leaves ``steps/N.json``: its loss, the samples of all ranks, and how many ranks there were. A step that is
done again, after a restart, replaces it. ``result-R.json`` has a digest of what rank R held of all weights and moments
at the end.
"""

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from fabriclite import Fabric

SAMPLES = 96
GLOBAL_BATCH = 12
"""Divides ``SAMPLES``, and comes out even on 1, 2, 3 and 4 ranks: a step sees the same samples on any of them."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds per step")
    parser.add_argument("--kills", type=json.loads, default=[], help='[[step, rank, "forward"], ...]')
    return parser.parse_args()


class Killer:
    """Kills this rank once at each place of the plan, also over restarts. An entry of the checkpoint, for ``save``."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.out, self.rank, self.step = args.out, rank, 0
        self.plan = [(int(step), int(of), str(what)) for step, of, what in args.kills]

    def now_in(self, what: str) -> None:
        if (self.step, self.rank, what) not in self.plan:
            return
        try:
            (self.out / f"killed-{self.step}-{self.rank}-{what}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, Any]:
        self.now_in("save")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def write(file: Path, facts: object) -> None:
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(facts))
    beside.replace(file)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    tensors = [*model.state_dict().values()]
    tensors += [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in local)).hexdigest()


def main() -> None:
    args = parse_args()
    fabric = Fabric(accelerator="cpu", strategy=args.strategy)
    fabric.launch()
    fabric.seed_everything(1)
    stop = fabric.preemption()
    killer = Killer(args, fabric.global_rank)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(args.dropout), nn.Linear(32, 1))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
    x = torch.randn(SAMPLES, 4)
    data = TensorDataset(torch.arange(SAMPLES), x, x.sin().sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=GLOBAL_BATCH // fabric.world_size, shuffle=True)
    loader = fabric.setup_dataloaders(loader)
    state = {"model": model, "optimizer": optimizer, "loader": loader, "killer": killer, "step": 0}
    fabric.seed_everything(2, rank=fabric.global_rank)  # masks of dropout
    (args.out / "steps").mkdir(exist_ok=True)
    if os.path.lexists(args.out / "latest"):
        fabric.load(args.out / "latest", state)
    while state["step"] < args.steps:
        for numbers, inputs, targets in loader:
            killer.step = state["step"] = state["step"] + 1
            time.sleep(args.sleep)
            killer.now_in("forward")
            loss = (model(inputs) - targets).square().mean()
            loss.register_hook(lambda _: killer.now_in("backward"))
            fabric.backward(loss)
            killer.now_in("step")
            optimizer.step()
            optimizer.zero_grad()
            facts = {
                "loss": fabric.all_reduce(loss.detach(), reduce_op="mean").item(),
                "samples": fabric.all_gather(numbers).flatten().tolist(),
                "ranks": fabric.world_size,
            }
            if fabric.is_global_zero:
                write(args.out / "steps" / f"{state['step']}.json", facts)
            if state["step"] % args.save_every == 0:
                fabric.save(args.out / f"step-{state['step']}", state, keep_last=2, asynchronous=True)
            if stop.requested():
                fabric.save(args.out / f"step-{state['step']}", state, keep_last=2)
                stop.exit()
            if state["step"] == args.steps:
                break
    write(args.out / f"result-{fabric.global_rank}.json", {"digest": digest(model, optimizer)})


if __name__ == "__main__":
    main()

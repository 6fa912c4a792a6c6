"""A training script that is told to stop: which ranks get which signal, when, and in the middle of what.

Each rank leaves ``rank-N.json``: the step it stopped at, and how many steps it had done.
"""

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabriclite import Fabric


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--number", default="SIGTERM")
    parser.add_argument("--to", choices=("one", "all", "parent", "family", "nobody"), default="one")
    parser.add_argument("--at", type=int, default=3, help="step")
    parser.add_argument("--during", choices=("forward", "backward", "save"), default="forward")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    return parser.parse_args()


class Sender:
    """Sends the signal once, when this rank is at the step and in the middle of what was asked for."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args = args
        self.sends = args.to == "all" or (rank == 1 if args.to == "one" else rank == 0)
        self.step = 0

    def now_in(self, what: str) -> None:
        if self.sends and what == self.args.during and self.step == self.args.at and self.args.to != "nobody":
            self.sends = False
            number = getattr(signal, self.args.number)
            if self.args.to == "family":  # this rank's session: its workers, and the ranks that it started
                subprocess.run(["sh", "-c", f"kill -{number:d} -{os.getpgrp()}"], check=False)
            else:
                os.kill(os.getppid() if self.args.to == "parent" else os.getpid(), number)
            time.sleep(0.1)


class Told:
    """An entry of the checkpoint that is asked for its state in the middle of a save."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def state_dict(self) -> dict[str, Any]:
        self.sender.now_in("save")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def main() -> None:
    args = parse_args()
    fabric = Fabric(accelerator="cpu", strategy=args.strategy, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(1)
    stop = fabric.preemption(requeue=args.requeue)
    sender = Sender(args, fabric.global_rank if fabric.world_size > 1 or args.to != "one" else 1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = DataLoader(TensorDataset(torch.randn(96, 4)), batch_size=2, num_workers=args.workers)
    loader = fabric.setup_dataloaders(loader)
    state = {"model": model, "optimizer": optimizer, "loader": loader, "told": Told(sender), "step": 0}
    facts: dict[str, Any] = {"stopped": None, "pid": os.getpid()}
    for (x,) in loader:
        sender.step = state["step"] = state["step"] + 1
        sender.now_in("forward")
        loss = model(x).square().mean()
        loss.register_hook(lambda _: sender.now_in("backward"))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if args.during == "save" and state["step"] == args.at:
            fabric.save(args.out / "on-the-way", state)
        facts["done"] = state["step"]
        stopping = stop.requested()
        if stopping:
            facts["stopped"] = state["step"]
        (args.out / f"rank-{fabric.global_rank}.json").write_text(json.dumps(facts))
        if stopping:
            fabric.save(args.out / f"step-{state['step']}", state, keep_last=2, asynchronous=args.asynchronous)
            stop.exit()
        if state["step"] == args.steps:
            break


if __name__ == "__main__":
    main()

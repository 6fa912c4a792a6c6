"""Trains a little on as many ranks as it is told and prints in between: what is shown of it is looked at by tests."""

import sys
import time

import torch
from torch import nn

from fabriclite import DDPStrategy, Fabric


def main(devices: int, steps: int, pause: float) -> None:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=DDPStrategy() if devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    module = nn.Linear(8, 8)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    with fabric.monitor(total_steps=steps, first_step=2, every=2, tokens=10, peak_flops=1e12) as monitor:
        for step in range(2, steps):
            loss = model(torch.ones(2, 8)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
            if step % 4 == 0:
                fabric.print(f"said by fabric after {step + 1}")
                if fabric.is_global_zero:
                    print(f"said by print after {step + 1}")
            time.sleep(pause)
    fabric.print("the end")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))

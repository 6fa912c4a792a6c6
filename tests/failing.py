"""A script of which one rank fails: where, and how.

    python failing.py FOLDER WHERE HOW RANK DEVICES [METHOD]

Each rank writes its process into FOLDER as it starts, and the failing one when it fails, in seconds since 1970. It
fails in the first attempts, as many as the file FOLDER/failures says.
"""

import os
import signal
import sys
import time
from pathlib import Path

FOLDER, WHERE, HOW, RANK, DEVICES = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
METHOD = sys.argv[6] if len(sys.argv) > 6 else "auto"
TIMEOUT_S = 600.0 if WHERE == "blocked" else 5.0
ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def here(where: str) -> None:
    """Fail, if this is where and this the rank."""
    if where != WHERE or int(os.environ.get("RANK", "0")) != RANK:
        return
    if int(ATTEMPT) >= int((FOLDER / "failures").read_text()):
        return
    (FOLDER / "at").write_text(str(time.time()))
    if HOW == "raise":
        raise ZeroDivisionError(f"gave up in {where}")
    if HOW == "exit":
        os._exit(3)
    if HOW == "quit":
        sys.exit(4)
    if HOW == "nothing":
        return
    os.kill(os.getpid(), signal.SIGKILL if HOW == "kill" else signal.SIGSTOP)


def record() -> None:
    (FOLDER / f"rank-{os.environ.get('RANK', '0')}-{ATTEMPT}.pid").write_text(str(os.getpid()))


if __name__ == "__main__":
    record()
    here("import")

from datetime import timedelta  # noqa: E402  # failing comes before what takes long

import torch  # noqa: E402
from torch import nn  # noqa: E402

from fabriclite import DDPStrategy, Fabric  # noqa: E402


class Failing(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        here("backward")
        return gradient


def train(fabric: Fabric) -> str:
    record()
    here("init")
    with fabric.init_module():
        module = nn.Linear(4, 4)
    fabric.barrier()
    here("setup")
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    here("collective")
    fabric.all_reduce(torch.ones(1))
    for _ in range(2):
        fabric.backward(Failing.apply(model(torch.ones(2, 4))).sum())
        optimizer.step()
        optimizer.zero_grad()
    here("save")
    fabric.save(FOLDER / "checkpoint", {"model": model, "optimizer": optimizer})
    if WHERE == "preempted":
        raise SystemExit(75)
    if WHERE == "asleep":
        here("asleep")
        (FOLDER / f"asleep-{fabric.global_rank}").touch()
        time.sleep(600)  # in no collective that would tell
    if WHERE == "blocked" and fabric.global_rank == RANK:
        (FOLDER / f"asleep-{fabric.global_rank}").touch()
        time.sleep(600)
    if WHERE == "blocked":
        (FOLDER / f"asleep-{fabric.global_rank}").touch()
        fabric.barrier()
    here("exit")
    return "trained"


def main() -> None:
    strategy = DDPStrategy(timeout=timedelta(seconds=TIMEOUT_S), start_method=METHOD)  # type: ignore[arg-type]
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=DEVICES)
    here("launch")
    if METHOD == "auto":
        fabric.launch()
        train(fabric)
    else:
        fabric.launch(train)
    fabric.print("trained")


if __name__ == "__main__":
    main()

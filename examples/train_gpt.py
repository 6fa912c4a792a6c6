"""Train a small GPT on bytes of text. The strategy is a flag: the code below is the same for all of them.

    python examples/train_gpt.py                                              # one process
    python examples/train_gpt.py --strategy ddp --devices 2                   # replicas
    python examples/train_gpt.py --strategy fsdp --devices 2                  # sharded
    python examples/train_gpt.py --strategy tensor_parallel --devices 2       # split matrices
    python examples/train_gpt.py --strategy deepspeed --devices 2             # ZeRO stage 3
    python examples/train_gpt.py --precision bf16-mixed --data book.txt       # a text of your own
    python examples/train_gpt.py --save-every 50                              # every 50 steps, beside the training
    python examples/train_gpt.py --save-every 50 --resume auto                # and go on from the newest, if any
    python examples/train_gpt.py --resume runs/gpt/checkpoint --steps 400     # go on from the end
    torchrun --nproc-per-node 2 examples/train_gpt.py --strategy fsdp --devices 2

Then let it write: python examples/generate.py --checkpoint runs/gpt/checkpoint
How it went: fabriclite report runs/gpt    (pip install fabriclite[plots])
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fabriclite import Fabric
from fabriclite.loggers import CSVLogger
from gpt import GPT, GPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where and how it runs")
    where.add_argument("--accelerator", default="auto")
    where.add_argument("--strategy", default="auto")
    where.add_argument("--devices", default="auto")
    where.add_argument("--precision", default="32-true")
    files = parser.add_argument_group("files")
    files.add_argument("--data", type=Path, help="any text; default: the language reference that Python ships")
    files.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for checkpoint and log")
    files.add_argument(
        "--resume",
        help="a checkpoint to go on from, which also gives the model's shape; auto: the newest in --out, if any",
    )
    files.add_argument(
        "--save-every", type=int, metavar="N", help="save step-N and so on in --out; keep the newest two"
    )
    shape = parser.add_argument_group("model")
    shape.add_argument("--dim", type=int, default=192)
    shape.add_argument("--layers", type=int, default=4)
    shape.add_argument("--heads", type=int, default=4)
    shape.add_argument("--context", type=int, default=128, help="tokens")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=200, help="in all, with those before --resume")
    training.add_argument("--batch-size", type=int, default=8, help="sequences per process and forward")
    training.add_argument("--accumulate", type=int, default=1, help="forwards per step")
    training.add_argument("--learning-rate", type=float, default=3e-3, help="the highest; warmup, then half a cosine")
    training.add_argument("--warmup", type=int, default=20, help="steps")
    training.add_argument("--seed", type=int, default=1337)
    training.add_argument("--log-every", type=int, default=20, help="steps between lines of the log")
    return parser.parse_args()


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    if args.resume != "auto":
        return Path(args.resume) if args.resume else None
    newest = args.out / "latest"
    return newest if os.path.lexists(newest) else None  # a link that leads nowhere is for `load` to look into


def shape_of_model(args: argparse.Namespace, resume: Path | None) -> GPTConfig:
    if resume:
        return GPTConfig(**json.loads((resume.parent / "model.json").read_text()))
    return GPTConfig(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Cuts a text into stretches of ``context`` tokens, each with the same stretch one token later."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def load_text(path: Path | None, context: int) -> tuple[Windows, Windows]:
    """Training and validation windows: the first 90% of the bytes and the rest."""
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(topics.values())
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    split = len(tokens) * 9 // 10
    return Windows(tokens[:split], context), Windows(tokens[split:], context)


def forever(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup, then half a cosine down to a tenth."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches and ranks. Every rank must call this."""
    model.eval()
    losses = [loss_of(model, inputs, targets) for inputs, targets in loader]
    model.train()
    return fabric.all_reduce(torch.stack(losses).mean(), reduce_op="mean").item()


def main() -> None:
    args = parse_args()
    fabric = Fabric(
        accelerator=args.accelerator,
        strategy=args.strategy,
        devices=args.devices,
        precision=args.precision,
        loggers=CSVLogger(args.out, name="", version="metrics"),
    )
    fabric.launch()
    fabric.seed_everything(args.seed)
    stop = fabric.preemption()

    resume = checkpoint_to_resume(args)
    config = shape_of_model(args, resume)

    # A resumed model is loaded over anyway: nothing is drawn for it.
    with fabric.init_module(empty_init=True if resume else None):
        model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    # AdamW divides by sqrt(variance) + eps. The usual eps is zero in float16; the smallest normal number is not.
    eps = max(1e-8, torch.finfo(next(model.parameters()).dtype).tiny)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), eps=eps, weight_decay=0.1
    )
    # What each process will hold, to be seen beside what it then held. Nothing is allocated for it.
    plan = fabric.plan(model, batch=args.batch_size, sequence=config.context, optimizer=optimizer)
    model, optimizer = fabric.setup(model, optimizer)
    if fabric.is_global_zero:  # after `setup`, where all ranks meet: they may read the same file before
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "model.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    train_set, val_set = load_text(args.data, config.context)
    train_loader, val_loader = fabric.setup_dataloaders(
        DataLoader(train_set, batch_size=args.batch_size, shuffle=True, drop_last=True),
        DataLoader(val_set, batch_size=args.batch_size),
    )
    fabric.print(f"{parameters:,} parameters; {len(train_set):,} windows to train on, {len(val_set):,} to validate on")

    if min(len(train_loader), len(val_loader)) == 0:
        raise SystemExit("--data must be long enough for one batch on every process, but is not. Lower --batch-size.")

    # The loader too: a resumed run reads on with the very batch that would have been next.
    state = {"model": model, "optimizer": optimizer, "loader": train_loader, "step": 0}
    if resume:
        fabric.load(resume, state)
    first = state["step"]
    if first >= args.steps and args.resume != "auto":
        raise SystemExit(f"--steps must be more than the {first} of the checkpoint, but is {args.steps}.")

    batches = forever(train_loader)
    samples = args.accumulate * args.batch_size
    tokens = samples * config.context
    model.train()
    watch = fabric.monitor(
        args.out,
        total_steps=args.steps,
        first_step=first,
        every=args.log_every,
        samples=samples,
        tokens=tokens,
        plan=plan.to_json(),
        report=str(fabric.report()),
    )
    with watch as monitor:  # a bar or lines, throughput, memory, what goes wrong; written down for `fabriclite report`
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)

            total = torch.zeros((), device=fabric.device)
            for forward in range(1, args.accumulate + 1):
                inputs, targets = next(batches)
                with fabric.no_backward_sync(model, enabled=forward < args.accumulate):
                    loss = loss_of(model, inputs, targets) / args.accumulate
                    fabric.backward(loss, model=model)
                total += loss.detach()

            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=total, lr=learning_rate(step, args))
            state["step"] = step + 1
            stopping = stop.requested()  # on any rank; all get the same answer
            if stopping or (args.save_every and state["step"] % args.save_every == 0):
                fabric.save(args.out / f"step-{state['step']}", state, keep_last=2, asynchronous=True)
            if stopping:
                stop.exit()  # when that is saved, with status 75: --resume auto goes on

    train_loss = monitor.last.metrics["loss"] if monitor.last else math.nan
    val_loss = evaluate(fabric, model, val_loader)
    fabric.print(f"train loss {train_loss:.4f}  validation loss {val_loss:.4f}")

    fabric.save(args.out / "checkpoint", state)
    fabric.print(f"saved {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()

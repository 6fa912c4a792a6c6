"""The same training step of a model of 10.5 M parameters on two ranks: DDP and FSDP, by hand and through fabriclite."""

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
import torch.distributed as dist
from pairs import Row, compare, cpu, elapsed, measure
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from training import Trainer, check_same_work

RANKS: Final = 2
PATIENCE_S: Final = 1200.0
"""How long two ranks may take for everything, in seconds."""


class Block(nn.Module):
    """A residual block of 2.1 M parameters."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def plain_rank(strategy: str, clipped: bool) -> Trainer:
    module, data = _birth_on_rank()
    model: nn.Module = module
    if strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for block in module:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(module)

    def clip() -> None:
        norm = clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
        total = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(total):  # torch's own check fails on sharded norms
            raise RuntimeError("The norm is not finite.")

    optimizer = AdamW(model.parameters(), lr=1e-4)
    return Trainer(module=module, model=model, optimizer=optimizer, data=data, clip=clip if clipped else None)


def fabriclite_rank(strategy: str, clipped: bool) -> Trainer:
    from fabriclite import Fabric

    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    module, data = _birth_on_rank()
    model, optimizer = fabric.setup(module, AdamW(module.parameters(), lr=1e-4))

    def clip() -> None:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)

    clipper = clip if clipped else None
    return Trainer(module=module, model=model, optimizer=optimizer, backward=fabric.backward, clip=clipper, data=data)


def _birth_on_rank() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(*(Block() for _ in range(5)))
    torch.manual_seed(dist.get_rank())
    return module, torch.randn(64, 512)


def rank_rows(rounds: int) -> list[Row]:
    """CPU time and elapsed time per step of a model of 10.5 M parameters in two processes over gloo.

    Raises:
        RuntimeError: a rank failed, or did not answer in time.
    """
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = context.Pipe(duplex=False)
        work = (rounds, os.path.join(folder, "store"), writer)
        ranks = [context.Process(target=_rank, args=(rank, *work), daemon=True) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        writer.close()
        try:
            return _answer(reader, ranks)
        finally:
            for process in ranks:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join(10)


def _answer(reader: Connection, ranks: list[Any]) -> list[Row]:
    deadline = time.monotonic() + PATIENCE_S
    while not reader.poll(1.0):
        if time.monotonic() > deadline or any(process.exitcode for process in ranks):
            raise RuntimeError(f"Ranks ended with {[p.exitcode for p in ranks]} and gave no result.")
    try:
        return reader.recv()
    except EOFError:
        raise RuntimeError(f"Ranks ended with {[p.exitcode for p in ranks]} and gave no result.") from None


def _rank(rank: int, rounds: int, store: str, writer: Connection) -> None:
    described = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=RANKS, LOCAL_WORLD_SIZE=RANKS, GROUP_RANK=0)
    os.environ.update({name: str(value) for name, value in described.items()})
    torch.set_num_threads(1)
    clocks = (cpu, elapsed)
    with _group(rank, store):
        rows: list[Row] = []
        for strategy, clipped in (("ddp", False), ("fsdp", False), ("fsdp", True)):
            trainers = {
                "plain": plain_rank(strategy, clipped),
                "plain, again": plain_rank(strategy, clipped),
                "fabriclite": fabriclite_rank(strategy, clipped),
            }
            check_same_work(trainers)
            blocks = {name: lambda trainer=trainer: trainer.run(1) for name, trainer in trainers.items()}
            case = f"{RANKS} ranks, {strategy}{', clipped' if clipped else ''}"
            for clock, times in zip(clocks, measure(blocks, rounds, clocks, before=dist.barrier), strict=True):
                rows += compare(f"{case}, {clock.__name__}", _mean_of_ranks(times))
    if rank == 0:
        writer.send(rows)


def _mean_of_ranks(times: dict[str, list[float]]) -> dict[str, list[float]]:
    together = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(together)
    return dict(zip(times, (together / RANKS).tolist(), strict=True))


@contextmanager
def _group(rank: int, store: str) -> Iterator[None]:
    address = f"file://{store}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    try:
        yield
    finally:
        dist.destroy_process_group()

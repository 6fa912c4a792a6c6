"""One measurement of `init.py`: fresh processes, a tiny model first, then the one that counts."""

import gc
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
import torch.distributed as dist
from init_cases import Case, reference
from init_contenders import CONTENDERS, Build

PATIENCE_S: Final = 600.0
"""How long the processes of one measurement may take, in seconds."""
PRELOAD: Final = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "fabriclite.strategies.fsdp",
    "fabriclite.strategies.deepspeed",
    "lightning_fabric",
    "accelerate",
    "deepspeed",
    "init_ranks",
)
"""Imported once by the server from which every process is forked: importing is not what is measured."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One building of a model: the slowest and the largest rank.

    Attributes:
        seconds: until it was built.
        cpu: seconds of CPU time of one rank, all its threads: leaves out what other work on the machine takes.
        recorded_s: of those, until the values began to be made, where that is a part by itself.
        peak_mib: peak resident memory, less what was resident before.
        share_mib: what a rank keeps.
        equal: whether a tiny model, built the same way, equalled plain construction bit for bit on every rank.
    """

    seconds: float
    cpu: float
    recorded_s: float | None
    peak_mib: float
    share_mib: float
    equal: bool


def prepare_server() -> None:
    """Start the server from which processes are forked. Call once, before the first measurement."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()


def measured(name: str, case: Case) -> Sample:
    """Build once, in new processes.

    Raises:
        RuntimeError: a rank failed or did not answer in time.
    """
    samples = in_ranks(_measured_here, case.world, name, case)
    numbers = [asdict(sample) for sample in samples]
    worst = {key: max(n[key] for n in numbers) for key in ("seconds", "cpu", "peak_mib", "share_mib")}
    recorded = [n["recorded_s"] for n in numbers if n["recorded_s"] is not None]
    return Sample(**worst, recorded_s=max(recorded, default=None), equal=all(n["equal"] for n in numbers))


def in_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """``function(rank, store, *args)`` in ``world`` new processes; what each returned.

    Raises:
        RuntimeError: a rank failed or did not answer in time.
    """
    context = mp.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(target=_rank, args=(function, rank, store, pipes[rank][1], args), daemon=True)
            for rank in range(world)
        ]
        for process, (_, writer) in zip(ranks, pipes, strict=True):
            process.start()
            writer.close()
        try:
            return _answers([reader for reader, _ in pipes])
        finally:
            for process in ranks:
                process.join(0 if process.exitcode is None else 10)
                if process.is_alive():
                    process.kill()
                    process.join(10)


def _answers(readers: list[Connection]) -> list[Any]:
    deadline, found = time.monotonic() + PATIENCE_S, []
    for reader in readers:
        answer = None
        with suppress(EOFError):
            answer = reader.recv() if reader.poll(max(0.0, deadline - time.monotonic())) else None
        if answer is None:
            raise RuntimeError("A rank ended without a result; it printed why.")
        found.append(answer)
    return found


def _rank(function: Callable[..., Any], rank: int, store: str, writer: Connection, args: tuple[Any, ...]) -> None:
    writer.send(function(rank, store, *args))
    os._exit(0)  # freeing gigabytes in order takes time that nobody measures


def _measured_here(rank: int, store: str, name: str, case: Case) -> Sample:
    torch.set_num_threads(case.threads)
    if case.world > 1:
        keys = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=case.world, LOCAL_WORLD_SIZE=case.world, GROUP_RANK=0)
        os.environ.update({key: str(value) for key, value in keys.items()})
    if case.world > 1 or CONTENDERS[name].grouped:
        minutes = timedelta(seconds=PATIENCE_S)
        dist.init_process_group("gloo", f"file://{store}", minutes, world_size=case.world, rank=rank)
    build = CONTENDERS[name].prepare(case)
    return built_once(build, case)


def built_once(build: Build, case: Case) -> Sample:
    """Warm up with a tiny model and compare it; then build the one that counts."""
    equal = equals_eager(build, case)
    gc.collect()
    meet()
    forget_peak()
    before = peak_mib()
    torch.manual_seed(0)
    cpu, begin = time.process_time(), time.perf_counter()
    built = build(case.size)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    after = peak_mib()
    share = sum(_local_bytes(p) for p in built.module.parameters()) / 2**20
    meet()
    return Sample(seconds, cpu, built.recorded_s, after - before, share, equal)


def equals_eager(build: Build, case: Case) -> bool:
    """Whether a tiny model has the names and, gathered, bit for bit the values that plain construction gives it."""
    torch.manual_seed(0)
    built = build("tiny")
    expected = dict(reference("tiny", case).named_parameters(remove_duplicate=False))
    found = dict(built.module.named_parameters(remove_duplicate=False))
    same = [torch.equal(built.whole(param), built.part(expected[name].detach())) for name, param in found.items()]
    return found.keys() == expected.keys() and all(same)


def meet() -> None:
    if dist.is_initialized() and dist.get_backend() != "fake":
        dist.barrier()


def forget_peak() -> None:
    """Let :func:`peak_mib` count from now: the warm-up of some contenders takes more than others' models."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as switch:
        switch.write("5")


def peak_mib() -> float:
    """The largest resident memory that this process had, in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def _local_bytes(param: Any) -> int:
    if hasattr(param, "ds_tensor"):
        return param.ds_tensor.nbytes
    return (param.to_local() if hasattr(param, "to_local") else param).nbytes

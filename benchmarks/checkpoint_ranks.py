"""One measurement of `checkpoint.py`: fresh processes, a tiny model first, then the one that counts."""

import gc
import multiprocessing as mp
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import torch
import torch.distributed as dist
from checkpoint_model import TINY, Shape
from checkpoint_probe import Gauge
from init_ranks import PATIENCE_S, in_ranks, meet

PRELOAD: Final = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "fabriclite.strategies.fsdp",
    "fabriclite.checkpoint.session",
    "fabriclite.checkpoint.loading",
    "fabriclite.checkpoint.raw",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "lightning_fabric",
    "accelerate",
    "checkpoint_load",
    "checkpoint_save",
)
"""Imported once by the server from which every process is forked: importing is not what is measured."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is asked for.

    Attributes:
        method: a key of the contenders.
        shape: of the model.
        root: holds ``tiny`` and ``real``, which hold the files.
        world: processes.
        device: ``cpu`` or ``cuda``.
        threads: of each process.
    """

    method: str
    shape: Shape
    root: Path
    world: int
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class Method:
    """One way of doing it, ready to go.

    Attributes:
        build: from a shape, what ``act`` works on.
        act: what is measured: on what was built, with the folder that holds the files. Gives the tensors that were
            loaded, or nothing.
        after: what is timed by itself behind it, such as waiting for what goes on beside the training.
        extra: figures of its own, filled while it acts.
    """

    build: Callable[[Shape], Any]
    act: Callable[[Any, Path], Any]
    after: Callable[[], None] = lambda: None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One save or load: the slowest and the largest rank; of ``values`` the sum.

    Attributes:
        seconds: of the act.
        cpu: seconds of CPU time of a rank until the model was loaded: leaves out the disk and others' work.
        building: seconds until the model was built, before the act.
        touching: seconds behind the act until every loaded value was read.
        after: seconds behind the act until all was on the disk, where that is a part by itself.
        peak: bytes of anonymous memory, at most, more than before.
        called: bytes that read calls gave.
        fetched: bytes that came from the disk.
        values: sum of all values that were loaded.
        cached: the part of the files that was in the page cache before.
        verifying: seconds of the act that went to checksums.
    """

    seconds: float
    cpu: float
    building: float
    touching: float
    after: float
    peak: int
    called: int
    fetched: int
    values: float
    cached: float
    verifying: float

    @property
    def ready(self) -> float:
        """Seconds from before the model was built to having it loaded."""
        return self.building + self.seconds

    @property
    def used(self) -> float:
        """Seconds from before the model was built to having every value read."""
        return self.ready + self.touching

    @property
    def read(self) -> float:
        """Seconds of loading, until every value was read."""
        return self.seconds + self.touching


def prepare_server() -> None:
    """Start the server from which processes are forked. Call once, before the first measurement."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    mp.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a new process: what it takes is given back at once."""
    return in_ranks(_alone, 1, function, args)[0]


def _alone(rank: int, store: str, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    _quiet()
    torch.set_num_threads(os.cpu_count() or 1)
    return function(*args) or True


def measured(job: Job, section: str, cached: float = 1.0) -> Sample:
    """Do it once, in new processes.

    Raises:
        RuntimeError: a rank failed or did not answer in time.
    """
    samples = in_ranks(_measured_here, job.world, job, section)
    found = {f.name: max(getattr(one, f.name) for one in samples) for f in fields(Sample)}
    return Sample(**{**found, "values": sum(one.values for one in samples), "cached": cached})


def _measured_here(rank: int, store: str, job: Job, section: str) -> Sample:
    from checkpoint_load import CONTENDERS as LOADS
    from checkpoint_save import CONTENDERS as SAVES

    gc.freeze()  # to look at what was inherited is to copy it: slower than in a process that imported it
    _quiet()
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    if job.world > 1:
        keys = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=job.world, LOCAL_WORLD_SIZE=job.world, GROUP_RANK=0)
        os.environ.update({key: str(value) for key, value in keys.items()})
        backend = "cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo"
        minutes = timedelta(seconds=PATIENCE_S)
        dist.init_process_group(backend, f"file://{store}", minutes, world_size=job.world, rank=rank)
    contender = (LOADS if section == "load" else SAVES)[job.method]
    method = contender.prepare(job)
    tiny = method.build(TINY)
    contender.check(method.act(tiny, job.root / "tiny"), job)
    method.after()
    del tiny
    return _acted(method, job, contender.existing)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _acted(method: Method, job: Job, existing: bool) -> Sample:
    """Build, act and look at every value. What is built of itself (``existing``) is not counted as memory."""
    from checkpoint_model import total

    built = method.build(job.shape) if existing else None
    method.extra.clear()
    gc.collect()
    settle(job.device)
    with Gauge() as gauge:
        begin, cpu = perf_counter(), process_time()
        if not existing:
            built = method.build(job.shape)
        acting = perf_counter()
        loaded = method.act(built, job.root / "real")
        settle(job.device, together=False)
        cpu = process_time() - cpu
        touching = perf_counter()
        torch.set_num_threads(1)  # threads that wait for each other would count what else the machine does twice
        values = total(loaded or [])
        ending = perf_counter()
        method.after()
        end = perf_counter()
    building = 0.0 if existing else acting - begin
    times = (touching - acting, cpu, building, ending - touching, end - ending)
    return Sample(*times, gauge.peak, gauge.called, gauge.fetched, values, 1.0, method.extra.get("verifying", 0.0))


def settle(device: str, together: bool = True) -> None:
    """Wait for the device, and for the other ranks."""
    if device == "cuda":
        torch.cuda.synchronize()
    if together:
        meet()

"""How fast two processes of this machine reduce a tensor, by each backend that can."""

import time
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from fabriclite.doctor.facts import Json, Section, look
from fabriclite.launch.environment import from_launchers
from fabriclite.launch.environments.choose import find
from fabriclite.launch.process_group import join
from fabriclite.launch.spawn import run_function
from fabriclite.world import World

_SIZE: Final = 2
_ELEMENTS: Final = 4 * 2**20
_TRIES: Final = 5
_SECONDS: Final = 1.0
"""Of each of the two measurements."""
_LIMIT: Final = timedelta(seconds=60)


def bandwidth() -> Section:
    """Takes about two seconds a backend, and as long as two processes need to import torch."""
    finders = {"gloo": lambda: _measured("gloo", "cpu")}
    if torch.cuda.device_count() >= _SIZE and dist.is_nccl_available():
        finders["nccl"] = lambda: _measured("nccl", "cuda")
    return look("all_reduce", finders)


def _measured(backend: str, device: str) -> Json:
    # Spawned: where CUDA was asked for its devices, a forked process could not use them.
    found: Json = run_function(measure, (backend, device), {}, _SIZE, "spawn", _LIMIT)
    return found


def measure(backend: str, device: str) -> dict[str, Json]:
    """In one of two processes: the time of a reduction of 16 MiB, and of one of 4 bytes. Both must call this."""
    found = find(None, from_launchers())
    where = torch.device(device, found.local_rank) if device == "cuda" else torch.device(device)
    world = World(rank=found.rank, size=found.size, local_rank=found.local_rank, local_size=_SIZE, device=where)
    join(world, found, backend, _LIMIT)
    large = torch.ones(_ELEMENTS, device=where)
    took = _time_of_one(large)
    return {
        "processes": found.size,
        "tensor_bytes": large.nbytes,
        "bytes_per_second": int(large.nbytes / took),
        "large_s": round(took, 7),
        "small_s": round(_time_of_one(torch.ones(1, device=where)), 7),
    }


def _time_of_one(tensor: torch.Tensor) -> float:
    """Seconds of one reduction, of as many as go into the time; both processes make the same number."""
    _reduce(tensor, _TRIES)
    first = torch.tensor([_reduce(tensor, _TRIES)], dtype=torch.float64, device=tensor.device)
    dist.broadcast(first, src=0)
    count = max(_TRIES, int(_SECONDS / max(first.item(), 1e-7)))
    return _reduce(tensor, count)


def _reduce(tensor: torch.Tensor, count: int) -> float:
    """Seconds of each of ``count`` reductions, on average. Of the largest value: sums would overflow in time."""
    _settle(tensor)
    before = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    _settle(tensor)
    return (time.perf_counter() - before) / count


def _settle(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)

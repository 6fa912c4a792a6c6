"""Models of 7 B and 70 B parameters on an accelerator: whole, and as the part that the first of 64 processes keeps."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final

import torch
from init_cases import DTYPES, GPT, Case, default_dtype
from init_contenders import SHARES, fake_world, shard
from init_ranks import forget_peak, in_ranks, peak_mib, prepare_server
from torch import nn

SIZES: Final = ("7B", "70B")
GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Taken:
    """One building of a model.

    Attributes:
        seconds: until the device had done it.
        peak_gib: most memory that was allocated at once.
        kept_gib: what the parameters take in the end.
    """

    seconds: float
    peak_gib: float
    kept_gib: float


Build = Callable[[str, str, str], nn.Module]
"""Of size, dtype and device."""


def eager(size: str, dtype: str, device: str) -> GPT:
    with default_dtype(dtype), torch.device(device):
        return GPT(size, "plain")


def to_empty(size: str, dtype: str, device: str) -> nn.Module:
    """From the meta device, by ``reset_parameters``."""
    model = _reset(eager(size, dtype, "meta"), device)
    model.tie()  # `to_empty` undid it
    return model


def to_empty_share(size: str, dtype: str, device: str) -> nn.Module:
    """The same after ``fully_shard``, as torch's documentation has it."""
    from torch.distributed.device_mesh import init_device_mesh

    join_fake_world()
    model = eager(size, dtype, "meta")
    shard(model, init_device_mesh(device, (SHARES,)))
    return _reset(model, device)


def _reset(model: GPT, device: str) -> GPT:
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def fabriclite(size: str, dtype: str, device: str) -> nn.Module:
    from fabriclite import Fabric

    fabric = Fabric(accelerator=device, strategy="single_device", devices=1, precision=DTYPES[dtype][1])
    with fabric.init_module(empty_init=True):
        model = GPT(size, "plain")
    return fabric.materialize(model)


def fabriclite_share(size: str, dtype: str, device: str) -> nn.Module:
    from fabriclite import Fabric, FSDPStrategy

    join_fake_world()
    word = DTYPES[dtype][1]
    fabric = Fabric(accelerator=device, strategy=FSDPStrategy(), devices=1, num_nodes=SHARES, precision=word)
    with fabric.init_module():
        model = GPT(size, "plain")
    fabric.setup(model)
    return model


def join_fake_world() -> None:
    if not torch.distributed.is_initialized():
        fake_world(SHARES)


WHOLE: Final[dict[str, Build]] = {"eager": eager, "meta, to_empty, reset": to_empty, "fabriclite": fabriclite}
SHARE: Final[dict[str, Build]] = {
    f"fully_shard, to_empty, reset, 1 of {SHARES}": to_empty_share,
    f"fabriclite, 1 of {SHARES}": fabriclite_share,
}


def taken(rank: int, store: str, build: Build, size: str, dtype: str, device: str) -> Taken:
    """Build a tiny model, then the one that counts."""
    torch.set_num_threads(1)
    build("tiny", dtype, device)
    _wait(device)
    torch.manual_seed(0)
    on_host = device == "cpu"
    forget_peak()
    before = peak_mib() * 2**20
    if not on_host:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    model = build(size, dtype, device)
    _wait(device)
    seconds = time.perf_counter() - begin
    peak = (peak_mib() * 2**20 if on_host else torch.cuda.max_memory_allocated()) - before
    kept = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
    return Taken(seconds, peak / GIB, kept / GIB)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def bandwidth(rank: int, store: str, device: str) -> float:
    """GiB that are filled in a second, the best of ten times."""
    memory = torch.empty(GIB // 4, device=device)
    times = []
    for value in range(10):
        _wait(device)
        begin = time.perf_counter()
        memory.fill_(value)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return 1 / min(times)


def figures(
    sizes: Sequence[str] | None, dtypes: Sequence[str] | None, rounds: int, device: str = "cuda"
) -> list[dict[str, Any]]:
    """Measure everything in new processes, print the table, and give all samples."""
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, and torch finds none. Nothing was measured.")
        return []
    prepare_server()
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 8 * GIB
    speed = in_ranks(bandwidth, 1, device)[0]
    print(f"The device writes {speed:.0f} GiB/s.\n")
    print("| case | contender | time | writing its part alone | peak memory | part of a rank |")
    print("|---|---|---:|---:|---:|---:|")
    found: list[dict[str, Any]] = []
    for size, dtype in product(sizes or SIZES, dtypes or DTYPES):
        fits = 1.2 * Case(size, dtype, "plain", 1).nbytes < free
        builds = (WHOLE if fits else {}) | SHARE  # what does not fit is measured as a part alone
        samples: dict[str, list[Taken]] = {name: [] for name in builds}
        for _ in range(rounds):
            for name, build in builds.items():
                samples[name] += in_ranks(taken, 1, build, size, dtype, device)
        for name, rows in samples.items():
            seconds, peak = (statistics.median(getattr(row, key) for row in rows) for key in ("seconds", "peak_gib"))
            kept = rows[0].kept_gib
            case = f"{size}, {dtype}"
            print(f"| {case} | {name} | {seconds:.2f} s | {kept / speed:.3f} s | {peak:.2f} GiB | {kept:.2f} GiB |")
            found += [{"size": size, "dtype": dtype, "contender": name, **asdict(row)} for row in rows]
    return found

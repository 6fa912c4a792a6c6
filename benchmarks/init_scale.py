"""What the first of 1024 processes takes for its part of a model of 70 B parameters: the others need not exist."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from init_cases import DTYPES
from init_contenders import fake_world
from init_ranks import forget_peak, in_ranks, peak_mib, prepare_server
from torch import nn

RANKS: Final = 1024
SHAPES: Final = {"70B": (8192, 28672, 80, 64), "tiny": (512, 1024, 2, 8)}
"""Width, inner width, layers and heads of a Llama 2."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What the first rank took.

    Attributes:
        billions: parameters of the whole model.
        record_s, record_mib: time and peak memory of building it without memory.
        setup_s, setup_cpu_s: of sharding it, making this rank's values and looking at them.
        peak_mib: over what the process took before; of everything.
        share_mib, largest_mib: this rank's part, and the largest parameter.
    """

    billions: float
    record_s: float
    record_mib: float
    setup_s: float
    setup_cpu_s: float
    peak_mib: float
    share_mib: float
    largest_mib: float

    @property
    def bound_mib(self) -> float:
        """What it may take."""
        return 1.2 * self.share_mib + self.largest_mib


def llama(shape: str) -> nn.Module:
    """Built by transformers, with its own initialisation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def first_rank(rank: int, store: str, dtype: str) -> Rank:
    """Be the first of 1024 ranks. The others do not exist: no value is sent, so nobody misses them."""
    from fabriclite import Fabric, FSDPStrategy

    torch.set_num_threads(1)
    fake_world(RANKS)
    word = DTYPES[dtype][1]
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), devices=1, num_nodes=RANKS, precision=word)
    for shape in "tiny", "70B":  # the first does what is done once a process: imports, and a look at torch's kernels
        torch.manual_seed(0)
        forget_peak()
        before, begin = peak_mib(), time.perf_counter()
        with fabric.init_module():
            model = llama(shape)
        record_s, record_mib = time.perf_counter() - begin, peak_mib() - before
        cpu, begin = time.process_time(), time.perf_counter()
        fabric.setup(model)
        setup_s, setup_cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        peak = peak_mib() - before
    params = list(model.parameters())
    return Rank(
        billions=sum(p.numel() for p in params) / 1e9,
        record_s=record_s,
        record_mib=record_mib,
        setup_s=setup_s,
        setup_cpu_s=setup_cpu_s,
        peak_mib=peak,
        share_mib=sum(p.to_local().nbytes for p in params) / 2**20,
        largest_mib=max(p.numel() * p.element_size() for p in params) / 2**20,
    )


def figures(dtypes: Sequence[str] | None, rounds: int) -> list[dict[str, Any]]:
    """Measure every dtype in new processes, print the table, and give all samples."""
    if not find_spec("transformers"):
        print("transformers is not installed: it holds the model. Nothing was measured.")
        return []
    prepare_server()
    found: dict[str, list[Rank]] = {dtype: [] for dtype in dtypes or DTYPES}
    for _ in range(rounds):
        for dtype, ranks in found.items():
            ranks += in_ranks(first_rank, 1, dtype)
    print(
        f"\nLlama of {next(iter(found.values()))[0].billions:.1f} B, rank 0 of {RANKS}; load {os.getloadavg()[0]:.1f}"
    )
    print("| dtype | record | memory of that | setup | cpu | peak over base | 1.2 x part + largest | reached |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for dtype, ranks in found.items():
        record_s, record_mib, setup_s, cpu_s, peak, bound = (
            statistics.median(getattr(rank, key) for rank in ranks)
            for key in ("record_s", "record_mib", "setup_s", "setup_cpu_s", "peak_mib", "bound_mib")
        )
        print(
            f"| {dtype} | {record_s:.2f} s | {record_mib:.0f} MiB | {setup_s:.2f} s | {cpu_s:.2f} s | {peak:.0f} MiB"
            f" | {bound:.0f} MiB | {'yes' if peak <= bound else 'no'} |"
        )
    return [{"dtype": dtype, "ranks": RANKS, **asdict(rank)} for dtype, ranks in found.items() for rank in ranks]

"""One rank of a large world, alone: what it takes, and that it holds its cut of the eager model, bit for bit."""

import multiprocessing as mp
import os
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fabriclite import Fabric, FSDPStrategy

RANKS, SEED = 64, 7
SLACK_MIB = 24.0
"""Beside 1.2 times the rank's part and the largest parameter: objects, first calls of kernels, the allocator."""


def llama(width: int = 512, layers: int = 10) -> nn.Module:
    """45 M parameters, with the initialisation of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=16000,
    )
    return LlamaForCausalLM(config)


def peak_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def warm_up(fabric: Fabric) -> None:
    """Imports, and what is done once a process; too small to leave memory behind that the rest could use."""
    with fabric.init_module():
        module = llama(width=64, layers=1)
    fabric.setup(module)


def first_rank(precision: str, writer: Connection) -> None:
    """Set the model up as the first of 64 ranks, of which no other exists, then compare with plain construction."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=RANKS, strategy=FSDPStrategy(), precision=precision)
    warm_up(fabric)
    before = rest_peak()
    torch.manual_seed(SEED)
    with fabric.init_module():
        module = llama()
    recorded = peak_mib() - before
    fabric.setup(module)
    peak, state = peak_mib() - before, torch.get_rng_state()
    torch.manual_seed(SEED)
    with fabric.init_module(empty_init=False):
        eager = llama()
    found: dict[str, Any] = {
        "recorded": recorded,
        "peak": peak,
        "random state": torch.equal(state, torch.get_rng_state()),
        **compared(module, eager),
    }
    writer.send(found)


def rest_peak() -> float:
    """Let the peak count from now; where it is."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as switch:
        switch.write("5")
    return peak_mib()


def compared(module: nn.Module, eager: nn.Module) -> dict[str, Any]:
    """Sizes, and the names of what is not the first of 64 pieces along the rows of what plain construction made."""
    params, plain = dict(module.named_parameters()), dict(eager.named_parameters())
    assert params.keys() == plain.keys()
    wrong, part = [], 0
    for name, param in params.items():
        assert isinstance(param, DTensor)
        local = param.to_local()
        part += local.nbytes
        # cut by torch, not by fabriclite; compared as bits
        if not torch.equal(local.view(torch.int16), plain[name].detach().chunk(RANKS)[0].view(torch.int16)):
            wrong.append(name)
    sizes = [p.nbytes / 2**20 for p in plain.values()]
    return {"wrong": wrong, "part": part / 2**20, "largest": max(sizes), "whole": sum(sizes)}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads peak memory from /proc")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_one_of_64_ranks_takes_its_part_and_holds_its_cut(precision: str) -> None:
    context = mp.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    rank = context.Process(target=first_rank, args=(precision, writer), daemon=True)
    rank.start()
    writer.close()
    try:
        assert reader.poll(120), "no answer"
        found = reader.recv()
    finally:
        rank.kill()
        rank.join(10)
    assert found["wrong"] == []
    assert found["random state"]
    assert found["recorded"] <= SLACK_MIB, found
    assert found["peak"] <= 1.2 * found["part"] + found["largest"] + SLACK_MIB < found["whole"], found

"""Births on a CUDA device: replay equals plain construction there bit for bit, whole and as one part of many."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fabriclite import Fabric, FSDPStrategy, shards
from patterns import PATTERNS, seed
from snapshots import differences, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEED, RANKS = 11, 64


@pytest.mark.parametrize("name", PATTERNS)
def test_materialize_equals_construction_on_the_device(name: str) -> None:
    fabric = Fabric(accelerator="cuda", strategy="single_device", devices=1)
    seed(SEED)
    try:
        with fabric.device:
            eager = PATTERNS[name]()
    except Exception as error:
        pytest.skip(f"plain construction fails on CUDA: {error}")
    state, expected = torch.cuda.get_rng_state(), snapshot(eager)
    seed(SEED)
    with fabric.init_module(empty_init=True):
        module = PATTERNS[name]()
    fabric.materialize(module)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert differences(expected, snapshot(module), layout=True) == []


@pytest.mark.parametrize("dtype", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", ["example_gpt", "hf_llama"])
def test_the_first_of_64_ranks_holds_its_cut(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for key, value in {"RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(key, str(value))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    whole = Fabric(accelerator="cuda", strategy="single_device", devices=1, precision=dtype)
    seed(SEED)
    with whole.init_module(empty_init=False):
        eager = dict(PATTERNS[name]().named_parameters())
    fabric = Fabric(accelerator="cuda", strategy=FSDPStrategy(), devices=1, num_nodes=RANKS, precision=dtype)
    seed(SEED)
    with fabric.init_module():
        module = PATTERNS[name]()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module = fabric.setup(module)
    peak = torch.cuda.max_memory_allocated() - before
    largest = max(p.numel() * p.element_size() for p in eager.values())
    total = sum(p.numel() * p.element_size() for p in eager.values())
    assert peak <= total / RANKS * 1.2 + largest + 2**22
    for key, param in module.named_parameters():
        assert isinstance(param, DTensor)
        assert torch.equal(param.to_local(), shards.cut(eager[key], param))

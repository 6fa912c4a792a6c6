"""Seeds that ranks share or do not, and runs that give the same bits every time, on real processes."""

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabriclite import ConfigError, DDPStrategy, Fabric, FSDPStrategy, seed_everything
from fabriclite.collectives import gather_objects
from worlds import run

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def drawn() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]


# -- seeds -------------------------------------------------------------------------------------------------------------


def streams(fabric: Fabric) -> list[Any]:
    """Per rank: shared numbers, numbers of its own, and those again."""
    fabric.seed_everything(7)
    shared = drawn()
    assert fabric.seed_everything(7, rank=fabric.global_rank) == 7
    own = drawn()
    fabric.seed_everything(7, rank=fabric.global_rank)
    return gather_objects(fabric._ready_world, (shared, own, drawn()))


def test_ranks_share_their_numbers_or_have_their_own() -> None:
    facts = run(streams, "ddp", 3)
    shared, own, again = zip(*facts, strict=True)
    assert shared[0] == shared[1] == shared[2]
    assert own == again
    numbers = [number for rank in own for number in rank] + shared[0]
    assert len(set(numbers)) == len(numbers)


def masks(fabric: Fabric) -> list[Any]:
    """The same model on all ranks, whose dropout then differs."""
    fabric.seed_everything(7)
    with fabric.init_module():
        model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    model = fabric.setup(model)
    fabric.seed_everything(7, rank=fabric.global_rank)
    out = model(torch.ones(1, 4)).detach()
    weights = [p.detach().sum().item() for p in model.parameters()]
    return gather_objects(fabric._ready_world, (weights, (out == 0).flatten().tolist()))


def test_the_model_is_the_same_and_its_dropout_is_not() -> None:
    (weights, mask), (others, other) = run(masks, "ddp", 2)
    assert weights == others
    assert mask != other


@pytest.mark.parametrize("rank", [-1, True, "0"])
def test_a_rank_that_is_none(rank: Any) -> None:
    with pytest.raises(ConfigError, match=r"`rank` must be None or a rank, as fabric\.global_rank is, but is "):
        seed_everything(1, rank=rank)


# -- determinism -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CUBLAS, "to be put back")
    monkeypatch.delenv(CUBLAS)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def unsure() -> torch.Tensor:
    """An operation without a deterministic algorithm, also on a CPU."""
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def says(fabric: Fabric) -> list[Any]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            unsure()
        except RuntimeError as error:
            told.append(error)  # type: ignore[arg-type]  # both are shown as text
    return gather_objects(fabric._ready_world, (os.environ.get(CUBLAS), [str(t) for t in told]))


@pytest.mark.parametrize("choice", [False, True, "warn"])
@pytest.mark.usefixtures("_as_before")
def test_ranks_are_told(choice: Any) -> None:
    strategy = DDPStrategy(start_method="forkserver")
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, deterministic=choice)
    for cublas, told in fabric.launch(says):  # type: ignore[union-attr]
        assert cublas == (":4096:8" if choice else None)
        assert len(told) == (1 if choice else 0)
        assert all("does not have a deterministic implementation" in text for text in told)
        assert all(text.startswith("{message") == (choice == "warn") for text in told)  # shown as a warning's record
    assert torch.are_deterministic_algorithms_enabled() is bool(choice)


@pytest.mark.usefixtures("_as_before")
def test_what_the_user_chose_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    Fabric(accelerator="cpu", devices=1, deterministic=True)
    assert os.environ[CUBLAS] == ":16:8"


@pytest.mark.parametrize("choice", [None, 1, "error"])
def test_a_choice_that_is_none(choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"`deterministic` must be True, False or 'warn', but is "):
        Fabric(accelerator="cpu", devices=1, deterministic=choice)


def trained(fabric: Fabric) -> list[float]:
    fabric.seed_everything(3)
    with fabric.init_module():
        model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20), nn.Dropout(0.1))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    losses = []
    for _ in range(4):
        tokens = torch.randint(20, (8,))
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


@pytest.mark.usefixtures("_as_before")
def test_training_is_the_same_with_it() -> None:
    """Memory that torch then fills is no memory that a recorded model lacks."""
    without = run(trained, "fsdp", 2)
    strategy = FSDPStrategy(start_method="forkserver")
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, deterministic=True)
    assert fabric.launch(trained) == without
    assert fabric.launch(trained) == without

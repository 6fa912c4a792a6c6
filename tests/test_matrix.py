"""The spine: every strategy x precision x world size x form agrees with hand-written PyTorch.

One world of processes runs all cases of one (strategy, world size); each case is a test of its own.

Tolerances, relative, on each of the five losses and gradient norms:

* float32: 1e-5. Only the order of sums differs.
* bfloat16: ``(steps + 1) * 2**-8``. One rounding of a bfloat16 number is at most ``2**-9`` of it; strategies round at
  different places (parameters gathered in bfloat16 or cast per product, master weights or none), in the forward and in
  each update. Two roundings per step and two in the forward bound what moves the loss at first order.
"""

import traceback
from functools import cache
from typing import Any

import pytest
import torch

import reference
from fabriclite import Fabric, LaunchError
from fabriclite.shards import full
from models import MODELS, loss_of
from reference import SAMPLES, STEPS, Case, Run
from worlds import STRATEGIES, run

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
WORLDS = [
    ("single_device", 1),
    ("ddp", 1),
    ("ddp", 2),
    ("ddp", 4),
    ("ddp_views", 2),
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 4),
    ("fsdp_offload", 2),
    ("hsdp", 4),
    ("tp", 1),
    ("tp", 2),
    ("tp", 4),
    ("tp_only", 4),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 1),
    ("zero3", 2),
    ("zero3", 4),
]
SOME = {"ddp_views", "fsdp_offload", "tp_only", "zero1", "zero2"}
"""Variants of a strategy: the whole matrix would only repeat the main one's."""


def cases(strategy: str) -> list[Case]:
    if strategy in SOME:
        chosen = [Case("gpt", "32-true", form) for form in ("joint", "accumulate", "clip")]
        chosen += [Case("conv", "32-true"), Case("tied", "bf16-mixed")]
    else:
        chosen = [Case(model, precision) for model in MODELS for precision in PRECISIONS]
        chosen += [Case("gpt", p, form) for p in ("32-true", "bf16-mixed") for form in ("late", "accumulate", "clip")]
        chosen += [
            Case(model, "32-true", form) for model in ("tied", "bare") for form in ("late", "accumulate", "clip")
        ]
    joint_only = strategy.startswith("zero")
    return [case for case in chosen if not (joint_only and case.form == "late")]


def train(fabric: Fabric, case: Case) -> tuple[list[str], Run]:
    """Names of parameters and buffers that differ from plain construction, and the run."""
    Fabric.seed_everything(1)
    with fabric.init_module():
        module = MODELS[case.model]()
    if case.form == "late":
        model = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(reference.optimizer_for(model))
    else:
        model, optimizer = fabric.setup(module, reference.optimizer_for(module))
    plain = reference.build(case, fabric.device.type).state_dict()
    state = model.state_dict()
    different = [k for k, v in plain.items() if not torch.equal(full(state[k]), v)]
    assert list(state) == list(plain)

    replicas, index = fabric._running.sampler_shard()
    losses, norms = [], []
    for step in range(STEPS):
        micro = reference.micro_batches(case, step)
        total = torch.zeros(())
        for i, (x, y) in enumerate(micro):
            with fabric.no_backward_sync(model, enabled=i < len(micro) - 1):
                mine = fabric.to_device((x.chunk(replicas)[index], y.chunk(replicas)[index]))
                loss = loss_of(model(mine[0]), mine[1]) / len(micro)
                fabric.backward(loss, model=model)
            total += loss.detach().cpu()
        if case.form == "clip":
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.05).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(total).item())
    return different, Run(losses, norms)


def train_all(fabric: Fabric, strategy: str) -> dict[Case, Any]:
    results: dict[Case, Any] = {}
    for case in cases(strategy):
        mine = Fabric(
            accelerator="cpu", strategy=STRATEGIES[strategy], devices=fabric.world_size, precision=case.precision
        )
        try:
            results[case] = train(mine, case)
        except Exception:  # shown by the case's own test; the other cases go on
            results[case] = traceback.format_exc()
    return results


@cache
def results_of(strategy: str, world: int) -> dict[Case, Any]:
    try:
        result: dict[Case, Any] = run(train_all, strategy, world, strategy)
    except LaunchError as error:  # kept, or every case would start the failing world again
        result = dict.fromkeys(cases(strategy), str(error))
    return result


@cache
def expected(case: Case, replicas: int) -> Run:
    return reference.train(case, replicas)


def replicas_of(strategy: str, world: int) -> int:
    if strategy.startswith("tp"):
        return STRATEGIES[strategy].sizes(world)[0]
    return world


@pytest.mark.parametrize(
    ("strategy", "world", "case"),
    [pytest.param(s, w, c, id=f"{s}-{w}-{c.model}-{c.precision}-{c.form}") for s, w in WORLDS for c in cases(s)],
)
def test_agrees_with_hand_written_pytorch(strategy: str, world: int, case: Case) -> None:
    result = results_of(strategy, world)[case]
    assert not isinstance(result, str), result
    different, actual = result
    assert different == [], "weights after setup differ from plain construction"
    wanted = expected(case, replicas_of(strategy, world))
    rel = 1e-5 if case.precision == "32-true" else (STEPS + 1) * 2**-8
    assert actual.losses == pytest.approx(wanted.losses, rel=rel)
    assert actual.norms == pytest.approx(wanted.norms, rel=rel)
    assert wanted.losses[0] != wanted.losses[-1]
    assert SAMPLES % world == 0

"""Working together, and the small help around it: reductions, gathers, callbacks, loggers, seeds and devices."""

import contextlib
import io
import random
from collections import namedtuple
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fabriclite import ConfigError, Fabric, LaunchError
from fabriclite.collectives import gather_objects
from fabriclite.devices import Machine, pick_accelerator, pick_devices
from worlds import run

Pair = namedtuple("Pair", ["x", "y"])
CPU = torch.device("cpu")
OPS = ("mean", "sum", "max", "min", "product")
WORLDS = (1, 2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BIG = 2**40 + 1
"""Above 2**31, and no float32."""


def one(**arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **arguments)


# -- reductions --------------------------------------------------------------------------------------------------------


def reduce_all(fabric: Fabric) -> dict[Any, Any]:
    """What comes out, by dtype (or name) and operation; the same on all ranks."""
    rank = fabric.global_rank
    found: dict[Any, Any] = {}
    for dtype in (*FLOATS, *INTEGERS, torch.bool):
        value = torch.tensor([[rank + 2, 1], [3, rank]], dtype=dtype).T  # not contiguous
        before = value.clone()
        for op in OPS:
            found[dtype, op] = fabric.all_reduce(value, reduce_op=op)
        assert torch.equal(value, before), "the input was changed"
    numbers = {"int": BIG + rank, "float": 0.1 * (rank + 1), "bool": rank == 0, "negative": -rank - 1}
    for name, number in numbers.items():
        for op in OPS:
            found[name, op] = fabric.all_reduce(number, reduce_op=op)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        found["object", str(op)] = fabric.all_reduce(2.0 + rank, reduce_op=op)
    found["default"] = fabric.all_reduce(torch.tensor(1.0 + rank))
    found["upper case"] = fabric.all_reduce(1 + rank, reduce_op="SUM")
    tree = {"a": [torch.ones(2) * rank, 2], "b": (1.5, Pair(torch.tensor(4), "text")), "c": None}
    found["tree"] = fabric.all_reduce(tree, reduce_op="sum")
    found["full bytes"] = fabric.all_reduce(torch.tensor([200, 255], dtype=torch.uint8))
    found["near the top"] = fabric.all_reduce(torch.tensor([60000.0], dtype=torch.float16))
    leaf = torch.ones(2, requires_grad=True)
    found["graph"] = fabric.all_reduce(leaf * 2).requires_grad
    everywhere = gather_objects(fabric._ready_world, repr(found))
    assert len(set(everywhere)) == 1, everywhere
    return found


@cache
def reductions(world: int) -> dict[Any, Any]:
    result: dict[Any, Any] = run(reduce_all, "ddp", world)
    return result


def reduced(values: list[float], op: str) -> float:
    product = 1.0
    for value in values:
        product *= value
    return {"mean": sum(values) / len(values), "sum": sum(values), "max": max(values), "min": min(values)}.get(
        op, product
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", WORLDS)
def test_reduced_tensors(world: int, op: str) -> None:
    entries = [[[rank + 2, 3], [1, rank]] for rank in range(world)]
    expected = [[reduced([float(e[i][j]) for e in entries], op) for j in range(2)] for i in range(2)]
    for dtype in (*FLOATS, *INTEGERS):
        value = reductions(world)[dtype, op]
        assert value.tolist() == expected, dtype
        assert value.dtype == (torch.float64 if op == "mean" and dtype in INTEGERS else dtype)
        assert value.device == CPU
    flags = [[[True, True], [True, rank > 0]] for rank in range(world)]
    value = reductions(world)[torch.bool, op]
    counted = [[reduced([float(e[i][j]) for e in flags], op) for j in range(2)] for i in range(2)]
    assert value.tolist() == counted
    assert value.dtype == {"mean": torch.float64, "sum": torch.int64}.get(op, torch.bool)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", WORLDS)
def test_reduced_numbers(world: int, op: str) -> None:
    """Peers row 13: exactly, whatever their size."""
    found = reductions(world)
    large = [BIG + rank for rank in range(world)]
    wanted = {"mean": sum(large) / world, "sum": sum(large), "max": large[-1], "min": large[0]}
    if op in wanted:
        assert found["int", op].item() == wanted[op]
        assert found["int", op].dtype == (torch.float64 if op == "mean" else torch.int64)
    assert found["float", op].item() == reduced([0.1 * (rank + 1) for rank in range(world)], op)
    assert found["float", op].dtype == torch.float64
    assert found["bool", op].item() == reduced([float(rank == 0) for rank in range(world)], op)
    assert found["negative", op].item() == reduced([-rank - 1.0 for rank in range(world)], op)


@pytest.mark.parametrize("world", WORLDS)
def test_reduced_otherwise(world: int) -> None:
    found = reductions(world)
    values = [2.0 + rank for rank in range(world)]
    objects = [value.item() for key, value in found.items() if key[0] == "object"]
    assert objects == [reduced(values, op) for op in ("sum", "mean", "max", "min", "product")]
    assert found["default"].item() == (1.0 if world == 1 else 1.5)
    assert found["upper case"].item() == (1 if world == 1 else 3)
    tree = found["tree"]
    assert tree["a"][0].tolist() == [sum(range(world))] * 2
    assert (tree["a"][1].item(), tree["b"][0].item(), tree["b"][1].x.item()) == (2 * world, 1.5 * world, 4 * world)
    assert (type(tree["b"][1]), tree["b"][1].y, tree["c"]) == (Pair, "text", None)
    assert found["full bytes"].tolist() == [200.0, 255.0]
    assert found["near the top"].tolist() == [60000.0]
    assert found["graph"] is False


def test_results_are_new_memory() -> None:
    value = torch.ones(3)
    for result in (one().all_reduce(value), one().all_gather(value)[0]):
        result.add_(1)
    assert value.tolist() == [1.0, 1.0, 1.0]


# -- gathers -----------------------------------------------------------------------------------------------------------


def gather_all(fabric: Fabric) -> list[dict[str, Any]]:
    rank, world = fabric.global_rank, fabric.world_size
    found: dict[str, Any] = {}
    for dtype in (*FLOATS, *INTEGERS, torch.bool):
        found[str(dtype)] = fabric.all_gather(torch.full((2, 3), rank, dtype=dtype).T)
    tree = {"l": [torch.tensor(rank), rank], "t": (0.5 + rank, "text"), "p": Pair(torch.ones(0), rank == 0), "n": None}
    found["tree"] = fabric.all_gather(tree)
    leaf = torch.arange(2.0, requires_grad=True)
    found["no graph"] = fabric.all_gather(leaf * 2).requires_grad
    stacked = fabric.all_gather(leaf * 2, sync_grads=True)
    found["stacked"] = stacked.detach()
    weights = (torch.arange(1.0, 2 * world + 1) * (rank + 1)).reshape(world, 2)
    (stacked * weights).sum().backward()
    found["grad"] = leaf.grad
    found["tensor"] = fabric.broadcast(torch.tensor([rank]), src=world - 1)
    found["object"] = fabric.broadcast({"rank": rank, "deep": [Pair(rank, None)]}, src=world - 1)
    fabric.barrier()
    return gather_objects(fabric._ready_world, found)


@cache
def gathers(world: int) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = run(gather_all, "ddp", world)
    return result


@pytest.mark.parametrize("world", WORLDS)
def test_gathered(world: int) -> None:
    for rank, found in enumerate(gathers(world)):
        for dtype in (*FLOATS, *INTEGERS, torch.bool):
            value = found[str(dtype)]
            assert value.shape == (world, 3, 2)
            assert value.dtype == dtype
            assert [set(piece.flatten().tolist()) for piece in value] == [{i} for i in range(world)]
        tree = found["tree"]
        assert [item.tolist() for item in tree["l"]] == [list(range(world))] * 2
        assert tree["t"][0].tolist() == [0.5 + i for i in range(world)]
        assert (type(tree["t"]), tree["t"][1], tree["n"]) == (tuple, "text", None)
        assert type(tree["p"]) is Pair
        assert tree["p"].x.shape == (world, 0)
        assert tree["p"].y.tolist() == [1, 0][:world]
        assert found["tensor"].tolist() == [world - 1]
        assert found["object"] == {"rank": world - 1, "deep": [(world - 1, None)]}
        assert found["no graph"] is False
        assert found["stacked"].tolist() == [[0.0, 2.0]] * world
        # rank r weighs slice s by (r + 1) * [2 s + 1, 2 s + 2]; the shares of all ranks flow back to where s came from
        share = sum(r + 1 for r in range(world))
        assert found["grad"].tolist() == [2.0 * share * (2 * rank + 1), 2.0 * share * (2 * rank + 2)]


# -- callbacks and loggers ---------------------------------------------------------------------------------------------


class Notes:
    """Writes down what it is told: a callback and a logger."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_step(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append((args, kwargs))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.heard.append((dict(metrics), step))


class Deaf:
    pass


def test_callbacks_are_called_in_order() -> None:
    first, second = Notes(), Notes()
    second.heard = first.heard
    fabric = one(callbacks=[first, Deaf(), second])
    fabric.call("on_step", 1, loss=2)
    fabric.call("on_nothing")
    assert first.heard == [((1,), {"loss": 2})] * 2
    single = Notes()
    one(callbacks=single).call("on_step")
    assert single.heard == [((), {})]
    one().call("on_step")


def test_metrics_reach_every_logger() -> None:
    first, second = Notes(), Notes()
    fabric = one(loggers=[first, second])
    fabric.log("loss", torch.tensor([0.5]), step=3)
    fabric.log_dict({"a": 1, "b": torch.tensor(2, dtype=torch.int64), "c": "text"})
    assert first.heard == second.heard == [({"loss": 0.5}, 3), ({"a": 1, "b": 2, "c": "text"}, None)]
    assert [type(value) for value in first.heard[1][0].values()] == [int, int, str]
    assert fabric.loggers == [first, second]
    assert fabric.logger is first
    one().log("loss", 1.0)


def speak(fabric: Fabric) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        fabric.print("rank", fabric.global_rank, sep="=", end="!")
    return gather_objects(fabric._ready_world, out.getvalue())


def test_one_process_of_a_machine_prints() -> None:
    assert run(speak, "ddp", 2) == ["rank=0!", ""]


# -- tensors here ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "born", "computed"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_tensors_of_the_run(precision: str, born: torch.dtype, computed: torch.dtype) -> None:
    fabric = one(precision=precision)
    context = fabric.init_tensor()
    assert torch.ones(1).dtype == torch.float32, "nothing happens before `with`"
    with context:
        value = torch.ones(2, 2)
    assert (value.dtype, value.device) == (born, CPU)
    assert torch.ones(1).dtype == torch.float32
    with fabric.autocast():
        assert (value @ value).dtype == computed
    assert (value @ value).dtype == born
    module = nn.Linear(1, 1)
    assert fabric.to_device(module) is module
    moved = fabric.to_device({"x": [value], "y": "text"})
    assert torch.equal(moved["x"][0], value)
    assert moved["y"] == "text"


# -- seeds -------------------------------------------------------------------------------------------------------------


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_seeds_repeat_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert Fabric.seed_everything(11) == 11
    first = [draws(), draws()]
    assert one().seed_everything(11) == 11
    assert [draws(), draws()] == first
    Fabric.seed_everything(12)
    assert all(a != b for a, b in zip(draws(), first[0], strict=True))
    assert capsys.readouterr().out == ""
    drawn = Fabric.seed_everything()
    assert capsys.readouterr().out == f"Seed drawn: {drawn}\n"
    assert Fabric.seed_everything(verbose=False) != drawn
    assert capsys.readouterr().out == ""


# -- devices -----------------------------------------------------------------------------------------------------------

CUDA = st.integers(1, 16)


def cuda(*indices: int) -> dict[int, torch.device]:
    return {rank: torch.device("cuda", index) for rank, index in enumerate(indices)}


@given(CUDA, st.data())
def test_counts_of_devices(available: int, data: st.DataObject) -> None:
    machine = Machine(cuda=available)
    count = data.draw(st.integers(1, available))
    for form in (count, str(count), f" {count} "):
        assert pick_devices(form, "cuda", machine, None) == cuda(*range(count))
        assert pick_devices(form, "cpu", machine, None) == dict.fromkeys(range(count), CPU)
    for form in ("auto", -1, "-1", available):
        assert pick_devices(form, "cuda", machine, None) == cuda(*range(available))
    with pytest.raises(ConfigError, match="`devices`"):
        pick_devices(available + count, "cuda", machine, None)
    assert pick_devices("auto", "cuda", machine, count) == cuda(*range(count))
    assert len(pick_devices("auto", "cpu", machine, count)) == count
    assert len(pick_devices("auto", "cpu", machine, None)) == 1


@given(CUDA, st.data())
def test_lists_of_devices(available: int, data: st.DataObject) -> None:
    machine = Machine(cuda=available)
    chosen = data.draw(st.lists(st.integers(0, available - 1), min_size=1, unique=True))
    text = ",".join(map(str, chosen)) + ("," if len(chosen) == 1 else "")
    for form in (chosen, tuple(chosen), [str(index) for index in chosen], text):
        assert pick_devices(form, "cuda", machine, None) == cuda(*chosen)
        with pytest.raises(ConfigError, match="`devices`"):
            pick_devices(form, "cpu", machine, None)
    for wrong in ([*chosen, chosen[0]], [*chosen, available], [*chosen, -1]):
        with pytest.raises(ConfigError, match="`devices`"):
            pick_devices(wrong, "cuda", machine, None)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-40, 40) | st.floats() | st.text("0123, -ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=1), inner),
    max_leaves=4,
)


@settings(max_examples=300)
@given(ANYTHING, st.sampled_from(["cpu", "cuda", "mps"]), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_any_value_is_devices_or_an_error(value: Any, kind: str, available: int, launched: int | None) -> None:
    try:
        found = pick_devices(value, kind, Machine(cuda=available, mps=True), launched)
    except ConfigError:  # what it says: test_errors.py
        return
    assert list(found) == list(range(len(found)))
    assert len(found) > 0
    assert {device.type for device in found.values()} == {kind}
    if kind != "cpu":
        assert len(set(found.values())) == len(found), "a device for each rank"
        assert all((device.index or 0) < (available if kind == "cuda" else 1) for device in found.values())


@pytest.mark.parametrize(
    ("accelerator", "machine", "kind"),
    [
        ("auto", Machine(), "cpu"),
        ("auto", Machine(cuda=2), "cuda"),
        ("auto", Machine(mps=True), "mps"),
        ("auto", Machine(cuda=1, mps=True), "cuda"),
        ("gpu", Machine(cuda=1), "cuda"),
        ("cpu", Machine(cuda=8), "cpu"),
        ("mps", Machine(mps=True), "mps"),
    ],
)
def test_accelerators(accelerator: str, machine: Machine, kind: str) -> None:
    assert pick_accelerator(accelerator, machine) == kind


def unequal(fabric: Fabric) -> None:
    fabric.all_gather(torch.ones(2 + fabric.global_rank))


def test_shapes_that_differ_do_not_hang() -> None:
    with pytest.raises(LaunchError, match=r"Rank [01] of 2 (failed first|was ended by signal 6 \(SIGABRT\))"):
        run(unequal, "ddp", 2)

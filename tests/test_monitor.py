"""``fabric.monitor``: what it measures, shows, writes down and finds, with real processes, terminals and folders."""

import fcntl
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyte
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fabriclite import ConfigError, Fabric, NonFiniteError, NonFiniteGradientError, ProfilerWindow, SetupOrderError
from fabriclite.layout import Layout
from fabriclite.watching import flops, phases, rates, rundir, screen, spikes, words
from fabriclite.watching.devices import peak_flops
from fabriclite.watching.records import Event, StepRecord
from gpt import GPT, GPTConfig
from worlds import run

SCRIPT = str(Path(__file__).parent / "watched_script.py")
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="seconds each; asked for by FULL=1")
TINY = GPTConfig(vocab_size=64, context=16, layers=2, heads=4, dim=32)


# -- peaks ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, 1978.9),
        ("NVIDIA H100 PCIe", torch.float16, 756.5),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.int8, 624),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA A30", torch.float16, 165),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 3090", torch.float16, 71),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, 364.2),
        ("AMD Instinct MI250X", torch.float16, 191.5),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
        ("AMD Instinct MI300X OAM", torch.bfloat16, 1307.4),
        ("AMD Instinct MI325X", torch.float8_e4m3fnuz, 2614.9),
        ("AMD Instinct MI355X", torch.bfloat16, 2516.6),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA A1000", torch.bfloat16, None),
        ("NVIDIA H200", torch.int64, None),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks_by_the_names_that_torch_gives(name: str, dtype: torch.dtype, tera: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_float32_is_tf32_only_where_torch_allows_it() -> None:
    assert peak_flops("NVIDIA H200", torch.float32) == 67e12
    assert peak_flops("NVIDIA H200", torch.float32, tf32=True) == pytest.approx(494.7e12)
    assert peak_flops("NVIDIA H200", torch.bfloat16, tf32=True) == pytest.approx(989.4e12)
    assert peak_flops("Tesla T4", torch.float32, tf32=True) == pytest.approx(8.1e12)  # has no such unit


# -- pure parts -----------------------------------------------------------------
ordinary = st.floats(min_value=1.0, max_value=1.05)


@given(st.lists(ordinary, min_size=spikes.LEAST, max_size=200), st.floats(min_value=3.0, max_value=1e6))
@settings(max_examples=50, deadline=None)
def test_a_jump_is_a_spike_and_noise_is_none(before: list[float], jump: float) -> None:
    judge = spikes.Spikes()
    assert [judge.judge(value) for value in before] == [None] * len(before)
    found = judge.judge(jump)
    assert found is not None
    assert (found.value, found.limit < jump) == (jump, True)
    assert 1.0 <= found.median <= 1.05
    assert judge.judge(jump) is None  # of several in a row the first alone is told


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=120))
@settings(max_examples=50, deadline=None)
def test_any_losses_are_judged_alike_by_all(values: list[float]) -> None:
    one, other = spikes.Spikes(), spikes.Spikes()
    for number, value in enumerate(values):
        found = one.judge(value)
        assert found == other.judge(value)
        if found is not None:
            assert number >= spikes.LEAST
            assert math.isfinite(value)
            assert value > found.limit >= found.median


def test_a_loss_that_falls_never_spikes() -> None:
    judge = spikes.Spikes()
    assert not any(judge.judge(5 * 0.97**step) for step in range(300))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 50), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_rates_count_every_replica_once(replicas: int, tensor: int, steps: int, seconds: float) -> None:
    """Ranks of one tensor-parallel group work on the same data, and each tells of it."""
    one = rates.Measured(
        steps=steps,
        seconds=seconds,
        own=seconds,
        memory=1,
        peak=2,
        samples=3 * steps,
        tokens=7 * steps,
        flops=1e9 * steps,
    )
    made = rates.record([one] * (replicas * tensor), 5, 0.0, replicas, 2e9)
    assert made.metrics["samples_per_second"] == pytest.approx(3 * steps * replicas / seconds)
    assert made.metrics["tokens_per_second"] == pytest.approx(7 * steps * replicas / seconds)
    assert made.metrics["flops_per_second"] == pytest.approx(1e9 * steps * replicas / seconds)
    assert made.metrics["mfu"] == pytest.approx(1e9 * steps / seconds / 2e9 / tensor)
    assert made.seconds == pytest.approx((seconds / steps,) * (replicas * tensor))


def test_metrics_are_means_of_the_ranks_that_gave_them() -> None:
    assert rates.means([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {}]) == {"a": 2.0, "b": 5.0}


def test_the_rest_is_told_from_the_pace_of_this_start() -> None:
    rest = rates.Remaining(total=1000, done=900, now=50.0)
    assert rest.seconds() == math.inf
    rest.mark(910, 60.0)
    assert rest.seconds() == pytest.approx(90)
    rest.mark(920, 65.0)  # the first interval warmed up, and counts no more
    assert rest.seconds() == pytest.approx(40)
    rest.mark(1000, 105.0)
    assert rest.seconds() == 0


def test_what_a_module_did_itself() -> None:
    counts = {"M": 10.0, "M.blocks.0": 6.0, "M.blocks.0.a": 4.0, "M.blocks.01": 1.0, "M.head": 2.0}
    assert flops.own_count("M", counts) == 1.0
    assert flops.own_count("M.blocks.0", counts) == 2.0
    assert flops.own_count("M.blocks", counts) == 0.0
    assert flops.own_count("M.head", counts) == 2.0


def test_where_a_rank_may_wait() -> None:
    assert phases.waiting(Layout(), True) == frozenset()
    assert "forward" not in phases.waiting(Layout(replicate=2), False)
    assert {"forward", "backward"} <= phases.waiting(Layout(shard=2, gathers=True), False)
    assert "data" not in phases.waiting(Layout(shard=2, gathers=True), True)


def test_the_slowest_rank() -> None:
    assert phases.slowest((1.0,)) is None
    assert phases.slowest((1.0, 1.5)) == (1, 1.5)
    assert phases.slowest((4.0, 1.0, 2.0)) == (0, 2.0)


def test_figures_in_few_letters() -> None:
    assert [words.number(v) for v in (2.34567, 3e-4, 0.0, 123456.0, math.nan)] == [
        "2.346", "0.0003", "0.000", "1.23e+05", "nan",
    ]  # fmt: skip
    assert [words.size(v) for v in (512_000, 5_000_000, 81_200_000_000)] == ["512 kB", "5.0 MB", "81.2 GB"]
    assert [words.duration(v) for v in (65, 7384, 273_900, math.inf)] == ["1:05", "2:03:04", "3d 04:05", "-"]
    record = StepRecord(
        step=30,
        time=0.0,
        metrics={"loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412},
        seconds=(1.5, 1.5),
        own=(1.0, 1.4),
        peak=(10**9,),
    )
    assert words.straggler(replace(record, seconds=(9.0, 9.0))) == ""  # nobody waits long for it
    assert words.line(record, 1000, 65) == (
        "step   30/1000  loss 2.500  12,346 tokens/s  MFU 41.2%  mem 1.0 GB  eta 1:05  slowest rank 1 (+40%)"
    )


def test_a_log_of_fast_steps_stays_short(capsys: pytest.CaptureFixture[str]) -> None:
    lines = screen.Lines(500)
    for step in range(1, 501):
        lines.show(StepRecord(step=step, time=0.0), math.inf, step == 500)
    shown = re.findall(r"step +(\d+)/500", capsys.readouterr().out)
    assert shown[:3] == ["1", "2", "3"]
    assert shown[-1] == "500"
    assert len(shown) < 30


def test_a_torn_line_swallows_nothing(tmp_path: Path) -> None:
    rundir.append(tmp_path, Event(time=1.0, kind="note"))
    with open(tmp_path / "events-0.jsonl", "a", encoding="utf-8") as file:
        file.write('{"time":2.0,"kind":"no')  # killed here
    rundir.append(tmp_path, Event(time=3.0, kind="end"))
    lines = (tmp_path / "events-0.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert [json.loads(lines[place])["time"] for place in (0, 2)] == [1.0, 3.0]


# -- one process ----------------------------------------------------------------
class Recorder:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, metrics))


def one(*loggers: Any, precision: Any = "32-true") -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=list(loggers), precision=precision)
    fabric.seed_everything(0)
    return fabric


def set_up(fabric: Fabric, module: nn.Module, lr: float = 0.01) -> tuple[Any, Any]:
    return fabric.setup(module, torch.optim.SGD(module.parameters(), lr=lr))


def train(fabric: Fabric, model: Any, optimizer: Any, monitor: Any, x: Tensor, **more: Any) -> Tensor:
    loss = model(x).float().square().mean()
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    monitor.step(loss=loss, **more)
    return loss


def test_a_run_and_its_restarts_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    fabric = one(recorder)
    model, optimizer = set_up(fabric, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    x = torch.ones(3, 4)
    with fabric.monitor(tmp_path / "run", total_steps=8, every=4, samples=3, peak_flops=1e12) as monitor:
        for _ in range(6):
            loss = train(fabric, model, optimizer, monitor, x, lr=0.01)
        fabric.save(tmp_path / "saved", {"model": model})
    for first, end in ((6, ZeroDivisionError("on purpose")), (7, SystemExit(75))):
        with suppress(type(end)), fabric.monitor(tmp_path / "run", first_step=first, bar=False) as monitor:
            train(fabric, model, optimizer, monitor, x)
            raise end

    seen = rundir.read(tmp_path / "run")
    assert [(start.attempt, start.first_step) for start in seen.starts] == [(0, 0), (1, 6), (2, 7)]
    facts = seen.starts[0]
    assert (facts.name, facts.parameters, facts.world_size, facts.device) == ("Sequential", 58, 1, "cpu")
    assert (facts.precision, facts.total_steps, facts.versions["torch"]) == ("32-true", 8, torch.__version__)
    assert [record.step for record in seen.steps] == [4, 6]  # the last one, too, though 6 is no fourth
    record = seen.steps[-1]
    assert record.metrics["loss"] == pytest.approx(loss.item())
    assert record.metrics["samples_per_second"] == pytest.approx(3 * record.metrics["steps_per_second"])
    expected = 3 * 2 * 3 * (4 * 8 + 8 * 2)  # forward and twice that, two per weight, three samples
    assert record.metrics["flops_per_second"] == pytest.approx(expected * record.metrics["steps_per_second"])
    assert record.metrics["mfu"] == pytest.approx(record.metrics["flops_per_second"] / 1e12)
    assert set(record.phases) == set(phases.PHASES)
    assert sum(record.phases.values()) == pytest.approx(record.seconds[0], rel=0.2)
    assert record.own[0] == pytest.approx(record.seconds[0], rel=0.2)
    assert 10**7 < record.memory[0] <= record.peak[0]
    kinds = [event.kind for event in seen.events]
    assert kinds == ["start", "save", "end", "start", "failure", "start", "preempted"]
    failure = seen.events[4]
    assert (failure.text, failure.step) == ("ZeroDivisionError: on purpose", 7)
    assert "ZeroDivisionError" in failure.details["traceback"]

    assert [step for step, _ in recorder.seen] == [4, 6]
    assert {"loss", "lr", "samples_per_second", "mfu", "memory_bytes"} <= recorder.seen[0][1].keys()
    out = capsys.readouterr().out
    assert re.search(r"^step    4/8  loss \d\.\d{3}  lr 0\.01  .* samples/s  MFU ", out, re.MULTILINE)
    assert "\x1b" not in out


def test_flops_of_the_example_are_6nd_and_attention() -> None:
    fabric = one()
    module = GPT(TINY)
    matrices = sum(p.numel() for p in module.parameters() if p.dim() == 2)  # the tied one is a product once
    model, optimizer = set_up(fabric, module)
    with fabric.monitor(bar=False, every=1, tokens=32) as monitor:
        train(fabric, model, optimizer, monitor, torch.zeros(2, 16, dtype=torch.long))
        assert monitor.last is not None
        rate = monitor.last.metrics
    tokens, attention = 32, 12 * TINY.layers * 16 * TINY.dim
    assert rate["flops_per_second"] / rate["steps_per_second"] == pytest.approx(tokens * (6 * matrices + attention))
    assert "mfu" not in rate  # nobody said what this CPU can do


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class Net(nn.Module):
    """``bad`` makes NaN of negative inputs; dropout draws, and normalisation counts."""

    _tp_plan: ClassVar = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(4)
        self.bad = Log()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.drop(self.down(torch.relu(self.up(x)))))
        return self.head(h + self.bad(x))


def clean() -> Tensor:
    return torch.linspace(1, 2, 12).reshape(3, 4)


def spoilt() -> Tensor:
    return torch.cat([clean()[:2], -torch.ones(1, 4)])


def whole(model: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}


def meets_nan(fabric: Fabric, folder: str) -> tuple[str, bool, bool]:
    """The error, whether the weights are those of before the step, whether random numbers and buffers are."""
    fabric.seed_everything(0)
    with fabric.init_module():
        module = Net()
    model, optimizer = set_up(fabric, module)
    with fabric.monitor(folder, bar=False, every=2) as monitor:
        for _ in range(2):
            train(fabric, model, optimizer, monitor, clean())
        last = fabric.global_rank == fabric.world_size - 1
        loss = model(spoilt() if last else clean()).float().square().mean()
        fabric.backward(loss)
        weights, draws = whole(model), torch.get_rng_state()
        try:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        except NonFiniteError as error:
            after = whole(model)
            same = all(torch.equal(after[name], value) for name, value in weights.items())
            return str(error), same, torch.equal(torch.get_rng_state(), draws)
    return "nothing was raised", False, False


NAN_IN = [("ddp", 2), ("fsdp", 2), ("tp_only", 2), ("single_device", 1), pytest.param("zero3", 2, marks=FULL)]


@pytest.mark.parametrize(("strategy", "world"), NAN_IN)
def test_the_module_that_makes_nan_on_one_rank_is_named(strategy: str, world: int, tmp_path: Path) -> None:
    text, same, draws = run(meets_nan, strategy, world, str(tmp_path))
    assert text == (
        f"The loss must be finite, but is nan on rank {world - 1} in step 3. bad (Log) is the first module whose output"
        " is not finite though its inputs are: shape (3, 4), float32, 4 NaN and 0 infinite."
        " The weights were not stepped. To go on in spite of it, pass nonfinite='warn' to fabric.monitor."
    )
    assert same
    assert draws
    seen = rundir.read(tmp_path)
    assert seen.starts[0].parameters == sum(p.numel() for p in Net().parameters())
    event = next(event for event in seen.events if event.kind == "nonfinite")
    assert (event.details["module"], event.details["rank"], event.step) == ("bad", world - 1, 2)


def broken(module: nn.Module, x: Tensor, loss_of: Any = lambda y: y.square().mean()) -> str:
    """What is said of a step of ``module``."""
    fabric = one()
    model, optimizer = set_up(fabric, module)
    with fabric.monitor(bar=False):
        fabric.backward(loss_of(model(x)))
        with pytest.raises(NonFiniteError) as caught:
            optimizer.step()
    return str(caught.value)


def test_what_else_makes_a_loss_that_is_not_finite() -> None:
    assert "what computes the loss from them made it" in broken(
        nn.Linear(2, 2), torch.ones(1, 2), lambda y: y.sum() / 0
    )
    text = broken(nn.Linear(2, 2), torch.full((1, 2), math.inf))
    assert "The model's input is not finite already: shape (1, 2), float32, 0 NaN and 2 infinite." in text
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight[0, 0] = math.nan
    text = broken(module, torch.ones(1, 2))
    assert "1 (Linear) is the first module" in text
    assert "Not finite already: 1.weight." in text


def test_of_accumulated_batches_the_bad_one_is_looked_into() -> None:
    fabric = one()
    model, optimizer = set_up(fabric, Net())
    with fabric.monitor(bar=False):
        for x in (clean(), spoilt(), clean()):
            fabric.backward(model(x).square().mean() / 3)
        with pytest.raises(NonFiniteError, match=r"bad \(Log\) is the first module"):
            optimizer.step()


class Masked(nn.Module):
    """Hands an additive mask of minus infinities on, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.out = Log()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((2, 2), -math.inf).triu(1)
        return self.out(self.mix(x, mask=mask))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * self.scale + mask).softmax(-1) - 0.75


def test_masks_of_minus_infinity_are_no_fault() -> None:
    assert "out (Log) is the first module" in broken(Masked(), torch.ones(2, 2))


def test_it_only_warns_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fabric = one()
    model, optimizer = set_up(fabric, Net())
    with fabric.monitor(tmp_path, bar=False, nonfinite="warn") as monitor:
        for x in (clean(), spoilt(), spoilt()):
            train(fabric, model, optimizer, monitor, x)
    assert capsys.readouterr().err.count("The loss must be finite") == 1  # the first of several in a row
    assert [event.kind for event in rundir.read(tmp_path).events].count("nonfinite") == 1
    with fabric.monitor(bar=False, nonfinite="ignore", spikes=False) as monitor:
        train(fabric, model, optimizer, monitor, spoilt())
    assert capsys.readouterr().err == ""


def test_a_loss_scaler_may_skip_steps_but_not_hide_a_bad_loss() -> None:
    fabric = one(precision="16-mixed")
    model, optimizer = set_up(fabric, nn.Linear(2, 2))
    with fabric.monitor(bar=False) as monitor:
        fabric.backward(model(torch.ones(1, 2)).sum() * 1e-3)
        model.weight.grad.fill_(math.inf)  # as an overflow leaves them: normal, the scaler lowers its scale
        optimizer.step()
        monitor.step()
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, 2)).sum() * math.inf)
        optimizer.step()  # skipped, without telling anybody
        with pytest.raises(NonFiniteError, match=r"in step 2\. .* No optimizer stepped with it\."):
            monitor.step()


def test_gradients_that_are_not_finite_are_named() -> None:
    fabric = one()
    model, optimizer = set_up(fabric, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    fabric.backward(model(torch.ones(1, 2)).sum())
    model[1].weight.grad.fill_(math.nan)
    with pytest.raises(NonFiniteGradientError, match=r"On rank 0 1 of 4 gradients are not finite; .* of 1\.weight\."):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_a_spike_names_the_module_that_is_far_off(precision: str, tmp_path: Path) -> None:
    fabric = one(precision=precision)
    model, optimizer = set_up(fabric, nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), lr=1e-4)
    with fabric.monitor(tmp_path, bar=False) as monitor:
        for step in range(30):
            if step == 25:
                with torch.no_grad():
                    model[2].weight.mul_(20)
            train(fabric, model, optimizer, monitor, (torch.ones(3, 4) + step / 1000).to(model[0].weight.dtype))
    spike = [event for event in rundir.read(tmp_path).events if event.kind == "spike"]
    assert [event.step for event in spike] == [25]
    assert re.search(
        r"The loss of step 26 is .*; the output of 2 on rank 0 was \d+(\.\d+)? times its usual", spike[0].text
    )
    assert spike[0].details["value"] > spike[0].details["limit"]


def test_a_window_of_steps_is_profiled(tmp_path: Path) -> None:
    fabric = one()
    model, optimizer = set_up(fabric, nn.Linear(4, 4))
    window = ProfilerWindow(start=3, steps=2)
    with fabric.monitor(tmp_path, bar=False, profile=window) as monitor:
        for _ in range(6):
            train(fabric, model, optimizer, monitor, torch.ones(3, 4))
    event = next(event for event in rundir.read(tmp_path).events if event.kind == "profile")
    assert event.step == 4
    trace = json.loads(Path(event.details["path"]).read_text())
    names = [entry.get("name", "") for entry in trace["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert names.count("aten::addmm") == 2


def test_a_window_from_the_first_step_for_tensorboard(tmp_path: Path) -> None:
    fabric = one()
    model, optimizer = set_up(fabric, nn.Linear(4, 4))
    window = ProfilerWindow(start=1, steps=1, ranks="all", format="tensorboard")
    with fabric.monitor(tmp_path, bar=False, profile=window) as monitor:
        for _ in range(2):
            train(fabric, model, optimizer, monitor, torch.ones(3, 4))
    assert len(list((tmp_path / "profile").glob("rank-0.*.pt.trace.json"))) == 1


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "`every` must be a whole number of at least 1, but is 0."),
    ({"first_step": -1}, "`first_step` must be a whole number of at least 0, but is -1."),
    ({"total_steps": 1.5}, "`total_steps` must be a whole number of at least 0, but is 1.5."),
    ({"tokens": 0}, "`tokens` must be None or a number above 0, but is 0."),
    ({"peak_flops": "fast"}, "`peak_flops` must be None or a number above 0, but is 'fast'."),
    ({"nonfinite": "shout"}, "`nonfinite` must be 'raise', 'warn' or 'ignore', but is 'shout'."),
    ({"profile": 3}, "`profile` must be a fabriclite.ProfilerWindow, but is 3."),
    ({"profile": ProfilerWindow(start=5, steps=0)}, "`steps` of ProfilerWindow must be at least 1, but is 0."),
    ({"profile": ProfilerWindow(format="svg")}, "`format` of ProfilerWindow must be 'chrome' or 'tensorboard'"),  # type: ignore[arg-type]
    ({"profile": ProfilerWindow(start=5), "first_step": 7}, "must be a step to come, but is 5, and 7 are done."),
    ({"profile": ProfilerWindow(start=9), "total_steps": 10}, "must end by total_steps, but end with step 11 of 10."),
    ({"profile": ProfilerWindow(ranks=(1,))}, "`ranks` of ProfilerWindow must be in [0, 1), but hold 1."),
]


@pytest.mark.parametrize(("options", "text"), MISTAKES, ids=[str(options) for options, _ in MISTAKES])
def test_options_without_a_meaning(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        one().monitor(tmp_path, **options)


def test_mistakes_of_a_script() -> None:
    fabric = one()
    with pytest.raises(ConfigError, match=r"`profile` must come with a folder to write to, but run_dir is None\."):
        fabric.monitor(profile=ProfilerWindow())
    monitor = fabric.monitor(bar=False)
    with pytest.raises(SetupOrderError, match="`step` must be called inside `with"):
        monitor.step()
    with monitor:
        with pytest.raises(SetupOrderError, match="`monitor` must be left before another one begins"):
            fabric.monitor(bar=False).__enter__()
        with pytest.raises(ConfigError, match="A metric must not be named 'mfu'"):
            monitor.step(mfu=0.5)
        with pytest.raises(ConfigError, match="`tokens` must be None or a number above 0, but is -1"):
            monitor.step(tokens=-1)
        for value, told in ((torch.ones(2), r"shape \(2,\)"), ("high", "'high'"), (None, "None")):
            with pytest.raises(ConfigError, match=f"a number or a tensor of one element, but 'x' is {told}"):
                monitor.step(x=value)


# -- several processes ----------------------------------------------------------
class Slow(Dataset[Tensor]):
    def __init__(self, pause: float) -> None:
        self.pause = pause

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.pause)
        return torch.ones(16)


def with_a_straggler(fabric: Fabric, folder: str) -> list[StepRecord]:
    """Rank 1 first reads slowly, then computes more."""
    module = nn.Linear(16, 16)
    model, optimizer = set_up(fabric, module)
    slow = fabric.global_rank == 1
    loader = fabric.setup_dataloaders(DataLoader(Slow(0.05 if slow else 0.0), batch_size=1))
    batches, made = iter(loader), []
    with fabric.monitor(folder, every=5, bar=False, samples=1) as monitor:
        for step in range(15):
            x = next(batches) if step < 10 else torch.ones(1, 16)
            y = model(x)
            until = time.thread_time() + (0.05 if slow and step >= 10 else 0.0)
            while time.thread_time() < until:
                y = y + 0.0
            loss = y.square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
            if monitor.done % 5 == 0:
                made.append(monitor.last)
    return made


def test_the_rank_that_the_others_wait_for_is_named(tmp_path: Path) -> None:
    _, reading, computing = run(with_a_straggler, "ddp", 2, str(tmp_path))
    for record in (reading, computing):
        assert abs(record.seconds[0] - record.seconds[1]) < 0.02  # the clock on the wall tells nothing
        assert record.own[1] > 0.05
        assert record.own[1] > record.own[0] + 0.02
        found = phases.slowest(record.own)
        assert found is not None
        assert found[0] == 1


def measures(fabric: Fabric) -> list[dict[str, float]]:
    fabric.seed_everything(0)
    with fabric.init_module():
        module = GPT(TINY)
    model, optimizer = set_up(fabric, module)
    x, made = torch.zeros(2, 16, dtype=torch.long), []
    with fabric.monitor(bar=False, every=2, tokens=32) as monitor:
        for step in range(6):
            more = {"rank": fabric.global_rank, "step": step}
            if step == 3:
                more[f"only {fabric.global_rank}"] = 7
            if step == 5:
                more |= {f"{number}": number for number in range(30)}
            train(fabric, model, optimizer, monitor, x, **more)
            if step % 2:
                assert monitor.last is not None
                made.append(dict(monitor.last.metrics))
    return made


@pytest.mark.parametrize(
    "strategy", ["fsdp", "tp_only", pytest.param("ddp", marks=FULL), pytest.param("zero3", marks=FULL)]
)
def test_rates_are_those_of_all_ranks(strategy: str) -> None:
    """As many tokens and operations as the replicas worked through, however the model is split."""
    replicas = 1 if strategy == "tp_only" else 2
    found, other, many = run(measures, strategy, 2)
    matrices = sum(p.numel() for p in GPT(TINY).parameters() if p.dim() == 2)
    step = 32 * (6 * matrices + 12 * TINY.layers * 16 * TINY.dim)
    assert found["tokens_per_second"] / found["steps_per_second"] == pytest.approx(32 * replicas)
    assert found["flops_per_second"] / found["steps_per_second"] == pytest.approx(step * replicas)
    assert (found["rank"], found["step"]) == (0.5, 1)
    assert (other["rank"], other["step"], other["only 0"], other["only 1"]) == (0.5, 3, 7, 7)
    assert (many["rank"], many["step"], many["29"]) == (0.5, 5, 29)


# -- what is seen ---------------------------------------------------------------
def env(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NO_COLOR")}
    return {**kept, "TERM": "xterm-256color", **more}


def in_terminal(command: list[str], columns: int, stdout: Any = None) -> list[list[str]]:
    """Run in a pseudo-terminal; what its screen showed each time that something was written."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    output = there if stdout is None else stdout
    process = subprocess.Popen(command, stdin=there, stdout=output, stderr=there, env=env())
    os.close(there)
    shown = pyte.Screen(columns, 24)
    stream, screens = pyte.ByteStream(shown), []
    deadline = time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([here], [], [], 0.5)
            if ready:
                try:
                    written = os.read(here, 65536)
                except OSError:  # Linux's way to say that the other end is closed
                    break
                stream.feed(written)
                screens.append([line.rstrip() for line in shown.display if line.strip()])
    finally:
        process.kill()
        process.wait()
        os.close(here)
    return screens


BAR = re.compile(r"[━╸╺ ]+ *(\d+)/40 ?(.*)")


def test_a_terminal_shows_one_bar_that_is_right() -> None:
    """Two ranks run, and print in between."""
    screens = in_terminal([sys.executable, SCRIPT, "2", "40", "0.03"], 100)
    bars = [[BAR.fullmatch(line) for line in lines if BAR.fullmatch(line)] for lines in screens]
    assert max(len(found) for found in bars) == 1  # never two, never one that was left behind
    steps = [int(found[0][1]) for found in bars if found and found[0]]
    assert steps == sorted(steps)
    assert steps[0] < 10
    last = screens[-1]
    assert last[-1] == "the end"
    bar = BAR.fullmatch(last[-2])
    assert bar is not None
    assert bar[1] == "40"
    assert re.match(r"loss [\d.]+  [\d,.]+ tokens/s  MFU \d+\.\d%  mem [\d.]+ MB  eta 0:00", bar[2])
    said = [f"said by {who} after {step + 1}" for step in range(4, 40, 4) for who in ("fabric", "print")]
    assert last[:-2] == said


def test_a_narrow_terminal_keeps_one_line() -> None:
    screens = in_terminal([sys.executable, SCRIPT, "1", "12", "0"], 50)
    assert [line.split("/")[1][:9] for line in screens[-1] if "/12" in line] == ["12 loss 0"]
    assert len(screens[-1]) == 2 * 2 + 2


def test_a_pipe_gets_lines() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "2", "12", "0"], capture_output=True, text=True, env=env(), timeout=100, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["4/12", "6/12", "8/12", "10/12", "12/12"]
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr)


def test_a_file_gets_lines_while_the_terminal_shows_a_bar(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        screens = in_terminal([sys.executable, SCRIPT, "1", "40", "0.01"], 100, stdout=file)
    log = (tmp_path / "log").read_text()
    assert "step   40/40  loss" in log
    assert not re.search(r"[\x1b\r]", log)
    assert any(BAR.fullmatch(line) for line in screens[-1])


def test_without_rich_a_terminal_gets_lines() -> None:
    code = (
        f"import sys, runpy; sys.modules['rich'] = None; sys.modules['rich.console'] = None;"
        f"sys.argv = ['x', '1', '6', '0']; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    screens = in_terminal([sys.executable, "-c", code], 100)
    assert [line.split()[1] for line in screens[-1] if line.startswith("step")] == ["4/6", "6/6"]


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_what_is_compiled_stays_so_and_is_counted() -> None:
    """Last in this file: it loads the compiler, and then all that comes after is counted as if it were compiled."""
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    fabric = one()
    model, optimizer = set_up(fabric, torch.compile(Compiled(), backend=backend))
    with fabric.monitor(bar=False, every=1) as monitor:
        for _ in range(12):  # the tenth would be sampled
            train(fabric, model, optimizer, monitor, torch.ones(2, 8))
    assert len(made) == 1
    assert monitor.last is not None
    rate = monitor.last.metrics
    assert rate["flops_per_second"] / rate["steps_per_second"] == pytest.approx(3 * 2 * 2 * 2 * 64)

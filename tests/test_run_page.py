"""A run's folder read back whatever happened to it, and the page of it, seen by a real browser."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import browser
import terminal
from fabriclite import ConfigError
from fabriclite.cli.main import main
from fabriclite.watching import rundir
from fabriclite.watching.page.buckets import bucketed
from fabriclite.watching.page.curves import course
from fabriclite.watching.page.gather import gather
from fabriclite.watching.page.write import page, write
from fabriclite.watching.records import Event, RunFacts, StepRecord
from run_folders import BEGAN, MIB, Made

FULL = bool(os.environ.get("FULL"))
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "guides"
EXAMPLE = ROOT / "examples" / "train_gpt.py"
update_docs = pytest.mark.skipif(
    not os.environ.get("UPDATE_DOCS"), reason="writes pictures; asked for by UPDATE_DOCS=1"
)


def in_one_folder(examples: int) -> settings:
    """Settings of a test that empties the same folder for each example."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


Record = RunFacts | StepRecord | Event
numbers = st.floats() | st.integers(-(2**60), 2**60).map(float)
texts = st.text(max_size=20) | st.sampled_from(["<nan>", "<<inf>", "<", "\u2028", "\ud800", "\x00", "a\nb", '"<'])
counts = st.integers(0, 2**53)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
by_rank = st.lists(numbers, max_size=12).map(tuple)
starts = st.builds(
    RunFacts,
    started=numbers,
    attempt=counts,
    first_step=counts,
    name=texts,
    strategy=texts,
    precision=texts,
    world_size=counts,
    nodes=counts,
    device=texts,
    parameters=st.none() | counts,
    versions=st.dictionaries(texts, texts, max_size=2),
    total_steps=st.none() | counts,
    plan=st.none() | st.dictionaries(texts | st.just("peaks"), plain, max_size=2),
    report=texts,
)
steps = st.builds(
    StepRecord,
    step=st.integers(0, 50) | counts,
    time=numbers,
    metrics=st.dictionaries(texts | st.sampled_from(["loss", "mfu"]), numbers, max_size=2),
    phases=st.dictionaries(texts | st.just("forward"), numbers, max_size=2),
    seconds=by_rank,
    own=by_rank,
    memory=by_rank,
    peak=by_rank,
)
events = st.builds(
    Event,
    time=numbers,
    kind=st.sampled_from(
        ["start", "end", "save", "load", "failure", "preempted", "nonfinite", "spike", "profile", "note"]
    ),
    rank=st.integers(0, 3),
    step=st.none() | counts,
    text=texts,
    details=st.dictionaries(texts, plain, max_size=2),
)


def same(one: Any, other: Any) -> bool:
    """Equal, where NaN is equal to itself."""
    return repr(one) == repr(other) if isinstance(one, float) else _same_parts(one, other)


def _same_parts(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def empty(folder: Path) -> Path:
    """``folder`` without files: hypothesis gives each of its examples the same one."""
    for file in folder.glob("*"):
        file.unlink()
    return folder


# -- the folder -------------------------------------------------------------------------------------------------------


@in_one_folder(150)
@given(written=st.lists(starts | steps | events, max_size=5))
def test_what_was_appended_is_read(tmp_path: Path, written: list[Record]) -> None:
    rundir.append(empty(tmp_path), RunFacts(started=1.0))
    for record in written:
        rundir.append(tmp_path, record)
    run = rundir.read(tmp_path)
    assert run.torn == ()
    for kind, found in ((RunFacts, run.starts[1:]), (StepRecord, run.steps)):
        expected = [asdict(record) for record in written if isinstance(record, kind)]
        assert same([asdict(record) for record in found], expected)
    told = sorted(repr(asdict(record)) for record in written if isinstance(record, Event))
    assert sorted(repr(asdict(event)) for event in run.events) == told


@in_one_folder(60)
@given(before=st.lists(steps, min_size=1, max_size=4), after=st.lists(steps, max_size=2), data=st.data())
def test_a_line_cut_anywhere_takes_no_other_with_it(
    tmp_path: Path, before: list[StepRecord], after: list[StepRecord], data: st.DataObject
) -> None:
    rundir.append(empty(tmp_path), RunFacts(started=1.0))
    for record in before:
        rundir.append(tmp_path, record)
    file = tmp_path / "steps.jsonl"
    whole = file.read_bytes()
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    file.write_bytes(kept)
    for record in after:
        rundir.append(tmp_path, record)
    run = rundir.read(tmp_path)
    complete = sum(len(kept) >= end.end() - 1 for end in re.finditer(b"\n", whole))  # also without its line's end
    assert same([asdict(s) for s in run.steps], [asdict(s) for s in before[:complete] + after])
    assert len(run.torn) == (0 if kept == b"" or whole[len(kept) - 1 : len(kept) + 1].count(b"\n") else 1)


@in_one_folder(60)
@given(
    noise=st.binary(max_size=40).filter(lambda b: b"\n" not in b)
    | plain.map(lambda value: repr(value).encode(errors="replace"))
)
def test_a_damaged_line_between_others_is_named(tmp_path: Path, noise: bytes) -> None:
    rundir.append(empty(tmp_path), RunFacts(started=1.0))
    for step in (1, 2):
        rundir.append(tmp_path, StepRecord(step=step, time=0.0))
    first, second = (tmp_path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_bytes(first + noise.replace(b"\n", b"") + b"\n" + second)
    run = rundir.read(tmp_path)
    assert [record.step for record in run.steps] == [1, 2]
    assert run.torn == (("steps.jsonl:2",) if noise else ())


@pytest.mark.parametrize(
    "line",
    [
        '{"step":1}',
        '{"step":-1,"time":0}',
        '{"step":1.5,"time":0}',
        '{"step":true,"time":0}',
        '{"step":9007199254740993,"time":0}',
        '{"step":1,"time":"late"}',
        '{"step":1,"time":0,"metrics":[1]}',
        '{"step":1,"time":0,"metrics":{"loss":"low"}}',
        '{"step":1,"time":0,"metrics":{"loss":1' + "0" * 400 + "}}",
        '{"step":1,"time":0,"seconds":["a"]}',
        '{"step":1,"time":0,"seconds":3}',
        "[" * 100_000,
        "7",
    ],
    ids=range(13),
)
def test_a_line_that_is_no_record_is_torn(tmp_path: Path, line: str) -> None:
    rundir.append(tmp_path, RunFacts(started=1.0))
    (tmp_path / "steps.jsonl").write_text(line + '\n{"step":2,"time":0,"unheard":1}\n')
    run = rundir.read(tmp_path)
    assert run.torn == ("steps.jsonl:1",)
    assert [record.step for record in run.steps] == [2]


def test_a_killed_writer_and_the_next_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fabriclite.watching import rundir\n"
        "from fabriclite.watching.records import RunFacts, StepRecord\n"
        "folder, step = Path(sys.argv[1]), 0\n"
        "rundir.append(folder, RunFacts(started=1.0))\n"
        "while True:\n"
        "    rundir.append(folder, StepRecord(step=step, time=0.0, seconds=(0.1,) * 3000)); step += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        end = time.monotonic() + 60
        while _lines(tmp_path) < 40:
            assert time.monotonic() < end
            assert writer.poll() is None
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert rundir.attempts(tmp_path) == 1
    rundir.append(tmp_path, StepRecord(step=10**6, time=0.0))
    run = rundir.read(tmp_path)
    assert len(run.torn) <= 1
    seen = [record.step for record in run.steps]
    assert len(seen) > 40
    assert seen == [*range(len(seen) - 1), 10**6]


def _lines(folder: Path) -> int:
    file = folder / "steps.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# -- what is drawn ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=300), most=st.integers(1, 40))  # fmt: skip  # noqa: E501
def test_buckets_keep_the_least_and_the_most(values: list[float], most: int) -> None:
    steps, given = np.cumsum(np.arange(1.0, len(values) + 1)), np.array(values)
    found = bucketed(steps, given, most)
    assert len(found.steps) <= max(most, len(values) if len(values) <= most else most)
    finite = given[np.isfinite(given)]
    if len(finite):
        assert np.nanmin(found.low) == finite.min()
        assert np.nanmax(found.high) == finite.max()
        known = np.isfinite(found.mean)
        spare = 1e-9 * np.abs(finite).max()
        assert (found.low[known] - spare <= found.mean[known]).all()
        assert (found.mean[known] <= found.high[known] + spare).all()
    else:
        assert not np.isfinite(found.mean).any()


@settings(deadline=None)
@given(attempts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=4))
def test_steps_that_come_again_count_once(attempts: list[tuple[int, int, int]]) -> None:
    """Against the plain way: each start takes away all steps after its first, if it logs any."""
    made: list[RunFacts] = []
    logged: list[tuple[int, float]] = []
    expected: set[int] = set()
    for number, (first, length, every) in enumerate(attempts):
        made.append(RunFacts(started=1000.0 * number, first_step=first))
        new = [(step, 1000.0 * number + step + 1) for step in range(first + 1, first + length + 1) if step % every == 0]
        if new:
            expected = {index for index in expected if logged[index][0] <= first}
        expected |= set(range(len(logged), len(logged) + len(new)))
        logged += new
    found = course([step for step, _ in logged], [when for _, when in logged], made)
    assert set(np.flatnonzero(found.counts).tolist()) == expected
    counted = found.steps[found.counts]
    assert (np.diff(counted) > 0).all()


@settings(deadline=None, max_examples=60)
@given(made=st.lists(starts, max_size=2), logged=st.lists(steps, max_size=12), told=st.lists(events, max_size=3))
def test_anything_is_gathered(made: list[RunFacts], logged: list[StepRecord], told: list[Event]) -> None:
    seen = gather(made, logged, told)
    assert len(seen.course.steps) == len(logged)
    assert seen.world == max(
        (len(values) for s in logged for values in (s.seconds, s.own, s.memory, s.peak)), default=0
    )


def test_a_thousand_ranks_are_summed_up() -> None:
    logged = (
        StepRecord(step=s, time=s, seconds=tuple(2.0 if rank == 700 else 1.0 for rank in range(1024)))
        for s in range(2500)
    )
    seen = gather((), logged, ())
    heat = seen.maps["seconds"]
    assert heat.values.shape[0] == 256
    assert heat.values.shape[1] <= 301
    assert set(np.flatnonzero((heat.values == 2.0).any(axis=1))) == {700 // heat.ranks_per_row}
    assert max(seen.ranks, key=lambda one: one.slowest).rank == 700
    assert seen.ranks[700].seconds == 2.0


# -- the page ---------------------------------------------------------------------------------------------------------

PLOTS = [
    "plot-progress",
    "plot-metric-loss",
    "plot-metric-val-loss",
    "plot-metric-learning-rate",
    "plot-metric-gradient-norm",
    "plot-samples-per-second",
    "plot-tokens-per-second",
    "plot-flops-per-second",
    "plot-mfu",
    "plot-memory",
    "plot-peak",
    "plot-plan",
    "plot-phases",
    "plot-seconds",
    "plot-own",
]

# Boxes of all plots, their labels that lie over each other, and what does not fit into the page's width, as JSON.
_MEASURE = """<script>
addEventListener('load', () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const over = (a, b) => a[0] < b[2] - 1 && b[0] < a[2] - 1 && a[1] < b[3] - 3 && b[1] < a[3] - 3;
  const found = {boxes: {}, overlaps: [], wide: document.documentElement.scrollWidth > innerWidth,
    ids: document.querySelectorAll('[id]').length,
    unique: new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size,
    scripts: document.scripts.length - 1, images: document.images.length,
    fetched: performance.getEntriesByType('resource').length,
    title: document.querySelector('h1').textContent, tops: {}};
  for (const part of document.querySelectorAll('section')) found.tops[part.id] = box(part)[1];
  for (const plot of document.querySelectorAll('svg.plot')) {
    const r = plot.getBoundingClientRect();
    found.boxes[plot.id] = [r.width, r.height];
    const labels = [...plot.querySelectorAll('text')].map(e => [e.textContent, box(e)]);
    labels.forEach(([one, a], i) => labels.slice(i + 1).forEach(([other, b]) => {
      if (over(a, b)) found.overlaps.push([plot.id, one, other]); }));
  }
  const out = document.createElement('output'); out.id = 'measured'; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


WIDTH = 1240  # pixels


def measured(file: Path) -> dict[str, Any]:
    """What a browser finds on the page, whose own rules forbid all scripts: this is a copy that allows ours."""
    import html
    import json

    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", file.read_text(encoding="utf-8"))
    copy = file.with_name("measured.html")
    copy.write_text(text.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    dom = browser.look(copy, WIDTH).dom
    found = re.search(r'<output id="measured">(.*?)</output>', dom, re.DOTALL)
    assert found, dom[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture(scope="module", params=[4, 12], ids=["4 ranks", "12 ranks"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    return write(Made(tmp_path_factory.mktemp("run"), request.param).whole())


def test_a_browser_finds_all_plots(file: Path, tmp_path: Path) -> None:
    assert file.name == "report.html"
    found = measured(file)
    assert sorted(found["boxes"]) == sorted(PLOTS)
    assert all(width > 300 and height > 100 for width, height in found["boxes"].values()), found["boxes"]
    assert found["overlaps"] == []
    assert not found["wide"]
    assert found["ids"] == found["unique"]
    assert found["fetched"] == found["images"] == found["scripts"] == 0
    assert browser.look(file).console == []  # it was asked for nothing that its rules forbid, which is all
    assert file.stat().st_size < 1_500_000
    _not_blank(browser.picture(file, tmp_path / "page.png", height=3000))


def _not_blank(picture: Path) -> None:
    from PIL import Image

    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    total = sum(count for count, _ in colours)
    assert len(colours) > 100
    assert max(count for count, _ in colours) < 0.95 * total


def test_the_browser_would_tell_what_is_fetched(tmp_path: Path) -> None:
    rundir.append(tmp_path, RunFacts(started=BEGAN))
    file = write(tmp_path)
    file.write_text(file.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    assert "violates the following Content Security Policy" in " ".join(browser.look(file).console)


def test_memory_of_a_process_is_not_held_against_a_plan_of_tensors(tmp_path: Path) -> None:
    made = Made(tmp_path, steps=4)
    moment = {"phase": "step", "module": "", "memory": {"by_kind": {"parameters": MIB}}}
    made.start(0, 0, device="cpu", plan={"peaks": {"step": moment}})
    rundir.append(tmp_path, StepRecord(step=1, time=BEGAN, peak=(400 * MIB,)))
    text = _words(write(tmp_path).read_text(encoding="utf-8"))
    assert "peak, measured on rank 0 of the whole process: Python, libraries and all 400 MiB" in text
    assert "of the plan" not in text
    assert "Planned peak by phase, and" not in text


EVIL = "<script>alert(1)</script>"


def test_nothing_of_the_records_is_markup(tmp_path: Path) -> None:
    made = Made(tmp_path, steps=12)
    peak = {"phase": "step", "module": EVIL, "memory": {"by_kind": {"parameters": 5}}}
    made.start(0, 0, name=EVIL, strategy=EVIL, device=EVIL, versions={EVIL: EVIL}, report=EVIL,
               plan={"peaks": {"step": peak}, "notes": [EVIL]})  # fmt: skip
    rundir.append(
        tmp_path,
        StepRecord(
            step=1,
            time=BEGAN,
            metrics={EVIL: 1.0, "<svg onload=x>": 2.0, "$\\frac": 3.0, '"><b>': 4.0},
            phases={EVIL: 1.0},
        ),
    )
    made.event("failure", 1, EVIL, **{EVIL: EVIL, "trace": f"{EVIL}\n{EVIL}"})
    (tmp_path / f"events-{EVIL.replace('/', '')}.jsonl").write_text("torn\n")
    file = write(tmp_path)
    text = file.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<svg onload" not in text
    assert text.count(escape(EVIL)) >= 9
    found = measured(file)
    assert found["scripts"] == found["images"] == 0
    assert found["title"].startswith(EVIL)
    assert browser.look(file).console == []


def test_what_the_page_says(file: Path) -> None:
    text = _words(file.read_text(encoding="utf-8"))
    ranks = 4 if "4 on 1 machine" in text else 12
    for expected in (
        "GPT finished all steps are done",
        "strategy FSDPStrategy()",
        "parameters 10,788,096 (10.8 M)",
        "steps done 240 of 240",
        "length 1 min 30 s, 2 starts",
        "versions python 3.12.1, torch 2.13.0, fabriclite 0.1.0",
        f"1 2026-09-21 14:14:10 UTC 80 81 to 240 finished {ranks}, NVIDIA H200",
        f"UTC 0 1 to 120 failed {ranks}, NVIDIA H200",
        "NaN or infinite at 1 step",
        "peak, planned 200 MiB",
        f"peak, measured on rank {ranks - 1} {2 + ranks / 2:+.1f} % of the plan {204 + ranks} MiB",
        "Activations are most of it",
        "✖ failure 30 s",
        "OutOfMemoryError: 12 GiB",
        "failure on rank 2, 2026-09-21 14:13:50 UTC: traceback line 1 line 2",
        "computed again later",
        "slowest in",
        "wrapped by fully_shard",
        "280 steps logged",
    ):
        assert expected in text, expected
    assert "could not be read" not in text


def _words(text: str) -> str:
    import html

    text = re.sub(r"<(style|svg).*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def _just(kind: str, text: str = "") -> Callable[[Made], None]:
    return lambda made: made.event(kind, 3, text)  # type: ignore[arg-type]


def _failed_then_started_again(made: Made) -> None:
    made.event("failure", 3, "RuntimeError: no")
    made.time += 1
    made.start(1, 0)


@pytest.mark.parametrize(
    ("then", "later", "expected"),
    [
        (_just("end", "done"), 5.0, "finished done"),
        (_just("failure", "RuntimeError: no"), 5.0, "failed RuntimeError: no"),
        (_just("preempted", "SIGTERM"), 5.0, "preempted SIGTERM"),
        (_just("note"), 5.0, "running last heard of 5 s before this page was made"),
        (_failed_then_started_again, 5.0, "running last heard of 4 s before"),
        (_just("note"), 500.0, "ended without a word no event tells its end"),
        (_just("note"), -500.0, "ended without a word no event tells its end"),
    ],
)
def test_the_state_at_the_end(tmp_path: Path, then: Callable[[Made], None], later: float, expected: str) -> None:
    made = Made(tmp_path)
    made.start(0, 0)
    then(made)
    assert f"GPT {expected}" in _words(page(tmp_path, BEGAN + later))


def _run_without(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        Made(folder, ranks=2, steps=12).whole()
        for name in names:
            for file in folder.glob(name):
                file.unlink()

    return make


def _one_step(folder: Path) -> None:
    made = Made(folder, ranks=1, steps=12)
    made.start(0, 0, plan=None, report="", name="")
    rundir.append(folder, made.record(1))


def _torn_everywhere(folder: Path) -> None:
    Made(folder, ranks=2, steps=12).whole()
    for file in folder.glob("*.jsonl"):
        file.write_bytes(b"\x00\xff\n" + file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_run_without("steps*"), "No step was logged yet."),
        (_run_without("events*"), "ended without a word"),
        (_one_step, "steps done 1 of 12"),
        (_torn_everywhere, "lines could not be read and are not shown here"),
        (lambda folder: (folder / "run.jsonl").write_text(""), "starts none could be read"),
    ],
    ids=["no steps", "no events", "one step", "torn", "nothing"],
)
def test_folders_that_lack_something(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    make(tmp_path)
    assert expected in _words(page(tmp_path, BEGAN + 1e6))


odd_steps = st.builds(
    StepRecord,
    step=st.integers(0, 5) | counts,
    time=numbers,
    metrics=st.dictionaries(st.sampled_from(["loss", "mfu", "\ud800$\\frac"]), numbers, max_size=2),
    phases=st.dictionaries(st.sampled_from(["forward", "<"]), numbers, max_size=2),
    seconds=by_rank,
    memory=by_rank,
    peak=by_rank,
)


@settings(in_one_folder(60 if FULL else 4), phases=[Phase.explicit, Phase.generate])  # a page is too slow to shrink
@given(made=st.lists(starts, max_size=2), logged=st.lists(odd_steps, max_size=6), told=st.lists(events, max_size=3))
def test_a_page_of_anything(tmp_path: Path, made: list[RunFacts], logged: list[StepRecord], told: list[Event]) -> None:
    (empty(tmp_path) / "run.jsonl").touch()
    for record in (*made, *logged, *told):
        rundir.append(tmp_path, record)
    assert write(tmp_path).read_text(encoding="utf-8").endswith("</html>\n")


def test_the_command(tmp_path: Path) -> None:
    folder = Made(tmp_path / "run", ranks=2, steps=24).whole()
    out = tmp_path / "new" / "page.html"
    words = [sys.executable, "-m", "fabriclite", "report", str(folder), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(out.parent.iterdir()) == [out]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"fabriclite: `RUN_DIR` must be a folder that fabric.monitor wrote to, but {str(tmp_path)!r}"
        " holds no run.jsonl."
        " Give the folder that was passed as fabric.monitor(run_dir).\n"
    )
    rundir.append(tmp_path, RunFacts(started=1.0))
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"fabriclite: `--out` must be a file to write, but {str(tmp_path)!r} is a folder. Give a file's name.\n"
    )
    rundir.append(tmp_path, RunFacts(started=1.0, version=2))
    with pytest.raises(
        ConfigError, match=r"^`RUN_DIR` must be of version 1 at most, but '.*' is of a newer one\. Update"
    ):
        rundir.read(tmp_path)


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rundir.append(tmp_path, RunFacts(started=1.0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails now
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "fabriclite: `report` must draw with matplotlib, but it is not installed. Run pip install fabriclite[plots].\n"
    )
    assert not (tmp_path / "report.html").exists()


# -- a terminal, and pictures of the docs -----------------------------------------------------------------------------

_BAR = """
import time
from rich.progress import track
for _ in track(range(20), description="training"):
    time.sleep(0.01)
print("done")
"""


def test_a_terminal_shows_a_bar_and_what_comes_after_it() -> None:
    shown = terminal.show([sys.executable, "-c", _BAR], columns=80)
    assert shown.status == 0
    assert re.fullmatch(r"training ━+ 100% 0:00:00", shown.lines[0])
    assert shown.lines[1:] == ["done"]
    assert all(len(frame) <= 2 for frame in shown.frames), "the bar left lines behind"
    hung = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(TimeoutError, match="did not end in time"):
        terminal.show(hung, timeout=0.3)


@update_docs
def test_pictures_of_the_docs(tmp_path: Path) -> None:
    file = write(_trained(tmp_path / "run"))
    height = int(measured(file)["tops"]["events"])
    picture = browser.picture(file, DOCS / "run-report.png", WIDTH, height)
    _few_colours(picture)
    assert MIB // 100 < picture.stat().st_size < 200_000


@update_docs
def test_picture_of_the_bar(tmp_path: Path) -> None:
    shown = terminal.show(_example(tmp_path, 120), columns=110, timeout=120, stop_when=r" [78]\d/120")
    picture = terminal.picture(shown, DOCS / "progress-bar.png")
    _few_colours(picture)
    assert picture.stat().st_size < 100_000


def _example(out: Path, steps: int, *more: str) -> list[str]:
    words = [sys.executable, str(EXAMPLE), "--accelerator", "cpu", "--strategy", "fsdp", "--devices", "2"]
    return [*words, "--dim", "64", "--layers", "2", "--context", "64", "--log-every", "2", "--out", str(out),
            "--steps", str(steps), "--save-every", "40", *more]  # fmt: skip


def _trained(out: Path) -> Path:
    """The example on two ranks: killed once, then started again from its last checkpoint."""
    with subprocess.Popen(_example(out, 240), stdout=subprocess.DEVNULL, start_new_session=True) as first:
        end = time.monotonic() + 120
        while _lines(out) < 65:
            assert time.monotonic() < end
            assert first.poll() is None
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
    subprocess.run(_example(out, 240, "--resume", "auto"), stdout=subprocess.DEVNULL, timeout=120, check=True)
    return out


def _few_colours(picture: Path) -> None:
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)

"""Loggers: what is logged is read back by each library's own reader, from real files."""

import argparse
import copy
import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fabriclite import ConfigError, DDPStrategy, Fabric, LaunchError, SetupOrderError
from fabriclite.collectives import gather_objects
from fabriclite.loggers import CSVLogger, Logger, MLflowLogger, TensorBoardLogger, WandbLogger
from worlds import run


def one(*loggers: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy="single_device", loggers=list(loggers))


def table(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_a_column_that_comes_later_loses_no_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="gpt", version="a", prefix="train")
    fabric = one(logger)
    fabric.log("loss", torch.tensor([2.5]), step=10)
    fabric.log_dict({"loss": 2, "lr": 1e-3}, step=20)
    fabric.log_dict({'note, with "marks"\n': "two\nlines"})
    path = tmp_path / "gpt" / "a" / "metrics.csv"
    assert logger.log_dir == str(path.parent)
    assert table(path) == [  # without finalize: rows are there when the call returns
        {"step": "10", "train/loss": "2.5", "train/lr": "", 'train/note, with "marks"\n': ""},
        {"step": "20", "train/loss": "2", "train/lr": "0.001", 'train/note, with "marks"\n': ""},
        {"step": "21", "train/loss": "", "train/lr": "", 'train/note, with "marks"\n': "two\nlines"},
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.csv"]


def test_a_resumed_table_goes_on(tmp_path: Path) -> None:
    with CSVLogger(tmp_path, version=3) as logger:
        logger.log_metrics({"loss": 1.0}, 1)
        logger.log_metrics({"loss": float("nan")}, 2)
    path = tmp_path / "logs" / "version_3" / "metrics.csv"
    with open(path, "a") as file:
        file.write("3,0.")  # killed within a write
    again = CSVLogger(tmp_path, version=3)
    again.log_metrics({"loss": 0.5}, 2)
    again.log_metrics({"accuracy": 0.75}, 3)
    again.finalize()
    again.finalize()
    again.log_metrics({"loss": 0.25}, 4)  # opens it again
    assert [tuple(row.values()) for row in table(path)] == [
        ("1", "1.0", ""),
        ("2", "nan", ""),
        ("2", "0.5", ""),
        ("3", "", "0.75"),
        ("4", "0.25", ""),
    ]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text('ab,"\n é', min_size=1, max_size=3), st.floats() | st.integers() | st.text('x,"\n\r '))
    ),
    cut=st.integers(0, 60),
    closes=st.sets(st.integers(0, 10)),
)
def test_whole_rows_survive(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int, closes: set[int]
) -> None:
    """Whatever is logged, wherever a process was killed, and however often it was started again."""
    root = tmp_path_factory.mktemp("csv")
    for number, row in enumerate(rows):
        with CSVLogger(root, version=0) if number in closes else _Kept(root) as logger:
            logger.log_metrics(row, number)
    path = root / "logs" / "version_0" / "metrics.csv"
    wanted = [{"step": str(n), **{k: str(v) for k, v in row.items()}} for n, row in enumerate(rows)]
    found = [] if not rows else [{k: v for k, v in row.items() if v != ""} for row in table(path)]
    assert found == [{k: v for k, v in row.items() if v != ""} for row in wanted]
    if rows:
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        kept = _rows_of(whole[: max(0, len(whole) - cut)])
        with CSVLogger(root, version=0) as logger:
            logger.log_metrics({}, 99)
        assert [row["step"] for row in table(path)] == [*kept, "99"]


class _Kept:
    """A logger of a process that is killed: nobody closes it."""

    def __init__(self, root: Path) -> None:
        self.logger = CSVLogger(root, version=0)

    def __enter__(self) -> CSVLogger:
        return self.logger

    def __exit__(self, *_: Any) -> None:
        pass


def _rows_of(data: bytes) -> list[str]:
    """Steps of the rows that are whole in ``data``, by a reader that counts quotes."""
    ends = [i for i, byte in enumerate(data) if byte == 10 and data[: i + 1].count(b'"') % 2 == 0]
    starts = [0, *[end + 1 for end in ends]]
    return [data[begin : end + 1].split(b",")[0].strip().decode() for begin, end in zip(starts, ends, strict=False)][1:]


def test_versions_are_counted(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path, ""), TensorBoardLogger(tmp_path, "")
    assert (first.version, second.version) == (None, None)
    first.log_metrics({"a": 1})
    assert (first.version, second.log_dir, second.version) == (0, str(tmp_path / "version_1"), 1)
    assert not first.on_rank(1)
    assert first.log_dir == str(tmp_path / "version_0")  # known already
    other = CSVLogger(tmp_path)
    other.on_rank(3)
    with pytest.raises(ConfigError, match="`version` must be given to know `log_dir` on other ranks than 0"):
        _ = other.log_dir


def test_hyperparameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="a")
    logger.log_hyperparams({"model": {"dim": 8, "path": Path("x")}, "lr": 0.1})
    assert json.loads((tmp_path / "logs/a/hparams.json").read_text()) == {"model/dim": 8, "model/path": "x", "lr": 0.1}
    logger.log_hyperparams(argparse.Namespace(lr=0.2))
    assert json.loads((tmp_path / "logs/a/hparams.json").read_text()) == {"lr": 0.2}


# -- the others --------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="a", prefix="train")
    fabric = one(logger)
    logger.log_hyperparams({"lr": 0.5, "shape": (1, 2)})
    fabric.log("loss", torch.tensor(2.5), 10)
    fabric.log_dict({"loss": 2, "lr": 1e-3}, 20)
    logger.finalize()
    with TensorBoardLogger(tmp_path, version="a", prefix="train") as resumed:
        resumed.log_metrics({"loss": 1.5}, 30)
    found = scalars(logger.log_dir)
    assert found["train/loss"] == [(10, 2.5), (20, 2.0), (30, 1.5)]
    assert found["train/lr"] == [(20, pytest.approx(1e-3))]
    assert "tensorflow" not in sys.modules
    with pytest.raises(
        ConfigError, match=r"must be a number for TensorBoardLogger, but 'train/note' is 'text'\. Write text"
    ):
        logger.log_metrics({"note": "text"})
    logger.finalize()


def test_mlflow_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its other store needs a database library
    uri = f"file:{tmp_path}"
    logger = MLflowLogger("mine", run_name="first", tracking_uri=uri, tags={"who": "me"})
    assert logger.version is None
    fabric = one(logger)
    logger.log_hyperparams({f"p{i}": i for i in range(150)})
    fabric.log("loss", torch.tensor(2.5), 10)
    fabric.log_dict({"loss": 2, "inf": float("inf")}, 20)
    client, run_id = logger.experiment, logger.run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    logger.finalize()
    assert client.get_run(run_id).info.status == "FINISHED"
    resumed = MLflowLogger("mine", tracking_uri=uri, run_id=run_id)

    def stop() -> None:
        with resumed:
            resumed.log_metrics({"loss": 1.5}, 30)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name, found.data.tags["who"]) == ("FAILED", "first", "me")
    assert found.data.params == {f"p{i}": str(i) for i in range(150)}
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(10, 2.5), (20, 2.0), (30, 1.5)]
    assert client.get_metric_history(run_id, "inf")[0].value > 1e300
    assert resumed.run_id == run_id
    with pytest.raises(ConfigError, match="must be a number for MLflowLogger, but 'note' is 'text'"):
        resumed.log_metrics({"note": "text"})
    resumed.finalize()


WANDB = """
import sys
from fabriclite import ConfigError, Fabric
from fabriclite.loggers import WandbLogger

for name, prefix in ("well", "train"), ("badly", ""):
    logger = WandbLogger("first", sys.argv[1] + "/" + name, version="abc", offline=True, project="mine", prefix=prefix)
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    logger.log_hyperparams({"lr": 0.5})
    fabric.log("loss", 2.5, 10)
    fabric.log_dict({"loss": 2, "note": "text"}, 20)
    fabric.log("loss", 1.5, 15)  # as a resumed run does
    assert logger.version == logger.experiment.id == "abc"
    if name == "well":
        logger.finalize()
try:
    logger.log_metrics({"step": 1})
except ConfigError as error:
    raise RuntimeError("it fails") from error
"""


@pytest.mark.timeout(100)
def test_wandb_reads_it_back(tmp_path: Path) -> None:
    """A process of its own, since wandb starts another; the end of it closes the run that is open."""
    env = {**os.environ, "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: it fails"
    assert "`metrics` must not name 'step', which WandbLogger logs itself, but does. Pass step=" in done.stderr
    for name, before, code in [("well", "train/", 0), ("badly", "", 1)]:
        (file,) = (tmp_path / name).glob("wandb/offline-run-*/run-abc.wandb")
        records = list(wandb_records(file))
        history = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        assert [(h["step"], h[f"{before}loss"]) for h in history] == [(10, 2.5), (20, 2), (15, 1.5)]
        assert history[1][f"{before}note"] == "text"
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [code]
        begun = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (begun.run_id, begun.project, begun.display_name) == ("abc", "mine", "first")


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run: LevelDB's log format after seven bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_step_is_a_name_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`metrics` must not name 'step', which CSVLogger writes itself, but does"):
        one(CSVLogger(tmp_path)).log("step", 1)
    with pytest.raises(ConfigError, match=r"`version` and `id` must be the same, the run's id, but are 'a' and 'b'"):
        WandbLogger(version="a", id="b")


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", WandbLogger),
        ("tensorboard", lambda: TensorBoardLogger("x")),
        ("mlflow.tracking", MLflowLogger),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, make: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python remembers that there is none
    with pytest.raises(ConfigError, match=rf"Logger must find {package.split('.')[0]}, but: .*fabriclite\[loggers\]"):
        make()


# -- ranks -------------------------------------------------------------------------------------------------------------


class Own:
    """A user's logger: writes down what it is told, where it was told to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        with open(self.path, "a") as file:
            file.write(f"{dict(metrics)} {step} {os.getpid()}\n")

    def finalize(self, status: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{status} {os.getpid()}\n")


def test_the_protocol_is_one_method(tmp_path: Path) -> None:
    assert isinstance(Own(tmp_path), Logger)
    assert isinstance(CSVLogger(tmp_path), Logger)
    assert not isinstance(tmp_path, Logger)


def speak(fabric: Fabric, tmp_path: Path) -> list[Any]:
    rank, logger = fabric.global_rank, fabric.loggers[0]
    metrics = {"b": torch.tensor([2.0 * rank]), "a": rank, "i": 2**40 + rank, "n": float("nan") if rank else 1.0}
    if rank:
        metrics = dict(reversed(metrics.items()))
    group = torch.distributed.group.WORLD
    before = group._get_sequence_number_for_group()  # what torch itself counts collectives by
    fabric.log_dict(metrics, 1, reduce="mean")
    collectives = group._get_sequence_number_for_group() - before
    for step, reduce in enumerate(["sum", "max", "min"], start=2):
        fabric.log_dict(metrics, step, reduce=reduce)
    fabric.log("a", rank, 5, reduce="max")
    fabric.log("own", rank, 6)
    fabric.log_dict({}, 7, reduce="sum")
    logger.log_hyperparams({"x": rank})
    if rank:
        logger.experiment.anything(1).more = 2
        logger.experiment["key"][0].add("x")
        logger.experiment.key["other"] = 1
        assert list(logger.experiment.rows()) == []
    refused = []
    for names in ({"a": 1, "b": 2}, {"a": 1, "c": 2}), ({"a": 1}, {}):
        try:
            fabric.log_dict(names[rank], reduce="sum")
        except ConfigError as error:
            refused.append(str(error))
    return gather_objects(fabric._ready_world, (collectives, os.getpid(), refused))


def test_two_ranks_write_one_file(tmp_path: Path) -> None:
    """Numbers of both ranks in one collective; ours and Lightning's loggers write on rank 0, the user's on both."""
    from lightning_fabric.loggers import CSVLogger as LightningLogger

    loggers = [CSVLogger(tmp_path, "ours"), Own(tmp_path / "own.txt"), LightningLogger(tmp_path, "theirs")]
    config = DDPStrategy(start_method="fork")  # importing Lightning takes seconds: once is enough
    fabric = Fabric(accelerator="cpu", devices=2, strategy=config, loggers=loggers)
    told = fabric.launch(speak, tmp_path)
    assert [collectives for collectives, *_ in told] == [1, 1]
    for rank, (*_, refused) in enumerate(told):
        names = [["'a', 'b'", "'a'"], ["'a', 'c'", "none"]][rank]
        assert len(refused) == 2
        for text, own in zip(refused, names, strict=True):
            assert f"another rank has others than {own}, which rank {rank} has" in text
    rows = table(tmp_path / "ours" / "version_0" / "metrics.csv")
    assert list(rows[0]) == ["step", "a", "b", "i", "n", "own"]
    assert [tuple(row.values()) for row in rows] == [
        ("1", "0.5", "1.0", str(2.0**40 + 0.5), "nan", ""),
        ("2", "1.0", "2.0", str(2.0**41 + 1), "nan", ""),
        ("3", "1.0", "2.0", str(2.0**40 + 1), "nan", ""),
        ("4", "0.0", "0.0", str(2.0**40), "nan", ""),
        ("5", "1.0", "", "", "", ""),
        ("6", "", "", "", "", "0"),
        ("7", "", "", "", "", ""),
    ]
    assert json.loads((tmp_path / "ours" / "version_0" / "hparams.json").read_text()) == {"x": 0}
    own = (tmp_path / "own.txt").read_text().splitlines()
    for rank, (_, pid, _) in enumerate(told):
        mine = [line for line in own if line.endswith(f" {pid}")]
        assert mine[0].startswith("{'a': 0.5, 'b': 1.0, 'i': 1099511627776.5, 'n': nan} 1 ")
        assert mine[-2:] == [f"{{}} 7 {pid}", f"success {pid}"], mine
        assert f"{{'own': {rank}}} 6 {pid}" in mine
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == ["version_0"]
    theirs = table(tmp_path / "theirs" / "version_0" / "metrics.csv")
    assert [row["own"] for row in theirs if row["own"]] == ["0"]


def test_reducing_needs_numbers(tmp_path: Path) -> None:
    fabric = one(CSVLogger(tmp_path, version="a"))
    fabric.log_dict({"a": torch.tensor([[2]]), "b": True, "c": torch.tensor(0.5, dtype=torch.bfloat16)}, reduce="sum")
    assert table(tmp_path / "logs/a/metrics.csv") == [{"step": "0", "a": "2.0", "b": "1.0", "c": "0.5"}]
    with pytest.raises(
        ConfigError, match="`reduce` must be None or one of 'mean', 'sum', 'max', 'min', but is 'median'"
    ):
        fabric.log("a", 1, reduce="median")  # type: ignore[arg-type]
    for value, shown in [("text", "'text'"), (None, "None"), (torch.ones(2), r"a tensor of shape \(2,\)"), (1j, "1j")]:
        with pytest.raises(ConfigError, match=f"one element to be reduced over ranks, but 'a' is {shown}"):
            fabric.log("a", value, reduce="mean")
    many = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(SetupOrderError, match="`launch` must be called before"):
        many.log("a", 1.0, reduce="mean")
    many.log("a", 1.0)


@pytest.mark.parametrize("how", [pickle, copy])
def test_a_copy_opens_its_own(tmp_path: Path, how: Any) -> None:
    logger = CSVLogger(tmp_path, version="a")
    logger.log_metrics({"a": 1})
    other = copy.deepcopy(logger) if how is copy else pickle.loads(pickle.dumps(logger))
    other.log_metrics({"a": 2})
    logger.log_metrics({"a": 3}, 5)
    logger.finalize()
    assert [row["a"] for row in table(Path(other.log_dir) / "metrics.csv")] == ["1", "2", "3"]
    other.finalize()


# -- the end -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from fabriclite import Fabric
from fabriclite.loggers import CSVLogger, TensorBoardLogger
import torch.utils.tensorboard

class Own:
    def log_metrics(self, metrics, step):
        pass
    def finalize(self, status):
        open(root + "/status", "a").write(status)

for ending in "well", "fails", "quits", "killed":
    root = sys.argv[1] + "/" + ending
    if os.fork() == 0:
        break
else:
    print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)])
    os._exit(0)
os.makedirs(root)
loggers = [CSVLogger(root, "csv", "a"), TensorBoardLogger(root, "tb", "a"), Own()]
fabric = Fabric(accelerator="cpu", devices=1, strategy="single_device", loggers=loggers)
fabric.log("loss", 0.5, 1)
fabric.log_dict({"loss": 0.25, "more": 1}, 2)
if ending == "fails":
    raise RuntimeError("it fails")
if ending == "quits":
    sys.exit(0)
if ending == "killed":
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)
"""


def test_the_last_row_is_on_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert sorted(json.loads(done.stdout)) == [-signal.SIGTERM, 0, 0, 1], done.stderr
    for ending, status in [("well", "success"), ("fails", "failed"), ("quits", "success"), ("killed", None)]:
        root = tmp_path / ending
        assert [row["loss"] for row in table(root / "csv/a/metrics.csv")] == ["0.5", "0.25"]
        assert scalars(str(root / "tb/a"))["loss"] == [(1, 0.5), (2, 0.25)]
        assert ((root / "status").read_text() if (root / "status").exists() else None) == status


def fail_on_one(fabric: Fabric, how: str) -> None:
    fabric.log("loss", 0.5, 1)
    if fabric.global_rank == 1:
        raise RuntimeError("rank one fails")
    if how == "names":
        fabric.log("loss", 0.5, 1, reduce="sum")
    time.sleep(60)  # nothing tells this rank but its monitor


def test_loggers_are_closed_when_another_rank_fails(tmp_path: Path) -> None:
    own = Own(tmp_path / "own.txt")
    fabric = Fabric(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        loggers=[own, TensorBoardLogger(tmp_path)],
    )
    with pytest.raises(LaunchError, match="rank one fails"):
        fabric.launch(fail_on_one, "sleeps")
    told = own.path.read_text().splitlines()
    assert sorted(line.split()[0] for line in told if not line.startswith("{")) == ["failed", "failed"]
    assert scalars(str(tmp_path / "logs" / "version_0"))["loss"] == [(1, 0.5)]


class Sour(Own):
    """One that cannot be closed."""

    def finalize(self, status: str) -> None:
        raise OSError("disk full")


def log_once(fabric: Fabric) -> None:
    fabric.log("a", fabric.global_rank)


def test_closing_that_fails_is_told_and_closes_the_others(tmp_path: Path) -> None:
    loggers = [Sour(tmp_path / "sour.txt"), Own(tmp_path / "own.txt")]
    config = DDPStrategy(start_method="forkserver")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=config, loggers=loggers)
    with pytest.raises(LaunchError, match="disk full"):
        fabric.launch(log_once)
    assert (tmp_path / "own.txt").read_text().count("success") == 2


def test_worlds_without_loggers_log_nothing() -> None:
    run(log_once, "ddp", 2)


def fork_and_log(root: str) -> int:
    """In a process of its own: one ``Fabric`` that logged, and ranks that are forked after."""
    first = Fabric(accelerator="cpu", devices=1, strategy="single_device", loggers=Own(Path(root, "first.txt")))
    first.log("a", 1)
    second = CSVLogger(root, version="a")
    second.log_metrics({"a": 0.5}, 1)
    config = DDPStrategy(start_method="fork")
    Fabric(accelerator="cpu", devices=2, strategy=config, loggers=second).launch(log_once)
    second.log_metrics({"a": 1.5}, 2)
    return os.getpid()


def test_forked_ranks_close_what_is_theirs(tmp_path: Path) -> None:
    code = f"from test_loggers import fork_and_log; print(fork_and_log({str(tmp_path)!r}))"
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": here}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first.txt").read_text() == f"{{'a': 1}} None {done.stdout.strip()}\nsuccess {done.stdout}"
    assert [row["a"] for row in table(tmp_path / "logs/a/metrics.csv")] == ["0.5", "0", "1.5"]

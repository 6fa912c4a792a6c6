"""How a checkpoint is saved: its form, beside the training, in a series, elsewhere; and what it holds."""

import errno
import json
import os
import resource
import threading
import weakref
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel

from fabriclite import CheckpointError, ConfigError, Fabric, Safetensors, SaveHandle
from fabriclite.checkpoint import sums
from fabriclite.checkpoint.write import stream
from fabriclite.shards import full
from worlds import run

ALL = [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2)]
"""Importing DeepSpeed takes seconds in every process: what it does is asked of one world at the end."""


class Net(nn.Sequential):
    _tp_plan: ClassVar = {"0": "colwise", "2": "rowwise"}

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def net() -> Net:
    return Net()


def made(fabric: Fabric, seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    module = net()
    return fabric.setup(module, AdamW(module.parameters(), lr=0.1, eps=1e-3))


def step(fabric: Fabric, model: Any, optimizer: Any) -> float:
    loss = model(torch.ones(2, 4)).square().mean()
    fabric.backward(loss, model=model)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def alone() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy="single_device")


# -- beside the training ----------------------------------------------------------------------------------------------


def while_training(fabric: Fabric, path: Path) -> None:
    model, optimizer = made(fabric)
    step(fabric, model, optimizer)
    values = {"list": [1, 2], "tensor": torch.zeros(3)}
    state = {"model": model, "optimizer": optimizer, "values": values}
    before = weights(model)
    handle = fabric.save(path, state, asynchronous=True)
    assert isinstance(handle, SaveHandle)
    later = [step(fabric, model, optimizer) for _ in range(3)]
    values["list"].append(3)  # what was handed over is not looked at again
    values["tensor"].fill_(7)
    handle.wait(60)
    assert handle.done()
    assert handle.path == path
    assert not same(before, weights(model))
    fabric.load(path, state)
    assert same(before, weights(model))
    assert state["values"]["list"] == [1, 2]
    assert state["values"]["tensor"].tolist() == [0, 0, 0]
    assert [step(fabric, model, optimizer) for _ in range(3)] == later


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2)])
def test_asynchronous(strategy: str, world: int, tmp_path: Path) -> None:
    run(while_training, strategy, world, tmp_path / "c")


def two_in_a_row(fabric: Fabric, path: Path) -> list[float]:
    model, optimizer = made(fabric)
    first = fabric.save(path / "1", {"model": model}, asynchronous=True)
    step(fabric, model, optimizer)
    second = fabric.save(path / "2", {"model": model}, asynchronous=True)
    assert first is not None
    assert first.done(), "one save at a time: the second waits"
    assert second is not None
    fabric.load(path / "2", {"model": model})  # waits for it
    assert second.done()
    return step(fabric, model, optimizer)


def test_a_second_save_waits_and_so_does_a_load(tmp_path: Path) -> None:
    run(two_in_a_row, "fsdp", 2, tmp_path)


def test_what_goes_wrong_beside_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something comes into the way after the save has begun."""
    begin = threading.Thread.start

    def slowly(self: threading.Thread) -> None:
        if self.name.startswith("fabriclite-save-c"):
            (tmp_path / ".c.writing").write_text("in the way: a file where the folder, or its name, is to be")
            (tmp_path / "c").mkdir(exist_ok=True)
            (tmp_path / "c" / "foreign").write_text("x")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    fabric = alone()
    model, _ = made(fabric)
    handle = fabric.save(tmp_path / "c", {"model": model}, asynchronous=True, format="folder")
    assert handle is not None
    with pytest.raises(CheckpointError, match=r"asynchronous save of .*c failed"):
        handle.wait(60)
    handle.wait(60)  # told once


def test_the_copy_goes_when_it_is_written(tmp_path: Path) -> None:
    class Held: ...

    held = Held()
    gone = weakref.ref(held)
    handle = SaveHandle(tmp_path / "c", partial(id, held))
    del held
    handle._thread.join(60)
    assert gone() is None, "before anybody waits for it"
    handle.wait(60)


def test_waiting_has_an_end(tmp_path: Path) -> None:
    gate = threading.Event()
    handle = SaveHandle(tmp_path / "c", lambda: gate.wait(60) and None)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        handle.wait(0.01)
    gate.set()
    handle.wait(60)


# -- a series ---------------------------------------------------------------------------------------------------------


def in_a_series(fabric: Fabric, path: Path) -> None:
    model, optimizer = made(fabric)
    seen = []
    for number in (8, 9, 10, 11):
        step(fabric, model, optimizer)
        fabric.save(path / f"step-{number}", {"model": model, "step": number}, keep_last=2, asynchronous=number == 10)
        seen.append(weights(model))
    fabric.save(path / "best", {"model": model})
    state = {"model": model, "step": 0}
    fabric.load(path / "latest", state)
    assert state["step"] == 11
    assert same(weights(model), seen[-1])
    fabric.barrier()


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("fsdp", 2)])
def test_keeps_the_newest_of_a_series(strategy: str, world: int, tmp_path: Path) -> None:
    (tmp_path / "step-1.txt").write_text("not of the series")
    run(in_a_series, strategy, world, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "step-1.txt", "step-10", "step-11"]
    assert (tmp_path / "latest").resolve() == tmp_path / "step-11"


def test_the_one_just_saved_is_kept_whatever_its_number(tmp_path: Path) -> None:
    fabric = alone()
    for number in (100, 200, 50):
        fabric.save(tmp_path / f"step-{number}", {"step": number}, keep_last=1)
    assert fabric.load(tmp_path / "latest") == {"step": 50}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-50"]


# -- forms ------------------------------------------------------------------------------------------------------------


def every_form(fabric: Fabric, path: Path) -> None:
    model, optimizer = made(fabric)
    step(fabric, model, optimizer)
    before = weights(model)
    state = {"model": model, "optimizer": optimizer, "step": 7}
    fabric.save(path / "folder", state, format="folder")
    fabric.save(path / "file", state, format="file")
    fabric.save(path / "export", {"model": model}, format="safetensors")
    assert (path / "folder").is_dir()
    assert (path / "file").is_file()
    after = step(fabric, model, optimizer)
    for name in ("folder", "file"):
        fabric.load(path / name, state)
        assert same(before, weights(model))
        assert step(fabric, model, optimizer) == after
    report = fabric.load_raw(path / "export", model)
    assert report is not None
    assert report.loaded == tuple(before)
    assert same(before, weights(model))


@pytest.mark.parametrize(("strategy", "world"), ALL)
def test_every_form_of_every_strategy(strategy: str, world: int, tmp_path: Path) -> None:
    run(every_form, strategy, world, tmp_path)


def test_a_folder_is_one_of_torch(tmp_path: Path) -> None:
    """Plain torch.distributed.checkpoint reads it, and plain torch.load a file."""
    fabric = alone()
    model, _ = made(fabric)
    fabric.save(tmp_path / "folder", {"model": model}, format="folder")
    fabric.save(tmp_path / "file", {"model": model}, format="file")
    target = {f"model.{name}": torch.zeros_like(value) for name, value in weights(model).items()}
    dcp_load(target, storage_reader=FileSystemReader(tmp_path / "folder"), no_dist=True)
    assert same({name.removeprefix("model."): value for name, value in target.items()}, weights(model))
    assert same(torch.load(tmp_path / "file", weights_only=True)["model"], weights(model))


def every_rank_writes(fabric: Fabric, path: Path) -> None:
    model, optimizer = made(fabric)
    step(fabric, model, optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    sizes = [p.stat().st_size for p in sorted(path.glob("*.distcp"))]
    assert len(sizes) == fabric.world_size
    assert min(sizes) > 4000, sizes


def test_every_rank_writes_its_part(tmp_path: Path) -> None:
    run(every_rank_writes, "fsdp", 2, tmp_path / "c")


# -- several models, one optimizer over two ---------------------------------------------------------------------------


def gan(fabric: Fabric) -> dict[str, Any]:
    torch.manual_seed(1)
    first, second = fabric.setup_module(nn.Linear(4, 6)), fabric.setup_module(nn.Linear(6, 3))
    both = fabric.setup_optimizers(AdamW([*first.parameters(), *second.parameters()], lr=0.1))
    third = fabric.setup_module(nn.Linear(3, 1))
    other = fabric.setup_optimizers(SGD(third.parameters(), lr=0.1, momentum=0.9))
    return {"first": first, "second": second, "third": third, "both": both, "other": other}


def train_gan(fabric: Fabric, state: dict[str, Any]) -> float:
    loss = state["third"](state["second"](state["first"](torch.ones(2, 4)))).square().mean()
    fabric.backward(loss)
    for name in ("both", "other"):
        state[name].step()
        state[name].zero_grad()
    return loss.item()


def several(fabric: Fabric, path: Path) -> None:
    state = gan(fabric)
    average = AveragedModel(nn.Linear(2, 2))
    average.update_parameters(nn.Linear(2, 2))
    state["average"] = average
    train_gan(fabric, state)
    fabric.save(path, state)
    expected = [train_gan(fabric, state) for _ in range(3)]
    again = {**gan(fabric), "average": AveragedModel(nn.Linear(2, 2))}
    fabric.load(path, again)
    assert [train_gan(fabric, again) for _ in range(3)] == expected
    assert same(dict(again["average"].state_dict()), dict(average.state_dict()))


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2)])
def test_several_models_and_an_optimizer_over_two(strategy: str, world: int, tmp_path: Path) -> None:
    run(several, strategy, world, tmp_path / "c")


def loss_scale(fabric: Fabric, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy=fabric.strategy, devices=fabric.world_size, precision="16-true")
    torch.manual_seed(0)
    module = net()
    _, optimizer = fabric.setup(module, AdamW(module.parameters(), lr=1e-3, eps=1e-3))
    scaler = optimizer.engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter = 2.0**9, 5
    fabric.save(path, {"optimizer": optimizer})
    scaler.cur_scale, scaler.cur_iter = 2.0**3, 1
    fabric.load(path, {"optimizer": optimizer})
    assert (scaler.cur_scale, scaler.cur_iter) == (2.0**9, 5)


# -- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["folder", "file", "safetensors"])
def test_a_store_behind_fsspec(format: Any) -> None:
    upath = pytest.importorskip("upath")
    fabric = alone()
    model, optimizer = made(fabric)
    root = f"memory://{format}-store"
    for number in (1, 2, 3):
        step(fabric, model, optimizer)
        fabric.save(f"{root}/step-{number}", {"model": model}, format=format, keep_last=2)
    before = weights(model)
    assert sorted(p.name for p in upath.UPath(root).iterdir()) == ["latest", "step-2", "step-3"]
    step(fabric, model, optimizer)
    if format == "safetensors":
        fabric.load_raw(f"{root}/latest", model)
    else:
        fabric.load(f"{root}/latest", {"model": model})
    assert same(before, weights(model))


def through_fsspec(fabric: Fabric, path: Path) -> None:
    model, optimizer = made(fabric)
    state = {"model": model, "optimizer": optimizer}
    step(fabric, model, optimizer)
    before = weights(model)
    for _ in range(2):
        fabric.save(f"file://{path}", state)
    step(fabric, model, optimizer)
    fabric.load(f"file://{path}", state)
    assert same(before, weights(model))
    fabric.load(path, state)


def test_two_ranks_through_fsspec(tmp_path: Path) -> None:
    pytest.importorskip("upath")
    run(through_fsspec, "fsdp", 2, tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("format", ["folder", "file", "safetensors"])
def test_threads_share_the_reading(format: Any, tmp_path: Path) -> None:
    fabric = alone()
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fabric.save(tmp_path / "c", {"model": module}, format=format)
    torch.set_num_threads(3)
    try:
        for param in module.parameters():
            nn.init.zeros_(param)
        if format == "safetensors":
            fabric.load_raw(tmp_path / "c", module)
        else:
            fabric.load(tmp_path / "c", {"model": module})
        assert same(before, dict(module.state_dict()))
        (tmp_path / "c").rename(tmp_path / "d")
        with pytest.raises(CheckpointError, match="does not exist"):
            fabric.load_raw(tmp_path / "c", module)
    finally:
        torch.set_num_threads(1)


# -- into a model that is not set up yet ------------------------------------------------------------------------------


def before_setup(fabric: Fabric, path: Path) -> None:
    model, _ = made(fabric)
    fabric.save(path, {"model": model})
    expected = weights(model)
    torch.manual_seed(9)
    with fabric.init_module(empty_init=True):
        other = net()
    fabric.load(path, {"model": other})
    other, _ = fabric.setup(other, AdamW(other.parameters()))
    assert same(expected, weights(other))


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2)])
def test_a_checkpoint_loads_before_setup(strategy: str, world: int, tmp_path: Path) -> None:
    run(before_setup, strategy, world, tmp_path / "c")


def under_zero(fabric: Fabric, path: Path) -> None:
    for rule in (while_training, every_form, every_rank_writes, before_setup, loss_scale):
        rule(fabric, path / rule.__name__)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_under_zero(strategy: str, tmp_path: Path) -> None:
    run(under_zero, strategy, 2, tmp_path)


# -- arguments --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format": "zip"}, "`format` must be None, 'folder', 'file', 'safetensors', but is 'zip'."),
    ({"keep_last": 0}, "`keep_last` must be a count of at least 1, but is 0."),
    ({"keep_last": True}, "`keep_last` must be a count of at least 1, but is True."),
    ({"keep_last": 2, "path": "best"}, "`path` must have a number in its name to be one of a series, but is 'best'."),
    ({"format": "safetensors", "asynchronous": True}, "`asynchronous` must be False with format='safetensors'"),
    ({"path": ""}, "`path` must be a path, but is ''."),
    ({"path": 3}, "`path` must be a path, but is 3."),
    ({"format": "safetensors", "state": {"step": 1}}, "`state` must hold one module alone to be exported, but holds"),
]


@pytest.mark.parametrize(("given", "text"), WRONG, ids=lambda value: None if isinstance(value, dict) else value[:40])
def test_wrong_arguments(given: dict[str, Any], text: str) -> None:
    fabric = alone()
    with pytest.raises(ConfigError) as caught:
        fabric.save(given.pop("path", "step-1"), given.pop("state", {"model": net()}), **given)
    assert text in str(caught.value)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> str:
            return "x"

        def set_extra_state(self, state: Any) -> None: ...

    fabric = alone()
    with pytest.raises(ConfigError, match="must be tensors, but _extra_state is extra state"):
        fabric.save(tmp_path / "e", {"model": Noted(2, 2)}, format="safetensors")
    only = {"model": lambda name, value: not name.endswith("_extra_state")}
    fabric.save(tmp_path / "e", {"model": Noted(2, 2)}, filter=only, format="safetensors")
    with pytest.raises(CheckpointError, match="dtype that safetensors knows"):
        fabric.save(tmp_path / "f", {"model": nn.Linear(2, 2).to(torch.complex128)}, format="safetensors")


@pytest.mark.parametrize("size", [0, True, 1.5])
def test_sizes_of_export_files(size: Any) -> None:
    with pytest.raises(ConfigError, match="`max_file_bytes` must be a count of at least 1"):
        Safetensors(max_file_bytes=size)


@pytest.mark.parametrize(
    ("rename", "text"),
    [({"(": ""}, "`rename` must map"), ({"a": 1}, "`rename` must map"), (["a"], "`rename` must map")],
)
def test_wrong_patterns(rename: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        alone().load_raw(tmp_path, net(), rename=rename)


def test_checksums_are_listed(tmp_path: Path) -> None:
    fabric = alone()
    fabric.save(tmp_path / "c", {"model": net()}, format="folder")
    listed = json.loads((tmp_path / "c" / "checksums.json").read_text())
    assert sorted(listed["files"]) == [".metadata", "__0_0.distcp", "meta.pt"]
    for name, file in listed["files"].items():
        assert (tmp_path / "c" / name).stat().st_size == file["size"]


LARGE = {"a": torch.arange(3_000_001.0), "few": torch.arange(5), "b": torch.arange(700_000.0), "none": torch.zeros(0)}
"""Enough for helpers to write it."""


@pytest.mark.parametrize("form", ["file", "folder", "safetensors"])
def test_checksums_are_those_of_the_bytes(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks begin and end within records, and helpers are asked to sync in between."""
    monkeypatch.setattr(sums, "BLOCK", 1_000_003)
    monkeypatch.setattr(stream, "_SYNC_EVERY", 1 << 20)
    module = nn.Module()
    for name, value in LARGE.items():
        module.register_buffer(name, value.clone())
    alone().save(tmp_path / "c", {"model": module}, format=form)
    if form == "file":
        with zipfile.ZipFile(tmp_path / "c") as archive:
            assert archive.testzip() is None
        assert same(torch.load(tmp_path / "c", mmap=True)["model"], LARGE)
        return
    for name, file in json.loads((tmp_path / "c" / "checksums.json").read_text())["files"].items():
        data = (tmp_path / "c" / name).read_bytes()
        blocks = [data[start : start + sums.BLOCK] for start in range(0, len(data), sums.BLOCK)]
        assert file == {"size": len(data), "crc32": [zlib.crc32(block) for block in blocks]}


@pytest.mark.parametrize("form", ["file", "folder", "safetensors"])
@pytest.mark.parametrize("size", [2_000_000, 9_000_000])
def test_no_room_for_what_helpers_write(tmp_path: Path, form: str, size: int) -> None:
    model = nn.Module()
    model.register_buffer("a", torch.zeros(10_000_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            alone().save(tmp_path / "c", {"model": model}, format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_told_by_whoever_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once: a later sync of the same file would say that all is well."""
    synced: list[int] = []

    def sync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(stream, "_SYNC_EVERY", 1 << 20)
    with pytest.raises(CheckpointError, match="Input/output error"):
        alone().save(tmp_path / "c", {"model": LARGE}, format="file")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_two_dtypes_is_refused(tmp_path: Path) -> None:
    """A file has one dtype for it, and would give the other tensor wrong values."""
    values = torch.arange(4.0)
    with pytest.raises(CheckpointError, match="must have one dtype"):
        alone().save(tmp_path / "c", {"floats": values, "numbers": values.view(torch.int32)})


def test_checksums_cannot_be_switched_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        fabric, model = alone(), net()
        for form in ("file", "folder"):
            fabric.save(tmp_path / form, {"model": model}, format=form)
            fabric.load(tmp_path / form, {"model": model})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_refused_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pickle"):
        alone().save(tmp_path / "c", {"f": lambda: None, "model": net()})
    assert list(tmp_path.iterdir()) == []

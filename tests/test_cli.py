"""The command line: checkpoints of every kind shown, compared, and converted to every form without being in memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fabriclite import CheckpointError, ConfigError, Fabric
from fabriclite.boxes import Box
from fabriclite.checkpoint import place
from fabriclite.checkpoint.convert import convert
from fabriclite.checkpoint.describe import describe
from fabriclite.checkpoint.read.kinds import Kind, opened
from fabriclite.checkpoint.write import recast
from fabriclite.cli import show as shown
from fabriclite.cli.main import main
from fabriclite.stored import in_memory
from models import tiny_gpt
from worlds import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Removed at once: pytest keeps ``tmp_path`` of three runs, a gigabyte each."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def same(one: Any, other: Any) -> None:
    """Equal to the bit, also in dtypes and kinds of containers but for dictionaries' subclasses."""
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert set(one) == set(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, Tensor):
        assert (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)
        if one.layout == torch.strided:
            one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, list | tuple):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def read(path: Path) -> dict[str, Any]:
    return {key: value for key, value in in_memory(opened(path).tree).items() if key != "fabriclite"}


# -- every kind, to every form and back ------------------------------------------------------------------------------


def weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "a.bias": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor([1, 65535], dtype=torch.uint16),
    }


def whole() -> dict[str, Any]:
    moments = {"step": torch.tensor(4.0), "exp_avg": torch.linspace(0, 1, 77).view(7, 11)}
    return {
        "model": {**weights(), "_extra_state": {"note": "x", "table": torch.arange(3)}},
        "my.optimizer": {"state": {"a.weight": moments}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "torch's": {"state": {0: {"momentum": torch.ones(100)}}, "param_groups": [{"params": [0]}]},
        "bare": {"state": {}, "param_groups": [{"lr": 1.0}]},
        "step": 3,
        "misc": {"list": [1, torch.ones(2), ("s", torch.zeros(()))], "none": None, "bytes": b"abc"},
        "alone": torch.tensor([1 + 2j, 3 - 1j]),
    }


def write_ours(path: Path, format: Any) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3, "t": torch.ones(3)}, format=format)
    return read(path)


def write_file(path: Path) -> dict[str, Any]:
    torch.save(whole(), path)
    return whole()


def write_state(path: Path) -> dict[str, Any]:
    torch.save(OrderedDict(weights()), path)
    return weights()


def write_distributed(path: Path) -> dict[str, Any]:
    tree = {key: value for key, value in whole().items() if key not in ("torch's", "bare")}  # torch makes names of ints
    dcp.save(tree, checkpoint_id=path, no_dist=True)
    return tree


def write_lightning(path: Path) -> dict[str, Any]:
    tree = whole()
    rest = {key: tree.pop(key) for key in ("step", "misc", "torch's", "bare")}
    dcp.save(tree, checkpoint_id=path, no_dist=True)
    torch.save(rest, path / "meta.pt")
    return {**tree, **rest}


def write_safetensors(path: Path) -> dict[str, Any]:
    save_file(weights(), path)
    return weights()


def write_pretrained(path: Path) -> dict[str, Any]:
    path.mkdir()
    names = list(weights())
    files = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights()[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "config.json").write_text('{"model_type": "x", "dtype": "float32"}')
    return weights()


KINDS: dict[Kind, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    Kind.FILE: ("x.pt", lambda path: write_ours(path, "file")),
    Kind.FOLDER: ("x", lambda path: write_ours(path, "folder")),
    Kind.LIGHTNING_FOLDER: ("x", write_lightning),
    Kind.DISTRIBUTED: ("x", write_distributed),
    Kind.PRETRAINED: ("x", write_pretrained),
    Kind.SAFETENSORS: ("x.safetensors", write_safetensors),
    Kind.STATE: ("x.pt", write_state),
    Kind.TORCH: ("x.pt", write_file),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_to_every_form_and_back(tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    name, write = KINDS[kind]
    source = tmp_path / name
    tree = write(source)
    assert describe(source).kind == kind
    alone = kind in (Kind.PRETRAINED, Kind.SAFETENSORS, Kind.STATE)
    state = tree if alone else tree["model"]

    assert main(["checkpoint", "convert", str(source), str(tmp_path / "file"), "--to", "file"]) == 0
    same(read(tmp_path / "file"), tree)
    assert main(["checkpoint", "convert", str(source), str(tmp_path / "folder"), "--to", "folder"]) == 0
    same(read(tmp_path / "folder"), {"model": tree} if alone else tree)
    key = [] if alone else ["--key", "model"]  # what else is a mapping of tensors could be a module too
    assert main(["checkpoint", "convert", str(source), str(tmp_path / "st"), "--to", "safetensors", *key]) == 0
    same(read(tmp_path / "st"), {k: v for k, v in state.items() if not k.endswith("_extra_state")})
    assert ("_extra_state" in capsys.readouterr().err) == ("_extra_state" in state)
    assert (tmp_path / "st" / "config.json").exists() == (kind == Kind.PRETRAINED)

    assert main(["checkpoint", "consolidate", str(tmp_path / "folder"), str(tmp_path / "back")]) == 0
    same(read(tmp_path / "back"), {"model": tree} if alone else tree)
    assert main(["checkpoint", "convert", str(tmp_path / "back"), str(tmp_path / "again"), "--to", "folder"]) == 0
    same(read(tmp_path / "again"), {"model": tree} if alone else tree)
    for made in ("file", "folder", "st", "back", "again"):
        assert main(["checkpoint", "verify", str(tmp_path / made)]) == 0
    assert not list(tmp_path.glob(".*"))  # nothing is left beside


SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPES), draw(DTYPES)
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    tensor = (torch.randn(shape) * 10).to(dtype)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


NAMES = st.text("ab.%", min_size=1, max_size=4)
VALUES = st.recursive(
    tensors() | st.integers() | st.none() | st.text(max_size=3) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(0, 3), inner, max_size=3),
    max_leaves=6,
)
MODULES = st.dictionaries(NAMES, tensors(), min_size=1, max_size=4)
STATES = st.dictionaries(NAMES, st.dictionaries(NAMES, tensors() | st.integers(), max_size=2), max_size=3)
OPTIMIZERS = st.fixed_dictionaries({"state": STATES, "param_groups": st.lists(st.dictionaries(NAMES, st.floats(0, 1)))})
TREES = st.dictionaries(NAMES, MODULES | OPTIMIZERS | VALUES, max_size=4)


@settings(max_examples=40, deadline=None)
@given(tree=TREES, tie=st.booleans())
def test_any_tree_survives(tree: dict[str, Any], tie: bool) -> None:
    if tie:
        shared = torch.arange(6.0).view(2, 3)
        tree["tied"] = {"one": shared, "two": shared, "turned": shared.t(), "part": shared[1]}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(recast, "PIECE", 8)
        patch.setattr(recast, "BOX", 16)
        patch.setattr("fabriclite.checkpoint.write.targets.SMALL", 1)
        here = Path(name)
        torch.save({**tree, "fabriclite": {"rng": []}}, here / "source.pt")
        for source, target, to in (
            ("source.pt", "file", "file"),
            ("file", "folder", "folder"),
            ("folder", "b", "file"),
        ):
            convert(here / source, here / target, to)
            same(read(here / target), tree)
        loaded = torch.load(here / "file", weights_only=True, mmap=True)
        same({key: value for key, value in loaded.items() if key != "fabriclite"}, tree)
        for file in ("file", "b"):
            with zipfile.ZipFile(here / file) as archive:
                assert archive.testzip() is None
        if tie:
            assert len({t.untyped_storage().data_ptr() for t in loaded["tied"].values()}) == 1


def test_what_is_no_shard_does_not_bring_the_memory_of_shards(tmp_path: Path) -> None:
    flat = torch.arange(10_000.0)
    moments = {"w": {"exp_avg": flat[:9_990]}, "b": {"exp_avg": flat[9_990:]}}
    torch.save({"optimizer": {"state": moments, "param_groups": []}}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "folder", "folder").nbytes == flat.nbytes
    assert (tmp_path / "folder" / "meta.pt").stat().st_size < 2_000
    same(read(tmp_path / "folder"), {"optimizer": {"state": moments, "param_groups": []}})
    convert(tmp_path / "x.pt", tmp_path / "file", "file")
    assert (tmp_path / "file").stat().st_size < 1.1 * flat.nbytes


@given(shape=st.lists(st.integers(0, 5), max_size=4), at_most=st.integers(1, 30))
def test_boxes_cover_a_tensor_once(shape: list[int], at_most: int) -> None:
    seen = torch.zeros(shape, dtype=torch.int64)
    boxes: list[Box] = list(recast.boxes(shape, at_most))
    for box in boxes:
        part = seen
        for dim, (start, length) in enumerate(box):
            part = part.narrow(dim, start, length)
        assert part.numel() <= at_most
        part += 1
    assert seen.eq(1).all()


def test_other_dtypes(tmp_path: Path) -> None:
    tree = whole()
    tree["model"]["tied"] = tree["model"]["a.weight"]
    torch.save(tree, tmp_path / "x.pt")
    for to in ("file", "folder", "safetensors"):
        key = "model" if to == "safetensors" else None
        convert(tmp_path / "x.pt", tmp_path / to, to, dtype=torch.bfloat16, key=key)
        found = read(tmp_path / to)
        model = found if to == "safetensors" else found["model"]
        for name, value in tree["model"].items():
            if isinstance(value, Tensor):
                same(model[name], value.bfloat16() if value.is_floating_point() else value)
        if to != "safetensors":
            same(found["my.optimizer"], tree["my.optimizer"])
            same(model["_extra_state"], tree["model"]["_extra_state"])
    model = torch.load(tmp_path / "file")["model"]
    assert model["tied"].data_ptr() == model["a.weight"].data_ptr()


# -- read by others --------------------------------------------------------------------------------------------------


def converted_goes_on(fabric: Fabric, folder: Path) -> tuple[int, list[Any]]:
    """Save, convert on rank 0, load each result: the same weights and moments as were saved."""

    def build() -> tuple[Any, Any]:
        model = tiny_gpt()
        return fabric.setup(model, torch.optim.AdamW(model.parameters()))

    model, optimizer = build()
    tokens = torch.arange(16).view(2, 8)
    fabric.backward(model(tokens).sum(), model=model)
    optimizer.step()
    optimizer.zero_grad()
    fabric.save(folder / "saved", {"model": model, "optimizer": optimizer})
    if fabric.is_global_zero:
        convert(folder / "saved", folder / "file", "file")
        convert(folder / "file", folder / "folder", "folder")
        convert(folder / "folder", folder / "st", "safetensors")
    fabric.barrier()
    outputs = [model(tokens).detach()]
    for name in ("file", "folder"):
        other, other_optimizer = build()
        fabric.load(folder / name, {"model": other, "optimizer": other_optimizer})
        outputs.append(other(tokens).detach())
        fabric.save(folder / f"{name}_again", {"model": other, "optimizer": other_optimizer}, format="file")
    other, _ = build()
    fabric.load_raw(folder / "st", other)
    outputs.append(other(tokens).detach())
    return fabric.world_size, [torch.equal(output, outputs[0]) for output in outputs]


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("fsdp", 2)])
def test_fabric_loads_what_was_converted(tmp_path: Path, strategy: str, world: int) -> None:
    assert run(converted_goes_on, strategy, world, tmp_path) == (world, [True] * 4)
    assert describe(tmp_path / "folder").ranks == describe(tmp_path / "saved").ranks == world
    for name in ("folder", "file_again", "folder_again"):
        same(read(tmp_path / name), read(tmp_path / "saved"))


def test_torch_reads_what_was_converted(tmp_path: Path) -> None:
    torch.save(whole(), tmp_path / "x.pt")
    for to in ("file", "folder"):
        convert(tmp_path / "x.pt", tmp_path / to, to)
    same(torch.load(tmp_path / "file", weights_only=True), whole())
    same(torch.load(tmp_path / "file", weights_only=True, mmap=True), whole())
    for tensor in torch.load(tmp_path / "file", weights_only=True, mmap=True)["model"].values():
        if isinstance(tensor, Tensor) and tensor.numel():
            assert tensor.data_ptr() % 64 == 0
    state = {"model.a.weight": torch.zeros(7, 5), "my%2Eoptimizer.state.a.weight.exp_avg": torch.zeros(7, 11)}
    dcp.load(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    same(state["model.a.weight"], whole()["model"]["a.weight"])
    same(state["my%2Eoptimizer.state.a.weight.exp_avg"], whole()["my.optimizer"]["state"]["a.weight"]["exp_avg"])
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "torch.pt")
    flat = torch.load(tmp_path / "torch.pt")
    same({name: flat[f"model.{name}"] for name in weights()}, weights())


def test_transformers_opens_what_was_converted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "folder", "folder", key="net")
    convert(tmp_path / "folder", tmp_path / "bare", "safetensors")
    convert(tmp_path / "hf", tmp_path / "st", "safetensors", dtype=torch.bfloat16, max_file_bytes=2000)
    assert len(list((tmp_path / "st").glob("model-*.safetensors"))) > 1
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "st", dtype="auto")
    assert found.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        same(found.state_dict()[name], value.bfloat16())
    same(load_file(tmp_path / "bare" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors"))


# -- memory, damage, death -------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from fabriclite.checkpoint.convert import convert

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024

folder, peak, ended = Path(sys.argv[1]), 0, False
def watch():
    global peak
    while not ended:
        peak = max(peak, anonymous())
        time.sleep(0.002)

base = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
peaks = []
for source, target, dtype in (("x.pt", "folder", None), ("folder", "file", torch.bfloat16)):
    peak = 0
    convert(folder / source, folder / target, target, dtype=dtype)
    peaks.append(peak - base)
ended = True
print(*peaks)
"""


def test_nothing_is_whole_in_memory(folder: Path) -> None:
    rows = 25 << 20
    torch.save({"model": {"a": torch.ones(4, rows // 2), "b": torch.ones(rows, 2)}, "step": 1}, folder / "x.pt")
    assert (folder / "x.pt").stat().st_size >= 400 << 20
    command = [sys.executable, "-c", MEASURED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(word) for word in done.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) < 150, peaks


def test_verify_finds_a_changed_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"w": torch.ones(100)}, "step": 1}, tmp_path / "x.pt")
    for to in ("file", "folder", "safetensors"):
        path = tmp_path / to
        convert(tmp_path / "x.pt", path, to)
        file = max(path.iterdir(), key=lambda f: f.stat().st_size) if path.is_dir() else path
        content = bytearray(file.read_bytes())
        at = content.index(torch.ones(100).numpy().tobytes()) + 42
        content[at] ^= 1
        file.write_bytes(content)
        assert main(["checkpoint", "verify", str(path)]) == 1
        assert f"{file} must be as it was written" in capsys.readouterr().err
        assert main(["checkpoint", "convert", str(path), str(tmp_path / "y"), "--to", "file"]) == 1
        assert not (tmp_path / "y").exists()
        file.write_bytes(content[:-1])
        assert main(["checkpoint", "verify", str(path)]) == 1


def test_verify_says_what_it_cannot_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "x.safetensors")
    write_distributed(tmp_path / "x")
    for name in ("x.safetensors", "x"):
        assert main(["checkpoint", "verify", str(tmp_path / name)]) == 0
        assert "carries no checksums" in capsys.readouterr().out
    write_ours(tmp_path / "ours", "folder")
    assert main(["checkpoint", "verify", str(tmp_path / "ours")]) == 0
    assert "carries no" not in capsys.readouterr().out
    (tmp_path / "ours" / "checksums.json").unlink()
    assert main(["checkpoint", "verify", str(tmp_path / "ours")]) == 1


KILLED = """
import sys, time
from pathlib import Path
from fabriclite.checkpoint import place
from fabriclite.checkpoint.write import recast
from fabriclite.checkpoint.convert import convert

recast.PIECE = recast.BOX = 64
source, target, to = sys.argv[1:]

def stop(done, total):
    if place.beside(Path(target)).exists() and done > total // 2:
        print("half", flush=True)
        time.sleep(100)

convert(source, target, to, overwrite=True, progress=stop)
"""


@pytest.mark.parametrize("to", ["file", "folder"])
def test_killed_in_the_middle(tmp_path: Path, to: Any) -> None:
    source, target = tmp_path / "x.pt", tmp_path / "y"
    write_file(source)
    if to == "file":
        torch.save({"old": torch.ones(3)}, target)
    command = [sys.executable, "-c", KILLED, str(source), str(target), to]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        os.kill(child.pid, signal.SIGKILL)
    assert place.beside(target).exists()
    if to == "file":
        same(read(target), {"old": torch.ones(3)})
    else:
        assert not target.exists()
    convert(source, target, to, overwrite=to == "file")
    same(read(target), whole())
    assert not place.beside(target).exists()


# -- what is said ----------------------------------------------------------------------------------------------------


def test_inspect_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ours(tmp_path / "x", "folder")
    assert main(["checkpoint", "inspect", str(tmp_path / "x")]) == 0
    text = capsys.readouterr().out
    for part in ("fabriclite folder", "saved by 1 process", "0.weight  [5, 4] float32, 80 B", "step = 3", "meta.pt"):
        assert part in text
    assert main(["checkpoint", "inspect", str(tmp_path / "x"), "--depth", "1"]) == 0
    text = capsys.readouterr().out
    assert "model  (4 tensors, 172 B)" in text
    assert "0.weight" not in text
    assert main(["checkpoint", "inspect", str(tmp_path / "x"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["ranks"]) == ("fabriclite folder", 1)
    assert found["items"]["model"]["items"]["0.weight"] == {"shape": [5, 4], "dtype": "float32", "bytes": 80}
    assert found["items"]["step"] == {"value": "3", "type": "int"}
    assert found["bytes"] == sum(item.get("bytes", 0) for item in found["items"].values())
    assert set(found["files"]) == {"meta.pt", ".metadata", "checksums.json", "__0_0.distcp"}
    torch.save({"pytorch-lightning_version": "2.5", "state_dict": weights()}, tmp_path / "x.ckpt")
    assert describe(tmp_path / "x.ckpt").kind == Kind.LIGHTNING_FILE
    torch.save({"s": torch.eye(3).to_sparse(), "long": "x" * 100}, tmp_path / "odd.pt")
    assert main(["checkpoint", "inspect", str(tmp_path / "odd.pt")]) == 0
    assert "s = sparse, [3, 3], float32" in capsys.readouterr().out


def test_a_terminal_gets_a_tree_and_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "x.pt")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich asks for a terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown.show(describe(tmp_path / "x.pt"), 2)
    assert "├── model  (7 tensors, 184 B)" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "x.pt")]) == 0
    assert "comparing" in capsys.readouterr().err
    for name in ("rich", "rich.tree", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    shown.show(describe(tmp_path / "x.pt"), 2)
    assert "\n  model  (7 tensors, 184 B)\n" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "x.pt")]) == 0
    assert "comparing" not in capsys.readouterr().err


def test_errors_say_how_to_mend_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "x.pt"
    torch.save({"model": weights(), "other": weights(), "step": 1}, source)
    write_pretrained(tmp_path / "hf")

    def says(code: int, text: str, *arguments: str) -> None:
        assert main(["checkpoint", *arguments]) == code
        err = capsys.readouterr().err
        assert text in err
        assert "Traceback" not in err

    x, y = str(source), str(tmp_path / "y")
    says(1, "does not exist", "inspect", y)
    says(1, "does not exist", "convert", y, str(tmp_path / "new" / "z"), "--to", "file")
    assert not (tmp_path / "new").exists()
    says(1, "pass overwrite=True (--overwrite)", "convert", x, x, "--to", "folder")
    says(1, "must hold the state of one module, but holds model, other", "convert", x, y, "--to", "safetensors")
    says(2, "`key` must be one of model, other", "convert", x, y, "--to", "safetensors", "--key", "mode")
    says(2, "`key` must be left out", "convert", x, y, "--to", "folder", "--key", "model")
    says(2, "`key` must be left out", "convert", str(tmp_path / "hf"), y, "--to", "safetensors", "--key", "model")
    says(2, "`max_file_bytes` must be left out", "convert", x, y, "--to", "file", "--max-file-bytes", "9")
    says(2, "must not be inside of the source", "consolidate", str(tmp_path / "hf"), str(tmp_path / "hf" / "y"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    says(1, "holds more than a checkpoint", "convert", x, str(tmp_path / "notes"), "--to", "file", "--overwrite")
    (tmp_path / "file").write_text("x")
    says(1, "must be able to write", "convert", x, str(tmp_path / "file" / "y"), "--to", "file")
    torch.save({"c": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "c.pt")
    says(2, "dtype that safetensors knows", "convert", str(tmp_path / "c.pt"), y, "--to", "safetensors")
    torch.save({"model": weights(), "path": tmp_path}, tmp_path / "code.pt")
    says(1, "weights_only=False", "consolidate", str(tmp_path / "code.pt"), y)
    assert not list(tmp_path.glob(".*"))
    assert main(["checkpoint", "consolidate", str(tmp_path / "code.pt"), y, "--no-weights-only"]) == 0
    assert torch.load(y, weights_only=False)["path"] == tmp_path
    for wrong in (["checkpoint"], ["checkpoint", "convert", x, y], ["checkpoint", "inspect", x, "--depth", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    with pytest.raises(ConfigError, match="`to` must be one of"):
        convert(x, y, "zip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="floating-point dtype"):
        convert(x, y, "file", dtype=torch.int8)
    with pytest.raises(CheckpointError, match="but exists"):
        convert(x, y, "file")
    convert(x, y, "folder", overwrite=True)
    convert(y, y, "file", overwrite=True)
    same(read(Path(y)), {"model": weights(), "other": weights(), "step": 1})


def test_the_program_itself(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "x.pt")
    command = [sys.executable, "-m", "fabriclite", "checkpoint"]
    done = subprocess.run([*command, "inspect", str(tmp_path / "x.pt")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "state dict file" in done.stdout

"""Reading checkpoints of every kind: any part equals that part of the tensor, and no damage is a crash."""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fabriclite import CheckpointError
from fabriclite.boxes import Box, all_of
from fabriclite.checkpoint.read import extents, ranges
from fabriclite.checkpoint.read.extents import Extent, OnDisk
from fabriclite.checkpoint.read.index import INDEX, _tile
from fabriclite.checkpoint.read.ranges import File
from fabriclite.checkpoint.read.safetensors_file import read_header
from fabriclite.checkpoint.read.source import open_checkpoint, open_state
from fabriclite.stored import InMemory, Stored, in_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),  # of bytes that were changed
]

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of each example its own, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).view(shape)
    return (torch.arange(count) % 100).to(dtype).view(shape)


def part_of(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, length) in enumerate(box):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def raw(tensor: Tensor) -> Tensor:
    """Its bytes in row-major order, also of dtypes that cannot be compared."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    tensor = values(shape, draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    return tensor.permute(order) if draw(st.booleans()) else tensor


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    box = []
    for n in shape:
        start = draw(st.integers(0, n))
        box.append((start, draw(st.integers(0, n - start))))
    return tuple(box)


def check_reads(data: st.DataObject, stored: Stored, tensor: Tensor) -> None:
    """A part into plain memory, memory of another order, and another dtype; the whole; a flat stretch."""
    assert stored.shape == tensor.shape
    assert stored.dtype == tensor.dtype
    assert same(stored.whole(), tensor)
    box = data.draw(boxes(tuple(tensor.shape)))
    expected = part_of(tensor, box)
    out = torch.zeros(expected.shape, dtype=tensor.dtype)
    stored.read(box, out)
    assert same(out, expected)
    turned = torch.zeros(expected.shape[::-1], dtype=tensor.dtype)
    turned = turned.permute(tuple(reversed(range(turned.dim()))))
    stored.read(box, turned)
    assert same(turned, expected)
    if not tensor.is_complex():
        wide = torch.zeros(expected.shape, dtype=torch.float64)
        stored.read(box, wide)
        assert torch.equal(wide, expected.to(torch.float64))
    count = tensor.numel()
    start = data.draw(st.integers(0, count))
    flat = torch.zeros(data.draw(st.integers(0, count - start)), dtype=tensor.dtype)
    stored.read_flat(start, flat)
    assert same(flat, tensor.reshape(-1)[start : start + flat.numel()])


# -- parts of tensors -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), found=st.lists(tensors(), min_size=1, max_size=4))
def test_safetensors_give_what_the_package_wrote(data: st.DataObject, found: list[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        named = {f"t{i}": tensor.contiguous() for i, tensor in enumerate(found)}
        save_file(named, path, metadata={"format": "pt"})
        header = read_header(path)
        assert header.metadata == {"format": "pt"}
        assert set(header.tensors) == set(named)
        for key, tensor in named.items():
            check_reads(data, header.tensors[key], tensor)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), found=st.lists(tensors(), min_size=1, max_size=4))
def test_folders_give_what_torch_wrote(data: st.DataObject, found: list[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as name:
        named = {f"t{i}": tensor for i, tensor in enumerate(found)}
        dcp.save(dict(named), checkpoint_id=name, no_dist=True)
        tree = open_checkpoint(Path(name), True).tree
        for key, tensor in named.items():
            check_reads(data, tree[key], tensor)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), tensor=tensors())
def test_files_give_what_torch_wrote(data: st.DataObject, tensor: Tensor) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.pt"
        torch.save({"a": [tensor, {"b": tensor}]}, path)
        tree = open_checkpoint(path, True).tree
        assert tree["a"][0].mapped() is None
        check_reads(data, tree["a"][0], tensor)
        assert same(in_memory(tree)["a"][1]["b"], tensor)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    before=st.integers(0, 9),
    limits=st.sampled_from([(16 << 20, 32 << 10), (64, 8), (64, 1 << 30), (24, 1)]),
    mappable=st.booleans(),
)
def test_chunks_at_any_byte_make_up_any_part(
    data: st.DataObject,
    shape: list[int],
    dtype: torch.dtype,
    before: int,
    limits: tuple[int, int],
    mappable: bool,
) -> None:
    """Every way to read, by making blocks small and long rows short; also where nothing may be mapped."""
    tensor = values(tuple(shape), dtype)
    cut = data.draw(st.integers(0, len(shape) - 1))
    at = data.draw(st.integers(0, shape[cut]))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(extents, "_BLOCK", limits[0])
        patch.setattr(extents, "_LONG", limits[1])
        if not mappable:
            patch.setattr(ranges, "_on_local_disk", lambda path: False)
        pieces = []
        for number, (start, length) in enumerate([(0, at), (at, shape[cut] - at)]):
            if length == 0:
                continue
            box = (*all_of(shape[:cut]), (start, length), *all_of(shape[cut + 1 :]))
            path = Path(name) / f"{number}"
            order = data.draw(st.permutations(range(len(shape))))
            turned = part_of(tensor, box).permute(order).contiguous()
            path.write_bytes(bytes(before) + bytes(raw(turned).tolist()) + b"rest")
            back = turned.permute([order.index(dim) for dim in range(len(shape))])
            strides = None if tuple(order) == tuple(range(len(shape))) else back.stride()
            pieces.append(Extent(box, File(path), before, strides))
        check_reads(data, OnDisk(shape, dtype, pieces), tensor)


def test_values_that_lie_apart_or_upon_each_other(folder: Path) -> None:
    (folder / "x").write_bytes(bytes(range(60)))
    file = File(folder / "x")
    whole = torch.arange(60, dtype=torch.uint8)
    for shape, strides in [((3, 4), (20, 3)), ((4, 5), (0, 1)), ((3, 2, 4), (1, 30, 2)), ((2, 3), (0, 0))]:
        stored = OnDisk(shape, torch.uint8, [Extent(all_of(shape), file, 2, strides)])
        assert torch.equal(stored.whole(), whole[2:].as_strided(shape, strides))
        assert stored.mapped() is None


def test_images_keep_their_order(folder: Path) -> None:
    image = values((4, 3, 5, 6), torch.float32).to(memory_format=torch.channels_last)
    dcp.save({"w": image, "t": values((5, 7), torch.float32).t()}, checkpoint_id=folder, no_dist=True)
    tree = open_checkpoint(folder, True).tree
    out = torch.empty_like(image)
    tree["w"].read(all_of(image.shape), out)
    assert torch.equal(out, image)
    assert torch.equal(tree["t"].whole(), values((5, 7), torch.float32).t())
    assert tree["w"].mapped() is None


@settings(deadline=None, max_examples=200)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=3))
def test_only_boxes_that_cover_and_do_not_overlap_tile(data: st.DataObject, shape: list[int]) -> None:
    whole = [all_of(shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        box = whole.pop(data.draw(st.integers(0, len(whole) - 1)))
        wide = [dim for dim, (_, n) in enumerate(box) if n > 1]
        if not wide:
            whole.append(box)
            break
        dim = data.draw(st.sampled_from(wide))
        start, n = box[dim]
        at = data.draw(st.integers(1, n - 1))
        whole += [(*box[:dim], piece, *box[dim + 1 :]) for piece in ((start, at), (start + at, n - at))]
    assert _tile(whole, shape)
    assert not _tile([*whole, whole[0]], shape)
    assert not _tile(whole[1:], shape)
    if len(whole) > 1:  # of the right volume, but one moved onto others
        moved = data.draw(st.sampled_from(whole))
        other = tuple(
            (data.draw(st.integers(0, n - length)), length) for (_, length), n in zip(moved, shape, strict=True)
        )
        hits = torch.zeros(shape)
        candidate = [other if box is moved else box for box in whole]
        for box in candidate:
            part_of(hits, box).add_(1)
        assert _tile(candidate, shape) == bool((hits == 1).all())


# -- how much is read, and what is mapped -----------------------------------------------------------------------------


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts bytes that were read")
@pytest.mark.parametrize("kind", ["safetensors", "folder"])
def test_only_the_wanted_bytes_are_read(folder: Path, kind: str) -> None:
    tensor = torch.randn(1024, 2048)
    if kind == "folder":
        dcp.save({"w": tensor}, checkpoint_id=folder, no_dist=True)
        stored = open_checkpoint(folder, True).tree["w"]
    else:
        save_file({"w": tensor, "v": torch.zeros(10)}, folder / "x.safetensors")
        stored = read_header(folder / "x.safetensors").tensors["w"]
    for box, dtype in [
        (((256, 512), (0, 2048)), torch.float32),
        (((256, 512), (0, 2048)), torch.bfloat16),
        (((5, 900), (100, 40)), torch.float32),  # a strided copy out of a mapping
        (((5, 900), (100, 40)), torch.float64),
    ]:
        out = torch.zeros([n for _, n in box], dtype=dtype)
        before = bytes_read()
        stored.read(box, out)
        assert bytes_read() - before <= 1.05 * out.numel() * 4 + 4096
        assert torch.equal(out, part_of(tensor, box).to(dtype))


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux tells where files lie")
def test_what_is_mapped_is_the_readers_own(folder: Path) -> None:
    path = folder / "x.safetensors"
    tensor = torch.arange(5000.0)
    save_file({"w": tensor, "b": torch.ones(3)}, path)
    stored = read_header(path).tensors["w"]
    one, two = stored.mapped(), stored.mapped()
    assert one is not None
    assert two is not None
    assert one.untyped_storage().nbytes() == tensor.nbytes
    one.add_(1)
    assert torch.equal(two, tensor)
    assert torch.equal(stored.whole(), tensor)
    out = torch.zeros(4)
    stored.read(((7, 4),), out)
    assert torch.equal(out, tensor[7:11])
    assert torch.equal(read_header(path).tensors["w"].whole(), tensor)
    del stored, two
    gc.collect()
    assert torch.equal(one, tensor + 1)  # the mapping lives as long as the tensor


def test_network_file_systems_are_not_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(5)}, folder / "x.safetensors")
    monkeypatch.setattr(ranges, "_REMOTE", ("ext", "tmpfs", "overlay", "xfs", "btrfs", "zfs"))
    stored = read_header(folder / "x.safetensors").tensors["w"]
    assert stored.mapped() is None
    assert torch.equal(stored.whole(), torch.ones(5))


def test_threads_share_a_file_and_it_is_closed(folder: Path) -> None:
    tensor = torch.randn(64, 4096)
    save_file({"w": tensor}, folder / "x.safetensors")
    stored = read_header(folder / "x.safetensors").tensors["w"]
    out = torch.zeros(64, 4096)
    with ThreadPoolExecutor(8) as pool:
        for row in range(64):
            pool.submit(stored.read, ((row, 1), (0, 4096)), out[row : row + 1])
    assert torch.equal(out, tensor)
    assert opened(folder) == 1
    del stored
    gc.collect()
    assert opened(folder) == 0


def opened(folder: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


class Elsewhere:
    """A path that is no local file: what ``universal_pathlib`` gives, as far as it is used."""

    protocol = "memory"

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name == "__fspath__":
            raise AttributeError(name)
        return getattr(self._path, name)

    def __truediv__(self, name: str) -> "Elsewhere":
        return Elsewhere(self._path / name)

    def __str__(self) -> str:
        return f"memory://{self._path}"

    @property
    def parent(self) -> "Elsewhere":
        return Elsewhere(self._path.parent)

    def iterdir(self) -> Iterator["Elsewhere"]:
        return (Elsewhere(child) for child in self._path.iterdir())


def test_files_elsewhere_are_read_through_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabriclite.checkpoint.read import source

    monkeypatch.setattr(source.disk, "located", lambda path: path)
    tensor = values((40, 30), torch.float32)
    save_file({"w": tensor}, folder / "x.safetensors")
    stored = open_state(Elsewhere(folder / "x.safetensors"), True).tensors["w"]
    assert stored.mapped() is None
    out = torch.zeros(20, 5)
    stored.read(((3, 20), (4, 5)), out)
    assert torch.equal(out, tensor[3:23, 4:9])
    assert torch.equal(stored.whole(), tensor)
    dcp.save({"w": tensor, "n": 3}, checkpoint_id=folder / "d", no_dist=True)
    tree = in_memory(open_checkpoint(Elsewhere(folder / "d"), True).tree)
    assert torch.equal(tree["w"], tensor)
    assert tree["n"] == 3
    torch.save({"w": tensor}, folder / "x.pt")
    assert torch.equal(open_state(Elsewhere(folder / "x.pt"), True).tensors["w"].whole(), tensor)


# -- damage -----------------------------------------------------------------------------------------------------------


def small_safetensors(path: Path) -> bytes:
    save_file(
        {"a": torch.ones(2, 3), "b.c": torch.zeros(5, dtype=torch.int64), "e": torch.zeros(0, 2)}, path, {"k": "v"}
    )
    return path.read_bytes()


def test_every_truncation_of_safetensors_is_an_error(folder: Path) -> None:
    path = folder / "x.safetensors"
    content = small_safetensors(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="longer than it should be"):
        read_header(path)


def test_no_changed_byte_of_a_safetensors_header_gives_other_bytes(folder: Path) -> None:
    """An error, or tensors that lie where they did: a changed letter of a name or of a dtype cannot be told."""
    path = folder / "x.safetensors"
    content = small_safetensors(path)
    end = 8 + int.from_bytes(content[:8], "little")

    def places() -> list[tuple[int, int]]:
        found = read_header(path).tensors.values()
        return sorted((extent.place()[0], tensor.nbytes) for tensor in found for extent in tensor.extents)

    expected = places()
    errors = 0
    for at in range(end):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert places() == expected
            except CheckpointError:
                errors += 1
    assert errors > end


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "wrong"),
    [
        (b"[" * 100_000, b"", "no JSON"),
        (b'{"a": {}, "a": {}}', b"", "comes twice"),
        (b"\xff\xfe", b"", "no JSON"),
        (b"[]", b"", "a list instead of an object"),
        ({"__metadata__": {"a": 1}}, b"", "more than strings"),
        ({"a": []}, b"", "does not hold just"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0", "F4"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "the dtype"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"0", "the shape"),
        ({"a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}, b"0", "the shape"),
        ({"a": {"dtype": "U8", "shape": [0, 1 << 80], "data_offsets": [0, 0]}}, b"", "the shape"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 3]}}, b"000", "takes others"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0]}}, b"00", "data_offsets"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"000", "gap"),
        (
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"000",
            "overlap",
        ),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"0", "shorter"),
    ],
)
def test_wrong_headers_say_what_is_wrong(folder: Path, header: Any, data: bytes, wrong: str) -> None:
    with pytest.raises(CheckpointError, match=wrong):
        read_header(with_header(folder / "x.safetensors", header, data))


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(folder: Path) -> None:
    save_file({"w": torch.randn(100, 100)}, folder / "x.safetensors")
    stored = read_header(folder / "x.safetensors").tensors["w"]
    os.truncate(folder / "x.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"must hold 40000 bytes at .* but ends at 5000"):
        stored.whole()
    with pytest.raises(CheckpointError, match="ends at 5000"):
        stored.read(((0, 100), (0, 1)), torch.zeros(100, 1))
    assert stored.mapped() is None


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def test_no_file_runs_code(folder: Path) -> None:
    mark = folder / "ran"
    torch.save({"w": torch.ones(2), "bomb": Bomb(mark)}, folder / "x.pt")
    for open_any in (open_checkpoint, open_state):
        with pytest.raises(CheckpointError, match=r"needs code .*weights_only=False"):
            open_any(folder / "x.pt", True)
    dcp.save({"w": torch.ones(2), "bomb": Bomb(mark)}, checkpoint_id=folder / "d", no_dist=True)
    with pytest.raises(CheckpointError, match=r"bomb in .*needs code"):
        open_checkpoint(folder / "d", True)
    assert not mark.exists()
    open_checkpoint(folder / "d", False)
    assert mark.exists()


@pytest.mark.parametrize("weights_only", [True, False])
def test_no_index_runs_code(folder: Path, weights_only: bool) -> None:
    """Not even for those who trust it: an index has no need of code."""
    mark = folder / "ran"
    dcp.save({"w": torch.ones(2)}, checkpoint_id=folder / "d", no_dist=True)
    index = folder / "d" / INDEX
    content = pickle.loads(index.read_bytes())
    content.planner_data["bomb"] = Bomb(mark)
    index.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds code: posix\.system"):
        open_checkpoint(folder / "d", weights_only)
    for name in ("getattr", "eval", "__import__"):
        index.write_bytes(b"c__builtin__\n" + name.encode() + b"\n.")
        with pytest.raises(CheckpointError, match="holds code"):
            open_checkpoint(folder / "d", weights_only)
    assert not mark.exists()


def test_a_damaged_folder_is_an_error_that_names_the_file(folder: Path) -> None:
    dcp.save({"w": torch.ones(20), "v": torch.zeros(3, 3)}, checkpoint_id=folder, no_dist=True)
    index, shard = folder / INDEX, folder / "__0_0.distcp"
    content, data = index.read_bytes(), shard.read_bytes()
    for length in range(0, len(content), 7):
        index.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            open_checkpoint(folder, True)
    index.write_bytes(content)
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp must hold \d+ bytes"):
        open_checkpoint(folder, True)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks __0_0\.distcp"):
        open_checkpoint(folder, True)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match=r"must hold a part of 'w' at \d+, but BadZipFile"):
        open_checkpoint(folder, True).tree["w"].whole()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_changed_byte_of_a_folder_is_a_crash(data: st.DataObject) -> None:
    content, shard = small_folder()
    changed = data.draw(st.sampled_from([INDEX, "__0_0.distcp"]))
    files = {INDEX: bytearray(content), "__0_0.distcp": bytearray(shard)}
    at = data.draw(st.integers(0, len(files[changed]) - 1))
    files[changed][at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as name:
        for file, text in files.items():
            (Path(name) / file).write_bytes(text)
        try:
            for value in open_checkpoint(Path(name), True).tree.values():
                in_memory(value)
        except CheckpointError:
            pass


def small_folder(_kept: list[tuple[bytes, bytes]] = []) -> tuple[bytes, bytes]:  # noqa: B006
    if not _kept:
        with tempfile.TemporaryDirectory() as name:
            dcp.save({"w": torch.ones(2, 3), "n": {"k": 5}}, checkpoint_id=name, no_dist=True)
            _kept.append(((Path(name) / INDEX).read_bytes(), (Path(name) / "__0_0.distcp").read_bytes()))
    return _kept[0]


def changed_index(folder: Path, change: Any) -> None:
    content = pickle.loads((folder / INDEX).read_bytes())
    change(content)
    (folder / INDEX).write_bytes(pickle.dumps(content))


def test_an_index_must_describe_whole_tensors_of_its_folder(folder: Path) -> None:
    def saved() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        dcp.save({"w": torch.ones(4, 2)}, checkpoint_id=folder, no_dist=True)

    def shorter(content: Any) -> None:
        content.state_dict_metadata["w"].chunks[0].sizes = torch.Size([3, 2])

    def beyond(content: Any) -> None:
        content.state_dict_metadata["w"].size = torch.Size([2, 4])

    def other_dtype(content: Any) -> None:
        content.state_dict_metadata["w"].properties.dtype = torch.int32

    def outside(content: Any) -> None:
        next(iter(content.storage_data.values())).relative_path = "../__0_0.distcp"

    def nowhere(content: Any) -> None:
        content.storage_data.clear()

    def packed(content: Any) -> None:
        next(iter(content.storage_data.values())).transform_descriptors = ["zstd"]

    for change, wrong in [
        (shorter, "do not make up its shape"),
        (beyond, "do not make up its shape"),
        (outside, "outside of the folder"),
        (nowhere, "does not say where"),
        (packed, "went through zstd"),
    ]:
        saved()
        changed_index(folder, change)
        with pytest.raises(CheckpointError, match=wrong):
            open_checkpoint(folder, True)
    saved()
    changed_index(folder, other_dtype)
    with pytest.raises(CheckpointError, match=r"torch\.int32 .* but it has the shape \[4, 2\] and torch\.float32"):
        open_checkpoint(folder, True).tree["w"].whole()


# -- kinds of checkpoints ---------------------------------------------------------------------------------------------


def names(tree: Any) -> Any:
    """Shapes for tensors."""
    if isinstance(tree, Stored):
        return list(tree.shape)
    if isinstance(tree, dict):
        return {key: names(value) for key, value in tree.items()}
    return tree


def test_a_checkpoint_file_has_its_tensors_stored_but_for_the_runs_own(folder: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    rng = torch.get_rng_state()
    sparse = torch.eye(3).to_sparse()
    torch.save({"model": state, "t": (1, torch.ones(2)), "s": sparse, "fabriclite": {"rng": [rng]}}, folder / "x.ckpt")
    opened = open_checkpoint(folder / "x.ckpt", True)
    assert opened.kind == "file"
    assert names(opened.tree["model"]) == {"weight": [3, 2], "bias": [3]}
    assert isinstance(opened.tree["t"][1], InMemory)
    assert torch.equal(opened.tree["fabriclite"]["rng"][0], rng)
    assert opened.tree["s"].is_sparse
    assert names(open_state(folder / "x.ckpt", True).tensors) == {"weight": [3, 2], "bias": [3]}


def test_our_folder_is_nested_again(folder: Path) -> None:
    flat = {
        "my%2Emodel.a.weight": torch.ones(2, 3),
        "opt.state.a.weight.exp_avg": torch.ones(2, 3),
        "opt.state.b.exp_avg": torch.ones(3),
    }
    dcp.save(flat, checkpoint_id=folder, no_dist=True)
    rest = {
        "my.model": {"_extra_state": {"n": torch.ones(1)}},
        "opt": {"state": {"a.weight": {"step": torch.ones(())}}, "param_groups": [{"params": ["a.weight", "b"]}]},
        "epoch": 3,
        "fabriclite": {"version": 1, "rng": [torch.ones(1)]},
    }
    torch.save(rest, folder / "meta.pt")
    opened = open_checkpoint(folder, True)
    assert opened.kind == "folder"
    tree = opened.tree
    assert names(tree["my.model"]) == {"_extra_state": {"n": [1]}, "a.weight": [2, 3]}
    moments = {"a.weight": {"step": [], "exp_avg": [2, 3]}, "b": {"exp_avg": [3]}}
    assert names(tree["opt"]) == {"state": moments, "param_groups": [{"params": ["a.weight", "b"]}]}
    assert tree["epoch"] == 3
    assert isinstance(tree["fabriclite"]["rng"][0], Tensor)
    state = open_state(folder, True)
    assert names(state.tensors) == {"a.weight": [2, 3]}
    assert names(state.other) == {"_extra_state": {"n": [1]}}
    torch.save({"fabriclite": {}}, folder / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt must have an entry 'my\.model'"):
        open_checkpoint(folder, True)


LIGHTNING = """
import os, sys, torch, warnings
warnings.simplefilter("ignore")
import lightning_fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

def shard(model, mesh):
    return fully_shard(model, mesh=mesh["data_parallel"])

path = sys.argv[1]
for sharded in (True, False):
    strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1,
                                     save_distributed_checkpoint=sharded)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model = fabric.setup_module(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    adam = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    adam.step()
    sgd = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
    state = {"model": model, "adam": adam, "sgd": sgd, "epoch": 3, "misc": {"a": [1, torch.ones(2)]}}
    fabric.save(f"{path}/{'folder' if sharded else 'file'}", state)
    fabric.barrier()
os._exit(0)  # gloo may abort a process that ends in the usual way
"""


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lightning_fabric")
    path = tmp_path_factory.mktemp("lightning")
    (path / "save.py").write_text(LIGHTNING)
    env = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD_SIZE" not in k and "MASTER" not in k}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(path / "save.py"), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


def test_what_lightning_fabric_saved(lightning: Path) -> None:
    folder, file = (open_checkpoint(lightning / kind, True) for kind in ("folder", "file"))
    assert (folder.kind, file.kind) == ("folder", "file")
    shapes = {"0.weight": [5, 4], "0.bias": [5], "1.weight": [3, 5], "1.bias": [3]}
    for tree in (folder.tree, file.tree):
        assert names(tree["model"]) == shapes
        assert tree["epoch"] == 3
        assert names(tree["misc"]) == {"a": [1, tree["misc"]["a"][1]]}
        assert names(tree["adam"]["state"]["1.weight"]) == {"step": [], "exp_avg": [3, 5], "exp_avg_sq": [3, 5]}
        assert tree["adam"]["param_groups"][0]["params"] == list(shapes)
        assert tree["adam"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert tree["sgd"]["param_groups"][0]["lr"] == 0.5
        assert "state" in tree["sgd"]
    for name in shapes:
        assert torch.equal(folder.tree["model"][name].whole(), file.tree["model"][name].whole())
        one, other = (opened.tree["adam"]["state"][name]["exp_avg"] for opened in (folder, file))
        assert torch.equal(one.whole(), other.whole())
    assert len(folder.tree["model"]["0.weight"].extents) == 2
    for kind in ("folder", "file"):
        assert names(open_state(lightning / kind, True).tensors) == shapes


def test_a_folder_of_torch_is_nested_as_it_was(folder: Path) -> None:
    state = {
        "model": {"a.b": torch.ones(2), "c": torch.ones(1)},
        "opt": {"state": {}, "param_groups": [{"lr": 0.1, "params": ["a.b"]}]},
        "list": [torch.ones(1), {"x": torch.ones(3)}, "s"],
        "pair": (torch.ones(4), 2),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    tree = open_checkpoint(folder, True).tree
    assert names(tree["model"]) == {"a.b": [2], "c": [1]}
    assert tree["opt"] == state["opt"]
    assert [names(item) for item in tree["list"]] == [[1], {"x": [3]}, "s"]
    assert isinstance(tree["pair"], tuple)
    assert names(tree["pair"][0]) == [4]
    assert names(open_state(folder, True).tensors) == {"a.b": [2], "c": [1]}


def test_state_of_one_module(folder: Path) -> None:
    weights = {"w": torch.ones(2), "x._extra_state": {"amax": torch.ones(1)}}
    optimizer = {"state": {0: {"m": torch.ones(2)}}, "param_groups": []}

    def state_of(content: Any) -> Any:
        torch.save(content, folder / "x.bin")
        return open_state(folder / "x.bin", True)

    for content in (
        weights,
        {"model": weights, "optimizer": optimizer, "epoch": 1},
        {"m": weights, "rng": torch.ones(9)},
    ):
        state = state_of(content)
        assert names(state.tensors) == {"w": [2]}
        assert names(state.other) == {"x._extra_state": {"amax": [1]}}
        assert state.files == [folder / "x.bin"]
    assert state_of({}).tensors == {}
    with pytest.raises(CheckpointError, match="holds 2: a, b"):
        state_of({"a": weights, "b": weights})
    with pytest.raises(CheckpointError, match="has no tensors under epoch"):
        state_of({"epoch": 3})
    with pytest.raises(CheckpointError, match="must hold a dictionary, but holds list"):
        state_of([1])


def test_folders_of_hugging_face(folder: Path) -> None:
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3)}
    torch.save({**one, **two, "old": torch.ones(1)}, folder / "pytorch_model.bin")
    assert set(open_state(folder, True).tensors) == {"a", "b", "old"}
    for suffix, save in ((".bin", torch.save), (".safetensors", save_file)):
        stem = "pytorch_model" if suffix == ".bin" else "model"
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        save(one, folder / f"{stem}-1{suffix}")
        save(two, folder / f"{stem}-2{suffix}")
        index = folder / f"{stem}{suffix}.index.json"
        where = {"a": f"{stem}-1{suffix}", "b": f"{stem}-2{suffix}"}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        state = open_state(folder, True)
        assert names(state.tensors) == {"a": [2], "b": [3]}
        assert state.files == [folder / name for name in where.values()]
        index.write_text(json.dumps({"weight_map": {**where, "c": where["a"]}}))
        with pytest.raises(CheckpointError, match=f"{stem}-1{suffix} must hold 'c', as .*index.json says"):
            open_state(folder, True)
        index.write_text(json.dumps({"weight_map": {"a": "gone"}}))
        with pytest.raises(CheckpointError, match=r"index\.json must name files that are there, but .*gone is missing"):
            open_state(folder, True)
        for broken in ("{", "[]", '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}'):
            index.write_text(broken)
            with pytest.raises(CheckpointError, match=r"index\.json must"):
                open_state(folder, True)
    save_file({"best": torch.ones(1)}, folder / "model.safetensors")
    assert set(open_state(folder, True).tensors) == {"best"}
    shutil.rmtree(folder)
    folder.mkdir()
    save_file({"d": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    assert set(open_state(folder, True).tensors) == {"d"}


def test_what_is_no_checkpoint_is_said(folder: Path) -> None:
    for open_any in (open_checkpoint, open_state):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_any(folder / "gone", True)
        (folder / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="but is empty"):
            open_any(folder / "empty", True)
        (folder / "notes.txt").write_text("hello")
        with pytest.raises(CheckpointError, match=r"must be a folder with .*, but holds empty, notes\.txt"):
            open_any(folder, True)
        with pytest.raises(CheckpointError, match="must be a readable checkpoint file"):
            open_any(folder / "notes.txt", True)
    save_file({"w": torch.ones(1)}, folder / "w.safetensors")
    with pytest.raises(CheckpointError, match="weights of one module"):
        open_checkpoint(folder / "w.safetensors", True)


def test_every_cut_of_a_torch_file_is_an_error(folder: Path) -> None:
    torch.save({"w": torch.randn(100)}, folder / "x.pt")
    content = (folder / "x.pt").read_bytes()
    for length in range(0, len(content), 97):
        (folder / "x.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.pt must be a readable checkpoint file"):
            open_checkpoint(folder / "x.pt", True)


def test_parts_that_are_no_plain_tensors_are_refused(folder: Path) -> None:
    dcp.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError, match="it is no plain tensor"):
        open_checkpoint(folder, True).tree["w"].whole()

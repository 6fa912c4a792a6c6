"""What is left of checkpoints when something breaks: nothing is lost, nothing is garbage, nothing hangs.

Every fault is real. Processes are killed at each step of a save, disks are full, bytes change, permissions lack; what
is on the disk then is looked at by a process that had no part in it.
"""

import ctypes
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import faults
from fabriclite import CheckpointError, Fabric
from fabriclite.checkpoint import sums
from fabriclite.checkpoint.formats import Safetensors
from fabriclite.checkpoint.place import found
from faults import Ended, Nursery, Slow, Step, alone, everywhere, same, state, told, watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

FORMS: dict[str, Any] = {"file": "file", "folder": "folder", "export": Safetensors(max_file_bytes=100)}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    one = Nursery()
    yield one
    one.close()


# -- killed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A series of two, ``step-1`` and ``step-2``. A process saves ``step-2`` anew, to keep that alone, and is killed.

    Attributes:
        template: the series as it was before.
        first: what ``step-1`` holds.
        old: what ``step-2`` holds.
        new: what the process saves.
        steps: of a process that is not killed.
    """

    template: Path
    first: Any
    old: Any
    new: Any
    steps: list[Step]

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.template, to, symlinks=True)
        return to

    def published_by(self, count: int) -> bool:
        """Whether the first ``count`` steps give ``step-2`` its new content."""
        return any(step.act == "rename" and step.to == "step-2" for step in self.steps[:count])

    def chosen(self) -> list[int]:
        """Every step, but of writes to a file and of removals from a folder only some: they differ in little."""
        alike: dict[str, list[int]] = {}
        for place, step in enumerate(self.steps):
            what = step.path if step.act == "write" else step.path.partition("/")[0] if step.act == "remove" else place
            alike.setdefault(f"{step.act} {what}", []).append(place)
        return sorted(
            {place for places in alike.values() for place in (places[0], places[len(places) // 2], places[-1])}
        )


def content(path: Path) -> Any:
    """All that is in a checkpoint, by name."""
    if (found(path) / "checksums.json").exists() and not (found(path) / ".metadata").exists():
        module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        alone().load_raw(path, module)
        return module.state_dict()
    return alone().load(path)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def to_save(fabric: Fabric, seed: int, form: str) -> dict[str, Any]:
    objects = state(fabric, seed)
    return {"model": objects["model"]} if form == "export" else objects


def save_and_wait(
    fabric: Fabric, path: Path, objects: dict[str, Any], form: str | None, asynchronous: bool, keep: int | None = None
) -> None:
    """Save, and do not go on beside it."""
    handle = fabric.save(path, objects, format=form and FORMS[form], keep_last=keep, asynchronous=asynchronous)
    assert (handle is not None) == asynchronous
    if handle is not None:
        handle.wait()


def save_a_series(run: Path, forms: tuple[str, str]) -> None:
    fabric = alone()
    for seed, form in enumerate(forms, start=1):
        fabric.save(run / f"step-{seed}", to_save(fabric, seed, form), format=FORMS[form], keep_last=2)


def save_anew(run: Path, form: str, asynchronous: bool, killed_at: int | None) -> list[Step]:
    fabric, steps = alone(), []
    objects = to_save(fabric, 3, form)

    def note(step: Step) -> bool:
        steps.append(step)
        return len(steps) - 1 == killed_at

    watch(run, note)
    save_and_wait(fabric, run / "step-2", objects, form, asynchronous, keep=1)
    return steps


def check_is_whole(run: Path, scenario: Scenario, published: bool, next_name: str, form: str) -> None:
    """What a process that comes after the killed one finds, and that its save clears what it left."""
    expected = scenario.new if published else scenario.old
    assert same(content(run / "step-2"), expected)
    assert same(content(run / "latest"), expected)
    if (run / "step-1").exists():
        assert same(content(run / "step-1"), scenario.first)
    else:
        assert published, "an old one is removed before the new one is whole"
    fabric = alone()
    keep = 1 if next_name == "step-3" else None
    fabric.save(run / next_name, to_save(fabric, 4, form), format=FORMS[form], keep_last=keep)
    left = [name for name in names(run) if name.startswith(".")]
    assert [name for name in left if keep or not name.startswith(".step-1.")] == []  # without it, step-1 is no concern
    if keep:
        assert names(run) == ["latest", next_name]
    assert not same(content(run / next_name), expected)


KILLED = [
    (("file", "file"), "file", False),
    (("file", "file"), "file", True),
    (("folder", "folder"), "folder", False),
    (("folder", "folder"), "folder", True),
    (("folder", "folder"), "file", False),
    (("file", "file"), "folder", False),
    (("export", "export"), "export", False),
]


@pytest.mark.parametrize(("before", "form", "asynchronous"), KILLED)
def test_killed_at_every_step(
    nursery: Nursery, tmp_path: Path, before: tuple[str, str], form: str, asynchronous: bool
) -> None:
    """One process after the other is killed, each at a later step."""
    template = tmp_path / "template"
    save_a_series(template, before)
    first, old = content(template / "step-1"), content(template / "step-2")
    shutil.copytree(template, tmp_path / "whole", symlinks=True)
    steps = nursery.child(save_anew, tmp_path / "whole", form, asynchronous, None).value
    scenario = Scenario(template, first, old, content(tmp_path / "whole" / "step-2"), steps)
    assert not same(scenario.old, scenario.new)
    assert names(tmp_path / "whole") == ["latest", "step-2"]
    chosen = scenario.chosen()
    if asynchronous:  # the same steps, in another thread
        chosen = chosen[1::2]
    if form != before[1]:  # until it takes the name, the other form makes no difference
        chosen = [place for place in chosen if "rename" in {step.act for step in steps[: place + 1]}]
    for place in chosen:
        run = scenario.copy(tmp_path / f"at-{place}")
        ended = nursery.child(save_anew, run, form, asynchronous, place)
        left = names(run)
        try:
            assert ended.code == -9, ended
            check_is_whole(run, scenario, scenario.published_by(place), f"step-{2 + place % 2}", form)
        except Exception as error:
            raise AssertionError(f"killed at step {place}, {scenario.steps[place]}, leaving {left}") from error
        shutil.rmtree(run)


STAGES: dict[str, Callable[[Step], bool]] = {
    "before anything": lambda step: True,
    "within a shard": lambda step: step.act == "write" and step.path.endswith(".distcp"),
    "after the shards": lambda step: step.act == "open" and step.path.endswith(".metadata.tmp"),
    "after the index": lambda step: step.act == "open" and step.path.endswith("meta.pt"),
    "within the rest": lambda step: step.act == "write" and step.path.endswith("meta.pt"),
    "before the checksums": lambda step: step.act == "open" and step.path.endswith("checksums.json"),
    "before it is published": lambda step: step.act == "rename" and step.to == ".step-2.replaced",
    "between the renames": lambda step: step.act == "rename" and step.to == "step-2",
    "before the older one goes": lambda step: step.act == "remove" and step.path.startswith(".step-2.replaced"),
    "before latest": lambda step: step.act == "rename" and step.to == "latest",
    "while step-1 goes": lambda step: step.path == ".step-1.removing/meta.pt",
}
LAST_TOGETHER = list(STAGES).index("before it is published")
"""From here on rank 0 works alone; what it began it ends, whoever is killed."""
BY_RANK_ZERO = [
    *((stage, "0") for stage in STAGES),
    *((stage, "1") for stage in ("before anything", "within a shard", "after the index", "between the renames")),
    *((stage, "all") for stage in ("within a shard", "before the checksums", "between the renames")),
]


def save_series_on_ranks(fabric: Fabric, runs: list[Path]) -> None:
    for seed in (1, 2):
        for run in runs:
            fabric.save(run / f"step-{seed}", state(fabric, seed), keep_last=2)
    fabric.save(runs[1] / "step-2", state(fabric, 3), keep_last=1)


def save_anew_on_ranks(fabric: Fabric, run: Path, watcher: int, stage: str, victims: str, asynchronous: bool) -> None:
    objects = state(fabric, 3)
    processes = everywhere(fabric, os.getpid())
    doomed = [pid for rank, pid in enumerate(processes) if victims in (str(rank), "all")]

    def note(step: Step) -> bool:
        if not STAGES[stage](step):
            return False
        for pid in doomed:
            if pid != os.getpid():
                with suppress(ProcessLookupError):  # it was told by an earlier step
                    os.kill(pid, signal.SIGKILL)
        return os.getpid() in doomed

    if fabric.global_rank == watcher:
        watch(run, note)
    save_and_wait(fabric, run / "step-2", objects, None, asynchronous, keep=1)


@pytest.fixture(scope="module")
def on_two(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Saved by two ranks."""
    folder = tmp_path_factory.mktemp("on-two")
    ended = nursery.world(2, save_series_on_ranks, [folder / "template", folder / "whole"])
    assert ended.code == 0, ended.error
    contents = [content(folder / name) for name in ("template/step-1", "template/step-2", "whole/step-2")]
    return Scenario(folder / "template", *contents, steps=[])


def kill_ranks(
    nursery: Nursery, scenario: Scenario, run: Path, watcher: int, stage: str, victims: str, *, asynchronous: bool
) -> None:
    scenario.copy(run)
    begun = time.monotonic()
    ended = nursery.world(2, save_anew_on_ranks, run, watcher, stage, victims, asynchronous)
    assert time.monotonic() - begun < faults.PATIENCE_S + 10
    assert ended.code == 1, "all ranks ended well"
    for rank in ("0", "1"):
        if victims in (rank, "all"):
            assert re.search(rf"ank {rank} o[fn] .* was ended by signal 9 \(SIGKILL\)", ended.error), ended.error
        else:
            assert not re.search(rf"ank {rank} o[fn] .* was ended", ended.error), ended.error
    position = list(STAGES).index(stage)
    published = position >= LAST_TOGETHER if victims == "1" else stage in list(STAGES)[LAST_TOGETHER + 2 :]
    if not published:
        assert stage == "before anything" or ".step-2.writing" in names(run), names(run)
    check_is_whole(run, scenario, published, "step-3", "folder")


@pytest.mark.parametrize(("stage", "victims"), BY_RANK_ZERO)
def test_ranks_are_killed_while_rank_zero(
    nursery: Nursery, on_two: Scenario, tmp_path: Path, stage: str, victims: str
) -> None:
    """Rank 0 comes to a stage of the save, and then it, the other one, or both are killed."""
    kill_ranks(nursery, on_two, tmp_path / "run", 0, stage, victims, asynchronous=False)


@pytest.mark.parametrize("victims", ["0", "1"])
def test_ranks_are_killed_while_rank_one_writes(
    nursery: Nursery, on_two: Scenario, tmp_path: Path, victims: str
) -> None:
    kill_ranks(nursery, on_two, tmp_path / "run", 1, "within a shard", victims, asynchronous=False)


@pytest.mark.parametrize(("stage", "victims"), [("within a shard", "0"), ("within the rest", "1")])
def test_ranks_are_killed_beside_the_training(
    nursery: Nursery, on_two: Scenario, tmp_path: Path, stage: str, victims: str
) -> None:
    kill_ranks(nursery, on_two, tmp_path / "run", 0, stage, victims, asynchronous=True)


# -- damaged -----------------------------------------------------------------------------------------------------------


def values(objects: Mapping[str, Any]) -> Any:
    """Copies of what a model and an optimizer hold."""
    states = {key: objects[key].state_dict() for key in ("model", "optimizer")}
    return faults.copied({**states, "step": objects["step"]})


class Damaged:
    """A checkpoint whose bytes are changed and put back, and objects that refuse to load it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fabric = alone()
        saved = state(self.fabric, 1)
        self.fabric.save(folder / "one.pt", saved, format="file")
        self.fabric.save(folder / "several", saved, format="folder")
        self.fabric.save(folder / "other", state(self.fabric, 2), format="folder")
        self.fabric.save(folder / "export", {"model": saved["model"]}, format=FORMS["export"])
        self.saved = values(saved)
        self.objects = state(self.fabric, 9)
        self.before = values(self.objects)

    def load(self, path: Path) -> str | None:
        """What the error says; then nothing has changed. ``None``: it has loaded, and just what was saved."""
        return self._tried(lambda: self.fabric.load(path, self.objects))

    def load_weights(self, path: Path) -> str | None:
        """The same of an export."""
        self.saved, both = {**self.before, "model": self.saved["model"]}, self.saved
        try:
            return self._tried(lambda: self.fabric.load_raw(path, self.objects["model"]))
        finally:
            self.saved = both

    def _tried(self, act: Callable[[], Any]) -> str | None:
        [said] = told(self.fabric, act)
        if said is not None:
            assert said.startswith("CheckpointError: "), said
            assert same(values(self.objects), self.before), f"half of it is loaded, though: {said}"
            return said
        assert same(values(self.objects), self.saved), "it is garbage"
        self.objects = state(self.fabric, 9)
        return None


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(tmp_path_factory.mktemp("damaged"))


@contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    """Other bytes in ``file``, or no file, for a while."""
    before = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


FILES = ["one.pt", *(f"several/{name}" for name in ("__0_0.distcp", ".metadata", "meta.pt", "checksums.json"))]
EXPORTED = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FILES)
def test_cut_short(damaged: Damaged, name: str) -> None:
    file = damaged.folder / name
    content = file.read_bytes()
    for length in (0, 1, 10, len(content) // 3, len(content) // 2, len(content) - 30, len(content) - 1):
        with changed(file, content[:length]):
            said = damaged.load(damaged.folder / name.partition("/")[0])
            assert said is not None, f"{length} of {len(content)} bytes are taken for all"
            assert str(file) in said, said
    assert damaged.load(damaged.folder / name.partition("/")[0]) is None


@pytest.mark.parametrize("name", FILES)
def test_one_bit_differs(damaged: Damaged, name: str) -> None:
    file = damaged.folder / name
    content = file.read_bytes()
    dice = random.Random(name)
    places = [dice.randrange(len(content)) for _ in range(25)]
    places += [dice.randrange(min(300, len(content))) + len(content) - min(300, len(content)) for _ in range(10)]
    refused = 0
    for place in places:
        wrong = bytearray(content)
        wrong[place] ^= 1 << dice.randrange(8)
        with changed(file, bytes(wrong)):
            said = damaged.load(damaged.folder / name.partition("/")[0])
        assert said is None or str(file) in said, said
        refused += said is not None
    assert refused >= (10 if name == "one.pt" else len(places)), f"{refused} of {len(places)} were noticed"


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_are_damaged(damaged: Damaged, name: str) -> None:
    """What describes the values is looked at by every load; the values themselves by their checksums."""
    folder = damaged.folder / "export"
    file = folder / name
    content = file.read_bytes()
    for length in (0, 7, 8, len(content) // 2, len(content) - 1):
        with changed(file, content[:length]):
            said = damaged.load_weights(folder)
            assert said is not None, f"{length} of {len(content)} bytes are taken for all"
            assert str(file) in said, said
            with pytest.raises(CheckpointError, match=name):
                sums.verify(folder)
    header = len(content) if name.endswith("json") else 8 + int.from_bytes(content[:8], "little")
    dice = random.Random(name)
    for place in (*(dice.randrange(header) for _ in range(30)), *(dice.randrange(len(content)) for _ in range(10))):
        wrong = bytearray(content)
        wrong[place] ^= 1 << dice.randrange(8)
        with changed(file, bytes(wrong)):
            with pytest.raises(CheckpointError, match=name):
                sums.verify(folder)
            if place < header:
                damaged.load_weights(folder)  # checks that it is refused, or without effect
    with changed(file, None):
        assert str(file) in (damaged.load_weights(folder) or "") or name.endswith("json")
    assert damaged.load_weights(folder) is None


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_is_missing(damaged: Damaged, name: str) -> None:
    with changed(damaged.folder / name, None):
        said = damaged.load(damaged.folder / "several")
    assert said is not None
    assert str(damaged.folder / name) in said
    assert "missing" in said


def test_index_and_checksums_are_missing(damaged: Damaged) -> None:
    """Without its list a folder still needs all that makes it one."""
    folder = damaged.folder / "several"
    for name in (".metadata", "meta.pt"):
        with changed(folder / name, None), changed(folder / "checksums.json", None):
            said = damaged.load(folder)
        assert said is not None
        assert str(folder) in said


@pytest.mark.parametrize("name", ["__0_0.distcp", "meta.pt", "checksums.json"])
def test_mixed_from_two(damaged: Damaged, name: str) -> None:
    """One file is of another save, of the same sizes. (The indices of both are equal.)"""
    file = damaged.folder / "several" / name
    with changed(file, (damaged.folder / "other" / name).read_bytes()):
        said = damaged.load(damaged.folder / "several")
    assert said is not None
    assert "damaged" in said
    assert str(damaged.folder / "several") in said


def test_no_checkpoint_at_all(damaged: Damaged, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "latest").symlink_to("step-7")
    for name in ("empty", "foreign", "text", "nothing"):
        assert str(tmp_path / name) in (damaged.load(tmp_path / name) or "")
    assert str(tmp_path / "step-7") in (damaged.load(tmp_path / "latest") or "")
    assert names(tmp_path) == ["empty", "foreign", "latest", "text"]


def load_on_ranks(fabric: Fabric, paths: list[Path]) -> list[tuple[list[str | None], bool]]:
    """For each path what every rank was told, and whether any model or optimizer has changed."""
    objects, found = state(fabric, 9), []
    before = values(objects)
    for path in paths:
        said = told(fabric, lambda: fabric.load(path, objects))  # noqa: B023  # called at once
        found.append((said, all(everywhere(fabric, same(values(objects), before)))))
    return found


def test_every_rank_is_told(nursery: Nursery, on_two: Scenario, tmp_path: Path) -> None:
    """What one rank alone would notice."""
    runs = [on_two.copy(tmp_path / f"{number}") / "step-2" for number in range(4)]
    shard = runs[0] / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-5] + b"wrong")
    (runs[1] / "__1_0.distcp").unlink()
    (runs[2] / "meta.pt").write_bytes(b"")
    os.truncate(runs[3] / ".metadata", 10)
    for (said, unchanged), file in zip(
        nursery.world(2, load_on_ranks, runs).value,
        ("__1_0.distcp", "__1_0.distcp", "meta.pt", ".metadata"),
        strict=True,
    ):
        assert unchanged
        for text in said:
            assert text is not None, "a rank raised nothing"
            assert file in text


# -- of another kind ---------------------------------------------------------------------------------------------------

MISFITS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a wider model": ({"width": 7}, ("0.weight: (7, 4) here, (6, 4) in", "0.bias: (7,) here", "1.weight: (2, 7)")),
    "another optimizer": ({"kind": "sgd"}, ("betas", "dampening")),
    "a deeper model": ({"layers": 3}, ("missing: ['2.weight', '2.bias']", "unexpected: none")),
    "a flatter model": ({"layers": 1}, ("missing: none", "unexpected: ['1.weight', '1.bias']")),
}


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, misfit: str, form: str) -> None:
    """Also where the model would take its part, and the optimizer, loaded later, would not."""
    fabric, (other, says) = alone(), MISFITS[misfit]
    fabric.save(tmp_path / "c", state(fabric, 1), format=FORMS[form])
    objects = state(fabric, 2, **other)
    before = values(objects)
    [said] = told(fabric, lambda: fabric.load(tmp_path / "c", objects))
    assert said is not None
    assert all(text in said for text in says), said
    assert same(values(objects), before)


def test_an_entry_is_missing(tmp_path: Path) -> None:
    fabric = alone()
    objects = state(fabric, 1)
    fabric.save(tmp_path / "c", {"model": objects["model"], "step": 7})
    before = values(objects)
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        fabric.load(tmp_path / "c", objects)
    assert same(values(objects), before)


def test_ranks_refuse_together(nursery: Nursery, on_two: Scenario, tmp_path: Path) -> None:
    """Sharded: a model that fits, with an optimizer that does not."""
    ended = nursery.world(2, refuse_on_ranks, on_two.template / "step-2")
    for said, unchanged in ended.value:
        assert unchanged
        for text in said:
            assert text is not None, "a rank raised nothing"
            assert "CheckpointError" in text


def refuse_on_ranks(fabric: Fabric, path: Path) -> list[tuple[list[str | None], bool]]:
    found = []
    for other, _ in MISFITS.values():
        objects = state(fabric, 9, **other)
        before = values(objects)
        said = told(fabric, lambda: fabric.load(path, objects))  # noqa: B023  # called at once
        found.append((said, all(everywhere(fabric, same(values(objects), before)))))
    return found


def load_in_another_world(fabric: Fabric, path: Path) -> tuple[Any, bool]:
    """All that was loaded, whole, and whether random numbers go on from where they were."""
    objects = state(fabric, 9)
    torch.manual_seed(123 + fabric.global_rank)
    here = torch.get_rng_state()
    fabric.load(path, objects)
    stayed = everywhere(fabric, torch.equal(torch.get_rng_state(), here))
    assert len(set(stayed)) == 1, "the ranks do not agree"
    again = path.with_name(f"again-{fabric.world_size}")
    fabric.save(again, objects)
    return fabric.load(again), stayed[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_loaded_by_another_number_of_ranks(nursery: Nursery, on_two: Scenario, tmp_path: Path, size: int) -> None:
    path = on_two.copy(tmp_path / "run") / "step-2"
    whole, stayed = nursery.world(size, load_in_another_world, path).value
    assert same(whole, on_two.old)
    assert stayed == (size != 2)


# -- no room -----------------------------------------------------------------------------------------------------------

SMALL, LARGE = 4000, 12000
"""Bytes that a file may have: too few for any shard, or for all but ``meta.pt`` with the states of generators."""


@contextmanager
def limited(size: int) -> Iterator[None]:
    """What python gets instead of more bytes is an ``OSError``, as from a full disk: it ignores the signal.

    It ends before the process does, which may have files of its own to write then (coverage).
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_without_room(run: Path, form: str, size: int, asynchronous: bool) -> list[str | None]:
    fabric = alone()
    objects = to_save(fabric, 3, form)
    with limited(size):
        said = told(fabric, lambda: save_and_wait(fabric, run / "step-2", objects, form, asynchronous))
    return [*said, *told(fabric, lambda: fabric.load(run / "step-2"))]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("form", "size"), [("file", SMALL), ("file", 0), ("folder", SMALL), ("folder", LARGE)])
def test_no_room(nursery: Nursery, tmp_path: Path, form: str, size: int, asynchronous: bool) -> None:
    save_a_series(tmp_path, (form, form))
    old, before = content(tmp_path / "step-2"), names(tmp_path)
    ended = nursery.child(save_without_room, tmp_path, form, size, asynchronous)
    assert ended.code == 0, ended
    said, later = ended.value
    assert said.startswith("CheckpointError: ")
    assert "File too large" in said
    assert f"{tmp_path}/.step-2.writing" in said
    assert later is None, "it was told already"
    assert names(tmp_path) == before
    assert same(content(tmp_path / "step-2"), old)


def test_no_room_for_an_export(nursery: Nursery, tmp_path: Path) -> None:
    save_a_series(tmp_path, ("export", "export"))
    old, before = content(tmp_path / "step-2"), names(tmp_path)
    for size in (0, 100, 250, 350):
        ended = nursery.child(save_without_room, tmp_path, "export", size, False)
        assert ended.code == 0, ended
        assert ended.value[0].startswith("CheckpointError: ")
        assert "File too large" in ended.value[0]
        assert names(tmp_path) == before
    assert same(content(tmp_path / "step-2"), old)


def save_on_ranks_without_room(fabric: Fabric, run: Path, rank: int, size: int, asynchronous: bool) -> list[Any]:
    objects = state(fabric, 3)
    with limited(size) if fabric.global_rank == rank else nullcontext():
        return told(fabric, lambda: save_and_wait(fabric, run / "step-2", objects, None, asynchronous))


@pytest.mark.parametrize(
    ("rank", "size", "asynchronous"), [(0, SMALL, False), (0, LARGE, False), (1, 1000, False), (1, 1000, True)]
)
def test_no_room_on_one_rank(
    nursery: Nursery, on_two: Scenario, tmp_path: Path, rank: int, size: int, asynchronous: bool
) -> None:
    run = on_two.copy(tmp_path / "run")
    before = names(run)
    ended = nursery.world(2, save_on_ranks_without_room, run, rank, size, asynchronous)
    assert ended.code == 0, ended.error
    for text in ended.value:
        assert text is not None, "a rank raised nothing"
        assert text.startswith("CheckpointError: ")
        assert "File too large" in text
        assert f"ank {rank} " in text
    assert names(run) == before
    assert same(content(run / "step-2"), on_two.old)


def tell_later(run: Path, call: str) -> tuple[list[str | None], list[str | None]]:
    """An asynchronous save that fails, told by the next call; and that call again."""
    fabric = alone()
    objects = state(fabric, 3)
    calls = {"load": lambda: fabric.load(run / "step-2"), "save": lambda: fabric.save(run / "step-2", {"step": 9})}
    with limited(SMALL):
        fabric.save(run / "step-2", objects, asynchronous=True)
        first = told(fabric, calls[call])
    return first, told(fabric, calls["load"])


@pytest.mark.parametrize("call", ["load", "save"])
def test_the_next_call_tells_of_a_save_that_failed(nursery: Nursery, tmp_path: Path, call: str) -> None:
    save_a_series(tmp_path, ("file", "file"))
    old = content(tmp_path / "step-2")
    ended = nursery.child(tell_later, tmp_path, call)
    assert ended.code == 0, ended
    [said], [later] = ended.value
    assert "The asynchronous save of" in said
    assert "File too large" in said
    assert later is None
    assert same(content(tmp_path / "step-2"), old)


def fill_a_disk(mount: Path, form: str, asynchronous: bool) -> list[tuple[int, str | None, list[str], bool]]:
    """On a file system of 256 KB: with ever more of it taken, save, and look at what is there then."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):
        return []
    if libc.mount(b"none", os.fsencode(mount), b"tmpfs", 0, b"size=256k"):
        return []
    fabric, outcomes = alone(), []
    save_a_series(mount, (form, form))
    expected = content(mount / "step-2")
    for free in range(0, 60, 4):
        with (mount / "ballast").open("wb") as file:
            room = os.statvfs(mount)
            file.truncate(max(0, room.f_bavail * room.f_frsize - free * 1024))
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - free * 1024))
        save = partial(save_and_wait, fabric, mount / "step-2", state(fabric, 10 + free), form, asynchronous)
        [said] = told(fabric, save)
        (mount / "ballast").unlink()
        now = content(mount / "step-2")
        outcomes.append((free, said, names(mount), same(now, expected) == (said is not None)))
        expected = now
    return outcomes


@pytest.mark.parametrize(("form", "asynchronous"), [("file", False), ("folder", False), ("folder", True)])
def test_a_full_disk(nursery: Nursery, tmp_path: Path, form: str, asynchronous: bool) -> None:
    ended = nursery.child(fill_a_disk, tmp_path, form, asynchronous)
    assert ended.code == 0, ended
    if not ended.value:
        pytest.skip("a file system cannot be mounted here")
    refusals = [said for _, said, _, _ in ended.value if said is not None]
    assert 2 <= len(refusals) < len(ended.value), ended.value
    for text in refusals:
        assert text.startswith("CheckpointError: ")
        assert "No space left on device" in text
    for free, _, left, right in ended.value:
        assert left == ["latest", "step-1", "step-2"], f"{free} KB free"
        assert right, f"{free} KB free"


# -- not allowed -------------------------------------------------------------------------------------------------------

NOBODY = 65534


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user may enter: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(act: str, run: Path, form: str | None = None) -> list[str | None]:
    """What a user without any rights is told."""
    fabric = alone()
    objects = state(fabric, 3)
    before = values(objects)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        if act == "load":
            said = told(fabric, lambda: fabric.load(run / "step-2", objects))
        else:
            keep = 1 if act == "keep one" else None
            name = "step-3" if keep else "step-2"
            said = told(fabric, lambda: fabric.save(run / name, objects, format=form and FORMS[form], keep_last=keep))
    finally:
        os.seteuid(user)  # the process may have files of its own to write when it ends (coverage)
    assert same(values(objects), before)
    return said


def refused(ended: Ended, *says: str) -> None:
    assert ended.code == 0, ended
    assert ended.error is None, ended.error
    [said] = ended.value
    assert said is not None, "nothing was raised"
    assert said.startswith("CheckpointError: "), said
    for text in says:
        assert text in said, said


LOCKED: dict[str, tuple[int, dict[str, int]]] = {
    "no file may be made": (0o555, {}),
    "it may not be entered": (0o600, {}),
    "another's may not be moved": (0o1777, {}),
    "the older one may not be emptied": (0o777, {"step-2": 0o555}),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of another user")
@pytest.mark.parametrize(
    ("lock", "form"),
    [(lock, form) for lock in LOCKED for form in ("file", "folder") if form == "folder" or not LOCKED[lock][1]],
)
def test_saving_is_not_allowed(nursery: Nursery, public: Path, lock: str, form: str) -> None:
    mode, inside = LOCKED[lock]
    run = public / "run"
    save_a_series(run, (form, form))
    old, before = content(run / "step-2"), names(run)
    for name, bits in inside.items():
        (run / name).chmod(bits)
    run.chmod(mode)
    ended = nursery.child(as_nobody, "save", run, form)
    run.chmod(0o755)
    refused(ended, f"{run}/", "step-2", "Error: ")
    assert names(run) == before
    assert same(content(run / "step-2"), old)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of another user")
def test_an_old_one_that_may_not_go_stays_whole(nursery: Nursery, public: Path) -> None:
    """The new one is there, and the error names the old one."""
    run = public / "run"
    save_a_series(run, ("folder", "folder"))
    first, second = content(run / "step-1"), content(run / "step-2")
    run.chmod(0o777)
    refused(nursery.child(as_nobody, "keep one", run, "folder"), "step-1", "may not")
    assert same(content(run / "step-1"), first)
    assert same(content(run / "step-2"), second)
    assert content(run / "latest")["step"] == 3
    assert names(run) == ["latest", "step-1", "step-2", "step-3"]


@pytest.mark.parametrize("name", ["step-2", "step-2/meta.pt", "step-2/__0_0.distcp", "step-2/checksums.json", "."])
def test_loading_is_not_allowed(nursery: Nursery, public: Path, name: str) -> None:
    run = public / "run"
    save_a_series(run, ("folder", "folder"))
    (run / name).chmod(0)
    ended = nursery.child(as_nobody, "load", run)
    (run / name).chmod(0o755)
    refused(ended, "Permission denied", str(run / "step-2"))
    assert content(run / "step-2")["step"] == 2


# -- code in checkpoints -----------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["c", "meta.pt", ".metadata"])
def test_code_is_not_run(tmp_path: Path, where: str) -> None:
    """Also where whoever put it there made the checksums right."""
    fabric, path, marker = alone(), tmp_path / "c", tmp_path / "marker"
    objects = state(fabric, 1)
    fabric.save(path, objects, format="file" if where == "c" else "folder")
    if where == "c":
        torch.save({**torch.load(path, weights_only=True), "bomb": Bomb(marker)}, path)
    elif where == "meta.pt":
        torch.save({**torch.load(path / where, weights_only=True), "bomb": Bomb(marker)}, path / where)
    else:
        (path / where).write_bytes(pickle.dumps(Bomb(marker)))
    if path.is_dir():
        agree_with_the_sums(path)
    before = values(objects)
    [said] = told(fabric, lambda: fabric.load(path, objects))
    assert said is not None
    assert str(path if where == "c" else path / where) in said
    assert "code" in said
    assert "mkdir" in said
    assert not marker.exists()
    assert same(values(objects), before)
    [said] = told(fabric, lambda: fabric.load(path, objects, weights_only=False))
    assert (said is None) == marker.exists() == (where != ".metadata"), "an index has no need of code"


def agree_with_the_sums(folder: Path) -> None:
    """Write a list of checksums for what is there now."""
    files: dict[str, sums.FileSum] = {}
    for name in names(folder):
        if name != sums.SUMS:
            data = (folder / name).read_bytes()
            files[name] = sums.FileSum(len(data), (zlib.crc32(data),))
    (folder / sums.SUMS).write_bytes(sums.dump(files))


# -- in the way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_what_is_in_the_way_is_kept(tmp_path: Path, form: str, asynchronous: bool) -> None:
    fabric = alone()
    objects = state(fabric, 1)
    (tmp_path / "text").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    fabric.save(tmp_path / "mixed", objects, format="folder")
    (tmp_path / "mixed" / "a.txt").write_text("mine")
    before = names(tmp_path)
    for path in ("text/c", "text", "notes", "mixed"):
        [said] = told(fabric, partial(save_and_wait, fabric, tmp_path / path, objects, form, asynchronous))
        assert said is not None
        assert said.startswith("CheckpointError: ")
        assert str(tmp_path / path.partition("/")[0]) in said
    assert names(tmp_path) == before
    assert {path.read_text() for path in tmp_path.rglob("*") if path.name in ("a.txt", "text")} == {"mine"}
    assert fabric.load(tmp_path / "mixed")["step"] == 1


def test_what_is_no_checkpoint_is_not_of_the_series(tmp_path: Path) -> None:
    """Names that differ in numbers only may be anything's."""
    fabric = alone()
    objects = state(fabric, 1)
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "notes.txt").write_text("mine")
    (tmp_path / "run-2").write_text("mine")
    fabric.save(tmp_path / "run-3", objects, format="folder")
    (tmp_path / "run-3" / "notes.txt").write_text("mine")
    for number in range(4, 8):
        fabric.save(tmp_path / f"run-{number}", {"step": number}, keep_last=2)
    assert names(tmp_path) == ["latest", "run-1", "run-2", "run-3", "run-6", "run-7"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]) == 3


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_named_latest_is_kept(tmp_path: Path, form: str) -> None:
    fabric = alone()
    objects = state(fabric, 1)
    fabric.save(tmp_path / "latest", objects, format=FORMS[form])
    before = content(tmp_path / "latest")
    [said] = told(fabric, lambda: fabric.save(tmp_path / "step-1", objects, keep_last=1))
    assert said is not None
    assert str(tmp_path / "latest") in said
    assert same(content(tmp_path / "latest"), before)
    assert names(tmp_path) == ["latest"]
    fabric.save(tmp_path / "latest", {"step": 2})
    assert fabric.load(tmp_path / "latest") == {"step": 2}


def test_latest_may_be_a_link_of_the_user(tmp_path: Path) -> None:
    fabric = alone()
    fabric.save(tmp_path / "a" / "step-1", {"step": 1}, format="file")
    fabric.save(tmp_path / "b" / "step-2", state(fabric, 2), format="folder")
    for target in ("a/step-1", tmp_path / "a" / "step-1", "b/step-2"):
        (tmp_path / "latest").symlink_to(target)
        assert fabric.load(tmp_path / "latest")["step"] == int(str(target)[-1])
        (tmp_path / "latest").unlink()


# -- beside the training -----------------------------------------------------------------------------------------------


def test_calls_wait_for_the_save_under_way(tmp_path: Path) -> None:
    fabric, table = alone(), torch.zeros(3)

    def begin() -> tuple[Any, threading.Event]:
        """It ends soon after something waits for it."""
        event = threading.Event()
        handle = fabric.save(tmp_path / "c", {"table": table, "slow": Slow(event.is_set)}, asynchronous=True)
        table.add_(1)  # what was handed in was copied
        assert not handle.done()
        with pytest.raises(TimeoutError):
            handle.wait(0)
        threading.Timer(0.1, event.set).start()
        return handle, event

    calls: list[Callable[[], Any]] = [
        lambda: fabric.save(tmp_path / "d", {"step": 1}),
        lambda: fabric.save(tmp_path / "d", {"step": 2}, asynchronous=True),
        lambda: fabric.load(tmp_path / "c"),
    ]
    for number, call in enumerate(calls):
        handle, event = begin()
        call()
        assert event.is_set()
        assert handle.done()
        assert fabric.load(tmp_path / "c")["table"].tolist() == [number] * 3
    assert fabric.load(tmp_path / "d") == {"step": 2}
    assert names(tmp_path) == ["c", "d"]


def test_a_failed_save_is_told_once(tmp_path: Path) -> None:
    """By the handle, and then no more; by the next call, if nobody waited."""
    fabric = alone()
    handle = fabric.save(tmp_path / "c", {"bad": lambda: 0}, asynchronous=True)
    assert handle is not None
    with pytest.raises(CheckpointError, match=r"asynchronous save of .*/c failed"):
        handle.wait()
    handle.wait()
    fabric.save(tmp_path / "c", {"step": 1})
    fabric.save(tmp_path / "c", {"bad": lambda: 0}, asynchronous=True)
    with pytest.raises(CheckpointError, match=r"asynchronous save of .*/c failed"):
        fabric.save(tmp_path / "c", {"step": 2}, asynchronous=True)
    assert fabric.load(tmp_path / "c") == {"step": 1}
    assert names(tmp_path) == ["c"]


AT_EXIT = """
import sys, threading
from fabriclite import Fabric
from faults import Slow

content = {"slow": Slow(lambda: not threading.main_thread().is_alive()), "step": 3}
if sys.argv[2] == "fails":
    content["bad"] = lambda: 0
Fabric(accelerator="cpu", devices=1).save(sys.argv[1], content, asynchronous=True)
if sys.argv[2] == "raises":
    raise ValueError("the training failed")
"""
"""Saves what cannot be written before its main thread has ended."""


def test_scripts_end_while_they_save(tmp_path: Path) -> None:
    """Whichever way; the interpreter waits, and tells what nobody was told."""
    endings = ("returns", "raises", "fails")
    scripts = {}
    for ending in endings:
        (tmp_path / ending).mkdir()
        command = [sys.executable, "-c", AT_EXIT, str(tmp_path / ending / "c"), ending]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        scripts[ending] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    told_by = {ending: script.communicate(timeout=faults.LIMIT_S)[1] for ending, script in scripts.items()}
    assert [scripts[ending].returncode for ending in endings] == [0, 1, 0], told_by
    for ending in ("returns", "raises"):
        assert names(tmp_path / ending) == ["c"]
        assert alone().load(tmp_path / ending / "c")["step"] == 3
    assert f"The asynchronous save of {tmp_path}/fails/c failed" in told_by["fails"]
    assert "lambda" in told_by["fails"]
    assert names(tmp_path / "fails") == []


def return_while_saving(fabric: Fabric, path: Path, bad: bool) -> None:
    end = time.monotonic() + 0.5
    objects = {**state(fabric, 3), "slow": Slow(lambda: time.monotonic() > end), "bad": (lambda: 0) if bad else 0}
    handle = fabric.save(path, objects, asynchronous=True)
    assert handle is not None
    assert not all(everywhere(fabric, handle.done())), "it was not under way, so nothing is shown"


def test_ranks_return_while_they_save(nursery: Nursery, tmp_path: Path) -> None:
    """Of a launched function: the call that launched it returns when all is whole, or raises."""
    ended = nursery.world(2, return_while_saving, tmp_path / "c", False)
    assert ended.code == 0, ended.error
    assert names(tmp_path) == ["c"]
    assert alone().load(tmp_path / "c")["step"] == 3
    ended = nursery.world(2, return_while_saving, tmp_path / "c", True)
    assert ended.code == 1
    assert f"The asynchronous save of {tmp_path}/c failed" in ended.error
    assert names(tmp_path) == ["c"]

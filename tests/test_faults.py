"""What is left of checkpoints when something breaks: nothing is lost, nothing is garbage, nothing hangs.

Every fault is real. Processes are killed at each step of a save, disks are full, bytes change, permissions lack; what
is on the disk then is looked at by a process that had no part in it.
"""

import ctypes
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from faults import Nursery, Step, alone, everywhere, same, state, told, watch

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

    def chosen(self, writes: int) -> list[int]:
        """Every step, but of writes only some: those in a row differ in little."""
        all_writes = [i for i, step in enumerate(self.steps) if step.act == "write"]
        some = set(all_writes[:: max(1, len(all_writes) // writes)])
        return [i for i, step in enumerate(self.steps) if step.act != "write" or i in some]


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
    assert [name for name in names(run) if name.startswith(".")] == []
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
    chosen = scenario.chosen(writes=4)
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
            assert f"Rank {rank} ended without a word, exit status -9" in ended.error
        else:
            assert f"rank {rank}: " in ended.error, ended.error
            assert f"Rank {rank} ended without a word" not in ended.error
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


def limit(size: int) -> None:
    """What python gets instead of more bytes is an ``OSError``, as from a full disk: it ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def save_without_room(run: Path, form: str, size: int, asynchronous: bool) -> list[str | None]:
    fabric = alone()
    objects = to_save(fabric, 3, form)
    limit(size)
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
    if fabric.global_rank == rank:
        limit(size)
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
    limit(SMALL)
    fabric.save(run / "step-2", objects, asynchronous=True)
    calls = {"load": lambda: fabric.load(run / "step-2"), "save": lambda: fabric.save(run / "step-2", {"step": 9})}
    first = told(fabric, calls[call])
    limit(resource.RLIM_INFINITY)
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
    for free in range(0, 80, 8):
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

"""Give recorded tensors memory and values: all that is wanted, in the order of the random stream, on some threads."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

import torch
from torch import Tensor, UntypedStorage

from fabriclite.birth import replay
from fabriclite.birth.parts import Recipe
from fabriclite.birth.replay import Hand, Replay
from fabriclite.birth.tape import Ref, Tape
from fabriclite.boxes import Box
from fabriclite.stored import Stored

_TASK: Final = 1 << 23
"""Elements of one task: small enough to share a large tensor, large enough for a jump of the generator (2 ms) to be
nothing."""


@dataclass(eq=False, slots=True)
class Goal:
    """A part of a recorded tensor, and the memory that shall hold it.

    Attributes:
        ref: the tensor.
        box: which part of it; of one dimension, where the tensor has more: of its values in row-major order.
        out: contiguous, of the box's shape, on any device.
    """

    ref: Ref
    box: Box
    out: Tensor


@dataclass(eq=False, slots=True)
class Whole:
    """A recorded storage that shall have real memory; ``memory`` holds it afterwards."""

    storage: int
    dtype: torch.dtype
    memory: UntypedStorage | None = field(default=None)


Send = Callable[[Tensor], None]
"""Gives every rank rank 0's bytes, in place. Every rank must call it with a tensor of the same size."""


def fill(tape: Tape, goals: Sequence[Goal], wholes: Sequence[Whole], threads: int) -> None:
    """Reach ``goals`` and ``wholes``.

    At most one storage is made whole at a time beside its goals; everything else is written where it belongs.
    """
    tasks: list[_Task] = []
    rest: dict[int, list[Goal]] = {}
    for whole in wholes:
        whole.memory = _mapped(tape, whole)
        if whole.memory is not None:
            continue
        recipe = _recipe_of_whole(tape, whole)
        if recipe is None:
            tasks.append(_Task(tape.last_op(whole.storage), 0, _MakeWhole(tape, whole)))
        else:
            tasks += _shared_tasks(tape, recipe, whole)
    for goal in goals:
        stored = loaded(tape, goal.ref)
        if stored is not None:
            tasks.append(_Task(tape.last_op(goal.ref.storage), goal.out.numel(), _ReadBox(stored, goal)))
            continue
        recipe = Recipe.of(tape, goal.ref) if goal.out.device == tape.storages[goal.ref.storage].device else None
        if recipe is None:
            rest.setdefault(goal.ref.storage, []).append(goal)
        else:
            tasks.append(_Task(tape.last_op(goal.ref.storage), goal.out.numel(), _FillBox(recipe, goal)))
    tasks += [_Task(tape.last_op(storage), 0, _Cut(tape, storage, cuts)) for storage, cuts in rest.items()]
    _run(sorted(tasks, key=lambda task: task.order), threads)


def fill_from_first(
    tape: Tape, goals: Sequence[Goal], wholes: Sequence[Whole], send: Send, first: bool, order: Iterable[int]
) -> None:
    """Reach the goals with rank 0's values, one storage at a time in ``order``. Every rank must call this.

    ``first``: whether this is rank 0, whose recording alone is used.
    """
    for storage in order:
        size = tape.storages[storage]
        if first:
            with replay.at_rest():
                memory = Replay(tape).memory_of([storage])[storage]
        else:
            memory = replay.new_memory(size.nbytes, size.device)
        with replay.at_rest():
            send(replay.view(memory, Ref(storage, torch.uint8, (size.nbytes,), (1,), 0)))
            for goal in [g for g in goals if g.ref.storage == storage]:
                _cut(memory, goal)
        for whole in [w for w in wholes if w.storage == storage]:
            whole.memory = memory


def _mapped(tape: Tape, whole: Whole) -> UntypedStorage | None:
    """The file's own memory, for a storage that is nothing but a tensor of a file as it lies there."""
    stored = loaded(tape, _all_of(tape, whole))
    if stored is None or stored.dtype != whole.dtype or tape.storages[whole.storage].device.type != "cpu":
        return None
    tensor = stored.mapped()
    return None if tensor is None else tensor.untyped_storage()


def loaded(tape: Tape, ref: Ref) -> Stored | None:
    """The tensor of a file that the one at ``ref`` is, with nothing else done to it."""
    last = tape.ops[tape.last_op(ref.storage)] if tape.last_op(ref.storage) >= 0 else None
    if last is None or not last.overwrites or len(last.args) < 2 or not isinstance(last.args[1], Stored):
        return None
    stored, target = last.args[1], last.args[0]
    if len(ref.size) != 1 and ref.size != target.size:
        return None
    same = (target.offset, target.numel, target.dtype) == (ref.offset, ref.numel, ref.dtype)
    return stored if same and target.contiguous and ref.contiguous else None


def _recipe_of_whole(tape: Tape, whole: Whole) -> Recipe | None:
    return Recipe.of(tape, _all_of(tape, whole))


def _all_of(tape: Tape, whole: Whole) -> Ref:
    count = tape.storages[whole.storage].nbytes // whole.dtype.itemsize
    return Ref(whole.storage, whole.dtype, (count,), (1,), 0)


# -- tasks ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """What one thread does in one go.

    Attributes:
        order: when in the recording; threads that go on in order rarely move their generator.
        cost: elements, 0 where at most one such task may run at a time.
        run: the work.
    """

    order: int
    cost: int
    run: "Callable[[Hand], None]"


@dataclass(frozen=True, slots=True)
class _FillBox:
    recipe: Recipe
    goal: Goal

    def __call__(self, hand: Hand) -> None:
        self.recipe.fill_box(self.goal.out, self.goal.ref, self.goal.box, hand)


@dataclass(frozen=True, slots=True)
class _ReadBox:
    stored: Stored
    goal: Goal

    def __call__(self, hand: Hand) -> None:
        goal = self.goal
        if goal.ref.size == tuple(self.stored.shape):
            self.stored.read(goal.box, goal.out)
        else:  # of a view of it, in one dimension
            (start, _), *_ = goal.box
            self.stored.read_flat(start, goal.out)


@dataclass(frozen=True, slots=True)
class _FillRange:
    recipe: Recipe
    out: Tensor
    begin: int

    def __call__(self, hand: Hand) -> None:
        self.recipe.fill(self.out, self.begin, hand)


@dataclass(frozen=True, slots=True)
class _MakeWhole:
    tape: Tape
    whole: Whole

    def __call__(self, hand: Hand) -> None:
        storage = self.whole.storage
        self.whole.memory = Replay(self.tape, hand).memory_of([storage])[storage]


@dataclass(frozen=True, slots=True)
class _Cut:
    tape: Tape
    storage: int
    goals: list[Goal]

    def __call__(self, hand: Hand) -> None:
        memory = Replay(self.tape, hand).memory_of([self.storage])[self.storage]
        for goal in self.goals:
            _cut(memory, goal)


def _cut(memory: UntypedStorage, goal: Goal) -> None:
    part = replay.view(memory, goal.ref)
    part = part.reshape(-1) if len(goal.box) == 1 else part
    for dim, (start, length) in enumerate(goal.box):
        part = part.narrow(dim, start, length)
    goal.out.copy_(part)


def _shared_tasks(tape: Tape, recipe: Recipe, whole: Whole) -> list[_Task]:
    ref = _all_of(tape, whole)
    whole.memory = replay.new_memory(tape.storages[whole.storage].nbytes, recipe.device)
    out, order = replay.view(whole.memory, ref), tape.last_op(whole.storage)
    return [
        _Task(order, min(_TASK, ref.numel - begin), _FillRange(recipe, out[begin : begin + _TASK], begin))
        for begin in range(0, ref.numel, _TASK)
    ]


def _run(tasks: Sequence[_Task], threads: int) -> None:
    here = [task for task in tasks if not _anywhere(task)]
    shared = [task for task in tasks if _anywhere(task)]
    hand = Hand()
    with replay.at_rest():
        for task in here:
            task.run(hand)
        if threads < 2 or len(shared) < 2:
            for task in shared:
                task.run(hand)
            return
    one_at_a_time = Lock()

    def work(mine: list[_Task]) -> None:
        own = Hand()
        with replay.at_rest():
            for task in mine:
                if task.cost:
                    task.run(own)
                else:
                    with one_at_a_time:
                        task.run(own)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, share) for share in _shares(shared, threads)]:
            done.result()


def _anywhere(task: _Task) -> bool:
    work = task.run
    if isinstance(work, _MakeWhole):
        return replay.in_any_thread(work.tape.needed([work.whole.storage]))
    if isinstance(work, _Cut):
        return replay.in_any_thread(work.tape.needed([work.storage]))
    return True


def _shares(tasks: Sequence[_Task], threads: int) -> list[list[_Task]]:
    """Runs of neighbouring tasks of about equal cost."""
    total, done = sum(task.cost for task in tasks), 0
    shares: list[list[_Task]] = [[] for _ in range(threads)]
    for task in tasks:
        shares[min(threads - 1, done * threads // max(total, 1))].append(task)
        done += task.cost
    return shares

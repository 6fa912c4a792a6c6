"""What a recording is: operations in order, the storages they make and write, and which of them a tensor needs.

A tensor is a place in a storage (:class:`Ref`). Views are not recorded, so what is written through a view, a slice or
``.data`` reaches its base, and tied tensors are one storage, without anybody's care.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import facts
from fabriclite.birth.streams import Draw
from fabriclite.errors import MaterializeError

Written = Literal["no", "partly", "fully"]

_SMALL: Final = 1 << 20
"""Elements up to which a real tensor that enters a recording is copied: its owner may then do with it as he likes."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor, as a place in a recorded storage."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, storage: int, tensor: Tensor) -> "Ref":
        return cls(storage, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def numel(self) -> int:
        return prod(self.size)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in row-major order without gaps."""
        expected = 1
        for length, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True

    @property
    def dense(self) -> bool:
        """Whether its elements lie without gaps or overlaps, in any order of dimensions."""
        expected = 1
        for step, length in sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n != 1):
            if step != expected:
                return False
            expected *= length
        return True


class Captured:
    """A real tensor that entered the recording: a small one copied, a large one by reference and not to be changed."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        small = tensor.numel() <= _SMALL
        self._version: int | None = None if small else _torch.version(tensor)
        # the very object: what is detached here, below autograd, would have a version of its own
        self._tensor = tensor.detach().clone() if small else tensor

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            MaterializeError: it was changed after it entered.
        """
        if self._version is not None and _torch.version(self._tensor) != self._version:
            raise MaterializeError(
                f"A tensor of shape {tuple(self._tensor.shape)} that a recorded model was given must stay as it was"
                " until setup, but was changed in place. Pass a copy: tensor.clone()."
            )
        return self._tensor.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    @property
    def flat(self) -> bool:
        return self._tensor.is_contiguous()


@dataclass(slots=True, eq=False)
class Op:
    """One recorded operation.

    Attributes:
        index: its place on the tape.
        func: what to call.
        args, kwargs: its arguments, with :class:`Ref` and :class:`Captured` where tensors were.
        reads, writes, creates: numbers of storages.
        outs: what it returned; ``None`` where that was no tensor.
        overwrites: whether it writes all of its storage and reads none of it.
        draw: where its random numbers are, if it draws.
    """

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    creates: frozenset[int]
    outs: list[Ref | None]
    overwrites: bool = False
    draw: Draw | None = None

    @property
    def name(self) -> str:
        return facts.of(self.func).name

    def refs(self) -> Iterator[Ref]:
        """Every tensor among its arguments that is recorded."""
        return _refs((self.args, tuple(self.kwargs.values())))


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _refs(item)


@dataclass(slots=True, eq=False)
class Storage:
    """Memory that a recorded tensor would have."""

    index: int
    nbytes: int
    device: torch.device
    ops: list[int] = field(default_factory=list)
    """The operations that make or write it."""


class Tape:
    """Operations and storages, in the order in which they came."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.storages: list[Storage] = []

    def add_storage(self, nbytes: int, device: torch.device) -> Storage:
        storage = Storage(len(self.storages), nbytes, device)
        self.storages.append(storage)
        return storage

    def add(self, op: Op) -> None:
        self.ops.append(op)
        for storage in op.writes:
            self.storages[storage].ops.append(op.index)

    def last_op(self, storage: int) -> int:
        ops = self.storages[storage].ops
        return ops[-1] if ops else -1

    def needed(self, storages: Sequence[int]) -> list[Op]:
        """The operations, in order, that ``storages`` need to hold what they hold at the end of the tape.

        A full overwrite ends the search: an initialisation that a later one replaces is not among them.
        """
        found: set[int] = set()
        stack = [(storage, len(self.ops)) for storage in storages]
        seen: set[tuple[int, int]] = set()
        while stack:
            storage, before = stack.pop()
            ops = self.storages[storage].ops
            for place in range(bisect_left(ops, before) - 1, -1, -1):
                if (storage, place) in seen:
                    break
                seen.add((storage, place))
                op = self.ops[ops[place]]
                if op.index not in found:
                    found.add(op.index)
                    stack += [(s, op.index) for s in op.writes - op.creates if s != storage]
                    if op.name not in facts.METADATA_ONLY:
                        stack += [(s, op.index) for s in op.reads if s != storage]
                if op.overwrites and storage in op.writes:
                    break
        return [self.ops[i] for i in sorted(found)]

    def written(self, storage: int) -> Written:
        """How much of a storage was given a value after its memory was taken.

        ``"partly"`` where the parts that were written are not seen to be the whole: a strided slice, an index.
        """
        state = self._written(storage, len(self.ops), {})
        return "fully" if state == "partly" and self._filled_by_stretches(storage) else state

    def _written(self, storage: int, before: int, memo: dict[tuple[int, int], Written]) -> Written:
        ops = self.storages[storage].ops
        count = bisect_left(ops, before)
        if self.storages[storage].nbytes == 0:
            return "fully"
        if (storage, count) in memo:
            return memo[storage, count]
        state: Written = "no"
        memo[storage, count] = state
        for index in ops[:count]:
            state = self._after(self.ops[index], storage, state, memo)
        memo[storage, count] = state
        return state

    def _filled_by_stretches(self, storage: int) -> bool:
        """Whether fills of neighbouring stretches, as of a fused projection, make up the whole."""
        stretches: list[tuple[int, int]] = []
        for op in (self.ops[i] for i in self.storages[storage].ops):
            if storage in op.creates or op.overwrites:
                stretches.clear()
            elif op.name in facts.FILLS and all(self.written(s) == "fully" for s in op.reads - {storage}):
                target = next(op.refs())
                if target.storage == storage and target.contiguous:
                    start = target.offset * target.dtype.itemsize
                    stretches.append((start, start + target.nbytes))
        reached = 0
        for start, end in sorted(stretches):
            if start > reached:
                return False
            reached = max(reached, end)
        return reached >= self.storages[storage].nbytes

    def _after(self, op: Op, storage: int, state: Written, memo: dict[tuple[int, int], Written]) -> Written:
        """What becomes of ``state`` of a storage by ``op``."""
        if storage in op.creates or op.overwrites:
            if op.name in facts.UNWRITTEN:
                return "no"
            if op.name in facts.METADATA_ONLY:
                return "fully"
            sources = {self._written(s, op.index, memo) for s in op.reads if s != storage}
            worst: Written = "no" if "no" in sources else "partly" if "partly" in sources else "fully"
            return worst
        if state == "no" and (op.name in facts.WRITES_PART or facts.of(op.func).into_out):
            return "partly"
        return state

"""Run what a part of a tensor needs, for that part alone.

Possible where every step works element by element, or draws numbers that can be drawn from any place. Then a rank makes
just its shard, and threads share one large tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fabriclite.birth import draws, facts, truncated
from fabriclite.birth.replay import Hand
from fabriclite.birth.streams import At
from fabriclite.birth.tape import Captured, Op, Ref, Tape
from fabriclite.boxes import Box
from fabriclite.stored import Stored

AT_ONCE: Final = 1 << 20
"""Elements made at once where something beside the result takes memory."""
_WORTH: Final = 64
"""Elements below which a tensor is always made whole."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The operations behind one storage, all of which can be done on a part.

    Attributes:
        storage: which.
        dtype: of its values.
        ops: in order.
        device: where.
        alone: whether nothing beside the result takes memory.
    """

    storage: int
    dtype: torch.dtype
    ops: tuple[Op, ...]
    device: torch.device
    alone: bool

    @classmethod
    def of(cls, tape: Tape, ref: Ref) -> "Recipe | None":
        """How to make parts of the tensor at ``ref``; ``None`` if it has to be made whole."""
        storage = tape.storages[ref.storage]
        ops = tape.needed([ref.storage])
        if ref.numel < _WORTH or not ref.contiguous or not ops:
            return None
        dtypes = {ref.storage: ref.dtype}
        for op in ops:
            if not _in_parts(op, tape, dtypes, storage.device):
                return None
        return cls(
            storage=ref.storage,
            dtype=ref.dtype,
            ops=tuple(ops),
            device=storage.device,
            alone=len(dtypes) == 1 and not any(isinstance(op.func, facts.Macro) for op in ops),
        )

    def fill(self, out: Tensor, begin: int, hand: Hand) -> None:
        """Fill ``out``, contiguous and of shape ``(length,)``, with values ``begin`` and following of the storage."""
        step = out.numel() if self.alone else AT_ONCE
        for first in range(0, out.numel(), max(step, 1)):
            self._fill(out[first : first + step], begin + first, hand)

    def _fill(self, out: Tensor, begin: int, hand: Hand) -> None:
        memory = {self.storage: out}
        for op in self.ops:
            _do(op, memory, begin, begin + out.numel(), hand)

    def fill_box(self, out: Tensor, ref: Ref, box: Box, hand: Hand) -> None:
        """Fill ``out``, contiguous, with the ``box`` of the tensor at ``ref``, which is contiguous in the storage."""
        if out.numel() > 0:
            self._fill_box(out, ref.size, ref.offset, box, hand)

    def _fill_box(self, out: Tensor, size: Sequence[int], offset: int, box: Box, hand: Hand) -> None:
        start, length = box[0]
        row = 1
        for n in size[1:]:
            row *= n
        if all(part == (0, n) for part, n in zip(box[1:], size[1:], strict=True)):
            self.fill(out.view(-1), offset + start * row, hand)
        elif row > AT_ONCE:
            for i in range(length):
                self._fill_box(out[i], size[1:], offset + (start + i) * row, box[1:], hand)
        else:
            rows = max(1, AT_ONCE // row)
            scratch = torch.empty(rows * row, dtype=self.dtype, device=self.device)
            for first in range(0, length, rows):
                count = min(rows, length - first)
                block = scratch[: count * row]
                self.fill(block, offset + (start + first) * row, hand)
                kept = block.view(count, *size[1:])
                for dim, (begin, width) in enumerate(box[1:], start=1):
                    kept = kept.narrow(dim, begin, width)
                out[first : first + count].copy_(kept)


def _in_parts(op: Op, tape: Tape, dtypes: dict[int, torch.dtype], device: torch.device) -> bool:
    """Whether ``op`` can be done on a part. Notes the dtypes of the storages it meets."""
    refs = [*op.refs(), *(ref for ref in op.outs if ref is not None)]
    if op.name in facts.METADATA_ONLY:
        refs = [ref for ref in op.outs if ref is not None]
    ranges = {(ref.offset, ref.numel) for ref in refs}
    if len(ranges) != 1 or any(not ref.contiguous or not ref.size for ref in refs):
        return False
    for ref in refs:
        whole = tape.storages[ref.storage].nbytes == ref.nbytes
        if dtypes.setdefault(ref.storage, ref.dtype) != ref.dtype or (ref.storage in op.creates and not whole):
            return False
        if tape.storages[ref.storage].device != device:
            return False
    target = refs[0] if not op.creates else next(ref for ref in op.outs if ref is not None)
    if op.draw is not None:
        return _draws_in_parts(op, target)
    if op.creates and op.name in facts.UNWRITTEN | facts.FACTORIES:
        return True
    if op.name not in facts.EXACT or op.kwargs.get("alpha", 1) != 1:
        return False
    here = all(not isinstance(arg, Captured) or arg.device == device or op.name == "copy_" for arg in op.args)
    others = [arg for arg in op.args[1:] if not isinstance(arg, Ref)]
    return here and isinstance(op.args[0], Ref) and all(_fits(arg, target) for arg in others)


def _draws_in_parts(op: Op, target: Ref) -> bool:
    if not isinstance(op.draw, At) or op.draw.stream.generator.device.type != "cpu":
        return False
    if isinstance(op.func, facts.Macro):
        return op.func is truncated.MACRO and truncated.in_parts(target, *op.args[1:])
    kind = draws.kind_of(op.name)
    return kind is not None and draws.by_parts(kind, target.numel, target.dtype)


def _fits(arg: Any, target: Ref) -> bool:
    if isinstance(arg, Stored):
        return tuple(arg.shape) == target.size
    if isinstance(arg, Captured):
        return arg.flat and arg.shape == target.size
    return arg is None or isinstance(arg, int | float | bool)


def _do(op: Op, memory: dict[int, Tensor], begin: int, end: int, hand: Hand) -> None:
    """Run ``op`` on values ``begin`` to ``end`` of the storages in ``memory``."""
    created = next((ref for ref in op.outs if ref is not None), None) if op.creates else None
    target = created if created is not None else next(op.refs())
    low, high = max(begin, target.offset), min(end, target.offset + target.numel)
    if (op.overwrites or op.name not in facts.EXACT) and target.storage not in memory:
        like = next(iter(memory.values()))
        memory[target.storage] = torch.empty(end - begin, dtype=target.dtype, device=like.device)
    if low >= high or (created is not None and op.name in facts.UNWRITTEN):
        return

    def part(value: Any) -> Any:
        if isinstance(value, Ref):
            return memory[value.storage][low - begin : high - begin]
        if isinstance(value, Captured):
            return value.value().view(-1)[low - target.offset : high - target.offset]
        return value

    if op.draw is not None:
        _draw(op, part(target), low - target.offset, target.numel, hand)
    elif len(op.args) > 1 and isinstance(op.args[1], Stored):
        op.args[1].read_flat(low - target.offset, part(target))
    elif created is not None and op.name in facts.FACTORIES:
        part(target).fill_(_value_of(op))
    else:
        _compute(op, part, created, memory)


def _compute(op: Op, part: Callable[[Any], Any], created: Ref | None, memory: dict[int, Tensor]) -> None:
    kwargs = {name: part(value) for name, value in op.kwargs.items() if name != "memory_format"}
    result = op.func(*(part(arg) for arg in op.args), **kwargs)
    if created is not None and created.storage in memory:
        part(created).copy_(result)
    elif created is not None:
        memory[created.storage] = result


def _draw(op: Op, out: Tensor, begin: int, n: int, hand: Hand) -> None:
    draw, kind = op.draw, draws.kind_of(op.name)
    assert draw is not None

    def seek(place: int, count: int) -> torch.Generator:
        return hand.at(draw, place, count)

    if kind is None:
        truncated.fill_part(out, begin, n, op.args[1:], seek)
    else:
        draws.fill_part(kind, out, begin, n, () if op.creates else op.args[1:], seek)


def _value_of(op: Op) -> Any:
    """The value that a factory fills with."""
    if op.name.startswith(("zeros", "new_zeros")):
        return 0
    if op.name.startswith(("ones", "new_ones")):
        return 1
    return op.args[2 if op.name == "new_full" else 1]

"""Run what a storage needs, on real memory, whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, UntypedStorage

from fabriclite import _torch
from fabriclite.birth import draws, facts
from fabriclite.birth.streams import At, Draw, Held, Stream
from fabriclite.birth.tape import Captured, Op, Ref, Tape
from fabriclite.boxes import all_of
from fabriclite.stored import Stored

Memory = dict[int, UntypedStorage]


@contextmanager
def at_rest() -> Iterator[None]:
    """Around every replay: nobody's mode sees it, and it belongs to no graph."""
    with _torch.no_modes(), torch.no_grad():
        yield


def view(memory: UntypedStorage, ref: Ref) -> Tensor:
    """The tensor at ``ref`` in real memory."""
    return torch.empty(0, dtype=ref.dtype, device=memory.device).set_(memory, ref.offset, ref.size, ref.stride)


def new_memory(nbytes: int, device: torch.device) -> UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()


class Hand:
    """Private generators, one for each device, that are moved only when they are not there already.

    One for each thread: what it gives is drawn from at once.
    """

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._places: dict[torch.device, tuple[Stream, int, int]] = {}

    def at(self, draw: Draw, place: int = 0, count: int | None = None) -> torch.Generator:
        """A generator that stands ``place`` numbers after the beginning of ``draw``, about to draw ``count`` (all)."""
        device = draw.stream.generator.device
        generator = self._generators.setdefault(device, torch.Generator(device))
        if isinstance(draw, Held):
            self._places.pop(device, None)
            return generator.set_state(draw.state)
        here = (draw.stream, draw.epoch, draw.offset + place)
        if self._places.get(device) != here:
            generator.set_state(draw.stream.state_at(here[1], here[2]))
        self._places[device] = (here[0], here[1], here[2] + (draw.count if count is None else count))
        return generator


class Replay:
    """Runs parts of a tape. Makes no use of the generators that the user sees, but see :meth:`_run_on_default`.

    Args:
        tape: what was recorded.
        hand: this thread's generators.
    """

    def __init__(self, tape: Tape, hand: Hand | None = None) -> None:
        self._tape = tape
        self._hand = Hand() if hand is None else hand

    def memory_of(self, storages: Sequence[int], poisoned: bool = False) -> Memory:
        """Real memory of ``storages`` as it is at the end of the tape. Call within :func:`at_rest`.

        Args:
            storages: which.
            poisoned: fill new memory so that what is never written can be told.
        """
        ops = self._tape.needed(storages)
        last_use = {storage: op.index for op in ops for storage in op.reads | op.writes}
        memory: Memory = {}
        for op in ops:
            self._run(op, memory, poisoned)
            for storage in op.reads | op.writes:
                if last_use[storage] == op.index and storage not in storages:
                    memory.pop(storage, None)
        for storage in storages:
            self._memory(storage, memory)
        return memory

    def _memory(self, storage: int, memory: Memory) -> UntypedStorage:
        if storage not in memory:
            memory[storage] = new_memory(self._tape.storages[storage].nbytes, self._tape.storages[storage].device)
        return memory[storage]

    def _run(self, op: Op, memory: Memory, poisoned: bool) -> None:
        known = facts.of(op.func)
        if op.creates and known.name in facts.UNWRITTEN:
            for storage in op.creates:
                if poisoned:
                    poison(self._memory(storage, memory))
            return
        if len(op.args) > 1 and isinstance(op.args[1], Stored):
            target: Tensor = self._real(op.args[0], memory)
            op.args[1].read(all_of(target.shape), target)
            return
        kind = draws.kind_of(known.name)
        if op.creates and kind and isinstance(op.draw, At):  # the same numbers as filling new memory
            out = op.outs[0]
            assert out is not None
            tensor = view(self._memory(out.storage, memory), out)
            fill = tensor.normal_ if kind == "normal" else tensor.uniform_
            fill(generator=self._hand.at(op.draw))
            return
        args = [self._real(arg, memory) for arg in op.args]
        kwargs = {name: self._real(value, memory) for name, value in op.kwargs.items()}
        if op.draw is None:
            result = op.func(*args, **kwargs)
        elif isinstance(op.func, facts.Macro) or known.has("generator"):
            result = op.func(*args, **kwargs | {"generator": self._hand.at(op.draw)})
        else:
            result = _run_on_default(op, args, kwargs)
        if op.creates:
            self._keep(op, result, memory)

    def _real(self, value: Any, memory: Memory) -> Any:
        if isinstance(value, Ref):
            return view(self._memory(value.storage, memory), value)
        if isinstance(value, Captured):
            return value.value()
        if isinstance(value, list | tuple):
            return type(value)(self._real(item, memory) for item in value)
        return value

    def _keep(self, op: Op, result: Any, memory: Memory) -> None:
        """Take the memory of what was made, laid out as the recording says."""
        taken = {_torch.storage_key(view(m, Ref(0, torch.uint8, (0,), (1,), 0))) for m in memory.values()}
        for out, ref in zip(flat(result), op.outs, strict=True):
            if ref is None or ref.storage not in op.creates or ref.storage in memory:
                continue
            as_recorded = out.stride() == ref.stride and out.storage_offset() == ref.offset
            own = _torch.storage_key(out) not in taken
            if as_recorded and own and out.untyped_storage().nbytes() == self._tape.storages[ref.storage].nbytes:
                memory[ref.storage] = out.untyped_storage()
            else:
                view(self._memory(ref.storage, memory), ref).copy_(out)


def _run_on_default(op: Op, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation that takes no generator; the device's default one is put back after. Main thread only."""
    assert op.draw is not None
    generator = op.draw.stream.generator
    before = generator.get_state()
    try:
        if isinstance(op.draw, Held):
            generator.set_state(op.draw.state)
        else:
            generator.set_state(op.draw.stream.state_at(op.draw.epoch, op.draw.offset))
        return op.func(*args, **kwargs)
    finally:
        generator.set_state(before)


def in_any_thread(ops: Sequence[Op]) -> bool:
    """Whether none of ``ops`` has to draw from a default generator."""
    return all(
        op.draw is None
        or isinstance(op.func, facts.Macro)
        or facts.of(op.func).has("generator")
        or (draws.kind_of(op.name) is not None and isinstance(op.draw, At))
        for op in ops
    )


def flat(result: Any) -> list[Any]:
    """The items of what an operation returned: itself, or those of lists and lists of lists."""
    if isinstance(result, list | tuple):
        return [leaf for item in result for leaf in flat(item)]
    return [result]


# -- memory that was never written ----------------------------------------------------------------------

_POISON: Final = {2: 0x7FE5, 4: 0x7FE57FE5, 8: 0x7FE57FE57FE57FE5}
"""By size of a value: a NaN in every float of up to four bytes, with a payload that no computation gives."""
_WHOLE: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison(memory: UntypedStorage) -> None:
    """Fill with what :func:`poisoned` finds again."""
    pairs = memory.nbytes() // 2
    torch.empty(0, dtype=torch.int16, device=memory.device).set_(memory, 0, (pairs,), (1,)).fill_(_POISON[2])


def poisoned(memory: UntypedStorage, ref: Ref) -> bool:
    """Whether a value of the tensor at ``ref`` was never written since :func:`poison`. One-byte values cannot tell."""
    size = ref.dtype.itemsize // (2 if ref.dtype.is_complex else 1)
    if size not in _WHOLE:
        return False
    values = view(memory, ref)
    values = torch.view_as_real(values) if ref.dtype.is_complex else values
    whole = values.view(_WHOLE[size])
    # As signed numbers only NaNs of larger payload are above: one pass, and no memory, for nearly every tensor.
    if whole.numel() == 0 or int(whole.amax()) < _POISON[size]:
        return False
    return bool((whole == _POISON[size]).any())

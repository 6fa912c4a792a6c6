"""One recording: the tape, which live tensors are on it, and the random streams it draws from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import replay
from fabriclite.birth.streams import Stream
from fabriclite.birth.tape import Captured, Op, Ref, Tape
from fabriclite.stored import Stored

_KEPT: Final = 1 << 20
"""Bytes up to which a value that was asked for is kept, to be asked for again."""
_MANY: Final = 64


class Recording:
    """What is known of the tensors that were recorded. They themselves are plain tensors on the meta device."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.streams: dict[int, Stream] = {}
        self._numbers: dict[int, int] = {}
        self._watched: list[_torch.StorageWeakRef] = []  # by number; keeps a key from being used again
        self._done: set[int] = set()
        self._seen: dict[int, list[ReferenceType[Tensor]]] = {}
        self._values: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._loans: list[_Loan] = []

    # -- which tensors -------------------------------------------------------------
    def number(self, tensor: Tensor) -> int | None:
        """The number of its storage, if it is recorded. Call where no function mode answers for torch."""
        if not tensor.is_meta or tensor.is_sparse:
            return None
        return self._numbers.get(_torch.storage_key(tensor))

    def knows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.number(value) is not None

    def ref(self, tensor: Tensor) -> Ref:
        """Where a recorded tensor is."""
        number = self.number(tensor)
        assert number is not None
        return Ref.of(number, tensor)

    def device(self, tensor: Tensor) -> torch.device:
        """Where it would be."""
        number = self.number(tensor)
        assert number is not None
        return self.tape.storages[number].device

    def enter(self, tensor: Tensor, device: torch.device) -> Ref:
        """Put a new meta tensor's storage on the tape."""
        memory = tensor.untyped_storage()
        storage = self.tape.add_storage(memory.nbytes(), device)
        self._numbers[_torch.storage_key(tensor)] = storage.index
        self._watched.append(_torch.StorageWeakRef(memory))  # type: ignore[no-untyped-call]
        return Ref.of(storage.index, tensor)

    def saw(self, number: int, tensor: Tensor) -> None:
        """A tensor of storage ``number`` was handed to user code, which may keep it beside the module."""
        seen = self._seen.setdefault(number, [])
        if seen and seen[-1]() is tensor:
            return
        seen.append(ref(tensor))
        if len(seen) > _MANY:
            seen[:] = [other for other in seen if other() is not None]

    def kept(self, storage: int) -> list[Tensor]:
        """Tensors of a storage that user code may still hold and that have no memory."""
        alive = {id(tensor): tensor for other in self._seen.get(storage, []) if (tensor := other()) is not None}
        return [tensor for tensor in alive.values() if self.number(tensor) == storage]

    def close(self, storages: set[int]) -> None:
        """Sharded parameters took the place of these."""
        self._done |= storages

    def reopen(self, storages: set[int]) -> None:
        """Somebody else holds these too, and wants memory for them."""
        self._done -= storages

    def waits(self) -> bool:
        """Whether a tensor is alive that still has to be given memory."""
        return any(i not in self._done for i in self._alive())

    def lives(self) -> bool:
        """Whether a tensor is alive that somebody may still ask for."""
        return next(self._alive(), None) is not None

    def _alive(self) -> Iterator[int]:
        return (i for i, watched in enumerate(self._watched) if not watched.expired())  # type: ignore[no-untyped-call]

    # -- streams ---------------------------------------------------------------------
    def stream(self, generator: torch.Generator | None, device: torch.device) -> Stream:
        """The stream of ``generator``, or of the device's default one."""
        chosen = _default_generator(device) if generator is None else generator
        key = id(chosen)
        if key not in self.streams:
            self.streams[key] = Stream(chosen, lazy=generator is None)
        return self.streams[key]

    def show_streams(self) -> None:
        """Leave every generator where it would be, had nothing been recorded."""
        for stream in self.streams.values():
            stream.show()

    # -- values ----------------------------------------------------------------------
    def value(self, tensor: Tensor, shared: bool = False) -> Tensor:
        """What a recorded tensor would hold now. Works out just what that needs.

        ``shared``: tensors of one storage come in one storage, which is kept; else a copy.
        """
        self.take_back()
        place = self.ref(tensor)
        last = self.tape.last_op(place.storage)
        known = self._values.get(place.storage)
        with replay.at_rest():
            if known is None or known[0] != last:
                memory = replay.Replay(self.tape).memory_of([place.storage])[place.storage]
                known = (last, memory)
                if shared or memory.nbytes() <= _KEPT:
                    self._values[place.storage] = known
            value = replay.view(known[1], place)
            return value if shared else value.clone()

    def load(self, tensor: Tensor, stored: Stored) -> None:
        """Note that a recorded tensor has the values of one in a file, of the same shape. Nothing is read yet."""
        self.take_back()
        target = self.ref(tensor)
        op = _given(len(self.tape.ops), target, stored)
        if target.dense and target.nbytes == self.tape.storages[target.storage].nbytes:
            op.overwrites = True
            op.reads = frozenset()
        self.add(op)

    def lend(self, tensor: Tensor, value: Tensor, array: "np.ndarray[Any, Any]") -> None:
        """Note that ``array`` shares the memory of ``value``, and as far as the user can see that of ``tensor``."""
        self._loans.append(_Loan(self.ref(tensor), value, value.clone(), ref(array)))

    def take_back(self) -> None:
        """Note what was written into arrays that share memory with recorded tensors."""
        if not self._loans:
            return
        loans, self._loans = self._loans, []
        for loan in loans:
            if not torch.equal(loan.value, loan.before):
                loan.before = loan.value.clone()
                self.tape.add(_given(len(self.tape.ops), loan.ref, Captured(loan.before)))
        self._loans = [loan for loan in loans if loan.array() is not None]

    def add(self, op: Op) -> None:
        self.tape.add(op)
        for loan in [loan for loan in self._loans if loan.ref.storage in op.writes]:
            with replay.at_rest():
                memory = replay.Replay(self.tape).memory_of([loan.ref.storage])[loan.ref.storage]
                loan.value.copy_(replay.view(memory, loan.ref))
                loan.before = loan.value.clone()


@dataclass(slots=True, eq=False)
class _Loan:
    """A NumPy array over the memory of ``value``, which stands for the recorded tensor at ``ref``."""

    ref: Ref
    value: Tensor
    before: Tensor
    array: "ReferenceType[np.ndarray[Any, Any]]"


def _given(index: int, target: Ref, value: Captured | Stored) -> Op:
    """The operation that copies a real tensor, or one in a file, into a recorded one."""
    return Op(
        index=index,
        func=torch.ops.aten.copy_.default,
        args=(target, value),
        kwargs={},
        reads=frozenset({target.storage}),
        writes=frozenset({target.storage}),
        creates=frozenset(),
        outs=[target],
    )


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator

"""One recording: the tape, which live tensors are on it, and the random streams it draws from."""

from typing import Any

import torch
from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import replay
from fabriclite.birth.streams import Stream
from fabriclite.birth.tape import Op, Ref, Tape


class Recording:
    """What is known of the tensors that were recorded. They themselves are plain tensors on the meta device."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.streams: dict[int, Stream] = {}
        self._numbers: dict[int, int] = {}
        self._watched: list[_torch.StorageWeakRef] = []  # by number; keeps a key from being used again
        self._done: set[int] = set()
        self._values: dict[int, tuple[int, torch.UntypedStorage]] = {}

    # -- which tensors -------------------------------------------------------------
    def number(self, tensor: Tensor) -> int | None:
        """The number of its storage, if it is recorded. Call where no function mode answers for torch."""
        if tensor.device.type != "meta" or tensor.is_sparse:
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
        return self.tape.storages[self.ref(tensor).storage].device

    def enter(self, tensor: Tensor, device: torch.device) -> Ref:
        """Put a new meta tensor's storage on the tape."""
        memory = tensor.untyped_storage()
        storage = self.tape.add_storage(memory.nbytes(), device)
        self._numbers[_torch.storage_key(tensor)] = storage.index
        self._watched.append(_torch.StorageWeakRef(memory))  # type: ignore[no-untyped-call]
        return Ref.of(storage.index, tensor)

    def close(self, storages: set[int]) -> None:
        """These were given real memory somewhere."""
        self._done |= storages

    def waits(self) -> bool:
        """Whether a tensor is alive that still has no memory."""
        left = [watched for i, watched in enumerate(self._watched) if i not in self._done]
        return any(not watched.expired() for watched in left)  # type: ignore[no-untyped-call]

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
    def value(self, tensor: Tensor) -> Tensor:
        """A copy of what a recorded tensor would hold now. Works out just what that needs."""
        ref = self.ref(tensor)
        last = self.tape.last_op(ref.storage)
        known = self._values.get(ref.storage)
        with replay.at_rest():
            if known is None or known[0] != last:
                memory = replay.Replay(self.tape).memory_of([ref.storage])[ref.storage]
                known = self._values[ref.storage] = (last, memory)
            return replay.view(known[1], ref).clone()

    def add(self, op: Op) -> None:
        self.tape.add(op)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator

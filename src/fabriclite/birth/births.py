"""The recorded tensors of one module: found before something replaces its parameters, filled after."""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabriclite import _torch, shards
from fabriclite.birth import replay, session
from fabriclite.birth.fill import Goal, Send, Whole, fill, fill_from_first, loaded
from fabriclite.birth.places import Place, give_lazy_ones_a_device, listed, places_of, replace
from fabriclite.birth.recording import Recording
from fabriclite.birth.streams import At, Held
from fabriclite.birth.tape import Captured, Ref
from fabriclite.clock import Clock
from fabriclite.errors import MaterializeError
from fabriclite.stored import Stored

_SAMPLES: Final = 4096
"""Values of a large captured tensor that its fingerprint looks at."""


class Births:
    """What a module still needs. Empty for one that was built with real tensors.

    Args:
        recording: which its tensors belong to; ``None`` if there is none.
        places: where they are, parameters first.

    Attributes:
        clock: how long it takes to agree on them, and to fill them.
    """

    def __init__(self, recording: Recording | None, places: Sequence[Place]) -> None:
        self._recording = recording
        self.places = list(places)
        self.clock = Clock()
        self._by_id = {id(place.tensor): place for place in self.places}
        self._flat: list[Goal] = []

    @classmethod
    def of(cls, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> "Births":
        """Find them. Call while nothing answers for torch.

        Raises:
            MaterializeError: a tensor was taken from ``torch.empty`` and never written, in part or whole.
        """
        recording = session.current()
        if recording is not None:
            recording.take_back()
        places = [] if recording is None else list(places_of(recording, module, optimizers))
        births = cls(recording, places)
        births._refuse_unwritten()
        give_lazy_ones_a_device(module)
        return births

    def __bool__(self) -> bool:
        return bool(self.places)

    # -- checks ------------------------------------------------------------------------
    def _refuse_unwritten(self) -> None:
        """Raise for what the module's code left as it came from ``torch.empty``."""
        if self._recording is None:
            return
        tape, state = self._recording.tape, {}
        for place in self.places:
            if place.ref.storage not in state:
                state[place.ref.storage] = tape.written(place.ref.storage)
        bad = [p.name for p in self.places if state[p.ref.storage] == "no" and p.ref.numel and p.kind != "attribute"]
        partly = {s for s, written in state.items() if written == "partly"}
        for storage in partly:
            held = [p for p in self.places if p.ref.storage == storage and p.kind != "attribute"]
            with replay.at_rest():
                memory = replay.Replay(tape).memory_of([storage], poisoned=True)[storage]
                bad += [p.name for p in held if replay.poisoned(memory, p.ref)]
        if bad:
            raise MaterializeError(
                f"{listed(bad)} must be loaded or initialised, but {'was' if len(bad) == 1 else 'were'} left as"
                " torch.empty made it, in part or whole. Write its first values in __init__ (torch.zeros,"
                " torch.nn.init), or load them before setup: model.load_state_dict(...), fabric.load_raw(path, model)."
            )

    # -- agreement -----------------------------------------------------------------------
    def outline(self) -> bytes:
        """A digest of names, shapes, dtypes and ties: what all ranks must have in common."""
        first: dict[int, int] = {}
        lines = [
            (p.name, p.kind, p.ref.size, str(p.ref.dtype), p.ref.offset, first.setdefault(p.ref.storage, i))
            for i, p in enumerate(self.places)
        ]
        return hashlib.blake2b(repr(lines).encode(), digest_size=16).digest()

    def fingerprint(self) -> bytes:
        """A digest of everything that decides the values: operations, random states, constants, and the processor.

        Equal on two ranks, each may work out its own part. Of constants of more than 1 Mi elements, 4096 are looked at.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.outline())
        if self._recording is None:
            return digest.digest()
        # Vector code of another width, or another number of threads in a factorisation, gives other last bits.
        digest.update(repr((torch.__version__, torch.backends.cpu.get_cpu_capability())).encode())
        if torch.device("cuda") in {torch.device(self.device_of(place).type) for place in self.places}:
            digest.update(torch.cuda.get_device_name().encode())
        streams: dict[int, int] = {}
        ops = self._recording.tape.needed(self._storages())
        if any(op.name.startswith("linalg_") for op in ops):
            digest.update(repr(torch.get_num_threads()).encode())
        for op in ops:
            digest.update(repr((str(op.func), [_place_of(out) for out in op.outs])).encode())
            _digest_arguments(digest, (op.args, sorted(op.kwargs.items())))
            if isinstance(op.draw, At):
                number = streams.setdefault(id(op.draw.stream), len(streams))
                digest.update(repr((number, op.draw.offset, op.draw.count)).encode())
                digest.update(op.draw.stream.state_at(op.draw.epoch, 0).numpy().tobytes())
            elif isinstance(op.draw, Held):
                digest.update(op.draw.state.numpy().tobytes())
        return digest.digest()

    def _storages(self) -> list[int]:
        return list(dict.fromkeys(place.ref.storage for place in self.places))

    def random_names(self) -> frozenset[str]:
        """Parameters whose values were drawn one by one."""
        if self._recording is None:
            return frozenset()
        tape = self._recording.tape
        drawn = {
            storage
            for storage in self._storages()
            for op in tape.needed([storage])
            if op.draw is not None and storage in op.writes and (op.overwrites or storage in op.creates)
        }
        return frozenset(p.name for p in self.places if p.kind == "parameter" and p.ref.storage in drawn)

    def loaded_names(self) -> frozenset[str]:
        """Parameters and buffers that are a tensor of a file, and nothing else."""
        if self._recording is None:
            return frozenset()
        tape = self._recording.tape
        return frozenset(p.name for p in self.places if p.kind != "attribute" and loaded(tape, p.ref) is not None)

    def names(self) -> frozenset[str]:
        """Parameters and buffers that were recorded, and have no memory yet."""
        return frozenset(p.name for p in self.places if p.kind != "attribute")

    # -- filling ---------------------------------------------------------------------------
    def fill(self, *, shards_on: torch.device | None = None, send: Send | None = None, first: bool = True) -> None:
        """Give every tensor its memory and values, and every module that holds one the same object as before.

        A parameter that was replaced by a sharded one gets this rank's part alone. Call while nothing answers for
        torch.

        Args:
            shards_on: where sharded parts shall be; ``None``: where they were recorded.
            send: how to give all ranks rank 0's values, if they would not all work out the same.
            first: whether this is rank 0.
        """
        if self._recording is None or not self.places:
            return
        with self.clock.phase("fill"):
            self._fill(self._recording, shards_on, send, first)

    def _fill(self, recording: Recording, shards_on: torch.device | None, send: Send | None, first: bool) -> None:
        tape = recording.tape
        plain, split = self._targets(shards_on)
        wholes = {ref.storage: Whole(ref.storage, ref.dtype) for _, ref in plain}
        goals = [*(goal for _, goal in split), *self._flat]
        if send is None:
            fill(tape, goals, list(wholes.values()), torch.get_num_threads())
        else:
            fill_from_first(tape, goals, list(wholes.values()), send, first, self._storages())
        for tensor, ref in plain:
            memory = wholes[ref.storage].memory
            assert memory is not None
            with torch.no_grad():
                _torch.become(tensor, replay.view(memory, ref))
        for sharded, goal in split:
            _torch.become_sharded(sharded, goal.out)
        self._rename()
        recording.close({p.ref.storage for p in self.places if p.kind == "parameter" and p.now() is not p.tensor})
        self.places.clear()

    def _targets(self, shards_on: torch.device | None) -> tuple[list[tuple[Tensor, Ref]], list[tuple[DTensor, Goal]]]:
        """What is to be whole, and what is to hold this rank's part."""
        assert self._recording is not None
        plain: list[tuple[Tensor, Ref]] = []
        split: list[tuple[DTensor, Goal]] = []
        seen = {id(place.tensor) for place in self.places if place.now() is not place.tensor}
        for place in self.places:
            held = place.now()
            if held is None or id(held) in seen or has_memory(held):
                continue  # an old name of a parameter that was replaced gets what replaced it, by `_rename`
            seen.add(id(held))
            if isinstance(held, DTensor):
                device = self.device_of(place) if shards_on is None else shards_on
                split.append((held, self._goal(held, place, device)))
            else:
                plain.append((held, self._still_recorded(held, place)))
        for storage in self._storages():  # a state dict or a view that was taken before, and is kept
            for kept in self._recording.kept(storage):
                if id(kept) not in seen and not isinstance(kept, nn.Parameter):
                    plain.append((kept, self._recording.ref(kept)))
        return plain, split

    def _goal(self, held: DTensor, place: Place, device: torch.device) -> Goal:
        ref, box = place.ref, shards.box(held)
        assert self._recording is not None
        if self._recording.knows(shards.local(held)):
            ref = self._recording.ref(shards.local(held))  # cut by hand: a view of what was recorded
            box = tuple((0, length) for length in ref.size)
        elif (tuple(held.shape), held.dtype) != (ref.size, ref.dtype):
            raise MaterializeError(_changed(place.name, held))
        out = torch.empty([length for _, length in box], dtype=ref.dtype, device=device)
        if loaded(self._recording.tape, ref) is None:  # reading a file raises where it cannot write all
            replay.poison(out.untyped_storage())  # a value that is then not written is found by `verify`
        return Goal(ref, box, out)

    def _still_recorded(self, held: Tensor, place: Place) -> Ref:
        """Where a plain tensor is: what was cut by hand is a view of what was recorded."""
        assert self._recording is not None
        if not self._recording.knows(held):
            raise MaterializeError(_changed(place.name, held))
        return self._recording.ref(held)

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor is held that :meth:`fill` would fill; ``None`` for a real one."""
        return None if has_memory(tensor) else self._by_id.get(id(tensor))

    def device_of(self, place: Place) -> torch.device:
        """Where its tensor would be."""
        assert self._recording is not None
        return self._recording.tape.storages[place.ref.storage].device

    def expect_flat(self, place: Place, start: int, out: Tensor) -> None:
        """Have :meth:`fill` write values ``start`` and following of a tensor, in row-major order, into ``out``.

        ``out``: of shape ``(length,)``, real. The tensor itself was given memory by the caller.
        """
        ref = place.ref
        if ref.contiguous:
            ref = Ref(ref.storage, ref.dtype, (ref.numel,), (1,), ref.offset)
        self._flat.append(Goal(ref, ((start, out.numel()),), out))

    def _rename(self) -> None:
        """Where a module's lists and dictionaries hold a parameter that was replaced, put what replaced it."""
        new = {id(p.tensor): p.now() for p in self.places if p.kind == "parameter" and p.now() is not p.tensor}
        for place in self.places:
            if place.kind == "attribute" and id(place.tensor) in new:
                replace(place.owner, place.tensor, new[id(place.tensor)])


def has_memory(tensor: Tensor) -> bool:
    """Whether ``tensor``, or this rank's part of it, is real. Call while nothing answers for torch."""
    return not shards.local(tensor.detach()).is_meta


def _place_of(ref: Ref | None) -> tuple[Any, ...] | None:
    """The same as a tuple, whose ``repr`` is not written in Python."""
    return None if ref is None else (ref.storage, ref.dtype, ref.size, ref.stride, ref.offset)


def _digest_arguments(digest: Any, value: Any) -> None:
    if isinstance(value, Ref):
        digest.update(repr(_place_of(value)).encode())
    elif isinstance(value, Stored):
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.sample().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Captured):
        tensor = value.value().detach()
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        sample = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()[:_SAMPLES]
        sample = sample if sample.numel() <= 1 << 20 else sample[:: max(1, sample.numel() // _SAMPLES)]
        digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, list | tuple):
        for item in value:
            _digest_arguments(digest, item)
    elif isinstance(value, torch.device):
        digest.update(value.type.encode())  # each rank has another device of the same kind
    elif not isinstance(value, torch.Generator):
        digest.update(repr(value).encode())


def _changed(name: str, held: Tensor) -> str:
    return (
        f"{name} must be spread as it was recorded, but now is a tensor of shape {tuple(held.shape)} that was computed"
        " from it or put in its place, without values. In `parallelize_fn` only cut, distribute and shard; compute"
        " before setup, or build with fabric.init_module(empty_init=False)."
    )

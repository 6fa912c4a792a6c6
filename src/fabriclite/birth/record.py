"""See every operation; note those that make or write recorded tensors instead of running them."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import draws, facts
from fabriclite.birth.recording import Recording
from fabriclite.birth.replay import at_rest, flat
from fabriclite.birth.streams import Draw
from fabriclite.birth.tape import Captured, Op, Ref
from fabriclite.errors import MaterializeError

_META: Final = torch.device("meta")
RECORDABLE: Final = ("cpu", "cuda")
"""Kinds of devices whose random streams are known."""
_FILLS: Final = ("normal_", "uniform_", "fill_", "zero_")
_NEEDS_VALUES: Final = (NotImplementedError, RuntimeError, IndexError, TypeError, ValueError)
"""What operations raise on the meta device when their result depends on values."""


class Recorder(_torch.DispatchMode):  # type: ignore[no-untyped-call]
    """Turns what makes tensors into meta tensors that are on the tape.

    Args:
        recording: where to note.
        device: where tensors would be that are made without one.
        makes: whether new tensors are recorded; off, only what happens to recorded ones is.
    """

    def __init__(self, recording: Recording, device: torch.device, makes: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self.device = device
        self.makes = makes
        self.meta_is_meant = False
        """Whether the user's code, and not torch's, asks for the meta device now."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with _torch.raw():  # C++ code may call with the function mode still on
            return self._see(func, args, kwargs or {})

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, _torch.OpOverload):
            return func(*args, **kwargs)
        known = facts.of(func)
        if _only_fills(known.name, args) and (number := self.recording.number(args[0])) is not None:
            return self._note_fill(func, args, kwargs, number)
        tensors = _tensors_among(args, kwargs)
        recorded = [t for t in tensors if self.recording.knows(t)]
        if not recorded:
            if not self._makes(known, args, kwargs, tensors):
                return self._plain(func, args, kwargs, tensors)
            return self._note(func, args, kwargs, recorded) if tensors else self._note_new(func, args, kwargs)
        moves_nothing = known.views or known.reshapes
        if moves_nothing and (len(recorded) == len(tensors) or known.name in ("lift_fresh", "alias", "detach")):
            return func(*args, **kwargs)
        if any(not self.recording.knows(t) for t in _written(func, args, kwargs)):
            return self._by_value(func, args, kwargs)  # a real tensor gets values of recorded ones
        return self._note(func, args, kwargs, recorded)

    def _makes(self, known: facts.Facts, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
        """Whether something new comes onto the tape: a tensor made of nothing, or brought beside a recorded one."""
        if not known.takes_device or self.meta_is_meant:
            return False
        device = kwargs.get("device")
        if device is not None and device != _META and torch.device(device).type not in RECORDABLE:
            return False
        beside_recorded = kwargs.get("device") == _META  # torch's own code does this, to index for example
        if args and isinstance(args[0], list | tuple) and 0 in args[0] and not beside_recorded:
            return False  # needs no memory; torch gives such a one the memory that it read from a file
        if tensors:
            return beside_recorded and known.name == "_to_copy" and tensors[0].device != _META
        return self.makes or beside_recorded

    # -- real tensors ----------------------------------------------------------------
    def _plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Run it. If it draws, the generator has to be where it seems to be."""
        if not facts.of(func).random:
            return func(*args, **kwargs)
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        stream = self.recording.stream(kwargs.get("generator"), device)
        stream.show()
        return func(*args, **kwargs)

    def _by_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Work out the values that it needs and run it; what it wrote into recorded tensors is noted as given."""
        stood_for: list[tuple[Tensor, Tensor]] = []

        def real(value: Tensor) -> Tensor:
            if not self.recording.knows(value):
                return value
            stood_for.append((value, self.recording.value(value)))
            return stood_for[-1][1]

        if facts.of(func).random:
            device = next(self.recording.device(t) for t in flat([args]) if self.recording.knows(t))
            self.recording.stream(kwargs.get("generator"), device).show()
        real_args, real_kwargs = _on_tensors((args, kwargs), real)
        result = func(*real_args, **real_kwargs)
        for tensor in _written(func, args, kwargs):
            for recorded, value in stood_for:
                if recorded is tensor:
                    self._note(torch.ops.aten.copy_.default, (recorded, value), {}, [recorded])
                    result = recorded if result is value else result
        return result

    # -- recorded tensors --------------------------------------------------------------
    # What constructors do most, filling and making, is noted by itself: the general way asks much that it knows.
    def _note_fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Tensor:
        """Note that a recorded tensor, in storage ``number``, is filled from numbers alone."""
        self.recording.take_back()
        tensor: Tensor = args[0]
        tape, target = self.recording.tape, Ref.of(number, tensor)
        storage, here = tape.storages[number], frozenset((number,))
        whole = target.nbytes == storage.nbytes and (tensor.is_contiguous() or target.dense)
        op = Op(
            index=len(tape.ops),
            func=func,
            args=(target, *args[1:]),
            kwargs=dict(kwargs),
            reads=frozenset() if whole else here,
            writes=here,
            creates=frozenset(),
            outs=[target],
            overwrites=whole,
        )
        if facts.of(func).random:
            op.draw = self._draw(op, tensor, args, kwargs, storage.device)
        self.recording.add(op)
        return tensor

    def _note_new(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note that a tensor is made of nothing."""
        result = func(*args, **_for_meta(func, kwargs, has_recorded=False))
        device = self._device_of(args, kwargs, [])
        out = flat(result)
        outs, creates = self._enter(out, device)
        noted = dict(kwargs)
        _freeze(func, noted, out, device, has_recorded=False)
        op = Op(
            index=len(self.recording.tape.ops),
            func=func,
            args=args,
            kwargs=noted,
            reads=frozenset(),
            writes=creates,
            creates=creates,
            outs=outs,
        )
        if facts.of(func).random:
            op.draw = self._draw(op, out[0], args, kwargs, device)
        self.recording.add(op)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recorded: list[Tensor]) -> Any:
        self.recording.take_back()
        written = _written(func, args, kwargs)
        noted_args, noted_kwargs = _on_tensors((args, kwargs), self._noted)
        reads = frozenset(self.recording.ref(t).storage for t in recorded)
        writes = frozenset(self.recording.ref(t).storage for t in written)
        try:
            result = _without_values(func, args, kwargs, bool(recorded))
        except _NEEDS_VALUES:
            if not recorded:
                raise
            return self._by_value(func, args, kwargs)
        out = flat(result)
        if not any(isinstance(t, Tensor) for t in out) and not writes:
            return result if result is None else self._by_value(func, args, kwargs)
        device = self._device_of(args, kwargs, recorded)
        outs, creates = self._enter(out, device)
        if not writes and not creates:
            return result  # only another look at what is there
        _freeze(func, noted_kwargs, out, device, bool(recorded))
        op = Op(
            index=len(self.recording.tape.ops),
            func=func,
            args=noted_args,
            kwargs=noted_kwargs,
            reads=reads,
            writes=writes | creates,
            creates=creates,
            outs=outs,
        )
        self._settle(op, written)
        if facts.of(func).random:
            target = written[0] if written else next(t for t in out if isinstance(t, Tensor))
            op.draw = self._draw(op, target, args, kwargs, device if not written else self.recording.device(target))
        self.recording.add(op)
        return result

    def _enter(self, out: list[Any], device: torch.device) -> tuple[list[Ref | None], frozenset[int]]:
        """Where the results are, and which storages are new."""
        outs: list[Ref | None] = []
        creates = set()
        for item in out:
            if not isinstance(item, Tensor):
                outs.append(None)
            elif self.recording.knows(item):
                outs.append(self.recording.ref(item))
            else:
                new = self.recording.enter(item, device)
                creates.add(new.storage)
                outs.append(new)
        return outs, frozenset(creates)

    def _settle(self, op: Op, written: list[Tensor]) -> None:
        """Find out whether it overwrites all of its storage, reading none of it."""
        if len(written) != 1 or not (op.name in facts.OVERWRITES or facts.of(op.func).into_out):
            return
        target = self.recording.ref(written[0])
        nbytes = self.recording.tape.storages[target.storage].nbytes
        others = sum(ref.storage == target.storage for ref in op.refs()) - 1
        if target.dense and target.nbytes == nbytes and others == 0:
            op.overwrites = True
            op.reads -= {target.storage}

    def note_macro(self, macro: facts.Macro, tensor: Tensor, args: tuple[Any, ...], draw: Draw) -> None:
        """Note a function of Python that fills ``tensor`` from ``draw``."""
        ref = self.recording.ref(tensor)
        op = Op(
            index=len(self.recording.tape.ops),
            func=macro,
            args=(ref, *args),
            kwargs={},
            reads=frozenset({ref.storage}),
            writes=frozenset({ref.storage}),
            creates=frozenset(),
            outs=[ref],
            draw=draw,
        )
        self._settle(op, [tensor])
        self.recording.add(op)

    def _noted(self, tensor: Tensor) -> Ref | Captured:
        if self.recording.knows(tensor):
            return self.recording.ref(tensor)
        if tensor.device == _META:
            raise MaterializeError(
                f"What a model is made of must have values, but a tensor of shape {tuple(tensor.shape)} that was used"
                " inside init_module is on the meta device. Make it without device='meta'."
            )
        return Captured(tensor)

    def _device_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], recorded: list[Tensor]) -> torch.device:
        """Where its results would be. C++ code asks for the meta device when it makes something like a recorded one."""
        given = [t for t in flat([args]) if isinstance(t, Tensor)]
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted) != _META:
            return torch.device(wanted)
        if recorded:
            return self.recording.device(recorded[0])
        return next((t.device for t in given if t.device != _META), self.device)

    # -- random numbers ------------------------------------------------------------------
    def _draw(
        self, op: Op, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> Draw:
        stream = self.recording.stream(kwargs.get("generator"), device)
        known = facts.of(op.func)
        if stream.generator.device.type == "cpu":
            count = draws.count(known.name, known.overload, target, args, stream.keeps_a_normal)
        else:
            count = draws.measured(op.func, target, args, stream.generator.device)
        if count is not None:
            return stream.draw(count)
        draw = stream.held()
        self._draw_for_real(op, args, kwargs)
        stream.look()
        return draw

    def _draw_for_real(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Move the generator as it would: on the values it needs, or on any memory if it needs none."""

        def real(value: Tensor) -> Tensor:
            if not self.recording.knows(value):
                return value
            if args and value is args[0] and op.name in facts.FILLS | facts.DRAWN_FILLS:
                return torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=self.recording.device(value)
                )
            return self.recording.value(value)

        real_args, real_kwargs = _on_tensors((args, kwargs), real)
        with at_rest():
            op.func(*real_args, **real_kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    places = [facts.argument(func, place, args, kwargs) for place in facts.of(func).written]
    return [t for t in flat(places) if isinstance(t, Tensor)]


def _without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_recorded: bool) -> Any:
    """What ``func`` returns, on the meta device."""
    return func(*_on_tensors(args, _on_meta), **_for_meta(func, kwargs, has_recorded))


def _freeze(func: Any, kwargs: dict[str, Any], out: list[Any], device: torch.device, has_recorded: bool) -> None:
    """Write down what depends on the moment: the default dtype and device of now, not of replay."""
    known = facts.of(func)
    if not has_recorded and known.has("dtype") and kwargs.get("dtype") is None:
        kwargs["dtype"] = out[0].dtype
    if known.takes_device and (not has_recorded or kwargs.get("device") is not None):
        kwargs["device"] = device


def _only_fills(name: str, args: tuple[Any, ...]) -> bool:
    """Whether it fills its first argument, from arguments that need no check.

    Such a one is not run on the meta device: the kernels there are Python, and import torch's compiler (1 s).
    """
    if name not in _FILLS or not all(isinstance(number, int | float) for number in args[1:]):
        return False
    match name, args[1:]:
        case ("zero_", ()) | ("fill_", (_,)) | ("normal_", ()) | ("normal_", (_,)) | ("uniform_", ()):
            return True
        case ("normal_", (_, std)):
            return bool(std >= 0)
        case ("uniform_", (low, high)):
            return bool(low <= high)
    return False


def _tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) and value and not isinstance(value[0], int):  # lists are of one kind
            found += [t for t in flat(value) if isinstance(t, Tensor)]
    return found


def _on_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same arguments with ``change`` done to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _on_tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_on_tensors(item, change) for item in value)
    return value


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.device == _META:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)


def _for_meta(func: Any, kwargs: dict[str, Any], has_recorded: bool) -> dict[str, Any]:
    """The same keyword arguments for a run on the meta device."""
    changed = _on_tensors(kwargs, _on_meta)
    if facts.of(func).takes_device and (changed.get("device") is not None or not has_recorded):
        changed["device"] = _META
    if changed.get("pin_memory"):
        changed["pin_memory"] = False
    if changed.get("generator") is not None:
        changed["generator"] = None
    return changed  # type: ignore[no-any-return]

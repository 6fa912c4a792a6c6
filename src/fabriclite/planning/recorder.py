"""Seeing one step: when every storage is born and dies, which module computes then, and what happens in between."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor, nn

from fabriclite import _torch
from fabriclite.planning.trace import Beat, Held, Mark, Step
from fabriclite.planning.values import Phase
from fabriclite.shards import local

_CUDA_BLOCK: Final = 512
"""Bytes to which torch's allocator for CUDA rounds every tensor up."""
_ATTENTION: Final = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")

Event = tuple[int, int, str] | Mark
"""A storage's number, its bytes (negative when it dies) and the module that computes; or a mark."""


class Recorder(_torch.DispatchMode):
    """Notes births and deaths of storages within it, in ``events``.

    Args:
        wrappers: classes of tensors around tensors (``DTensor``): what they run inside is seen instead.
        rounds: bytes to which each storage is rounded up.
    """

    def __init__(self, wrappers: tuple[type, ...], rounds: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.flops = 0.0
        self.kernels: set[str] = set()
        self.module = ""
        self.backward = False
        self._wrappers = wrappers
        self._rounds = rounds
        self._alive: dict[int, tuple[Any, int]] = {}
        self._next = 0
        self._flops = _torch.flop_formulas()

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the storage of ``tensor``, which was there before."""
        storage = local(tensor).untyped_storage()
        self._alive[_torch.storage_key(local(tensor))] = (storage, -1)

    def number(self, tensor: Tensor) -> tuple[int, int] | None:
        """Number and bytes of the storage of ``tensor``, if it was born here."""
        inner = local(tensor)
        found = self._alive.get(_torch.storage_key(inner))
        return None if found is None or found[1] < 0 else (found[1], self._bytes(inner.untyped_storage()))

    def most(self) -> int:
        """The most bytes that were held at once."""
        return self._most(set())

    def most_temporary(self) -> int:
        """The most bytes that were held at once of what is gone at the end."""
        return self._most(_alive_after(self.events))

    def _most(self, kept: set[int]) -> int:
        now = peak = 0
        for event in self.events:
            if not isinstance(event, Mark) and event[0] not in kept:
                now += event[1]
                peak = max(peak, now)
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._wrappers and any(issubclass(kind, self._wrappers) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        formula = self._flops.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
            if any(part in packet.__name__ for part in _ATTENTION) and "backward" not in packet.__name__:
                self.kernels.add(packet.__name__)
        elif packet.__name__.startswith(_ATTENTION):
            self.kernels.add(packet.__name__)
        if isinstance(out, Tensor):
            self._saw(out)
        elif isinstance(out, tuple | list):
            for leaf in _torch.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._saw(leaf)
        return out

    def _saw(self, tensor: Tensor) -> None:
        key = _torch.storage_key(tensor)
        if key in self._alive:
            return
        storage = tensor.untyped_storage()
        number, size = self._next, self._bytes(storage)
        self._next += 1
        self._alive[key] = (ref(storage, partial(self._died, key, number, size)), number)
        self.events.append((number, size, self.module))

    def _died(self, key: int, number: int, size: int, _: Any) -> None:
        if self._alive.get(key, (None, None))[1] == number:
            del self._alive[key]
        self.events.append((number, -size, self.module))

    def _bytes(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._rounds) * self._rounds


class Hooks:
    """Tells a recorder which module computes, and marks the moments at which a strategy may act."""

    def __init__(self, recorder: Recorder, module: nn.Module) -> None:
        self._recorder = recorder
        self._stack: list[str] = []
        self._handles: list[Any] = []
        for name, sub in module.named_modules():
            self._handles.append(sub.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
            self._handles.append(sub.register_forward_hook(partial(self._leave, name)))
        for name, param in module.named_parameters():
            if param.requires_grad:
                hook = partial(self._gradient, name)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(self._recorder.module)
        self._recorder.module = name
        if self._recorder.backward:  # computed again: no strategy acts
            return
        self._recorder.events.append(Mark("enter", name))
        inputs = _differentiable((args, kwargs))
        missing = [len(inputs)]

        def arrived(grad: Tensor) -> None:
            missing[0] -= 1
            if missing[0] == 0:
                self._recorder.events.append(Mark("leave backward", name))
                self._recorder.module = name.rpartition(".")[0]

        for tensor in inputs:
            tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._recorder.module = self._stack.pop()
        if self._recorder.backward:
            return
        self._recorder.events.append(Mark("leave", name))
        seen = [False]

        def arrives(grad: Tensor) -> None:
            self._recorder.module = name
            if not seen[0]:
                seen[0] = True
                self._recorder.events.append(Mark("enter backward", name))

        for tensor in _differentiable(output):
            tensor.register_hook(arrives)  # type: ignore[no-untyped-call]

    def _gradient(self, name: str, param: nn.Parameter) -> None:
        assert param.grad is not None
        found = self._recorder.number(param.grad)
        if found is not None:
            self._recorder.events.append((found[0], -found[1], self._recorder.module))
            self._recorder.events.append(Mark("gradient", name, found[1]))


def _differentiable(value: Any) -> list[Tensor]:
    """Tensors in ``value`` through which gradients flow, each once."""
    if is_dataclass_output(value):
        value = dict(value)
    found = {id(t): t for t in _torch.tree_leaves(value) if isinstance(t, Tensor) and t.requires_grad}
    return list(found.values())


def is_dataclass_output(value: Any) -> bool:
    """Whether it is a dictionary of a class of its own, such as what Hugging Face models return."""
    return isinstance(value, dict) and type(value) is not dict


@contextmanager
def hooked(recorder: Recorder, module: nn.Module) -> Iterator[None]:
    hooks = Hooks(recorder, module)
    try:
        yield
    finally:
        hooks.remove()


# -- from events to beats ---------------------------------------------------------------------------------------------


def step_of(recorder: Recorder) -> Step:
    """The step that ``recorder`` saw."""
    events = in_order(recorder.events)
    turn = next(i for i, event in enumerate(events) if isinstance(event, Mark) and event.what == "forward ends")
    kept = _alive_after(events[:turn])
    by_module: Counter[str] = Counter()
    for number, size, module in (event for event in events[:turn] if not isinstance(event, Mark)):
        if number in kept and size > 0:
            by_module[module] += size
    largest_first = dict(sorted(by_module.items(), key=lambda item: -item[1]))
    return Step(tuple(_beats(events, kept)), recorder.flops, largest_first, tuple(sorted(recorder.kernels)))


def in_order(events: Sequence[Event]) -> list[Event]:
    """Where the end of one module's backward and the begin of another's fall together, the end comes first.

    Both are told by hooks of one tensor, in the order in which they were put there in forward.
    """
    done: list[Event] = []
    run: list[Mark] = []
    for event in events:
        if isinstance(event, Mark) and event.what in ("enter backward", "leave backward"):
            run.append(event)
            continue
        if run:
            done += [mark for mark in run if mark.what == "leave backward"]
            done += [mark for mark in run if mark.what == "enter backward"]
            run = []
        done.append(event)
    return done + run


def _alive_after(events: Sequence[Event]) -> set[int]:
    alive: set[int] = set()
    for event in events:
        if isinstance(event, Mark):
            continue
        if event[1] > 0:
            alive.add(event[0])
        else:
            alive.discard(event[0])
    return alive


def _beats(events: Sequence[Event], kept: set[int]) -> Iterator[Beat]:
    gone: dict[int, bool] = defaultdict(bool)  # a gradient that was handed over dies again later
    now, peak, where = Held(), Held(), ""
    phase: Phase = "forward"
    for event in events:
        if isinstance(event, Mark):
            yield Beat(phase, where, peak, now, event)
            peak, where = now, event.name
            if event.what == "forward ends":
                phase = "backward"
            continue
        number, size, module = event
        if size == 0 or gone[number]:
            continue
        gone[number] = size < 0
        if number in kept:
            now = now._replace(activations=now.activations + size)
        else:
            now = now._replace(temporary=now.temporary + size)
        if now.total > peak.total:
            peak, where = now, module


def rounding(device: str) -> int:
    """Bytes to which a storage on a device of type ``device`` is rounded up."""
    return _CUDA_BLOCK if device == "cuda" else 1

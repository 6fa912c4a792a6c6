"""ZeRO's ways: flat buffers cut evenly over the ranks, and parameters gathered module by module."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from typing_extensions import override

from fabriclite.layout import Layout
from fabriclite.planning.ledger import Ledger
from fabriclite.planning.rules import Rule
from fabriclite.planning.trace import Mark, Trace, Weight

_MASTER: Final = 4
"""Bytes of an element of a master and of its gradient: both are float32."""


@final
class Flat(Rule):
    """Every rank holds all parameters, in one buffer; the optimizer steps a part of it, of which it keeps a copy.

    Gradients are put into a bucket of the size of the model or less. What the bucket held of this rank's part is kept
    beside it, in whole parameters.
    """

    def __init__(self, layout: Layout, weights: Sequence[Weight]) -> None:
        self._layout = layout
        self._trained = [w for w in weights if w.trainable]
        self._frozen = sum(w.bytes for w in weights if not w.trainable)
        self._width = layout.param_dtype.itemsize
        whole = sum(w.numel for w in self._trained)
        self._part = -(-whole // (2 * layout.shard)) * 2  # parts begin at multiples of two elements
        self._whole = self._part * layout.shard
        self._bucket = min(whole, layout.bucket_numel)
        self._open = False

    @property
    @override
    def computes_in(self) -> torch.dtype:
        return self._layout.param_dtype

    @override
    def resident(self) -> dict[str, int]:
        masters = self._part * _MASTER
        found = {"parameters": self._whole * self._width + self._frozen}
        if not self._layout.optimizer_on_host:
            return {**found, "optimizer": masters}
        largest = max((w.numel for w in self._trained), default=0) * self._width
        # The host has masters, their gradients, a copy in the parameters' dtype; both have a gradient on its way.
        return {
            **found,
            "communication": largest,
            "host optimizer": masters + self._part * self._width,
            "host gradients": masters,
            "host communication": largest,
        }

    @override
    def stepped(self) -> int:
        return self._part

    @property
    @override
    def together(self) -> bool:
        return True

    def _own(self) -> int:
        """Elements of the parameters that begin in the first part."""
        found = 0
        for weight in self._trained:
            if found >= self._part:
                break
            found += weight.numel
        return found

    @override
    def at(self, mark: Mark, ledger: Ledger) -> None:
        if mark.what == "gradient":
            ledger.add("gradients", mark.bytes)
            if not self._open:
                ledger.add("communication", self._bucket * self._width)
                self._open = True
            ledger.free("gradients", mark.bytes)
        elif mark.what == "backward ends" and self._open:
            if self._layout.shard > 1:
                ledger.pass_by("communication", self._bucket * self._width)
            if not self._layout.optimizer_on_host:
                ledger.add("gradients", self._own() * self._width)
            ledger.free("communication", self._bucket * self._width)

    @override
    def step(self, ledger: Ledger) -> None:
        if self._layout.optimizer_on_host:
            return
        flat, single = self._part * self._width, self._part * _MASTER
        ledger.add("gradients", flat)
        if self._width != _MASTER:
            ledger.add("gradients", single)
            ledger.free("gradients", flat)
        ledger.free("gradients", self._own() * self._width)


@dataclass(eq=False, slots=True)
class _Sending:
    """Parameters that were gathered by one call. Its buffer lives until the last of them was asked for."""

    waiting: set[str]
    buffer: int
    done: bool = False


@dataclass(slots=True)
class _State:
    """Which parameters are whole on this rank."""

    available: set[str] = field(default_factory=set)
    sending: dict[str, _Sending] = field(default_factory=dict)
    asked_until: dict[str, int] = field(default_factory=dict)
    step: int = 0


@final
class ByModule(Rule):
    """Each module's own parameters are gathered when it computes, and ahead of it; small ones stay.

    What is used again soon is not freed. Gradients are put into a bucket that is always there, reduced when it is full,
    and kept in a buffer of this rank's part that is always there too.
    """

    def __init__(self, layout: Layout, weights: Sequence[Weight], own: dict[str, list[str]], trace: Trace) -> None:
        self._layout = layout
        self._staged = trace.device == "cpu"  # gloo copies what it sends and gets through memory of its own
        beats = trace.steps[layout.param_dtype].beats
        self._weights = {w.name: w for w in weights}
        self._trained = [w for w in weights if w.trainable]
        self._own = own
        self._width = layout.param_dtype.itemsize
        self._part = sum(-(-w.numel // layout.shard) for w in self._trained)
        self._bucket = min(sum(w.numel for w in weights), layout.bucket_numel)
        self._filled = 0
        small = {w.name for w in weights if w.numel < layout.persistent_numel}
        self._small = small
        self._state = _State()
        entering = [b.mark for b in beats if b.mark.what in ("enter", "enter backward")]
        self._uses = [own[mark.name] for mark in entering if own.get(mark.name)]
        self._queue = deque((name, step) for step, names in enumerate(self._uses) for name in names)
        self._first = True

    @property
    @override
    def computes_in(self) -> torch.dtype:
        return self._layout.param_dtype

    @override
    def resident(self) -> dict[str, int]:
        parts = sum(-(-w.numel // self._layout.shard) * w.dtype.itemsize for w in self._weights.values())
        masters, gradients = self._part * _MASTER, self._part * self._width
        parameters = "host parameters" if self._layout.parameters_on_host else "parameters"
        found = {parameters: parts, "communication": self._bucket * self._width}
        if self._layout.optimizer_on_host:
            return {**found, "host optimizer": masters, "host gradients": masters + gradients}
        return {**found, "optimizer": masters, "gradients": gradients}

    @override
    def stepped(self) -> int:
        return self._part

    @property
    @override
    def together(self) -> bool:
        return True

    @override
    def at(self, mark: Mark, ledger: Ledger) -> None:
        if self._first:
            self._first = False
            self._state.available |= self._small
            ledger.add("communication", sum(self._weights[name].bytes for name in self._small))
        match mark.what:
            case "enter" | "enter backward" if self._own.get(mark.name):
                self._fetch(self._own[mark.name], ledger)
            case "leave" | "leave backward" if self._own.get(mark.name):
                self._release(self._own[mark.name], ledger)
            case "gradient":
                self._gradient(mark, ledger)
            case "backward ends":
                self._flush(ledger)
                self._release_all(ledger)

    # -- parameters ------------------------------------------------------------------
    def _fetch(self, names: Sequence[str], ledger: Ledger) -> None:
        state = self._state
        self._send([n for n in names if n not in state.available and n not in state.sending], ledger)
        for name in names:
            self._receive(name, ledger)
        new = [name for name in names if state.asked_until.get(name, -1) < state.step]
        for _ in new:
            if self._queue:
                name, step = self._queue.popleft()
                state.asked_until[name] = step
        self._ahead(ledger)
        state.step += 1

    def _ahead(self, ledger: Ledger) -> None:
        """Gather what is used next, as far as is allowed."""
        state = self._state
        whole = sum(self._weights[name].numel for name in (*state.available, *state.sending))
        room = min(self._layout.live_numel - whole, self._layout.ahead_numel)
        chosen: dict[str, None] = {}
        size = 0
        while self._queue and size < room:
            name, step = self._queue.popleft()
            state.asked_until[name] = max(state.asked_until.get(name, -1), step)
            if name not in state.available and name not in state.sending and name not in chosen:
                chosen[name] = None
                size += self._weights[name].numel
        self._send(list(chosen), ledger)

    def _send(self, names: Sequence[str], ledger: Ledger) -> None:
        if not names:
            return
        size = sum(self._gathered(name) for name in names)
        sending = _Sending(set(names), size)
        ledger.add("communication", size)
        if self._staged:
            ledger.pass_by("communication", size)
        self._state.sending |= dict.fromkeys(names, sending)

    def _receive(self, name: str, ledger: Ledger) -> None:
        sending = self._state.sending.get(name)
        if sending is None:
            return
        if not sending.done:
            sending.done = True
            if len(sending.waiting) == 1:  # its buffer is the parameter
                sending.buffer = 0
            else:
                ledger.add("communication", sum(self._gathered(other) for other in sending.waiting))
            self._state.available |= sending.waiting
        del self._state.sending[name]
        sending.waiting.discard(name)
        if not sending.waiting:
            ledger.free("communication", sending.buffer)

    def _gathered(self, name: str) -> int:
        ranks, weight = self._layout.shard, self._weights[name]
        return -(-weight.numel // ranks) * ranks * weight.dtype.itemsize

    def _release(self, names: Sequence[str], ledger: Ledger) -> None:
        state = self._state
        gone = {n for n in names if n not in self._small and state.asked_until.get(n, -1) <= state.step}
        passed = 0
        for later in self._uses[state.step :]:
            if passed >= self._layout.reuse_numel or not gone:
                break
            gone -= set(later)
            passed += sum(self._weights[name].numel for name in later)
        self._free(gone, ledger)

    def _release_all(self, ledger: Ledger) -> None:
        self._free(self._state.available - self._small, ledger)

    def _free(self, names: set[str], ledger: Ledger) -> None:
        for name in names & self._state.available:
            if name not in self._state.sending:
                ledger.free("communication", self._gathered(name))
                self._state.available.discard(name)

    # -- gradients -------------------------------------------------------------------
    def _gradient(self, mark: Mark, ledger: Ledger) -> None:
        size = self._weights[mark.name].numel
        ledger.add("gradients", mark.bytes)
        if self._filled + size > self._bucket:
            self._flush(ledger)
        self._filled += size
        ledger.free("gradients", mark.bytes)

    def _flush(self, ledger: Ledger) -> None:
        """Reduce what the bucket holds, which is put into the order of ranks first."""
        ledger.pass_by("communication", self._filled * self._width * (2 if self._staged else 1))
        self._filled = 0

    @override
    def step(self, ledger: Ledger) -> None:
        ledger.free("communication", sum(self._weights[name].bytes for name in self._small))  # until after it
        if self._layout.optimizer_on_host:
            return
        part = min(self._part, self._layout.flat_numel)
        ledger.add("gradients", part * self._width)
        if self._width != _MASTER:
            ledger.add("gradients", part * _MASTER)
            ledger.free("gradients", part * self._width)

"""What a layout adds to a step of the model: one rule for each way to spread it. No strategy is named here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from typing_extensions import override

from fabriclite.layout import Group, Layout
from fabriclite.planning.ledger import Ledger
from fabriclite.planning.trace import Mark, Weight


class Rule(ABC):
    """Acts on a ledger at the marks of a step."""

    @property
    @abstractmethod
    def computes_in(self) -> torch.dtype:
        """Dtype of the parameters that the model's operations see."""

    @abstractmethod
    def resident(self) -> dict[str, int]:
        """Bytes that are held from set-up on, by kind; those with ``"host "`` before it in host memory. Masters are of
        the kind ``optimizer``; its state comes with the first step."""

    @abstractmethod
    def stepped(self) -> int:
        """Elements that this rank's optimizer steps."""

    @property
    def gradients_on_host(self) -> int:
        """Bytes of gradients that a backward leaves in host memory, where set-up had none."""
        return 0

    @property
    def together(self) -> bool:
        """Whether it steps them as one tensor."""
        return False

    @abstractmethod
    def at(self, mark: Mark, ledger: Ledger) -> None:
        """What happens at ``mark``."""

    def step(self, ledger: Ledger) -> None:  # noqa: B027  most do nothing
        """What happens between backward and the optimizer's own step."""


@final
@dataclass(slots=True)
class Replicated(Rule):
    """Every rank holds everything; gradients travel in buckets where several ranks do."""

    layout: Layout
    weights: Sequence[Weight]

    @property
    @override
    def computes_in(self) -> torch.dtype:
        return self.layout.param_dtype

    @override
    def resident(self) -> dict[str, int]:
        buckets = sum(w.bytes for w in self.weights if w.trainable) if self.layout.bucket_bytes else 0
        return {"parameters": sum(w.bytes for w in self.weights), "communication": buckets}

    @override
    def stepped(self) -> int:
        return sum(w.numel for w in self.weights if w.trainable)

    @override
    def at(self, mark: Mark, ledger: Ledger) -> None:
        if mark.what == "gradient":
            ledger.add("gradients", mark.bytes)
            if self.layout.gradients_in_buckets:
                ledger.free("gradients", mark.bytes)


@dataclass(slots=True)
class _Unit:
    """A group while a step is gone through. Sizes in bytes."""

    gathered: int
    """On this rank while it is gathered; what travels takes as much again."""
    sent: int
    """What a rank sends of it, in the dtype it travels in."""
    cast: bool
    """Whether that is a copy in another dtype."""
    reduced: int
    """Gradients on their way."""
    shard: int
    """This rank's part of them, in the dtype they travel in."""
    kept: int
    """This rank's part of them, at rest."""
    root: bool
    whole: int = 0
    """Gradients that are not reduced yet."""
    open: bool = False
    on_the_way: bool = False
    done: bool = False


@final
class Gathering(Rule):
    """Groups of parameters are gathered into one buffer, copied out, and freed after their module.

    What is gathered in forward keeps its buffer until the next group is copied out. In backward the group that comes
    next is on its way while one computes. Gradients of a group are put into one buffer, which lives until the next one
    is filled.

    Args:
        layout: how the model is spread.
        weights: of the model.
        groups: what is gathered together.
        staged: collectives copy what they send and get through memory of their own, as gloo's do.
    """

    def __init__(self, layout: Layout, weights: Sequence[Weight], groups: Sequence[Group], staged: bool) -> None:
        self._layout = layout
        self._staged = staged
        self._weights = weights
        named = {weight.name: weight for weight in weights}
        self._grouped = {name for group in groups for name in group.parameters}
        self._owner = {name: group.module for group in groups for name in group.parameters}
        self._units = {group.module: self._unit(group, named) for group in groups}
        self._buffer = 0
        self._reducing = 0
        self._order: list[_Unit] = []

    def _unit(self, group: Group, named: dict[str, Weight]) -> _Unit:
        ranks, weights = self._layout.shard, [named[name] for name in group.parameters]
        rows = sum(w.rows(ranks) for w in weights)
        travels = group.dtype or (weights[0].dtype if weights else self._layout.param_dtype)
        trained = [w for w in weights if w.trainable]
        reduced = self._layout.reduce_dtype if group.dtype else travels
        own = sum(w.rows(ranks) for w in trained)
        return _Unit(
            gathered=rows * ranks * travels.itemsize,
            sent=rows * travels.itemsize,
            cast=group.dtype is not None,
            reduced=own * ranks * reduced.itemsize,
            shard=own * reduced.itemsize,
            kept=sum(w.rows(ranks) * w.dtype.itemsize for w in trained),
            root=group.module == "",
        )

    @property
    @override
    def computes_in(self) -> torch.dtype:
        return self._layout.compute_dtype

    @override
    def resident(self) -> dict[str, int]:
        ranks = self._layout.shard
        parts = sum(self._part(w, ranks) * w.dtype.itemsize for w in self._weights)
        return {"host parameters" if self._layout.parameters_on_host else "parameters": parts}

    @property
    @override
    def gradients_on_host(self) -> int:
        return sum(unit.kept for unit in self._units.values()) if self._layout.parameters_on_host else 0

    def _part(self, weight: Weight, ranks: int) -> int:
        return weight.rows(ranks) if weight.name in self._grouped else weight.numel

    @override
    def stepped(self) -> int:
        return sum(self._part(w, self._layout.shard) for w in self._weights if w.trainable)

    @override
    def at(self, mark: Mark, ledger: Ledger) -> None:
        match mark.what:
            case "gradient":
                ledger.add("gradients", mark.bytes)
                if mark.name in self._owner:
                    self._units[self._owner[mark.name]].whole += mark.bytes
            case "backward ends":
                for unit in reversed(self._units.values()):
                    if not unit.done:
                        self._reduce(unit, ledger)
                self._end(ledger)
            case "forward ends":
                self._free_buffer(ledger)
            case _ if mark.name in self._units:
                self._pass(mark.what, self._units[mark.name], ledger)

    def _pass(self, what: str, unit: _Unit, ledger: Ledger) -> None:
        match what:
            case "enter":
                self._gather(unit, ledger, keep_buffer=True)
            case "leave":
                if self._reshards(unit):
                    self._shut(unit, ledger)
                self._order.append(unit)
                if unit.root:
                    self._free_buffer(ledger)
            case "enter backward":
                self._gather(unit, ledger, keep_buffer=False)
                self._send_for_next(unit, ledger)
            case "leave backward":
                self._reduce(unit, ledger)

    def _reshards(self, unit: _Unit) -> bool:
        asked = self._layout.reshard_after_forward
        return not unit.root if asked is None else asked

    def _gather(self, unit: _Unit, ledger: Ledger, keep_buffer: bool) -> None:
        if unit.open:
            return
        several = self._layout.shard > 1
        if several and not unit.on_the_way:
            self._send(unit, ledger)
        self._free_buffer(ledger)
        ledger.add("communication", unit.gathered)
        unit.open, unit.on_the_way = True, False
        if several and keep_buffer:
            self._buffer = unit.gathered
        elif several:
            ledger.free("communication", unit.gathered)

    def _send(self, unit: _Unit, ledger: Ledger) -> None:
        if unit.cast:
            ledger.add("communication", unit.sent)
        ledger.add("communication", unit.gathered)
        if unit.cast:
            ledger.free("communication", unit.sent)
        if self._staged:
            ledger.pass_by("communication", unit.gathered)
        unit.on_the_way = True

    def _send_for_next(self, unit: _Unit, ledger: Ledger) -> None:
        if unit in self._order[1:]:
            before = self._order[self._order.index(unit) - 1]
            if not before.open and not before.on_the_way and not before.done and self._layout.shard > 1:
                self._send(before, ledger)

    def _free_buffer(self, ledger: Ledger) -> None:
        ledger.free("communication", self._buffer)
        self._buffer = 0

    def _shut(self, unit: _Unit, ledger: Ledger) -> None:
        if unit.open:
            ledger.free("communication", unit.gathered)
            unit.open = False

    def _reduce(self, unit: _Unit, ledger: Ledger) -> None:
        self._shut(unit, ledger)
        unit.done = True
        ledger.free("communication", self._reducing)
        self._reducing = 0
        if not unit.whole:
            return
        ledger.add("communication", unit.reduced)
        self._reducing = unit.reduced
        ledger.free("gradients", unit.whole)
        unit.whole = 0
        if self._staged and self._layout.shard > 1:
            ledger.pass_by("communication", unit.reduced + unit.shard)
        if unit.shard != unit.kept:
            ledger.add("communication", unit.shard)
        ledger.add("gradients", unit.kept)
        if self._layout.parameters_on_host:
            ledger.free("gradients", unit.kept)
        if unit.shard != unit.kept:
            ledger.free("communication", unit.shard)

    def _end(self, ledger: Ledger) -> None:
        ledger.free("communication", self._reducing)
        for unit in self._units.values():
            if unit.on_the_way:
                ledger.free("communication", unit.gathered)
        self._reducing = 0

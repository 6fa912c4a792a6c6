"""The answer: what one way to train one model costs one rank. Values, and how they read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from fabriclite.layout import Layout
from fabriclite.planning import text
from fabriclite.planning.cost import Bound
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.text import Table, size
from fabriclite.planning.values import KINDS, PHASES, Estimate
from fabriclite.precision import Precision
from fabriclite.strategy import StrategyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to train.

    Attributes:
        config: the strategy.
        precision: of numbers.
        batch: samples per rank and forward.
        sequence: tokens of a sample, if the model has them.
        checkpointing: whether repeated blocks are computed again in backward.
    """

    config: StrategyConfig
    precision: Precision
    batch: int
    sequence: int | None
    checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """What a choice costs one rank. ``print(plan)`` shows it as tables.

    Attributes:
        choice: the way to train.
        layout: what of the model each rank holds.
        estimate: memory by phase and kind, traffic, operations.
        bound: the least time of a step.
        hardware: what it is held against.
        optimizer: its name.
    """

    choice: Choice
    layout: Layout
    estimate: Estimate
    bound: Bound
    hardware: Hardware
    optimizer: str

    @property
    def peak(self) -> int:
        """Bytes that one rank holds on its device at most."""
        return self.estimate.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is at most the memory that was given; ``None`` where none was."""
        return None if self.hardware.memory is None else self.peak <= self.hardware.memory

    @property
    def too_much(self) -> str | None:
        """Why it does not fit: the phase that is over, by how much, and what takes most there."""
        if self.fits is not False:
            return None
        assert self.hardware.memory is not None
        phase, moment = max(self.estimate.peaks.items(), key=lambda item: item[1].memory.total)
        most = sorted(moment.memory.by_kind.items(), key=lambda item: -item[1])[:2]
        held = ", ".join(f"{kind} {size(count)}" for kind, count in most if count)
        over = moment.memory.total - self.hardware.memory
        return f"{phase} takes {size(moment.memory.total)}, {size(over)} too much ({held})"

    def to_json(self) -> dict[str, Any]:
        """The estimate, the bound in seconds and whether it fits, as plain dictionaries, lists and numbers."""
        return {
            **self.estimate.to_json(),
            "strategy": code(self.choice.config),
            "checkpointing": self.choice.checkpointing,
            "optimizer": self.optimizer,
            "memory": self.hardware.memory,
            "hardware": asdict(self.hardware),
            "fits": self.fits,
            "bound": {
                "step": self.bound.step,
                "compute": self.bound.compute,
                "links": dict(self.bound.links),
                "limited_by": self.bound.limited_by,
            },
        }

    def picture(self, path: str | Path) -> None:
        """Draw it into a file, ``.png`` or ``.svg``: memory by phase, and over the step.

        Raises:
            ConfigError: matplotlib is missing, or the name ends otherwise.
        """
        from fabriclite.planning.picture import draw

        draw(self, path)

    def tables(self) -> list[Table]:
        """All there is to show."""
        return [self._memory(), self._modules(), self._traffic(), self._time(), self._notes()]

    def __str__(self) -> str:
        return text.plain(self.tables())

    def __repr__(self) -> str:
        made, choice = self.estimate, self.choice
        said = {
            "strategy": code(choice.config),
            "devices": made.world_size,
            "per_node": made.ranks_per_node,
            "precision": repr(choice.precision.name),
            "optimizer": repr(self.optimizer),
            "batch": choice.batch,
            "sequence": choice.sequence,
            "checkpointing": choice.checkpointing,
            "hardware": code(self.hardware),
        }
        return f"plan({made.model}, {', '.join(f'{name}={value}' for name, value in said.items())})"

    # -- tables ------------------------------------------------------------
    @property
    def title(self) -> str:
        """Model, strategy and sizes in a line."""
        made = self.estimate
        again = ", blocks computed again in backward" if self.choice.checkpointing else ""
        return (
            f"{made.model}: {text.number(made.parameters)} parameters, {code(self.choice.config)}, {made.precision},"
            f" {self.optimizer}, {processes(made.world_size, made.ranks_per_node)},"
            f" {fed(self.choice)} a rank{again}"
        )

    def _memory(self) -> Table:
        peaks = {phase: self.estimate.peaks[phase].memory for phase in PHASES if phase in self.estimate.peaks}
        rows = [
            (kind, *(size(held.by_kind.get(kind, 0)) for held in peaks.values()))
            for kind in KINDS
            if any(held.by_kind.get(kind, 0) for held in peaks.values())
        ]
        rows.append(("total", *(size(held.total) for held in peaks.values())))
        head = (f"{phase}{' (peak)' if held.total == self.peak else ''}" for phase, held in peaks.items())
        return Table(f"{self.title}\n{self._verdict()}", ("at most in", *head), tuple(rows))

    def _verdict(self) -> str:
        if self.hardware.memory is None:
            return f"One rank holds at most {size(self.peak)}."
        if self.too_much is not None:
            return f"It does not fit in {size(self.hardware.memory)}: {self.too_much}."
        return f"It fits: one rank holds at most {size(self.peak)} of {size(self.hardware.memory)}."

    def _modules(self) -> Table:
        found = alike(self.estimate.by_module)
        rows = tuple((name or "(root)", str(len(each)), size(sum(each))) for name, each in found[:6])
        head = ("module", "of them", "held together")
        return Table("Activations at the end of forward, by the module that made them", head, rows)

    def _traffic(self) -> Table:
        rows = tuple(
            (item.what, item.link, size(item.bytes), str(item.calls), text.seconds(item.seconds))
            for item in self.estimate.traffic
        )
        return Table("Sent by one rank in a step", ("what", "link", "bytes", "calls", "at least"), rows)

    def _time(self) -> Table:
        return Table("A step takes at least", ("of", "time"), tuple(self._times()))

    def _times(self) -> Iterator[tuple[str, str]]:
        if self.bound.compute is not None and self.estimate.flops is not None:
            yield (
                f"computing {text.number(self.estimate.flops)} operations at the peak",
                text.seconds(self.bound.compute),
            )
        if self.bound.waiting:
            yield "waiting for tensor parallelism", text.seconds(self.bound.waiting)
        for link, value in self.bound.links.items():
            yield f"sending over the {link} link", text.seconds(value)
        if self.bound.step is not None:
            yield f"all at one time, limited by {self.bound.limited_by}", text.seconds(self.bound.step)

    def _notes(self) -> Table:
        return Table("Notes", (), tuple((note,) for note in self.estimate.notes))


def alike(by_module: Mapping[str, int]) -> list[tuple[str, list[int]]]:
    """Bytes by name, those of names that differ in numbers together; the largest sum first."""
    found: dict[str, list[int]] = {}
    for name, held in by_module.items():
        found.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(held)
    return sorted(found.items(), key=lambda item: -sum(item[1]))


_SPOKEN: Final = frozenset({"stage"})
"""Said also where they are at their default: the class alone does not tell people what it is."""


def code(value: Any) -> str:
    """A frozen dataclass as the code that makes it, mostly without what is left at its default."""
    said = (
        f"{field.name}={getattr(value, field.name)!r}"
        for field in fields(value)
        if field.name in _SPOKEN or getattr(value, field.name) != field.default
    )
    return f"{type(value).__name__}({', '.join(said)})"


def processes(world_size: int, ranks_per_node: int) -> str:
    """How many, and how they lie on machines."""
    if world_size == 1:
        return "1 process"
    return f"{world_size} processes, {min(world_size, ranks_per_node)} a machine"


def fed(choice: Choice) -> str:
    """What one rank is fed in a forward."""
    if choice.sequence is None:
        return f"batch {choice.batch}"
    return f"{choice.batch} x {choice.sequence} tokens"

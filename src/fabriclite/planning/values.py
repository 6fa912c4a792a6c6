"""What a plan is made of, as values. Sizes are bytes of one rank, times are seconds, unless a name says otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from fabriclite.layout import Link

Kind = Literal["parameters", "gradients", "optimizer", "activations", "buffers", "communication", "temporary", "input"]
KINDS: Final[tuple[Kind, ...]] = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "buffers",
    "communication",
    "temporary",
    "input",
)
Phase = Literal["init", "load", "forward", "backward", "step"]
PHASES: Final[tuple[Phase, ...]] = ("init", "load", "forward", "backward", "step")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by kind at one moment. ``buffers`` are the model's own; ``communication`` gathers, reduces and buckets."""

    by_kind: Mapping[Kind, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of the step.

    Attributes:
        phase: which part of a run.
        module: name of the module that is computing; ``""`` is the root.
        memory: what is held then.
    """

    phase: Phase
    module: str
    memory: Memory


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends over one kind of link in one step.

    Attributes:
        what: such as ``"all-gather of parameters"``.
        link: over what.
        bytes: sent by one rank.
        calls: number of collectives.
        seconds: at least this long, at the bandwidth given; ``None`` where none was given.
    """

    what: str
    link: Link
    bytes: int
    calls: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one layout of one model costs one rank.

    Attributes:
        model: its name.
        parameters: number of parameters of the whole model.
        strategy: ``repr`` of the config.
        precision: name of the precision.
        world_size: processes.
        ranks_per_node: of them on one machine.
        batch: samples per rank and forward.
        sequence: length of a sample in tokens; ``None`` where the model has none.
        peaks: the highest moment of each phase, on the device. ``init`` and ``load`` are those of set-up.
        timeline: moments of one step in order, for the picture.
        host: what is held in host memory by offloading.
        traffic: what is sent per step.
        flops: floating-point operations of one rank's step, as computed (with recomputation).
        by_module: activations held at the end of forward, by the module that made them; largest first.
        notes: advice and limits, a sentence each.
    """

    model: str
    parameters: int
    strategy: str
    precision: str
    world_size: int
    ranks_per_node: int
    batch: int
    sequence: int | None = None
    peaks: Mapping[Phase, Moment]
    timeline: tuple[Moment, ...] = ()
    host: Memory = field(default_factory=lambda: Memory({}))
    traffic: tuple[Traffic, ...] = ()
    flops: float | None = None
    by_module: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The most one rank holds on its device at any moment of the run."""
        return max(moment.memory.total for moment in self.peaks.values())

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists, strings and numbers."""
        from dataclasses import asdict

        return {**asdict(self), "peak": self.peak}

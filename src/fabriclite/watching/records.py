"""The lines of a run's folder, as values. This file and :mod:`rundir` own the format.

``run.jsonl`` has a ``RunFacts`` for each time the run was started, ``steps.jsonl`` a ``StepRecord`` for each logged
step, ``events-RANK.jsonl`` what each rank told. Times are seconds since 1970, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

VERSION: Final = 1

EventKind = Literal["start", "end", "save", "load", "failure", "preempted", "nonfinite", "spike", "profile", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What was started.

    Attributes:
        started: when.
        attempt: 0 for the first start of this folder, then one more each.
        first_step: steps that were done before this start.
        name: such as the model's class.
        strategy: ``repr`` of the config.
        precision: its name.
        world_size, nodes: processes and machines.
        device: such as ``"cpu"`` or ``"NVIDIA H200"``.
        parameters: of the whole model; ``None``: not known.
        versions: of python, torch, fabriclite.
        total_steps: as the script said.
        plan: ``Estimate.to_json()`` of what was planned, if it was.
        report: the text of ``fabric.report()``.
    """

    started: float
    attempt: int = 0
    first_step: int = 0
    name: str = ""
    strategy: str = ""
    precision: str = ""
    world_size: int = 1
    nodes: int = 1
    device: str = ""
    parameters: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    total_steps: int | None = None
    plan: Mapping[str, Any] | None = None
    report: str = ""
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One logged step, or the steps since the one logged before.

    Attributes:
        step: number of steps done, counted from the run's very first.
        time: when.
        metrics: what the script gave (mean over the ranks), such as ``loss``; and what was measured:
            ``steps_per_second``, ``samples_per_second``, ``tokens_per_second``, ``flops_per_second`` of all ranks,
            ``mfu`` between 0 and 1.
        phases: seconds per step of rank 0 by phase: ``data forward backward optimizer other``.
        seconds: by rank, seconds per step.
        own: by rank, seconds per step that it did not wait for others, where that is known.
        memory: by rank, bytes now.
        peak: by rank, bytes at most since the run started.
    """

    step: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    own: tuple[float, ...] = ()
    memory: tuple[int, ...] = ()
    peak: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        time: when.
        kind: what.
        rank: who tells it.
        step: steps done then; ``None``: not known.
        text: one line for people.
        details: more, as plain values.
    """

    time: float
    kind: EventKind
    rank: int = 0
    step: int | None = None
    text: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

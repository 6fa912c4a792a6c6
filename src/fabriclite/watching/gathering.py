"""Telling all ranks what each measured, in one small message where that is possible."""

import zlib
from collections.abc import Sequence
from typing import Final

from fabriclite import collectives
from fabriclite.watching.phases import PHASES
from fabriclite.watching.rates import Measured
from fabriclite.world import World

_SLOTS: Final = 24
"""Metrics that fit into the small message; it always is as long, as ranks may give different ones."""


def everyones(world: World, mine: Measured) -> list[Measured]:
    """What each rank measured, in rank order. Every rank must call this.

    Metrics travel without their names if all ranks gave the same ones. If not, which each rank learns from the same
    message, a second one carries the names as well.
    """
    if world.size == 1:
        return [mine]
    told = collectives.gather_on_host(world, packed(mine))
    marks = {tuple(one[:2]) for one in told}
    if len(marks) == 1 and len(mine.metrics) <= _SLOTS:
        return [unpacked(one, list(mine.metrics)) for one in told]
    return collectives.gather_objects(world, mine)


def packed(mine: Measured) -> list[float]:
    """As numbers: first how many metrics, and a mark of their names."""
    mark = zlib.crc32("\n".join(mine.metrics).encode())
    metrics = list(mine.metrics.values())[:_SLOTS]
    return [
        len(mine.metrics),
        mark,
        *(mine.steps, mine.seconds, mine.own, mine.memory, mine.peak, mine.samples, mine.tokens, mine.flops),
        *(mine.phases[phase] for phase in PHASES),
        *metrics,
        *[0.0] * (_SLOTS - len(metrics)),
    ]


def unpacked(numbers: Sequence[float], names: Sequence[str]) -> Measured:
    """What :func:`packed` made numbers of."""
    steps, seconds, own, memory, peak, samples, tokens, flops = numbers[2:10]
    phases, metrics = numbers[10 : 10 + len(PHASES)], numbers[10 + len(PHASES) :]
    return Measured(
        steps=int(steps),
        seconds=seconds,
        own=own,
        memory=int(memory),
        peak=int(peak),
        samples=samples,
        tokens=tokens,
        flops=flops,
        metrics=dict(zip(names, metrics, strict=False)),
        phases=dict(zip(PHASES, phases, strict=True)),
    )

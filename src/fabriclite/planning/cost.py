"""The least time a step can take: what is computed and what is sent, at the speeds of a device."""

from collections.abc import Mapping
from dataclasses import dataclass

from fabriclite.layout import Link
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.values import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Seconds of one step, each at least; real steps take longer.

    Attributes:
        compute: of floating-point operations at the device's peak, recomputation included; ``None``: not known.
        links: of what is sent over each link whose bandwidth is known.
        waiting: of ``links``, what tensor parallelism sends: the next product waits for it.
    """

    compute: float | None
    links: Mapping[Link, float]
    waiting: float = 0.0

    @property
    def step(self) -> float | None:
        """If all that can go on at one time does: the longest of computing (and waiting) and each link."""
        if self.compute is None and not self.links:
            return None
        return max(self.waiting + (self.compute or 0.0), *self.links.values(), 0.0)

    @property
    def in_turn(self) -> float:
        """If nothing goes on at one time."""
        return (self.compute or 0.0) + sum(self.links.values())

    @property
    def limited_by(self) -> str | None:
        """``"compute"`` or the link that takes longest."""
        if self.step is None:
            return None
        slowest = max(self.links, key=lambda link: self.links[link], default=None)
        if slowest is None or self.waiting + (self.compute or 0.0) >= self.links[slowest]:
            return "compute"
        return slowest


TENSOR = "of tensor parallelism"
"""How the traffic that computing waits for is named."""


def bound(estimate: Estimate, hardware: Hardware) -> Bound:
    """Of an estimate whose traffic carries its seconds."""
    links: dict[Link, float] = {}
    for item in estimate.traffic:
        if item.seconds is not None:
            before = links.get(item.link, 0.0)
            # What goes to the host and what comes from there, an item each, goes at one time.
            links[item.link] = max(before, item.seconds) if item.link == "host" else before + item.seconds
    computed = None if hardware.flops is None or estimate.flops is None else estimate.flops / hardware.flops
    waiting = sum(item.seconds or 0.0 for item in estimate.traffic if TENSOR in item.what)
    return Bound(compute=computed, links=links, waiting=waiting)

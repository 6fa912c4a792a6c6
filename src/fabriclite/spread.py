"""How one running strategy spread one model, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """Parts of a model that were treated alike.

    Attributes:
        how: such as ``"FSDP"`` or ``"ColwiseParallel"``.
        what: class of the modules, or what else there is ``count`` of.
        count: how many; ``None``: the root, which there is one of.
    """

    how: str
    what: str
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What a strategy did to a model.

    Attributes:
        mesh: axis to size, outermost first; empty for one device.
        wrapped: in the order in which it was done.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    wrapped: tuple[Wrapped, ...] = ()

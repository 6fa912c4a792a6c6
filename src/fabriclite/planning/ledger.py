"""What is held, by kind, while a step is gone through."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from fabriclite.planning.trace import Held
from fabriclite.planning.values import KINDS, PHASES, Kind, Memory, Moment, Phase

_PLACE: Final = {kind: place for place, kind in enumerate(KINDS)}


class _Seen(NamedTuple):
    """A moment as numbers: thousands are seen for each that is shown."""

    total: int
    phase: Phase
    module: str
    held: tuple[int, ...]
    own: Held

    def moment(self) -> Moment:
        sizes: dict[Kind, int] = dict(zip(KINDS, self.held, strict=True))
        sizes["activations"] += self.own.activations
        sizes["temporary"] += self.own.temporary
        return Moment(self.phase, self.module, Memory({kind: size for kind, size in sizes.items() if size}))


class Ledger:
    """Bytes held on the device by kind, the highest moment of each phase, and moments in order.

    Args:
        held: at the start.
    """

    def __init__(self, held: Mapping[Kind, int]) -> None:
        self.phase: Phase = "forward"
        self.module = ""
        self.own = Held()
        """What the model's operations hold just now."""
        self._held = [held.get(kind, 0) for kind in KINDS]
        self._total = sum(self._held)
        self._highest: dict[Phase, _Seen] = {}
        self._kept: list[_Seen] = []
        self._pending: _Seen | None = None

    def add(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes more."""
        self._held[_PLACE[kind]] += size
        self._total += size
        if size > 0:
            self.see(self.own)

    def free(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes less."""
        self._held[_PLACE[kind]] -= size
        self._total -= size

    def pass_by(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes for a moment."""
        self.add(kind, size)
        self.free(kind, size)

    def see(self, own: Held) -> None:
        """A moment at which the model's operations hold ``own``."""
        total = self._total + own.total
        if self._pending is not None and total <= self._pending.total:
            return
        self._pending = _Seen(total, self.phase, self.module, tuple(self._held), own)
        highest = self._highest.get(self.phase)
        if highest is None or total > highest.total:
            self._highest[self.phase] = self._pending

    def keep(self) -> None:
        """Remember the highest moment since the last call."""
        if self._pending is not None:
            self._kept.append(self._pending)
        self._pending = None

    def peaks(self) -> dict[Phase, Moment]:
        """The highest moment of each phase."""
        return {phase: seen.moment() for phase, seen in self._highest.items()}

    def timeline(self, points: int) -> tuple[Moment, ...]:
        """About ``points`` of what was kept: of each stretch of a phase the highest, and all of the step."""
        size = -(-len(self._kept) // points)
        chosen: list[_Seen] = []
        for phase in PHASES:
            own = [seen for seen in self._kept if seen.phase == phase]
            each = 1 if phase == "step" else size
            parts = [own[i : i + each] for i in range(0, len(own), each or 1)]
            chosen += [max(part, key=lambda seen: seen.total) for part in parts]
        return tuple(seen.moment() for seen in chosen)

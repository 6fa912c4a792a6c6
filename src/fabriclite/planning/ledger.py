"""What is held, by kind, while a step is gone through."""

from collections import Counter
from collections.abc import Mapping

from fabriclite.planning.trace import Held
from fabriclite.planning.values import Kind, Memory, Moment, Phase


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
        self.peaks: dict[Phase, Moment] = {}
        self.moments: list[Moment] = []
        self._held: Counter[Kind] = Counter(held)
        self._total = sum(held.values())
        self._highest: dict[Phase, int] = {}
        self._since = -1
        self._pending: Moment | None = None

    def __getitem__(self, kind: Kind) -> int:
        return self._held[kind]

    def add(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes more."""
        self._held[kind] += size
        self._total += size
        if size > 0:
            self.see(self.own)

    def free(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes less."""
        self._held[kind] -= size
        self._total -= size

    def pass_by(self, kind: Kind, size: int) -> None:
        """Hold ``size`` bytes for a moment."""
        self.add(kind, size)
        self.free(kind, size)

    def see(self, own: Held) -> None:
        """A moment at which the model's operations hold ``own``."""
        total = self._total + own.total
        if total > self._highest.get(self.phase, -1):
            self._highest[self.phase] = total
            self.peaks[self.phase] = self._moment(own)
        if total > self._since:
            self._since = total
            self._pending = self._moment(own)

    def keep(self) -> None:
        """Put the highest moment since the last call into ``moments``."""
        if self._pending is not None:
            self.moments.append(self._pending)
        self._pending, self._since = None, -1

    def _moment(self, own: Held) -> Moment:
        held: dict[Kind, int] = {kind: size for kind, size in self._held.items() if size}
        for kind, size in (("activations", own.activations), ("temporary", own.temporary)):
            if size:
                held[kind] = held.get(kind, 0) + size  # type: ignore[index, call-overload]
        return Moment(self.phase, self.module, Memory(held))

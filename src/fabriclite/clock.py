"""How long the parts of set-up take. Nothing here runs during a step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up seconds by phase.

    Attributes:
        seconds: of this process, in the order in which phases first began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs within it is ``name``, also if it raises."""
        began = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another clock measured."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

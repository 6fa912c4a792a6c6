"""Random streams whose place is known without drawing.

While recording, the generator's true place is kept as a number here. A draw of known length only adds to it; the state
at any place is worked out when it is needed.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fabriclite.birth import twister

_HIDDEN_SEED: Final = 0x5EED_FAB1_11CE
"""Seeds what a generator holds while its true place is kept here. Any other state was set by the user's code."""

_HIDDEN_OFFSET: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class At:
    """A draw of ``count`` numbers at a place of a stream."""

    stream: "Stream"
    epoch: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A draw of unknown length, from ``state``."""

    stream: "Stream"
    state: Tensor


Draw = At | Held


class Stream:
    """One generator's stream. Whoever sets the generator (``torch.manual_seed``) begins a new epoch.

    Args:
        generator: of the CPU or of a CUDA device.
        lazy: leave the generator behind while recording, and set it only when somebody looks. Otherwise it is moved
            after every draw.
    """

    def __init__(self, generator: torch.Generator, *, lazy: bool) -> None:
        self.generator = generator
        self.may_lag = lazy
        self.lazy = lazy
        self._advance: Callable[[Tensor, int], Tensor] = (
            twister.advanced if generator.device.type == "cpu" else _philox_advanced
        )
        self._hidden_state = torch.Generator(generator.device).manual_seed(_HIDDEN_SEED).get_state()
        if generator.device.type != "cpu":  # seed and offset are all there is: an offset that nobody reaches
            self._hidden_state = _philox_advanced(self._hidden_state, _HIDDEN_OFFSET)
        self._epochs: list[tuple[list[int], list[Tensor]]] = []
        self._hidden = False
        self._offset = 0
        self._lock = Lock()
        self.look()

    # -- while recording ---------------------------------------------------------
    def look(self) -> None:
        """Begin a new epoch if the generator is not where it was left."""
        state = self.generator.get_state()
        expected = self._hidden_state if self._hidden else self._here() if self._epochs else None
        if expected is None or not torch.equal(state, expected):
            self._epochs.append(([0], [state]))
            self._offset, self._hidden = 0, False

    def draw(self, count: int) -> At:
        """Note a draw of ``count`` numbers, without drawing."""
        self.look()
        at = At(self, len(self._epochs) - 1, self._offset, count)
        self._offset += count
        if not self.lazy:
            self.generator.set_state(self._here())
        elif not self._hidden:
            self._hidden = True
            self._hidden_state[:8] = self._epochs[-1][1][0][:8]  # `torch.initial_seed()` still answers
            self.generator.set_state(self._hidden_state)
        return at

    def show(self) -> None:
        """Set the generator to where it would be, had everything been drawn."""
        self.look()
        if self._hidden:
            self._hidden = False
            self.generator.set_state(self._here())

    def held(self) -> Held:
        """Note a draw of unknown length; the caller then draws it for real."""
        self.show()
        return Held(self, self.generator.get_state())

    @property
    def keeps_a_normal(self) -> bool:
        """Whether the next draw of a single normal takes one that was kept."""
        self.look()
        if self.generator.device.type != "cpu":
            return False
        return twister.keeps_a_normal(self._epochs[-1][1][0])

    # -- while replaying, from any thread -----------------------------------------
    def state_at(self, epoch: int, offset: int) -> Tensor:
        """The generator's state ``offset`` numbers after the beginning of ``epoch``. Do not change it."""
        with self._lock:
            offsets, states = self._epochs[epoch]
            place = bisect_right(offsets, offset) - 1
            if offsets[place] != offset:
                state = self._advance(states[place], offset - offsets[place])
                offsets.insert(place + 1, offset)
                states.insert(place + 1, state)
                place += 1
            return states[place]

    def beginnings(self) -> list[Tensor]:
        """The state at the beginning of each epoch."""
        return [states[0] for _, states in self._epochs]

    def _here(self) -> Tensor:
        return self.state_at(len(self._epochs) - 1, self._offset)


def _philox_advanced(state: Tensor, count: int) -> Tensor:
    """A CUDA generator's state is its seed and the offset of its counter."""
    moved = state.clone()
    moved.numpy()[8:16].view(np.int64)[0] += count
    return moved

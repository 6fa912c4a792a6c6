"""Random streams whose place is known without drawing.

While recording, the generator's true place is kept as a number here. A draw of known length only adds to it; the state
at any place is worked out when it is needed.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from fabriclite.birth import twister
from fabriclite.birth.tickets import Strayed, Tickets
from fabriclite.errors import MaterializeError


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
        self._tickets = Tickets(generator.device)
        self._places: list[tuple[int, int]] = []
        """By number of ticket, the epoch and offset that it stands for."""
        self._left: bytes | None = None
        """What the generator was left with; it stands for the true place if ``_hidden``. As bytes: they are compared
        at every draw, and a tensor's take ten times as long."""
        self._hidden = False
        self._epochs: list[tuple[list[int], list[Tensor]]] = []
        self._epoch, self._offset = 0, 0
        self._lock = Lock()
        self.look()

    # -- while recording ---------------------------------------------------------
    def look(self) -> None:
        """Follow whoever set the generator since it was left.

        Raises:
            MaterializeError: numbers were drawn from it that nobody saw.
        """
        state = self.generator.get_state()
        if state.numpy().tobytes() == self._left:
            return
        try:
            ticket = self._tickets.read(state, self._hidden)
        except Strayed:
            self._hidden = False
            self._leave(self._here())
            raise MaterializeError(
                "While a model is recorded only its own code must draw from torch's default generator, but another"
                " thread did. Let that draw before or after, or from a torch.Generator of its own."
            ) from None
        if ticket is None:
            self._epochs.append(([0], [state]))
            self._epoch, self._offset = len(self._epochs) - 1, 0
        else:  # saved before, and set again
            self._epoch, self._offset = self._places[ticket]
        self._hidden, self._left = ticket is not None, state.numpy().tobytes()

    def draw(self, count: int) -> At:
        """Note a draw of ``count`` numbers, without drawing."""
        self.look()
        at = At(self, self._epoch, self._offset, count)
        self._offset += count
        self._hidden = self.lazy
        if self.lazy:
            self._places.append((self._epoch, self._offset))
            self._leave(self._tickets.issue(len(self._places) - 1, self._epochs[self._epoch][1][0]))
        else:
            self._leave(self._here())
        return at

    def show(self) -> None:
        """Set the generator to where it would be, had everything been drawn."""
        self.look()
        if self._hidden:
            self._hidden = False
            self._leave(self._here())

    def _leave(self, state: Tensor) -> None:
        self.generator.set_state(state)
        self._left = state.numpy().tobytes()

    def held(self) -> Held:
        """Note a draw of unknown length; the caller then draws it for real."""
        self.show()
        return Held(self, self.generator.get_state())

    def keeps_a_normal(self) -> bool:
        """Whether the next draw of a single normal takes one that was kept."""
        self.look()
        if self.generator.device.type != "cpu":
            return False
        return twister.keeps_a_normal(self._epochs[self._epoch][1][0])

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

    def _here(self) -> Tensor:
        return self.state_at(self._epoch, self._offset)


def _philox_advanced(state: Tensor, count: int) -> Tensor:
    """A CUDA generator's state is its seed and the offset of its counter."""
    moved = state.clone()
    moved.numpy()[8:16].view(np.int64)[0] += count
    return moved

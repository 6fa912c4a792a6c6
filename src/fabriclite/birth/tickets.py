"""What a generator holds while its true place is kept elsewhere: a state that stands for a number.

User code may save it and set it again, and is then understood. Numbers that somebody draws from it are noticed.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from fabriclite.birth import twister

_SEED: Final = 0x5EED_FAB1_11CE
_FAR: Final = 1 << 60
"""Offset of a CUDA generator's counter that nobody reaches."""
_APART: Final = 1 << 24
_BLOCKS: Final = 256
"""Blocks of 624 numbers up to which a draw from a ticket is noticed."""


class Strayed(Exception):
    """Numbers were drawn from a ticket: by code that no mode sees, such as another thread's."""


class Tickets:
    """Of one device's generators."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = device.type == "cpu"
        self._form = torch.Generator(device).manual_seed(_SEED).get_state()
        self._last = self._form.clone()
        """The last ticket. A new one is written over it: there is one for every draw."""
        words = self._last.numpy()
        self._number = words[24:32].view(np.uint64) if self._cpu else words[8:16].view(np.int64)
        self._like: Tensor | None = None

    def issue(self, number: int, like: Tensor) -> Tensor:
        """A state for ``number``, with the seed of the state ``like``: ``torch.initial_seed()`` still answers.

        It holds until the next is issued.
        """
        if like is not self._like:
            self._last[:8] = like[:8]
            self._like = like
        self._number[0] = number if self._cpu else _FAR + number * _APART
        return self._last

    def read(self, state: Tensor, left: bool) -> int | None:
        """The number that ``state`` stands for; ``None`` if it is a generator's own.

        ``left``: whether the generator was left with the last ticket, so that numbers may have been drawn from that.

        Raises:
            Strayed: it was a ticket, and was drawn from.
        """
        if not self._cpu:
            beyond = int(state.numpy()[8:16].view(np.int64)[0]) - _FAR
            if beyond < 0:
                return None
            number, drawn = divmod(beyond, _APART)
            if drawn:
                raise Strayed
            return number
        if torch.equal(state[32:5016], self._form[32:5016]):
            if not torch.equal(state[8:24], self._form[8:24]):
                raise Strayed
            return int(state.numpy()[24:32].view(np.uint64)[0])
        if left and twister.follows(state, self._last, _BLOCKS):
            raise Strayed
        return None

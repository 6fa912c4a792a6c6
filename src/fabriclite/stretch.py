"""A part of a tensor that pays no regard to its shape."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """This rank's part of a tensor that is cut without regard to its shape, as ZeRO does.

    Attributes:
        shape: of the whole tensor.
        start: of the part, in the whole's values in row-major order.
        values: the live memory of the part, of shape ``(length,)``.
        gather: gives the whole tensor. Every rank must call it.
    """

    shape: torch.Size
    start: int
    values: Tensor
    gather: Callable[[], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

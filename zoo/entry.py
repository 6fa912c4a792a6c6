"""One model of the zoo, as a value."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

MAX_PARAMETERS = 25_000_000
"""100 MB of float32. Whoever would build more is passed over."""


class NotBuildable(Exception):
    """Plain construction itself fails here; the message says why."""


def size(build: Callable[[], nn.Module]) -> int:
    """How many parameters ``build`` makes, without making them, and with no trace in torch's generator."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def describe(error: BaseException) -> str:
    """One line: the kind of the first error of a chain, and how its text begins."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A model and how to build it plainly.

    Attributes:
        library: ``"transformers"`` or ``"timm"``.
        model_type: the row of the table it belongs to.
        class_name: the class, or for timm the architecture.
        build: makes a fresh one with random weights. Raises `NotBuildable`.
    """

    library: str
    model_type: str
    class_name: str
    build: Callable[[], nn.Module] = field(compare=False, repr=False)

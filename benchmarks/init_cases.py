"""What is built in `init.py`: sizes, dtypes, and the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn

Variant = Literal["plain", "hf"]

SIZES: Final = {
    "tiny": (64, 2, 512, 64),
    "100M": (640, 14, 50304, 1024),
    "300M": (1024, 20, 50304, 1024),
    "1B": (2048, 18, 50304, 1024),
    "7B": (4096, 32, 50304, 2048),
    "70B": (8192, 86, 50304, 2048),
}
"""Width, blocks, words and positions."""
DTYPES: Final = {"float32": (torch.float32, "32-true"), "bfloat16": (torch.bfloat16, "bf16-true")}
"""By name, and the word for it that front ends have."""


@dataclass(frozen=True, slots=True)
class Case:
    """What all contenders build alike.

    Attributes:
        size: a key of ``SIZES``.
        dtype: a key of ``DTYPES``.
        variant: ``plain`` as torch's layers initialise themselves; ``hf`` the same and then all weights a second time
            by ``self.apply``, as the models of Hugging Face do.
        world: processes.
        threads: of each.
    """

    size: str
    dtype: str
    variant: Variant
    world: int
    threads: int = 1

    @property
    def nbytes(self) -> int:
        """Of the whole model."""
        with torch.device("meta"):
            model = GPT(self.size, self.variant)
        return sum(p.numel() for p in model.parameters()) * DTYPES[self.dtype][0].itemsize

    @property
    def head_nbytes(self) -> int:
        """Of the embedding, or of the head."""
        width, _, words, _ = SIZES[self.size]
        return width * words * DTYPES[self.dtype][0].itemsize

    def __str__(self) -> str:
        return f"{self.size}, {self.dtype}, {self.variant}, world {self.world}"


# -- the model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The layers of a pre-norm transformer block. Nothing here computes: births are what is measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)


class GPT(nn.Module):
    """Embeddings, blocks, and a head that shares the embedding's weight."""

    def __init__(self, size: str, variant: Variant) -> None:
        super().__init__()
        width, blocks, words, positions = SIZES[size]
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.tie()
        if variant == "hf":
            self.apply(init_weights)

    def tie(self) -> None:
        self.head.weight = self.tokens.weight


def init_weights(module: nn.Module) -> None:
    """The second pass of the variant ``hf``."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def reset(module: nn.Module, variant: Variant) -> None:
    """What those who start from the meta device have to write beside the model: its last initialisation, again."""
    if variant == "hf" and isinstance(module, nn.Linear | nn.Embedding):
        init_weights(module)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


def reference(size: str, case: Case) -> nn.Module:
    """What every contender should have built: plain construction at the same seed."""
    torch.manual_seed(0)
    with default_dtype(case.dtype):
        return GPT(size, case.variant)


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """Of ``DTYPES``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[name][0])
    try:
        yield
    finally:
        torch.set_default_dtype(before)

"""A small GPT in one file: plain PyTorch, nothing of it knows how it will be distributed.

    >>> model = GPT(GPTConfig(dim=64, layers=2, heads=4, context=32))
    >>> tokens = torch.randint(256, (2, 32))
    >>> model(tokens).shape
    torch.Size([2, 32, 256])

The pieces are those of current models: RMSNorm before each half of a block, rotary positions, a gated MLP, no biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a model.

    Args:
        vocab_size: Number of tokens. 256 reads bytes.
        context: The longest sequence, in tokens.
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Number of attention heads; divides ``dim`` into an even head width.
        rope_base: Slowest wavelength of the position code, in tokens (divided by two pi).
    """

    vocab_size: int = 256
    context: int = 128
    dim: int = 192
    layers: int = 4
    heads: int = 6
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"`dim` must be a multiple of 2 * heads, but is {self.dim} with {self.heads} heads.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP: two matrices of 4 * dim hold as much as three of 8/3 * dim, rounded up to 64."""
        return 64 * math.ceil(8 * self.dim / 3 / 64)


class RMSNorm(nn.Module):
    """Scales every vector to unit root mean square, then by a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # squares of half precision numbers overflow
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    The number of heads is never written down in ``forward``: under tensor parallelism a rank holds only some of them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, config.dim, bias=False)
        self.wv = nn.Linear(config.dim, config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        # Every block has tables of its own: handed in from outside, mixed precision would round them like activations.
        angle = _rope_angles(config)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result are (batch, time, dim)."""
        batch, time, _ = x.shape
        q, k, v = (w(x).view(batch, time, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        cos, sin = self.cos[:time], self.sin[:time]
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """SwiGLU: one half gates the other."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer; the embedding is also the output projection."""

    # How tensor parallelism may cut the weights: module names, `*` is one segment. Columns first, then rows, so that a
    # block needs one sum over the ranks per half.
    _tp_plan: ClassVar[dict[str, str]] = {
        "blocks.*.attn.wq": "colwise",
        "blocks.*.attn.wk": "colwise",
        "blocks.*.attn.wv": "colwise",
        "blocks.*.attn.wo": "rowwise",
        "blocks.*.mlp.gate": "colwise",
        "blocks.*.mlp.up": "colwise",
        "blocks.*.mlp.down": "rowwise",
    }

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight

        self.apply(self._init_weights)
        # Each block adds twice to the residual stream: smaller steps keep its variance from growing with depth.
        for name, weight in self.named_parameters():
            if name.endswith(("attn.wo.weight", "mlp.down.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens, int64 (batch, time), to the logits of what follows each, (batch, time, vocab_size)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continues ``idx``, int64 (batch, time), by ``max_new_tokens`` tokens. Temperature 0 takes the likeliest."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.context :])[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = (logits / temperature).softmax(dim=-1)
                chosen = torch.multinomial(probabilities, num_samples=1, generator=generator)
            idx = torch.cat((idx, chosen), dim=1)
        return idx


def _rope_angles(config: GPTConfig) -> Tensor:
    """How far each pair of channels is turned at each position: float32 (context, head_dim / 2), in radians."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    position = torch.arange(config.context, dtype=torch.float32)
    return torch.outer(position, config.rope_base**-channel)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x`` (batch, heads, time, head_dim) by tables of (time, head_dim / 2); keeps its dtype."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).to(x.dtype)

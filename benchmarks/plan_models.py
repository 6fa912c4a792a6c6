"""Models whose plans are compared with what they take: each as a subject, and the same with real inputs."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fabriclite.planning.subject import Subject

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

BATCH, CONTEXT = 8, 128


def gpt() -> nn.Module:
    """The GPT of the examples with 5.3 M parameters; its embedding is tied to its output."""
    from gpt import GPT, GPTConfig

    return GPT(GPTConfig(dim=256, layers=6, heads=8, context=CONTEXT, vocab_size=2048))


def llama() -> nn.Module:
    """A Llama of transformers with 7.1 M parameters and grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Convolutions(nn.Module):
    """A residual net with batch normalisation and 7.2 M parameters."""

    def __init__(self, width: int = 256, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def tokens(batch: int, sequence: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(batch, sequence or CONTEXT, dtype=torch.long),), {}


def labelled(batch: int, sequence: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.zeros(batch, sequence or CONTEXT, dtype=torch.long)
    return (), {"input_ids": ids, "labels": ids.clone()}


def images(batch: int, sequence: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(batch, 3, 32, 32),), {}


def next_token(logits: Tensor) -> Tensor:
    """Cross entropy of ``logits`` (batch, time, vocabulary), in float32."""
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long, device=flat.device))


def first_class(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long, device=logits.device))


SUBJECTS = {
    "gpt": Subject(name="gpt", build=gpt, inputs=tokens, loss=next_token),
    "llama": Subject(name="llama", build=llama, inputs=labelled),
    "conv": Subject(name="conv", build=Convolutions, inputs=images, loss=first_class),
}

LLAMA_PLAN = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}

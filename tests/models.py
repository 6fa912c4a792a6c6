"""Models of the kinds users have. Each carries a tensor-parallel plan, as the example's GPT does."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import GPT, GPTConfig


class ConvNet(nn.Module):
    """Convolution and BatchNorm: buffers that change, an integer buffer, statistics of the local batch."""

    _tp_plan: ClassVar = {"head": "colwise_gather_output"}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(h, 4).flatten(1))


class Tied(nn.Module):
    """One matrix as embedding and as output, at the root; blocks between."""

    _tp_plan: ClassVar = {
        "embed": "embedding_rowwise",
        "out": "colwise_gather_output",
        "blocks.*.0": "colwise",
        "blocks.*.2": "rowwise",
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h).mean(1)


class Uneven(nn.Module):
    """Seven rows, five rows, one row: nothing divides by two or four."""

    _tp_plan: ClassVar = {"mix": "colwise_gather_output"}

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 7)
        self.squeeze = nn.Linear(7, 5)
        self.gain = nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.squeeze(torch.tanh(self.mix(x))))
        return torch.cat([h[:, :3], self.gain(h)], dim=1)


class Bare(nn.Module):
    """Parameters that no module's `reset_parameters` knows, used without any submodule; one of them frozen."""

    _tp_plan: ClassVar = {"lin": "colwise_gather_output"}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3) * 0.1 + 1)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.lin = nn.Linear(3, 4)
        with torch.no_grad():
            self.lin.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x * self.scale + self.frozen)


def tiny_gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=32, context=8, layers=2, heads=4, dim=32))


MODELS = {"gpt": tiny_gpt, "conv": ConvNet, "tied": Tied, "uneven": Uneven, "bare": Bare}


def batch(name: str, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets: ``size`` samples."""
    if name == "gpt":
        x = torch.randint(0, 32, (size, 8), generator=generator)
        return x, x.roll(-1, dims=1)
    if name == "tied":
        return torch.randint(0, 12, (size, 5), generator=generator), torch.randint(0, 12, (size,), generator=generator)
    shape = (size, 1, 6, 6) if name == "conv" else (size, 3)
    return torch.randn(shape, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2).float(), target.flatten())

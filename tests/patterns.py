"""Ways in which real ``__init__`` methods make their tensors: small modules, each with one habit of users.

``PATTERNS[name]()`` builds one. Sizes are odd on purpose (7, 13, 17, 33, 60): random fills treat fewer than 16
elements, blocks of 16 and a rest differently, and nothing divides evenly over ranks. Every element is written, so that
two builds at the same seed (see ``seed``) hold the same bits.
"""

import copy
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from fabriclite import Fabric
from gpt import GPT, GPTConfig

PATTERNS: dict[str, Callable[[], nn.Module]] = {}
OUTSIDE = torch.Generator()
"""A user's generator that is older than the module; ``seed`` seeds it too."""
SIZES = (1, 2, 7, 13, 15, 16, 17, 20, 31, 32, 33, 60)
"""Element counts around the blocks of 16 in which torch draws normal numbers on the CPU."""


def seed(number: int) -> None:
    """Seed every generator that a pattern draws from."""
    Fabric.seed_everything(number)
    OUTSIDE.manual_seed(number)


def pattern(init: Callable[[Any], None]) -> Callable[[Any], None]:
    """Enter a module into ``PATTERNS`` whose ``__init__`` is ``init``."""

    class Pattern(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            init(self)

    PATTERNS[init.__name__] = Pattern
    return init


def builder(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Enter a function that returns a module into ``PATTERNS``."""
    PATTERNS[build.__name__] = build
    return build


# -- torch's own layers ------------------------------------------------------------------------------------------------


@builder
def linear() -> nn.Module:
    return nn.Linear(7, 13)


@builder
def linears() -> nn.Module:
    """A stack as most scripts have it; one layer without bias, one of a single row."""
    return nn.Sequential(nn.Linear(17, 60), nn.ReLU(), nn.Linear(60, 33, bias=False), nn.Linear(33, 1))


@pattern
def convolutions(self: Any) -> None:
    self.one = nn.Conv1d(7, 13, 3)
    self.two = nn.Conv2d(6, 12, 3, groups=3, bias=False)
    self.three = nn.Conv3d(1, 7, (1, 2, 3), padding_mode="circular")
    self.up = nn.ConvTranspose2d(7, 5, 3, stride=2)
    self.up1 = nn.ConvTranspose1d(4, 6, 3, groups=2)


@builder
def bilinear() -> nn.Module:
    return nn.Bilinear(7, 5, 3)


@pattern
def embeddings(self: Any) -> None:
    self.plain = nn.Embedding(33, 7)
    self.padded = nn.Embedding(17, 13, padding_idx=3)
    self.bounded = nn.Embedding(13, 5, max_norm=1.0, padding_idx=-1)
    self.bag = nn.EmbeddingBag(17, 7, mode="sum")
    self.table = nn.Embedding.from_pretrained(torch.randn(7, 13))
    self.tuned = nn.Embedding.from_pretrained(torch.rand(7, 3), freeze=False, padding_idx=2)


@pattern
def embeddings_of_many_sizes(self: Any) -> None:
    """One normal fill after another, of every count around a block of 16: each must start where the last one ended."""
    self.tables = nn.ModuleList(nn.Embedding(n, 1) for n in SIZES)


@builder
def lstm() -> nn.Module:
    return nn.LSTM(7, 13, num_layers=2, bidirectional=True, proj_size=5)


@pattern
def recurrent(self: Any) -> None:
    self.gru = nn.GRU(7, 13, batch_first=True)
    self.rnn = nn.RNN(7, 5, nonlinearity="relu", bias=False, num_layers=2)
    self.cells = nn.ModuleList([nn.LSTMCell(7, 3), nn.GRUCell(7, 3), nn.RNNCell(7, 3)])


@pattern
def attention(self: Any) -> None:
    self.packed = nn.MultiheadAttention(12, 4)
    self.split = nn.MultiheadAttention(12, 3, kdim=7, vdim=13, add_bias_kv=True, add_zero_attn=True)


@builder
def transformer() -> nn.Module:
    return nn.Transformer(12, 4, 2, 2, 17, batch_first=True)


@builder
def transformer_encoder() -> nn.Module:
    """It deep-copies the layer it is given."""
    layer = nn.TransformerEncoderLayer(12, 3, 33, norm_first=True)
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(12), enable_nested_tensor=False)


@pattern
def norms(self: Any) -> None:
    self.batch = nn.BatchNorm2d(7)
    self.bare = nn.BatchNorm1d(7, affine=False)
    self.stateless = nn.BatchNorm1d(5, track_running_stats=False)
    self.instance = nn.InstanceNorm2d(7, affine=True, track_running_stats=True)
    self.group = nn.GroupNorm(3, 12)
    self.layer = nn.LayerNorm((3, 5), bias=False)
    self.rms = nn.RMSNorm(13)
    self.gate = nn.PReLU(7, init=0.3)


@pattern
def synchronised_norms(self: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Sequential(nn.BatchNorm2d(5)))
    nn.init.uniform_(net[1].weight)
    self.net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    self.own = nn.SyncBatchNorm(7)


@pattern
def losses(self: Any) -> None:
    self.softmax = nn.AdaptiveLogSoftmaxWithLoss(12, 33, [7, 20], div_value=2.0, head_bias=True)
    self.entropy = nn.CrossEntropyLoss(weight=torch.rand(7))
    self.binary = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0]))


# -- nn.init -----------------------------------------------------------------------------------------------------------


def _layers(*shapes: tuple[int, int], dtype: torch.dtype | None = None) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(i, o, dtype=dtype) for i, o in shapes)


@pattern
def init_uniform(self: Any) -> None:
    self.layers = _layers((7, 13), (3, 5), (60, 17))
    for layer in self.layers:
        nn.init.uniform_(layer.weight, -0.3, 0.1)
        nn.init.uniform_(layer.bias)


@pattern
def init_normal(self: Any) -> None:
    self.weights = nn.ParameterList(torch.empty(n) for n in SIZES)
    for i, weight in enumerate(self.weights):
        nn.init.normal_(weight, mean=0.1 * i, std=0.02)


@pattern
def init_normal_in_other_dtypes(self: Any) -> None:
    """Low precision is drawn wider and rounded, double draws twice as much: the stream's position differs by dtype."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).rpartition(".")[2]
        for n in SIZES:
            self.register_buffer(f"{name}_normal_{n}", nn.init.normal_(torch.empty(n, dtype=dtype), std=0.5))
            self.register_buffer(f"{name}_uniform_{n}", nn.init.uniform_(torch.empty(n, dtype=dtype), -1, 2))
        self.register_buffer(f"{name}_truncated", nn.init.trunc_normal_(torch.empty(33, dtype=dtype), a=-1.0))
        setattr(self, f"after_{name}", nn.Linear(7, 5))


@pattern
def init_constants(self: Any) -> None:
    self.square, self.wide = nn.Linear(13, 13), nn.Linear(17, 7)
    self.conv, self.grouped = nn.Conv2d(3, 7, 3), nn.Conv1d(6, 6, 3, groups=2, bias=False)
    nn.init.eye_(self.square.weight)
    nn.init.constant_(self.square.bias, math.pi)
    nn.init.ones_(self.wide.weight)
    nn.init.zeros_(self.wide.bias)
    nn.init.dirac_(self.conv.weight)
    nn.init.dirac_(self.grouped.weight, groups=2)


@pattern
def init_xavier(self: Any) -> None:
    self.layers = _layers((7, 13), (17, 3))
    self.conv = nn.Conv2d(3, 7, 3)
    nn.init.xavier_uniform_(self.layers[0].weight)
    nn.init.xavier_normal_(self.layers[1].weight, gain=nn.init.calculate_gain("tanh"))
    nn.init.xavier_normal_(self.conv.weight, gain=0.3)


@pattern
def init_kaiming(self: Any) -> None:
    self.layers = _layers((7, 13), (17, 3), (33, 7))
    self.conv = nn.Conv2d(3, 7, 3)
    nn.init.kaiming_uniform_(self.layers[0].weight, a=math.sqrt(5))
    nn.init.kaiming_normal_(self.layers[1].weight, mode="fan_out", nonlinearity="relu")
    nn.init.kaiming_normal_(self.layers[2].weight, a=0.2, nonlinearity="leaky_relu")
    nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")


@pattern
def init_truncated_far(self: Any) -> None:
    """Bounds a hundred deviations away, as nearly everybody leaves them: nothing is ever rejected."""
    self.layers = _layers((7, 13), (3, 5), (60, 17))
    for layer in self.layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.trunc_normal_(layer.bias, std=1e-5)


@pattern
def init_truncated_near(self: Any) -> None:
    """Bounds that reject: how much is drawn depends on what is drawn."""
    self.layers = _layers((7, 13), (33, 17), (3, 3), (13, 7), (60, 7))
    nn.init.trunc_normal_(self.layers[0].weight, std=1.0)
    nn.init.trunc_normal_(self.layers[1].weight, std=0.02, a=-0.04, b=0.04)
    nn.init.trunc_normal_(self.layers[2].weight, std=1.0, a=0.5, b=1.0)
    nn.init.trunc_normal_(self.layers[3].weight, mean=1.0, std=0.5, a=-0.5, b=0.5)
    nn.init.trunc_normal_(self.layers[4].weight[:3], std=1.0, a=-0.5, b=2.0)
    self.after = nn.Linear(7, 3)


@pattern
def init_orthogonal(self: Any) -> None:
    self.tall, self.wide, self.conv = nn.Linear(7, 33), nn.Linear(33, 7), nn.Conv2d(3, 13, 3)
    self.rnn = nn.GRU(7, 5)
    for weight in (self.tall.weight, self.wide.weight, self.conv.weight):
        nn.init.orthogonal_(weight, gain=1.4)
    for name, weight in self.rnn.named_parameters():
        if "weight_hh" in name:
            for part in weight.chunk(3):
                nn.init.orthogonal_(part)


@pattern
def init_sparse(self: Any) -> None:
    self.lin, self.after = nn.Linear(7, 33), nn.Linear(7, 3)
    nn.init.sparse_(self.lin.weight, sparsity=0.3, std=0.1)


@pattern
def init_returns_its_argument(self: Any) -> None:
    self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(7, 13)))
    self.bias = nn.Parameter(nn.init.normal_(torch.empty(13)).abs() + 1)
    self.scale = nn.Parameter(torch.nn.init.constant_(torch.empty(3), 0.5))


# -- schemes over whole models -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP with names as models have them."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 33), nn.GELU(), nn.Linear(33, dim))


@pattern
def apply_on_the_root(self: Any) -> None:
    """What the layers drew for themselves is overwritten, and still moves the stream."""

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)

    self.embed = nn.Embedding(33, 12, padding_idx=1)
    self.blocks = nn.ModuleList(Block() for _ in range(2))
    self.head = nn.Linear(12, 33, bias=False)
    self.apply(init)


@pattern
def named_modules_loop(self: Any) -> None:
    self.stem = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7))
    self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(7, 7, 3), nn.BatchNorm2d(7)) for _ in range(2))
    self.fc = nn.Linear(7, 13)
    for name, module in self.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            module.weight.data.normal_(0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.0 if name.startswith("body") else 1.0)
            nn.init.constant_(module.bias, 0)


@pattern
def scaled_by_depth(self: Any) -> None:
    self.blocks = nn.ModuleList(Block() for _ in range(3))
    for name, weight in self.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
    for i, block in enumerate(self.blocks):  # as BEiT rescales
        block.proj.weight.data.div_(math.sqrt(2.0 * (i + 1)))
        block.mlp[2].weight.data.div_(math.sqrt(2.0 * (i + 1)))


@pattern
def reset_parameters_again(self: Any) -> None:
    """A method of its own, called in ``__init__`` and once more by the parent."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(7, 13))
            self.bias = nn.Parameter(torch.empty(13))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            bound = 1.0 / math.sqrt(self.weight.size(1))
            for param in self.parameters():
                param.data.uniform_(-bound, bound)

    self.first, self.second = Layer(), Layer()
    self.first.reset_parameters()


@pattern
def generic_over_parameters(self: Any) -> None:
    self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.LSTM(13, 5))
    for name, param in self.named_parameters():
        if param.dim() > 1:
            nn.init.xavier_uniform_(param)
        elif "bias" in name:
            nn.init.zeros_(param)


@pattern
def mamba_mixer(self: Any) -> None:
    """Several idioms at once: marks on parameters, inverse softplus, a copy into a bias, a log of a range."""
    self.in_proj, self.dt_proj = nn.Linear(7, 26, bias=False), nn.Linear(3, 13)
    nn.init.uniform_(self.dt_proj.weight, -0.5, 0.5)
    dt = torch.exp(torch.rand(13) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    inverse = dt + torch.log(-torch.expm1(-dt))
    with torch.no_grad():
        self.dt_proj.bias.copy_(inverse)
    self.dt_proj.bias._no_reinit = True
    self.A_log = nn.Parameter(torch.log(torch.arange(1, 17, dtype=torch.float32).repeat(13, 1)))
    self.A_log._no_weight_decay = True
    self.D = nn.Parameter(torch.ones(13))


@pattern
def lora(self: Any) -> None:
    self.base, self.down, self.up = nn.Linear(17, 13), nn.Linear(17, 3, bias=False), nn.Linear(3, 13, bias=False)
    self.base.weight.requires_grad_(False)
    self.base.bias.requires_grad = False
    nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
    nn.init.zeros_(self.up.weight)
    self.scaling = 16 / self.down.out_features


# -- a parent writes into its children ---------------------------------------------------------------------------------


@pattern
def parent_writes_data(self: Any) -> None:
    self.child = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5))
    self.child[0].weight.data[...] = 0.25
    self.child[0].bias.data[3:7] = 1.5
    self.child[1].weight.data[2] = torch.arange(13.0)
    self.child[1].bias.data += 1
    self.child[1].bias.data[-1] -= 7


@pattern
def parent_replaces_data(self: Any) -> None:
    self.a, self.b, self.c = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(7, 13)
    self.a.weight.data = torch.randn(13, 7) * 0.1
    self.b.weight.data = self.a.weight.data.clone()
    self.b.bias.data = self.b.bias.data.abs().sqrt()
    self.c.weight.data = self.c.weight.data[:5]  # the shape changes, and the storage stays whole
    self.c.bias.data = torch.zeros(5)
    self.c.out_features = 5


@pattern
def data_from_outside(self: Any) -> None:
    """What replaces ``data`` was never drawn: constants, NumPy's memory, a file's, nothing at all."""
    self.a, self.b, self.c = nn.Linear(7, 3), nn.Linear(7, 13), nn.Linear(3, 5)
    self.a.bias.data = torch.tensor([1.0, 2.0, 3.0])
    self.a.weight.data = torch.from_numpy(np.arange(21, dtype=np.float32).reshape(3, 7))
    self.b.weight.data = torch.load(io.BytesIO(CHECKPOINT), weights_only=True)["weight"]
    self.b.bias.data = self.b.weight.new_tensor([0.5] * 13)
    self.c.weight.data = torch.empty(0)
    self.c.bias.data = torch.frombuffer(bytearray(20), dtype=torch.float32)


@pattern
def parent_copies_without_grad(self: Any) -> None:
    self.child = nn.Linear(7, 13)
    with torch.no_grad():
        self.child.weight.copy_(torch.eye(13, 7))
        self.child.weight += 0.1 * torch.randn(13, 7)
        self.child.bias.copy_(torch.tensor(2.0))
        self.child.bias[::2].mul_(3)


@pattern
def parent_replaces_parameters(self: Any) -> None:
    self.a, self.b = nn.Linear(7, 13), nn.Linear(7, 13)
    self.a.weight = nn.Parameter(self.a.weight.detach() * 2)
    self.b.bias = None
    self.b.register_parameter("bias", nn.Parameter(torch.full((13,), -2.0)))
    del self.a.bias
    self.a.bias = nn.Parameter(torch.rand(13))


@pattern
def swapped_submodules(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5))
    self.net[0] = nn.Linear(7, 13, bias=False)
    self.net[2] = nn.Identity()
    self.net.append(nn.Linear(13, 33))
    for name, child in list(self.net.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(self.net, name, nn.PReLU(13))
    self.grown = nn.Linear(13, 17)
    with torch.no_grad():
        self.grown.weight[:13].copy_(torch.eye(13))
        self.grown.weight[13:].zero_()


@pattern
def setattr_loops(self: Any) -> None:
    for i, n in enumerate((7, 13, 17)):
        setattr(self, f"weight_{i}", nn.Parameter(torch.randn(n, 3)))
        self.register_buffer(f"state_{i}", torch.zeros(n))
        self.add_module(f"layer_{i}", nn.Linear(n, 3))
        self.register_parameter(f"gain_{i}", nn.Parameter(torch.ones(n)) if i else None)


# -- writes through views ----------------------------------------------------------------------------------------------


@pattern
def fused_qkv_by_chunks(self: Any) -> None:
    self.qkv = nn.Linear(12, 36)
    q, k, v = self.qkv.weight.chunk(3, dim=0)
    for part, gain in ((q, 0.5), (k, 1.0), (v, 2.0)):
        nn.init.xavier_uniform_(part, gain=gain)
    for part in self.qkv.bias.data.split([5, 7, 24]):
        part.normal_()


@pattern
def strided_slices(self: Any) -> None:
    self.weight = nn.Parameter(torch.zeros(13, 33))
    with torch.no_grad():
        self.weight[:, ::2].normal_()
        self.weight[1::3].uniform_(-1, 1)
        self.weight.t().mul_(2)
        self.weight.T[4:9, 2].normal_(std=3)
        self.weight[:, -1] = 1
    self.after = nn.Parameter(torch.randn(17))


@pattern
def transposed_fill(self: Any) -> None:
    """A fill of what is not contiguous draws one number after the other."""
    self.weight = nn.Parameter(torch.empty(13, 17))
    self.weight.data.t().normal_()
    self.small = nn.Parameter(torch.empty(17, 2))
    self.small.data.t().uniform_()
    self.after = nn.Linear(7, 7)


@pattern
def views_of_views(self: Any) -> None:
    self.weight = nn.Parameter(torch.zeros(4, 15))
    view = self.weight.data.view(2, 2, 3, 5)
    view[0, 1].normal_()
    view.permute(3, 1, 0, 2)[2:4, 0].fill_(7)
    view.reshape(4, 15).narrow(1, 3, 4).select(0, 2).uniform_()
    view.flatten()[::7].neg_().add_(1)
    for row in self.weight.data.unbind(0):
        row[0] = 9
    self.weight.data.as_strided((3,), (16,), 1).copy_(torch.tensor([1.0, 2.0, 3.0]))
    self.weight.data.diagonal().add_(0.5)
    self.weight.data[None, :, None].squeeze()[3, 1:4].zero_()


@pattern
def index_writes(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(17, 7))
    with torch.no_grad():
        self.weight[torch.tensor([1, 4, 5])] = 5.0
        self.weight[[2, 3], [1, 6]] = torch.tensor([-1.0, -2.0])
        self.weight.index_fill_(0, torch.tensor([9, 11]), 0.25)
        self.weight.index_copy_(0, torch.tensor([10]), torch.ones(1, 7))
        self.weight.index_add_(1, torch.tensor([0, 2]), torch.ones(17, 2))
        self.weight.scatter_(1, torch.randint(0, 7, (17, 1)), 1.0)
        self.weight.scatter_add_(0, torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7))
        self.weight[torch.randperm(17)[:5]] *= 2
        self.weight.put_(torch.tensor([0, 118]), torch.tensor([3.0, 4.0]))
        self.weight[:7].fill_diagonal_(0.125)


@pattern
def mask_writes(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(13, 7))
    with torch.no_grad():
        self.weight[self.weight > 1] = 1.0
        self.weight[self.weight < -1] *= 0.5
        self.weight.masked_fill_(torch.rand(13, 7) < 0.3, 0.0)
        self.weight.masked_scatter_(self.weight == 0, torch.randn(91))
        self.weight.copy_(torch.where(self.weight.abs() < 0.1, torch.zeros_like(self.weight), self.weight))


@pattern
def chained_in_place(self: Any) -> None:
    self.weight = nn.Parameter(torch.empty(7, 17))
    self.weight.data.normal_().mul_(0.02).clamp_(-0.03, 0.03).add_(1).pow_(2).neg_()
    self.other = nn.Parameter(torch.empty(33).uniform_().log_().sub_(1).lerp_(torch.ones(33), 0.25))
    self.third = nn.Parameter(torch.ones(5).addcmul_(torch.rand(5), torch.rand(5), value=2).div_(3).sqrt_())


@pattern
def out_arguments(self: Any) -> None:
    self.weight = nn.Parameter(torch.empty(7, 17))
    torch.randn(7, 17, out=self.weight.data)
    self.register_buffer("sum", torch.empty(7))
    torch.sum(self.weight.detach(), dim=1, out=self.sum)
    table = torch.zeros(5, 8)
    position = torch.arange(5.0).unsqueeze(1)
    torch.sin(position * torch.arange(1.0, 5.0), out=table[:, 0::2])
    torch.mul(position, torch.arange(2.0, 6.0), out=table[:, 1::2])
    self.register_buffer("table", table)


@pattern
def metadata_in_place(self: Any) -> None:
    weight = torch.randn(3, 7)
    weight.t_().unsqueeze_(0).squeeze_(0)
    self.weight = nn.Parameter(weight.contiguous())
    rows = torch.zeros(2, 5)
    rows.resize_(4, 5).normal_()
    self.register_buffer("rows", rows)
    self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(5))
    self.a.data, self.b.data = self.b.data, self.a.data


# -- parameters out of factories ---------------------------------------------------------------------------------------


@pattern
def randn_times_scale(self: Any) -> None:
    self.pos = nn.Parameter(torch.randn(1, 17, 13) * 0.02)
    self.cls = nn.Parameter(torch.zeros(1, 1, 13))
    self.query = nn.Parameter(13**-0.5 * torch.randn(7, 13))
    self.gamma = nn.Parameter(1e-6 * torch.ones(13))
    self.tau = nn.Parameter(torch.tensor([2.6592]))
    self.decay = nn.Parameter(-torch.arange(1, 8, dtype=torch.float).log())


@pattern
def small_then_large(self: Any) -> None:
    """Fewer than 16 normal numbers come in pairs, of which the second waits for the next call."""
    for i, n in enumerate((1, 5, 40, 3, 3, 16, 7, 8, 17, 1, 1)):
        setattr(self, f"w{i}", nn.Parameter(torch.randn(n)))
        if i in (1, 6):
            setattr(self, f"u{i}", nn.Parameter(torch.rand(n)))


@pattern
def random_factories(self: Any) -> None:
    self.a = nn.Parameter(torch.rand(7, 13))
    self.register_buffer("ints", torch.randint(0, 100, (33,)))
    self.register_buffer("wide", torch.randint(-(2**62), 2**62, (7,)))
    self.register_buffer("order", torch.randperm(33))
    self.register_buffer("coin", torch.bernoulli(torch.full((17,), 0.3)))
    self.register_buffer("mask", torch.empty(17).bernoulli_(0.7).bool())
    self.register_buffer("picked", torch.multinomial(torch.rand(13), 5))
    self.register_buffer("again", torch.multinomial(torch.ones(3), 7, replacement=True))
    self.b = nn.Parameter(torch.normal(0.0, 0.02, size=(7, 5)))
    self.c = nn.Parameter(torch.normal(torch.arange(17.0), 0.1 + torch.rand(17)))
    self.d = nn.Parameter(torch.normal(torch.zeros(5), 2.0))
    self.after = nn.Linear(7, 7)


@pattern
def other_distributions(self: Any) -> None:
    self.exponential = nn.Parameter(torch.empty(33).exponential_(2.0))
    self.cauchy = nn.Parameter(torch.empty(7).cauchy_())
    self.log_normal = nn.Parameter(torch.empty(17).log_normal_(0.0, 0.5))
    self.geometric = nn.Parameter(torch.empty(13).geometric_(0.3))
    self.register_buffer("any", torch.empty(7).random_())
    self.register_buffer("bytes", torch.empty(17, dtype=torch.uint8).random_(3, 200))
    self.register_buffer("counts", torch.poisson(torch.rand(13) * 5))
    self.register_buffer("hits", torch.binomial(torch.full((7,), 10.0), torch.rand(7)))
    self.after = nn.Linear(7, 7)


@pattern
def distribution_objects(self: Any) -> None:
    self.normal = nn.Parameter(torch.distributions.Normal(0.0, 0.1).sample((7, 13)))
    self.uniform = nn.Parameter(torch.distributions.Uniform(-1.0, 1.0).sample((17,)))
    self.register_buffer("classes", torch.distributions.Categorical(torch.ones(5) / 5).sample((7,)))
    self.prior = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    self.dropped = nn.Parameter(F.dropout(torch.ones(33), 0.3, training=True))
    self.noise = nn.Parameter(F.gumbel_softmax(torch.zeros(7), tau=0.5))


@pattern
def truncated_by_erfinv(self: Any) -> None:
    """As timm writes it."""

    def truncated_(weight: Tensor, std: float, a: float, b: float) -> None:
        low, high = ((1.0 + math.erf(x / std / math.sqrt(2.0))) / 2.0 for x in (a, b))
        with torch.no_grad():
            weight.uniform_(2 * low - 1, 2 * high - 1)
            weight.erfinv_()
            weight.mul_(std * math.sqrt(2.0))
            weight.clamp_(min=a, max=b)

    self.lin, self.pos = nn.Linear(13, 17), nn.Parameter(torch.zeros(1, 5, 3))
    truncated_(self.lin.weight, 0.02, -2.0, 2.0)
    truncated_(self.pos, 1.0, -1.5, 1.0)


@pattern
def variance_scaling(self: Any) -> None:
    """As flax ports write it: fans by a private helper, truncation by its own deviation."""
    self.lin, self.conv = nn.Linear(13, 17), nn.Conv2d(3, 7, 3)
    for module in (self.lin, self.conv):
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(module.weight)
        nn.init.trunc_normal_(module.weight, std=math.sqrt(1.0 / fan_in) / 0.87962566103423978)
        nn.init.normal_(module.bias, std=1e-6)


@pattern
def empty_kinds(self: Any) -> None:
    self.like = nn.Parameter(torch.randn_like(torch.empty(7, 13)))
    self.register_buffer("uniform_like", torch.rand_like(self.like, dtype=torch.float64))
    self.zero_like = nn.Parameter(torch.zeros_like(self.like))
    self.register_buffer("whole_like", torch.full_like(self.like, 3, dtype=torch.int32))
    self.empty_like = nn.Parameter(torch.empty_like(self.like).normal_(0, 2))
    self.ones_like = nn.Parameter(torch.ones_like(self.like[:2]))
    self.register_buffer("ints_like", torch.randint_like(self.like, 0, 7))


@pattern
def new_kinds(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    weight = self.lin.weight
    self.values = nn.Parameter(weight.new_tensor([1.0, 2.0, 4.0]))
    self.full = nn.Parameter(weight.new_full((3,), 2.5))
    self.zeros = nn.Parameter(weight.new_zeros(5))
    self.register_buffer("ones", weight.data.new_ones((2, 3), dtype=torch.float64))
    self.empty = nn.Parameter(weight.data.new_empty(20).normal_())
    self.legacy = nn.Parameter(weight.data.new(5, 7).fill_(0.5))


@pattern
def legacy_constructors(self: Any) -> None:
    self.sizes = nn.Parameter(torch.Tensor(6, 4))
    nn.init.xavier_normal_(self.sizes)
    self.floats = nn.Parameter(torch.FloatTensor(5, 7).uniform_(-0.1, 0.1))
    self.values = nn.Parameter(torch.Tensor([1.0, 2.0, 3.0]))
    self.one = nn.Parameter(torch.Tensor(1))
    self.one.data.fill_(0.7)
    self.register_buffer("longs", torch.LongTensor([3, 1, 2]))
    self.register_buffer("bytes", torch.ByteTensor(7).fill_(1))
    self.register_buffer("doubles", torch.DoubleTensor(np.linspace(0, 1, 7)))
    self.register_buffer("cast", torch.randn(7).type(torch.DoubleTensor).type_as(self.sizes))


@pattern
def combined(self: Any) -> None:
    self.cat = nn.Parameter(torch.cat([torch.randn(4, 7), torch.zeros(2, 7), torch.ones(1, 7)]))
    self.stack = nn.Parameter(torch.stack([torch.eye(5) * i for i in range(3)]))
    self.product = nn.Parameter(torch.randn(7, 3) @ torch.rand(3, 5))
    self.outer = nn.Parameter(torch.outer(torch.arange(7.0), torch.randn(5)))
    self.sums = nn.Parameter(torch.cumsum(F.softplus(torch.randn(17)), 0))
    self.lower = nn.Parameter(torch.tril(torch.randn(7, 7)))
    self.einsum = nn.Parameter(torch.einsum("ij,kj->ik", self.stack[1].detach(), torch.randn(3, 5)))
    grid = torch.meshgrid(torch.arange(3.0), torch.linspace(0, 1, 5), indexing="ij")
    self.register_buffer("grid", torch.stack([g.float() for g in grid], dim=-1).flatten(0, 1))
    self.sorted = nn.Parameter(torch.randn(33).sort(descending=True).values)
    self.register_buffer("top", torch.rand(33).topk(5).indices)
    self.softmax = nn.Parameter(torch.randn(7).softmax(0))
    self.blocks = nn.Parameter(torch.block_diag(torch.ones(2, 3), torch.randn(3, 2)))


@pattern
def linear_algebra(self: Any) -> None:
    self.q = nn.Parameter(torch.linalg.qr(torch.randn(13, 7))[0].contiguous())
    u, s, _ = torch.linalg.svd(torch.randn(7, 5), full_matrices=False)
    self.low_rank = nn.Parameter((u[:, :2] * s[:2]).contiguous())
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]  # an invertible 1x1 convolution, as Glow has it
    lu, pivots = torch.linalg.lu_factor(rotation)
    p, lower, upper = torch.lu_unpack(lu, pivots)
    self.register_buffer("p", p)
    self.lower, self.upper = nn.Parameter(lower.contiguous()), nn.Parameter(upper.triu(1).contiguous())
    self.register_buffer("sign", torch.sign(torch.diag(upper)))
    self.inverse = nn.Parameter(torch.linalg.inv(rotation).contiguous())
    self.register_buffer("by_columns", torch.linalg.inv(rotation))


@pattern
def fourier(self: Any) -> None:
    self.register_buffer("window", torch.hann_window(60))
    self.register_buffer("spectrum", torch.fft.rfft(torch.randn(33)))
    self.register_buffer("features", torch.randn(7, 5) * 2 * math.pi)
    self.kernel = nn.Parameter(torch.fft.irfft(torch.ones(9, dtype=torch.complex64), n=16))


# -- values that __init__ looks at -------------------------------------------------------------------------------------


@pattern
def drop_path_schedule(self: Any) -> None:
    rates = [x.item() for x in torch.linspace(0, 0.3, 5)]
    self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Dropout(rate)) for rate in rates)
    self.rates = rates
    self.split = torch.linspace(0, 0.1, 4).tolist()


@pattern
def numbers_out_of_tensors(self: Any) -> None:
    self.as_float = float(torch.rand(1))
    self.as_int = int(torch.randint(0, 100, (1,)))
    self.as_item = torch.randn(3)[1].item()
    self.as_list = torch.rand(2, 3).tolist()
    self.as_complex = complex(torch.complex(torch.rand(()), torch.rand(())))
    self.count = len(torch.nonzero(torch.rand(33) > 0.4))
    self.size = nn.Linear(int(torch.ones(5).sum()), self.count)
    self.index = list(range(100))[torch.tensor(17)]
    self.text = f"{torch.tensor(0.5).item():.2f} {torch.rand(1).item():.6f} {torch.rand(()):.4f}"
    self.rounded = round(torch.rand(1).item(), 3)
    self.scale = nn.Parameter(torch.ones(3) * self.as_float)
    self.layers = nn.ModuleList(nn.Linear(3, n) for n in torch.tensor([7, 13]))


@pattern
def branches_on_values(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    if (self.lin.weight > 0.3).any():
        self.extra = nn.Linear(3, 3)
    if bool(self.lin.bias.abs().max() < 0.2):
        self.small = nn.Parameter(torch.zeros(3))
    if torch.equal(self.lin.bias, self.lin.bias.clone()):
        self.same = nn.Parameter(torch.rand(5))
    if torch.allclose(self.lin.bias, torch.zeros(13)):
        self.zero = nn.Parameter(torch.rand(7))
    if not torch.isnan(self.lin.weight).any() and self.lin.weight.sum() != 0:
        self.fine = nn.Parameter(torch.rand(3))
    while torch.rand(1) < 0.8:
        self.lin.bias.data.add_(1)
    self.tries = self.lin.bias.min().item()
    assert torch.all(torch.isfinite(self.lin.weight)), "checked as users check"


@pattern
def iterated(self: Any) -> None:
    self.layers = nn.ModuleList()
    for n in torch.tensor([3, 7, 5]):
        self.layers.append(nn.Linear(int(n), 7))
    low, high = torch.rand(2)
    self.low, self.high = float(low), float(high)
    self.rows = [row.sum().item() for row in self.layers[0].weight]
    self.has_five = 5 in torch.tensor([3, 7, 5])
    self.length = len(torch.zeros(13, 2))
    self.largest = max(torch.tensor([3, 9, 5])).item()
    self.order = sorted(torch.rand(5).tolist())


@pattern
def shapes_that_depend_on_values(self: Any) -> None:
    draw = torch.randint(0, 7, (33,))
    self.register_buffer("seen", torch.unique(draw))
    self.register_buffer("counts", torch.bincount(draw))
    self.register_buffer("large", draw[draw > 3])
    self.register_buffer("where", torch.stack(torch.where(draw == 2)))
    self.register_buffer("hot", F.one_hot(draw[:5]))
    self.register_buffer("repeated", torch.repeat_interleave(torch.arange(3), torch.tensor([2, 1, 3])))
    self.weight = nn.Parameter(torch.randn(len(self.seen), int(draw.max()) + 1))
    self.chosen = nn.Parameter(torch.masked_select(torch.randn(17), torch.arange(17) % 3 == 0))


@pattern
def scaled_by_own_norm(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    self.lin.weight.data /= self.lin.weight.data.norm(dim=1, keepdim=True)
    self.lin.bias.data *= self.lin.weight.abs().max().item()
    self.embed = nn.Embedding(17, 5)
    with torch.no_grad():
        self.embed.weight.copy_(F.normalize(self.embed.weight, dim=-1))
    _, s, _ = torch.svd(self.lin.weight.detach())
    self.spectral = s[0].item()


@pattern
def looks_at_data(self: Any) -> None:
    """Runs its own layers on random inputs and scales them by what comes out."""
    self.net = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    x = torch.randn(33, 7)
    with torch.no_grad():
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                layer.weight.div_(x.std())
                layer.bias.sub_(x.mean(0) * 0.1)


@pattern
def trains_in_init(self: Any) -> None:
    self.net = nn.Linear(7, 3)
    optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
    x, y = torch.randn(13, 7), torch.randn(13, 3)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(self.net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    self.loss = F.mse_loss(self.net(x), y).item()


@pattern
def pointers_compared(self: Any) -> None:
    """Users look whether two weights are tied by where they lie."""
    self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)
    self.apart = self.a.weight.data_ptr() != self.b.weight.data_ptr()
    self.b.weight = self.a.weight
    self.tied = self.a.weight.data_ptr() == self.b.weight.data_ptr()
    self.view = self.a.weight.untyped_storage().data_ptr() == self.a.weight.data[0].untyped_storage().data_ptr()
    self.distinct = len({p.data_ptr() for p in self.parameters()})


@pattern
def printed(self: Any) -> None:
    self.lin = nn.Linear(3, 2)
    self.shown = str(self.lin.weight)
    self.repr = repr(torch.arange(3))
    self.numbers = sum(p.numel() for p in self.parameters())
    self.bytes = sum(p.numel() * p.element_size() for p in self.parameters())


# -- numpy and Python beside torch -------------------------------------------------------------------------------------


@pattern
def sinusoidal_by_numpy(self: Any) -> None:
    dim, n = 8, 13
    table = np.array([[p / np.power(10000, 2 * (j // 2) / dim) for j in range(dim)] for p in range(n)])
    out = nn.Parameter(torch.empty(n, dim), requires_grad=False)
    out.requires_grad = False
    out[:, : dim // 2] = torch.FloatTensor(np.sin(table[:, 0::2]))
    out[:, dim // 2 :] = torch.FloatTensor(np.cos(table[:, 1::2]))
    out.detach_()
    self.positions = out
    self.register_buffer("raw", torch.from_numpy(table))
    self.register_buffer("floats", torch.from_numpy(table).float().unsqueeze(0))
    self.pos = nn.Parameter(torch.zeros(1, n, dim), requires_grad=False)
    self.pos.data.copy_(torch.from_numpy(table).float().unsqueeze(0))
    self.register_buffer("tensor", torch.tensor(table[0], dtype=torch.float32))
    self.register_buffer("as_tensor", torch.as_tensor(table[1]))


@pattern
def numpy_out_of_tensors(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    weight = self.lin.weight.detach().numpy()
    self.mean = float(weight.mean())
    self.top = int(np.argmax(torch.rand(17).numpy()))
    self.bias = nn.Parameter(torch.from_numpy(np.abs(self.lin.bias.data.cpu().numpy())))
    self.array = np.asarray(torch.arange(5))
    self.register_buffer("sines", torch.tensor(np.sin(torch.linspace(0, 1, 7).numpy())))


@pattern
def numpy_shares_memory(self: Any) -> None:
    """``numpy()`` and ``from_numpy`` are views: what one side writes, the other sees."""
    self.lin = nn.Linear(7, 13)
    self.lin.bias.data.numpy()[:] = np.arange(13)
    self.lin.weight.data.numpy()[2, 3:] *= 2
    array = np.zeros(7, dtype=np.float32)
    self.register_buffer("shared", torch.from_numpy(array))
    array += 3
    self.register_buffer("after", self.shared * 2)


@pattern
def three_generators(self: Any) -> None:
    """Python's, NumPy's and torch's, in turn."""
    self.heads = random.randint(2, 9)
    self.lin = nn.Linear(self.heads, 7)
    self.noise = nn.Parameter(torch.from_numpy(np.random.randn(13)).float())
    self.kept = random.sample(range(33), 5)
    self.weight = nn.Parameter(torch.randn(17) * random.random())
    self.register_buffer("order", torch.from_numpy(np.random.permutation(13)))
    self.drawn = float(np.random.default_rng(torch.randint(0, 99, ()).item()).normal())


# -- tables and buffers ------------------------------------------------------------------------------------------------


@pattern
def rotary_tables(self: Any) -> None:
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    self.register_buffer("inv_freq", inverse, persistent=False)
    angles = torch.outer(torch.arange(13, dtype=torch.float32), self.inv_freq)
    both = torch.cat((angles, angles), dim=-1)
    self.register_buffer("cos", both.cos()[None, None], persistent=False)
    self.register_buffer("sin", both.sin()[None, None], persistent=False)
    self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
    self.lin = nn.Linear(8, 8)


@pattern
def masks(self: Any) -> None:
    self.register_buffer("bias", torch.tril(torch.ones(7, 7, dtype=torch.bool)).view(1, 1, 7, 7), persistent=False)
    self.register_buffer("additive", torch.full((7, 7), float("-inf")).triu(1))
    self.register_buffer("masked_bias", torch.tensor(-1e9), persistent=False)
    window = torch.ones(7, 7).tril() * torch.ones(7, 7).triu(-2)
    self.register_buffer("window", window.masked_fill(window == 0, float("-inf")).masked_fill(window == 1, 0.0))
    upper = torch.zeros(5, 5)
    upper[torch.triu_indices(5, 5, 1).unbind()] = 1
    self.register_buffer("upper", upper)
    self.register_buffer("square", nn.Transformer.generate_square_subsequent_mask(5))


@pattern
def position_ids(self: Any) -> None:
    self.embed = nn.Embedding(33, 7)
    self.register_buffer("position_ids", torch.arange(33).expand((1, -1)), persistent=False)
    self.register_buffer("token_type_ids", torch.zeros(self.position_ids.size(), dtype=torch.long), persistent=False)


@pattern
def sinusoidal(self: Any) -> None:
    table = torch.zeros(13, 8)
    position = torch.arange(0, 13, dtype=torch.float).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, 8, 2).float() * (-math.log(10000.0) / 8))
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    self.register_buffer("pe", table.unsqueeze(0).transpose(0, 1))


@pattern
def relative_positions(self: Any) -> None:
    """As Swin writes it."""
    h, w = 3, 5
    self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), 3))
    coords = torch.flatten(torch.stack(torch.meshgrid([torch.arange(h), torch.arange(w)], indexing="ij")), 1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += h - 1
    relative[:, :, 1] += w - 1
    relative[:, :, 0] *= 2 * w - 1
    self.register_buffer("index", relative.sum(-1))
    nn.init.trunc_normal_(self.table, std=0.02)
    self.register_buffer("bias", self.table.detach()[self.index.view(-1)].view(15, 15, -1), persistent=False)


@pattern
def slopes(self: Any) -> None:
    """ALiBi: a list of Python numbers becomes a table."""
    values = [2 ** (-8 * i / 7) for i in range(1, 8)]
    self.slopes = nn.Parameter(torch.tensor(values).view(7, 1, 1), requires_grad=False)
    distance = torch.arange(13)[None, :] - torch.arange(13)[:, None]
    self.register_buffer("alibi", self.slopes * distance, persistent=False)


@pattern
def buffers_of_parameters(self: Any) -> None:
    self.code = nn.Parameter(torch.randn(17, 7))
    self.register_buffer("average", self.code.data.clone())
    self.register_buffer("norms", self.code.detach().norm(dim=1))
    self.register_buffer("used", torch.zeros(17))
    self.register_buffer("initted", torch.tensor([False]))
    self.code.data.mul_(2)  # the copies keep what was before


@pattern
def buffer_kinds(self: Any) -> None:
    self.register_buffer("none", None)
    self.register_buffer("kept", torch.rand(7))
    self.register_buffer("left", torch.rand(7), persistent=False)
    self.typed = nn.Buffer(torch.randn(5))
    self.typed_left = nn.Buffer(torch.randn(5), persistent=False)
    self.register_buffer("steps", torch.tensor(0, dtype=torch.long))
    self.register_buffer("flags", torch.rand(7) > 0.5)
    self.kept = torch.ones(7)  # assignment to a name that is a buffer replaces the buffer
    self.steps += 3
    self.register_parameter("nothing", None)


@pattern
def momentum_queue(self: Any) -> None:
    """As MoCo writes it: a second encoder that copies the first, and a queue of unit vectors."""
    self.q, self.k = nn.Linear(7, 13), nn.Linear(7, 13)
    for query, key in zip(self.q.parameters(), self.k.parameters(), strict=True):
        key.data.copy_(query.data)
        key.requires_grad = False
    self.register_buffer("queue", torch.randn(13, 17))
    self.queue = F.normalize(self.queue, dim=0)
    self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


@pattern
def resized_positions(self: Any) -> None:
    grid = nn.Parameter(torch.randn(1, 4 * 4, 3))
    image = grid.detach().reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(3, 5), mode="bicubic", antialias=False)
    self.pos = nn.Parameter(resized.permute(0, 2, 3, 1).flatten(1, 2).contiguous())
    self.padded = nn.Parameter(F.pad(torch.randn(3, 5), (1, 1), value=2.0))


# -- ties, shared storage, copies --------------------------------------------------------------------------------------


@pattern
def tied_embedding(self: Any) -> None:
    self.embed, self.head = nn.Embedding(33, 7, padding_idx=3), nn.Linear(7, 33, bias=False)
    self.head.weight = self.embed.weight


@pattern
def tied_before_a_second_init(self: Any) -> None:
    self.embed, self.head, self.other = nn.Embedding(33, 7), nn.Linear(7, 33), nn.Linear(7, 33)
    self.head.weight = self.embed.weight
    self.other.weight = self.head.weight
    for module in self.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


@pattern
def shared_modules(self: Any) -> None:
    """One module under several names: ALBERT's layers, a critic on its actor's trunk."""
    self.trunk = nn.Linear(7, 7)
    self.layers = nn.ModuleList([self.trunk] * 3)
    self.actor, self.critic = nn.Sequential(self.trunk, nn.Linear(7, 3)), nn.Sequential(self.trunk, nn.Linear(7, 1))


@pattern
def tied_biases(self: Any) -> None:
    """The head's bias is also a parameter of the root, and of a list."""
    self.head, self.bias = nn.Linear(7, 13, bias=False), nn.Parameter(torch.zeros(13))
    self.head.bias = self.bias
    self.all = nn.ParameterList([self.bias, self.head.weight])
    self.bias.data.normal_()


@pattern
def parameters_of_one_storage(self: Any) -> None:
    flat = torch.randn(91)
    self.a, self.b = nn.Parameter(flat[:70].view(10, 7)), nn.Parameter(flat[70:])
    self.flat = nn.Parameter(flat)
    with torch.no_grad():
        self.flat.mul_(0.5)
        self.b.add_(1)


@pattern
def vector_to_parameters(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 3))
    vector = nn.utils.parameters_to_vector(self.net.parameters())
    nn.utils.vector_to_parameters(torch.randn_like(vector) * 0.1, self.net.parameters())


@pattern
def buffer_views_parameter(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(13, 7))
    self.register_buffer("head", self.weight.data[:3])
    self.register_buffer("column", self.weight.data[:, 2])
    self.register_buffer("table", torch.arange(17.0))
    self.register_buffer("part", self.table[3:7])
    self.weight.data.mul_(3)
    self.part.zero_()


@pattern
def tied_by_transpose(self: Any) -> None:
    """An autoencoder whose decoder is the encoder's transpose: another parameter, the same memory."""
    self.encoder, self.decoder = nn.Linear(7, 13), nn.Linear(13, 7)
    self.decoder.weight = nn.Parameter(self.encoder.weight.data.t().contiguous())
    self.register_buffer("transpose", self.encoder.weight.data.t())
    nn.init.normal_(self.encoder.weight)


@pattern
def deep_copies(self: Any) -> None:
    layer = Block()
    self.early = copy.deepcopy(layer)
    nn.init.normal_(layer.proj.weight, std=0.02)
    self.late = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
    nn.init.zeros_(layer.proj.weight)
    self.layer = layer
    self.tied = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    self.tied[1].weight = self.tied[0].weight
    self.copied = copy.deepcopy(self.tied)  # ties go along
    self.shallow = copy.copy(self.tied[0])
    self.alone = nn.Parameter(copy.deepcopy(self.tied[0].weight.data))


@pattern
def exponential_average(self: Any) -> None:
    self.model = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13))
    self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
    self.swa = AveragedModel(self.model)
    nn.init.normal_(self.model[0].weight)


@pattern
def copied_weights(self: Any) -> None:
    self.a, self.b, self.c = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(13, 7)
    self.b.weight.data = self.a.weight.data.clone()
    self.c.weight = nn.Parameter(self.a.weight.detach().clone().t().contiguous())
    self.a.weight.data.normal_()  # the copies keep what was before
    self.b.bias.data = self.a.bias.data  # no copy: one storage
    self.a.bias.data.fill_(2)


# -- parametrizations --------------------------------------------------------------------------------------------------


@pattern
def weight_norms(self: Any) -> None:
    self.conv = parametrizations.weight_norm(nn.Conv1d(7, 13, 3), dim=2)
    self.lin = parametrizations.weight_norm(nn.Linear(7, 13))
    self.lin.parametrizations.weight.original0.data.fill_(1)  # as DINO's head
    self.lin.parametrizations.weight.original0.requires_grad = False
    self.after = nn.Linear(7, 7)


@pattern
def spectral_norms(self: Any) -> None:
    self.lin = parametrizations.spectral_norm(nn.Linear(17, 7), n_power_iterations=2)
    self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 7, 3))
    self.after = nn.Linear(7, 7)


@pattern
def orthogonal_weights(self: Any) -> None:
    self.square = parametrizations.orthogonal(nn.Linear(7, 7))
    self.tall = parametrizations.orthogonal(nn.Linear(5, 13), orthogonal_map="householder")
    self.cayley = parametrizations.orthogonal(nn.Linear(7, 7), orthogonal_map="cayley", use_trivialization=False)


@pattern
def own_parametrization(self: Any) -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    self.lin, self.removed = nn.Linear(7, 7), nn.Linear(7, 7)
    parametrize.register_parametrization(self.lin, "weight", Symmetric())
    parametrize.register_parametrization(self.removed, "weight", Symmetric())
    parametrize.remove_parametrizations(self.removed, "weight")
    self.trace = self.lin.weight.trace().item()


@pattern
def old_weight_norm(self: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        self.conv = nn.utils.weight_norm(nn.Conv1d(7, 13, 3), dim=2)
        self.lin = nn.utils.weight_norm(nn.Linear(7, 13))
        self.removed = nn.utils.weight_norm(nn.Linear(7, 3))
        nn.utils.remove_weight_norm(self.removed)
    self.lin.weight_g.data.fill_(1)


@pattern
def old_spectral_norm(self: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        self.lin = nn.utils.spectral_norm(nn.Linear(17, 7))
        self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 7, 3))
    self.after = nn.Linear(7, 7)


@pattern
def pruned(self: Any) -> None:
    self.some, self.least, self.final = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(7, 13)
    prune.random_unstructured(self.some, "weight", amount=0.3)
    prune.l1_unstructured(self.least, "weight", amount=0.2)
    prune.ln_structured(self.final, "weight", amount=2, n=2, dim=0)
    prune.remove(self.final, "weight")


@builder
def fused_conv_and_norm() -> nn.Module:
    conv, norm = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())


# -- generators --------------------------------------------------------------------------------------------------------


@pattern
def seeds_inside(self: Any) -> None:
    self.a = nn.Linear(7, 13)
    torch.manual_seed(99)
    self.b = nn.Linear(7, 13)
    torch.manual_seed(99)
    self.c = nn.Linear(7, 13)


@pattern
def forks_the_generator(self: Any) -> None:
    self.a = nn.Linear(7, 13)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        self.b = nn.Linear(7, 13)
    self.c = nn.Linear(7, 13)


@pattern
def saves_and_restores_state(self: Any) -> None:
    self.a = nn.Parameter(torch.randn(7))
    state = torch.get_rng_state()
    self.b = nn.Linear(7, 13)
    torch.set_rng_state(state)
    self.c = nn.Linear(7, 13)
    self.same = bool(torch.equal(self.b.weight, self.c.weight))
    self.changed = not torch.equal(state, torch.get_rng_state())
    self.register_buffer("state", torch.get_rng_state())
    self.initial = torch.initial_seed()


@pattern
def own_generator(self: Any) -> None:
    g = torch.Generator().manual_seed(3)
    self.a = nn.Parameter(torch.empty(50).normal_(generator=g))
    self.b = nn.Parameter(torch.randn(7, generator=g))
    self.c = nn.Linear(7, 13)  # the default generator is untouched so far
    self.d = nn.Parameter(nn.init.trunc_normal_(torch.empty(7, 5), std=1.0, generator=g))
    self.register_buffer("order", torch.randperm(33, generator=g))
    self.e = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(7, 5), generator=g))
    self.generator = g


@pattern
def generator_from_outside(self: Any) -> None:
    self.a = nn.Parameter(torch.rand(17, generator=OUTSIDE))
    self.lin = nn.Linear(7, 13)
    self.b = nn.Parameter(torch.empty(33).normal_(generator=OUTSIDE))
    self.drawn = torch.randint(0, 99, (3,), generator=OUTSIDE).tolist()


@pattern
def seed_drawn_from_the_stream(self: Any) -> None:
    number = int(torch.empty((), dtype=torch.int64).random_().item())
    g = torch.Generator()
    g.manual_seed(number % 2**31)
    self.a = nn.Parameter(torch.randn(33, generator=g))
    self.b = nn.Parameter(torch.randn(33))


# -- dtypes, layouts, odd shapes ---------------------------------------------------------------------------------------


@builder
def half_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13)).half()


@pattern
def bfloat16_inside(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13)).bfloat16()
    nn.init.normal_(self.net[0].weight, std=0.02)


@pattern
def double_inside(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13))
    self.double()


@pattern
def mixed_dtypes(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(17, 33), nn.LayerNorm(33), nn.Linear(33, 7)).to(torch.bfloat16)
    self.plain = nn.Linear(7, 13)
    self.back = nn.Linear(7, 7).to(torch.float16).float()
    self.register_buffer("scale", torch.randn(7).double())


@pattern
def dtype_arguments(self: Any) -> None:
    self.lin = nn.Linear(7, 13, dtype=torch.bfloat16)
    self.norm = nn.LayerNorm(13, dtype=torch.bfloat16)
    self.weight = nn.Parameter(torch.randn(17, dtype=torch.bfloat16) * 0.02)
    self.uniform = nn.Parameter(torch.rand(7, 5, dtype=torch.bfloat16))
    self.register_buffer("range", torch.arange(7, dtype=torch.float16))


@pattern
def default_dtype_inside(self: Any) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        self.lin = nn.Linear(7, 13)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
    finally:
        torch.set_default_dtype(before)
    self.register_buffer("wide", torch.rand(7))


@pattern
def frozen_kinds(self: Any) -> None:
    """Parameters that cannot have gradients, beside some that can."""
    self.lin = nn.Linear(7, 13)
    self.whole = nn.Parameter(torch.randint(0, 99, (17,)), requires_grad=False)
    self.flags = nn.Parameter(torch.rand(7) > 0.5, requires_grad=False)
    self.bytes = nn.Parameter(torch.randint(0, 255, (13, 3), dtype=torch.uint8), requires_grad=False)


@pattern
def complex_numbers(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(7, 5, dtype=torch.complex64))
    pairs = torch.view_as_real(self.weight.data)
    pairs[..., 1].mul_(0.5)
    self.weight.data.real.add_(1)
    self.register_buffer("poles", torch.exp(1j * torch.rand(7)))
    self.register_buffer("real", torch.view_as_real(torch.randn(3, dtype=torch.cfloat)))


@pattern
def scalars(self: Any) -> None:
    self.scale = nn.Parameter(torch.tensor(1.5))
    self.drawn = nn.Parameter(torch.randn(()))
    self.temperature = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))
    self.lin = nn.Linear(7, 3)


@pattern
def nothing_inside(self: Any) -> None:
    self.empty = nn.Parameter(torch.randn(0, 7))
    self.lin = nn.Linear(7, 13)
    self.register_buffer("none", torch.empty(0))


@pattern
def transposed_parameter(self: Any) -> None:
    self.weight = nn.Parameter(torch.empty(5, 7).t())
    nn.init.normal_(self.weight)
    self.lin = nn.Linear(7, 3)


@pattern
def channels_last(self: Any) -> None:
    self.conv = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
    self.again = nn.Conv2d(7, 5, 3).to(memory_format=torch.channels_last)
    nn.init.normal_(self.again.weight)
    self.weight = nn.Parameter(torch.randn(3, 5, 2, 2).contiguous(memory_format=torch.channels_last))


@pattern
def strided_factories(self: Any) -> None:
    self.register_buffer("strided", torch.empty_strided((3, 5), (1, 3)).uniform_())
    self.register_buffer("permuted", torch.empty_permuted((3, 5, 7), (2, 0, 1)).normal_())
    self.register_buffer("view", torch.randn(7, 5).t())
    self.register_buffer("sliced", torch.randn(17, 7)[::2, 1:6])


# -- devices -----------------------------------------------------------------------------------------------------------


@pattern
def branches_on_device(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    weight = self.lin.weight
    if weight.device.type == "cpu" and not weight.is_cuda:
        nn.init.normal_(weight)
    if not weight.is_meta:  # transformers skips its own init on meta
        nn.init.uniform_(self.lin.bias)
    self.where = str(weight.device)
    self.is_meta = [p.is_meta for p in self.parameters()]
    self.is_cpu = weight.is_cpu
    self.default = str(torch.get_default_device())
    self.index = -1 if weight.device.index is None else weight.device.index


@pattern
def device_arguments(self: Any) -> None:
    self.lin = nn.Linear(7, 13, device="cpu")
    here = self.lin.weight.device
    self.weight = nn.Parameter(torch.randn(17, device=here))
    self.register_buffer("range", torch.arange(7, device=here))
    self.register_buffer("moved", self.weight.data.to("cpu") * 2)
    self.register_buffer("host", self.weight.detach().cpu())
    self.register_buffer("kind", self.weight.data.to(self.lin.weight))
    self.norm = nn.LayerNorm(7).to(device=here)
    with torch.device("cpu"):
        self.inner = nn.Linear(7, 3)
    self.to("cpu")


@pattern
def own_meta(self: Any) -> None:
    """A probe for sizes on meta is the user's own, and is gone again."""
    with torch.device("meta"):
        probe = nn.Linear(1000, 1000)
    self.cost = sum(p.numel() for p in probe.parameters())
    self.out_shape = tuple(probe(torch.empty(3, 1000, device="meta")).shape)
    self.was_meta = probe.weight.is_meta
    late = nn.Linear(7, 13, device="meta").to_empty(device="cpu")
    late.reset_parameters()
    self.late = late
    self.skipped = nn.utils.skip_init(nn.Linear, 7, 13)
    nn.init.normal_(self.skipped.weight)
    nn.init.zeros_(self.skipped.bias)


# -- containers and plain attributes -----------------------------------------------------------------------------------


@pattern
def parameter_containers(self: Any) -> None:
    self.items = nn.ParameterList([nn.Parameter(torch.randn(7)) for _ in range(3)])
    self.items.append(nn.Parameter(torch.zeros(5)))
    self.items.extend([torch.rand(3)])  # tensors become parameters
    self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(17)), "b": nn.Parameter(torch.ones(3))})
    self.named["c"] = nn.Parameter(torch.rand(13, 7))
    self.named.update({"a": nn.Parameter(torch.full((5,), 2.0))})
    self.modules_by_name = nn.ModuleDict({"x": nn.Linear(7, 3), "y": nn.Embedding(7, 3)})
    self.mixed = nn.ParameterList([nn.Parameter(torch.randn(3)), "text", 7])


@pattern
def plain_attributes(self: Any) -> None:
    """Tensors that are neither parameters nor buffers."""
    self.lin = nn.Linear(7, 13)
    self.table = torch.randn(17)
    self.tables = [torch.rand(3), {"deep": (torch.arange(5), torch.zeros(2))}]
    self.by_name = {"a": torch.randn(7), "b": 3.5, 7: torch.ones(1)}
    self.copied = self.lin.weight.detach().clone()
    self.lin.extra = torch.randn(3)
    self.lin.weight.data.mul_(2)


@pattern
def attributes_that_share(self: Any) -> None:
    """Parameters once more in a list, and a view of one; nothing of it is registered."""
    self.lin = nn.Linear(7, 13)
    self.all = [self.lin.weight, self.lin.bias]
    self.row = self.lin.weight.data[3]
    self.frozen = (self.lin.weight.detach(),)
    nn.init.normal_(self.lin.weight)


@pattern
def modules_that_nobody_registered(self: Any) -> None:
    """A teacher in a list is hidden from ``parameters()``, and used all the same."""
    self.student = nn.Linear(7, 13)
    teacher = nn.Linear(7, 13)
    self.teacher_weight = [teacher.weight.data]
    self.student.weight.data.copy_(teacher.weight.data * 0.5)


@pattern
def marked_parameters(self: Any) -> None:
    self.lin = nn.Linear(7, 13)
    self.lin.weight.no_decay = True
    self.lin.bias.group = "slow"
    self.lin.bias.scale = 0.5
    self.gain = nn.Parameter(torch.ones(7))
    self.gain.kind = ["gain", 1]


class Marked(nn.Parameter):
    """A parameter class of the user's own."""


@pattern
def own_parameter_class(self: Any) -> None:
    self.weight = Marked(torch.randn(7, 13))
    self.bias = Marked(torch.zeros(13), requires_grad=False)


@pattern
def frozen_parts(self: Any) -> None:
    self.backbone, self.head = Block(), nn.Linear(12, 7)
    self.backbone.requires_grad_(False)
    self.backbone.norm.requires_grad_(True)
    for name, param in self.head.named_parameters():
        param.requires_grad = "weight" in name


@pattern
def all_frozen(self: Any) -> None:
    self.net = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13))
    for param in self.parameters():
        param.requires_grad_(False)
    self.eval()


# -- state dicts in __init__ -------------------------------------------------------------------------------------------


def _checkpoint() -> bytes:
    """What a file from elsewhere holds; drawn from a generator of its own."""
    g = torch.Generator().manual_seed(11)
    file = io.BytesIO()
    torch.save({"weight": torch.randn(13, 7, generator=g), "bias": torch.randn(13, generator=g)}, file)
    return file.getvalue()


CHECKPOINT = _checkpoint()


@pattern
def loads_a_state(self: Any) -> None:
    self.a, self.b, self.c = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(7, 13)
    self.b.load_state_dict(self.a.state_dict())
    self.c.load_state_dict({"weight": torch.ones(13, 7)}, strict=False)
    nn.init.zeros_(self.a.bias)


@pattern
def assigns_a_state(self: Any) -> None:
    self.a, self.b = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13)), nn.Linear(7, 13)
    fresh = {name: torch.randn_like(value) for name, value in self.a.state_dict().items() if value.is_floating_point()}
    self.a.load_state_dict(fresh, strict=False, assign=True)
    self.b.load_state_dict({k: v * 2 for k, v in self.b.state_dict().items()}, assign=True)


@pattern
def loads_a_file(self: Any) -> None:
    self.a, self.b, self.c = nn.Linear(7, 13), nn.Linear(7, 13), nn.Linear(7, 13)
    state = torch.load(io.BytesIO(CHECKPOINT), weights_only=True)
    self.a.load_state_dict(state)
    self.b.weight.data.copy_(state["weight"] * 0.1)
    self.c.load_state_dict(torch.load(io.BytesIO(CHECKPOINT), weights_only=True), assign=True)


@pattern
def through_a_file(self: Any) -> None:
    """Saves what it just made, and reads it back."""
    self.a, self.b = nn.Linear(7, 13), nn.Linear(7, 13)
    file = io.BytesIO()
    torch.save(self.a.state_dict(), file)
    file.seek(0)
    self.b.load_state_dict(torch.load(file, weights_only=True))


# -- whole models ------------------------------------------------------------------------------------------------------


@builder
def example_gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=33, context=7, layers=2, heads=3, dim=12))


@pattern
def vision_transformer(self: Any) -> None:
    """As timm builds one: patches, class token, positions, drop path, layer scale, its own init, a head at last."""
    self.patch = nn.Conv2d(3, 12, 4, 4)
    self.cls = nn.Parameter(torch.zeros(1, 1, 12))
    self.pos = nn.Parameter(torch.randn(1, 17, 12) * 0.02)
    self.blocks = nn.Sequential(*(Block() for _ in torch.linspace(0, 0.1, 2)))
    self.scales = nn.ParameterList(0.1 * torch.ones(12) for _ in range(2))
    self.head = nn.Linear(12, 7)
    nn.init.trunc_normal_(self.pos, std=0.02)
    nn.init.normal_(self.cls, std=1e-6)
    for module in self.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.normal_(module.bias, std=1e-6)
    fan_in = self.patch.in_channels * math.prod(self.patch.kernel_size)
    nn.init.trunc_normal_(self.patch.weight, std=math.sqrt(1 / fan_in))
    nn.init.zeros_(self.head.weight)


@pattern
def mixture_of_experts(self: Any) -> None:
    self.router = nn.Linear(7, 4, bias=False)
    self.experts = nn.ModuleList(nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 7)) for _ in range(4))
    self.fused = nn.Parameter(torch.empty(4, 7, 13))
    for expert in range(4):
        nn.init.kaiming_uniform_(self.fused[expert], a=math.sqrt(5))
    self.register_buffer("load", torch.zeros(4))


@pattern
def diffusion_schedule(self: Any) -> None:
    betas = torch.linspace(1e-4, 0.02, 33, dtype=torch.float64)
    products = torch.cumprod(1.0 - betas, dim=0)
    previous = F.pad(products[:-1], (1, 0), value=1.0)
    for name, table in {
        "betas": betas,
        "sqrt": products.sqrt(),
        "variance": betas * (1.0 - previous) / (1.0 - products),
        "log": torch.log(torch.cat([products[1:2], products[1:]])),
    }.items():
        self.register_buffer(name, table.to(torch.float32))
    self.time = nn.Linear(7, 13)


@pattern
def state_space(self: Any) -> None:
    """HiPPO: numpy eigenvalues become complex parameters, stored as pairs."""
    n = 8
    matrix = np.tril(np.sqrt(np.outer(2 * np.arange(n) + 1, 2 * np.arange(n) + 1)))
    values = np.linalg.eigvals(matrix - np.diag(np.arange(n)))
    self.poles = nn.Parameter(torch.view_as_real(torch.tensor(values, dtype=torch.cfloat)).clone())
    self.log_step = nn.Parameter(torch.rand(7) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    self.register_buffer("b", torch.from_numpy(np.sqrt(1 + 2 * np.arange(n))).float())


@pattern
def residual_network(self: Any) -> None:
    dims = (3, 7, 13)
    self.stages = nn.ModuleList(
        nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in pairwise(dims)
    )
    self.fc = nn.Linear(13, 5)
    for module in self.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)
    for stage in self.stages:
        nn.init.zeros_(stage[1].weight)
    nn.init.normal_(self.fc.weight, 0, 0.01)


@contextmanager
def _offline() -> Iterator[None]:
    """transformers says on every model that it was made from a config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# transformers takes seconds to import: inside the functions, so that other tests do not pay for it.
@builder
def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=33,
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=13,
        pad_token_id=0,
    )
    with _offline():
        return LlamaForCausalLM(config)


@builder
def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=33, n_positions=13, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=1)
    with _offline():
        return GPT2LMHeadModel(config)


@builder
def hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=33,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=13,
    )
    with _offline():
        return BertForMaskedLM(config)


@builder
def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    with _offline():
        return ViTForImageClassification(config)

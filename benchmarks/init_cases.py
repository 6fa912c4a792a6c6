"""What is built in `init.py`, and how each contender builds it."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

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


# -- the contenders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Built:
    """What a contender made.

    Attributes:
        module: this rank's part of the model, or all of it.
        whole: gives all of a parameter. Every rank must call it.
        recorded_s: seconds until the part that makes the values began, where there are two parts.
    """

    module: nn.Module
    whole: Callable[[nn.Parameter], Tensor]
    recorded_s: float | None = None


Build = Callable[[str], Built]
"""Builds the model of a size. Every rank must call it."""


def gathered(param: nn.Parameter) -> Tensor:
    value = param.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def eager(case: Case) -> Build:
    """Plain construction; ``fully_shard`` after it."""
    mesh = None
    if case.world > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (case.world,))

    def build(size: str) -> Built:
        with default_dtype(case.dtype):
            model = GPT(size, case.variant)
        if mesh is not None:
            shard(model, mesh)
        return Built(model, gathered)

    return build


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Each block, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fabriclite(case: Case) -> Build:
    """``init_module`` and ``setup``, or ``materialize`` in a world of one."""
    from fabriclite import Fabric

    strategy = "fsdp" if case.world > 1 else "single_device"
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=case.world, precision=DTYPES[case.dtype][1])
    return on_fabric(fabric, case)


def on_fabric(fabric: Any, case: Case) -> Build:
    def build(size: str) -> Built:
        begin = perf_counter()
        with fabric.init_module(empty_init=True):
            model = GPT(size, case.variant)
        recorded_s = perf_counter() - begin
        if case.world > 1:
            fabric.setup(model)  # the pane it returns stands for the same module
        else:
            fabric.materialize(model)
        return Built(model, gathered, recorded_s)

    return build


def lightning_fabric(case: Case) -> Build:
    """Its FSDP2: built on the meta device, initialised by ``reset_parameters``. In a world of one: built at once."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        return shard(model, mesh["data_parallel"])

    strategy: Any = "auto"
    if case.world > 1:
        os.environ["TORCHELASTIC_RUN_ID"] = "init"  # by this it knows that the ranks are started
        strategy = ModelParallelStrategy(parallelize, data_parallel_size=case.world, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=case.world, strategy=strategy, precision=DTYPES[case.dtype][1])
    fabric.launch()

    def build(size: str) -> Built:
        begin = perf_counter()
        with fabric.init_module(empty_init=case.world > 1):
            model = GPT(size, case.variant)
        if case.world == 1:
            return Built(model, gathered)
        if case.variant == "hf":
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.reset_parameters = lambda module=module: init_weights(module)
        recorded_s = perf_counter() - begin
        fabric.setup(model)
        return Built(model, gathered, recorded_s)

    return build


def accelerate(case: Case) -> Build:
    """``init_empty_weights``, ``to_empty``, and the initialisation written out once more."""
    from accelerate import init_empty_weights

    def build(size: str) -> Built:
        begin = perf_counter()
        with default_dtype(case.dtype):
            with init_empty_weights(include_buffers=True):
                model = GPT(size, case.variant)
            recorded_s = perf_counter() - begin
            model.to_empty(device="cpu")
            model.apply(lambda module: reset(module, case.variant))
        model.tie()  # `to_empty` undid it
        return Built(model, gathered, recorded_s)

    return build


def deepspeed(case: Case) -> Build:
    """``zero.Init``, then the engine, which is where optimizers and buffers come to be."""
    library = import_deepspeed()
    from fabriclite import DeepSpeedStrategy, Precision
    from fabriclite.strategies.deepspeed import engine_config

    precision = Precision.parse(DTYPES[case.dtype][1])

    def build(size: str) -> Built:
        numel = Case(size, case.dtype, case.variant, 1).nbytes // DTYPES[case.dtype][0].itemsize
        document = engine_config(DeepSpeedStrategy(stage=3), precision, numel)
        with default_dtype(case.dtype), library.zero.Init(config_dict_or_path=document):
            model = GPT(size, case.variant)
        optimizer = SGD(model.parameters(), lr=0.1)
        library.initialize(model=model, optimizer=optimizer, config=document, dist_init_required=False)
        return Built(model, zero_gathered)

    return build


def fabriclite_deepspeed(case: Case) -> Build:
    """``init_module`` and ``setup`` under ZeRO-3, which makes the same engine."""
    from fabriclite import DeepSpeedStrategy, Fabric

    strategy = DeepSpeedStrategy(stage=3)
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=case.world, precision=DTYPES[case.dtype][1])

    def build(size: str) -> Built:
        begin = perf_counter()
        with fabric.init_module(empty_init=True):
            model = GPT(size, case.variant)
        recorded_s = perf_counter() - begin
        fabric.setup(model, SGD(model.parameters(), lr=0.1))
        return Built(model, zero_gathered, recorded_s)

    return build


def import_deepspeed() -> Any:
    """Import it for the CPU without its compiling anything."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def zero_gathered(param: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(DTYPES[name][0])
        yield


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of building.

    Attributes:
        prepare: does what comes before, once in every process, and gives the function that is measured.
        needs: the package.
        worlds: in which it is measured; ``None``: all.
        grouped: whether a world of one needs a process group as well.
        whole_on_every_rank: whether each rank holds all of the model at once.
        copies: about how many times the model it takes over all ranks, beside that.
    """

    prepare: Callable[[Case], Build]
    needs: str
    worlds: tuple[int, ...] | None = None
    grouped: bool = False
    whole_on_every_rank: bool = False
    copies: float = 1.2

    def runs(self, case: Case) -> bool:
        return find_spec(self.needs) is not None and (self.worlds is None or case.world in self.worlds)

    def needed(self, case: Case) -> float:
        """Bytes that it takes at most, about."""
        if self.whole_on_every_rank:
            return case.nbytes * case.world * (1.1 + (1 / case.world if case.world > 1 else 0))
        bucket = 200_000_000 * 4 if self.grouped else 0
        return case.nbytes * self.copies + case.world * min(bucket, case.nbytes)


CONTENDERS: Final = {
    "eager": Contender(eager, "torch", whole_on_every_rank=True),
    "fabriclite": Contender(fabriclite, "fabriclite"),
    "lightning_fabric": Contender(lightning_fabric, "lightning_fabric"),
    "accelerate": Contender(accelerate, "accelerate", worlds=(1,)),
    "deepspeed": Contender(deepspeed, "deepspeed", grouped=True, copies=4.0),
    "fabriclite, deepspeed": Contender(fabriclite_deepspeed, "deepspeed", grouped=True, copies=4.0),
}
"""The first is what the others are compared with."""


def reference(size: str, case: Case) -> nn.Module:
    """What every contender should have built: plain construction at the same seed."""
    torch.manual_seed(0)
    with default_dtype(case.dtype):
        return GPT(size, case.variant)

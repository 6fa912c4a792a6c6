"""How each contender of `init.py` builds the model."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from time import perf_counter
from typing import Any, Final

import torch.distributed as dist
from init_cases import DTYPES, GPT, Case, default_dtype, init_weights, reset
from torch import Tensor, nn
from torch.optim import SGD


@dataclass(frozen=True, slots=True)
class Built:
    """What a contender made.

    Attributes:
        module: this rank's part of the model, or all of it.
        whole: gives all of a parameter. Every rank must call it.
        part: what ``whole`` gives, of the parameter that plain construction makes: all of it, but where no other rank
            exists to gather from.
        recorded_s: seconds until the part that makes the values began, where there are two parts.
    """

    module: nn.Module
    whole: Callable[[nn.Parameter], Tensor]
    recorded_s: float | None = None
    part: Callable[[Tensor], Tensor] = field(default=lambda value: value)


Build = Callable[[str], Built]
"""Builds the model of a size. Every rank must call it."""
SHARES: Final = 64
"""Ranks of the world of which one is measured alone."""


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

    def build(size: str) -> Built:
        begin = perf_counter()
        with fabric.init_module(empty_init=None if case.world > 1 else True):
            model = GPT(size, case.variant)
        recorded_s = perf_counter() - begin
        if case.world > 1:
            fabric.setup(model)  # the pane it returns stands for the same module
        else:
            fabric.materialize(model)
        return Built(model, gathered, recorded_s)

    return build


def fabriclite_share(case: Case) -> Build:
    """What the first of ``SHARES`` ranks does. The others do not exist: no value is sent, so nobody misses them."""
    from fabriclite import Fabric, FSDPStrategy

    fake_world(SHARES)
    word = DTYPES[case.dtype][1]
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), devices=1, num_nodes=SHARES, precision=word)

    def build(size: str) -> Built:
        begin = perf_counter()
        with fabric.init_module():
            model = GPT(size, case.variant)
        recorded_s = perf_counter() - begin
        fabric.setup(model)
        # cut by torch alone, not by the code that is compared
        return Built(model, lambda p: p.detach().to_local(), recorded_s, lambda value: value.chunk(SHARES)[0])

    return build


def fake_world(size: int) -> None:
    """Make this process the first of ``size`` on as many machines, of which no other exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(size), LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)


def lightning_fabric(case: Case) -> Build:
    """Its FSDP2: built on the meta device, initialised by ``reset_parameters``. In a world of one: built at once."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        return shard(model, mesh["data_parallel"])

    strategy: Any = "auto"
    warnings.filterwarnings("ignore", message="DTensor random operators")  # whether it equals eager is in the table
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
            copies = 1 + 1 / case.world if case.world > 1 else 1
            return case.nbytes * case.world * copies + case.world * case.head_nbytes  # before the head is tied
        bucket = 200_000_000 * 4 if self.grouped else 0
        return case.nbytes * self.copies + case.world * min(bucket, case.nbytes)


CONTENDERS: Final = {
    "eager": Contender(eager, "torch", whole_on_every_rank=True),
    "fabriclite": Contender(fabriclite, "fabriclite"),
    "fabriclite, 1 of 64": Contender(fabriclite_share, "fabriclite"),
    "lightning_fabric": Contender(lightning_fabric, "lightning_fabric"),
    "accelerate": Contender(accelerate, "accelerate", worlds=(1,)),
    "deepspeed": Contender(deepspeed, "deepspeed", grouped=True, copies=4.0),
    "fabriclite, deepspeed": Contender(fabriclite_deepspeed, "deepspeed", grouped=True, copies=4.0),
}
"""By name."""

"""Bad input, one row each: what triggers it, the error, and what its message must say.

A message names what is wrong, the value that was found, and how to mend it: ``must`` and ``but`` are in every one. Rows
of ``IN_TWO`` run on two real processes, all rows of one strategy in one world, and must be refused by both ranks with
the same kind of error.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, Sampler

from fabriclite import (
    CheckpointError,
    ConfigError,
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FabricError,
    FSDPStrategy,
    LaunchError,
    MaterializeError,
    ModelParallelStrategy,
    NonFiniteGradientError,
    Precision,
    SetupOrderError,
    SingleDeviceStrategy,
    World,
    WorldError,
    seed_everything,
)
from fabriclite.arguments import this_world
from fabriclite.collectives import gather_objects
from fabriclite.devices import Machine, pick_accelerator, pick_devices
from fabriclite.launch.choose import Situation, choose
from fabriclite.launch.environments.choose import find

# -- what the rows work with -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Pickled:
    """An object that only its own code can restore."""


class NoLogger:
    pass


class Logger:
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        pass


class Badge:
    on_start = "not a method"


class Endless(Sampler[int]):
    """A sampler without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class OwnLoader(DataLoader[Any]):
    """A subclass that does not take DataLoader's arguments."""

    def __init__(self, items: list[int]) -> None:
        super().__init__(items)


def one(**arguments: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def sgd(module: nn.Module) -> SGD:
    return SGD(module.parameters(), lr=0.1)


def ready(fabric: Fabric | None = None) -> tuple[Fabric, Any, Any]:
    fabric = fabric or one()
    net = Net()
    return fabric, *fabric.setup(net, sgd(net))


def stepped(module: nn.Module) -> Adam:
    """An optimizer that holds state."""
    optimizer = Adam(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def backward(fabric: Fabric, model: Any, factor: float = 1.0) -> None:
    fabric.backward(model(torch.ones(2, 4)).pow(2).sum() * factor)


def returns_nothing(module: nn.Module, mesh: Any) -> Any:
    return None


def splits_half_a_tie(module: nn.Module, mesh: Any) -> nn.Module:
    parallelize_module(module.get_submodule("head"), mesh["tensor_parallel"], ColwiseParallel())
    return module


def world(env: Mapping[str, str], devices: Any = "auto", num_nodes: Any = 1) -> World:
    return this_world("cpu", devices, num_nodes, find(None, env))


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SITUATION = Situation(launched=False, processes=2, nodes=1, script=False, function=False)

# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: id of the test.
        act: does it; gets an empty folder.
        error: exactly this class is raised.
        says: texts that are all in the message, parted by an ellipsis.
    """

    name: str
    act: Callable[[Path], object]
    error: type[FabricError]
    says: str


def row(name: str, act: Callable[[Path], object], error: type[FabricError], says: str) -> Any:
    return pytest.param(Row(name, act, error, says), id=name)


def fabric(name: str, says: str, **arguments: Any) -> Any:
    """A row for a wrong argument of ``Fabric``."""
    return row(name, lambda _: one(**arguments), ConfigError, says)


def config(name: str, make: Callable[[], object], says: str) -> Any:
    """A row for a wrong argument of a strategy."""
    return row(name, lambda _: make(), ConfigError, says)


ARGUMENTS = [
    fabric("accelerator-unknown", "`accelerator` … cpu, cuda … 'tpu'", accelerator="tpu"),
    fabric("accelerator-none", "`accelerator` … auto, cpu … None", accelerator=None),
    row(
        "accelerator-absent",
        lambda _: pick_accelerator("cuda", Machine()),
        ConfigError,
        "`accelerator` … 'cuda' … none was found … accelerator='auto' or 'cpu'",
    ),
    fabric("strategy-misspelt", "`strategy` … 'fdsp' … Did you mean 'fsdp'?", strategy="fdsp"),
    fabric(
        "strategy-alias-misspelt", "'deepspeed_stage_4' … Did you mean 'deepspeed_stage_", strategy="deepspeed_stage_4"
    ),
    fabric("strategy-unknown", "'horovod' … single_device, ddp, fsdp … Also accepted: ddp_find", strategy="horovod"),
    fabric("strategy-class", "`strategy` … FSDPStrategy'> … such as FSDPStrategy()", strategy=FSDPStrategy),
    fabric("strategy-none", "`strategy` … None … Names: single_device, ddp", strategy=None),
    fabric("strategy-object", "a config such as … 3.5 … Names:", strategy=3.5),
    fabric(
        "single-device-of-two",
        "`devices` must be 1 … 2 processes … strategy='ddp'",
        strategy="single_device",
        devices=2,
    ),
    fabric("devices-zero", "`devices` … at least 1 … is 0", devices=0),
    fabric("devices-negative", "`devices` … at least 1 … is -2", devices=-2),
    fabric("devices-float", "`devices` … 'auto', a count … 2.0", devices=2.0),
    fabric("devices-bool", "`devices` … 'auto', a count … True", devices=True),
    fabric("devices-none", "`devices` … 'auto', a count … None", devices=None),
    fabric("devices-word", "`devices` … 'auto', a count … 'two'", devices="two"),
    fabric("devices-empty", "`devices` … at least one … []", devices=[]),
    fabric("devices-of-words", "`devices` … list of indices … ['a']", devices=["a"]),
    fabric("devices-twice", "`devices` … each device once … [0, 0]", devices=[0, 0]),
    fabric("devices-list-on-cpu", "`devices` … on the CPU … [0, 1] … Give a count", devices=[0, 1]),
    fabric("devices-indices-on-cpu", "`devices` … on the CPU … '0,1' … Give a count", devices="0,1"),
    fabric("devices-all-on-cpu", "`devices` … on the CPU … -1 … Give a count", devices=-1),
    row(
        "devices-beyond",
        lambda _: pick_devices([0, 3], "cuda", Machine(cuda=2), None),
        ConfigError,
        "among the 2 of type 'cuda' … [0, 3] … index 3",
    ),
    row(
        "devices-too-many",
        lambda _: pick_devices(4, "cuda", Machine(cuda=2), None),
        ConfigError,
        "among the 2 … 4 … index 2",
    ),
    fabric("nodes-zero", "`num_nodes` … at least 1 … is 0", num_nodes=0),
    fabric("nodes-text", "`num_nodes` … whole number … '2'", num_nodes="2"),
    fabric("nodes-bool", "`num_nodes` … whole number … True", num_nodes=True),
    fabric("precision-unknown", "`precision` … bf16-mixed, 16-mixed … 'fp8' … Short forms: 'bf16'", precision="fp8"),
    fabric("precision-bits", "`precision` … 64-true, 32-true … is 8 … Short forms", precision=8),
    fabric("precision-bool", "`precision` … True … Short forms", precision=True),
    fabric("precision-list", "`precision` … ['bf16'] … Short forms", precision=["bf16"]),
    fabric(
        "precision-not-of-strategy",
        "one of 32-true, bf16-true, 16-true, bf16-mixed with DeepSpeedStrategy … '64-true'",
        strategy="deepspeed",
        precision="64-true",
    ),
    fabric(
        "plugin-not-of-strategy",
        "one of 32-true, bf16-true, 16-true, bf16-mixed with DeepSpeedStrategy … '16-mixed'",
        strategy="deepspeed",
        plugins=Precision.parse("16-mixed"),
    ),
    fabric(
        "precision-twice",
        "`precision` and `plugins` … 'bf16-true' … 16-mixed … Keep one",
        precision="bf16-true",
        plugins=[Precision.parse("16-mixed")],
    ),
    fabric("plugin-twice", "Keep one", plugins=[Precision.parse("16-mixed"), Precision.parse("32-true")]),
    fabric("plugin-text", "`plugins` … fabriclite.Precision … str … strategy=...", plugins="bf16-mixed"),
    fabric("plugin-strategy", "`plugins` … DDPStrategy … passed as strategy=", plugins=[DDPStrategy()]),
    fabric("logger-without-log", "`loggers` … log_metrics(metrics, step) … NoLogger has none", loggers=NoLogger()),
    fabric("logger-second", "`loggers` … log_metrics(metrics, step) … NoLogger", loggers=[Logger(), NoLogger()]),
    fabric("logger-text", "`loggers` … log_metrics(metrics, step) … str has none", loggers="tensorboard"),
    row("logger-missing", lambda _: one().logger, ConfigError, "`loggers` … is empty … Fabric(loggers=...)"),
]

CONFIGS = [
    config("start-method", lambda: DDPStrategy(start_method="thread"), "`start_method` … 'forkserver' … 'thread'"),
    config("timeout-number", lambda: FSDPStrategy(timeout=30), "`timeout` … datetime.timedelta … 30"),
    config("timeout-zero", lambda: DeepSpeedStrategy(timeout=timedelta(0)), "`timeout` … positive … timedelta(0)"),
    config(
        "ddp-state-without-hook",
        lambda: DDPStrategy(ddp_comm_state=3),
        "`ddp_comm_state` … `ddp_comm_hook` … Give both",
    ),
    config("ddp-hook-number", lambda: DDPStrategy(ddp_comm_hook=3), "`ddp_comm_hook` … hook(state, bucket) … 3"),
    config(
        "ddp-unused-and-static",
        lambda: DDPStrategy(find_unused_parameters=True, static_graph=True),
        "`find_unused_parameters` and `static_graph` … Keep one",
    ),
    config("ddp-bucket-negative", lambda: DDPStrategy(bucket_cap_mb=-1), "`bucket_cap_mb` … at least 1 … -1"),
    config("ddp-bucket-text", lambda: DDPStrategy(bucket_cap_mb="25"), "`bucket_cap_mb` … whole number of MiB … '25'"),
    config("wrap-class", lambda: FSDPStrategy(auto_wrap_policy=Block), "`auto_wrap_policy` … set of nn.Module … Block"),
    config("wrap-names", lambda: FSDPStrategy(auto_wrap_policy={"Block"}), "`auto_wrap_policy` … {'Block'}"),
    config(
        "wrap-empty", lambda: ModelParallelStrategy(auto_wrap_policy=set()), "`auto_wrap_policy` … non-empty … set()"
    ),
    config(
        "state-dict-type",
        lambda: FSDPStrategy(state_dict_type="shards"),
        "`state_dict_type` … 'sharded', 'full' … 'shards'",
    ),
    config(
        "mesh-one-size", lambda: FSDPStrategy(device_mesh=(2,)), "`device_mesh` … (replicate, shard) … (2,) … (2, 4)"
    ),
    config(
        "mesh-number", lambda: FSDPStrategy(device_mesh=4), "`device_mesh` … (replicate, shard) … but is 4 … (2, 4)"
    ),
    config("mesh-zero", lambda: FSDPStrategy(device_mesh=(0, 2)), "`device_mesh` … at least 1 … (0, 2)"),
    config(
        "mesh-not-world",
        lambda: one(strategy=FSDPStrategy(device_mesh=(2, 4)), devices=2),
        "`device_mesh` … world size 2 … 2 x 4 is 8 … Change `devices`",
    ),
    config(
        "plan-and-function",
        lambda: ModelParallelStrategy(plan={"head": "colwise"}, parallelize_fn=returns_nothing),
        "`plan` and `parallelize_fn` … Keep one",
    ),
    config("plan-empty", lambda: ModelParallelStrategy(plan={}), "`plan` … is empty … {'blocks.*.fc1': 'colwise'}"),
    config(
        "plan-list", lambda: ModelParallelStrategy(plan=["head"]), "`plan` … ['head'] … {'blocks.*.fc1': 'colwise'}"
    ),
    config(
        "parallelize-number", lambda: ModelParallelStrategy(parallelize_fn=3), "`parallelize_fn` … fn(module, mesh) … 3"
    ),
    config(
        "tp-size-zero", lambda: ModelParallelStrategy(tensor_parallel_size=0), "`tensor_parallel_size` … 'auto' … is 0"
    ),
    config(
        "dp-size-text", lambda: ModelParallelStrategy(data_parallel_size="all"), "`data_parallel_size` … 'auto' … 'all'"
    ),
    config(
        "tp-sizes-not-world",
        lambda: one(strategy=ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=2), devices=2),
        "world size 2 … 3 x 2 … Set both sizes",
    ),
    config(
        "tp-auto-not-world",
        lambda: one(strategy="tensor_parallel", devices=3),
        "world size 3 … 'auto' x 'auto' gives 1 x 2 … Set both sizes",
    ),
    config("zero-stage", lambda: DeepSpeedStrategy(stage=4), "`stage` … 1, 2, 3 … is 4"),
    config("zero-stage-text", lambda: DeepSpeedStrategy(stage="3"), "`stage` … 1, 2, 3 … '3'"),
    config(
        "zero-offload-parameters",
        lambda: DeepSpeedStrategy(stage=2, offload_parameters=True),
        "`offload_parameters` … stage is 2 … Use stage=3 or offload_optimizer=True",
    ),
    config(
        "backend-unknown",
        lambda: one(strategy=DDPStrategy(process_group_backend="glo")),
        "`process_group_backend` … gloo … 'glo' … Leave it out",
    ),
]


def planned(plan: Mapping[str, Any]) -> Callable[[Path], object]:
    return lambda _: one(strategy=ModelParallelStrategy(plan=plan)).setup(Net())


def wrapped(policy: Any, module: Callable[[], nn.Module] = Net) -> Callable[[Path], object]:
    return lambda _: one(strategy=FSDPStrategy(auto_wrap_policy=policy)).setup(module())


PLANS = [
    row(
        "plan-matches-nothing",
        planned({"layers.*.up": "colwise"}),
        ConfigError,
        "of Net … 'layers.*.up' matches none … blocks.0.up",
    ),
    row(
        "plan-two-patterns",
        planned({"blocks.*.up": "colwise", "blocks.0.*": "rowwise"}),
        ConfigError,
        "one style … 'blocks.0.up' … 'blocks.*.up' and 'blocks.0.*'",
    ),
    row("plan-unknown-style", planned({"head": "columnwise"}), ConfigError, "'head' … colwise, rowwise … 'columnwise'"),
    row(
        "plan-style-class",
        planned({"head": ColwiseParallel}),
        ConfigError,
        "'head' … a ParallelStyle or one of … ColwiseParallel'>",
    ),
    row(
        "plan-unfit-module",
        planned({"blocks.*.norm": "colwise"}),
        ConfigError,
        "Linear or an Embedding … 'blocks.0.norm' is LayerNorm … leave it out",
    ),
    row(
        "plan-not-carried",
        lambda _: one(strategy="tensor_parallel").setup(Net()),
        ConfigError,
        "`plan` … Net … no `_tp_plan` … ModelParallelStrategy(plan=",
    ),
    row(
        "parallelize-returns-nothing",
        lambda _: one(strategy=ModelParallelStrategy(parallelize_fn=returns_nothing)).setup(Net()),
        ConfigError,
        "`parallelize_fn` … NoneType … Add a return",
    ),
    row(
        "parallelize-splits-tie",
        lambda _: one(strategy=ModelParallelStrategy(parallelize_fn=splits_half_a_tie)).setup(TiedNet()),
        ConfigError,
        "embed.weight and head.weight … different layouts … Give both the same split, or neither",
    ),
    row(
        "wrap-matches-nothing",
        wrapped({nn.Conv2d}),
        ConfigError,
        "submodule of Net … Conv2d matches none … Block, LayerNorm",
    ),
    row(
        "wrap-predicate-nothing", wrapped(lambda name, module: False), ConfigError, "the predicate matches none … Block"
    ),
    row(
        "wrap-splits-tie",
        wrapped({nn.Embedding}, TiedNet),
        ConfigError,
        "shared parameters in one group … embed … Leave it out of the policy",
    ),
]


# -- orders of calls ---------------------------------------------------------------------------------------------------


def setup_twice(_: Path) -> None:
    fabric, model, _optimizer = ready()
    fabric.setup(model)


def setup_inner_twice(_: Path) -> None:
    fabric, net = one(), Net()
    kept = fabric.setup(net)
    assert kept.head is net.head
    fabric.setup(net)


def setup_by_two_fabrics(_: Path) -> None:
    one().setup(one().setup(Net()))


def setup_with(*others: Callable[[nn.Module], Any], **arguments: Any) -> Callable[[Path], object]:
    """Set up a new net with what ``others`` make of it."""

    def act(_: Path) -> None:
        net = Net()
        one(**arguments).setup(net, *(make(net) for make in others))

    return act


def same_optimizer_twice(_: Path) -> None:
    net = Net()
    optimizer = sgd(net)
    one().setup(net, optimizer, optimizer)


def optimizer_set_up_twice(_: Path) -> None:
    fabric, _model, optimizer = ready()
    fabric.setup_optimizers(optimizer)


def optimizer_with_state_later(_: Path) -> None:
    fabric, net = one(), Net()
    optimizer = stepped(net)
    kept = fabric.setup_module(net)
    fabric.setup_optimizers(optimizer)
    assert kept is not None


def scheduler_of_another(_: Path) -> None:
    net, other = Net(), Net()
    one().setup(net, sgd(net), scheduler=StepLR(sgd(other), 1))


def scheduler_text(_: Path) -> None:
    net = Net()
    one().setup(net, sgd(net), scheduler="cosine")


def clip(**values: Any) -> Callable[[Path], object]:
    def act(_: Path) -> None:
        fabric, model, optimizer = ready()
        backward(fabric, model)
        fabric.clip_gradients(model, optimizer, **values)

    return act


def clip_plain_module(_: Path) -> None:
    fabric, _model, optimizer = ready()
    fabric.clip_gradients(Net(), optimizer, max_norm=1.0)


def clip_plain_optimizer(_: Path) -> None:
    fabric, model, _optimizer = ready()
    fabric.clip_gradients(model, sgd(model), max_norm=1.0)


def nonfinite(**arguments: Any) -> Callable[[Path], object]:
    def act(_: Path) -> None:
        fabric, model, optimizer = ready(one(**arguments))
        backward(fabric, model, factor=float("inf"))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)

    return act


def closure_with_scaler(_: Path) -> None:
    _fabric, _model, optimizer = ready(one(precision="16-mixed"))
    optimizer.step(lambda: 0.0)


def before_launch(call: Callable[[Fabric], object]) -> Callable[[Path], object]:
    return lambda _: call(one(strategy="ddp", devices=2))


def lost_pane(_: Path) -> None:
    fabric, net = one(), Net()
    fabric.setup(net)
    fabric.clip_gradients(net, sgd(net), max_norm=1.0)


def on_meta(_: Path) -> None:
    with torch.device("meta"):
        net = Net()
    one().setup(net)


LAUNCH_FIRST = "`launch` must be called … 2 processes … fabric.launch() right after Fabric(...) … torchrun"

ORDERS = [
    row("setup-twice", setup_twice, SetupOrderError, "once … this Net … Use what setup returned"),
    row("setup-inner-twice", setup_inner_twice, SetupOrderError, "once … this Net … Use what setup returned"),
    row("setup-by-two-fabrics", setup_by_two_fabrics, SetupOrderError, "one Fabric … this Net … Keep one Fabric"),
    row("setup-list", lambda _: one().setup([Net()]), ConfigError, "`module` … torch.nn.Module … list"),
    row(
        "setup-text-optimizer",
        setup_with(lambda net: "adam"),
        ConfigError,
        "`optimizers` … torch.optim.Optimizer … str",
    ),
    row(
        "setup-scheduler-as-optimizer",
        setup_with(sgd, lambda net: StepLR(sgd(net), 1)),
        ConfigError,
        "`optimizers` … StepLR … scheduler=",
    ),
    row(
        "setup-stepped-optimizer",
        setup_with(stepped),
        SetupOrderError,
        "Adam must be new … 14 parameters … fabric.load",
    ),
    row("setup-same-optimizer-twice", same_optimizer_twice, SetupOrderError, "once … this SGD … Pass it once"),
    row(
        "setup-foreign-optimizer",
        setup_with(lambda net: sgd(nn.Linear(2, 3))),
        ConfigError,
        "SGD … 2 of its 2 … (3, 2) … Set up the module that owns them",
    ),
    row(
        "setup-meta", on_meta, MaterializeError, "blocks.0.up.weight … and 9 more … meta device … fabric.init_module()"
    ),
    row(
        "setup-scheduler-of-another",
        scheduler_of_another,
        ConfigError,
        "`scheduler` … another SGD … scheduler=SomeLR(optimizer",
    ),
    row("setup-scheduler-text", scheduler_text, ConfigError, "`scheduler` … 'cosine' … scheduler=SomeLR(optimizer"),
    row(
        "optimizers-before-module",
        lambda _: one().setup_optimizers(sgd(Net())),
        ConfigError,
        "SGD must step parameters of modules that are set up … 14 of its 14 … Set up the module",
    ),
    row(
        "optimizers-none",
        lambda _: one().setup_optimizers(),
        ConfigError,
        "`setup_optimizers` … at least one … got none",
    ),
    row("optimizers-twice", optimizer_set_up_twice, SetupOrderError, "once … this SGD … Use it as it is"),
    row(
        "optimizers-with-state",
        optimizer_with_state_later,
        SetupOrderError,
        "Adam must be new … 14 parameters … fabric.load",
    ),
    row("clip-without-value", clip(), ConfigError, "`clip_val` and `max_norm` … clip_val=None and max_norm=None"),
    row(
        "clip-both-values",
        clip(clip_val=1.0, max_norm=2.0),
        ConfigError,
        "exactly one … clip_val=1.0 and max_norm=2.0 … Keep one",
    ),
    row("clip-zero-norm", clip(max_norm=0), ConfigError, "`max_norm` … above 0 … is 0"),
    row("clip-nan", clip(clip_val=float("nan")), ConfigError, "`clip_val` … above 0 … nan"),
    row("clip-text", clip(max_norm="1"), ConfigError, "`max_norm` … above 0 … '1'"),
    row("clip-norm-type", clip(max_norm=1.0, norm_type=0), ConfigError, "`norm_type` … above 0 or inf … is 0"),
    row("clip-norm-type-text", clip(max_norm=1.0, norm_type="two"), ConfigError, "`norm_type` … inf … 'two'"),
    row(
        "clip-plain-module",
        clip_plain_module,
        SetupOrderError,
        "`module` … a Net that was not … model = fabric.setup",
    ),
    row(
        "clip-plain-optimizer",
        clip_plain_optimizer,
        SetupOrderError,
        "`optimizer` … SGD that was not … fabric.setup_optimizers",
    ),
    row("clip-after-losing-pane", lost_pane, SetupOrderError, "Net … is gone … model = fabric.setup(model)"),
    row(
        "gradient-nonfinite", nonfinite(), NonFiniteGradientError, "2-norm … finite … is nan … error_if_nonfinite=False"
    ),
    row(
        "gradient-nonfinite-fsdp",
        nonfinite(strategy="fsdp"),
        NonFiniteGradientError,
        "2-norm … is nan … error_if_nonfinite=False",
    ),
    row(
        "no-sync-plain-module",
        lambda _: one().no_backward_sync(Net()),
        SetupOrderError,
        "`module` … a Net … fabric.setup(model)",
    ),
    row("backward-number", lambda _: one().backward(3.0), ConfigError, "`tensor` … float … not loss.item()"),
    row(
        "backward-plain-model",
        lambda _: one().backward(torch.zeros(()), model=Net()),
        SetupOrderError,
        "`module` … a Net that was not … fabric.setup(model)",
    ),
    row(
        "closure-with-scaler",
        closure_with_scaler,
        ConfigError,
        "`closure` … '16-mixed' … one was given … 'bf16-mixed' or '32-true'",
    ),
    row("early-setup", before_launch(lambda f: f.setup(Net())), SetupOrderError, LAUNCH_FIRST),
    row("early-optimizers", before_launch(lambda f: f.setup_optimizers(sgd(Net()))), SetupOrderError, LAUNCH_FIRST),
    row("early-loader", before_launch(lambda f: f.setup_dataloaders(DataLoader([1]))), SetupOrderError, LAUNCH_FIRST),
    row("early-init", before_launch(lambda f: f.init_module().__enter__()), SetupOrderError, LAUNCH_FIRST),
    row("early-barrier", before_launch(lambda f: f.barrier()), SetupOrderError, LAUNCH_FIRST),
    row("early-save", before_launch(lambda f: f.save("never", {})), SetupOrderError, LAUNCH_FIRST),
    row(
        "init-word",
        lambda _: one().init_module("yes").__enter__(),
        ConfigError,
        "`empty_init` … None, False or True … 'yes'",
    ),
    row("mark-unknown", lambda _: ready()[1].mark_forward_method("score"), ConfigError, "`method` … of Net … 'score'"),
    row("mark-number", lambda _: ready()[1].mark_forward_method(3), ConfigError, "`method` … of Net … 3"),
    row(
        "assign",
        lambda _: ready()[1].load_state_dict({}, assign=True),
        ConfigError,
        "`assign` … is True … Load without it",
    ),
    row(
        "state-dict-path",
        lambda _: ready()[1].load_state_dict("a.pt"),
        ConfigError,
        "`state_dict` … str … fabric.load_raw",
    ),
]

# -- births ------------------------------------------------------------------------------------------------------------


class Unwritten(nn.Module):
    """Holds memory as ``torch.empty`` gives it, and what ``write`` makes of it."""

    def __init__(self, write: Callable[[Any], object] = lambda module: None) -> None:
        super().__init__()
        self.known = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.empty(20, 4))
        self.register_buffer("table", torch.empty(7))
        write(self)


def recorded(build: Callable[[], nn.Module] = Net, **arguments: Any) -> tuple[Fabric, Any]:
    fabric = one(**arguments)
    with fabric.init_module(empty_init=True):
        return fabric, build()


def unwritten(write: Callable[[Any], object], how: str = "setup", **arguments: Any) -> Callable[[Path], object]:
    """Give memory to a module of which ``write`` wrote a part."""

    def act(_: Path) -> None:
        fabric, module = recorded(lambda: Unwritten(write), **arguments)
        getattr(fabric, how)(module)

    return act


def writes_weight(module: Any) -> None:
    nn.init.zeros_(module.weight)


def writes_table(module: Any) -> None:
    module.table.fill_(1)


def writes_a_part(module: Any) -> None:
    writes_table(module)
    module.weight.data[:10] = 1


def writes_a_part_of_the_buffer(module: Any) -> None:
    writes_weight(module)
    module.table[2:5].normal_()


def many_unwritten() -> nn.Module:
    return nn.ParameterList(torch.empty(3) for _ in range(8))


def computes_early(_: Path) -> None:
    _fabric, net = recorded()
    net(torch.ones(2, 4))


def changes_what_was_given(_: Path) -> None:
    """More than is copied at once."""
    large = torch.ones(1024, 1025)

    def build() -> nn.Module:
        module = nn.Linear(1025, 1024)
        module.weight.data.copy_(large)
        return module

    fabric, module = recorded(build)
    large.mul_(2)
    fabric.setup(module)


def uses_meta_inside(_: Path) -> None:
    def build() -> nn.Module:
        module = nn.Linear(3, 4)
        module.weight.data.copy_(torch.empty(4, 3, device="meta"))
        return module

    recorded(build)


def inside_the_context(how: str) -> Callable[[Path], object]:
    def act(_: Path) -> None:
        fabric = one()
        with fabric.init_module(empty_init=True):
            getattr(fabric, how)(Net())

    return act


def half_in_inference_mode(_: Path) -> None:
    fabric, net = recorded()
    with torch.inference_mode():
        fabric.setup(net)


def spreads(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Set up with a ``parallelize_fn`` that does more than spread."""

    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        change(module)
        return module

    def act(_: Path) -> None:
        fabric, net = recorded(strategy=ModelParallelStrategy(parallelize_fn=parallelize))
        fabric.setup(net)

    return act


def scales_the_head(net: Any) -> None:
    net.head.weight = nn.Parameter(net.head.weight.detach() * 2)


def replaces_the_head(net: Any) -> None:
    net.head.weight = nn.Parameter(torch.empty(8, 8, device="meta"))


EMPTY = "left as torch.empty made it, in part or whole … torch.zeros, torch.nn.init … model.load_state_dict"

BIRTHS = [
    row("birth-unwritten-parameter", unwritten(writes_table), MaterializeError, f"weight must be loaded … {EMPTY}"),
    row("birth-unwritten-buffer", unwritten(writes_weight), MaterializeError, f"table must be loaded … {EMPTY}"),
    row(
        "birth-unwritten-both",
        unwritten(lambda module: None),
        MaterializeError,
        f"weight, table must be loaded … but were … {EMPTY}",
    ),
    row("birth-written-in-part", unwritten(writes_a_part), MaterializeError, f"weight must be loaded … {EMPTY}"),
    row(
        "birth-buffer-written-in-part",
        unwritten(writes_a_part_of_the_buffer),
        MaterializeError,
        f"table must be loaded … {EMPTY}",
    ),
    row(
        "birth-unwritten-materialize",
        unwritten(writes_table, how="materialize"),
        MaterializeError,
        f"weight must be loaded … {EMPTY}",
    ),
    row(
        "birth-unwritten-fsdp",
        unwritten(writes_a_part, strategy="fsdp"),
        MaterializeError,
        f"weight must be loaded … {EMPTY}",
    ),
    row(
        "birth-unwritten-many",
        lambda _: (lambda fabric, module: fabric.setup(module))(*recorded(many_unwritten)),
        MaterializeError,
        f"0, 1, 2, 3, 4 and 3 more must be loaded … {EMPTY}",
    ),
    row(
        "birth-computes-early",
        computes_early,
        MaterializeError,
        "from `init_module` must be set up before … linear was called … fabric.setup(model) … fabric.materialize",
    ),
    row(
        "birth-given-changed",
        changes_what_was_given,
        MaterializeError,
        "shape (1024, 1025) … was given … until setup … changed in place … tensor.clone()",
    ),
    row(
        "birth-meta-inside",
        uses_meta_inside,
        MaterializeError,
        "on the meta device … (4, 3) … inside init_module … without device='meta'",
    ),
    row(
        "birth-setup-inside",
        inside_the_context("setup"),
        SetupOrderError,
        "model must be complete … `init_module` has not ended … after its block",
    ),
    row(
        "birth-materialize-inside",
        inside_the_context("materialize"),
        SetupOrderError,
        "model must be complete … `init_module` has not ended … after its block",
    ),
    row(
        "birth-half-in-inference-mode",
        half_in_inference_mode,
        SetupOrderError,
        "torch.inference_mode … only the later part is inside … Move one to the other",
    ),
    row(
        "birth-parallelize-computes",
        spreads(scales_the_head),
        MaterializeError,
        "`parallelize_fn` must only spread … calls mul on … Compute before setup … empty_init=False",
    ),
    row(
        "birth-parallelize-replaces",
        spreads(replaces_the_head),
        MaterializeError,
        "head.weight must be spread as it was recorded … shape (8, 8) … `parallelize_fn` … empty_init=False",
    ),
    row(
        "materialize-list",
        lambda _: one().materialize([Net()]),
        ConfigError,
        "`module` … torch.nn.Module … list",
    ),
    row(
        "materialize-meta",
        lambda _: one().materialize(nn.Linear(3, 4, device="meta")),
        MaterializeError,
        "weight, bias must have a value … are on the meta device … fabric.init_module()",
    ),
    row(
        "verify-not-set-up",
        lambda _: one().verify(Net()),
        SetupOrderError,
        "`module` … a Net that was not … model = fabric.setup(model)",
    ),
]

# -- data, and small help ----------------------------------------------------------------------------------------------


def loaders(*items: Any) -> Callable[[Path], object]:
    return lambda _: one().setup_dataloaders(*items)


def loader_twice(_: Path) -> None:
    fabric = one()
    fabric.setup_dataloaders(fabric.setup_dataloaders(DataLoader([1, 2])))


def epoch_of_nothing(_: Path) -> None:
    loader = DataLoader([1, 2])
    one().setup_dataloaders(loader, use_distributed_sampler=False).set_epoch(1)


DATA = [
    row("loaders-none", loaders(), ConfigError, "`setup_dataloaders` … at least one DataLoader … got none"),
    row("loaders-list", loaders([1, 2]), ConfigError, "`dataloaders` … DataLoader … list"),
    row("loader-twice", loader_twice, SetupOrderError, "once … already … Use what setup_dataloaders returned"),
    row("loader-own-class", loaders(OwnLoader([1, 2])), ConfigError, "OwnLoader … use_distributed_sampler=False"),
    row(
        "loader-unsized-data", loaders(DataLoader(Unsized())), ConfigError, "have a length … Unsized has none … __len__"
    ),
    row("epoch-of-nothing", epoch_of_nothing, ConfigError, "`set_epoch` … neither has a set_epoch method"),
    row(
        "callback-no-method",
        lambda _: one(callbacks=Badge()).call("on_start"),
        ConfigError,
        "Badge.on_start … 'not a method'",
    ),
    row(
        "log-vector",
        lambda _: one(loggers=Logger()).log("loss", torch.ones(2)),
        ConfigError,
        "one element … 'loss' has shape (2,) … Reduce it",
    ),
    row("seed-negative", lambda _: seed_everything(-1), ConfigError, "`seed` … [0, 2**32) … -1"),
    row("seed-too-large", lambda _: seed_everything(2**32), ConfigError, "`seed` … [0, 2**32) … 4294967296"),
    row("seed-text", lambda _: seed_everything("7"), ConfigError, "`seed` … whole number … '7'"),
    row("broadcast-from-nobody", lambda _: one().broadcast(1, src=1), ConfigError, "`src` … [0, 1) … is 1"),
    row("broadcast-from-text", lambda _: one().broadcast(1, src="0"), ConfigError, "`src` … [0, 1) … '0'"),
    row(
        "reduce-unknown",
        lambda _: one().all_reduce(1, reduce_op="median"),
        ConfigError,
        "`reduce_op` … sum, mean … 'median'",
    ),
]

# -- launches ----------------------------------------------------------------------------------------------------------


def without(*names: str, **others: str) -> dict[str, str]:
    return {**{k: v for k, v in TORCHRUN.items() if k not in names}, **others}


LAUNCHES = [
    row(
        "env-rank-alone",
        lambda _: world({"RANK": "0"}),
        WorldError,
        "WORLD_SIZE, LOCAL_RANK must be set when RANK is set … torchrun … unset",
    ),
    row(
        "env-no-local-rank",
        lambda _: world(without("LOCAL_RANK")),
        WorldError,
        "LOCAL_RANK must be set … RANK, WORLD_SIZE are set … torchrun",
    ),
    row(
        "env-rank-word", lambda _: world(without(RANK="first")), WorldError, "RANK … whole number … 'first' … torchrun"
    ),
    row(
        "env-size-empty",
        lambda _: world(without("LOCAL_WORLD_SIZE", WORLD_SIZE="")),
        WorldError,
        "WORLD_SIZE … '' … torchrun",
    ),
    row(
        "env-size-negative",
        lambda _: world(without("LOCAL_WORLD_SIZE", WORLD_SIZE="-2")),
        WorldError,
        "WORLD_SIZE … at least 1 … -2",
    ),
    row(
        "env-rank-beyond",
        lambda _: world(without(RANK="2")),
        WorldError,
        "`rank` … [0, 2) … is 2 … Check RANK and WORLD_SIZE",
    ),
    row("env-rank-negative", lambda _: world(without(RANK="-1")), WorldError, "`rank` … [0, 2) … is -1 … Check RANK"),
    row(
        "env-local-rank-beyond",
        lambda _: world(without(LOCAL_RANK="2")),
        WorldError,
        "LOCAL_RANK … [0, 2) … is 2 … one process per device",
    ),
    row(
        "env-local-rank-negative", lambda _: world(without(LOCAL_RANK="-1")), WorldError, "LOCAL_RANK … [0, 2) … is -1"
    ),
    row(
        "env-other-devices",
        lambda _: world(TORCHRUN, devices=4),
        WorldError,
        "`devices` … (2) … 4 means 4 x cpu … devices='auto'",
    ),
    row(
        "env-other-nodes",
        lambda _: world(TORCHRUN, num_nodes=2),
        WorldError,
        "launched (2) … 2 x 2 is 4 … Pass both as launched",
    ),
    row(
        "env-local-larger-than-world",
        lambda _: world(without(LOCAL_WORLD_SIZE="4")),
        WorldError,
        "launched (2) … 4 x 1 is 4",
    ),
    row("world-rank-beyond", lambda _: World(rank=2, size=2), WorldError, "`rank` … [0, 2) … is 2"),
    row(
        "world-local-rank-beyond",
        lambda _: World(local_rank=1),
        WorldError,
        "`local_rank` … [0, 1) … is 1 … Check LOCAL_RANK",
    ),
    row(
        "launch-nodes",
        lambda _: one(strategy="ddp", devices=2, num_nodes=3).launch(print),
        WorldError,
        "`num_nodes` … is 3 … torchrun --nnodes 3 --nproc-per-node 2",
    ),
    row(
        "launch-no-function",
        lambda _: choose(SITUATION, "auto"),
        ConfigError,
        "`launch` must get a function … got none … fabric.launch(train)",
    ),
    row(
        "launch-spawn-no-function",
        lambda _: choose(SITUATION, "spawn"),
        ConfigError,
        "'spawn' … got none … fabric.launch(train)",
    ),
    row(
        "launch-popen-no-script",
        lambda _: choose(SITUATION, "popen"),
        ConfigError,
        "`start_method` … 'popen' … Use 'fork', or 'spawn'",
    ),
    row("launch-number", lambda _: one().launch(3), ConfigError, "`function` … function(fabric, ...) … is 3"),
    row(
        "launch-lambda",
        lambda _: one(strategy=DDPStrategy(start_method="forkserver"), devices=2).launch(lambda fabric: 1),
        ConfigError,
        "picklable … 'forkserver' … <lambda> … start_method 'fork'",
    ),
    row(
        "group-of-another-world",
        lambda _: (dist.init_process_group("fake", rank=0, world_size=4, store=dist.HashStore()), one(strategy="ddp")),
        WorldError,
        "rank 0 of 1 … rank 0 of 4 … Destroy it",
    ),
]

# -- checkpoints -------------------------------------------------------------------------------------------------------

STRATEGY_OF = {"file": "single_device", "folder": "fsdp"}


def saved(path: Path, form: str, **state: Any) -> tuple[Fabric, Any, Any, Path]:
    """A checkpoint of a net and its optimizer, and of ``state``, in one file or in a folder."""
    fabric, model, optimizer = ready(one(strategy=STRATEGY_OF[form]))
    backward(fabric, model)
    optimizer.step()
    target = path / "checkpoint"
    fabric.save(target, {"model": model, "optimizer": optimizer, **state})
    assert target.is_dir() == (form == "folder")
    return fabric, model, optimizer, target


def missing_entry(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        fabric, model, _optimizer, target = saved(path, form, step=3)
        fabric.load(target, {"model": model, "ema": 0})

    return act


def other_names(form: str) -> Callable[[Path], object]:
    """Names on both sides that the other lacks, and one of another shape."""

    def act(path: Path) -> None:
        fabric, _model, _optimizer, target = saved(path, form)
        net = Net(width=5)
        net.extra = nn.Linear(1, 1)
        del net.blocks[1]
        fabric.load(target, {"model": fabric.setup(net)})

    return act


def only_other_names(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        fabric, _model, _optimizer, target = saved(path, form)
        net = Net()
        net.tail = net.head
        del net.head
        model = fabric.setup(net)
        fabric.load(target, {"model": model})

    return act


def other_optimizer(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        fabric, _model, _optimizer, target = saved(path, form)
        net = Net()
        kept, optimizer = fabric.setup(net, SGD(net.head.parameters(), lr=0.1))
        assert kept is not None
        fabric.load(target, {"optimizer": optimizer})

    return act


def broken(form: str, pattern: str = "", content: bytes = b"not what was written") -> Callable[[Path], object]:
    """Overwrite the file, or those of the folder that match ``pattern``."""

    def act(path: Path) -> None:
        fabric, model, _optimizer, target = saved(path, form)
        for file in target.glob(pattern) if pattern else [target]:
            file.write_bytes(content)
        fabric.load(target, {"model": model})

    return act


def cut_short(path: Path) -> None:
    fabric, model, _optimizer, target = saved(path, "file")
    target.write_bytes(target.read_bytes()[:-500])
    fabric.load(target, {"model": model})


def lost_shard(path: Path) -> None:
    fabric, model, _optimizer, target = saved(path, "folder")
    next(target.glob("*.distcp")).unlink()
    fabric.load(target, {"model": model})


def needs_code(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        fabric, model, _optimizer, target = saved(path, form, thing=Pickled())
        fabric.load(target, {"model": model, "thing": None})

    return act


def wrong_entry(key: str, value: Any) -> Callable[[Path], object]:
    """The file holds something else under the name of a model or an optimizer."""

    def act(path: Path) -> None:
        fabric, model, optimizer = ready()
        torch.save({key: value}, path / "checkpoint")
        fabric.load(path / "checkpoint", {key: {"model": model, "optimizer": optimizer}[key]})

    return act


def below_a_file(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        (path / "file").write_text("")
        saved(path / "file", form)

    return act


def folder_onto_file(path: Path) -> None:
    (path / "checkpoint").write_text("")
    saved(path, "folder")


def file_onto_folder(path: Path) -> None:
    (path / "checkpoint").mkdir()
    (path / "checkpoint" / "notes.txt").write_text("mine")
    saved(path, "file")


def save_code(form: str) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        saved(path, form, schedule=lambda step: step)

    return act


def raw(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        make(path / "raw.pt")
        fabric, model, _optimizer = ready()
        fabric.load_raw(path / "raw.pt", model)

    return act


def save_state(state: Any, **arguments: Any) -> Callable[[Path], object]:
    return lambda path: one().save(path / "checkpoint", state, **arguments)


def both_forms(
    name: str, act: Callable[[str], Callable[[Path], object]], error: type[FabricError], says: str
) -> list[Any]:
    return [row(f"{name}-{form}", act(form), error, says) for form in STRATEGY_OF]


ALL_NAMES = (
    "head.weight: (5, 4) here, (4, 4) in the checkpoint … head.bias: (5,) here, (4,) in the checkpoint … missing:"
    " ['extra.weight', 'extra.bias'] … 'blocks.1.norm.weight', … 'blocks.1.up.bias', … Build the model with the sizes"
)

CHECKPOINTS = [
    row(
        "load-nothing", lambda p: one().load(p / "nowhere"), CheckpointError, "nowhere … a checkpoint … does not exist"
    ),
    row(
        "load-other-folder",
        lambda p: one().load(p),
        CheckpointError,
        "a folder with meta.pt … is empty",
    ),
    *both_forms(
        "load-missing-entry",
        missing_entry,
        CheckpointError,
        "checkpoint must hold model, ema … lacks ema … It holds:  … optimizer … step … strict=False",
    ),
    *both_forms("load-names-and-shapes", other_names, CheckpointError, ALL_NAMES),
    *both_forms(
        "load-names",
        only_other_names,
        CheckpointError,
        "missing: ['tail.weight', 'tail.bias'] … unexpected: ['head.weight', 'head.bias'] … strict=False",
    ),
    *both_forms(
        "load-other-optimizer",
        other_optimizer,
        CheckpointError,
        "optimizer must step the same parameters … missing: none … 'blocks.1.down.weight'",
    ),
    *both_forms("load-needs-code", needs_code, CheckpointError, "readable … test_errors.Pickled … weights_only=False"),
    row("load-garbage", broken("file"), CheckpointError, "checkpoint must be a readable … load another one"),
    row("load-empty", broken("file", content=b""), CheckpointError, "must be a readable … load another one"),
    row("load-cut-short", cut_short, CheckpointError, "must be a readable … cut short … load another one"),
    row(
        "load-garbage-meta",
        broken("folder", "meta.pt"),
        CheckpointError,
        "meta.pt must be as it was written … load another",
    ),
    row(
        "load-garbage-metadata",
        broken("folder", ".metadata"),
        CheckpointError,
        ".metadata must be as it was written … load another",
    ),
    row(
        "load-garbage-shards",
        broken("folder", "*.distcp"),
        CheckpointError,
        "__0_0.distcp must be as it was written … load another checkpoint",
    ),
    row("load-lost-shard", lost_shard, CheckpointError, "__0_0.distcp … is missing … load another checkpoint"),
    row("load-list", wrong_entry("model", [1]), CheckpointError, "entry of a module … a dictionary … list"),
    row(
        "load-numbers",
        wrong_entry("model", {**Net().state_dict(), "head.bias": 3}),
        CheckpointError,
        "head.bias: (4,) here, no tensor but int in the checkpoint",
    ),
    row(
        "load-not-optimizer",
        wrong_entry("optimizer", {"lr": 3}),
        CheckpointError,
        "'state' and 'param_groups' … ['lr']",
    ),
    *both_forms(
        "save-below-file",
        below_a_file,
        CheckpointError,
        "file/checkpoint … could not … File exists … a path that can be written",
    ),
    row(
        "save-folder-onto-file",
        folder_onto_file,
        CheckpointError,
        "checkpoint is a file that holds more than a checkpoint … Save to another name",
    ),
    row(
        "save-file-onto-folder",
        file_onto_folder,
        CheckpointError,
        "checkpoint is a folder that holds more than a checkpoint … Save to another name",
    ),
    *both_forms("save-code", save_code, CheckpointError, "write the checkpoint … could not … <lambda>"),
    row("save-list", save_state([1]), ConfigError, "`state` … {'model': model} … list"),
    row("save-number-names", save_state({1: 2}), ConfigError, "`state` … a dictionary with names … has the key 1"),
    row("save-own-key", save_state({"fabriclite": 1}), ConfigError, "`state` … 'fabriclite' … Rename it"),
    row(
        "save-filter-list", save_state({"a": 1}, filter=["a"]), ConfigError, "`filter` … ['a'] … filter={'model': keep}"
    ),
    row("save-filter-unknown", save_state({"a": 1}, filter={"b": bool}), ConfigError, "`filter` … (a) … 'b'"),
    row(
        "save-filter-number",
        save_state({"a": 1}, filter={"a": 1}),
        ConfigError,
        "`filter` … (name, value) -> bool … {'a': 1}",
    ),
    row("load-state-list", lambda p: one().load(p, [1]), ConfigError, "`state` … {'model': model} … list"),
    row("raw-missing", raw(lambda p: None), CheckpointError, "raw.pt … does not exist"),
    row(
        "raw-folder",
        raw(lambda p: p.mkdir()),
        CheckpointError,
        "raw.pt … model.safetensors … is empty",
    ),
    row("raw-list", raw(lambda p: torch.save([1], p)), CheckpointError, "raw.pt … a dictionary … list"),
    row(
        "raw-names",
        raw(lambda p: torch.save({"w": torch.ones(1)}, p)),
        CheckpointError,
        "unexpected: ['w'] … head.weight",
    ),
]

TABLE = [*ARGUMENTS, *CONFIGS, *PLANS, *ORDERS, *BIRTHS, *DATA, *LAUNCHES, *CHECKPOINTS]


def check(text: str, says: str) -> None:
    """The message has every part, a rule and what was found, and does not run on for pages."""
    parts = says.split(" … ")
    assert [part for part in parts if part not in text] == [], text
    assert re.search(r"\bmust\b.*\bbut\b", text, re.DOTALL), text
    assert len(text) < 1000, text


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case: Row, tmp_path: Path) -> None:
    with pytest.raises(FabricError) as caught:
        case.act(tmp_path)
    assert type(caught.value) is case.error
    check(str(caught.value), case.says)


# -- two processes -----------------------------------------------------------------------------------------------------


class Uneven(nn.Module):
    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 7)
        self.down = nn.Linear(7, 4)


class HalfSplit(TiedNet):
    _tp_plan: ClassVar[dict[str, str]] = {"embed": "embedding_rowwise"}


def sampler_without_length(fabric: Fabric, _: Path) -> None:
    fabric.setup_dataloaders(DataLoader([0] * 8, sampler=Endless()))


def unwritable(fabric: Fabric, path: Path) -> None:
    (path / "file").write_text("")
    _, model, _optimizer = ready(fabric)
    fabric.save(path / "file" / "checkpoint", {"model": model})


def torn_on_one_rank(fabric: Fabric, path: Path) -> None:
    """Only one of two ranks finds its shard broken; both must say so."""
    _, model, _optimizer = ready(fabric)
    fabric.save(path / "torn", {"model": model})
    if fabric.is_global_zero:
        (path / "torn" / "__1_0.distcp").write_bytes(b"")
    fabric.barrier()
    fabric.load(path / "torn", {"model": model})


def engine_without_optimizer(fabric: Fabric, _: Path) -> None:
    fabric.setup(Net())


def engine_with_two(fabric: Fabric, _: Path) -> None:
    net = Net()
    fabric.setup(net, SGD(net.head.parameters(), lr=0.1), SGD(net.blocks.parameters(), lr=0.1))


def engine_late_optimizer(fabric: Fabric, _: Path) -> None:
    fabric.setup_optimizers(sgd(Net()))


def two_backwards(fabric: Fabric, _: Path) -> None:
    _, model, _optimizer = ready(fabric)
    for _ in range(2):
        fabric.backward(model(torch.ones(2, 4)).sum(), model=model)


def backward_of_which(fabric: Fabric, _: Path) -> None:
    kept = [ready(fabric) for _ in range(2)]
    fabric.backward(kept[0][1](torch.ones(2, 4)).sum())


def backward_with_gradient(fabric: Fabric, _: Path) -> None:
    _, model, _optimizer = ready(fabric)
    fabric.backward(model(torch.ones(2, 4)).sum(), model=model, create_graph=True)


def engine_closure(fabric: Fabric, _: Path) -> None:
    _, _model, optimizer = ready(fabric)
    optimizer.step(lambda: 0.0)


def engine_nonfinite(fabric: Fabric, _: Path) -> None:
    _, model, optimizer = ready(fabric)
    fabric.backward(model(torch.ones(2, 4)).sum() * float("inf"), model=model)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)


def nonfinite_on_one_rank(fabric: Fabric, _: Path) -> None:
    _, model, optimizer = ready(fabric)
    fabric.backward(model(torch.ones(2, 4)).sum() * (float("inf") if fabric.global_rank else 1.0))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)


def different_models(fabric: Fabric, _: Path) -> None:
    with fabric.init_module(empty_init=True):
        net = Net(width=4 + 2 * fabric.global_rank)
    fabric.setup(net, sgd(net))


def one_unwritten(fabric: Fabric, _: Path) -> None:
    """Only one of two ranks leaves it so; both must say so."""
    with fabric.init_module(empty_init=True):
        net = Unwritten(writes_table)
        if fabric.is_global_zero:
            writes_weight(net)
    fabric.setup(net, sgd(net))


def engine_of(dtype: torch.dtype) -> Callable[[Fabric, Path], None]:
    def act(fabric: Fabric, _: Path) -> None:
        net = Net()
        net.extra = nn.Parameter(torch.ones(4, dtype=dtype))
        fabric.setup(net, sgd(net))

    return act


@dataclass(frozen=True)
class RowInTwo:
    """As :class:`Row`, on each of two ranks; ``act`` gets a folder that both share."""

    name: str
    act: Callable[[Fabric, Path], object]
    error: type[FabricError]
    says: str


TWO: dict[str, Any] = {
    "ddp": DDPStrategy(start_method="forkserver"),
    "fsdp": FSDPStrategy(start_method="forkserver"),
    "tp": ModelParallelStrategy(start_method="forkserver"),
    "zero1": DeepSpeedStrategy(stage=1, start_method="forkserver"),
}
IN_TWO: dict[str, list[RowInTwo]] = {
    "ddp": [
        RowInTwo(
            "different-models",
            different_models,
            MaterializeError,
            "All ranks must build the same model … head.weight [4, 4] … rank 1 … [6, 4] … depend on the rank",
        ),
        RowInTwo(
            "sampler-without-length",
            sampler_without_length,
            ConfigError,
            "a length … over 2 ranks … Endless has none … use_distributed_sampler=False",
        ),
        RowInTwo("save-below-file", unwritable, CheckpointError, "file/checkpoint … Rank 0 … could not"),
        RowInTwo("broadcast", lambda f, _: f.broadcast(1, src=2), ConfigError, "`src` … [0, 2) … is 2"),
        RowInTwo("nonfinite", nonfinite_on_one_rank, NonFiniteGradientError, "2-norm … error_if_nonfinite=False"),
    ],
    "fsdp": [
        RowInTwo(
            "different-models",
            different_models,
            MaterializeError,
            "All ranks must build the same model … head.weight [4, 4] … rank 1 … [6, 4] … depend on the rank",
        ),
        RowInTwo("save-below-file", unwritable, CheckpointError, "file/checkpoint … Rank 0 … could not"),
        RowInTwo(
            "load-torn-shard",
            torn_on_one_rank,
            CheckpointError,
            "__1_0.distcp must be as it was written … load another",
        ),
        RowInTwo("nonfinite", nonfinite_on_one_rank, NonFiniteGradientError, "2-norm … error_if_nonfinite=False"),
    ],
    "tp": [
        RowInTwo(
            "uneven-split",
            lambda f, _: f.setup(Uneven()),
            ConfigError,
            "`out_features` of up … tensor_parallel_size 2 … is 7 … Leave it out of the plan … colwise_gather_output",
        ),
        RowInTwo(
            "split-tie",
            lambda f, _: f.setup(HalfSplit()),
            ConfigError,
            "embed.weight and head.weight … different layouts … Give both the same split, or neither",
        ),
    ],
    "zero1": [
        RowInTwo(
            "different-models",
            different_models,
            MaterializeError,
            "All ranks must build the same model … head.weight [4, 4] … rank 1 … [6, 4] … depend on the rank",
        ),
        *(
            RowInTwo(
                f"trains-{dtype}",
                engine_of(dtype),
                ConfigError,
                f"DeepSpeedStrategy … at most float32 … extra is {dtype} … Cast it, freeze it",
            )
            for dtype in (torch.float64, torch.complex64)
        ),
        RowInTwo(
            "no-optimizer",
            engine_without_optimizer,
            SetupOrderError,
            "got no optimizer … fabric.setup(model, optimizer)",
        ),
        RowInTwo("two-optimizers", engine_with_two, ConfigError, "one optimizer … got 2 … several parameter groups"),
        RowInTwo("late-optimizer", engine_late_optimizer, SetupOrderError, "together … fabric.setup(model, optimizer)"),
        RowInTwo("two-backwards", two_backwards, SetupOrderError, "stage 1 … no_backward_sync(model) … or use stage 3"),
        RowInTwo(
            "which-engine",
            backward_of_which,
            SetupOrderError,
            "which of … modules … fabric.backward(loss, model=model)",
        ),
        RowInTwo("backward-argument", backward_with_gradient, ConfigError, "`retain_graph` … create_graph"),
        RowInTwo("closure", engine_closure, ConfigError, "`closure` … one was given … Call backward first"),
        RowInTwo("nonfinite", engine_nonfinite, NonFiniteGradientError, "2-norm … error_if_nonfinite=False"),
    ],
}


def refuse_all(fabric: Fabric, strategy: str, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Run on each rank: kind and text of every row's error, of every rank."""
    found: dict[str, list[tuple[str, str]]] = {}
    for case in IN_TWO[strategy]:
        (folder / case.name).mkdir(exist_ok=True)
        outcome = ("no error", "")
        try:
            case.act(fabric, folder / case.name)
        except Exception as error:
            outcome = (type(error).__name__, str(error))
        found[case.name] = gather_objects(fabric._ready_world, outcome)
    return found


@cache
def refused(strategy: str, folder: Path) -> dict[str, list[tuple[str, str]]]:
    fabric = Fabric(accelerator="cpu", strategy=TWO[strategy], devices=2)
    result = fabric.launch(refuse_all, strategy, folder)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.mark.parametrize(
    ("strategy", "case"), [pytest.param(s, case, id=f"{s}-{case.name}") for s in IN_TWO for case in IN_TWO[s]]
)
def test_bad_input_in_two_processes(strategy: str, case: RowInTwo, folder: Path) -> None:
    (folder / strategy).mkdir(exist_ok=True)
    ranks = refused(strategy, folder / strategy)[case.name]
    assert [kind for kind, _ in ranks] == [case.error.__name__] * 2, ranks
    for _, text in ranks:
        check(text, case.says)


# -- a rank that fails -------------------------------------------------------------------------------------------------


def fail_on_second(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise ZeroDivisionError("rank one gave up")
    fabric.barrier()


def return_code(fabric: Fabric) -> Any:
    return lambda: None


@pytest.mark.parametrize(
    ("function", "says"),
    [
        pytest.param(
            fail_on_second, "Rank 1 of 2 failed … in fail_on_second … ZeroDivisionError: rank one gave up", id="raises"
        ),
        pytest.param(return_code, "Rank 0 of 2 failed … returned function … must be picklable", id="returns-code"),
    ],
)
def test_failing_rank(function: Callable[[Fabric], Any], says: str) -> None:
    fabric = Fabric(accelerator="cpu", strategy=TWO["ddp"], devices=2)
    with pytest.raises(LaunchError) as caught:
        fabric.launch(function)
    assert [part for part in says.split(" … ") if part not in str(caught.value)] == [], str(caught.value)


def test_no_address_to_meet_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorldError) as caught:
        Fabric(accelerator="cpu", strategy="ddp", devices=2)
    check(str(caught.value), "MASTER_ADDR and MASTER_PORT … 2 processes … torchrun")


def test_right_input_passes() -> None:
    """The rows' helpers do no harm: each is refused for its one mistake."""
    fabric, model, optimizer = ready(one(strategy=SingleDeviceStrategy()))
    backward(fabric, model)
    assert fabric.clip_gradients(model, optimizer, max_norm=1.0) is not None
    optimizer.step()
    assert world(TORCHRUN, devices=2).rank == 1
    assert len(fabric.setup_dataloaders(DataLoader([1, 2]))) == 2

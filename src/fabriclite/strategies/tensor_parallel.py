"""Split single matrix products over ranks (DTensor); shard the rest over data parallel (FSDP2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import module_state, optim_state
from fabriclite.birth.births import Births
from fabriclite.birth.plan import InitPlan
from fabriclite.birth.verify import Parts
from fabriclite.birth.watch import watched
from fabriclite.errors import ConfigError
from fabriclite.precision import Precision
from fabriclite.spread import Spread
from fabriclite.strategies import _fully_shard, _shared, tp_plan
from fabriclite.strategies.configs import ModelParallelStrategy
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World

Styles = Mapping[str, ParallelStyle]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel(Strategy):
    """The module itself is the engine; its parameters become ``DTensor`` in place."""

    sharded: ClassVar[bool] = True
    joint_setup: ClassVar[bool] = False

    config: ModelParallelStrategy
    world: World
    precision: Precision
    scaler: GradScaler
    mesh: DeviceMesh
    paused: "WeakSet[nn.Module]"
    styles: "WeakKeyDictionary[nn.Module, Styles]"
    """Of each module, which of its parts a plan split, and how."""

    @classmethod
    def make(cls, config: ModelParallelStrategy, world: World, precision: Precision) -> Self:
        mesh = init_device_mesh(
            world.device.type, config.sizes(world.size), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        return cls(
            config=config,
            world=world,
            precision=precision,
            scaler=_shared.make_scaler(world, precision),
            mesh=mesh,
            paused=WeakSet(),
            styles=WeakKeyDictionary(),
        )

    @override
    def plan_init(self, empty_init: bool | None) -> InitPlan:
        return InitPlan.of(record=empty_init is not False, device=self.world.device, dtype=self.precision.param_dtype)

    @override
    def home(self, move_to_device: bool) -> torch.device | None:
        return self.world.device if move_to_device else None

    @override
    def setup(
        self, module: nn.Module, births: Births, optimizers: Sequence[Optimizer]
    ) -> tuple[nn.Module, list[Optimizer]]:
        same = _shared.agree(births, self.world)
        _shared.same_on_all_ranks(module, self.world)
        self._same_random_stream()
        module, styles = split(self.config, module, self.mesh)
        self.styles[module] = styles
        shard = self.mesh.size(0) > 1 and not _fully_shard.is_sharded(module)
        if shard:
            _fully_shard.apply(
                module,
                self.mesh["data_parallel"],
                precision=self.precision,
                policy=self.config.auto_wrap_policy,
                reshard_after_forward=self.config.reshard_after_forward,
                cpu_offload=False,
            )
        _shared.fill_agreed(births, self.world, same)
        if shard:
            _fully_shard.make_root(module, self.mesh["data_parallel"], self.paused)
        return module, list(optimizers)

    def _same_random_stream(self) -> None:
        """Ranks that share one product must draw the same dropout masks, whatever each was seeded with."""
        if self.mesh.size(1) == 1:
            return
        group = self.mesh.get_group("tensor_parallel")
        first = dist.get_global_rank(group, 0)
        state = [torch.get_rng_state(), torch.cuda.get_rng_state() if self.world.device.type == "cuda" else None]
        dist.broadcast_object_list(state, src=first, group=group)
        torch.set_rng_state(state[0])  # type: ignore[arg-type]
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])

    @override
    def user_module(self, engine: nn.Module) -> nn.Module:
        return engine

    @override
    def local_parts(self, engine: nn.Module) -> Parts:
        return _shared.local_parts(self.user_module(engine))

    @override
    def hand_out(self, engine: nn.Module) -> None:
        _fully_shard.show_shards(engine)

    @override
    def spread(self, engine: nn.Module) -> Spread:
        split = tp_plan.splits(engine, self.styles.get(engine, {}))
        return Spread(mesh=_shared.axes(self.mesh), wrapped=(*split, *_fully_shard.wrapped(engine)))

    @override
    def autocast(self) -> AbstractContextManager[Any]:
        return _shared.autocast(self.world, self.precision)

    @override
    def forward(self, engine: nn.Module) -> Callable[..., Any]:
        return _shared.in_precision(engine, self.world, self.precision)

    @override
    @contextmanager
    def region(self, engine: nn.Module, through_root: bool) -> Iterator[Finish]:
        with self.autocast():
            hooked = _fully_shard.is_root(engine) and not through_root
            yield _fully_shard.enter(engine) if hooked else _shared.unchanged

    @override
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    @override
    def no_sync(self, engine: nn.Module) -> AbstractContextManager[None]:
        return _fully_shard.no_sync(engine, self.paused) if _fully_shard.is_root(engine) else nullcontext()

    @override
    def clip_grad_norm(
        self, engine: nn.Module, optimizer: Optimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        return _shared.clip_norm(self, optimizer, max_norm, norm_type, error_if_nonfinite)

    @override
    def clip_grad_value(self, engine: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        _shared.clip_value(self, optimizer, clip_value)

    @property
    @override
    def sharded_checkpoint(self) -> bool:
        return self.config.save_distributed_checkpoint

    @override
    def state_dict(self, engine: nn.Module) -> dict[str, Any]:
        _fully_shard.show_shards(engine)
        return engine.state_dict()

    @override
    def layout(self, engine: nn.Module) -> dict[str, Any]:
        return self.state_dict(engine)

    @override
    def load_state_dict(self, engine: nn.Module, state: Mapping[str, Any]) -> None:
        _fully_shard.show_shards(engine)
        module_state.load_into(engine, state)

    @override
    def optimizer_state(self, engine: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        _fully_shard.show_shards(engine)
        return optim_state.named_state(optimizer, engine)

    @override
    def optimizer_layout(self, engine: nn.Module, optimizer: Optimizer) -> optim_state.OptimizerLayout:
        _fully_shard.show_shards(engine)
        return optim_state.layout(optimizer, engine)

    @override
    def load_optimizer_state(self, engine: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        _fully_shard.show_shards(engine)
        optim_state.load_named_state(optimizer, engine, state)

    @override
    def sampler_shard(self) -> tuple[int, int]:
        return self.mesh.size(0), self.mesh.get_local_rank("data_parallel")


def split(config: ModelParallelStrategy, module: nn.Module, mesh: DeviceMesh) -> tuple[nn.Module, Styles]:
    """Split matrix products of ``module`` over the axis ``"tensor_parallel"`` of ``mesh``. Every rank must call this.

    Returns:
        The module, and what a plan split how: by name; empty where a function did it.

    Raises:
        ConfigError: the plan fits the module not, or ``parallelize_fn`` returned something else.
    """
    ties = tp_plan.tied_names(module)
    module, styles = _parallelize(config, module, mesh)
    _retie(module, ties)
    return module, styles


def _parallelize(config: ModelParallelStrategy, module: nn.Module, mesh: DeviceMesh) -> tuple[nn.Module, Styles]:
    if config.parallelize_fn is not None:
        with watched():
            result = config.parallelize_fn(module, mesh)
        if not isinstance(result, nn.Module):
            raise ConfigError(
                f"`parallelize_fn` must return the module, but returned {type(result).__name__}. Add a return."
            )
        return result, {}
    plan = config.plan if config.plan is not None else tp_plan.carried_by(module)
    styles = tp_plan.expand(module, plan)
    if mesh.size(1) == 1:
        return module, {}
    tp_plan.check_even(module, styles, mesh.size(1))
    for name, style in styles.items():
        parallelize_module(module.get_submodule(name), mesh["tensor_parallel"], style)
    return module, styles


def _retie(module: nn.Module, ties: list[list[str]]) -> None:
    """Make parameters that were one object one object again, if the plan treated them alike.

    Raises:
        ConfigError: the plan splits some uses of a shared parameter and not others.
    """
    for names in ties:
        params = [module.get_parameter(name) for name in names]
        layouts = {p.placements if isinstance(p, DTensor) else None for p in params}
        if len(layouts) > 1:
            raise ConfigError(
                f"A tensor-parallel plan must split every use of a shared parameter alike, but {' and '.join(names)}"
                " are one parameter and got different layouts. Give both the same split, or neither."
            )
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, params[0])

"""Shard parameters, gradients and optimizer state over the ranks (FSDP2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import module_state, optim_state
from fabriclite.birth.births import Births
from fabriclite.birth.plan import InitPlan
from fabriclite.birth.verify import Parts
from fabriclite.precision import Precision
from fabriclite.spread import Spread
from fabriclite.strategies import _fully_shard, _shared
from fabriclite.strategies.configs import FSDPStrategy
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FSDP(Strategy):
    """The module itself is the engine; ``fully_shard`` hooks it in place."""

    sharded: ClassVar[bool] = True
    joint_setup: ClassVar[bool] = False

    config: FSDPStrategy
    world: World
    precision: Precision
    scaler: GradScaler
    mesh: DeviceMesh
    paused: "WeakSet[nn.Module]"

    @classmethod
    def make(cls, config: FSDPStrategy, world: World, precision: Precision) -> Self:
        if config.device_mesh is None:
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(world.device.type, config.device_mesh, mesh_dim_names=("replicate", "shard"))
        return cls(
            config=config,
            world=world,
            precision=precision,
            scaler=_shared.make_scaler(world, precision),
            mesh=mesh,
            paused=WeakSet(),
        )

    @override
    def plan_init(self, empty_init: bool | None) -> InitPlan:
        return InitPlan.of(record=empty_init is not False, device=self.world.device, dtype=self.precision.param_dtype)

    @override
    def home(self, move_to_device: bool) -> torch.device | None:
        return None  # fully_shard moves one group at a time

    @override
    def setup(
        self, module: nn.Module, births: Births, optimizers: Sequence[Optimizer]
    ) -> tuple[nn.Module, list[Optimizer]]:
        same = _shared.agree(births, self.world)
        _shared.same_on_all_ranks(module, self.world)
        _fully_shard.apply(
            module,
            self.mesh,
            precision=self.precision,
            policy=self.config.auto_wrap_policy,
            reshard_after_forward=self.config.reshard_after_forward,
            cpu_offload=self.config.cpu_offload,
        )
        host = torch.device("cpu") if self.config.cpu_offload else None
        _shared.fill_agreed(births, self.world, same, shards_on=host)
        _fully_shard.make_root(module, self.mesh, self.paused)
        return module, list(optimizers)

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
        return Spread(mesh=_shared.axes(self.mesh), wrapped=_fully_shard.wrapped(engine))

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
            yield _shared.unchanged if through_root else _fully_shard.enter(engine)

    @override
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    @override
    def no_sync(self, engine: nn.Module) -> AbstractContextManager[None]:
        return _fully_shard.no_sync(engine, self.paused)

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
        return self.config.state_dict_type == "sharded"

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
        return self.world.size, self.world.rank

"""One process, one device."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import module_state, optim_state
from fabriclite.birth.births import Births
from fabriclite.birth.plan import InitPlan
from fabriclite.birth.verify import Parts
from fabriclite.precision import Precision
from fabriclite.spread import Spread
from fabriclite.strategies import _shared
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SingleDevice(Strategy):
    """The module itself is the engine."""

    sharded: ClassVar[bool] = False
    joint_setup: ClassVar[bool] = False

    world: World
    precision: Precision
    scaler: GradScaler

    @classmethod
    def make(cls, world: World, precision: Precision) -> Self:
        return cls(world=world, precision=precision, scaler=_shared.make_scaler(world, precision))

    @override
    def plan_init(self, empty_init: bool | None) -> InitPlan:
        return InitPlan.of(record=bool(empty_init), device=self.world.device, dtype=self.precision.param_dtype)

    @override
    def home(self, move_to_device: bool) -> torch.device | None:
        return self.world.device if move_to_device else None

    @override
    def setup(
        self, module: nn.Module, births: Births, optimizers: Sequence[Optimizer]
    ) -> tuple[nn.Module, list[Optimizer]]:
        births.fill()
        return module, list(optimizers)

    @override
    def user_module(self, engine: nn.Module) -> nn.Module:
        return engine

    @override
    def local_parts(self, engine: nn.Module) -> Parts:
        return _shared.local_parts(self.user_module(engine))

    @override
    def hand_out(self, engine: nn.Module) -> None:
        pass

    @override
    def spread(self, engine: nn.Module) -> Spread:
        return Spread()

    @override
    def autocast(self) -> AbstractContextManager[Any]:
        return _shared.autocast(self.world, self.precision)

    @override
    def forward(self, engine: nn.Module) -> Callable[..., Any]:
        return _shared.in_precision(engine, self.world, self.precision)

    @override
    def region(self, engine: nn.Module, through_root: bool) -> AbstractContextManager[Finish]:
        return _shared.autocast_region(self.world, self.precision)

    @override
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    @override
    def no_sync(self, engine: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

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
        return False

    @override
    def state_dict(self, engine: nn.Module) -> dict[str, Any]:
        return engine.state_dict()

    @override
    def layout(self, engine: nn.Module) -> dict[str, Any]:
        return self.state_dict(engine)

    @override
    def load_state_dict(self, engine: nn.Module, state: Mapping[str, Any]) -> None:
        module_state.load_into(engine, state)

    @override
    def optimizer_state(self, engine: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return optim_state.named_state(optimizer, engine)

    @override
    def optimizer_layout(self, engine: nn.Module, optimizer: Optimizer) -> optim_state.OptimizerLayout:
        return optim_state.layout(optimizer, engine)

    @override
    def load_optimizer_state(self, engine: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        optim_state.load_named_state(optimizer, engine, state)

    @override
    def sampler_shard(self) -> tuple[int, int]:
        return 1, 0

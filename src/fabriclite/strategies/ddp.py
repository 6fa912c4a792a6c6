"""Replicate the model, average the gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, final
from weakref import WeakKeyDictionary as WeakMap
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import _torch, module_state, optim_state
from fabriclite.birth.births import Births
from fabriclite.birth.plan import InitPlan
from fabriclite.birth.verify import Parts
from fabriclite.errors import SetupOrderError
from fabriclite.precision import Precision
from fabriclite.spread import Spread, Wrapped
from fabriclite.strategies import _shared
from fabriclite.strategies.configs import DDPStrategy
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DDP(Strategy):
    """The engine is torch's ``DistributedDataParallel``; a module without trainable parameters is its own engine."""

    sharded: ClassVar[bool] = False
    joint_setup: ClassVar[bool] = False

    config: DDPStrategy
    world: World
    precision: Precision
    scaler: GradScaler
    warm: "WeakSet[nn.Module]"
    """Engines with a static graph that have seen their first backward."""
    prepared: "WeakMap[DistributedDataParallel, bool]"
    """Every engine, and whether its forward ran with gradients since its last backward."""
    averaged: "WeakMap[DistributedDataParallel, frozenset[int]]"
    """Ids of the parameters whose gradients an engine averages."""

    @classmethod
    def make(cls, config: DDPStrategy, world: World, precision: Precision) -> Self:
        scaler = _shared.make_scaler(world, precision)
        return cls(
            config=config,
            world=world,
            precision=precision,
            scaler=scaler,
            warm=WeakSet(),
            prepared=WeakMap(),
            averaged=WeakMap(),
        )

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
        _shared.fill(births, self.world)
        if not any(p.requires_grad for p in module.parameters()):  # DDP refuses these: there is nothing to average
            _shared.same_on_all_ranks(module, self.world)
            return module, list(optimizers)
        config = self.config
        engine = DistributedDataParallel(
            module,
            device_ids=self._device_ids(module),
            **_torch.ddp_buffer_option(config.broadcast_buffers),
            find_unused_parameters=config.find_unused_parameters,
            static_graph=config.static_graph,
            gradient_as_bucket_view=config.gradient_as_bucket_view,
            bucket_cap_mb=config.bucket_cap_mb,
        )
        if config.ddp_comm_hook is not None:
            engine.register_comm_hook(config.ddp_comm_state, config.ddp_comm_hook)
        self.prepared[engine] = False
        self.averaged[engine] = frozenset(id(p) for p in engine.parameters() if p.requires_grad)
        return engine, list(optimizers)

    def _device_ids(self, module: nn.Module) -> list[int] | None:
        """The device that DDP moves inputs to; none where the user placed the module."""
        device = self.world.device
        own = device.type == "cuda" and all(p.device == device for p in module.parameters())
        return [device.index] if own and device.index is not None else None

    @override
    def user_module(self, engine: nn.Module) -> nn.Module:
        return cast(nn.Module, engine.module) if isinstance(engine, DistributedDataParallel) else engine

    @override
    def local_parts(self, engine: nn.Module) -> Parts:
        return _shared.local_parts(self.user_module(engine))

    @override
    def hand_out(self, engine: nn.Module) -> None:
        pass

    @override
    def spread(self, engine: nn.Module) -> Spread:
        mesh = {"data": self.world.size}
        name = type(self.user_module(engine)).__name__
        if not isinstance(engine, DistributedDataParallel):
            return Spread(mesh=mesh, wrapped=(Wrapped(how="replica", what=f"{name}, nothing to average"),))
        sizes = _torch.ddp_bucket_bytes(engine)
        most = max(sizes, default=0) / 2**20
        buckets = Wrapped(how="gradients", what=f"bucket of at most {most:.3g} MiB", count=len(sizes))
        return Spread(mesh=mesh, wrapped=(Wrapped(how="DDP", what=name), buckets))

    @override
    def autocast(self) -> AbstractContextManager[Any]:
        return _shared.autocast(self.world, self.precision)

    @override
    def forward(self, engine: nn.Module) -> Callable[..., Any]:
        module = self.user_module(engine)

        def run(*args: Any, **kwargs: Any) -> Any:
            # Without gradients there is nothing to average, and DDP's only act would be a collective for buffers, which
            # hangs when one rank alone evaluates or generates.
            if not torch.is_grad_enabled():
                return module(*args, **kwargs)
            self._will_average(engine)
            return engine(*args, **kwargs)

        return _shared.in_precision(run, self.world, self.precision)

    @override
    @contextmanager
    def region(self, engine: nn.Module, through_root: bool) -> Iterator[Finish]:
        with self.autocast():
            if isinstance(engine, DistributedDataParallel) and torch.is_grad_enabled():
                self._will_average(engine)
                yield _torch.ddp_enter(engine)
            else:
                yield _shared.unchanged

    @override
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        syncing = [ddp for ddp in self.prepared if ddp.require_backward_grad_sync]
        before = [_versions(ddp) for ddp in syncing]
        self.scaler.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        for ddp, versions in zip(syncing, before, strict=True):
            if _versions(ddp) == versions:
                continue
            if not self.averaged[ddp].issuperset(id(p) for p in ddp.parameters() if p.grad is not None):
                raise SetupOrderError(
                    f"Parameters of {type(ddp.module).__name__} must be there and require gradients when it is set up,"
                    " to be averaged over the ranks, but one was added or unfrozen after. Do that before setup."
                )
            if not self.prepared[ddp]:
                raise SetupOrderError(
                    f"Gradients of {type(ddp.module).__name__} must come through its forward or a method of it, once"
                    " per forward, to be averaged over the ranks, but these did not: DDP would leave them unaveraged."
                    " Call the model instead of a submodule, and add losses before one backward."
                )
            self.prepared[ddp] = False

    def _will_average(self, engine: nn.Module) -> None:
        if isinstance(engine, DistributedDataParallel) and engine.require_backward_grad_sync:
            self.prepared[engine] = True

    @override
    @contextmanager
    def no_sync(self, engine: nn.Module) -> Iterator[None]:
        # A static graph learns the order of gradients in its first backward, which torch asserts is a synchronised one.
        # Averaging early is harmless there: the mean of gradients that already agree is themselves.
        if not isinstance(engine, DistributedDataParallel):
            yield
            return
        if self.config.static_graph and engine not in self.warm:
            self.warm.add(engine)
            yield
            return
        before = engine.require_backward_grad_sync
        engine.require_backward_grad_sync = False
        try:
            yield
        finally:
            engine.require_backward_grad_sync = before

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
        return self.user_module(engine).state_dict()

    @override
    def layout(self, engine: nn.Module) -> dict[str, Any]:
        return self.state_dict(engine)

    @override
    def load_state_dict(self, engine: nn.Module, state: Mapping[str, Any]) -> None:
        module_state.load_into(self.user_module(engine), state)

    @override
    def optimizer_state(self, engine: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return optim_state.named_state(optimizer, self.user_module(engine))

    @override
    def optimizer_layout(self, engine: nn.Module, optimizer: Optimizer) -> optim_state.OptimizerLayout:
        return optim_state.layout(optimizer, self.user_module(engine))

    @override
    def load_optimizer_state(self, engine: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        optim_state.load_named_state(optimizer, self.user_module(engine), state)

    @override
    def sampler_shard(self) -> tuple[int, int]:
        return self.world.size, self.world.rank


def _versions(engine: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a gradient of ``engine`` does."""
    return [(id(p.grad), -1 if p.grad is None else p.grad._version) for p in engine.parameters()]

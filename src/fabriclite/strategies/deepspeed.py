"""ZeRO by DeepSpeed. The only file that names deepspeed."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from fabriclite import _torch, gradients
from fabriclite.birth.births import Births
from fabriclite.birth.plan import InitPlan
from fabriclite.birth.verify import Parts
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.launch.environment import prepare_for_deepspeed
from fabriclite.optim_state import OptimizerLayout
from fabriclite.precision import Precision
from fabriclite.spread import Spread, Wrapped
from fabriclite.strategies import _shared, _zero, _zero_state
from fabriclite.strategies._zero_optimizer import EngineOptimizer
from fabriclite.strategies.configs import ZERO_BUCKET, DeepSpeedStrategy
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeed(Strategy):
    """The engine is ``DeepSpeedEngine``; a module without an optimizer (a frozen teacher) is its own engine."""

    sharded: ClassVar[bool] = True
    joint_setup: ClassVar[bool] = True

    config: DeepSpeedStrategy
    world: World
    precision: Precision
    scaler: GradScaler
    library: Any
    engines: "WeakSet[nn.Module]"
    group_names: "WeakKeyDictionary[nn.Module, list[list[str]]]"
    """Parameter names of each optimizer group: the groups' own lists become flat partitions."""
    unstepped: "WeakSet[nn.Module]"
    """Engines of stage 1 or 2 that hold the reduced gradients of a backward that no step has used."""

    @classmethod
    def make(cls, config: DeepSpeedStrategy, world: World, precision: Precision) -> Self:
        return cls(
            config=config,
            world=world,
            precision=precision,
            scaler=GradScaler(world.device.type, enabled=False),  # DeepSpeed scales float16 losses itself
            library=_import_deepspeed(world),
            engines=WeakSet(),
            group_names=WeakKeyDictionary(),
            unstepped=WeakSet(),
        )

    @override
    def plan_init(self, empty_init: bool | None) -> InitPlan:
        record = bool(empty_init) or (empty_init is None and self.config.stage == 3)
        return InitPlan.of(record=record, device=self.world.device, dtype=self.precision.param_dtype)

    @override
    def home(self, move_to_device: bool) -> torch.device | None:
        return self.world.device

    @override
    def setup(
        self, module: nn.Module, births: Births, optimizers: Sequence[Optimizer]
    ) -> tuple[nn.Module, list[Optimizer]]:
        self._check_optimizers(optimizers)
        _check_dtypes(module)
        document = engine_config(self.config, self.precision, sum(p.numel() for p in module.parameters()))
        same = _shared.agree(births, self.world)
        _shared.same_on_all_ranks(module, self.world)
        if optimizers and self.config.stage == 3:
            _zero.partition_all(module, births, document)
        _shared.fill_agreed(births, self.world, same)
        if not optimizers:
            return module, []
        names = {id(p): name for name, p in module.named_parameters()}
        group_names = [[names[id(p)] for p in group["params"]] for group in optimizers[0].param_groups]
        engine, _, _, _ = self.library.initialize(
            model=module, optimizer=optimizers[0], config=document, dist_init_required=False
        )
        self.engines.add(engine)
        self.group_names[engine] = group_names
        return engine, [EngineOptimizer(engine, optimizers[0], self.unstepped)]

    @staticmethod
    def _check_optimizers(optimizers: Sequence[Optimizer]) -> None:
        if len(optimizers) > 1:
            raise ConfigError(
                f"With DeepSpeedStrategy a module must have one optimizer, but `setup` got {len(optimizers)}."
                " Use one optimizer with several parameter groups."
            )
        if optimizers and optimizers[0].state:
            raise ConfigError(
                f"With DeepSpeedStrategy an optimizer must make its state in its first step, but"
                f" {type(optimizers[0]).__name__} made it before. Use AdamW, SGD or another."
            )

    @override
    def user_module(self, engine: nn.Module) -> nn.Module:
        return cast(nn.Module, engine.module) if engine in self.engines else engine

    @override
    def local_parts(self, engine: nn.Module) -> Parts:
        return _zero.local_parts(self.user_module(engine))

    @override
    def hand_out(self, engine: nn.Module) -> None:
        pass

    @override
    def spread(self, engine: nn.Module) -> Spread:
        mesh = {"data": self.world.size}
        name = type(self.user_module(engine)).__name__
        if engine not in self.engines:
            return Spread(mesh=mesh, wrapped=(Wrapped(how="replica", what=f"{name}, without an optimizer"),))
        return Spread(mesh=mesh, wrapped=(Wrapped(how=f"ZeRO stage {self.config.stage}", what=name),))

    @override
    def autocast(self) -> AbstractContextManager[Any]:
        return _shared.autocast(self.world, self.precision)

    @override
    def forward(self, engine: nn.Module) -> Callable[..., Any]:
        if engine in self.engines and self.precision.mixed:
            return engine  # the engine enters autocast itself, and would leave one entered around it
        return _shared.in_precision(engine, self.world, self.precision)

    @override
    @contextmanager
    def region(self, engine: nn.Module, through_root: bool) -> Iterator[Finish]:
        with self.autocast():
            gathers = engine in self.engines and self.config.stage == 3 and not through_root
            yield _torch.enter_hooks_of(self.user_module(engine), "deepspeed") if gathers else _shared.unchanged

    @override
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        engine = self._one_engine() if engine is None else engine
        unknown = sorted(set(kwargs) - {"retain_graph"})
        if args or unknown:
            raise ConfigError(
                "With DeepSpeedStrategy `backward` must get nothing but the loss, `model` and `retain_graph`, but got"
                f" {', '.join(unknown) or f'{len(args)} more'}."
            )
        if self.config.stage < 3 and engine in self.unstepped:
            raise SetupOrderError(
                f"With ZeRO stage {self.config.stage} all but the last backward before a step must be inside"
                " `with fabric.no_backward_sync(model):`, but this one follows one that was not, and would replace its"
                " gradients. Wrap the earlier ones, or use stage 3."
            )
        cast(Any, engine).backward(loss, **kwargs)
        if self.config.stage < 3 and cast(Any, engine).is_gradient_accumulation_boundary():
            self.unstepped.add(engine)

    def _one_engine(self) -> nn.Module:
        engines = list(self.engines)
        if len(engines) != 1:
            raise SetupOrderError(
                f"With DeepSpeedStrategy `backward` must be told which of {len(engines)} modules the loss came from,"
                " but was not. Write fabric.backward(loss, model=model)."
            )
        return engines[0]

    @override
    def no_sync(self, engine: nn.Module) -> AbstractContextManager[None]:
        return _not_at_boundary(cast(Any, engine)) if engine in self.engines else nullcontext()

    @override
    def clip_grad_norm(
        self, engine: nn.Module, optimizer: Optimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        # Gradients carry the loss scale until the step; a norm that is not finite then is the scaler's to handle.
        scale = float(cast(Any, engine).optimizer.loss_scale)
        grads = _zero.local_grads(self._parameters(engine), self.config.stage)
        norm = _zero.total_norm([g / scale for _, g in grads], norm_type, self.world, self.config.stage)
        if error_if_nonfinite and self.precision.param_dtype != torch.float16:
            gradients.refuse_nonfinite(norm, norm_type)
        factor = min(1.0, max_norm / (norm.item() + 1e-6)) if math.isfinite(norm.item()) else 1.0
        if factor < 1.0:
            _zero.set_local_grads([(p, g * factor) for p, g in grads], self.config.stage)
        return norm

    @override
    def clip_grad_value(self, engine: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        bound = clip_value * float(cast(Any, engine).optimizer.loss_scale)
        grads = _zero.local_grads(self._parameters(engine), self.config.stage)
        _zero.set_local_grads([(p, g.clamp(-bound, bound)) for p, g in grads], self.config.stage)

    def _parameters(self, engine: nn.Module) -> Iterable[nn.Parameter]:
        return (p for p in self.user_module(engine).parameters() if p.requires_grad)

    @property
    @override
    def sharded_checkpoint(self) -> bool:
        return True

    @override
    def state_dict(self, engine: nn.Module) -> dict[str, Any]:
        return _zero_state.state_dict(self.user_module(engine))

    @override
    def layout(self, engine: nn.Module) -> dict[str, Any]:
        return _zero_state.layout(self.user_module(engine))

    @override
    def load_state_dict(self, engine: nn.Module, state: Mapping[str, Any]) -> None:
        _zero_state.load_state_dict(self.user_module(engine), state)

    @override
    def optimizer_state(self, engine: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        base = cast(EngineOptimizer, optimizer).base
        names, masters = self.group_names[engine], self._masters()
        return _zero_state.optimizer_state(self.user_module(engine), engine, base, names, masters)

    @override
    def optimizer_layout(self, engine: nn.Module, optimizer: Optimizer) -> OptimizerLayout:
        base = cast(EngineOptimizer, optimizer).base
        return _zero_state.optimizer_layout(self.user_module(engine), base, self.group_names[engine])

    @override
    def load_optimizer_state(self, engine: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        base = cast(EngineOptimizer, optimizer).base
        _zero_state.load_optimizer_state(self.user_module(engine), engine, base, self.group_names[engine], state)

    def _masters(self) -> bool:
        return self.precision.half

    @override
    def sampler_shard(self) -> tuple[int, int]:
        return self.world.size, self.world.rank


def _check_dtypes(module: nn.Module) -> None:
    """Raise for trainable parameters that DeepSpeed's float32 masters would round or cut."""
    for name, param in module.named_parameters():
        if param.requires_grad and param.dtype in (torch.float64, torch.complex64, torch.complex128, torch.complex32):
            raise ConfigError(
                f"With DeepSpeedStrategy trainable parameters must be of at most float32, but {name} is {param.dtype},"
                " which its float32 copy would not hold. Cast it, freeze it, or use another strategy."
            )


@contextmanager
def _not_at_boundary(engine: Any) -> Iterator[None]:
    before = engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(before)


def engine_config(config: DeepSpeedStrategy, precision: Precision, numel: int) -> dict[str, Any]:
    """DeepSpeed's JSON. Pure.

    True 16 bits become DeepSpeed's ``bf16``/``fp16``: parameters in 16 bits, float32 masters in the optimizer. Mixed
    becomes ``torch_autocast`` over float32 parameters, as under every other strategy, with gradients sent in float32.
    """
    zero: dict[str, Any] = {"stage": config.stage, "reduce_bucket_size": max(1, min(numel, ZERO_BUCKET))}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the script makes its own batches; DeepSpeed asks for a number
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the default is 1.0: every script would be clipped unasked
        "steps_per_print": 2**31,
    }
    match precision.name:
        case "bf16-true":
            document["bf16"] = {"enabled": True}
        case "16-true":
            document["fp16"] = {"enabled": True}
        case "bf16-mixed":
            document["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # else gradients of linear layers are summed in 16 bits
            }
    return document


def _forget_old_groups() -> None:
    """DeepSpeed 0.19 keeps its copy of the world's group for the life of the process, also when that group is gone."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is not None:
        try:
            torch.distributed.get_rank(groups._WORLD_GROUP)
        except ValueError:  # of a process group that was destroyed
            groups._WORLD_GROUP = None


def _import_deepspeed(world: World) -> Any:
    """Import deepspeed, quietly and for this device, on the process group that exists.

    Raises:
        ConfigError: it is not installed.
    """
    prepare_for_deepspeed(world.device.type, world.local_rank)
    logging.disable(logging.WARNING)  # it announces the accelerator that it was just told
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"strategy 'deepspeed' must find deepspeed, but: {error}. Run: pip install fabriclite[deepspeed]"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Two calls of DeepSpeed 0.19 that torch 2.13 renamed warn at every step.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)
    if world.device.type == "cpu":
        # Else init_distributed compiles a shared-memory all-reduce with the C++ compiler: 23 to 106 s.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _forget_old_groups()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed

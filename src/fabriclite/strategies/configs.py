"""What users write: one frozen, keyword-only value per strategy.

This file imports nothing heavy. ``build`` imports the running strategy, so that ``import fabriclite`` pays for none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypedDict, cast, final, get_args

import torch
from torch import nn

from fabriclite.errors import ConfigError
from fabriclite.layout import Group, Layout
from fabriclite.precision import NAMES, Precision, PrecisionName
from fabriclite.spelling import as_code
from fabriclite.strategy import StartMethod, Strategy
from fabriclite.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

WrapPredicate = Callable[[str, nn.Module], bool]
WrapPolicy = set[type[nn.Module]] | frozenset[type[nn.Module]] | WrapPredicate | None
ParallelizeFn = Callable[[nn.Module, "DeviceMesh"], nn.Module]
Plan = Mapping[str, "str | ParallelStyle"]


class _Dtypes(TypedDict):
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    grad_dtype: torch.dtype


ZERO_BUCKET: Final = 200_000_000
"""Elements of ZeRO's communication bucket at most; DeepSpeed's own default (5e8) takes 2 GB of float32."""
_ALL: Final[frozenset[PrecisionName]] = frozenset(NAMES)
DEFAULT_TIMEOUT: Final = timedelta(minutes=30)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SingleDeviceStrategy:
    """One process on one device (cpu, cuda, mps)."""

    precisions: ClassVar[frozenset[PrecisionName]] = _ALL
    distributed: ClassVar[bool] = False
    start_method: ClassVar[StartMethod] = "auto"
    process_group_backend: ClassVar[str | None] = None
    timeout: ClassVar[timedelta] = DEFAULT_TIMEOUT

    __repr__ = as_code

    def check_world(self, size: int) -> None:
        if size != 1:
            raise ConfigError(
                f"`devices` must be 1 with strategy 'single_device', but {size} processes were asked for."
                " Choose strategy='ddp' or 'fsdp' to use them all."
            )

    def layout(self, size: int, precision: Precision) -> Layout:
        return Layout(**_dtypes(precision))

    def split(self, module: nn.Module, size: int) -> nn.Module:
        """Splits no matrix products."""
        return module

    def build(self, *, world: World, precision: Precision) -> Strategy:
        from fabriclite.strategies.single import SingleDevice

        return SingleDevice.make(world, precision)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DDPStrategy:
    """Replicate the model and average the gradients (torch's ``DistributedDataParallel``).

    Attributes:
        find_unused_parameters: look for parameters that got no gradient, at some cost per step.
        static_graph: promise that every step uses the same parameters.
        gradient_as_bucket_view: let gradients live in the communication buckets (saves one copy of them).
        broadcast_buffers: send rank 0's buffers before each training forward.
        bucket_cap_mb: size of a communication bucket in MiB; ``None`` is torch's default.
        ddp_comm_hook: ``hook(state, bucket) -> Future[Tensor]`` that replaces the plain all-reduce.
        ddp_comm_state: first argument of the hook.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None`` chooses by device.
        timeout: how long a collective waits for the others.
        start_method: how to start the other processes when no launcher did.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    broadcast_buffers: bool = True
    bucket_cap_mb: int | None = None
    ddp_comm_hook: Callable[..., Any] | None = None
    ddp_comm_state: Any = None
    process_group_backend: str | None = None
    timeout: timedelta = DEFAULT_TIMEOUT
    start_method: StartMethod = "auto"

    precisions: ClassVar[frozenset[PrecisionName]] = _ALL
    distributed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_start_method(self.start_method)
        _check_timeout(self.timeout)
        _check_callable("ddp_comm_hook", self.ddp_comm_hook, "hook(state, bucket) -> Future[Tensor]")
        if self.bucket_cap_mb is not None and not _is_count(self.bucket_cap_mb):
            raise ConfigError(
                f"`bucket_cap_mb` must be None or a whole number of MiB of at least 1, but is {self.bucket_cap_mb!r}."
            )
        if self.ddp_comm_state is not None and self.ddp_comm_hook is None:
            raise ConfigError("`ddp_comm_state` must come with a `ddp_comm_hook`, but there is none. Give both.")
        if self.find_unused_parameters and self.static_graph:
            raise ConfigError(
                "`find_unused_parameters` and `static_graph` must not both be True, but are: a static graph finds"
                " unused parameters once by itself. Keep one."
            )

    __repr__ = as_code

    def check_world(self, size: int) -> None:
        """Any size."""

    def layout(self, size: int, precision: Precision) -> Layout:
        return Layout(
            replicate=size,
            bucket_bytes=(self.bucket_cap_mb or 25) * 2**20,
            gradients_in_buckets=self.gradient_as_bucket_view,
            **_dtypes(precision),
        )

    def split(self, module: nn.Module, size: int) -> nn.Module:
        """Splits no matrix products."""
        return module

    def build(self, *, world: World, precision: Precision) -> Strategy:
        from fabriclite.strategies.ddp import DDP

        return DDP.make(self, world, precision)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FSDPStrategy:
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2, ``fully_shard``).

    Attributes:
        auto_wrap_policy: what is gathered together. ``None`` finds the repeated block class of the model; a set of
            module classes; or ``predicate(name, module) -> bool``. What is left forms the root group.
        reshard_after_forward: free gathered parameters after forward and gather again in backward. ``None`` does so
            for every group but the root.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        device_mesh: ``(replicate, shard)`` sizes for hybrid sharding; ``None`` shards over all ranks.
        state_dict_type: what ``save`` writes: ``"sharded"`` (a folder) or ``"full"`` (one file).
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None`` chooses by device.
        timeout: how long a collective waits for the others.
        start_method: how to start the other processes when no launcher did.
    """

    auto_wrap_policy: WrapPolicy = None
    reshard_after_forward: bool | None = None
    cpu_offload: bool = False
    device_mesh: tuple[int, int] | None = None
    state_dict_type: Literal["sharded", "full"] = "sharded"
    process_group_backend: str | None = None
    timeout: timedelta = DEFAULT_TIMEOUT
    start_method: StartMethod = "auto"

    precisions: ClassVar[frozenset[PrecisionName]] = _ALL
    distributed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_start_method(self.start_method)
        _check_timeout(self.timeout)
        _check_wrap_policy(self.auto_wrap_policy)
        _check_choice("state_dict_type", self.state_dict_type, ("sharded", "full"))
        mesh: object = self.device_mesh
        if mesh is not None and not (isinstance(mesh, tuple | list) and len(mesh) == 2 and all(map(_is_count, mesh))):
            raise ConfigError(
                f"`device_mesh` must be two sizes (replicate, shard) of at least 1, but is {mesh!r}. Example: (2, 4)."
            )

    __repr__ = as_code

    def check_world(self, size: int) -> None:
        if self.device_mesh is not None and self.device_mesh[0] * self.device_mesh[1] != size:
            replicate, shard = self.device_mesh
            raise ConfigError(
                f"`device_mesh` must multiply to the world size {size}, but {replicate} x {shard} is"
                f" {replicate * shard}. Change `devices` or the sizes."
            )

    def layout(self, size: int, precision: Precision) -> Layout:
        replicate, shard = self.device_mesh or (1, size)
        return Layout(
            replicate=replicate,
            shard=shard,
            shards_parameters=True,
            shards_gradients=True,
            shards_optimizer=True,
            gathers=True,
            groups=_FSDPGroups(self.auto_wrap_policy, precision),
            reshard_after_forward=self.reshard_after_forward,
            parameters_on_host=self.cpu_offload,
            optimizer_on_host=self.cpu_offload,
            **_dtypes(precision),
        )

    def split(self, module: nn.Module, size: int) -> nn.Module:
        """Splits no matrix products."""
        return module

    def build(self, *, world: World, precision: Precision) -> Strategy:
        from fabriclite.strategies.fsdp import FSDP

        return FSDP.make(self, world, precision)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParallelStrategy:
    """Split single matrix products over the ranks (tensor parallel, DTensor), and shard the rest over data parallel.

    Attributes:
        plan: ``{name pattern: style}``. ``*`` stands for one part of a dotted name; a style is a torch
            ``ParallelStyle`` or one of ``"colwise"``, ``"rowwise"``, ``"colwise_gather_output"``,
            ``"rowwise_split_input"``, ``"sequence_parallel"``. ``None`` takes the ``_tp_plan`` that the model carries.
        parallelize_fn: ``fn(module, mesh) -> module`` instead of a plan; the mesh has the axes ``"data_parallel"`` and
            ``"tensor_parallel"``. It may shard over data parallel itself (``fully_shard``); else that is done here.
        tensor_parallel_size: ranks that share one product. ``"auto"`` is 2, the smallest split (1 in a world of one);
            the rest of the world is data parallel.
        data_parallel_size: copies of that; ``"auto"`` is the rest of the world.
        auto_wrap_policy, reshard_after_forward: of the data-parallel axis, as for :class:`FSDPStrategy`.
        save_distributed_checkpoint: ``save`` writes a folder of shards (else one file).
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None`` chooses by device.
        timeout: how long a collective waits for the others.
        start_method: how to start the other processes when no launcher did.
    """

    parallelize_fn: ParallelizeFn | None = None
    plan: Plan | None = None
    data_parallel_size: int | Literal["auto"] = "auto"
    tensor_parallel_size: int | Literal["auto"] = "auto"
    auto_wrap_policy: WrapPolicy = None
    reshard_after_forward: bool | None = None
    save_distributed_checkpoint: bool = True
    process_group_backend: str | None = None
    timeout: timedelta = DEFAULT_TIMEOUT
    start_method: StartMethod = "auto"

    precisions: ClassVar[frozenset[PrecisionName]] = _ALL
    distributed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_start_method(self.start_method)
        _check_timeout(self.timeout)
        _check_wrap_policy(self.auto_wrap_policy)
        _check_callable("parallelize_fn", self.parallelize_fn, "fn(module, mesh) -> module")
        if self.plan is not None and self.parallelize_fn is not None:
            raise ConfigError("`plan` and `parallelize_fn` must not both be given, but are: each says all. Keep one.")
        if self.plan is not None and not isinstance(self.plan, Mapping):
            raise ConfigError(
                f"`plan` must map name patterns to styles, but is {self.plan!r}."
                " Example: {'blocks.*.fc1': 'colwise'}."
            )
        if self.plan is not None and not self.plan:
            raise ConfigError(
                "`plan` must name at least one module, but is empty. Example: {'blocks.*.fc1': 'colwise'}."
            )
        for name in ("data_parallel_size", "tensor_parallel_size"):
            size = getattr(self, name)
            if size != "auto" and not _is_count(size):
                raise ConfigError(f"`{name}` must be 'auto' or a whole number of at least 1, but is {size!r}.")

    def sizes(self, world_size: int) -> tuple[int, int]:
        """``(data_parallel, tensor_parallel)`` for a world.

        Raises:
            ConfigError: they do not multiply to ``world_size``.
        """
        given = None if self.data_parallel_size == "auto" else self.data_parallel_size
        if self.tensor_parallel_size != "auto":
            tensor = self.tensor_parallel_size
        else:
            tensor = min(2, world_size) if given is None else max(1, world_size // given)
        data = max(1, world_size // tensor) if given is None else given
        if data * tensor != world_size:
            raise ConfigError(
                f"`data_parallel_size` x `tensor_parallel_size` must be the world size {world_size}, but"
                f" {self.data_parallel_size!r} x {self.tensor_parallel_size!r} gives {data} x {tensor}."
                " Set both sizes ('auto' splits over 2), or change `devices`."
            )
        return data, tensor

    __repr__ = as_code

    def check_world(self, size: int) -> None:
        self.sizes(size)

    def layout(self, size: int, precision: Precision) -> Layout:
        data, tensor = self.sizes(size)
        return Layout(
            shard=data,
            tensor=tensor,
            shards_parameters=data > 1,
            shards_gradients=data > 1,
            shards_optimizer=data > 1,
            gathers=data > 1,
            groups=_FSDPGroups(self.auto_wrap_policy, precision) if data > 1 else None,
            reshard_after_forward=self.reshard_after_forward,
            **_dtypes(precision),
        )

    def split(self, module: nn.Module, size: int) -> nn.Module:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        from fabriclite.strategies.tensor_parallel import split

        first = dist.get_rank()
        ranks = torch.arange(first, first + size).unsqueeze(0)
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("data_parallel", "tensor_parallel"))
        return split(self, module, mesh)[0]

    def build(self, *, world: World, precision: Precision) -> Strategy:
        from fabriclite.strategies.tensor_parallel import TensorParallel

        return TensorParallel.make(self, world, precision)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedStrategy:
    """ZeRO, by DeepSpeed. Model and optimizer are set up together: ``fabric.setup(model, optimizer)``.

    Attributes:
        stage: 1 shards optimizer state, 2 also gradients, 3 also parameters.
        offload_optimizer: keep optimizer state in host memory.
        offload_parameters: keep parameters in host memory (stage 3).
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None`` chooses by device.
        timeout: how long a collective waits for the others.
        start_method: how to start the other processes when no launcher did.
    """

    stage: Literal[1, 2, 3] = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False
    process_group_backend: str | None = None
    timeout: timedelta = DEFAULT_TIMEOUT
    start_method: StartMethod = "auto"

    # DeepSpeed's engine knows no float64; its float16 keeps float16-rounded masters, so no "16-mixed" either.
    precisions: ClassVar[frozenset[PrecisionName]] = frozenset({"32-true", "bf16-true", "16-true", "bf16-mixed"})
    distributed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_start_method(self.start_method)
        _check_timeout(self.timeout)
        _check_choice("stage", self.stage, (1, 2, 3))
        if self.offload_parameters and self.stage != 3:
            raise ConfigError(
                f"`offload_parameters` must come with stage 3, but stage is {self.stage}:"
                " only stage 3 shards parameters. Use stage=3 or offload_optimizer=True."
            )

    __repr__ = as_code

    def check_world(self, size: int) -> None:
        """Any size."""

    def layout(self, size: int, precision: Precision) -> Layout:
        return Layout(
            shard=size,
            shards_parameters=self.stage == 3,
            shards_gradients=self.stage >= 2,
            shards_optimizer=True,
            gathers=self.stage == 3,
            flat=True,
            # DeepSpeed's own defaults, which the engine's JSON leaves as they are
            persistent_numel=100_000,
            ahead_numel=50_000_000,
            reuse_numel=1_000_000_000,
            live_numel=1_000_000_000,
            flat_numel=1_000_000_000,
            bucket_numel=ZERO_BUCKET,
            master=True,  # also of float32 parameters
            parameters_on_host=self.offload_parameters,
            optimizer_on_host=self.offload_optimizer,
            param_dtype=precision.param_dtype,
            compute_dtype=precision.param_dtype,  # mixed precision is autocast over float32 parameters
            reduce_dtype=precision.reduce_dtype,
            grad_dtype=precision.param_dtype,
        )

    def split(self, module: nn.Module, size: int) -> nn.Module:
        """Splits no matrix products."""
        return module

    def build(self, *, world: World, precision: Precision) -> Strategy:
        from fabriclite.strategies.deepspeed import DeepSpeed

        return DeepSpeed.make(self, world, precision)


@dataclass(frozen=True, slots=True)
class _FSDPGroups:
    """Which parameters FSDP gathers together."""

    policy: WrapPolicy
    precision: Precision

    def __call__(self, module: nn.Module) -> tuple[Group, ...]:
        from fabriclite.strategies._fully_shard import groups

        return groups(module, self.precision, self.policy)


def _dtypes(precision: Precision) -> "_Dtypes":
    return {
        "param_dtype": precision.param_dtype,
        "compute_dtype": precision.compute_dtype,
        "reduce_dtype": precision.reduce_dtype,
        "grad_dtype": precision.param_dtype,
    }


def _check_start_method(value: str) -> None:
    _check_choice("start_method", value, get_args(StartMethod))


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in known:
        raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, known))}, but is {value!r}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_callable(name: str, value: object, form: str) -> None:
    if value is not None and not callable(value):
        raise ConfigError(f"`{name}` must be None or callable as {form}, but is {value!r}.")


def _check_timeout(value: object) -> None:
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise ConfigError(f"`timeout` must be a positive datetime.timedelta, but is {value!r}.")


def _check_wrap_policy(policy: object) -> None:
    if policy is None or (callable(policy) and not isinstance(policy, type)):
        return
    if isinstance(policy, set | frozenset) and policy:
        items = cast("set[object]", policy)
        if all(isinstance(item, type) and issubclass(item, nn.Module) for item in items):
            return
    raise ConfigError(
        "`auto_wrap_policy` must be None, a non-empty set of nn.Module classes or a predicate (name, module) -> bool,"
        f" but is {policy!r}."
    )

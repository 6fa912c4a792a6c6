"""``fully_shard`` as FSDP and two-dimensional tensor parallel use it."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from fabriclite import _torch
from fabriclite.precision import Precision
from fabriclite.strategies.configs import WrapPolicy
from fabriclite.strategies.wrapping import wrap_units
from fabriclite.strategy import Finish


def apply(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: Precision,
    policy: WrapPolicy,
    reshard_after_forward: bool | None,
    cpu_offload: bool,
) -> None:
    """Shard ``module`` in place, one group after the other, the root last. Every rank must call this.

    Parameters without memory are sharded as well; give them memory, then call :func:`make_root`.
    """
    mixed = mixed_precision(precision)
    # Pinned memory needs an accelerator to copy to.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    if precision.mixed:
        for norm in [sub for sub in module.modules() if isinstance(sub, nn.modules.batchnorm._BatchNorm)]:
            # Its running statistics are float32, and torch's kernel takes parameters of their dtype only.
            fully_shard(norm, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=offload)
    for name in wrap_units(module, policy):
        unit = module.get_submodule(name)
        if not isinstance(unit, FSDPModule):
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=mixed, offload_policy=offload
            )
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=mixed, offload_policy=offload)


def make_root(module: nn.Module) -> None:
    """Settle that ``module`` is the root. Afterwards its parameters' memory may not be exchanged."""
    _torch.fsdp_make_root(module)


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP2's words for a precision.

    Mixed: parameters are gathered in 16 bits and gradients reduced in float32. Inputs are never cast: forward runs
    under autocast as under every other strategy, which casts where it must and leaves, say, float32 positions alone.
    """
    if not precision.mixed:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=precision.compute_dtype, reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False
    )


def show_shards(module: nn.Module) -> None:
    """Put shards back in place of gathered parameters.

    The root stays gathered after a forward without backward, and ``parameters()`` would then give an optimizer tensors
    that never reach the shards (torch 2.11 to 2.13).
    """
    for sub in module.modules():
        if isinstance(sub, FSDPModule):
            sub.reshard()


def enter(module: nn.Module) -> Finish:
    """Gather what a method of the root needs; the result undoes it."""
    assert isinstance(module, FSDPModule)
    return _torch.fsdp_enter(module)


@contextmanager
def no_sync(module: nn.Module, paused: "WeakSet[nn.Module]") -> Iterator[None]:
    """Keep gradients unreduced within it, then restore what was before.

    Args:
        module: a root that was sharded.
        paused: modules that are inside such a context; FSDP2 has a setter for this and no getter.
    """
    assert isinstance(module, FSDPModule)
    if module in paused:
        yield
        return
    paused.add(module)
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        paused.discard(module)
        module.set_requires_gradient_sync(True)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied anywhere in ``module``."""
    return any(isinstance(sub, FSDPModule) for sub in module.modules())


def is_root(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to ``module`` itself."""
    return isinstance(module, FSDPModule)

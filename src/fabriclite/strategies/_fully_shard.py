"""``fully_shard`` as FSDP and two-dimensional tensor parallel use it."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from fabriclite import _torch
from fabriclite.birth.births import has_memory
from fabriclite.layout import Group
from fabriclite.precision import Precision
from fabriclite.spelling import class_name
from fabriclite.spread import Wrapped
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
    # Pinned memory needs an accelerator to copy to.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    alone = set(scalars(module))
    shard = partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        offload_policy=offload,
        ignored_params=alone,
    )
    _lay_out_in_rows(module)
    for param in alone:
        if has_memory(param):
            param.data = param.data.to(mesh.device_type)
    mixed = mixed_precision(precision)
    if precision.mixed:
        for norm in [sub for sub in module.modules() if isinstance(sub, nn.modules.batchnorm._BatchNorm)]:
            shard(norm)  # its running statistics are float32, and torch's kernel takes parameters of their dtype only
    for sub in _of_other_dtype(module, alone):
        if not isinstance(sub, FSDPModule):
            shard(sub, mp_policy=mixed)  # a group is gathered as one tensor of one dtype
    for name in wrap_units(module, policy):
        unit = module.get_submodule(name)
        if not isinstance(unit, FSDPModule):
            shard(unit, mp_policy=mixed)
    shard(module, mp_policy=mixed)


def groups(module: nn.Module, precision: Precision, policy: WrapPolicy) -> tuple[Group, ...]:
    """What :func:`apply` would make of ``module``, in its order: innermost first, the root last. Pure."""
    alone = set(scalars(module))
    compute = precision.compute_dtype if precision.mixed else None
    names = {sub: name for name, sub in module.named_modules()}
    dtypes: dict[str, torch.dtype | None] = {}
    if precision.mixed:
        dtypes |= {name: None for sub, name in names.items() if _torch.is_batch_norm(sub)}
    for name in (*(names[sub] for sub in _of_other_dtype(module, alone)), *wrap_units(module, policy), ""):
        dtypes.setdefault(name, compute)
    taken, found = {id(param) for param in alone}, []
    named = {id(param): name for name, param in reversed(list(module.named_parameters(remove_duplicate=False)))}
    for unit, dtype in dtypes.items():
        own = [param for param in module.get_submodule(unit).parameters() if id(param) not in taken]
        taken |= {id(param) for param in own}
        if own or not unit:
            found.append(Group(unit, tuple(named[id(param)] for param in own), dtype))
    return tuple(found)


def scalars(module: nn.Module) -> list[nn.Parameter]:
    """Parameters without dimensions, which cannot be cut: every rank keeps them whole."""
    return [p for p in module.parameters() if p.dim() == 0 and not isinstance(p, DTensor)]


def _lay_out_in_rows(module: nn.Module) -> None:
    """Parameters are cut along their first dimension, which ``fully_shard`` wants to be the outermost in memory too."""
    for param in module.parameters():
        if not isinstance(param, DTensor) and not param.is_contiguous():
            if has_memory(param):
                param.data = param.data.contiguous()
            else:  # only the layout: its values are written later
                _torch.become(param, torch.empty(param.shape, dtype=param.dtype, device=param.device))


def _of_other_dtype(module: nn.Module, alone: set[nn.Parameter]) -> list[nn.Module]:
    """Submodules whose own parameters are of one dtype, other than that of most."""
    sizes: Counter[torch.dtype] = Counter()
    for param in module.parameters():
        sizes[param.dtype] += param.numel()
    own = {
        sub: {p.dtype for p in sub.parameters(recurse=False) if p not in alone}
        for sub in module.modules()
        if sub is not module
    }
    return [sub for sub, dtypes in own.items() if len(dtypes) == 1 and dtypes != {sizes.most_common(1)[0][0]}]


def make_root(module: nn.Module, mesh: DeviceMesh, paused: "WeakSet[nn.Module]") -> None:
    """Settle that ``module`` is the root. Afterwards its parameters' memory may not be exchanged.

    Args:
        module: what :func:`apply` sharded.
        mesh: as there.
        paused: see :func:`no_sync`.
    """
    for param in scalars(module):
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(_Average(mesh, module, paused))  # type: ignore[no-untyped-call]
    _torch.fsdp_make_root(module)


class _Average:
    """Makes the gradient of a parameter that every rank holds whole the mean over the mesh, as FSDP does for others.

    A gradient that was averaged before, and to which a rank then added, comes out right too: the mean of equals is
    themselves.
    """

    def __init__(self, mesh: DeviceMesh, root: nn.Module, paused: "WeakSet[nn.Module]") -> None:
        self._mesh = mesh
        self._root = weakref.ref(root)
        self._paused = paused

    def __call__(self, param: Tensor) -> None:
        if self._root() in self._paused or param.grad is None:
            return
        for group in self._mesh.get_all_groups():
            dist.all_reduce(param.grad, group=group)
        param.grad /= self._mesh.size()


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


def wrapped(module: nn.Module) -> tuple[Wrapped, ...]:
    """What is gathered together: by class, and the root last."""
    inner = Counter(class_name(sub) for sub in module.modules() if isinstance(sub, FSDPModule) and sub is not module)
    found = [Wrapped(how="FSDP", what=name, count=count) for name, count in inner.items()]
    root = [Wrapped(how="FSDP root", what=class_name(module))] if is_root(module) else []
    return (*found, *root)

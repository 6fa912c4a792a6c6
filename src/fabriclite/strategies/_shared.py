"""What more than one strategy needs: functions, not a base class."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabriclite import _torch, gradients, optim, shards
from fabriclite.birth.births import Births, has_memory
from fabriclite.birth.places import named_tensors
from fabriclite.birth.verify import Parts
from fabriclite.collectives import broadcast_tensor_, gather_objects
from fabriclite.errors import MaterializeError
from fabriclite.precision import Precision
from fabriclite.strategy import Finish, Strategy
from fabriclite.world import World


def autocast(world: World, precision: Precision) -> AbstractContextManager[Any]:
    """Mixed precision computes matrix products in 16 bits; every other precision changes nothing."""
    if not precision.mixed:
        return nullcontext()
    return torch.autocast(world.device.type, precision.compute_dtype)


def in_precision(run: Callable[..., Any], world: World, precision: Precision) -> Callable[..., Any]:
    """``run`` as the precision wants it called.

    True 32 and 64 bits: unchanged, at no cost. Mixed: under autocast, inputs as they are. True 16 bits: float32 inputs
    are cast to the parameters' dtype, since torch cannot mix the two; other inputs and all outputs stay as they are.
    """
    if precision.mixed:

        def mixed(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(world.device.type, precision.compute_dtype):
                return run(*args, **kwargs)

        return mixed
    if precision.half:

        def half(*args: Any, **kwargs: Any) -> Any:
            if not kwargs and all(type(arg) is Tensor for arg in args):  # walking a tree costs 12 us
                return run(*[_to_half(arg, precision.param_dtype) for arg in args])
            args, kwargs = _torch.tree_map(lambda leaf: _to_half(leaf, precision.param_dtype), (args, kwargs))
            return run(*args, **kwargs)

        return half
    return run


def _to_half(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


@contextmanager
def autocast_region(world: World, precision: Precision) -> Iterator[Finish]:
    """A region that needs nothing but autocast."""
    with autocast(world, precision):
        yield unchanged


def unchanged(output: Any) -> Any:
    return output


def make_scaler(world: World, precision: Precision) -> GradScaler:
    """A loss scaler that is off unless the precision needs one, and agrees with all ranks where there are several."""

    def agree(found: Tensor) -> None:
        if world.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)

    return _torch.LocalGradScaler(world.device.type, enabled=precision.needs_scaler, agree=agree, local=shards.local)


def local_parts(module: nn.Module) -> Parts:
    """This rank's part of every tensor of ``module``, and which part it is."""
    return {
        name: (shards.local(t), shards.box(t) if isinstance(t, DTensor) else None)
        for name, t in named_tensors(module)
        if not isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer)
    }


def clip_norm(
    strategy: Strategy, optimizer: Optimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Unscale, then clip the gradients that ``optimizer`` steps, on any mesh.

    Under a loss scaler a norm that is not finite is no error: the scaler skips that step and lowers its scale.
    """
    unscale(strategy, optimizer)
    error_if_nonfinite = error_if_nonfinite and not strategy.scaler.is_enabled()
    params = optim.params_of(optimizer)
    return gradients.clip_by_norm(params, max_norm, norm_type, error_if_nonfinite, strategy.world.device)


def clip_value(strategy: Strategy, optimizer: Optimizer, value: float) -> None:
    """Unscale, then clamp the gradients that ``optimizer`` steps."""
    unscale(strategy, optimizer)
    gradients.clip_by_value(optim.params_of(optimizer), value)


def unscale(strategy: Strategy, optimizer: Optimizer) -> None:
    if strategy.scaler.is_enabled():
        strategy.scaler.unscale_(optimizer)


def axes(mesh: DeviceMesh) -> dict[str, int]:
    """Axis to size, outermost first."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def fill(births: Births, world: World) -> None:
    """Give a recorded module memory and the same values on all ranks. Every rank must call this."""
    fill_agreed(births, world, agree(births, world))


def agree(births: Births, world: World) -> bool:
    """Whether all ranks would work out the same values. Every rank must call this, before it shards.

    Raises:
        MaterializeError: the ranks recorded different models.
    """
    if world.size == 1:
        return True
    with births.clock.phase("agree"):
        digests = gather_objects(world, (births.outline(), births.fingerprint()))
    odd = [rank for rank, (outline, _) in enumerate(digests) if outline != digests[0][0]]
    if odd:
        raise MaterializeError(
            f"All ranks must build the same model, but rank {odd[0]} built one with other names, shapes or ties than"
            " rank 0. Let no part of the model's code depend on the rank."
        )
    return len(set(digests)) == 1


def fill_agreed(births: Births, world: World, same: bool, shards_on: torch.device | None = None) -> None:
    """Give a recorded module memory and values. Every rank must call this.

    Args:
        births: what it needs.
        world: the processes.
        same: what :func:`agree` said; if not, rank 0's values are sent, one storage at a time.
        shards_on: where sharded parts shall be, if not where they were recorded.
    """

    def send(raw: Tensor) -> None:
        broadcast_tensor_(world, raw)

    births.fill(shards_on=shards_on, send=None if same else send, first=world.rank == 0)


@torch.no_grad()
def same_on_all_ranks(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's values, one tensor at a time. Every rank must call this.

    Ranks that were seeded alike already agree; those that were not would otherwise each keep a piece of another model.
    """
    if world.size == 1:
        return
    done: set[int] = set()
    for _, tensor in named_tensors(module):
        if id(tensor) not in done and has_memory(tensor):
            done.add(id(tensor))
            broadcast_tensor_(world, tensor.data)

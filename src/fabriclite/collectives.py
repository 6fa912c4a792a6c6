"""Collective operations as free functions of a ``World`` and a value. Every rank must call each of them.

A world of one needs no process group: each function then returns what went in (``all_gather`` with the leading world
dimension it always adds). What ``all_reduce`` and ``all_gather`` return shares no memory with their input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fabriclite._torch import tree_map
from fabriclite.errors import ConfigError
from fabriclite.world import World

T = TypeVar("T")

_OPS: Final = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,  # divided here: integers and gloo have no AVG
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_MEANS: Final = ("mean", "avg")
_SENT_AS: Final = {torch.int16: torch.int32, torch.uint16: torch.int32, torch.uint32: torch.int64}
"""What neither gloo nor NCCL knows, and what holds it."""


def barrier(world: World) -> None:
    """Wait until every rank has come here."""
    if world.size > 1:
        if world.device.type == "cuda":
            dist.barrier(device_ids=[world.device.index])
        else:
            dist.barrier()


def broadcast(world: World, obj: T, src: int = 0, group: Any = None) -> T:
    """Every rank gets ``obj`` of rank ``src``: a tensor, or anything that can be pickled.

    ``group``: another group of all ranks; the default is the process's.

    Raises:
        ConfigError: ``src`` is no rank of the world.
    """
    if not isinstance(src, int) or not 0 <= src < world.size:
        raise ConfigError(f"`src` must be a rank in [0, {world.size}), but is {src!r}.")
    if world.size == 1:
        return obj
    # A device tensor would come back on the sender's device index, on every rank.
    box: list[Any] = [tree_map(_Travelling.of, obj) if world.rank == src else None]
    dist.broadcast_object_list(box, src=src, group=group, device=torch.device("cpu"))
    return tree_map(lambda leaf: leaf.arrive(world) if isinstance(leaf, _Travelling) else leaf, box[0])  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Travelling:
    """A tensor of a device, on its way to the device of another rank."""

    tensor: Tensor

    @staticmethod
    def of(leaf: Any) -> Any:
        on_device = isinstance(leaf, Tensor) and leaf.device.type not in ("cpu", "meta")
        return _Travelling(leaf.detach().cpu()) if on_device else leaf

    def arrive(self, world: World) -> Tensor:
        return self.tensor.to(world.device)


def broadcast_tensor_(world: World, tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` (any shape and dtype, contiguous or not) with the one of rank ``src``."""
    if world.size > 1:
        home = tensor.to(world.device).contiguous()
        dist.broadcast(home, src=src)
        if home is not tensor:
            tensor.copy_(home)
    return tensor


def all_reduce(world: World, data: T, reduce_op: str = "mean", group: Any = None) -> T:
    """Reduce every tensor or number in ``data`` over the ranks.

    Args:
        world: the processes.
        data: a tensor, a number, or a tree (dict, list, tuple) of them. Numbers become tensors: integers 64-bit, floats
            float64, so that nothing overflows or is rounded. Tensors keep their dtype, but means of integers are
            float64, and sums of booleans 64-bit counts. The inputs stay as they are.
        reduce_op: ``"mean"``, ``"sum"``, ``"max"``, ``"min"`` or ``"product"``.
        group: a process group; the default is all ranks.

    Raises:
        ConfigError: ``reduce_op`` is unknown.
    """
    name = str(reduce_op).lower().rpartition(".")[2]  # also "RedOpType.SUM" and "ReduceOp.SUM"
    if name not in _OPS:
        raise ConfigError(f"`reduce_op` must be one of {', '.join(_OPS)}, but is {reduce_op!r}.")
    return tree_map(lambda leaf: _reduce_leaf(world, leaf, name, group), data)  # type: ignore[no-any-return]


def _reduce_leaf(world: World, leaf: Any, name: str, group: Any) -> Any:
    tensor = _tensor(leaf, world)
    if tensor is None:
        return leaf
    size = 1 if world.size == 1 else dist.get_world_size(group)
    home = tensor.detach().to(world.device, _carrier(tensor.dtype, name), copy=True)
    if size > 1:
        dist.all_reduce(home, op=_OPS[name], group=group)
    if name in _MEANS:
        if not (home.is_floating_point() or home.is_complex()):
            return (home.to(_widest_float(world)) / size).to(tensor.device)
        home = home / size
    counted = name == "sum" and tensor.dtype == torch.bool
    return home.to(tensor.device, home.dtype if counted else tensor.dtype)


def _carrier(dtype: torch.dtype, name: str) -> torch.dtype:
    """In which dtype ranks add up: means neither overflow nor round on the way, and booleans are counted."""
    if name in _MEANS and dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    if name in _MEANS and not (dtype.is_floating_point or dtype.is_complex):
        return torch.int64
    if name == "sum" and dtype == torch.bool:
        return torch.int64
    return _SENT_AS.get(dtype, dtype)


def all_gather(world: World, data: T, sync_grads: bool = False, group: Any = None) -> T:
    """Stack every tensor or number in ``data`` over the ranks.

    Args:
        world: the processes.
        data: a tensor of shape ``S`` (the same on every rank), a number, or a tree of them.
        sync_grads: let gradients flow back to the rank each slice came from (summed over ranks).
        group: a process group; the default is all ranks.

    Returns:
        The same tree with tensors of shape ``(world size, *S)``, also in a world of one.
    """
    return tree_map(lambda leaf: _gather_leaf(world, leaf, sync_grads, group), data)  # type: ignore[no-any-return]


def _gather_leaf(world: World, leaf: Any, sync_grads: bool, group: Any) -> Any:
    tensor = _tensor(leaf, world)
    if tensor is None:
        return leaf
    if world.size == 1:
        return torch.stack([tensor if sync_grads else tensor.detach()])  # a copy, as in larger worlds
    home = tensor.to(world.device, _SENT_AS.get(tensor.dtype, tensor.dtype)).contiguous()
    if sync_grads:
        from torch.distributed.nn.functional import all_gather as gather_with_grad  # only for those who need it

        pieces: Any = gather_with_grad(home, *([] if group is None else [group]))  # type: ignore[no-untyped-call]
        return torch.stack(list(pieces))
    slices = [torch.empty_like(home) for _ in range(dist.get_world_size(group))]
    dist.all_gather(slices, home.detach(), group=group)
    return torch.stack(slices).to(tensor.dtype)


def gather_objects(world: World, obj: T, group: Any = None) -> list[T]:
    """``obj`` of every rank, in rank order, on every rank. Anything that can be pickled. ``group``: of all ranks."""
    if world.size == 1:
        return [obj]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, obj, group=group)
    return box


def sum_on_host(world: World, values: Sequence[float]) -> list[float]:
    """The sums of a few numbers over the ranks, without the device: nothing that it is still computing is waited for.

    Where the process group sends nothing between hosts (``process_group_backend="nccl"``), they do go by the device.
    """
    if world.size == 1:
        return list(values)
    box = _on_host(world, values)
    dist.all_reduce(box)
    sums: list[float] = box.tolist()
    return sums


def gather_on_host(world: World, values: Sequence[float]) -> list[list[float]]:
    """As many numbers of every rank, in rank order; on the way of :func:`sum_on_host`."""
    if world.size == 1:
        return [list(values)]
    box = _on_host(world, values)
    boxes = [torch.empty_like(box) for _ in range(world.size)]
    dist.all_gather(boxes, box)
    return [each.tolist() for each in boxes]


def _on_host(world: World, values: Sequence[float]) -> Tensor:
    by_host = world.device.type != "cuda" or "cpu" in dist.get_backend_config()
    return torch.tensor(values, dtype=torch.float64, device="cpu" if by_host else world.device)


def _tensor(leaf: Any, world: World) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, bool | int):
        return torch.tensor(leaf, dtype=torch.int64, device=world.device)
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=_widest_float(world), device=world.device)
    return None


def _widest_float(world: World) -> torch.dtype:
    return torch.float32 if world.device.type == "mps" else torch.float64

"""Norms and clipping of gradients that may be plain, sharded, on one mesh or on several."""

from collections.abc import Callable, Iterable
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabriclite import _torch
from fabriclite.errors import NonFiniteGradientError
from fabriclite.shards import local

_TINY: Final = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm before dividing by it


def grads_of(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


@torch.no_grad()
def total_norm(grads: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients together, computed in float32 (float64 if they are). Every rank must call this.

    Gradients are grouped by the mesh axes that shard them; each group's local part is reduced over just those axes, so
    replicated ones count once on any mesh.

    Args:
        grads: plain tensors and ``DTensor``, on any meshes.
        norm_type: ``p`` of the norm, or ``inf``.
        device: where the result lives.

    Returns:
        A plain tensor of shape ``()``, equal on all ranks that hold the same model.
    """
    largest = norm_type == float("inf")
    total = torch.zeros((), device=device, dtype=torch.float32)
    for groups, items in _by_axes(grads).items():
        part = _local_part(items, norm_type, device)
        for group in groups:
            dist.all_reduce(part, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        total = torch.maximum(total, part) if largest else total + part
    return total if largest else total ** (1.0 / norm_type)


def _by_axes(grads: list[Tensor]) -> dict[tuple[dist.ProcessGroup, ...], list[Tensor]]:
    groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in grads:
        axes: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(grad, DTensor):
            mesh = grad.device_mesh
            axes = tuple(
                mesh.get_group(i) for i, p in enumerate(grad.placements) if not p.is_replicate() and mesh.size(i) > 1
            )
        groups.setdefault(axes, []).append(local(grad))
    return groups


def _local_part(items: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    wide = torch.float64 if any(g.dtype == torch.float64 for g in items) else torch.float32
    items = [g for g in items if g.numel()]
    norms: list[Tensor] = []
    _in_groups(items, lambda same: norms.extend(n.to(device) for n in _torch.foreach_norms(same, norm_type, wide)))
    if not norms:
        return torch.zeros((), device=device, dtype=wide)
    together = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    powered: Tensor = together if norm_type == float("inf") else together**norm_type
    return powered


@torch.no_grad()
def clip_by_norm(
    params: Iterable[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, device: torch.device
) -> Tensor:
    """Scale gradients so that their total norm is at most ``max_norm``. Every rank must call this.

    Returns:
        The norm before, of shape ``()``.

    Raises:
        NonFiniteGradientError: the norm is NaN or infinite and ``error_if_nonfinite``. Gradients stay as they are.
    """
    grads = grads_of(params)
    norm = total_norm(grads, norm_type, device)
    if error_if_nonfinite:
        refuse_nonfinite(norm, norm_type)
    scale = torch.clamp(max_norm / (norm + _TINY), max=1.0)
    _in_groups(grads, lambda items: _torch.foreach_mul_(items, scale.to(items[0].device)))
    return norm


def refuse_nonfinite(norm: Tensor, norm_type: float) -> None:
    """Raise if ``norm`` is NaN or infinite."""
    if not torch.isfinite(norm):
        raise NonFiniteGradientError(
            f"The gradients' {norm_type:g}-norm must be finite, but is {norm.item()}. Look for the first layer that"
            " overflows, lower the learning rate, or pass error_if_nonfinite=False to go on."
        )


@torch.no_grad()
def clip_by_value(params: Iterable[Tensor], clip_value: float) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, on this rank's part."""
    _in_groups(grads_of(params), lambda items: _torch.foreach_clamp_(items, -clip_value, clip_value))


def _in_groups(grads: list[Tensor], apply: Callable[[list[Tensor]], object]) -> None:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(local(grad))
    for items in groups.values():
        apply(items)

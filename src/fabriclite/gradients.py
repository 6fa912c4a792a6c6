"""Norms and clipping of gradients that may be plain, sharded, on one mesh or on several."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabriclite import _torch
from fabriclite.errors import NonFiniteGradientError
from fabriclite.shards import local

_TINY: Final = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm before dividing by it

Axes = tuple[dist.ProcessGroup, ...]
"""The process groups over which a gradient's local parts make up the whole; none for a plain or replicated one."""


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
    return _norm_of(_by_axes(grads), norm_type, device)


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
    groups = _by_axes(grads_of(params))
    norm = _norm_of(groups, norm_type, device)
    if error_if_nonfinite:
        refuse_nonfinite(norm, norm_type)
    scale = torch.clamp(max_norm / (norm + _TINY), max=1.0)
    for items in groups.values():
        for alike in _alike(items):
            _torch.foreach_mul_(alike, scale.to(alike[0].device))
    return norm


@torch.no_grad()
def clip_by_value(params: Iterable[Tensor], clip_value: float) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, on this rank's part."""
    for alike in _alike([local(grad) for grad in grads_of(params)]):
        _torch.foreach_clamp_(alike, -clip_value, clip_value)


def refuse_nonfinite(norm: Tensor, norm_type: float) -> None:
    """Raise if ``norm`` is NaN or infinite."""
    value = norm.item()
    if not math.isfinite(value):
        raise NonFiniteGradientError(
            f"The gradients' {norm_type:g}-norm must be finite, but is {value}. Look for the first layer that"
            " overflows, lower the learning rate, or pass error_if_nonfinite=False to go on."
        )


def _by_axes(grads: list[Tensor]) -> dict[Axes, list[Tensor]]:
    """Local parts, grouped by the axes that shard them."""
    groups: dict[Axes, list[Tensor]] = {}
    known: dict[Any, Axes] = {None: ()}  # asking a mesh for a group costs more than the norm of a small tensor
    for grad in grads:
        key = (id(grad.device_mesh), grad.placements) if isinstance(grad, DTensor) else None
        if key not in known and isinstance(grad, DTensor):
            mesh = grad.device_mesh
            cuts = [i for i, p in enumerate(grad.placements) if not p.is_replicate() and mesh.size(i) > 1]
            known[key] = tuple(mesh.get_group(i) for i in cuts)
        groups.setdefault(known[key], []).append(local(grad))
    return groups


def _norm_of(groups: dict[Axes, list[Tensor]], norm_type: float, device: torch.device) -> Tensor:
    wide = any(g.dtype == torch.float64 for items in groups.values() for g in items)
    dtype = torch.float64 if wide else torch.float32
    if groups.keys() <= {()}:
        return _local_norm(groups.get((), []), norm_type, dtype, device)
    largest = norm_type == math.inf
    parts: list[Tensor] = []
    for axes, items in groups.items():
        norm = _local_norm(items, norm_type, dtype, device)
        part = norm if largest else norm**norm_type
        for group in axes:
            dist.all_reduce(part, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        parts.append(part)
    return torch.stack(parts).amax() if largest else torch.stack(parts).sum().pow(1.0 / norm_type)


def _local_norm(items: list[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    norms: list[Tensor] = []
    for alike in _alike([g for g in items if g.numel()]):
        found = _torch.foreach_norms(alike, norm_type, dtype)
        norms += found if found[0].device == device else [n.to(device) for n in found]
    if not norms:
        return torch.zeros((), device=device, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def _alike(items: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device and dtype together: what one foreach call takes."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for item in items:
        groups.setdefault((item.device, item.dtype), []).append(item)
    yield from groups.values()

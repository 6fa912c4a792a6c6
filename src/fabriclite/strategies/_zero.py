"""ZeRO-3's partitions: how they are made, and gradients inside them. Only ``deepspeed.py`` uses it.

Stands on DeepSpeed's public ``safe_get_*`` and ``safe_set_*``.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabriclite import _torch
from fabriclite.birth import replay
from fabriclite.birth.births import Births
from fabriclite.birth.verify import Parts
from fabriclite.gradients import total_norm as local_norm
from fabriclite.strategies import _shared
from fabriclite.world import World

# -- birth ------------------------------------------------------------------------------------------------------------


def partition_all(module: nn.Module, births: Births, document: Mapping[str, Any]) -> None:
    """Make every parameter of ``module`` one of ZeRO-3: real ones cut, recorded ones with a part that is to be filled.

    ``deepspeed.zero.Init`` gives the parameters their methods. Its way to partition them wants each as a whole in
    memory and sends it from rank 0; so the part is made here, in the form in which DeepSpeed 0.18 and 0.19 leave it,
    and its ``partition`` finds nothing left to do but to let go of the whole.

    Args:
        module: real parameters are the same on all ranks.
        births: of the module.
        document: the engine's JSON; it says where parts live.
    """
    import deepspeed

    converter = deepspeed.zero.Init(config_dict_or_path=dict(document))
    available = deepspeed.runtime.zero.partition_parameters.PartitionedParamStatus.AVAILABLE
    for param in module.parameters():
        place, values = births.place_of(param), param.detach()
        if place is not None:
            nothing = torch.empty((), dtype=param.dtype, device=births.device_of(place))
            _torch.become(param, nothing.expand(param.shape))
        converter._convert_to_deepspeed_param(param)
        whole = cast(Any, param)
        size = converter._aligned_size(param)
        where = converter.local_device if whole.ds_persist else converter.remote_device
        part: Any = torch.empty(size // dist.get_world_size(), dtype=param.dtype, device=where)
        replay.poison(part.untyped_storage())
        if part.device.type == "cpu" and converter.pin_memory:
            part = part.pin_memory()
        part.ds_numel, part.status, part.final_location = part.numel(), available, None
        whole.ds_tensor, whole.ds_numel_aligned = part, size
        start = min(part.numel() * dist.get_rank(), whole.ds_numel)
        length = min(part.numel(), whole.ds_numel - start)
        part[length:].zero_()  # padding
        if place is None:
            part[:length].copy_(values.reshape(-1)[start : start + length])
        else:
            births.expect_flat(place, start, part[:length])
        whole.partition()


def local_parts(module: nn.Module) -> Parts:
    """This rank's part of every tensor: of a partitioned parameter a flat one, without its padding."""
    parts = dict(_shared.local_parts(module))
    for name, param in module.named_parameters(remove_duplicate=False):
        whole = cast(Any, param)
        if hasattr(param, "ds_id"):
            each = whole.ds_tensor.numel()
            start = min(each * dist.get_rank(), whole.ds_numel)
            length = min(each, whole.ds_numel - start)
            parts[name] = whole.ds_tensor[:length], ((start, length),)
    return parts


# -- gradients --------------------------------------------------------------------------------------------------------


def local_grads(params: Iterable[nn.Parameter], stage: int) -> list[tuple[nn.Parameter, Tensor]]:
    """Reduced gradients: stage 3 this rank's flat partition, below that the full ones. Every rank must call this."""
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    read = safe_get_local_grad if stage == 3 else safe_get_full_grad
    found = [(p, read(p)) for p in params]
    return [(p, g) for p, g in found if g is not None]


def set_local_grads(grads: Iterable[tuple[nn.Parameter, Tensor]], stage: int) -> None:
    """Put back what :func:`local_grads` gave, changed."""
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    write = safe_set_local_grad if stage == 3 else safe_set_full_grad
    for param, grad in grads:
        write(param, grad)


def total_norm(grads: list[Tensor], norm_type: float, world: World, stage: int) -> Tensor:
    """The norm of all gradients, of shape ``()``, equal on all ranks. Every rank must call this.

    Padding at the end of partitions is zero and adds nothing.
    """
    norm = local_norm(grads, norm_type, world.device)
    if stage < 3 or world.size == 1:
        return norm
    if norm_type == float("inf"):
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        return norm
    powered = norm**norm_type
    dist.all_reduce(powered)
    return powered ** (1.0 / norm_type)

"""Full tensors in and out of ZeRO's flat partitions, and gradients inside them.

Stands on DeepSpeed's public ``safe_get_*``, ``safe_set_*`` and ``GatheredParameters``. Only ``deepspeed.py`` uses it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite import _torch, optim_state
from fabriclite.birth import replay
from fabriclite.birth.births import Births
from fabriclite.birth.verify import Parts
from fabriclite.errors import CheckpointError
from fabriclite.gradients import total_norm as local_norm
from fabriclite.optim_state import MASTER
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


# -- module state -----------------------------------------------------------------------------------------------------


def _gathered(param: nn.Parameter, modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([param], modifier_rank=modifier_rank)


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The module's state with whole tensors on the host, one gathered at a time. Every rank must call this."""
    whole: dict[int, Tensor] = {}
    for param in module.parameters():
        with _gathered(param):
            whole[id(param)] = param.detach().to("cpu", copy=True)
    own = module.state_dict(keep_vars=True)
    return {
        name: whole[id(value)] if id(value) in whole else value.detach() if isinstance(value, Tensor) else value
        for name, value in own.items()
    }


def shapes(module: nn.Module) -> dict[str, Any]:
    """The module's state with stand-ins of full shape and no memory."""
    full = {id(p): torch.Size(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
    return {
        name: torch.empty(full.get(id(value), value.shape), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor)
        else value
        for name, value in module.state_dict(keep_vars=True).items()
    }


@torch.no_grad()
def load_full(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy full tensors into parameters, their float32 masters, and buffers. Every rank must call this."""
    own = module.state_dict(keep_vars=True)
    for name, value in state.items():
        target = own.get(name)
        prefix, _, last = name.rpartition(".")
        if name in own and last == "_extra_state":
            module.get_submodule(prefix).set_extra_state(value)
        elif isinstance(target, nn.Parameter):
            with _gathered(target, modifier_rank=0):
                target.copy_(value)
            _set_master(target, value)
        elif isinstance(target, Tensor):
            target.copy_(value)


def _set_master(param: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not param.requires_grad:
        return
    if hasattr(param, "ds_id"):
        safe_set_local_fp32_param(param, partition(param, value))
    else:
        safe_set_full_fp32_param(param, value.to(param.device, torch.float32))


def partition(param: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's flat part of ``whole``, float32, padded with zeros at the end (stage 3)."""
    size = cast(Any, param).ds_tensor.numel()
    start = size * dist.get_rank()
    flat = whole.detach().reshape(-1)
    mine = torch.zeros(size, dtype=torch.float32, device=cast(Any, param).ds_tensor.device)
    part = flat[start : start + size]
    mine[: part.numel()].copy_(part)
    return mine


# -- optimizer state --------------------------------------------------------------------------------------------------


def optimizer_state(module: nn.Module, base: Optimizer, group_names: list[list[str]], masters: bool) -> dict[str, Any]:
    """State by parameter name with whole tensors on the host. Every rank must call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    params = _stepped(module, group_names)
    _link(base, params, group_names)
    flat_keys, scalars = _keys(base)
    state: dict[str, dict[str, Any]] = {}
    for name, param in params.items():
        shape = _full_shapes({name: param})[name]
        values = {k: safe_get_full_optimizer_state(param, k).reshape(shape).cpu().clone() for k in flat_keys}
        values.update({k: _copy(v) for k, v in scalars.items()})
        if masters:
            values[MASTER] = safe_get_full_fp32_param(param).reshape(shape).cpu().clone()
        if values:  # nothing is invented before the first step
            state[name] = values
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": list(names)}
        for group, names in zip(base.param_groups, group_names, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def load_optimizer_state(
    module: nn.Module, engine: nn.Module, base: Optimizer, group_names: list[list[str]], saved: Mapping[str, Any]
) -> None:
    """Put back what :func:`optimizer_state`, or another strategy, gave. Every rank must call this.

    Raises:
        CheckpointError: the saved groups, names, keys or shapes are not those of such an optimizer.
    """
    saved = optim_state.match(base.param_groups, group_names, saved)
    params = _stepped(module, group_names)
    optim_state.check_moments(_full_shapes(params), {}, saved["state"])
    if all(set(values) <= {MASTER} for values in saved["state"].values()):
        base.state.clear()  # saved before its first step, or it keeps none
    elif not base.state:
        _make_room(engine, base, params, saved["state"])
    _link(base, params, group_names)
    flat_keys, _ = _keys(base)
    for name, values in saved["state"].items():
        if absent := [key for key in flat_keys if key not in values]:
            raise CheckpointError(f"The checkpoint must hold {absent[0]!r} of {name}, but does not: another optimizer.")
    for name, values in saved["state"].items():
        for key in flat_keys:
            _set_state(params[name], values[key], key)
        if MASTER in values:
            _set_master(params[name], values[MASTER])
    _set_scalars(base, flat_keys, saved["state"])
    for group, stored in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in stored.items() if k not in optim_state.HERE_ONLY})


def _stepped(module: nn.Module, group_names: list[list[str]]) -> dict[str, nn.Parameter]:
    """By name, the parameters that have moments: frozen ones may be listed in a group, and have none."""
    params = dict(module.named_parameters())
    return {name: params[name] for names in group_names for name in names if params[name].requires_grad}


def _full_shapes(params: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
    """Full shapes."""
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in params.items()}


def _link(base: Optimizer, params: Mapping[str, nn.Parameter], group_names: list[list[str]]) -> None:
    """Let parameters find their moments in the flat partitions (stages 1 and 2; stage 3 looks each time).

    DeepSpeed 0.19 links once, inside the first step of the first group: later groups, and state that came after, never.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, names in zip(base.param_groups, group_names, strict=True):
        linked = [params[n] for n in names if hasattr(params.get(n), "_hp_mapping")]
        for flat in group["params"]:
            if linked and flat in base.state:
                lazy_init_hp_params_optimizer_state(linked, flat, base.state)


def _set_scalars(base: Optimizer, flat_keys: list[str], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Step counters and the like, which all parameters of a partition share."""
    first: Mapping[str, Any] = next(iter(saved.values()), {})
    for own in base.state.values():
        for key in [k for k in own if k not in flat_keys and k in first]:
            own[key] = _copy(first[key])


def _set_state(param: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(param, "ds_id"):
        safe_set_local_optimizer_state(param, partition(param, value), key)
    else:
        safe_set_full_optimizer_state(param, value.to(param.device, torch.float32), key)


def _make_room(
    engine: nn.Module, base: Optimizer, params: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that never stepped the state tensors that its first step would, one per flat partition."""
    zero = cast(Any, engine).optimizer
    stage_3_flats = getattr(zero, "fp32_partitioned_groups_flat", None)
    flats = stage_3_flats if stage_3_flats is not None else [p for g in base.param_groups for p in g["params"]]
    name, values = next(iter(saved.items()))
    shape = _full_shapes(params)[name]
    for flat in flats:
        base.state[flat] = {
            key: torch.zeros_like(flat, requires_grad=False)
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0
            else _copy(value)
            for key, value in values.items()
            if key != MASTER
        }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _keys(base: Optimizer) -> tuple[list[str], dict[str, Any]]:
    """Names of the flat tensors in the optimizer's state, and its scalars, which all parameters share."""
    for flat, values in base.state.items():
        keys = [k for k, v in values.items() if isinstance(v, Tensor) and v.numel() == flat.numel() and v.dim() > 0]
        return keys, {k: v for k, v in values.items() if k not in keys}
    return [], {}

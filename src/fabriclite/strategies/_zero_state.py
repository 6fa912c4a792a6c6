"""State in and out of ZeRO's flat partitions, of each rank its own part. Only ``deepspeed.py`` uses it.

Stands on DeepSpeed's public ``safe_get_*``, ``safe_set_*`` and ``GatheredParameters``, and below stage 3 on the
fragments (``_hp_mapping``) behind them, which say where in a parameter this rank's part begins.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite import module_state, optim_state, shards
from fabriclite.errors import CheckpointError
from fabriclite.optim_state import MASTER
from fabriclite.stored import Stored
from fabriclite.stretch import Stretch

_SCALE: Final = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler."""

# -- module state -----------------------------------------------------------------------------------------------------


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The module's state: of a partitioned parameter this rank's part, else the live tensor."""
    return {
        name: _stretch(value) if hasattr(value, "ds_id") else value.detach() if isinstance(value, Tensor) else value
        for name, value in module.state_dict(keep_vars=True).items()
    }


def _stretch(param: nn.Parameter) -> Stretch:
    start, length = _part(param)
    return Stretch(_shape(param), start, cast(Any, param).ds_tensor[:length], partial(_gathered, param))


def _gathered(param: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().to("cpu", copy=True)


def _part(param: nn.Parameter) -> tuple[int, int]:
    """Start and length of this rank's part of a partitioned parameter, in row-major order; without padding."""
    whole = cast(Any, param)
    each = whole.ds_tensor.numel()
    start = min(each * dist.get_rank(), whole.ds_numel)
    return start, min(each, whole.ds_numel - start)


def _shape(param: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(param, "ds_shape", param.shape))


def layout(module: nn.Module) -> dict[str, Any]:
    """The module's state with stand-ins of full shape and no memory."""
    return {
        name: torch.empty(_shape(cast(nn.Parameter, value)), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor)
        else value
        for name, value in module.state_dict(keep_vars=True).items()
    }


@torch.no_grad()
def load_state_dict(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy this rank's part of full tensors into parameters and their float32 masters, and buffers."""
    own = module.state_dict(keep_vars=True)
    for name, value in state.items():
        target = own.get(name)
        if name in own and shards.is_extra(name):
            module.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        elif hasattr(target, "ds_id"):
            _put_partition(cast(nn.Parameter, target), value)
        elif isinstance(target, Tensor):
            module_state.put(target, value)
            if isinstance(target, nn.Parameter):
                _put_fragment(target, value, None)


def _put_partition(param: nn.Parameter, value: Tensor | Stored) -> None:
    """Stage 3: write the part and its master, and let go of the whole, which the next forward gathers again."""
    whole = cast(Any, param)
    values = _padded(param, value)
    whole.ds_tensor.copy_(values)
    if whole.ds_status == type(whole.ds_status).AVAILABLE:
        whole.partition()
    if param.requires_grad:
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(param, values)


def _padded(param: nn.Parameter, value: Tensor | Stored) -> Tensor:
    """This rank's part of ``value``, float32, padded with zeros at the end (stage 3)."""
    part = cast(Any, param).ds_tensor
    start, length = _part(param)
    values = torch.zeros(part.numel(), dtype=torch.float32, device=part.device)
    _read_flat(value, start, values[:length])
    return values


def _read_flat(value: Tensor | Stored, start: int, out: Tensor) -> None:
    if isinstance(value, Stored):
        value.read_flat(start, out)
    else:
        out.copy_(value.detach().reshape(-1)[start : start + out.numel()])


def _put_fragment(param: nn.Parameter, value: Tensor | Stored, key: str | None) -> None:
    """Stages 1 and 2: write this rank's part of a float32 master, or of the moment ``key``."""
    fragment = getattr(param, "_hp_mapping", None)
    if fragment is not None:
        place = fragment.lp_fragment_address
        _read_flat(value, place.start, fragment.get_hp_fragment(key)[: place.numel])


# -- optimizer state --------------------------------------------------------------------------------------------------


def optimizer_state(
    module: nn.Module, engine: nn.Module, base: Optimizer, group_names: list[list[str]], masters: bool
) -> dict[str, Any]:
    """State by parameter name, of each moment this rank's part; in float16 also the engine's loss scale."""
    params = _stepped(module, group_names)
    _link(base, params, group_names)
    flat_keys, scalars = _keys(base)
    state: dict[str, dict[str, Any]] = {}
    for name, param in params.items():
        values: dict[str, Any] = {key: _moment(param, key) for key in flat_keys}
        values.update({k: _copy(v) for k, v in scalars.items()})
        if masters:
            values[MASTER] = _moment(param, None)
        if values:  # nothing is invented before the first step
            state[name] = values
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": list(names)}
        for group, names in zip(base.param_groups, group_names, strict=True)
    ]
    scale = {} if (scaler := _dynamic_scaler(engine)) is None else {key: getattr(scaler, key) for key in _SCALE}
    return {"state": state, "param_groups": groups, **({"loss_scale": scale} if scale else {})}


def _dynamic_scaler(engine: nn.Module) -> Any:
    scaler = getattr(cast(Any, engine).optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _moment(param: nn.Parameter, key: str | None) -> Stretch:
    """This rank's part of a moment; with ``None`` of the float32 master."""
    gather = partial(_gathered_moment, param, key)
    if hasattr(param, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        start, length = _part(param)
        values = safe_get_local_fp32_param(param) if key is None else safe_get_local_optimizer_state(param, key)
        return Stretch(_shape(param), start, values.detach()[:length], gather)
    fragment = cast(Any, param)._hp_mapping
    if fragment is None:
        return Stretch(param.shape, 0, torch.empty(0, device=param.device), gather)
    place = fragment.lp_fragment_address
    return Stretch(param.shape, place.start, fragment.get_hp_fragment(key).detach()[: place.numel], gather)


def _gathered_moment(param: nn.Parameter, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = safe_get_full_fp32_param(param) if key is None else safe_get_full_optimizer_state(param, key)
    return cast(Tensor, whole.reshape(_shape(param)).to("cpu", copy=True))


def optimizer_layout(module: nn.Module, base: Optimizer, group_names: list[list[str]]) -> optim_state.OptimizerLayout:
    params = _stepped(module, group_names)
    return optim_state.OptimizerLayout(
        groups=base.param_groups,
        names=group_names,
        shapes={name: _shape(param) for name, param in params.items()},
        state={},
    )


def load_optimizer_state(
    module: nn.Module, engine: nn.Module, base: Optimizer, group_names: list[list[str]], saved: Mapping[str, Any]
) -> None:
    """Put back what :func:`optimizer_state`, or another strategy, gave, of each moment this rank's part.

    Raises:
        CheckpointError: a parameter lacks a moment that others have.
    """
    params = _stepped(module, group_names)
    if all(set(values) <= {MASTER} for values in saved["state"].values()):
        base.state.clear()  # saved before its first step, or it keeps none
    elif not base.state:
        _make_room(engine, base, params, saved["state"])
    _link(base, params, group_names)
    flat_keys, _ = _keys(base)
    _put_moments(params, flat_keys, saved["state"])
    _set_scalars(base, flat_keys, saved["state"])
    for group, stored in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in stored.items() if k not in optim_state.HERE_ONLY})
    if (scaler := _dynamic_scaler(engine)) is not None:
        vars(scaler).update({key: saved["loss_scale"][key] for key in _SCALE if key in saved.get("loss_scale", {})})


def _put_moments(
    params: Mapping[str, nn.Parameter], flat_keys: list[str], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, values in saved.items():
        if absent := [key for key in flat_keys if key not in values]:
            raise CheckpointError(f"The checkpoint must hold {absent[0]!r} of {name}, but does not: another optimizer.")
    for name, values in saved.items():
        for key in flat_keys:
            _put_moment(params[name], values[key], key)
        if MASTER in values:
            _put_moment(params[name], values[MASTER], None)


def _put_moment(param: nn.Parameter, value: Tensor | Stored, key: str | None) -> None:
    if not hasattr(param, "ds_id"):
        _put_fragment(param, value, key)
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if key is None:
        safe_set_local_fp32_param(param, _padded(param, value))
    else:
        safe_set_local_optimizer_state(param, _padded(param, value), key)


def _stepped(module: nn.Module, group_names: list[list[str]]) -> dict[str, nn.Parameter]:
    """By name, the parameters that have moments: frozen ones may be listed in a group, and have none."""
    params = dict(module.named_parameters())
    return {name: params[name] for names in group_names for name in names if params[name].requires_grad}


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


def _make_room(
    engine: nn.Module, base: Optimizer, params: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer that never stepped the state tensors that its first step would, one per flat partition."""
    zero = cast(Any, engine).optimizer
    stage_3_flats = getattr(zero, "fp32_partitioned_groups_flat", None)
    flats = stage_3_flats if stage_3_flats is not None else [p for g in base.param_groups for p in g["params"]]
    name, values = next(iter(saved.items()))
    shape = _shape(params[name])
    for flat in flats:
        base.state[flat] = {
            key: torch.zeros_like(flat, requires_grad=False)
            if isinstance(value, Tensor | Stored) and value.shape == shape and len(shape) > 0
            else _copy(value)
            for key, value in values.items()
            if key != MASTER
        }


def _copy(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.whole()
    return value.clone() if isinstance(value, Tensor) else value


def _keys(base: Optimizer) -> tuple[list[str], dict[str, Any]]:
    """Names of the flat tensors in the optimizer's state, and its scalars, which all parameters share."""
    for flat, values in base.state.items():
        keys = [k for k, v in values.items() if isinstance(v, Tensor) and v.numel() == flat.numel() and v.dim() > 0]
        return keys, {k: v for k, v in values.items() if k not in keys}
    return [], {}

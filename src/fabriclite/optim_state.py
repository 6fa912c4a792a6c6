"""An optimizer's state by parameter *name*, so that it fits any strategy and any number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite.errors import CheckpointError, SetupOrderError
from fabriclite.optim import params_of
from fabriclite.shards import write
from fabriclite.stored import Stored

MASTER: Final = "fp32_master"
"""Key of a float32 master weight among a parameter's state: of ZeRO's engines, which keep one beside 16 bits."""

HERE_ONLY: Final = frozenset({"params", "foreach", "fused"})
"""Of a group, what is not taken from a checkpoint: it depends on where the parameters lie."""

_LIKE_PARAM: Final = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum"}
)
"""Moments of torch's optimizers with one number for each of the parameter's. Others may have any shape."""

_OF_SCHEDULERS: Final = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})


def named_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The optimizer's state by parameter name; tensors are the live ones, groups list names.

    A new optimizer has an empty ``"state"``: nothing is invented for it.
    """
    names = _names(optimizer, module)
    state = {names[id(p)]: dict(values) for p, values in optimizer.state.items()}
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


@dataclass(frozen=True, slots=True)
class OptimizerLayout:
    """What a saved state has to fit.

    Attributes:
        groups: the optimizer's groups.
        names: of the parameters in each group.
        shapes: of each parameter that is stepped, whole.
        state: by name, what it keeps now; empty where it never stepped.
    """

    groups: Sequence[Mapping[str, Any]]
    names: Sequence[Sequence[str]]
    shapes: Mapping[str, torch.Size]
    state: Mapping[str, Mapping[str, Any]]


def layout(optimizer: Optimizer, module: nn.Module) -> OptimizerLayout:
    """The layout of an optimizer of torch."""
    names = _names(optimizer, module)
    return OptimizerLayout(
        groups=optimizer.param_groups,
        names=[[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        shapes={names[id(p)]: p.shape for p in params_of(optimizer)},
        state={names[id(p)]: values for p, values in optimizer.state.items()},
    )


def checked(own: OptimizerLayout, saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` by parameter name, checked to fit. Pure.

    Raises:
        CheckpointError: the saved groups, names, keys or shapes are not those of such an optimizer.
    """
    matched = match(own.groups, own.names, saved)
    check_moments(own.shapes, own.state, matched["state"])
    return matched


def load_named_state(optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Put back what :func:`named_state` gave, from full or equally sharded tensors, or from a file.

    Every value becomes this optimizer's own copy: two optimizers never share a ``step`` counter.

    ``saved``: what :func:`checked` returned.
    """
    names = _names(optimizer, module)
    group_of = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for name, values in saved["state"].items():
        param, group = group_of[name]
        # ZeRO's moments are float32, as its masters: torch's optimizers want theirs as they would make them.
        dtype = param.dtype if MASTER in values else None
        optimizer.state[param] = {k: _own(k, v, param, group, dtype) for k, v in values.items() if k != MASTER}
    for group, stored in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in stored.items() if k not in HERE_ONLY})


def match(own: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state, checked to have the groups of an optimizer. Pure.

    Args:
        own: the optimizer's groups.
        names: of each group's parameters.
        saved: by name, or by position as torch's own ``optimizer.state_dict()`` counts parameters.

    Raises:
        CheckpointError: it has other groups, or was made by another kind of optimizer.
    """
    saved = _by_name(names, saved)
    theirs = [list(group["params"]) for group in saved["param_groups"]]
    if [sorted(g) for g in names] != [sorted(map(str, g)) for g in theirs]:
        flat_ours, flat_theirs = {n for g in names for n in g}, {n for g in theirs for n in g}
        missing, unexpected = sorted(flat_ours - flat_theirs), sorted(map(str, flat_theirs - flat_ours))
        raise CheckpointError(
            f"The checkpoint's optimizer must step the same parameters in the same {len(names)} groups, but has"
            f" {len(theirs)} groups; missing: {missing or 'none'}; unexpected: {unexpected or 'none'}."
            " Make the optimizer as it was when it was saved."
        )
    for group, stored in zip(own, saved["param_groups"], strict=True):
        # Another release of torch knows more, or fewer, settings of one optimizer; another kind differs both ways.
        absent = sorted(set(group) - set(stored) - HERE_ONLY - _OF_SCHEDULERS)
        strange = sorted(set(stored) - set(group) - HERE_ONLY - _OF_SCHEDULERS)
        if absent and strange:
            raise CheckpointError(
                f"The checkpoint's optimizer must have the settings of this one, but has {', '.join(strange)} and lacks"
                f" {', '.join(absent)}. Make the optimizer as it was when it was saved."
            )
    return dict(saved)


def _by_name(names: Sequence[Sequence[str]], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    places = [list(group["params"]) for group in saved["param_groups"]]
    by_place = any(isinstance(place, int) for group in places for place in group)
    if not by_place or [len(g) for g in places] != [len(g) for g in names]:
        return saved
    name_of = {p: n for ps, ns in zip(places, names, strict=True) for p, n in zip(ps, ns, strict=True)}
    groups = [{**g, "params": [name_of[p] for p in g["params"]]} for g in saved["param_groups"]]
    return {"state": {name_of.get(p, p): values for p, values in saved["state"].items()}, "param_groups": groups}


def check_moments(
    shapes: Mapping[str, torch.Size], own: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise unless saved moments can be those of parameters with ``shapes``. Pure.

    Args:
        shapes: of each parameter that is stepped.
        own: the optimizer's state now; empty where it never stepped.
        saved: what is to replace it.

    Raises:
        CheckpointError: a parameter is unknown, or its state has other keys than now, or a moment another shape.
    """
    for name, values in saved.items():
        if name not in shapes:
            raise CheckpointError(
                f"The checkpoint's moments must be of parameters that are stepped, but {name} is not."
            )
        keys, mine = set(values) - {MASTER}, set(own.get(name, {}))
        if mine and keys and keys != mine:
            raise CheckpointError(
                f"The checkpoint must hold {', '.join(sorted(mine))} of {name}, but holds"
                f" {', '.join(sorted(keys)) or 'nothing'}. Make the optimizer as it was when it was saved."
            )
        for key in sorted(_LIKE_PARAM & keys):
            if isinstance(values[key], Tensor | Stored) and values[key].shape != shapes[name]:
                raise CheckpointError(
                    f"{key} of {name} must have the parameter's shape {tuple(shapes[name])}, but has"
                    f" {tuple(values[key].shape)} in the checkpoint. Build the model with the sizes it was saved with."
                )


def _own(key: str, value: Any, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """A copy of ``value`` where, and cut as, the optimizer would have made it. Moments: of ``dtype``, if it is one."""
    if not isinstance(value, Tensor | Stored):
        return value
    if isinstance(value, Stored) and (key == "step" or value.shape != param.shape):
        value = value.whole()
    if key == "step":  # as torch's `load_state_dict`: on the host, unless a kernel on the device counts it
        on_device = group.get("capturable") or group.get("fused")
        return value.detach().to(param.device if on_device else "cpu", copy=True)
    if value.shape != param.shape:  # a factored moment: not cut like the parameter
        return value.detach().to(param.device, copy=True)
    mine = torch.zeros_like(param, dtype=dtype or value.dtype, requires_grad=False)
    write(mine, value)
    return mine


def _names(optimizer: Optimizer, module: nn.Module) -> dict[int, str]:
    names = {id(p): name for name, p in module.named_parameters()}
    unknown = [p for p in params_of(optimizer) if id(p) not in names]
    if unknown:
        raise SetupOrderError(
            f"The {type(optimizer).__name__} must step the module's current parameters, but {len(unknown)} of its"
            f" {len(params_of(optimizer))} are not among them. Pass it through fabric.setup or setup_optimizers first."
        )
    return names

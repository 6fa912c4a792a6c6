"""An optimizer's state by parameter *name*, so that it fits any strategy and any number of ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabriclite.errors import CheckpointError, SetupOrderError
from fabriclite.optim import params_of
from fabriclite.shards import full, write


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


def load_named_state(optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Put back what :func:`named_state` gave, from full or equally sharded tensors.

    Every value becomes this optimizer's own copy: two optimizers never share a ``step`` counter.

    Raises:
        CheckpointError: the saved groups or names differ from this optimizer's.
    """
    names = _names(optimizer, module)
    groups = match_groups(optimizer, names, saved)
    by_name = {names[id(p)]: p for p in params_of(optimizer)}
    optimizer.state.clear()
    for name, values in saved["state"].items():
        param = by_name[name]
        optimizer.state[param] = {key: _own(value, param) for key, value in values.items()}
    for group, stored in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in stored.items() if k not in ("params", "foreach", "fused")})


def match_groups(optimizer: Optimizer, names: Mapping[int, str], saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, checked to be those of ``optimizer``."""
    groups: list[dict[str, Any]] = list(saved["param_groups"])
    ours = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [list(group["params"]) for group in groups]
    if [sorted(g) for g in ours] != [sorted(g) for g in theirs]:
        flat_ours, flat_theirs = {n for g in ours for n in g}, {n for g in theirs for n in g}
        missing, unexpected = sorted(flat_ours - flat_theirs), sorted(flat_theirs - flat_ours)
        raise CheckpointError(
            f"The checkpoint's optimizer must step the same parameters in the same {len(ours)} groups, but has"
            f" {len(theirs)} groups; missing: {missing or 'none'}; unexpected: {unexpected or 'none'}."
        )
    return groups


def full_state(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same with whole tensors on the host, copies of their own. Every rank must call this."""
    state = {
        name: {k: full(v).detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in values.items()}
        for name, values in named["state"].items()
    }
    return {"state": state, "param_groups": named["param_groups"]}


def _own(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != param.shape:
        return value.detach().clone()  # a step counter or a factored moment: not cut like the parameter
    mine = torch.zeros_like(param, dtype=value.dtype, requires_grad=False)
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

"""Optimizers and the parameters they hold: checks, rewiring after sharding, a scaled step."""

import weakref
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fabriclite.errors import ConfigError, SetupOrderError


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter object as it was before sharding, and the name under which to find what replaced it."""

    name: str
    param: "weakref.ref[Tensor]"


def bind(module: nn.Module) -> dict[int, Binding]:
    """Note which object is which parameter, before something replaces the objects. Holds none of them alive."""
    return {id(param): Binding(name, weakref.ref(param)) for name, param in module.named_parameters()}


def check_fresh(optimizer: object) -> None:
    """Raise unless ``optimizer`` is one, and holds no state yet.

    Raises:
        ConfigError: it is no optimizer.
        SetupOrderError: it already holds state.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"`optimizers` must be torch.optim.Optimizer objects, but one is {type(optimizer).__name__}."
            " Pass a scheduler as scheduler=..."
        )
    if not all(_is_fresh(state) for state in optimizer.state.values()):
        raise SetupOrderError(
            f"The {type(optimizer).__name__} must be new when it is set up, but already holds state for"
            f" {len(optimizer.state)} parameters, which sharding would lose."
            " Set it up first, then load its state with fabric.load."
        )


def check_steps(optimizer: Optimizer, known: Container[int]) -> None:
    """Raise unless the ids of all parameters that ``optimizer`` steps are ``known``.

    Raises:
        ConfigError: it holds a parameter of something else.
    """
    foreign = [p for p in params_of(optimizer) if id(p) not in known]
    if foreign:
        raise ConfigError(
            f"The {type(optimizer).__name__} must step parameters of modules that are set up, but {len(foreign)} of its"
            f" {len(params_of(optimizer))} (first of shape {tuple(foreign[0].shape)}) belong to none."
            " Set up the module that owns them, in this call or before; add parameters before setup, not after."
        )


def rewire(optimizer: Optimizer, bindings: Mapping[int, Binding], module: nn.Module) -> None:
    """Make ``optimizer`` step the parameters of ``module`` that replaced the bound ones."""
    current = dict(module.named_parameters(remove_duplicate=False))
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):  # in place: LBFGS holds the list itself
            group["params"][place] = new = _replacement(param, bindings, current)
            if new is not param and param in optimizer.state:
                optimizer.state[new] = _fresh_state_for(new, optimizer.state.pop(param))
        _foreach_if_uniform(group)


def _replacement(param: Tensor, bindings: Mapping[int, Binding], current: Mapping[str, Tensor]) -> Tensor:
    binding = bindings.get(id(param))
    # An id can be used again once its object is gone: only the very object counts.
    if binding is None or binding.param() is not param:
        return param
    return current[binding.name]


def _fresh_state_for(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """State that an optimizer made when it was made (Adagrad does), for the parameter that came instead."""
    return {
        key: torch.full_like(param, value.flatten()[0].item(), dtype=value.dtype, requires_grad=False)
        if isinstance(value, Tensor) and value.dim() > 0
        else value
        for key, value in state.items()
    }


def _is_fresh(state: Mapping[str, Any]) -> bool:
    """Whether it is what an optimizer starts with: no step, and one value throughout each tensor."""
    tensors = [v for v in state.values() if isinstance(v, Tensor) and v.numel() > 0]
    return float(state.get("step", 1)) == 0 and all(bool((t == t.flatten()[0]).all()) for t in tensors)


def _foreach_if_uniform(group: dict[str, Any]) -> None:
    """Sharded and plain parameters, or two meshes, cannot share torch's foreach call: step such a group one by one."""
    kinds = {getattr(p, "device_mesh", None) for p in group["params"]}
    if len(kinds) > 1 and group.get("foreach") is None and not group.get("fused"):
        group["foreach"] = False


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def scale_steps(optimizer: Optimizer, scaler: GradScaler) -> None:
    """Make ``optimizer.step()`` unscale gradients, and skip the step if one is not finite.

    The object stays the user's own, so that schedulers made before or after see it. ``GradScaler.step`` calls the
    method it finds on the object, so the original is put back for the moment of that call.
    """
    if not scaler.is_enabled():
        return
    original = optimizer.step

    def step(self: Optimizer, closure: None = None) -> float | None:
        if closure is not None:
            raise ConfigError(
                "`closure` must be None with precision '16-mixed', but one was given: its loss would not be scaled."
                " Use precision 'bf16-mixed' or '32-true'."
            )
        installed = self.step  # this method, or a scheduler's wrapper around it
        self.step = original  # type: ignore[method-assign]
        try:
            result = scaler.step(self)
        finally:
            self.step = installed  # type: ignore[method-assign]
        scaler.update()
        return result

    if hasattr(original, "_wrapped_by_lr_sched"):  # a scheduler was here first, and looks for its mark
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]

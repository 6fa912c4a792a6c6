"""From the module a user built to one that is whole, on its device and in its dtype."""

import torch
from torch import Tensor, nn

from fabriclite.errors import MaterializeError
from fabriclite.precision import Precision


def settle(module: nn.Module, device: torch.device | None, precision: Precision) -> nn.Module:
    """Check that every tensor of ``module`` has a value, then move and cast it.

    A module that already holds a parameter of ``precision.param_dtype`` was built (or cast) for that precision: its
    code chose its dtypes, and they stay. Only a module that is float32 throughout is cast.

    Args:
        module: any module.
        device: where to move it; ``None`` leaves it where it is.
        precision: the run's precision.

    Raises:
        MaterializeError: a parameter or buffer is on the meta device and so has no value.
    """
    refuse_meta(module)
    if precision.param_dtype != torch.float32 and not precision.mixed and _all_float32(module):
        module = module.to(precision.param_dtype)
    return module if device is None else module.to(device)


def refuse_meta(module: nn.Module) -> None:
    """Raise, naming them, if tensors of ``module`` have no memory."""
    empty = [name for name, tensor in named_tensors(module) if tensor.is_meta]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise MaterializeError(
            f"{shown} must have a value, but {'is' if len(empty) == 1 else 'are'} on the meta device."
            " Build the module inside `with fabric.init_module():` instead of under `torch.device('meta')`."
        )


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, with every name a shared one has."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _all_float32(module: nn.Module) -> bool:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return dtypes == {torch.float32}

"""From the module a user built to one that is whole, on its device and in its dtype."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabriclite import _torch
from fabriclite.birth import session
from fabriclite.birth.births import Births
from fabriclite.birth.places import is_lazy, listed, named_tensors
from fabriclite.errors import MaterializeError, SetupOrderError
from fabriclite.precision import Precision

M = TypeVar("M", bound=nn.Module)


@contextmanager
def settled(
    module: M, device: torch.device | None, precision: Precision | None, optimizers: Sequence[Optimizer] = ()
) -> Iterator[tuple[M, Births]]:
    """Move and cast ``module``; within it, nothing is recorded, and its births are to be filled.

    A module that already holds a parameter of ``precision.param_dtype`` was built (or cast) for that precision: its
    code chose its dtypes, and they stay. Only a module that is float32 throughout is cast.

    Args:
        module: any module.
        device: where to move it; ``None`` leaves it where it is.
        precision: the run's precision; ``None`` casts nothing.
        optimizers: made for it already; some keep tensors like its parameters.

    Raises:
        MaterializeError: a parameter or buffer is on the meta device and so has no value.
        SetupOrderError: the module was recorded in another thread, or its ``init_module`` has not ended.
    """
    session.attend(module)
    refuse_meta(module)
    if precision is not None and precision.param_dtype != torch.float32 and not precision.mixed:
        module = module.to(precision.param_dtype) if _all_float32(module) else module
    if device is not None and not _is_on(module, device):
        module = module.to(device)
    with session.paused():
        yield module, Births.of(module, optimizers)


def _is_on(module: nn.Module, device: torch.device) -> bool:
    """Whether all of it was recorded for ``device``: moving it there would ask and answer, and change nothing."""
    recording = session.current()
    if recording is None:
        return False
    with _torch.raw():
        tensors = [tensor for _, tensor in named_tensors(module)]
        return all(recording.knows(tensor) and recording.device(tensor) == device for tensor in tensors)


def refuse_meta(module: nn.Module) -> None:
    """Raise, naming them, if tensors of ``module`` have no memory and were not recorded."""
    empty = [name for name, tensor in named_tensors(module) if not is_lazy(tensor) and tensor.is_meta]
    recording = session.current()
    if recording is not None and empty and any(recording.knows(tensor) for _, tensor in named_tensors(module)):
        raise SetupOrderError(
            "`init_module` and setup must be called in one thread, but were in two: what was done to the model in"
            " between is not known. Call both in one."
        )
    if empty:
        raise MaterializeError(
            f"{listed(empty)} must have a value, but {'is' if len(empty) == 1 else 'are'} on the meta device."
            " Build the module inside `with fabric.init_module():` instead of under `torch.device('meta')`."
        )


def _all_float32(module: nn.Module) -> bool:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return dtypes == {torch.float32}

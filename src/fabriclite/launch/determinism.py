"""Algorithms that give the same bits every time, or an error. Torch has one switch for it in a process."""

import os
from typing import Final, Literal

import torch

from fabriclite.errors import ConfigError

Deterministic = bool | Literal["warn"]
_CUBLAS: Final = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic(choice: object) -> None:
    """Have torch use deterministic algorithms alone, from now on, in this process. ``False`` leaves all as it is.

    cuBLAS reads its part from the environment, once, when CUDA starts.

    Args:
        choice: ``True`` makes an operation that has no such algorithm an error, ``"warn"`` a warning.

    Raises:
        ConfigError: ``choice`` is something else, or CUDA has started without it.
    """
    if not (isinstance(choice, bool) or choice == "warn"):
        raise ConfigError(f"`deterministic` must be True, False or 'warn', but is {choice!r}.")
    if choice is False:
        return
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch gives it no types
    if started and _CUBLAS not in os.environ:
        raise ConfigError(
            f"`deterministic` must be asked for before CUDA starts, which reads {_CUBLAS}, but it has started. Make the"
            f" Fabric before the first tensor on a GPU, or start the script with {_CUBLAS}=:4096:8."
        )
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=choice == "warn")
    torch.backends.cudnn.benchmark = False

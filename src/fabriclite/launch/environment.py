"""The environment of this process: what launchers wrote in it, and what other libraries must find there."""

import os
from collections.abc import Mapping

_ours: dict[str, str] = {}
"""What was written here for libraries: no launcher said it."""


def from_launchers() -> Mapping[str, str]:
    """The environment without what :func:`prepare_for_deepspeed` put into it."""
    return {name: value for name, value in os.environ.items() if _ours.get(name) != value}


def become(rank: Mapping[str, str]) -> None:
    """Let this process be the one that a starter describes with these variables."""
    os.environ.update(rank)
    _ours.clear()


def prepare_for_deepspeed(device_type: str, local_rank: int) -> None:
    """Tell deepspeed its accelerator, which it reads once on import, and its local rank, read at every step."""
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = _ours["LOCAL_RANK"] = str(local_rank)

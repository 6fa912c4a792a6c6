"""The environment of this process: what launchers wrote in it, and what other libraries must find there."""

import os
from collections.abc import Mapping

_beside: list[tuple[str | None, str | None]] = []
"""RANK and WORLD_SIZE as they were when LOCAL_RANK was written here: with these, no launcher said it."""


def from_launchers() -> Mapping[str, str]:
    """The environment without what :func:`prepare_for_deepspeed` put into it."""
    ours = ("LOCAL_RANK",) if _rank_and_size() in _beside else ()
    return {name: value for name, value in os.environ.items() if name not in ours}


def become(rank: Mapping[str, str]) -> None:
    """Let this process be the one that a starter describes with these variables."""
    os.environ.update(rank)
    _beside.clear()


def prepare_for_deepspeed(device_type: str, local_rank: int) -> None:
    """Tell deepspeed its accelerator, which it reads once on import, and its local rank, read at every step."""
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(local_rank)
        _beside[:] = [_rank_and_size()]


def _rank_and_size() -> tuple[str | None, str | None]:
    return os.environ.get("RANK"), os.environ.get("WORLD_SIZE")

"""Who am I: rank, size and device of this process, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fabriclite.errors import WorldError

_RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes of one run, seen from one of them. ``World(rank=3, size=8)`` needs no process to exist.

    Attributes:
        rank: index of this process among all, in ``[0, size)``.
        size: number of processes.
        local_rank: index of this process on its machine.
        local_size: number of processes on this machine.
        node_rank: index of this machine.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise WorldError(f"`rank` must be in [0, {self.size}), but is {self.rank}. Check RANK and WORLD_SIZE.")
        if not 0 <= self.local_rank < self.local_size:
            raise WorldError(
                f"`local_rank` must be in [0, {self.local_size}), but is {self.local_rank}."
                " Check LOCAL_RANK and LOCAL_WORLD_SIZE."
            )

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0


def described_by(env: Mapping[str, str]) -> bool:
    """Whether an external launcher (torchrun and its kin) has described this process in ``env``.

    LOCAL_RANK alone does not count: libraries set it by themselves.
    """
    return "RANK" in env or "WORLD_SIZE" in env


def local_size(env: Mapping[str, str]) -> int:
    """How many processes a launcher started on this machine."""
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE"
    size = _number(env, name, default=1)
    if size < 1:
        raise WorldError(f"{name} must be at least 1, but is {size}. Launch with torchrun, which sets it.")
    return size


def from_env(env: Mapping[str, str], device_for: Mapping[int, torch.device]) -> World:
    """Read the world that torchrun (or fabriclite's own starters) wrote into ``env``.

    Args:
        env: usually ``os.environ``.
        device_for: the device of each local rank of this machine.

    Raises:
        WorldError: a variable is missing, is no number, or names a local rank without a device.
    """
    missing = [key for key in _RANK_KEYS if key not in env]
    if missing:
        found = [key for key in _RANK_KEYS if key in env]
        raise WorldError(
            f"{', '.join(missing)} must be set when {', '.join(found)} {'is' if len(found) == 1 else 'are'} set,"
            " but the environment lacks it. Launch with torchrun, or unset them to run in one process."
        )
    local_rank = _number(env, "LOCAL_RANK")
    if local_rank not in device_for:
        raise WorldError(
            f"LOCAL_RANK must be in [0, {len(device_for)}), the devices used on this machine, but is {local_rank}."
            " Start one process per device."
        )
    return World(
        rank=_number(env, "RANK"),
        size=_number(env, "WORLD_SIZE"),
        local_rank=local_rank,
        local_size=local_size(env),
        node_rank=_number(env, "GROUP_RANK", default=0),
        device=device_for[local_rank],
    )


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    if default is not None and key not in env:
        return default
    try:
        return int(env[key])
    except ValueError:
        raise WorldError(
            f"{key} must be a whole number, but is {env[key]!r}. Launch with torchrun, which sets it."
        ) from None

"""Joining the other processes, once."""

import atexit
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch import parent
from fabriclite.launch.environments.described import Described
from fabriclite.launch.store import meeting
from fabriclite.world import World


def join(world: World, found: Described, backend: str | None, timeout: timedelta) -> None:
    """Be part of the process group of ``world``; a group that exists already is used. Every rank must call this.

    A world of one meets nobody, so it needs no address and no port.

    Args:
        world: who this process is.
        found: how its launcher described it: where the processes meet.
        backend: of torch; ``None`` for the one of the device.
        timeout: of every collective, and of meeting.

    Raises:
        ConfigError: this build of torch has no such backend.
        WorldError: the existing group is of another world, the others cannot be reached, or the port is in use.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise WorldError(
                f"The process group must be that of rank {world.rank} of {world.size}, but one of rank"
                f" {dist.get_rank()} of {dist.get_world_size()} exists. Destroy it before you make a Fabric."
            )
        return
    parent.end_with_starter()
    name = backend or default_backend(world.device)
    check_backend(name)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store = HashStore() if world.size == 1 else meeting(found, timeout)
    dist.init_process_group(name, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    atexit.register(leave)


def check_backend(name: object) -> None:
    """Raise unless this build of torch has every backend in ``"gloo"`` or ``"cpu:gloo,cuda:nccl"``.

    Raises:
        ConfigError: it lacks one.
    """
    parts = [part.rpartition(":")[2].strip().lower() for part in name.split(",")] if isinstance(name, str) else [""]
    if not all(dist.is_backend_available(part) for part in parts):
        known = [k for k in dist.Backend.backend_list if k not in ("undefined", "fake")]
        present = [k for k in known if dist.is_backend_available(k)]
        raise ConfigError(
            f"`process_group_backend` must be None or a backend that this torch has ({', '.join(present)}), but is"
            f" {name!r}. Leave it out to choose by device."
        )


def default_backend(device: torch.device) -> str:
    """NCCL for CUDA tensors, with gloo beside it for objects and offloaded gradients on the host; gloo elsewhere."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def leave() -> None:
    """Destroy the process group, if one is left."""
    if dist.is_initialized():
        dist.destroy_process_group()

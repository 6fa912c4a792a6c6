"""Joining the other processes, once."""

import atexit
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # public, but not in __all__

from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch import meeting, stores
from fabriclite.launch.failures import hooks
from fabriclite.launch.failures.board import Board
from fabriclite.launch.failures.line import Line
from fabriclite.launch.failures.members import Member, look
from fabriclite.launch.failures.record import Failure
from fabriclite.world import World

_AGENT_SERVES: Final = "TORCHELASTIC_USE_AGENT_STORE"
_RUN: Final = "TORCHELASTIC_RUN_ID"
_LAST_WORD: Final = timedelta(seconds=6)
"""How long a rank that failed before all met tries to say so."""


def join(world: World, backend: str | None, timeout: timedelta, facts: Mapping[str, str]) -> None:
    """Be part of the process group of ``world``; a group that exists already is used. Every rank must call this.

    A world of one meets nobody, so it needs no address and no port.

    Args:
        world: this process and the others.
        backend: as torch names it; ``None`` chooses by device.
        timeout: how long a collective waits for the others.
        facts: what must be the same on all ranks, argument to value.

    Raises:
        ConfigError: this build of torch has no such backend, or ``facts`` differ between ranks.
        WorldError: the existing group is of another world, or the others cannot be reached.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise WorldError(
                f"The process group must be that of rank {world.rank} of {world.size}, but one of rank"
                f" {dist.get_rank()} of {dist.get_world_size()} exists. Destroy it before you make a Fabric."
            )
        return
    name = backend or default_backend(world.device)
    check_backend(name)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        dist.init_process_group(name, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _meet(world, name, timeout, facts)
    atexit.register(leave)


def _meet(world: World, backend: str, timeout: timedelta, facts: Mapping[str, str]) -> None:
    watch, monitor = hooks.begin(world.rank, world.size, os.environ)
    address, port = _address(world.size)
    run = os.environ.get(_RUN, "")
    patience = max(timeout, meeting.SHORTEST)
    served_here = world.rank == 0 and os.environ.get(_AGENT_SERVES) != "True"
    store: Store
    if served_here:
        one_machine = world.local_size == world.size
        store = stores.serve(address if one_machine else "", port, world.size)
    else:
        store = stores.connect(address, port, patience)
    watch.before_meeting = lambda failure: meeting.tell_failed(store, run, failure)
    try:
        met = meeting.meet(store, run, watch.me, world.size, facts, patience)
    except meeting.FailedBeforeError as error:
        watch.noticed(error.first)
    server = None if os.environ.get(_AGENT_SERVES) == "True" else met.roster[0]
    line = Line(
        lambda: stores.connect(address, port, patience), lambda: watch.lost_starter or _is_gone(server, watch.me)
    )
    watch.roster, watch.server = met.roster, store if served_here else None
    watch.board = Board(line, met.prefix, world.size)
    monitor.met(timeout.total_seconds())
    store.set_timeout(timeout)
    hook = sys.excepthook
    dist.init_process_group(
        backend, store=PrefixStore(met.prefix, store), rank=world.rank, world_size=world.size, timeout=timeout
    )
    sys.excepthook = hook  # torch put its own around it, which holds back what is written to stderr until that returns


def _is_gone(server: Member | None, me: Member) -> bool:
    """Whether the rank that serves the store can be seen to have ended. ``None``: a starter serves it."""
    return server is not None and server.place == me.place and look(server) == "gone"


def expect(env: Mapping[str, str]) -> None:
    """Where a launcher has described this process as one of several in ``env``: record its failures from now on."""
    rank, size = env.get("RANK", ""), env.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1):
        return
    watch, _ = hooks.begin(int(rank), int(size), os.environ)
    if watch.board is None and watch.before_meeting is None and not watch.outlet.starter_prints:
        watch.before_meeting = _last_word


def _last_word(failure: Failure) -> None:
    """Without a starter to tell the others, they wait in the store for this rank: say there that it will not come."""
    if failure.rank == 0 or os.environ.get("MASTER_ADDR") is None:
        return  # rank 0 serves the store, and has not begun to
    try:
        store = stores.connect(*_address(failure.size), _LAST_WORD)
        meeting.tell_failed(store, os.environ.get(_RUN, ""), failure)
    except (WorldError, RuntimeError):
        pass


def _address(size: int) -> tuple[str, int]:
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise WorldError(
            f"{' and '.join(missing)} must be set for {size} processes to meet, but the environment lacks"
            f" {'them' if len(missing) > 1 else 'it'}. Launch with torchrun, which sets them."
        )
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise WorldError(f"MASTER_PORT must be a port number from 1 to 65535, but is {port!r}. Set it to a free one.")
    return os.environ["MASTER_ADDR"], int(port)


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
    """Destroy the process group, if one is left; the work is done, and this process may end without a word."""
    here = hooks.current()
    if here is not None and not here[0].leave():
        return  # a group in an error state may block its own destruction
    if here is not None:
        here[1].stop()
    if dist.is_initialized():
        dist.destroy_process_group()

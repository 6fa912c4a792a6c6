"""Joining the other processes, once."""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # public, but not in __all__

from fabriclite import _torch
from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch import meeting, stores
from fabriclite.launch.environments.described import Described
from fabriclite.launch.failures import hooks, quits
from fabriclite.launch.failures.board import Board
from fabriclite.launch.failures.line import Line
from fabriclite.launch.failures.members import Member, look
from fabriclite.launch.failures.record import PREEMPTED, Failure
from fabriclite.world import World

_MEND: Final = {
    "mpi": "Set them to the host of rank 0 and a free port there: mpirun -x MASTER_ADDR=... -x MASTER_PORT=...",
    "lsf": "Set them to the host of rank 0 and a free port there: jsrun -E MASTER_ADDR=... -E MASTER_PORT=...",
}
"""By environment, how what is missing is set; elsewhere torchrun is the way."""
_LAST_WORD: Final = timedelta(seconds=6)
"""How long a rank that failed before all met tries to say so."""


def join(
    world: World, found: Described, backend: str | None, timeout: timedelta, facts: Mapping[str, str] | None = None
) -> None:
    """Be part of the process group of ``world``; a group that exists already is used. Every rank must call this.

    A world of one meets nobody, so it needs no address and no port.

    Args:
        world: this process and the others.
        found: how a launcher described this process: where the others are met.
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
        _meet(world, found, name, timeout, facts or {})
    atexit.register(leave)


def _meet(world: World, found: Described, backend: str, timeout: timedelta, facts: Mapping[str, str]) -> None:
    watch, monitor = hooks.begin(world.rank, world.size, os.environ)
    address, port = _address(found)
    run = found.run_id or ""
    patience = max(timeout, meeting.SHORTEST)
    if world.rank != 0 or found.store_is_served:
        watch.server = None
    elif watch.server is None or watch.server.port != port:  # it is there, where a process group was destroyed before
        near = world.local_size == world.size or stores.is_loopback(address)
        watch.server = stores.serve(address if near else "", port, world.size)
    store = watch.server or stores.connect(address, port, patience)
    watch.before_meeting = lambda failure: meeting.tell_failed(store, run, failure)
    try:
        met = meeting.meet(store, run, watch.me, world.size, facts, patience)
    except meeting.FailedBeforeError as error:
        watch.noticed(error.first)
    server = None if found.store_is_served else met.roster[0]
    line = Line(
        lambda: stores.connect(address, port, patience), lambda: watch.lost_starter or _is_gone(server, watch.me)
    )
    watch.roster = met.roster
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


def expect(found: Described) -> None:
    """Where a launcher has described this process as one of several: record its failures from now on."""
    if not found.launched or found.size == 1:
        return
    watch, _ = hooks.begin(found.rank, found.size, os.environ)
    if watch.board is None and watch.before_meeting is None and not watch.outlet.starter_prints:
        watch.before_meeting = partial(_last_word, found)


def _last_word(found: Described, failure: Failure) -> None:
    """Without a starter to tell the others, they wait in the store for this rank: say there that it will not come."""
    if failure.rank == 0:
        return  # it serves the store, and has not begun to
    try:
        store = stores.connect(*_address(found), _LAST_WORD)
        meeting.tell_failed(store, found.run_id or "", failure)
    except (WorldError, RuntimeError):
        pass


def _address(found: Described) -> tuple[str, int]:
    known = {"MASTER_ADDR": found.master_address, "MASTER_PORT": found.master_port}
    missing = [name for name, value in known.items() if value is None]
    if found.master_address is None or found.master_port is None:
        mend = _MEND.get(found.name, "Launch with torchrun, which sets them.")
        raise WorldError(
            f"{' and '.join(missing)} must be set for {found.size} processes to meet, but the environment lacks"
            f" {'them' if len(missing) > 1 else 'it'}. {mend}"
        )
    return found.master_address, found.master_port


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


_NOBODY: Final = 2**17
"""No world has so many ranks."""


@contextmanager
def pretended(size: int) -> Iterator[None]:
    """Within it this process is the first of ``size`` that do not exist; their collectives do nothing.

    With a ``size`` of 1 nothing is done. A process group that exists is put aside meanwhile. The ranks are the last of
    a very large world: DTensor keeps what it worked out for a mesh, and hands it out for every mesh of the same ranks,
    so that in a real one of them collectives would go to a group that is no more.
    """
    if size == 1:
        yield
        return
    hook = sys.excepthook  # torch puts one of its own in its place with every group
    with _torch.other_default_group():
        dist.init_process_group("fake", store=_torch.fake_store(), rank=_NOBODY, world_size=_NOBODY + size)
        sys.excepthook = hook
        yield


def leave() -> None:
    """Destroy the process group, if one is left; the work is done, and this process may end without a word."""
    here, ending = hooks.current(), quits.heard()
    if here is not None and ending is not None and quits.status_of(ending) not in (0, PREEMPTED):
        here[0].ended(quits.status_of(ending), ending)  # the others may still wait for this rank
    if here is not None and not here[0].leave():
        return  # a group in an error state may block its own destruction
    if here is not None:
        here[1].stop()
    if dist.is_initialized():
        dist.destroy_process_group()

"""What mpi4py knows of this process. Every process must ask: they tell each other their hosts."""

import socket
from typing import Any

from fabriclite.errors import WorldError
from fabriclite.launch.environments.described import LOOPBACK, Described


def ask() -> Described:
    """This process among all of MPI's; rank 0 names its host and a port that is free there.

    Raises:
        WorldError: mpi4py is not installed, or finds no MPI.
    """
    try:
        from mpi4py import MPI  # type: ignore[import-not-found,unused-ignore]  # optional
    except (ImportError, RuntimeError) as error:  # it raises RuntimeError where it finds no MPI library
        raise WorldError(
            f"mpi4py must be importable when MPIEnvironment asks it, but: {error}. Install mpi4py, or launch with"
            " mpirun and leave the environment out."
        ) from error
    world: Any = MPI.COMM_WORLD
    rank, size = int(world.Get_rank()), int(world.Get_size())
    hosts: list[str] = world.allgather(socket.gethostname())
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    address, port = world.bcast((hosts[0], _free_port()) if rank == 0 else None, root=0)
    return Described(
        name="mpi",
        why="MPI, because it was named and mpi4py is there",
        rank=rank,
        size=size,
        size_name="MPI's size",
        local_rank=here.index(rank),
        local_size=len(here),
        node_rank=list(dict.fromkeys(hosts)).index(hosts[rank]),
        master_address=LOOPBACK if len(here) == size else address,
        master_port=port,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

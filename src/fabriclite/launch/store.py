"""Where processes meet: a store that rank 0 serves, or its launcher."""

import atexit
import errno
import itertools
import socket
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # public, but not in its __all__
    DistNetworkError,
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)

from fabriclite.errors import WorldError
from fabriclite.launch.environments.described import LOOPBACK, Described

_WAITING = 128  # connections that the system keeps until they are accepted


_met = itertools.count()
"""How often this process met the others: as often as each of them."""
_served: dict[tuple[str, int], TCPStore] = {}
"""What this process serves to others, until it ends: they may come to a second meeting before it does."""


def serve_store(size: int) -> TCPStore:
    """A store on a free port of the loopback, so that no two runs can ask for the same port."""
    listener = _listen_on_loopback(0)
    port = int(listener.getsockname()[1])
    return TCPStore(
        LOOPBACK, port, world_size=size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def meeting(found: Described, timeout: timedelta) -> Store:
    """The store of all processes of ``found``'s run. Each process must ask for it.

    Keys have the run's name, how often it was restarted, and the number of the meeting before them: what an earlier one
    left behind in the store are addresses at which nobody listens any more.

    Raises:
        WorldError: the launcher told no address, the address cannot be reached, or its port is taken.
    """
    address, port = _address(found)
    served_here = found.rank == 0 and not found.store_is_served
    try:
        store = _serve(address, port, found.size, timeout) if served_here else None
        store = store or TCPStore(address, port, world_size=found.size, is_master=False, timeout=timeout)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _in_use(address, port) from error
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise _in_use(address, port) from error
        raise WorldError(
            f"The store at {address}:{port} must be reachable from rank {found.rank}, but is not: {error}. Check"
            " MASTER_ADDR and MASTER_PORT, and that rank 0 runs."
        ) from error
    except DistStoreError as error:
        raise WorldError(
            f"All {found.size} processes must meet at {address}:{port} within {timeout}, but: {error}. Start them all,"
            " or give the strategy a longer timeout=."
        ) from error
    return PrefixStore(f"fabriclite/{found.run_id}/{found.restart_count}/{next(_met)}", store)


def _address(found: Described) -> tuple[str, int]:
    known = {"MASTER_ADDR": found.master_address, "MASTER_PORT": found.master_port}
    missing = [name for name, value in known.items() if value is None]
    if found.master_address is None or found.master_port is None:
        raise WorldError(
            f"{' and '.join(missing)} must be set for {found.size} processes to meet, but the environment lacks"
            f" {'them' if len(missing) > 1 else 'it'}. {_MEND.get(found.name, _MEND['torchrun'])}"
        )
    return found.master_address, found.master_port


_MEND = {
    "torchrun": "Launch with torchrun, which sets them.",
    "mpi": "Set them to the host of rank 0 and a free port there: mpirun -x MASTER_ADDR=... -x MASTER_PORT=...",
    "lsf": "Set them to the host of rank 0 and a free port there: jsrun -E MASTER_ADDR=... -E MASTER_PORT=...",
}


def _serve(address: str, port: int, size: int, timeout: timedelta) -> TCPStore:
    """A store at this address; on the loopback nobody else can connect to it. Torch alone listens to all networks."""
    if (address, port) in _served:
        return _served[address, port]
    listener = None
    if address == "localhost" or address.startswith("127."):
        listener = _listen_on_loopback(port).detach()
    _served[address, port] = TCPStore(
        address,
        port,
        world_size=size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=listener,
    )
    atexit.register(_served.clear)  # runs after the process group is left, which registers later
    return _served[address, port]


def _listen_on_loopback(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last user has just ended is free
        listener.bind((LOOPBACK, port))
        listener.listen(_WAITING)
    except OSError:
        listener.close()
        raise
    return listener


def _in_use(address: str, port: int) -> WorldError:
    return WorldError(
        f"MASTER_PORT must be a free port on {address}, but {port} is in use there. Set MASTER_PORT to another, the"
        " same on all ranks, or end what listens there."
    )

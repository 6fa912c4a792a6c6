"""The store through which ranks find each other: who serves it, and where it listens."""

import errno
import socket
from contextlib import closing
from datetime import timedelta
from typing import Final

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.errors import WorldError
from fabriclite.launch.environments.described import LOOPBACK

_QUEUE: Final = 4096  # ranks that connect at the same time


def serve(address: str = LOOPBACK, port: int = 0, size: int = 1) -> TCPStore:
    """A store that listens at ``address`` alone; port 0 is a free one, so that no two runs can ask for the same.

    Args:
        address: of this machine; ``""`` is every one of it.
        port: where.
        size: number of ranks, for torch to know.

    Raises:
        WorldError: the port is in use, or the address is not of this machine.
    """
    with closing(_socket(address, port)) as listening:
        return TCPStore(
            LOOPBACK if address == "" else address,
            listening.getsockname()[1],
            world_size=size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # torch itself would listen on every address
        )


def connect(address: str, port: int, patience: timedelta) -> TCPStore:
    """A connection of one's own to the store at ``address``.

    Raises:
        WorldError: nothing answers there in time.
    """
    try:
        return TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    except DistError as error:
        raise WorldError(
            f"The store of the run must answer at MASTER_ADDR {address}, MASTER_PORT {port} within"
            f" {patience.total_seconds():.0f} s, but does not: {str(error).splitlines()[0]} Look whether rank 0 started"
            " and whether its machine can be reached."
        ) from error


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine can come there."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _socket(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(_QUEUE)
    except OSError as error:
        made.close()
        in_use = error.errno == errno.EADDRINUSE
        raise WorldError(
            f"MASTER_PORT must be a free port of {address or 'this machine'}, but {port} is in use by another process."
            " Choose another, or leave the choice to a starter: torchrun --standalone, fabriclite run."
            if in_use
            else f"MASTER_ADDR must be an address of the machine of rank 0, but {address!r} is none: {error.strerror}."
            " Set it to that machine's name."
        ) from error
    return made

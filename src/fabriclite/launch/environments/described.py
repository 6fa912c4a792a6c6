"""What a launcher says of this process, as a value; and what reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One process of a run, as its launcher described it.

    Attributes:
        name: of the environment, as ``FABRICLITE_ENVIRONMENT`` takes it.
        why: the environment and the reason it was chosen, in one line.
        launched: the other processes exist, or are being started by whoever started this one. ``False``: this process
            was started by hand, and the other fields say nothing.
        rank: index of this process among all.
        size: number of processes.
        size_name: the variable that says ``size``, for messages.
        local_rank: index of this process on its machine.
        local_size: number of processes on this machine.
        node_rank: index of this machine.
        master_address: where the processes meet; ``None`` where the launcher does not tell.
        master_port: the port there; ``None`` where the launcher does not tell.
        store_is_served: the launcher serves a store at that address. ``False``: rank 0 does.
        own_device: the launcher lets each process see devices of its own, so that each counts them from 0.
        restart_count: how often the run was started again.
        run_id: names the run among those that may meet at the same address; ``None`` where the launcher has no name.
    """

    name: str
    why: str
    launched: bool = True
    rank: int = 0
    size: int = 1
    size_name: str = "WORLD_SIZE"
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    master_address: str | None = None
    master_port: int | None = None
    store_is_served: bool = False
    own_device: bool = False
    restart_count: int = 0
    run_id: str | None = None


@runtime_checkable
class Environment(Protocol):
    """A kind of launcher. Anything with these four can be passed as ``Fabric(plugins=...)``."""

    @property
    def name(self) -> str:
        """In lower case, as ``FABRICLITE_ENVIRONMENT`` takes it."""
        ...

    @property
    def needs(self) -> str:
        """What must be set for it to describe a process, and who sets that, in words."""
        ...

    def describes(self, env: Mapping[str, str]) -> bool:
        """Whether this launcher started the process that has these variables."""
        ...

    def read(self, env: Mapping[str, str]) -> Described:
        """What it says of the process.

        Raises:
            WorldError: a variable is missing, or has no meaning.
        """
        ...


def because(launcher: str, names: tuple[str, ...]) -> str:
    """``"SLURM, because A and B are set"``."""
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{launcher}, because {listed} {'are' if len(names) > 1 else 'is'} set"


def node_of(rank: int, size: int, local_rank: int, local_size: int) -> int:
    """The machine of a rank, for launchers that do not tell: ranks fill one machine after the other, or go round."""
    if local_size == size or rank % local_size == local_rank:
        return rank // local_size
    return rank % max(1, size // local_size)


def port_of(job: int, part: int) -> int:
    """A port that all processes of one job work out alike: in [15000, 30000), below those that systems hand out.

    Jobs with neighbouring numbers differ, and so do neighbouring parts (steps, elements of an array) of one job.
    """
    return 15000 + (job + 331 * part) % 15000

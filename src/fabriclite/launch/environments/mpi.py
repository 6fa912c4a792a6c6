"""Processes of ``mpirun`` and ``mpiexec``."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, final

from fabriclite.launch.environments import lsf, slurm
from fabriclite.launch.environments.described import LOOPBACK, Described, because, node_of
from fabriclite.launch.environments.variables import Variables

_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_USUAL_PORT = 29500  # torch's own


@final
@dataclass(frozen=True, slots=True)
class MPIEnvironment:
    """Processes that Open MPI, or MPICH, Intel MPI and others that use Hydra, started.

    MPI tells no address. The processes meet at MASTER_ADDR and MASTER_PORT if these are set; else on the loopback if
    there is one host, at the first host inside a SLURM or LSF job. The port is then the job's (see
    :class:`SLURMEnvironment` and :class:`LSFEnvironment`), or worked out from Open MPI's name of the job
    (PMIX_NAMESPACE), or 29500.

    Args:
        mpi4py: ask mpi4py, which finds host and port by itself; ``None`` does so where it is installed. The environment
            that is found without being named never does, since that initialises MPI.
    """

    mpi4py: bool | None = None

    name: ClassVar[str] = "mpi"
    needs: ClassVar[str] = (
        "OMPI_COMM_WORLD_RANK (Open MPI's mpirun sets it) or PMI_RANK and MPI_LOCALRANKID (mpiexec of MPICH and Intel"
        " MPI sets them), or the package mpi4py"
    )

    def describes(self, env: Mapping[str, str]) -> bool:
        return _OPEN_MPI[0] in env or ("PMI_RANK" in env and "MPI_LOCALRANKID" in env) or self._asks()

    def read(self, env: Mapping[str, str]) -> Described:
        if self._asks():
            from fabriclite.launch.environments.ask_mpi4py import ask

            return ask()
        names = _OPEN_MPI if _OPEN_MPI[0] in env else _HYDRA
        variables = Variables(env, "mpirun" if names is _OPEN_MPI else "mpiexec")
        variables.require(*names)
        rank_name, size_name, local_rank_name, local_size_name = names
        size, local_size = variables.count(size_name), variables.count(local_size_name)
        rank = variables.rank(rank_name, size, size_name)
        local_rank = variables.rank(local_rank_name, local_size, local_size_name)
        address = LOOPBACK if local_size == size else slurm.first_host(env) or lsf.first_host(env)
        return Described(
            name=self.name,
            why=because("Open MPI" if names is _OPEN_MPI else "MPI (Hydra)", names[:2]),
            rank=rank,
            size=size,
            size_name=size_name,
            local_rank=local_rank,
            local_size=local_size,
            node_rank=node_of(rank, size, local_rank, local_size),
            master_address=env.get("MASTER_ADDR") or address,
            master_port=variables.port() or slurm.port(env) or lsf.port(env) or _port(env),
            run_id=env.get("PMIX_NAMESPACE"),
        )

    def _asks(self) -> bool:
        return find_spec("mpi4py") is not None if self.mpi4py is None else self.mpi4py


def _port(env: Mapping[str, str]) -> int:
    if "PMIX_NAMESPACE" not in env:
        return _USUAL_PORT
    return 15000 + zlib.crc32(env["PMIX_NAMESPACE"].encode()) % 15000

"""Tasks of LSF's ``jsrun``."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar, final

from fabriclite.errors import WorldError
from fabriclite.launch.environments.described import LOOPBACK, Described, because, node_of, port_of
from fabriclite.launch.environments.variables import Variables

_ALL = ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE")


@final
@dataclass(frozen=True, slots=True)
class LSFEnvironment:
    """Tasks that ``jsrun`` started in a job of LSF.

    The processes meet at the first compute host of LSB_MCPU_HOSTS, or of the file that LSB_DJOB_RANKFILE names (on the
    loopback if there is one host), at port ``15000 + (LSB_JOBID + 331 * LSB_JOBINDEX) % 15000``. MASTER_ADDR and
    MASTER_PORT say otherwise.
    """

    name: ClassVar[str] = "lsf"
    needs: ClassVar[str] = "LSB_JOBID and JSM_NAMESPACE_RANK, ..._SIZE, ..._LOCAL_RANK (jsrun sets them)"

    def describes(self, env: Mapping[str, str]) -> bool:
        return "LSB_JOBID" in env and all(name in env for name in _ALL[:3])

    def read(self, env: Mapping[str, str]) -> Described:
        variables = Variables(env, "jsrun")
        variables.require(*_ALL)
        size = variables.count("JSM_NAMESPACE_SIZE")
        local_size = variables.count("JSM_NAMESPACE_LOCAL_SIZE")
        rank = variables.rank("JSM_NAMESPACE_RANK", size, "JSM_NAMESPACE_SIZE")
        local_rank = variables.rank("JSM_NAMESPACE_LOCAL_RANK", local_size, "JSM_NAMESPACE_LOCAL_SIZE")
        return Described(
            name=self.name,
            why=because("LSF", ("LSB_JOBID", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE")),
            rank=rank,
            size=size,
            size_name="JSM_NAMESPACE_SIZE",
            local_rank=local_rank,
            local_size=local_size,
            node_rank=node_of(rank, size, local_rank, local_size),
            master_address=env.get("MASTER_ADDR") or (LOOPBACK if local_size == size else first_host(env)),
            master_port=variables.port() or port(env),
            own_device=True,  # each resource set sees its own
            run_id=f"{env['LSB_JOBID']}[{env.get('LSB_JOBINDEX', '0')}]",
        )


def first_host(env: Mapping[str, str]) -> str | None:
    """The job's first compute host; ``None`` outside of LSF.

    Raises:
        WorldError: the list of hosts cannot be read.
    """
    if "LSB_MCPU_HOSTS" in env:
        words = env["LSB_MCPU_HOSTS"].split()
        slots = [(host, int(n)) for host, n in zip(words[::2], words[1::2], strict=False) if n.isdecimal()]
        if not slots or 2 * len(slots) != len(words):
            raise WorldError(
                f"LSB_MCPU_HOSTS must list hosts and slots, as in 'a 4 b 4', but is {env['LSB_MCPU_HOSTS']!r}."
                " Set MASTER_ADDR to the host of rank 0."
            )
        return _first_compute(slots)
    if "LSB_DJOB_RANKFILE" in env:
        try:
            lines = Path(env["LSB_DJOB_RANKFILE"]).read_text().split()
        except OSError as error:
            raise WorldError(
                f"LSB_DJOB_RANKFILE must name a file with one host a line, but reading it failed: {error}."
                " Set MASTER_ADDR to the host of rank 0."
            ) from error
        return _first_compute([(host, len(list(same))) for host, same in groupby(lines)])
    return None


def port(env: Mapping[str, str]) -> int | None:
    """Where the tasks of this job meet; ``None`` outside of LSF."""
    if "LSB_JOBID" not in env:
        return None
    variables = Variables(env, "jsrun")
    return port_of(variables.digits("LSB_JOBID"), variables.digits("LSB_JOBINDEX"))


def _first_compute(slots: list[tuple[str, int]]) -> str | None:
    """The first host, but not the launch node: that has one slot where the others have more, and runs no task."""
    if len(slots) > 1 and slots[0][1] == 1 and slots[1][1] > 1:
        return slots[1][0]
    return slots[0][0] if slots else None

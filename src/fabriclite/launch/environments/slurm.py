"""Tasks of SLURM's ``srun``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from fabriclite.errors import WorldError
from fabriclite.launch.environments.described import LOOPBACK, Described, because, port_of
from fabriclite.launch.environments.nodelist import expand, tasks_per_node
from fabriclite.launch.environments.variables import Variables

_SHELLS = ("interactive", "bash", "sh", "zsh", "tcsh", "fish")
_NO_STEP = range(2**32 - 16, 2**32)
"""Numbers that SLURM keeps for what is no step of srun: the batch script, the shell of salloc, and their like."""
_SEES_ITS_OWN = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU")


@final
@dataclass(frozen=True, slots=True)
class SLURMEnvironment:
    """Tasks that ``srun`` started.

    A batch script, and an interactive shell of ``salloc`` or ``srun --pty``, are no tasks: what is started there by
    hand is one process. In a batch script with several tasks that is an error, since ``srun`` was forgotten.

    The processes meet at the first host of the step's node list (on the loopback if there is one host), at port
    ``15000 + (SLURM_JOB_ID + 331 * SLURM_STEP_ID) % 15000``. Elements of a job array have numbers of their own, so
    theirs differ. MASTER_ADDR and MASTER_PORT say otherwise.
    """

    name: ClassVar[str] = "slurm"
    needs: ClassVar[str] = "SLURM_PROCID and SLURM_STEP_ID, outside of an interactive shell (srun sets them)"

    def describes(self, env: Mapping[str, str]) -> bool:
        if "SLURM_JOB_ID" not in env or "SLURM_PROCID" not in env or _in_a_shell(env):
            return False
        return _step(env) is not None or _tasks(env) > 1

    def read(self, env: Mapping[str, str]) -> Described:
        variables = Variables(env, "srun")
        if _step(env) is None:
            raise WorldError(
                f"A SLURM job of {_tasks(env)} tasks must be started with srun, but this process was started by the"
                " batch script alone. Write srun python script.py; or, if fabriclite shall start the other processes of"
                " this machine itself, ask for --ntasks=1 or set FABRICLITE_ENVIRONMENT=none."
            )
        size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        variables.require("SLURM_PROCID", size_name, "SLURM_LOCALID")
        size = variables.count(size_name)
        node = variables.number("SLURM_NODEID", default=0)
        local_size = _local_size(env, node, size)
        one_host = local_size == size
        return Described(
            name=self.name,
            why=because("SLURM", ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")),
            rank=variables.rank("SLURM_PROCID", size, size_name),
            size=size,
            size_name=size_name,
            local_rank=variables.rank("SLURM_LOCALID", local_size, "the number of tasks on this node"),
            local_size=local_size,
            node_rank=node,
            master_address=env.get("MASTER_ADDR") or (LOOPBACK if one_host else first_host(env)),
            master_port=variables.port() or port(env),
            own_device=any(name in env for name in _SEES_ITS_OWN),
            restart_count=variables.number("SLURM_RESTART_COUNT", default=0),
            run_id=f"{env['SLURM_JOB_ID']}.{_step(env)}",
        )


def first_host(env: Mapping[str, str]) -> str | None:
    """The first host of the step, or of the job; ``None`` outside of SLURM."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name):
            return expand(env[name])[0]
    return None


def port(env: Mapping[str, str]) -> int | None:
    """Where the tasks of this step meet; ``None`` outside of SLURM."""
    if "SLURM_JOB_ID" not in env:
        return None
    return port_of(Variables(env, "srun").digits("SLURM_JOB_ID"), _step(env) or 0)


def _step(env: Mapping[str, str]) -> int | None:
    """The number of srun's step; ``None`` where there is none."""
    text = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return int(text) if text.isdecimal() and int(text) not in _NO_STEP else None


def _tasks(env: Mapping[str, str]) -> int:
    variables = Variables(env, "srun")
    return variables.number("SLURM_STEP_NUM_TASKS", default=variables.number("SLURM_NTASKS", default=1))


def _in_a_shell(env: Mapping[str, str]) -> bool:
    """Whether somebody typed this command into a shell that SLURM gave them.

    The job keeps the shell's name, also for a step that is started from there: that one has tasks.
    """
    if env.get("SLURM_JOB_NAME") not in _SHELLS:
        return False
    return _step(env) is None or _tasks(env) == 1 or (_step(env) == 0 and "SLURM_PTY_PORT" in env)


def _local_size(env: Mapping[str, str], node: int, size: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env:
            counts = tasks_per_node(env[name])
            if node < len(counts) and sum(counts) == size:
                return counts[node]
    variables = Variables(env, "srun")
    nodes = variables.number("SLURM_STEP_NUM_NODES", default=variables.number("SLURM_NNODES", default=1))
    if nodes < 1 or size % nodes:
        raise WorldError(
            f"SLURM_STEP_TASKS_PER_NODE must be set for {size} tasks on {nodes} nodes, but is"
            f" {env.get('SLURM_STEP_TASKS_PER_NODE')!r}. Launch with srun, which sets it."
        )
    return size // nodes

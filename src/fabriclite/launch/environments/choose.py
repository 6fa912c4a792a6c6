"""Which environment describes this process."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch.environments.described import Described, Environment
from fabriclite.launch.environments.kubeflow import KubeflowEnvironment
from fabriclite.launch.environments.lsf import LSFEnvironment
from fabriclite.launch.environments.mpi import MPIEnvironment
from fabriclite.launch.environments.own import NoEnvironment, OwnEnvironment
from fabriclite.launch.environments.slurm import SLURMEnvironment
from fabriclite.launch.environments.torchelastic import TorchElasticEnvironment, partly

KEY: Final = "FABRICLITE_ENVIRONMENT"
"""Names the environment, as ``Fabric(plugins=...)`` does."""

ENVIRONMENTS: Final[dict[str, Environment]] = {
    "torchrun": TorchElasticEnvironment(),
    "kubeflow": KubeflowEnvironment(),
    "lsf": LSFEnvironment(),
    "mpi": MPIEnvironment(),
    "slurm": SLURMEnvironment(),
    "none": NoEnvironment(),
}

# The first that describes the process is taken. torchrun's variables stand before those of the job that it runs in;
# jsrun sets Open MPI's too; and mpirun starts its daemons by srun, so SLURM's numbers are then the daemons'.
_IN_ORDER: Final[tuple[Environment, ...]] = (
    TorchElasticEnvironment(),
    KubeflowEnvironment(),
    LSFEnvironment(),
    MPIEnvironment(mpi4py=False),
    SLURMEnvironment(),
)


def find(named: Environment | None, env: Mapping[str, str]) -> Described:
    """What the environment says of this process: the one that is named, else the first that describes it.

    Processes of fabriclite's own starters are always described by those: who started them followed the name.

    Args:
        named: by the script; the variable ``FABRICLITE_ENVIRONMENT`` may name it instead.
        env: usually ``os.environ``.

    Raises:
        ConfigError: the variable names no environment, or another than the script.
        WorldError: the one that is named does not describe this process, or a variable is missing.
    """
    by_variable = _by_variable(env)
    if named is not None and by_variable is not None and named.name != by_variable.name:
        raise ConfigError(
            f"`plugins` and {KEY} must not name different environments, but name {named.name!r} and"
            f" {by_variable.name!r}. Keep one."
        )
    own, wanted = OwnEnvironment(), named or by_variable
    if own.describes(env):
        return own.read(env)
    if wanted is None:
        return _first(env).read(env)
    by = "`plugins`" if named else KEY
    if not wanted.describes(env):
        raise WorldError(
            f"The environment must have started this process when {by} names it, but {wanted.name!r} finds nothing."
            f" It needs {wanted.needs}. Leave the name out, or start with its launcher."
        )
    return replace(wanted.read(env), why=f"{wanted.name}, because {by} names it")


def _by_variable(env: Mapping[str, str]) -> Environment | None:
    name = env.get(KEY)
    if not name:
        return None
    if name not in ENVIRONMENTS:
        raise ConfigError(
            f"{KEY} must be one of {', '.join(ENVIRONMENTS)}, but is {name!r}. Unset it to have one found."
        )
    return ENVIRONMENTS[name]


def _first(env: Mapping[str, str]) -> Environment:
    for environment in _IN_ORDER:
        if environment.describes(env):
            return environment
    # Half of torchrun's variables: its reader says which are missing.
    return TorchElasticEnvironment() if partly(env) else NoEnvironment()

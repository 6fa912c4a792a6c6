"""The launchers whose processes fabriclite knows: pass one as ``Fabric(plugins=...)`` to say which it was.

Without that the first that describes the process is taken; see ``docs/guides/launching.md``.
"""

from fabriclite.launch.environments.described import Described, Environment
from fabriclite.launch.environments.kubeflow import KubeflowEnvironment
from fabriclite.launch.environments.lsf import LSFEnvironment
from fabriclite.launch.environments.mpi import MPIEnvironment
from fabriclite.launch.environments.own import NoEnvironment
from fabriclite.launch.environments.slurm import SLURMEnvironment
from fabriclite.launch.environments.torchelastic import TorchElasticEnvironment

__all__ = [
    "Described",
    "Environment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "MPIEnvironment",
    "NoEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]

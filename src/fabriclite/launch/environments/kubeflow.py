"""Kubeflow's PyTorchJob: one process per pod."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from fabriclite.launch.environments.described import Described, because
from fabriclite.launch.environments.variables import Variables

_ALL = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@final
@dataclass(frozen=True, slots=True)
class KubeflowEnvironment:
    """Pods of a PyTorchJob. The operator sets MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE in each; inside a pod that
    runs torchrun the variables are torchrun's."""

    name: ClassVar[str] = "kubeflow"
    needs: ClassVar[str] = (
        "MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE without LOCAL_RANK, in a pod (the PyTorchJob operator sets them)"
    )

    def describes(self, env: Mapping[str, str]) -> bool:
        in_a_pod = "KUBERNETES_PORT" in env or "KUBERNETES_SERVICE_HOST" in env
        return in_a_pod and all(n in env for n in _ALL) and not any(n in env for n in _TORCHRUN)

    def read(self, env: Mapping[str, str]) -> Described:
        variables = Variables(env, "a PyTorchJob")
        variables.require(*_ALL)
        size = variables.count("WORLD_SIZE")
        rank = variables.rank("RANK", size, "WORLD_SIZE")
        pod = "KUBERNETES_PORT" if "KUBERNETES_PORT" in env else "KUBERNETES_SERVICE_HOST"
        return Described(
            name=self.name,
            why=because("Kubeflow", (pod, *_ALL)) + " without LOCAL_RANK",
            rank=rank,
            size=size,
            node_rank=rank,
            master_address=env["MASTER_ADDR"],
            master_port=variables.port(),
        )

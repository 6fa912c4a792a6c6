"""torchrun, and whoever sets the same variables by hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from fabriclite.launch.environments.described import Described, because
from fabriclite.launch.environments.variables import Variables

_ALL = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@final
@dataclass(frozen=True, slots=True)
class TorchElasticEnvironment:
    """Processes that ``torchrun`` started, or that were given its variables: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_*."""

    name: ClassVar[str] = "torchrun"
    needs: ClassVar[str] = "RANK, WORLD_SIZE and LOCAL_RANK (torchrun sets them)"

    def describes(self, env: Mapping[str, str]) -> bool:
        return all(name in env for name in _ALL)

    def read(self, env: Mapping[str, str]) -> Described:
        variables = Variables(env, "torchrun")
        variables.require(*_ALL)
        # Started by hand on one machine, the number of processes is known once.
        local_size = variables.count("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE")
        names = tuple(name for name in ("TORCHELASTIC_RUN_ID", *_ALL) if name in env)
        return Described(
            name=self.name,
            why=because("torchrun" if "TORCHELASTIC_RUN_ID" in env else "torchrun's variables", names),
            rank=variables.number("RANK"),
            size=variables.count("WORLD_SIZE"),
            local_rank=variables.number("LOCAL_RANK"),
            local_size=local_size,
            node_rank=variables.number("GROUP_RANK", default=0),
            master_address=env.get("MASTER_ADDR"),
            master_port=variables.port(),
            store_is_served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart_count=variables.number("TORCHELASTIC_RESTART_COUNT", default=0),
            run_id=env.get("TORCHELASTIC_RUN_ID"),
        )


def partly(env: Mapping[str, str]) -> bool:
    """Whether some of torchrun's variables are set. LOCAL_RANK alone does not count: libraries set it by themselves."""
    return "RANK" in env or "WORLD_SIZE" in env

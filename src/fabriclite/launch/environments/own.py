"""Processes that fabriclite itself started, and those that nobody started."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from fabriclite.launch.environments.described import LOOPBACK, Described
from fabriclite.launch.environments.torchelastic import TorchElasticEnvironment

KEY = "FABRICLITE_STARTER"
"""Holds the port of the starter's store. A torchrun that such a process starts sets another MASTER_PORT."""


def worker_env(rank: int, size: int, port: int) -> dict[str, str]:
    """What a starter on this machine tells a rank, in torchrun's words, which other libraries know."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's env:// then connects to the store and never serves it
        KEY: str(port),
    }


@final
@dataclass(frozen=True, slots=True)
class OwnEnvironment:
    """Ranks of ``fabric.launch``: the script run again, or a function in new processes."""

    name: ClassVar[str] = "fabriclite"
    needs: ClassVar[str] = f"{KEY} (fabric.launch sets it)"

    def describes(self, env: Mapping[str, str]) -> bool:
        return KEY in env and env[KEY] == env.get("MASTER_PORT") and "TORCHELASTIC_RUN_ID" not in env

    def read(self, env: Mapping[str, str]) -> Described:
        found = TorchElasticEnvironment().read(env)
        return replace(found, name=self.name, why="fabriclite's own starter, because fabric.launch began this process")


@final
@dataclass(frozen=True, slots=True)
class NoEnvironment:
    """A process that was started by hand: ``fabric.launch`` starts the others. What launchers have set is not read."""

    name: ClassVar[str] = "none"
    needs: ClassVar[str] = "nothing"

    def describes(self, env: Mapping[str, str]) -> bool:
        return True

    def read(self, env: Mapping[str, str]) -> Described:
        return Described(name=self.name, why="none, because no launcher's variables are set", launched=False)

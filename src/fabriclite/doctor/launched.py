"""Who started this process, and the world that a Fabric would be in."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from fabriclite.arguments import this_world
from fabriclite.doctor.facts import Json, Section, look
from fabriclite.doctor.secrets import allowed
from fabriclite.errors import FabricError
from fabriclite.launch.environments.choose import find
from fabriclite.launch.environments.described import Described


def launched(env: Mapping[str, str]) -> Section:
    """What the environment says; if it cannot be read its name says why, and nothing else is asked."""
    finders: dict[str, Callable[[], Json]] = {"name": lambda: find(None, env).name}
    try:
        found = find(None, env)
    except FabricError:
        pass
    else:
        finders["why"] = lambda: found.why
        finders["described"] = lambda: asdict(found) if found.launched else None
        finders["world"] = lambda: _world(found)
    return look("environment", {**finders, "variables": lambda: dict(allowed(env))})


def _world(found: Described) -> Json:
    """With everything left to ``"auto"``."""
    world = this_world("auto", "auto", max(1, found.size // found.local_size), found)
    return f"rank {world.rank} of {world.size} on {world.device}"

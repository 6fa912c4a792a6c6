"""Runs a script, or a module, as one rank: as Python itself would, but with failures recorded from its first line on.

::

    python -P -m fabriclite.launch.rank FOLDER path|module NAME ARGUMENTS...

``FOLDER`` comes first in ``sys.path``; empty for none.
"""

import os
import runpy
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from fabriclite.launch import parent
from fabriclite.launch.failures import hooks, outlet, quits
from fabriclite.launch.failures.record import PREEMPTED

STORE: Final = "FABRICLITE_STORE"
"""Where a starter of ours serves a store for all attempts, as ``address:port``."""
_ATTEMPT: Final = "TORCHELASTIC_RESTART_COUNT"


def main(folder: str, kind: str, name: str, *arguments: str) -> None:
    """Run what ``name`` names with ``sys.argv`` as it expects it."""
    _take_over(os.environ)
    starter_gone = parent.of_environment(os.environ)
    watch, _ = hooks.begin(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ, starter_gone)
    sys.argv = [name, *arguments]
    if folder:
        sys.path.insert(0, folder)
    try:
        if kind == "module":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(name), run_name="__main__")
    except SystemExit as error:
        status = _status(error)
        if status == PREEMPTED and watch.outlet.tell_preempted():
            raise SystemExit(0) from None  # an agent would start again what does not end with 0
        if status not in (0, PREEMPTED):
            watch.ended(status, error)
        raise


def attempt_folder(folder: Path, number: int) -> Path:
    """Where the ranks of one attempt tell their failures."""
    return folder / f"attempt-{number}"


def _take_over(env: MutableMapping[str, str]) -> None:
    """What an agent's starter has for each attempt: a folder of its own, and one store for all."""
    if _ATTEMPT in env and outlet.FOLDER in env:
        own = attempt_folder(Path(env[outlet.FOLDER]), int(env[_ATTEMPT]))
        own.mkdir(mode=0o700, exist_ok=True)
        env[outlet.FOLDER] = str(own)
    store = env.pop(STORE, None)
    if store is not None:
        address, _, port = store.rpartition(":")
        env.update(MASTER_ADDR=address, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")


def _status(error: SystemExit) -> int:
    if not (error.code is None or isinstance(error.code, int)):
        print(error.code, file=sys.stderr)  # as Python does
    return quits.status_of(error)


if __name__ == "__main__":
    main(*sys.argv[1:])

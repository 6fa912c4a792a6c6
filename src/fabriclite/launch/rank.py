"""Runs a script, or a module, as one rank: as Python itself would, but with failures recorded from its first line on.

::

    python -P -m fabriclite.launch.rank FOLDER path|module NAME ARGUMENTS...

``FOLDER`` comes first in ``sys.path``; empty for none.
"""

import os
import runpy
import sys

from fabriclite.launch import parent
from fabriclite.launch.failures import hooks
from fabriclite.launch.failures.record import PREEMPTED


def main(folder: str, kind: str, name: str, *arguments: str) -> None:
    """Run what ``name`` names with ``sys.argv`` as it expects it."""
    watch, _ = hooks.begin(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ, parent.of_environment(os.environ)
    )
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


def _status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)  # as Python does
    return 1


if __name__ == "__main__":
    main(*sys.argv[1:])

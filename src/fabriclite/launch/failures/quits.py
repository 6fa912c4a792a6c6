"""That a script ended itself with ``sys.exit``: Python tells nobody, and handlers of its end do not learn the status.

The exception that ``sys.exit`` raises here looks around when it is let go of. If it was caught, the code that caught it
is still running; if nobody did, no code is left.
"""

import sys
import threading
from typing import Any, Final, NoReturn

_uncaught: Final[list[SystemExit]] = []


class _Quit(SystemExit):
    __module__, __qualname__ = "builtins", "SystemExit"  # what tracebacks and pickles know it as

    def __del__(self) -> None:
        in_main = not sys.is_finalizing() and threading.current_thread() is threading.main_thread()
        if in_main and sys._getframe().f_back is None:
            _uncaught.append(self)


def listen() -> None:
    """From now on. A script that raises ``SystemExit`` by itself is not heard."""
    sys.exit = _exit


def heard() -> SystemExit | None:
    """What ends the process, once nothing of the script is left to run."""
    return _uncaught[-1] if _uncaught else None


def _exit(status: Any = None, /) -> NoReturn:
    raise _Quit(status) if status is not None else _Quit()


def status_of(error: SystemExit) -> int:
    """The exit status that Python makes of it."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    return 1

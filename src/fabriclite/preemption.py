"""Stopping when the machine is taken away: all ranks at the same step, with a checkpoint and a status that says so."""

import atexit
import sys
from collections.abc import Sequence
from datetime import timedelta
from signal import Signals
from types import TracebackType
from typing import ClassVar, Final, NoReturn, Self, final

from fabriclite.agreement import Agreement
from fabriclite.checkpoint.saving import wait_for_all
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.launch.requeue import Requeue, requeue
from fabriclite.launch.signals import ENDING, Requests
from fabriclite.world import World


@final
class Preemption:
    """What ``fabric.preemption()`` returns. All ranks make the same calls, once per step::

        if stop.requested():
            fabric.save("runs/step-100", state)
            stop.exit()

    Attributes:
        status: the exit status of a run that stopped because it was asked to: 75, ``EX_TEMPFAIL`` of sysexits.h, a
            failure that passes. Start such a run again, and it goes on.
        signal: what the ranks agreed on; ``None`` as long as nobody was asked.
    """

    status: ClassVar[int] = 75

    def __init__(self, requests: Requests, agreement: Agreement, every: int, again: Requeue | None) -> None:
        self.signal: Signals | None = None
        self._requests = requests
        self._agreement = agreement
        self._every = every
        self._again = again
        self._calls = 0
        _OPEN.add(self)
        atexit.register(self.close)  # before the process group is left, which was registered earlier

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call this, once per step.

        The same call gives the same answer on every rank. What arrives during step ``n`` is sent at its end and known
        at the end of step ``n + 1``, so that no step waits for a message; a world of one knows at once. With
        ``every=k`` only each ``k``-th call looks. Once true it stays so.

        Raises:
            RuntimeError: a rank has gone, or did not come within the strategy's timeout.
        """
        if self.signal is None:
            self._calls += 1
            if self._calls % self._every == 0:
                self.signal = self._requests.named(self._agreement.exchange(self._requests.level))
        return self.signal is not None

    def exit(self) -> NoReturn:
        """End this process with :attr:`status`, after all asynchronous saves. Every rank must call this.

        The ranks end together. With ``requeue=True`` rank 0 has SLURM start the job again before.

        Raises:
            SystemExit: always; what is open is closed on the way.
            SetupOrderError: nobody was asked to stop.
            CheckpointError: an asynchronous save failed.
        """
        if self.signal is None:
            raise SetupOrderError(
                "`exit` must be called after requested() was true, but it was not. Write if stop.requested(): ..."
                " stop.exit(), or sys.exit() to stop for a reason of yours."
            )
        self._requests.answered()
        wait_for_all()
        self._agreement.barrier()  # all is saved: requeueing may end every process
        if self._again is not None and self.signal not in ENDING:
            self._again.run()
        self._agreement.barrier()  # a starter takes the first end for a failure if the others go on
        self._requests.ignore()
        self.close()
        sys.exit(self.status)

    def close(self) -> None:
        """Stop looking, and put back the handlers that were there before. A second call does nothing.

        The end of the process does this by itself.
        """
        if self in _OPEN:
            _OPEN.discard(self)
            atexit.unregister(self.close)
            self._requests.close()
            if getattr(sys, "last_value", None) is None:  # else this rank failed, and the others wait for nothing
                self._agreement.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_OPEN: Final[set[Preemption]] = set()


def close_all() -> None:
    """Close what is open in this process, which may end without the interpreter's own ways."""
    for preemption in list(_OPEN):
        preemption.close()


def watch(world: World, timeout: timedelta, signals: Sequence[int], every: int, again: bool) -> Preemption:
    """Note signals from now on. Every rank must call this.

    Raises:
        ConfigError: a signal cannot be handled, ``every`` is no count, or this is not the main thread.
        SetupOrderError: signals are noted already.
        WorldError: ``again`` is asked for where there is no SLURM.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"`every` must be a whole number of steps of at least 1, but is {every!r}.")
    order = requeue() if again else None
    return Preemption(Requests(signals), Agreement(world, timeout), every, order if world.rank == 0 else None)

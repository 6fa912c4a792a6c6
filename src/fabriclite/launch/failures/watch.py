"""How this process takes part in the failing of its run: one object, which the hooks and the monitor share."""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from shutil import rmtree
from typing import Final, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.launch.failures import judge
from fabriclite.launch.failures.board import Board
from fabriclite.launch.failures.line import LostError, SilentError
from fabriclite.launch.failures.members import Member, look
from fabriclite.launch.failures.outlet import Outlet
from fabriclite.launch.failures.page import page
from fabriclite.launch.failures.record import INTERRUPTED, Failure, Note, Told

Finish = Callable[[], NoReturn]

_CAUSE_S: Final = 2.0
"""How long an error that may follow from another rank's waits for that one to be known, in seconds."""
_GATHER_S: Final = 2.5
"""How long who tells of a failure waits for what the others say."""
_HANDLERS_S: Final = 3.0
"""How long exit handlers of the user's may take once a rank has failed."""
_SWEEP_S: Final = 5.0
"""How long ranks of this machine may take to end by themselves."""
_LINGER_S: Final = 1.0
"""How long a rank that has done its work waits for those of its machine to have as well."""
_LOOK_S: Final = 0.1
GRACE_S: Final = 2.0
"""How long the main thread may take to fail by itself after another rank's failure is known."""


class Watch:
    """The part of one process.

    Args:
        me: this process.
        size: number of ranks.
        outlet: where failures are told for who started this.
        starter_gone: whether the process of ours that started this one has ended.
    """

    def __init__(self, me: Member, size: int, outlet: Outlet, starter_gone: Callable[[], bool] | None = None) -> None:
        self.me = me
        self.size = size
        self.outlet = outlet
        self.starter_gone = starter_gone
        self.roster: Sequence[Member] = ()
        """All ranks in order, once they have met."""
        self.board: Board | None = None
        self.server: TCPStore | None = None
        """The store, where it lives in this process, which is then the last to end."""
        self.finish: Finish | None = None
        """How the process ends that is a rank and a starter as well."""
        self.before_meeting: Callable[[Failure], None] | None = None
        """How others learn of a failure while there is no board."""
        self.closers: list[Callable[[], None]] = []
        """What is open and loses its last lines otherwise; called once, if a failure ends this process."""
        self.exit_handlers = True
        """Whether what ``atexit`` holds is run when this rank fails."""
        self.left = False
        self._known: Failure | None = None
        self._seen: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closing = False

    # -- what happened -------------------------------------------------------------------------------------------------
    def failed(self, error: BaseException) -> NoReturn:
        """Nobody caught ``error`` in the main thread: record it, tell of it, and end."""
        own = judge.failure_of(error, self.me, self.size)
        doing = judge.users_lines(traceback.extract_tb(error.__traceback__))
        first = self._await_cause() if judge.from_peers(error) else None
        self._see_stopped()
        self.close(first or self.claim(own), own, self.note(line=own.line, doing=doing))

    def ended(self, status: int, error: SystemExit) -> NoReturn:
        """The script ended itself with a status other than 0."""
        own = Failure(
            rank=self.me.rank,
            size=self.size,
            host=self.me.host,
            pid=self.me.pid,
            at=time.time(),
            kind="ended",
            line=f"exited with status {status}",
            text=judge.trace(error),
            status=status,
            by=self.me.rank,
        )
        self.close(self.claim(own), own, self.note(line=own.line))

    def noticed(self, first: Failure) -> NoReturn:
        """Another rank has failed, and the main thread does not know: let it fail by itself, else end."""
        doing = "" if first.kind in ("raised", "interrupted") else self.doing()
        self._see_stopped()
        note = self.note(doing=doing)
        self._say(note)
        if self._seen:
            self._text(self._tell(first, None, note), first)  # an agent ends us as soon as one of them has ended
            self._end_stopped()
        time.sleep(GRACE_S)
        self.close(first, None, note)

    def claim(self, failure: Failure) -> Failure:
        """Record ``failure`` as the first; what is recorded as that, which may be another."""
        with self._lock:
            if self._known is None:
                self._known = self._claimed(failure)
            return self._known

    def first(self) -> Failure | None:
        """The first failure of the run, if there was one.

        Raises:
            SilentError, LostError: the store does not answer.
        """
        if self._known is None and self.board is not None:
            self._known = self.board.first()
        return self._known

    def _claimed(self, failure: Failure) -> Failure:
        if self.board is None:
            if self.before_meeting is not None:
                self.before_meeting(failure)
            return failure
        try:
            return self.board.claim(failure)
        except (SilentError, LostError):
            return failure  # each rank for itself

    def _await_cause(self) -> Failure | None:
        deadline = time.monotonic() + _CAUSE_S
        while time.monotonic() < deadline:
            with suppress(SilentError, LostError):
                if (first := self.first()) is not None:
                    return first
            time.sleep(_LOOK_S)
        return None

    # -- the others ----------------------------------------------------------------------------------------------------
    @property
    def peers(self) -> list[Member]:
        """Other ranks whose processes can be seen from here."""
        return [m for m in self.roster if m.place == self.me.place and m.rank != self.me.rank]

    @property
    def is_lowest(self) -> bool:
        """Whether no lower rank of this machine runs."""
        if not self.roster:
            return self.me.rank <= 1  # rank 0, where it started the others, is asked for only when it has gone
        return not any(m.rank < self.me.rank and look(m) == "runs" for m in self.peers)

    def _see_stopped(self) -> None:
        """Stopped ranks say nothing: the lowest says it for them."""
        if self.is_lowest:
            stopped = [m for m in self.peers if look(m) == "stopped"]
            self._seen |= {m.rank: f"stopped (state T), pid {m.pid} on {m.host}" for m in stopped}

    def _end_stopped(self) -> None:
        """They heed no request either."""
        for member in self.peers:
            if member.rank in self._seen and look(member) == "stopped":
                _kill(member)

    def _sweep(self, deadline: float) -> None:
        """Nobody stays behind: what has not ended on this machine in time is ended, by the lowest."""
        if not self.is_lowest:
            return
        while any(look(m) == "runs" for m in self.peers) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        for member in self.peers:
            if look(member) != "gone":
                _kill(member)

    @property
    def lost_starter(self) -> bool:
        """Whether a starter of ours started this process, and has ended, or is a stopped rank that is ended now."""
        halted = any(m.rank in self._seen and m.pid == os.getppid() for m in self.peers)
        return self.starter_gone is not None and (halted or self.starter_gone())

    # -- telling -------------------------------------------------------------------------------------------------------
    def note(self, line: str = "", doing: str = "") -> Note:
        return Note(rank=self.me.rank, host=self.me.host, pid=self.me.pid, line=line, doing=doing, seen=self._seen)

    def doing(self) -> str:
        """The user's lines that the main thread is at."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return judge.users_lines(traceback.extract_stack(frame))

    def _say(self, note: Note) -> None:
        if self.board is not None:
            with suppress(SilentError, LostError):
                self.board.say(note)

    def _tell(self, first: Failure, own: Failure | None, note: Note) -> Told:
        """Tell who started this what is known so far."""
        told = Told(rank=self.me.rank, first=first if self.board is not None else None, own=own, note=note)
        tells = own is None or first.by == self.me.rank
        self.outlet.tell(told, page(first, [note]) if tells or own is None else own.line)
        return told

    def _gather(self) -> list[Note]:
        """What the others say, when all of them have or it took too long."""
        if self.board is None:
            return []
        deadline = time.monotonic() + _GATHER_S
        notes: list[Note] = []
        with suppress(SilentError, LostError):
            while time.monotonic() < deadline:
                notes = [n for n in self.board.notes() if n.rank != self.me.rank]
                silent = {m.rank for m in self.roster} - {n.rank for n in notes} - {self.me.rank}
                silent -= {m.rank for m in self.peers if look(m) != "runs"}
                if not silent - self.board.left(sorted(silent)):
                    break
                time.sleep(_LOOK_S)
        return notes

    def _prints(self, first: Failure) -> bool:
        """Whether it is this process that tells the user: who recorded the failure, unless each recorded for itself."""
        if self.outlet.starter_prints and not self.lost_starter:
            return False
        agreed = self._answers() if self.board is not None else not self.lost_starter
        return first.by == self.me.rank if agreed else self.is_lowest

    def _answers(self) -> bool:
        try:
            return self.board is not None and self.board.first() is not None
        except (SilentError, LostError):
            return False

    # -- ending --------------------------------------------------------------------------------------------------------
    def close(self, first: Failure, own: Failure | None, note: Note) -> NoReturn:
        """End this process because of ``first``; ``own`` is this rank's own failure, if it has one."""
        with self._lock:
            closes, self._closing = not self._closing, True
        if not closes:  # another thread of this process does
            threading.Event().wait()
        if first.by != self.me.rank:
            self._say(note)
        told = self._tell(first, own, note)
        if threading.current_thread() is not threading.main_thread():
            self._end(told, first, threading.Event())
        handled = threading.Event()
        threading.Thread(target=self._end, args=(told, first, handled), daemon=True).start()
        with suppress(BaseException):
            if self.exit_handlers:
                atexit._run_exitfuncs()  # public handlers by the one call there is: `exit` would wait for threads first
        handled.set()
        threading.Event().wait()
        raise AssertionError  # never here

    @property
    def closing(self) -> bool:
        """Whether this process ends because of a failure."""
        return self._closing

    def _end(self, told: Told, first: Failure, handled: threading.Event) -> NoReturn:
        status = first.status if told.own is not None else 1
        try:
            self._last_acts(told, first, handled)
        finally:  # whatever goes wrong there: nobody may wait for this process
            os._exit(INTERRUPTED if first.kind == "interrupted" else status)

    def _last_acts(self, told: Told, first: Failure, handled: threading.Event) -> None:
        begun = time.monotonic()
        text = self._text(told, first)
        self._end_stopped()
        if threading.current_thread() is not threading.main_thread() and told.own is not None:
            handled.wait(max(0.0, begun + _HANDLERS_S - time.monotonic()))
        self.close_what_is_open()
        if self.finish is not None:
            self.finish()
        if self.server is not None:
            self._serve_on(begun + _SWEEP_S)
        self._sweep(begun + _SWEEP_S)
        if self.lost_starter and self.outlet.folder is not None:
            rmtree(self.outlet.folder, ignore_errors=True)
        if text:
            print(f"fabriclite: {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    def close_what_is_open(self) -> None:
        """Call :attr:`closers`, in a thread of their own: one that hangs does not keep this process from its end."""
        closers, self.closers = self.closers, []

        def close() -> None:
            for closer in closers:
                with suppress(Exception):
                    closer()

        if closers:
            thread = threading.Thread(target=close, daemon=True)
            thread.start()
            thread.join(_HANDLERS_S)

    def _text(self, told: Told, first: Failure) -> str:
        """What this process prints: the page, or nothing."""
        if first.by != self.me.rank and not self._prints(first):
            return ""
        notes = [told.note, *self._gather()]
        text = page(first, notes)
        if first.by == self.me.rank:
            self.outlet.tell(told, text)
            self._say(told.note)
        return text if self._prints(first) else ""

    def _serve_on(self, deadline: float) -> None:
        """The others read from the store in this process until they have said that they end."""
        while self.board is not None and time.monotonic() < deadline:
            with suppress(SilentError, LostError):
                said = {note.rank for note in self.board.notes()}
                gone = {m.rank for m in self.peers if look(m) == "gone"}
                if not {m.rank for m in self.roster} - said - gone - {self.me.rank}:
                    break
            time.sleep(_LOOK_S)

    def leave(self) -> bool:
        """The work is done: say so, and wait for others that need us. False if a failure ends us.

        The process that holds the store is needed by all; and a rank of this machine that is stopped, or falls silent
        as it ends, needs somebody to notice.
        """
        if self._closing:
            return False
        self.left = True
        if self.board is None:
            return True
        deadline = time.monotonic() + _LINGER_S
        missing = [m.rank for m in (self.roster if self.server is not None else self.peers) if m.rank != self.me.rank]
        with suppress(SilentError, LostError):
            self.board.leave(self.me.rank)
            while missing:
                missing = sorted(set(missing) - self.board.left(missing))
                stopped = any(m.rank in missing and look(m) == "stopped" for m in self.peers)
                if self.server is None and not stopped and time.monotonic() > deadline:
                    break
                time.sleep(_LOOK_S / 5)
        return not self._closing


def _kill(member: Member) -> None:
    with suppress(OSError):
        os.kill(member.pid, signal.SIGKILL)

"""The thread that looks, twice a second, whether the run still goes on."""

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Final, NoReturn

from fabriclite.launch.failures.line import LostError, SilentError
from fabriclite.launch.failures.members import Member, look
from fabriclite.launch.failures.record import Failure, Kind
from fabriclite.launch.failures.watch import GRACE_S, Watch

_LOOK_S: Final = 0.5
_SURE_LOOKS: Final = 2
"""So many looks after a peer, or the store, was first found gone, the cause is known if it ever will be."""
_BEAT_LOOKS: Final = 4
LONGEST_S: Final = 60.0
"""A machine, or the store, that says nothing for longer has failed, whatever the timeout of collectives."""


class Monitor:
    """Looks, and ends the process through ``watch`` when there is a reason. One a process.

    Args:
        watch: this process's part.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._timeout_s = LONGEST_S
        self._stop = threading.Event()
        self._gone: dict[int, int] = {}
        self._stopped: dict[int, int] = {}
        self._no_answer = 0
        self._looks = 0
        self._beats: list[bytes | None] = []
        self._missed: list[int] = []
        self._signals = _Interrupts()
        threading.Thread(target=self._run, name="fabriclite monitor", daemon=True).start()

    def met(self, timeout_s: float) -> None:
        """The ranks have met: ``watch`` has a board and a roster. Collectives wait at most ``timeout_s`` seconds."""
        self._timeout_s = timeout_s

    def stop(self) -> None:
        self._stop.set()
        self._signals.restore()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._signals.wait(_LOOK_S)
            if self._stop.is_set() or self._watch.closing:
                return
            if self._signals.unheard():
                self._watch.failed(KeyboardInterrupt())
            self._look()
            self._looks += 1

    def _look(self) -> None:
        watch = self._watch
        if watch.lost_starter:
            self._starter_gone()
        if watch.board is None:
            return
        self._look_for_stopped()  # first: the store may be in one of them
        try:
            first = watch.first()
            if first is not None:
                watch.noticed(first)
            self._no_answer = 0
            self._look_at_peers()
            self._look_at_machines()
        except LostError:
            self._lost()
        except SilentError:
            self._no_answer += 1
            if self._no_answer * _LOOK_S > min(self._timeout_s, LONGEST_S):
                self._of_server("silent", f"has not answered for {self._no_answer * _LOOK_S:.0f} s")

    # -- what may be found ---------------------------------------------------------------------------------------------
    def _starter_gone(self) -> NoReturn:
        roster = self._watch.roster
        if roster and os.getppid() != roster[0].pid and look(roster[0]) == "gone":
            time.sleep(_LOOK_S)
            self._end(self._failure(roster[0], "vanished", "ended without a word"))
        me = self._watch.me
        about = Member(rank=-1, host=me.host, place=me.place, pid=me.pid, started="")
        self._end(self._failure(about, "ended", "lost the process that started it"))

    def _look_at_peers(self) -> None:
        for member in self._watch.peers:
            self._gone[member.rank] = self._gone.get(member.rank, 0) + 1 if look(member) == "gone" else 0
            if self._gone[member.rank] > _SURE_LOOKS and not self._has_left(member):
                self._end(self._failure(member, "vanished", "ended without a word"))

    def _look_for_stopped(self) -> None:
        for member in self._watch.peers:
            stopped = look(member) == "stopped"
            self._stopped[member.rank] = self._stopped.get(member.rank, 0) + 1 if stopped else 0
            if self._stopped[member.rank] * _LOOK_S > self._timeout_s:
                line = "was stopped (state T) for longer than collectives wait"
                self._end(self._failure(member, "stopped", line))

    def _has_left(self, member: Member) -> bool:
        assert self._watch.board is not None  # there are no peers before
        return bool(self._watch.board.left([member.rank]))

    def _look_at_machines(self) -> None:
        """Each machine's lowest rank says that it lives; rank 0 listens."""
        watch = self._watch
        places = sorted({member.place for member in watch.roster})
        if len(places) < 2 or self._looks % _BEAT_LOOKS or watch.board is None:
            return
        if watch.is_lowest:
            watch.board.beat(places.index(watch.me.place), self._looks)
        if watch.me.rank != 0:
            return
        beats = watch.board.beats(len(places))
        before = self._beats or beats
        self._missed = [
            missed + 1 if now == then else 0
            for missed, now, then in zip(self._missed or [0] * len(beats), beats, before, strict=True)
        ]
        self._beats = beats
        for place, missed in zip(places, self._missed, strict=True):
            there = [member for member in watch.roster if member.place == place]
            silent_s = missed * _BEAT_LOOKS * _LOOK_S
            if silent_s > min(self._timeout_s, LONGEST_S) and watch.board.left([m.rank for m in there]) == set():
                self._end(self._failure(there[0], "silent", f"and its machine have said nothing for {silent_s:.0f} s"))

    def _lost(self) -> None:
        """The store's process has ended; a rank that serves it ends last unless it was killed."""
        if self._watch.left:
            self.stop()
            return
        self._no_answer += 1
        if self._no_answer > _SURE_LOOKS:
            self._of_server("vanished", "ended without a word")

    def _of_server(self, kind: Kind, line: str) -> None:
        rank_zero = self._watch.roster[0]
        if rank_zero.rank == self._watch.me.rank:
            return  # it is here, or with a starter that is told of elsewhere
        self._end(self._failure(rank_zero, kind, line))

    def _failure(self, of: Member, kind: Kind, line: str) -> Failure:
        return Failure(
            rank=of.rank,
            size=self._watch.size,
            host=of.host,
            pid=of.pid,
            at=time.time(),
            kind=kind,
            line=line,
            by=self._watch.me.rank,
        )

    def _end(self, failure: Failure) -> NoReturn:
        self._watch.noticed(self._watch.claim(failure))


class _Interrupts:
    """Ctrl-C, also while the main thread is in a collective: there Python's own handler cannot run."""

    def __init__(self) -> None:
        self._reads, self._writes = socket.socketpair()
        for end in (self._reads, self._writes):
            end.setblocking(False)
        self._arrived: float | None = None
        self._on = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._on:
            signal.signal(signal.SIGINT, self._hear)
            self._before = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
            if self._before != -1:  # an event loop's: it comes first
                signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._arrived = None
        signal.default_int_handler(number, frame)

    def wait(self, limit_s: float) -> None:
        ready, _, _ = select.select([self._reads], [], [], limit_s)
        if ready:
            with suppress(OSError):
                if signal.SIGINT in self._reads.recv(64):
                    self._arrived = time.monotonic()
                    time.sleep(0.05)  # for the handler, which forgets it

    def unheard(self) -> bool:
        """Whether Ctrl-C came and the main thread has not heard it for the usual grace."""
        return self._arrived is not None and time.monotonic() - self._arrived > GRACE_S

    def restore(self) -> None:
        if self._on and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) == self._hear:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._before == -1:
                signal.set_wakeup_fd(-1)

"""Running this very script again for the other ranks; this process becomes rank 0, and prints what fails."""

import atexit
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Final, NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.launch import command, parent, stores
from fabriclite.launch.environment import become
from fabriclite.launch.environments.own import worker_env
from fabriclite.launch.failures import hooks, outlet, verdict
from fabriclite.launch.failures.members import StoppedTooLong, host, this_process
from fabriclite.launch.failures.record import INTERRUPTED, PREEMPTED
from fabriclite.launch.failures.verdict import Exit
from fabriclite.launch.failures.watch import Watch
from fabriclite.launch.local import threads_each

_GRACE_S: Final = 4.0
"""How long ranks may take to end by themselves after another one failed, in seconds."""
_LOOK_S: Final = 0.1


def rerun_script(size: int, timeout: timedelta) -> None:
    """Start this very command again for ranks 1 and up; this process becomes rank 0.

    The children live no longer than this process. If one fails, this process ends too, and prints the first failure.

    Args:
        size: number of ranks.
        timeout: a child that is stopped for longer has failed.
    """
    store = stores.serve(size=size)
    folder = Path(tempfile.mkdtemp(prefix="fabriclite-"))  # mode 0700
    common = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_each(size))),
        parent.KEY: str(os.getpid()),
        outlet.FOLDER: str(folder),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_each(size))
    program = command.parse(sys.orig_argv)
    again = [sys.executable, *sys.orig_argv[1:]]
    line = again if program is None else program.as_rank(sys.executable, bool(sys.flags.safe_path))
    envs = [{**os.environ, **common, **worker_env(rank, size, store.port)} for rank in range(1, size)]
    become({**worker_env(0, size, store.port), outlet.FOLDER: str(folder)})
    watch, _ = hooks.begin(0, size, os.environ)
    _Starter(watch, _started(line, envs), folder, store, timeout)


def _started(line: Sequence[str], envs: Sequence[Mapping[str, str]]) -> "list[subprocess.Popen[bytes]]":
    return [subprocess.Popen(line, env=dict(env)) for env in envs]


class _Starter:
    """What rank 0 does for its children."""

    def __init__(
        self,
        watch: Watch,
        children: "list[subprocess.Popen[bytes]]",
        folder: Path,
        store: TCPStore,
        timeout: timedelta,
    ) -> None:
        self._watch = watch
        self._children = children
        self._folder = folder
        self._store = store  # lives as long as this
        self._timeout = timeout
        self._exits: dict[int, Exit] = {}
        self._members = [this_process(rank, child.pid) for rank, child in enumerate(children, start=1)]
        self._lock = threading.Lock()
        watch.finish = self._finish
        threading.Thread(target=self._follow, name="fabriclite starter", daemon=True).start()
        atexit.register(self._reap)  # runs after the process group is left, which registers later

    def _follow(self) -> None:
        """End this process soon after a child failed: it may be waiting in a collective for that child."""
        patience = StoppedTooLong(self._timeout)
        while not self._watch.closing:
            self._poll(by_us=False)
            if any(e.status not in (0, PREEMPTED) for e in self._exits.values()):
                self._finish_soon()
            for member, why in patience.look(self._members):
                self._children[member.rank - 1].kill()
                self._children[member.rank - 1].wait()
                self._poll(by_us=False, why=why)
            time.sleep(_LOOK_S)

    def _poll(self, by_us: bool, why: str = "") -> None:
        with self._lock:
            for rank, child in enumerate(self._children, start=1):
                if rank not in self._exits and child.poll() is not None:
                    self._exits[rank] = Exit(rank, child.pid, child.returncode, time.time(), by_us, why)

    def _finish_soon(self) -> NoReturn:
        """A child failed; our own part, if it still works, is given the time to say what it was doing."""
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not self._watch.closing:
            time.sleep(_LOOK_S)
        if self._watch.closing:
            threading.Event().wait()  # it comes to `_finish` by itself
        self._finish()

    def _finish(self) -> NoReturn:
        """The last act of this process after a failure."""
        status = 1
        try:
            self._watch.close_what_is_open()
            self._end_children()
            found = verdict.judge(outlet.read(self._folder), list(self._exits.values()), host(), self._watch.size)
            rmtree(self._folder, ignore_errors=True)
            if found is not None:
                status = INTERRUPTED if found.first.kind == "interrupted" else found.status
                print(f"{'' if status == INTERRUPTED else chr(10)}fabriclite: {found.text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whatever goes wrong there: nobody may wait for this process
            os._exit(status)

    def _end_children(self) -> None:
        """They end by themselves, or are ended."""
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and len(self._exits) < len(self._children):
            self._poll(by_us=False)
            time.sleep(_LOOK_S / 2)
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        self._poll(by_us=True)

    def _reap(self) -> None:
        """Wait for the children at the end of this process. They may have more to do than this one."""
        if self._watch.closing:
            return
        while len(self._exits) < len(self._children):  # `_follow` polls, and ends this process if one fails
            time.sleep(_LOOK_S)
        if any(e.status not in (0, PREEMPTED) for e in self._exits.values()):
            threading.Event().wait()
        rmtree(self._folder, ignore_errors=True)
        if any(e.status == PREEMPTED for e in self._exits.values()):
            sys.stdout.flush()
            os._exit(PREEMPTED)

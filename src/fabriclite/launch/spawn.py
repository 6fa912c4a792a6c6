"""Running a function in new processes: for notebooks, tests, and whoever asks for it."""

import gc
import multiprocessing as mp
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.errors import ConfigError, LaunchError
from fabriclite.launch import parent, stores
from fabriclite.launch.environment import become
from fabriclite.launch.environments.own import worker_env
from fabriclite.launch.failures import hooks, outlet, quits, verdict
from fabriclite.launch.failures.members import StoppedTooLong, host, this_process
from fabriclite.launch.failures.record import PREEMPTED
from fabriclite.launch.failures.verdict import Exit
from fabriclite.launch.local import private_folder, threads_each
from fabriclite.launch.private import Private
from fabriclite.launch.process_group import leave

PRELOAD: Final = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fabriclite"]
"""What the fork server imports, once, before it starts ranks. A program that starts many worlds may add to it."""
_GRACE_S: Final = 6.0
"""How long ranks may take to end by themselves after another one failed, in seconds."""
_LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Usual:
    """What a rank does as it would in a script.

    Attributes:
        threads: CPU threads of one operation.
        start_method: how data-loading workers start; multiprocessing would go on with the rank's own. ``None`` is the
            platform's default.
    """

    threads: int
    start_method: str | None


def run_function(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    method: str,
    timeout: timedelta,
) -> Any:
    """Run ``function(*args, **kwargs)`` in ``size`` new processes and return what rank 0 returned.

    Args:
        function: picklable unless ``method`` is ``"fork"``.
        args: positional arguments.
        kwargs: keyword arguments.
        size: number of processes.
        method: ``"fork"``, ``"spawn"`` or ``"forkserver"``.
        timeout: a rank that is stopped for longer has failed.

    Raises:
        ConfigError: function or arguments cannot be pickled, and must be.
        LaunchError: a process failed; the message has the traceback of the first one that did.
        SystemExit: with status 75: the ranks saved, and want to be started again.
    """
    with private_folder() as folder:
        ranks = _Ranks(stores.serve(size=size), StoppedTooLong(timeout))
        try:
            ranks.start(Private((function, args, dict(kwargs))), size, method, folder)
            result = ranks.result()
        finally:  # this process may have been interrupted, or ranks do not end
            ranks.end()
        exits = ranks.exits
        del ranks  # a traceback would keep its store, and a process forked later hang in that one's destructor
        found = verdict.judge(outlet.read(folder), exits, host(), size)
    if found is not None:
        raise LaunchError(found.text)
    if any(ended.status == PREEMPTED for ended in exits):
        raise SystemExit(PREEMPTED)
    return result


class _Ranks:
    """The processes, seen from the one that started them."""

    def __init__(self, store: TCPStore, patience: StoppedTooLong) -> None:
        self._store = store  # lives as long as this
        self._patience = patience
        self._processes: list[Any] = []
        self._readers: list[Connection] = []
        self.exits: list[Exit] = []

    def start(self, work: Private, size: int, method: str, folder: Path) -> None:
        context: Any = mp.get_context(method)  # typeshed knows Process only on the concrete contexts
        if method == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        usual = _Usual(threads_each(size), mp.get_start_method(allow_none=True))
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            env = {**worker_env(rank, size, self._store.port), outlet.FOLDER: str(folder)}
            process = context.Process(target=_work, args=(writer, rank, size, env, usual, work), daemon=False)
            _start(process, method)
            writer.close()
            self._readers.append(reader)
            self._processes.append(process)

    def result(self) -> Any:
        """What rank 0 returned, once all have ended. After the first failure the others get a grace period."""
        result: Any = None
        sending = {reader: rank for rank, reader in enumerate(self._readers)}
        running = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        deadline: float | None = None  # None: nobody has failed
        while running and (deadline is None or time.monotonic() < deadline):
            for ready in wait([*sending, *running], timeout=_LOOK_S):
                if ready in sending:
                    rank = sending.pop(ready)
                    message = _received(ready)
                    result = pickle.loads(message) if rank == 0 and message else result
                elif not self._ended(running.pop(ready), by_us=False) and deadline is None:
                    deadline = time.monotonic() + _GRACE_S
            # Whoever reported has nothing left to do but to leave its process group, which gloo sometimes never ends.
            if not sending and deadline is None:
                deadline = time.monotonic() + _GRACE_S
            self._end_stopped([rank for rank in running.values()])
        return result

    def _end_stopped(self, ranks: Sequence[int]) -> None:
        members = [this_process(rank, self._processes[rank].pid) for rank in ranks]
        for member, why in self._patience.look(members):
            self._processes[member.rank].kill()
            self._ended(member.rank, by_us=False, why=why)

    def _ended(self, rank: int, by_us: bool, why: str = "") -> bool:
        """Take down how a process that has ended did; whether it did well."""
        process = self._processes[rank]
        process.join()
        if rank not in {ended.rank for ended in self.exits}:
            self.exits.append(Exit(rank, process.pid, process.exitcode, time.time(), by_us, why))
        return process.exitcode in (0, PREEMPTED)

    def end(self) -> None:
        """Nobody stays."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for rank in range(len(self._processes)):
            self._ended(rank, by_us=True)


def _start(process: Any, method: str) -> None:
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # before the process exists
        raise ConfigError(
            f"What `launch` gets must be picklable with start_method {method!r}, but is not: {error}. Define the"
            " function at the top level of a file, or use start_method 'fork'."
        ) from error


def _received(reader: Connection) -> bytes | None:
    try:
        return reader.recv_bytes()
    except EOFError:  # it failed: what it says of that is in the folder
        return None


def _work(writer: Connection, rank: int, size: int, env: dict[str, str], usual: _Usual, work: Private) -> None:
    gc.freeze()  # a forked process must not run destructors of what its parent left: their threads are not here
    become(env)
    torch.set_num_threads(usual.threads)
    mp.set_start_method(usual.start_method, force=True)
    watch, _ = hooks.begin(rank, size, os.environ, parent.of_multiprocessing(mp.parent_process()))
    watch.exit_handlers = False  # a forked process has its parent's
    function, args, kwargs = work.value
    try:
        message = _pickled(rank, function(*args, **kwargs))
    except SystemExit as error:
        if error.code == PREEMPTED:
            leave()
            os._exit(PREEMPTED)
        watch.ended(quits.status_of(error) or 1, error)
    except BaseException as error:  # a rank must report whatever ended it, CheckpointException included
        watch.failed(error)
    writer.send_bytes(message)
    leave()


def _pickled(rank: int, value: Any) -> bytes:
    """Plain pickling: multiprocessing would pass tensors as shared memory, which goes when this process does."""
    try:
        return pickle.dumps(value if rank == 0 else None)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"What a launched function returns on rank 0 must be picklable, but it returned {type(value).__name__}:"
            f" {error}. Return plain values or tensors."
        ) from error

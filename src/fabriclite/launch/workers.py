"""Starting the other processes of this machine when no launcher did."""

import atexit
import copyreg
import gc
import io
import multiprocessing as mp
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.errors import ConfigError, LaunchError
from fabriclite.launch import parent
from fabriclite.launch.environment import become
from fabriclite.launch.environments.own import worker_env
from fabriclite.launch.process_group import leave
from fabriclite.launch.store import serve_store

_GRACE_S: Final = 10.0
"""How long ranks may take to end by themselves after another one failed, in seconds."""
_HEAD_START_S: Final = 1.0
"""How much earlier than noticed a rank may have ended that could not say so: the others fail at once, in seconds."""
PRELOAD: Final = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fabriclite"]
"""What the fork server imports, once, before it starts ranks. A program that starts many worlds may add to it."""


def threads_each(size: int) -> int:
    """CPU threads per process such that all of them share the machine."""
    return max(1, len(os.sched_getaffinity(0)) // size) if hasattr(os, "sched_getaffinity") else 1


# -- re-running the script ---------------------------------------------------------------------------------------------


def rerun_script(size: int) -> "list[subprocess.Popen[bytes]]":
    """Start this very command again for ranks 1 and up; this process becomes rank 0.

    The children live no longer than this process, and if one fails this process ends too, with status 1.
    """
    store = serve_store(size)
    common = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_each(size))),
        parent.KEY: str(os.getpid()),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    children = [
        subprocess.Popen(command, env={**os.environ, **common, **worker_env(rank, size, store.port)})
        for rank in range(1, size)
    ]
    become(worker_env(0, size, store.port))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_each(size))
    threading.Thread(target=_watch, args=(children, store), daemon=True).start()
    atexit.register(_reap, children)  # runs after the process group is left, which registers later
    return children


def _watch(children: "list[subprocess.Popen[bytes]]", store: TCPStore) -> None:
    """End this process soon after a child failed: it may be waiting in a collective for that child."""
    while True:
        codes = [child.poll() for child in children]
        failed = [(rank, code) for rank, code in enumerate(codes, start=1) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return
        time.sleep(0.2)
    time.sleep(_GRACE_S / 2)  # our own exception, if there is one, says more
    rank, code = failed[0]
    print(f"fabriclite: rank {rank} ended with exit status {code}; ending all ranks.", file=sys.stderr, flush=True)
    for child in children:
        child.terminate()
    os._exit(1)


def _reap(children: "list[subprocess.Popen[bytes]]") -> None:
    """Wait for the children at the end of this process; a failed one makes this one fail with its status.

    They may have more to do than this one, and take their time, unless this one failed.
    """
    failed = getattr(sys, "last_value", None) is not None
    deadline = time.monotonic() + _GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()) if failed else None)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
    codes = [child.returncode for child in children if child.returncode]
    if codes:
        sys.stdout.flush()
        os._exit(max(1, codes[0]))  # a signal's number is negative


# -- running a function ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outcome:
    rank: int
    at: float
    value: Any
    error: str | None


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


class _Private:
    """What a process gets as its own. Torch has multiprocessing pass tensors as memory that all processes share: ranks
    would write into each other's arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        box = io.BytesIO()
        pickler = pickle.Pickler(box)
        reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # queues and locks still need theirs
        own = {cls: how for cls, how in reducers.items() if not cls.__module__.startswith("torch")}
        pickler.dispatch_table = {**copyreg.dispatch_table, **own}
        pickler.dump(self.value)
        return _Private._restore, (box.getvalue(),)

    @staticmethod
    def _restore(data: bytes) -> "_Private":
        return _Private(pickle.loads(data))


def run_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, method: str
) -> Any:
    """Run ``function(*args, **kwargs)`` in ``size`` new processes and return what rank 0 returned.

    Args:
        function: picklable unless ``method`` is ``"fork"``.
        args: positional arguments.
        kwargs: keyword arguments.
        size: number of processes.
        method: ``"fork"``, ``"spawn"`` or ``"forkserver"``.

    Raises:
        ConfigError: function or arguments cannot be pickled, and must be.
        LaunchError: a process failed; the message is the traceback of the first one that did.
    """
    outcomes = _outcomes(_Private((function, args, dict(kwargs))), size, method)
    failures = sorted((o for o in outcomes if o.error is not None), key=lambda o: o.at)
    if failures:
        first, *others = failures
        after = "".join(f"\nThen rank {o.rank}: {(o.error or '').strip().splitlines()[-1][:200]}" for o in others)
        raise LaunchError(f"Rank {first.rank} of {size} failed:\n\n{first.error}{after}")
    return next(o.value for o in outcomes if o.rank == 0)


def _outcomes(work: _Private, size: int, method: str) -> list[_Outcome]:
    context: Any = mp.get_context(method)  # typeshed knows Process only on the concrete contexts
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    usual = _Usual(threads_each(size), mp.get_start_method(allow_none=True))
    store = serve_store(size)
    readers: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            env = worker_env(rank, size, store.port)
            process = context.Process(target=_work, args=(writer, rank, env, usual, work), daemon=False)
            _start(process, method)
            writer.close()
            readers.append(reader)
            processes.append(process)
        return _collect(readers, processes)
    finally:
        for process in processes:
            if process.is_alive():  # this process was interrupted
                process.kill()
        del store  # a traceback would keep it, and a process forked later hang in its destructor


def _start(process: Any, method: str) -> None:
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # before the process exists
        raise ConfigError(
            f"What `launch` gets must be picklable with start_method {method!r}, but is not: {error}. Define the"
            " function at the top level of a file, or use start_method 'fork'."
        ) from error


def _work(writer: Connection, rank: int, env: dict[str, str], usual: _Usual, work: _Private) -> None:
    gc.freeze()  # a forked process must not run destructors of what its parent left: their threads are not here
    become(env)
    torch.set_num_threads(usual.threads)
    mp.set_start_method(usual.start_method, force=True)
    parent.end_with(mp.parent_process())
    function, args, kwargs = work.value
    try:
        value, error = function(*args, **kwargs), None
    except BaseException:  # a rank must report whatever ended it, SystemExit and CheckpointException included
        value, error = None, traceback.format_exc()
    _send(writer, _Outcome(rank, time.time(), value if rank == 0 else None, error))
    if error is None:
        leave()
    else:
        writer.close()
        sys.stdout.flush()
        os._exit(1)  # a group in an error state may block its own destruction


def _send(writer: Connection, outcome: _Outcome) -> None:
    """Plain pickling: multiprocessing would pass tensors as shared memory, which goes when this process does."""
    try:
        message = pickle.dumps(outcome)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = f"Rank {outcome.rank} returned {type(outcome.value).__name__}, which must be picklable: {error}"
        message = pickle.dumps(_Outcome(outcome.rank, outcome.at, None, reason))
    writer.send_bytes(message)


def _collect(readers: list[Connection], processes: list[Any]) -> list[_Outcome]:
    """One outcome per rank. After the first failure the others get a grace period, then they are ended."""
    waiting = dict(zip(readers, range(len(readers)), strict=True))
    outcomes: list[_Outcome] = []
    deadline: float | None = None  # None: nobody has failed
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), timeout=left)
        if not ready:
            break
        for reader in ready:
            rank = waiting.pop(reader)  # type: ignore[call-overload]
            outcome = _receive(reader, rank, processes[rank])  # type: ignore[arg-type]
            outcomes.append(outcome)
            if outcome.error is not None and deadline is None:
                deadline = time.monotonic() + _GRACE_S
    # Whoever reported has nothing left to do but to leave its process group, which gloo sometimes never finishes.
    last = time.monotonic() + _GRACE_S if deadline is None else deadline
    for process in processes:
        process.join(max(0.1, last - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return outcomes


def _receive(reader: Connection, rank: int, process: Any) -> _Outcome:
    try:
        return pickle.loads(reader.recv_bytes())  # type: ignore[no-any-return]  # from a process of our own
    except EOFError:
        at = time.time() - _HEAD_START_S
        process.join(_GRACE_S)
        return _Outcome(rank, at, None, f"Rank {rank} ended without a word, exit status {process.exitcode}.")

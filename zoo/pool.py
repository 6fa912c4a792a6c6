"""Runs trials in worker processes, so that a crash or a hang costs one model."""

import multiprocessing as mp
import queue
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from zoo.entry import Entry
from zoo.trial import Outcome, Verdict
from zoo.worker import serve

CHUNK = 80
"""Trials of one process. A fresh one then forgets the modules that were imported."""


def trials(entries: Sequence[Entry], jobs: int, timeout: float) -> Iterator[tuple[Entry, Outcome]]:
    """The outcomes, as they come."""
    todo: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Entry, Outcome]] = queue.SimpleQueue()
    for entry in entries:
        todo.put(entry)
    for _ in range(jobs):
        threading.Thread(target=_work, args=(todo, done, timeout), daemon=True).start()
    for _ in entries:
        yield done.get()


def _work(todo: "queue.SimpleQueue[Entry]", done: "queue.SimpleQueue[tuple[Entry, Outcome]]", timeout: float) -> None:
    worker: Worker | None = None
    while True:
        try:
            entry = todo.get_nowait()
        except queue.Empty:
            break
        worker = worker if worker is not None and worker.fresh else Worker(after=worker)
        done.put((entry, worker.run(entry, timeout)))
    if worker is not None:
        worker.close()


class Worker:
    """One process that runs trials, one at a time."""

    def __init__(self, after: "Worker | None" = None) -> None:
        if after is not None:
            after.close()
        context = mp.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._trials = 0

    @property
    def fresh(self) -> bool:
        """Whether it can take another trial."""
        return self._process.is_alive() and self._trials < CHUNK

    def run(self, entry: Entry, timeout: float) -> Outcome:
        """The outcome, also where the process dies of it or does not come back."""
        self._trials += 1
        try:
            self._connection.send(entry)
            if self._connection.poll(timeout):
                outcome: Outcome = self._connection.recv()
                return outcome
            reason = f"no answer within {timeout:.0f} s"
        except (EOFError, OSError):
            self._process.join(timeout=10)
            reason = f"the process ended with code {self._process.exitcode}"
        self._process.kill()
        self._process.join(timeout=10)
        return Outcome(Verdict.ERROR, (reason,))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()

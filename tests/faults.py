"""Faults that are real: a process that is killed at a step of its work, a disk that is full, bytes that were changed.

Nothing is replaced by a stand-in. A process counts what it does to files below a folder, and sends itself SIGKILL right
before one of these steps (in the middle of it, if that is a write).
"""

import io
import multiprocessing as mp
import os
import pickle
import signal
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from fabriclite import Fabric, FSDPStrategy, LaunchError
from fabriclite.collectives import gather_objects
from fabriclite.shards import local

PATIENCE_S = 20
"""How long a rank waits for one that is gone."""
LIMIT_S = 60
"""How long anything may take before it counts as hanging."""

# -- steps of a process ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a process is about to do to a file.

    Attributes:
        act: ``"open"`` for writing, ``"write"``, ``"sync"``, ``"rename"``, ``"remove"``, ``"mkdir"`` or ``"link"``.
        path: below the folder that is looked at.
        to: the new name, for a rename.
    """

    act: str
    path: str
    to: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.act, self.path, self.to)))


_ACTS = {"os.remove": "remove", "os.rmdir": "remove", "os.mkdir": "mkdir"}


class _Watch:
    def __init__(self, folder: Path, note: Callable[[Step], bool]) -> None:
        self.root = f"{folder.resolve()}{os.sep}"
        self._note = note
        self._inside = False

    def wants_death(self, act: str, path: str, to: str = "") -> bool:
        if self._inside or not f"{path}{os.sep}".startswith(self.root):
            return False
        self._inside = True  # what is done in here is no step
        try:
            return self._note(Step(act, path.removeprefix(self.root), to.removeprefix(self.root)))
        finally:
            self._inside = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Of ``sys.addaudithook``, which python calls before it does these."""
        dies = False
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            dies = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR)) and self.wants_death("open", _absolute(args[0]))
        elif event == "os.symlink":
            dies = self.wants_death("link", _absolute(args[1], args[2]))
        elif event == "os.rename":
            dies = self.wants_death("rename", _absolute(args[0], args[2]), _absolute(args[1], args[3]))
        elif event in _ACTS:
            dies = self.wants_death(_ACTS[event], _absolute(args[0], args[-1]))
        if dies:
            die()


def watch(folder: Path, note: Callable[[Step], bool]) -> None:
    """Call ``note`` before each step below ``folder``; where it says so, this process is killed. Cannot be undone.

    Steps of all threads count. Of a write that is not done for this reason, the first half is.
    """
    watching = _Watch(folder, note)
    fsync, opened = os.fsync, io.open

    def sync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if watching.wants_death("sync", os.readlink(f"/proc/self/fd/{number}")):
            die()
        fsync(handle)

    class Noted(io.BufferedWriter):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            if watching.wants_death("write", _absolute(self.raw.name)):
                super().write(view[: len(view) // 2])
                super().flush()
                die()
            return super().write(view)

    def open_noted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and _absolute(file).startswith(watching.root):
            return Noted(io.FileIO(file, mode))
        return opened(file, mode, *args, **kwargs)

    sys.addaudithook(watching.hook)
    os.fsync, io.open = sync, open_noted  # type: ignore[assignment]


def _absolute(path: Any, folder: int = -1) -> str:
    text = os.fsdecode(path)
    return text if os.path.isabs(text) or folder < 0 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit status; minus the number of the signal that killed it.
        value: what its function returned.
        error: the traceback of what its function raised.
    """

    code: int | None
    value: Any = None
    error: str | None = None


class Nursery:
    """A process from which others are forked in hundredths of a second: all that they import is there already."""

    def __init__(self) -> None:
        context = mp.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def child(self, function: Callable[..., Any], *args: Any) -> Ended:
        """Run ``function(*args)`` in one new process."""
        return self._call(_child, function, args)

    def world(self, size: int, function: Callable[..., Any], *args: Any) -> Ended:
        """Run ``function(fabric, *args)`` on ``size`` ranks with FSDP. ``code`` is 1 if one of them failed."""
        if size == 1:  # `launch` starts none for it
            ended = self._call(_child, _world, (size, function, args))
            return ended.value or ended
        return self._call(_world, size, function, args)

    def _call(self, act: Callable[..., Ended], *args: Any) -> Ended:
        self._pipe.send((act, args))
        if not self._pipe.poll(LIMIT_S):
            self.close()
            self.__init__()  # type: ignore[misc]
            raise AssertionError(f"{args[:2]} hangs: it took more than {LIMIT_S} s")
        ended: Ended = pickle.loads(self._pipe.recv_bytes())
        return ended

    def close(self) -> None:
        """End it and all that it started."""
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()


def _serve(pipe: Any) -> None:
    os.setsid()
    import torch._dynamo  # FSDP does, and it takes seconds
    import torch.distributed.checkpoint

    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            act, args = pipe.recv()
            try:
                ended = act(*args)
            except Exception:
                ended = Ended(None, None, traceback.format_exc())
            pipe.send_bytes(pickle.dumps(ended))


def _child(function: Callable[..., Any], args: tuple[Any, ...]) -> Ended:
    context = mp.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, args))
    process.start()
    theirs.close()
    value, error = None, None
    with suppress(EOFError):
        value, error = pickle.loads(mine.recv_bytes())
    process.join()
    return Ended(process.exitcode, value, error)


def _run(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        outcome = function(*args), None
    except BaseException:
        outcome = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(outcome))  # torch has `send` pass tensors as memory, which goes with this process
    pipe.close()


def _world(size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Ended:
    strategy = FSDPStrategy(start_method="fork", timeout=timedelta(seconds=PATIENCE_S))
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=size)
    try:
        return Ended(0, fabric.launch(function, *args))
    except LaunchError as error:
        return Ended(1, None, str(error))


def everywhere(fabric: Fabric, value: Any) -> list[Any]:
    """``value`` of every rank."""
    return gather_objects(fabric._running.world, value)


def told(fabric: Fabric, act: Callable[[], Any]) -> list[str | None]:
    """What each rank was told by the error that ``act`` raised there, with its class."""
    found = None
    try:
        act()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return everywhere(fabric, found)


# -- what is saved -----------------------------------------------------------------------------------------------------


def alone() -> Fabric:
    """One process, without a process group."""
    return Fabric(accelerator="cpu", devices=1)


def state(fabric: Fabric, seed: int, width: int = 6, layers: int = 2, kind: str = "adamw") -> dict[str, Any]:
    """A model, an optimizer that stepped once, and a number: others for each seed."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(4, width), *(nn.Linear(width, 2) if i == 0 else nn.Linear(2, 2) for i in range(layers - 1))
    )
    made = AdamW(module.parameters()) if kind == "adamw" else SGD(module.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(module, made)
    fabric.backward(model(torch.randn(2, 4)).sum(), model=model)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "step": seed}


class Slow:
    """What takes until ``ready()`` to be written, but no longer than some seconds."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.ready = ready

    def __deepcopy__(self, memo: Any) -> "Slow":
        return self

    def __reduce__(self) -> Any:
        end = time.monotonic() + 10
        while not self.ready() and time.monotonic() < end:
            time.sleep(0.01)
        return OrderedDict, ()


def copied(tree: Any) -> Any:
    """The same with copies of all tensors, of sharded ones this rank's part."""
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copied(value) for value in tree]
    return local(tree).detach().clone() if isinstance(tree, Tensor) else tree


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the last bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other)))
    return type(one) is type(other) and bool(one == other)

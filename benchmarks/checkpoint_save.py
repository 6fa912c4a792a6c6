"""Who is compared in saving, by `checkpoint.py`."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from checkpoint_load import fabric_of, lightning_of
from checkpoint_model import Shape, fill, local, sharded, with_memory, without_memory
from checkpoint_ranks import Job, Method
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

OUT: Final = "saved"
"""What the contenders write."""
State = dict[str, Any]


def _saved(files: Path) -> Path:
    files.mkdir(parents=True, exist_ok=True)
    return files / OUT


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- what is saved -----------------------------------------------------------------------------------------------------


def _stepped(optimizer: Optimizer) -> None:
    """Give an optimizer the state that a step leaves behind."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = param.detach()
    optimizer.step()
    for param in params:
        param.grad = None


def plain(job: Job, optimized: bool) -> Callable[[Shape], State]:
    """A model, and its AdamW, without any front end."""

    def build(shape: Shape) -> State:
        model = with_memory(shape, job.device) if job.world == 1 else _by_hand(job, shape)
        fill(model)
        if not optimized:
            return {"model": model}
        optimizer = AdamW(model.parameters(), lr=1e-4)
        _stepped(optimizer)
        return {"model": model, "optimizer": optimizer}

    return build


def _by_hand(job: Job, shape: Shape) -> nn.Module:
    return sharded(without_memory(shape), job.device, job.world).to_empty(device=job.device)


def set_up(job: Job, fabric: Any, optimized: bool) -> Callable[[Shape], State]:
    """The same, through a front end."""

    def build(shape: Shape) -> State:
        model = with_memory(shape, job.device)
        if optimized:
            model, optimizer = fabric.setup(model, AdamW(model.parameters(), lr=1e-4))
            fill(model)
            _stepped(getattr(optimizer, "optimizer", optimizer))
            return {"model": model, "optimizer": optimizer}
        model = fabric.setup(model)
        fill(model)
        return {"model": model}

    return build


def _states(state: State) -> State:
    return {name: value.state_dict() for name, value in state.items()}


# -- how ---------------------------------------------------------------------------------------------------------------


def fabriclite(form: str, asynchronous: bool = False) -> Callable[[Job], Method]:
    """``fabric.save``."""

    def prepare(job: Job) -> Method:
        fabric, handles = fabric_of(job), []

        def act(state: State, files: Path) -> None:
            handles.append(fabric.save(_saved(files), state, format=form, asynchronous=asynchronous))

        def after() -> None:
            handle = handles.pop()
            if handle is not None:
                handle.wait()

        return Method(set_up(job, fabric, _optimized(job)), act, after)

    return prepare


def torch_save(synced: bool) -> Callable[[Job], Method]:
    """``torch.save``, and ``fsync`` behind it or not."""

    def prepare(job: Job) -> Method:
        def act(state: State, files: Path) -> None:
            path = _saved(files)
            torch.save(_states(state), path)
            if synced:
                _sync(path)
                _sync(path.parent)

        return Method(plain(job, _optimized(job)), act)

    return prepare


def dcp(job: Job) -> Method:
    """``torch.distributed.checkpoint.save``, which syncs its files."""
    from torch.distributed.checkpoint import save

    def act(state: State, files: Path) -> None:
        save(_states(state), checkpoint_id=_saved(files), no_dist=job.world == 1)

    return Method(plain(job, _optimized(job)), act)


def dcp_async(job: Job) -> Method:
    """``torch.distributed.checkpoint.async_save``."""
    from torch.distributed.checkpoint import async_save

    handles: list[Future[Any]] = []

    def act(state: State, files: Path) -> None:
        handles.append(async_save(_states(state), checkpoint_id=_saved(files), no_dist=job.world == 1))

    return Method(plain(job, False), act, lambda: handles.pop().result())


def lightning(job: Job) -> Method:
    """Lightning Fabric's ``save``, which syncs nothing."""
    fabric = lightning_of(job)

    def act(state: State, files: Path) -> None:
        fabric.save(_saved(files), state)

    return Method(set_up(job, fabric, _optimized(job)), act)


def host_copy(job: Job) -> Method:
    """What an asynchronous save cannot do without: a copy of every parameter of this rank on the host."""
    kept: list[Tensor] = []

    def act(state: State, files: Path) -> None:
        kept.extend(local(param).to("cpu", copy=True) for param in state["model"].parameters())

    return Method(plain(job, False), act, kept.clear)


def fabriclite_export(job: Job) -> Method:
    """``fabric.save(format="safetensors")``."""
    return fabriclite("safetensors")(job)


def save_file(synced: bool) -> Callable[[Job], Method]:
    """``safetensors.torch.save_file``, and ``fsync`` behind it or not."""

    def prepare(job: Job) -> Method:
        from safetensors.torch import save_file

        def act(state: State, files: Path) -> None:
            path = _saved(files)
            save_file(state["model"].state_dict(), path, metadata={"format": "pt"})
            if synced:
                _sync(path)
                _sync(path.parent)

        return Method(plain(job, False), act)

    return prepare


def _optimized(job: Job) -> bool:
    return job.method.endswith("+ AdamW")


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of saving.

    Attributes:
        prepare: does what comes before, once in every process.
        needs: packages.
        synced: whether all is on the disk when it returns, or when what goes on beside it has ended.
        peer: whether it gives a checkpoint, and is not one of ours.
    """

    prepare: Callable[[Job], Method]
    needs: tuple[str, ...] = ()
    synced: bool = True
    peer: bool = True
    existing: bool = True

    def runs(self) -> bool:
        return all(find_spec(name) for name in self.needs)

    def check(self, _loaded: None, job: Job) -> None:
        """What was written is looked at when it is whole."""


_KINDS: Final = {
    "fabriclite, folder": Contender(fabriclite("folder"), peer=False),
    "fabriclite, file": Contender(fabriclite("file"), peer=False),
    "torch.save": Contender(torch_save(False), synced=False),
    "torch.save, fsync": Contender(torch_save(True)),
    "dcp": Contender(dcp),
    "lightning_fabric": Contender(lightning, ("lightning_fabric",), synced=False),
}
CONTENDERS: Final = {
    **_KINDS,
    **{f"{name} + AdamW": contender for name, contender in _KINDS.items()},
    "fabriclite, asynchronous": Contender(fabriclite("folder", asynchronous=True), peer=False),
    "host copy": Contender(host_copy, peer=False),
    "dcp, async_save": Contender(dcp_async),
    "fabriclite, export": Contender(fabriclite_export, peer=False),
    "save_file": Contender(save_file(False), ("safetensors",), synced=False),
    "save_file, fsync": Contender(save_file(True), ("safetensors",)),
}
"""By name."""
CASES: Final = {
    "weights": (1, tuple(_KINDS)),
    "weights + AdamW of a third": (1, tuple(f"{name} + AdamW" for name in _KINDS)),
    "fsdp": (2, ("fabriclite, folder", "dcp")),
    "asynchronous": (1, ("fabriclite, asynchronous", "host copy", "dcp, async_save")),
    "asynchronous, fsdp": (2, ("fabriclite, asynchronous", "host copy", "dcp, async_save")),
    "export": (1, ("fabriclite, export", "save_file", "save_file, fsync")),
}
"""By name: processes and contenders, ours first."""

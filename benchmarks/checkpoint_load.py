"""Who is compared in loading, by `checkpoint.py`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch
from checkpoint_model import (
    TINY,
    Shape,
    fill,
    joined,
    llama,
    local,
    ranges,
    sharded,
    shards_of,
    with_memory,
    with_own_buffers,
    without_memory,
    write_pretrained,
)
from checkpoint_ranks import Job, Method
from torch import Tensor, nn

PIECE: Final = 16 << 20
HUB, WEIGHTS = "hub", "weights.pt"
FOLDER, FILE, THEIRS, DCP = "fabriclite", "fabriclite.ckpt", "torch.pt", "dcp"
"""Names of what the contenders read."""


def fabric_of(job: Job) -> Any:
    from fabriclite import Fabric

    strategy = "fsdp" if job.world > 1 else "single_device"
    return Fabric(accelerator=job.device, strategy=strategy, devices=job.world)


def _tensors(model: Any) -> list[Tensor]:
    return [local(param) for param in model.parameters()]


def _nothing(shape: Shape) -> None:
    return None


# -- pretrained weights ------------------------------------------------------------------------------------------------


def fabriclite(job: Job) -> Method:
    """``init_module(empty_init=True)``, ``load_raw``, ``setup``."""
    fabric = fabric_of(job)

    def build(shape: Shape) -> nn.Module:
        with fabric.init_module(empty_init=True):
            return llama(shape)

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        fabric.load_raw(files / HUB, model)
        return _tensors(fabric.setup(model))

    return Method(build, act)


def fabriclite_after_setup(job: Job) -> Method:
    """``load_raw`` into a model that was set up: its memory is there."""
    fabric = fabric_of(job)

    def act(model: Any, files: Path) -> list[Tensor]:
        fabric.load_raw(files / HUB, model)
        return _tensors(model)

    return Method(lambda shape: fabric.setup(with_memory(shape, job.device)), act)


def safetensors_assign(job: Job) -> Method:
    """``load_file``, and its tensors become the parameters."""
    from safetensors.torch import load_file

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        for file in shards_of(files / HUB):
            model.load_state_dict(load_file(file, device=job.device), strict=False, assign=True)
        return _tensors(model.to(job.device))

    return Method(without_memory, act)


def safetensors_copy(job: Job) -> Method:
    """``load_file``, copied into memory that is there."""
    from safetensors.torch import load_file

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        for file in shards_of(files / HUB):
            model.load_state_dict(load_file(file), strict=False)
        return _tensors(model)

    return Method(lambda shape: with_memory(shape, job.device), act)


def plain_construction(job: Job) -> Method:
    """The model as its code builds it, random values and all, and then copied into."""

    def build(shape: Shape) -> nn.Module:
        with torch.device(job.device):
            return llama(shape)

    return Method(build, safetensors_copy(job).act)


def from_pretrained(job: Job) -> Method:
    from transformers import LlamaForCausalLM

    def act(_: None, files: Path) -> list[Tensor]:
        where = {} if job.device == "cpu" else {"device_map": job.device}
        return _tensors(LlamaForCausalLM.from_pretrained(files / HUB, dtype=torch.float32, **where))

    return Method(_nothing, act)


def accelerate(job: Job) -> Method:
    """``init_empty_weights``, ``load_checkpoint_and_dispatch``."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    place = "cpu" if job.device == "cpu" else 0

    def build(shape: Shape) -> nn.Module:
        with init_empty_weights():
            return llama(shape)

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        return _tensors(load_checkpoint_and_dispatch(model, files / HUB, device_map={"": place}))

    return Method(build, act)


def lightning_raw(job: Job) -> Method:
    """``init_module(empty_init=True)``, ``load_raw`` of a file of torch, ``setup``."""
    fabric = lightning_of(job)

    def build(shape: Shape) -> nn.Module:
        with fabric.init_module(empty_init=True):
            return llama(shape)

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        fabric.load_raw(files / WEIGHTS, model)
        return _tensors(fabric.setup(model))

    return Method(build, act)


def lightning_of(job: Job) -> Any:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=job.device, devices=job.world)
    fabric.launch()
    return fabric


def dcp_hub(job: Job) -> Method:
    """``torch.distributed.checkpoint`` with its reader of safetensors, into memory that is there."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    def build(shape: Shape) -> nn.Module:
        if job.world == 1:
            return with_memory(shape, job.device)
        model = sharded(without_memory(shape), job.device, job.world)
        return with_own_buffers(model.to_empty(device=job.device), shape)

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        reader = HuggingFaceStorageReader(str(files / HUB))
        load(model.state_dict(), storage_reader=reader, no_dist=job.world == 1)
        return _tensors(model)

    return Method(build, act)


def read_into_one_buffer(job: Job) -> Method:
    """This rank's bytes through one buffer, in order: what the disk and the kernel take."""
    buffer = memoryview(bytearray(PIECE))

    def act(_: None, files: Path) -> None:
        for handle, parts in _parts(job, files):
            for offset, length in joined(parts):
                for at in range(0, length, PIECE):
                    os.preadv(handle, [buffer[: min(PIECE, length - at)]], offset + at)

    return Method(_nothing, act)


def read_into_fresh_memory(job: Job) -> Method:
    """The same into new tensors: the least that has to be done for a model with memory of its own."""

    def act(_: None, files: Path) -> list[Tensor]:
        found = []
        for handle, parts in _parts(job, files):
            for offset, length in parts:
                memory = torch.empty(length // 4)
                _read(handle, offset, memoryview(memory.numpy()).cast("B"))
                found.append(memory.to(job.device))
        return found

    return Method(_nothing, act)


def _parts(job: Job, files: Path) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Every file, opened, and where in it lies what this rank needs."""
    rank = int(os.environ.get("RANK", "0"))
    for file in shards_of(files / HUB):
        handle = os.open(file, os.O_RDONLY)
        try:
            yield handle, ranges(file, rank, job.world)
        finally:
            os.close(handle)


def _read(handle: int, offset: int, memory: memoryview) -> None:
    done = 0
    while done < memory.nbytes:
        done += os.preadv(handle, [memory[done:]], offset + done)


# -- checkpoints of our making and of others' --------------------------------------------------------------------------


def fabriclite_checkpoint(name: str) -> Callable[[Job], Method]:
    """``fabric.load`` of what ``fabric.save`` wrote, compared with its checksums."""

    def prepare(job: Job) -> Method:
        fabric, extra = fabric_of(job), {}

        def act(model: Any, files: Path) -> list[Tensor]:
            with _verifying(extra):
                fabric.load(files / name, {"model": model})
            return _tensors(model)

        return Method(lambda shape: fabric.setup(with_memory(shape, job.device)), act, extra=extra)

    return prepare


@contextmanager
def _verifying(extra: dict[str, float]) -> Iterator[None]:
    """Let the comparing of checksums be timed."""
    from fabriclite.checkpoint import sums

    verify = sums.verify

    def timed(*args: Any) -> int:
        begin = perf_counter()
        try:
            return verify(*args)
        finally:
            extra["verifying"] = perf_counter() - begin

    sums.verify = timed
    try:
        yield
    finally:
        sums.verify = verify


def torch_load(job: Job) -> Method:
    """``torch.load(mmap=True)`` and ``load_state_dict``."""

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        model.load_state_dict(torch.load(files / THEIRS, map_location="cpu", mmap=True)["model"])
        return _tensors(model)

    return Method(lambda shape: with_memory(shape, job.device), act)


def dcp_checkpoint(job: Job) -> Method:
    from torch.distributed.checkpoint import load

    def act(model: nn.Module, files: Path) -> list[Tensor]:
        load({"model": model.state_dict()}, checkpoint_id=files / DCP, no_dist=job.world == 1)
        return _tensors(model)

    return Method(lambda shape: with_memory(shape, job.device), act)


def lightning_checkpoint(job: Job) -> Method:
    fabric = lightning_of(job)

    def act(model: Any, files: Path) -> list[Tensor]:
        fabric.load(files / THEIRS, {"model": model})
        return _tensors(model)

    return Method(lambda shape: fabric.setup(with_memory(shape, job.device)), act)


# -- what they read ----------------------------------------------------------------------------------------------------


def write_hub(files: Path, shape: Shape) -> None:
    """The weights as safetensors, and as one file of torch."""
    write_pretrained(files / HUB, shape)
    model = with_memory(shape, "cpu")
    fill(model)
    torch.save(model.state_dict(), files / WEIGHTS)


def write_checkpoints(files: Path, shape: Shape) -> None:
    """The same weights as the checkpoints that the contenders of the second kind read."""
    from torch.distributed.checkpoint import save

    fabric = fabric_of(Job("", shape, files, 1, "cpu", 1))
    model = with_memory(shape, "cpu")
    fill(model)
    files.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, files / THEIRS)
    save({"model": model.state_dict()}, checkpoint_id=files / DCP, no_dist=True)
    pane = fabric.setup(model)
    fabric.save(files / FOLDER, {"model": pane}, format="folder")
    fabric.save(files / FILE, {"model": pane}, format="file")


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of loading.

    Attributes:
        prepare: does what comes before, once in every process.
        reads: the file or folder.
        needs: packages.
        existing: whether the model that it loads into is there before.
        peer: whether it gives a model, and is not one of ours.
        once: whether one round is enough.
    """

    prepare: Callable[[Job], Method]
    reads: str = HUB
    needs: tuple[str, ...] = ()
    existing: bool = False
    peer: bool = True
    once: bool = False

    def runs(self) -> bool:
        return all(find_spec(name) for name in self.needs)

    def check(self, loaded: list[Tensor] | None, job: Job) -> None:
        """Raise unless the tiny model has its values.

        Raises:
            RuntimeError: it has others.
        """
        if loaded is None or self.prepare is read_into_fresh_memory:
            return
        model = with_memory(TINY, "cpu")
        fill(model)
        rank = int(os.environ.get("RANK", "0"))
        for param, found in zip(model.parameters(), loaded, strict=True):
            parts = param.detach().chunk(job.world)
            expected = parts[rank] if rank < len(parts) else param.detach()[:0]
            if not torch.equal(expected, found.cpu()):
                raise RuntimeError(f"{job.method} must load the values of the files, but a tiny model had others.")


CONTENDERS: Final = {
    "fabriclite": Contender(fabriclite, peer=False),
    "load_file, assign": Contender(safetensors_assign, needs=("safetensors",)),
    "from_pretrained": Contender(from_pretrained, needs=("transformers",)),
    "accelerate": Contender(accelerate, needs=("accelerate",)),
    "lightning_fabric, .pt": Contender(lightning_raw, WEIGHTS, ("lightning_fabric",), once=True),
    "plain construction, copy": Contender(plain_construction, needs=("safetensors",), once=True),
    "fabriclite, after setup": Contender(fabriclite_after_setup, existing=True, peer=False),
    "load_file, copy": Contender(safetensors_copy, needs=("safetensors",), existing=True),
    "dcp, safetensors": Contender(dcp_hub, needs=("safetensors",), existing=True),
    "dcp, safetensors, fully_shard": Contender(dcp_hub, needs=("safetensors",)),
    "bytes into one buffer": Contender(read_into_one_buffer, peer=False),
    "bytes into fresh memory": Contender(read_into_fresh_memory, peer=False),
    "fabriclite, folder": Contender(fabriclite_checkpoint(FOLDER), FOLDER, existing=True, peer=False),
    "fabriclite, file": Contender(fabriclite_checkpoint(FILE), FILE, existing=True, peer=False),
    "torch.load, mmap": Contender(torch_load, THEIRS, existing=True),
    "dcp": Contender(dcp_checkpoint, DCP, existing=True),
    "lightning_fabric": Contender(lightning_checkpoint, THEIRS, ("lightning_fabric",), existing=True),
}
"""By name."""
CASES: Final = {
    "new model": (
        1,
        (
            "fabriclite",
            "load_file, assign",
            "from_pretrained",
            "accelerate",
            "lightning_fabric, .pt",
            "plain construction, copy",
            "bytes into one buffer",
            "bytes into fresh memory",
        ),
    ),
    "existing memory": (1, ("fabriclite, after setup", "load_file, copy", "dcp, safetensors")),
    "fsdp": (2, ("fabriclite", "dcp, safetensors, fully_shard", "bytes into one buffer", "bytes into fresh memory")),
}
"""Of pretrained weights, by name: processes and contenders, ours first."""
CHECKPOINTS: Final = {
    "checkpoint": (1, ("fabriclite, folder", "fabriclite, file", "torch.load, mmap", "dcp", "lightning_fabric")),
}
"""Of what ``save`` wrote."""

"""A checkpoint in a folder: every rank writes its shards (torch.distributed.checkpoint), rank 0 all the rest."""

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from fabriclite import shards
from fabriclite.checkpoint import file, place
from fabriclite.checkpoint.agree import on_all, on_rank_zero
from fabriclite.checkpoint.parts import (
    ModulePart,
    OptimizerPart,
    Part,
    rest_of,
    taken,
    tensors_of,
    whole,
)
from fabriclite.errors import CheckpointError
from fabriclite.world import World

_Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]


def save(world: World, path: Path, parts: Mapping[str, Part], filters: Mapping[str, Any], extra: Any) -> None:
    """Write a folder beside ``path``, then rename it there. Every rank must call this."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = dict(extra)
    for key, part in parts.items():
        state = taken(key, part, filters.get(key))
        mine, others = _split(part, state)
        tensors.update({f"{_prefix(key)}{name}": tensor for name, tensor in mine.items()})
        rest[key] = whole(others, keep=world.is_global_zero)
    if not world.is_global_zero:
        # What is not sharded can differ between ranks (running statistics): it is rank 0's, as in a file.
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    beside = place.beside(path)

    def prepare() -> None:
        place.check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()

    def publish() -> None:
        torch.save(rest, beside / place.META)
        place.clear(path)
        os.replace(beside, path)

    on_rank_zero(world, prepare, f"make the folder {path}")
    try:
        on_all(world, lambda: _write_shards(tensors, beside), f"write the checkpoint {path}")
        on_rank_zero(world, publish, f"write the checkpoint {path}")
    except CheckpointError:  # on every rank, and none is writing any more
        if world.is_global_zero:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _prefix(key: str) -> str:
    """What the names of an entry's tensors begin with. A dot in the key would make two entries' names one."""
    return f"{key.replace('%', '%25').replace('.', '%2E')}."


def _split(part: Part, state: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors that every rank writes its shards of, and the rest, which is rank 0's."""
    if isinstance(part, OptimizerPart):
        return tensors_of(state), rest_of(state)
    if not isinstance(part, ModulePart):
        return {}, state
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and not shards.is_extra(k)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def _write_shards(tensors: dict[str, Tensor], path: Path) -> None:
    dcp_save(dict(tensors), checkpoint_id=path, no_dist=not dist.is_initialized())


def read_rest(path: Path, weights_only: bool) -> dict[str, Any]:
    """What is no shard: plain values, and of modules and optimizers all but their tensors."""
    return file.read(path / place.META, weights_only)


def read_whole(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read_rest` gave with all tensors, whole, as a file would hold it. Every rank must call this."""
    stored = shapes(path)
    out = dict(content)
    for key, rest in content.items():
        found = _stored_of(stored, key)
        target = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in found.items()}
        _read(path, key, target)
        if isinstance(rest, Mapping) and "state" in rest:  # an optimizer's, or a value of that form
            out[key] = _nested(target, rest)
        elif target:
            out[key] = {**rest, **target}
    return out


def has_shards(path: Path, keys: Iterable[str]) -> set[str]:
    """Which entries of the folder hold more than :func:`read_rest` gives."""
    stored = shapes(path)
    return {key for key in keys if _stored_of(stored, key)}


def shapes(path: Path) -> _Shapes:
    """Name, global shape and dtype of every tensor in the folder."""
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # unpickled, so anything
        raise CheckpointError(
            f"{path / '.metadata'} must be readable, but {type(error).__name__}: {str(error).rstrip('.')}."
            " It was cut short: load another checkpoint."
        ) from error
    return {
        name: (item.size, item.properties.dtype)
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def _stored_of(stored: _Shapes, key: str) -> _Shapes:
    """The tensors of one entry, by their names within it."""
    prefix = _prefix(key)
    return {name.removeprefix(prefix): v for name, v in stored.items() if name.startswith(prefix)}


def load_part(path: Path, key: str, part: ModulePart | OptimizerPart, rest: Any, strict: bool) -> None:
    """Read this rank's share of one part and put it back. Every rank must call this."""
    stored = _stored_of(shapes(path), key)
    if isinstance(part, ModulePart):
        target = _module_target(part, stored)
        _read(path, key, target)
        part.load({**rest, **target, **_absent(stored, target)}, strict)
        return
    target = _optimizer_target(part, stored)
    _read(path, key, target)
    part.load(_nested(target, rest), strict)


def _module_target(part: ModulePart, stored: _Shapes) -> dict[str, Tensor]:
    """Buffers of the module's layout to read into; only names and shapes that fit: ``load`` reports the others."""
    return {
        name: torch.empty_like(tensor, requires_grad=False)
        for name, tensor in part.state().items()
        if isinstance(tensor, Tensor) and name in stored and stored[name][0] == tensor.shape
    }


def _absent(stored: _Shapes, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins without memory for what was not read, so that the check for keys and shapes sees it."""
    return {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in stored.items() if n not in target}


def _optimizer_target(part: OptimizerPart, stored: _Shapes) -> dict[str, Tensor]:
    layout = part.layout()
    target: dict[str, Tensor] = {}
    for name, (shape, dtype) in stored.items():
        param, _, _ = name.removeprefix("state.").rpartition(".")
        like = layout.get(param)
        if like is not None and like.shape == shape:
            target[name] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        else:
            target[name] = torch.zeros(shape, dtype=dtype)
    return target


def _read(path: Path, key: str, target: Mapping[str, Tensor]) -> None:
    if not target:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading alone is meant
        try:
            named = {f"{_prefix(key)}{n}": t for n, t in target.items()}
            dcp_load(named, checkpoint_id=path, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # a BaseException: it would pass every `except Exception`
            first = next(iter(error.failures.values()))[0]
            raise CheckpointError(
                f"{path} must hold readable shards, but {type(first).__name__}: {str(first) or 'no more data'}."
                " It is incomplete: load another checkpoint."
            ) from error


def _nested(flat: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """``{"state.w.exp_avg": t}`` and the rest, back to an optimizer's ``{"state": {"w": {"exp_avg": t, ...}}}``."""
    state = {name: dict(values) for name, values in rest["state"].items()}
    for name, tensor in flat.items():
        param, _, key = name.removeprefix("state.").rpartition(".")
        state.setdefault(param, {})[key] = tensor
    return {**rest, "state": state}

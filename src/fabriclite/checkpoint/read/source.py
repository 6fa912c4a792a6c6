"""Checkpoints of every kind that can be read, opened: nested dictionaries whose tensors still lie on disk."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fabriclite.checkpoint import disk
from fabriclite.checkpoint.formats import OWN
from fabriclite.checkpoint.place import META
from fabriclite.checkpoint.read.distcp import open_distributed
from fabriclite.checkpoint.read.index import INDEX
from fabriclite.checkpoint.read.pretrained import is_pretrained, read_pretrained
from fabriclite.checkpoint.read.safetensors_file import read_header
from fabriclite.checkpoint.read.torch_file import read_torch_file
from fabriclite.checkpoint.sums import SUMS
from fabriclite.errors import CheckpointError
from fabriclite.stored import InMemory, Stored


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose tensors were not read yet.

    Attributes:
        path: of the file or folder.
        kind: which of them it is.
        tree: what it holds; tensors are :class:`Stored`, but for those of the run itself.
    """

    path: Any
    kind: Literal["file", "folder"]
    tree: dict[str, Any]


@dataclass(frozen=True, slots=True)
class State:
    """The state of one module, whose tensors were not read yet.

    Attributes:
        path: of the file or folder.
        tensors: by name.
        other: items that are no tensors, such as extra state.
        files: that hold them.
        ours: whether fabriclite wrote it, with checksums.
    """

    path: Any
    tensors: dict[str, Stored]
    other: dict[str, Any]
    files: list[Any]
    ours: bool = False


# -- checkpoints ------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Any, weights_only: bool) -> Opened:
    """Open a file of ``torch.save``, or a folder of ours, of Lightning Fabric or of ``torch.distributed.checkpoint``.

    Args:
        path: a path object; see :func:`fabriclite.checkpoint.disk.located`.
        weights_only: refuse objects that only code could restore.

    Raises:
        CheckpointError: it is none of these, is incomplete or damaged, or needs code that is refused.
    """
    path = disk.located(path)
    if path.is_file():
        if _is_safetensors(path):
            raise CheckpointError(
                f"{path} must be a checkpoint, but is a .safetensors file, which holds the weights of one module."
                " Load it with fabric.load_raw."
            )
        return Opened(path, "file", _stored(read_torch_file(path, weights_only)))
    _check_is_folder(path)
    if not (path / INDEX).is_file():
        raise _not_a_checkpoint(path, "meta.pt, .metadata and *.distcp files")
    return Opened(path, "folder", _open_folder(path, weights_only))


def _open_folder(path: Any, weights_only: bool) -> dict[str, Any]:
    folder = open_distributed(path)
    rest = read_torch_file(path / META, weights_only) if (path / META).is_file() else {}
    if OWN in rest:
        _check_sums_are_there(path, rest[OWN])
        return _ours(folder.tensors, _stored(rest))
    nested = {key: _with_state(value) for key, value in folder.nested(weights_only).items()}
    return _stored({**nested, **rest})


def _with_state(value: Any) -> Any:
    """An optimizer's entry with the state that torch leaves out of a folder where it is empty, as SGD's can be."""
    bare = isinstance(value, dict) and "param_groups" in value and "state" not in value
    return {"state": {}, **value} if bare else value


def _check_sums_are_there(path: Any, own: Any) -> None:
    listed = isinstance(own, Mapping) and own.get("version", 1) >= 2
    if listed and not (path / SUMS).is_file():
        raise CheckpointError(f"{path / SUMS} must be there, but is missing. It is damaged: load another checkpoint.")


def _ours(tensors: Mapping[str, Stored], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of our own folder: names begin with that of their entry, which cannot hold a plain dot."""
    entries: dict[str, dict[str, Stored]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition(".")
        entries.setdefault(key.replace("%2E", ".").replace("%25", "%"), {})[name] = tensor
    tree = dict(rest)
    for key, found in entries.items():
        value = tree.get(key)
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{META} must have an entry {key!r}, which has shards, but holds {', '.join(rest)}."
                " It belongs to another checkpoint: load another one."
            )
        tree[key] = _optimizer(found, value) if "state" in value else {**value, **found}
    return tree


def _optimizer(found: Mapping[str, Stored], rest: Mapping[str, Any]) -> dict[str, Any]:
    """``{"state.w.exp_avg": t}`` and the rest, back to ``{"state": {"w": {"exp_avg": t, ...}}, ...}``."""
    state = {name: dict(values) for name, values in rest["state"].items()}
    for name, tensor in found.items():
        param, _, key = name.removeprefix("state.").rpartition(".")
        state.setdefault(param, {})[key] = tensor
    return {**rest, "state": state}


def _stored(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key == OWN else _wrapped(value) for key, value in tree.items()}


def _wrapped(value: Any) -> Any:
    """The same tree with every ordinary tensor in it as one that is read; sparse and quantised ones stay values."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized
        return InMemory(value) if plain else value
    if isinstance(value, dict):
        same = copy(value)  # with what a subclass keeps beside its items
        same.update({key: _wrapped(item) for key, item in value.items()})
        return same
    if type(value) in (list, tuple):
        return type(value)(_wrapped(item) for item in value)
    return value


# -- the weights of one module ----------------------------------------------------------------------------------------


def open_state(path: Any, weights_only: bool) -> State:
    """Open the weights of a module: a file or folder of any kind that holds them, alone or as its one module.

    Args:
        path: of a ``.safetensors`` file, a file of ``torch.save``, a folder of a Hugging Face model, or a checkpoint.
        weights_only: refuse objects that only code could restore.

    Raises:
        CheckpointError: there is none, or more than one, or it is incomplete or damaged.
    """
    path = disk.located(path)
    if path.is_file():
        if _is_safetensors(path):
            return State(path, dict(read_header(path).tensors), {}, [path])
        return _state_in(path, _stored(read_torch_file(path, weights_only)), [path])
    _check_is_folder(path)
    if (path / INDEX).is_file():
        files = [file for file in path.iterdir() if file.is_file()]
        return _state_in(path, _open_folder(path, weights_only), files)
    if is_pretrained(path):
        found, files = read_pretrained(path, weights_only)
        tree = _stored(found)
        return State(path, *_split(tree), files, ours=(path / SUMS).is_file())
    raise _not_a_checkpoint(
        path, "model.safetensors, pytorch_model.bin, the index of several such files, or a checkpoint's .metadata"
    )


def _state_in(path: Any, tree: Mapping[str, Any], files: list[Any]) -> State:
    """The one state dict in a checkpoint: the whole of it, or its one entry that looks like one."""
    modules = [key for key, value in tree.items() if key != OWN and is_module(key, value)]
    if len(modules) > 1:
        raise CheckpointError(
            f"{path} must hold the state of one module, but holds {len(modules)}: {', '.join(modules)}."
            f" Read it with fabric.load and take {modules[0]!r} from the result."
        )
    tensors, other = _split(tree[modules[0]] if modules else tree)
    if not tensors and tree:
        raise CheckpointError(
            f"{path} must hold the state of a module, but has no tensors under {', '.join(map(str, tree))}."
            " Load another file."
        )
    return State(path, tensors, other, files, ours=OWN in tree)


def is_module(key: str, value: Any) -> bool:
    if not isinstance(value, Mapping) or {"state", "param_groups"} <= value.keys() or str(key).endswith("_extra_state"):
        return False
    return any(isinstance(item, Stored) for item in value.values())


def _split(tree: Mapping[str, Any]) -> tuple[dict[str, Stored], dict[str, Any]]:
    tensors = {name: value for name, value in tree.items() if isinstance(value, Stored)}
    return tensors, {name: value for name, value in tree.items() if name not in tensors}


# -- what a path is ---------------------------------------------------------------------------------------------------


def _is_safetensors(path: Any) -> bool:
    return bool(path.name.endswith(".safetensors"))


def _check_is_folder(path: Any) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} must be a checkpoint, but does not exist. Pass the path of one.")
    if not path.is_dir():
        raise CheckpointError(f"{path} must be a checkpoint, but is no file and no folder. Pass the path of one.")


def _not_a_checkpoint(path: Any, expected: str) -> CheckpointError:
    names = sorted(child.name for child in path.iterdir())
    holds = f"holds {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}" if names else "is empty"
    return CheckpointError(f"{path} must be a folder with {expected}, but {holds}. Pass the path of one.")

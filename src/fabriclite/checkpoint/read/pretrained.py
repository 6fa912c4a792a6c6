"""A folder as Hugging Face models are kept: one file of weights, or several and an index."""

import json
from typing import Any, Final

from fabriclite.checkpoint.read.safetensors_file import read_header
from fabriclite.checkpoint.read.torch_file import read_torch_file
from fabriclite.errors import CheckpointError

_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
"""What such a folder holds, the best first: a safetensors file cannot hold code."""


def is_pretrained(folder: Any) -> bool:
    """Whether the folder holds weights under a name that Hugging Face's libraries give."""
    return any((folder / name).is_file() for name in _NAMES)


def read_pretrained(folder: Any, weights_only: bool) -> tuple[dict[str, Any], list[Any]]:
    """All items of the model's state, and the files they are in.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor that the index says it holds.
    """
    path = next(folder / name for name in _NAMES if (folder / name).is_file())
    if path.name.endswith(".index.json"):
        return _from_index(path, weights_only)
    return _read(path, weights_only), [path]


def _read(path: Any, weights_only: bool) -> dict[str, Any]:
    if path.name.endswith(".safetensors"):
        return dict(read_header(path).tensors)
    return read_torch_file(path, weights_only)


def _from_index(index: Any, weights_only: bool) -> tuple[dict[str, Any], list[Any]]:
    where = _weight_map(index)
    files = {name: index.parent / name for name in dict.fromkeys(where.values())}
    found = {}
    for name, path in files.items():
        if not path.is_file():
            raise CheckpointError(
                f"{index} must name files that are there, but {path} is missing. Fetch the whole model."
            )
        found[name] = _read(path, weights_only)
    for tensor, name in where.items():
        if tensor not in found[name]:
            raise CheckpointError(
                f"{files[name]} must hold {tensor!r}, as {index} says, but lacks it."
                " They are of different models: fetch it again."
            )
    return {tensor: found[name][tensor] for tensor, name in where.items()}, list(files.values())


def _weight_map(index: Any) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{index} must be readable JSON, but {type(error).__name__}: {error}. Fetch the model again."
        ) from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) and _is_inside(name) for name in where.values()):
        raise CheckpointError(
            f"{index} must map tensors to files of its folder under 'weight_map', but does not. Fetch the model again."
        )
    return where


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")

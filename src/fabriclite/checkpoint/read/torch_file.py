"""What ``torch.save`` wrote, read without running code unless that is asked for."""

import io
import re
import zipfile
from typing import Any

import torch

from fabriclite.checkpoint import disk
from fabriclite.errors import CheckpointError


def read_torch_file(path: Any, weights_only: bool) -> dict[str, Any]:
    """The content of a file that ``torch.save`` wrote. Tensors stay on a local disk until they are used.

    Raises:
        CheckpointError: it cannot be read, holds objects that only code could restore, or no dictionary.
    """
    try:
        if disk.is_local(path):
            # Files of torch before 1.6 are no zip archives, and cannot be mapped.
            with path.open("rb") as file:
                mmap = zipfile.is_zipfile(file)
            content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=weights_only)
        else:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise _unreadable(error, path, path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, but holds {type(content).__name__}. Load another file.")
    return content


def read_torch_bytes(content: bytes, name: str, weights_only: bool) -> Any:
    """What ``torch.save`` wrote into memory. ``name`` says in errors what it is. Raises as the other."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise _unreadable(error, io.BytesIO(content), name) from error


def _unreadable(error: Exception, file: Any, name: Any) -> CheckpointError:
    return CheckpointError(f"{name} must be a readable checkpoint file, but {_reason(error, file)}")


def _reason(error: Exception, file: Any) -> str:
    """What torch found and how to mend it, less the advice it gives to every caller of ``torch.load``."""
    _, refused, text = str(error).rpartition("WeightsUnpickler error: ")
    text = text.strip().partition("\n")[0].rstrip(".")
    code = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)", str(error))
    whole = refused and (isinstance(file, io.BytesIO) or disk.is_local(file)) and zipfile.is_zipfile(file)
    if code is not None or whole:  # only its content is refused
        return f"needs code to restore {code[1] if code else text}. Pass weights_only=False if you trust its author."
    return f"{type(error).__name__}: {text}. It was cut short or is of another kind: load another one."

"""Versions: Python, torch and its backends, and the packages that fabriclite works with."""

import importlib.metadata
import platform

import torch
import torch.distributed as dist

from fabriclite.doctor.facts import Json, Section, look

_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")
_PACKAGES = (
    "numpy",
    "deepspeed",
    "transformers",
    "safetensors",
    "torchdata",
    "torchao",
    "bitsandbytes",
    "fsspec",
    "universal-pathlib",
    "mpi4py",
    "tensorboard",
    "rich",
)


def software() -> Section:
    return look(
        "torch",
        {
            "fabriclite": lambda: _version("fabriclite"),
            "python": platform.python_version,
            "torch": lambda: torch.__version__,
            "cuda": lambda: torch.version.cuda,
            "cudnn": lambda: torch.backends.cudnn.version() if torch.version.cuda else None,  # type: ignore[no-untyped-call]
            "nccl": _nccl,
            "backends": lambda: [name for name in _BACKENDS if dist.is_backend_available(name)],
            "threads": torch.get_num_threads,
        },
    )


def _nccl() -> Json:
    if not dist.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def packages() -> Section:
    """Their versions; ``None`` for what is not installed."""
    return look("packages", {name: lambda name=name: _version(name) for name in _PACKAGES})  # type: ignore[misc]


def _version(name: str) -> Json:
    try:
        return str(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None

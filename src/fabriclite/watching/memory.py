"""How much memory this process holds, now and at most: of its CUDA device, else of the host."""

import resource
import sys
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")


def used(device: torch.device) -> tuple[int, int]:
    """``(now, at most since the process started)`` in bytes.

    On CUDA what torch's allocator has handed out; elsewhere the resident memory of the process (``VmRSS`` and
    ``VmHWM`` of Linux; where there is no ``/proc``, the highest for both).
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return _kib(lines["VmRSS"]), _kib(lines["VmHWM"])
    except (OSError, KeyError):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return highest, highest


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024

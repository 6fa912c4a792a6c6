"""How much memory this process holds."""

import resource
import sys
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")


def memory(device: torch.device) -> tuple[int, int] | None:
    """``(now, at most so far)`` in bytes: what torch allocated on a CUDA device, or the process on the CPU.

    ``None``: not known for this kind of device. Where the system tells no figure for now, the peak stands for both.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    if _STATUS.exists():
        found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
        return _kib(found["VmRSS"]), _kib(found["VmHWM"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024

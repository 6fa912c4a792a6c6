"""Devices, and how they reach each other."""

import shutil
import subprocess

import torch

from fabriclite.doctor.facts import Json, Section, look

_LIMIT_S = 20.0


def accelerators() -> Section:
    return look(
        "devices",
        {
            "cuda": lambda: [_cuda(index) for index in range(torch.cuda.device_count())],
            "mps": torch.backends.mps.is_available,
            "peer_access": _peers,
            "topology": _topology,
        },
    )


def _cuda(index: int) -> dict[str, Json]:
    found = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "memory_free_bytes": free,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
    }


def _peers() -> Json:
    """Pairs of devices that can read each other's memory; ``None`` where there are no pairs."""
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    if not pairs:
        return None
    return [f"{a}-{b}" for a, b in pairs if torch.cuda.can_device_access_peer(a, b)]


def _topology() -> Json:
    """The links as ``nvidia-smi`` draws them; ``None`` where it is not, or there is one device."""
    program = shutil.which("nvidia-smi")
    if program is None or torch.cuda.device_count() < 2:
        return None
    done = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=_LIMIT_S, check=True)
    return done.stdout.strip().splitlines()

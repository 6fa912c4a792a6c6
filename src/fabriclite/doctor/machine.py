"""The machine: cores, memory, and what a container leaves of them."""

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from fabriclite.doctor.facts import Json, Section, look

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def machine() -> Section:
    return look(
        "machine",
        {
            "host": socket.gethostname,
            "address": lambda: socket.gethostbyname(socket.gethostname()),
            "system": lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor,
            "cores": os.cpu_count,
            "cores_usable": cores_usable,
            "memory_bytes": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "memory_available_bytes": _available,
            "cgroup_memory_bytes": lambda: _limit(_memory_limits()),
            "cgroup_cores": lambda: _limit(_core_limits()),
            "shared_memory_bytes": lambda: shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
            "network_interfaces": lambda: [name for _, name in socket.if_nameindex()],
        },
    )


def cores_usable() -> int | None:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> Json:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _available() -> Json:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# -- limits of control groups: the tightest of this process's group and those above it --------------------------------


def _limit(limits: Iterator[float]) -> Json:
    lowest = min(limits, default=None)
    return None if lowest is None else int(lowest) if lowest == int(lowest) else round(lowest, 2)


def _folders(controller: str) -> Iterator[Path]:
    """Of this process's group and those above it, of version 2 and of version 1 of control groups."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        inside = Path(path.lstrip("/"))
        yield from (root / part for part in (inside, *inside.parents))


def _memory_limits() -> Iterator[float]:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdecimal() and int(text) < physical:  # version 1 says "none" by a very large number
                yield int(text)


def _core_limits() -> Iterator[float]:
    for folder in _folders("cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "max 1").partition(" ")
        if quota.isdecimal():
            yield int(quota) / int(period)
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # -1: no limit
            yield int(quota) / int(period)


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""

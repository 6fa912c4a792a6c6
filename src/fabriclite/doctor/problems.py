"""Combinations that are known to fail or to cost, among what was found. Pure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fabriclite.doctor.facts import Problem, Section

OLDEST_TORCH: Final = (2, 11)
OLDEST_DEEPSPEED: Final = (0, 18)
_LEAST_SHARED_MEMORY: Final = 2**30


@dataclass(frozen=True, slots=True)
class Seen:
    """What problems are looked for in.

    Attributes:
        env: the variables of this process.
        sections: by title.
    """

    env: Mapping[str, str]
    sections: Mapping[str, Section]

    def value(self, title: str, name: str) -> Any:
        return self.sections[title].value(name) if title in self.sections else None

    @property
    def described(self) -> Mapping[str, Any]:
        return self.value("environment", "described") or {}

    def on(self, name: str) -> bool:
        return self.env.get(name, "").strip().lower() in ("1", "true", "yes", "y")


def problems(seen: Seen) -> tuple[Problem, ...]:
    """Errors first."""
    rules = (_versions, _launch, _threads, _debugging, _nccl, _devices, _network, _memory, _measurements)
    found = [problem for rule in rules for problem in rule(seen)]
    return tuple(sorted(found, key=lambda problem: problem.level != "error"))


def _error(what: str, mend: str) -> Problem:
    return Problem("error", what, mend)


def _warning(what: str, mend: str) -> Problem:
    return Problem("warning", what, mend)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _versions(seen: Seen) -> Iterator[Problem]:
    torch = seen.value("torch", "torch")
    if torch and _numbers(torch) < OLDEST_TORCH:
        yield _error(f"torch is {torch}, but must be 2.11 or newer.", "Run: pip install 'torch>=2.11'.")
    deepspeed = seen.value("packages", "deepspeed")
    if deepspeed and _numbers(deepspeed) < OLDEST_DEEPSPEED:
        yield _error(f"deepspeed is {deepspeed}, but must be 0.18 or newer.", "Run: pip install 'deepspeed>=0.18'.")


def _launch(seen: Seen) -> Iterator[Problem]:
    missing = seen.sections["environment"].missing("name") if "environment" in seen.sections else None
    if missing:
        yield _error(f"The environment cannot be read: {missing}", "Start as the message says.")
    found = seen.described
    several = found.get("size", 1) > found.get("local_size", 1)
    address = str(found.get("master_address") or "")
    if several and (address == "localhost" or address.startswith("127.")) and found.get("node_rank"):
        yield _error(
            f"MASTER_ADDR is {address} on a machine that is not the first: this process would wait for itself.",
            "Set MASTER_ADDR to the host of rank 0.",
        )


def _threads(seen: Seen) -> Iterator[Problem]:
    ranks, cores = seen.described.get("local_size", 1), seen.value("machine", "cores_usable")
    given = seen.env.get("OMP_NUM_THREADS")
    if ranks < 2:
        return
    if given is None:
        yield _warning(
            f"OMP_NUM_THREADS is not set for {ranks} ranks on this machine: each takes all cores.",
            f"Set it to the cores of a rank, {max(1, (cores or 1) // ranks)} here.",
        )
    elif given.isdecimal() and cores and int(given) > max(1, cores // ranks):
        yield _warning(
            f"OMP_NUM_THREADS is {given} for {ranks} ranks on {cores} cores: they fight over them.",
            f"Set it to {max(1, cores // ranks)}.",
        )


def _debugging(seen: Seen) -> Iterator[Problem]:
    if seen.env.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        yield _error(
            "TORCH_DISTRIBUTED_DEBUG is DETAIL: building DDP under it crashes the process (torch 2.11 to 2.13).",
            "Unset it, or set INFO.",
        )
    if seen.on("CUDA_LAUNCH_BLOCKING"):
        yield _warning("CUDA_LAUNCH_BLOCKING is set: every kernel is waited for.", "Unset it after the search.")


def _nccl(seen: Seen) -> Iterator[Problem]:
    for old in ("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT"):
        if old in seen.env:
            yield _warning(f"{old} has another name since torch 2.2.", f"Set TORCH_{old} instead.")
    if seen.env.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        yield _error(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING is 0: when a rank fails, the others wait for it for ever.",
            "Unset it.",
        )
    if seen.env.get("TORCH_NCCL_ENABLE_MONITORING") == "0":
        yield _warning("TORCH_NCCL_ENABLE_MONITORING is 0: a watchdog that hangs is not noticed.", "Unset it.")
    if seen.on("TORCH_NCCL_BLOCKING_WAIT"):
        yield _warning("TORCH_NCCL_BLOCKING_WAIT is set: every collective is waited for.", "Unset it.")
    for name, way in (("P2P", "directly between devices"), ("SHM", "by shared memory"), ("IB", "over InfiniBand")):
        if seen.on(f"NCCL_{name}_DISABLE"):
            yield _warning(f"NCCL_{name}_DISABLE is set: NCCL sends nothing {way}.", "Unset it unless that is broken.")


def _devices(seen: Seen) -> Iterator[Problem]:
    cuda, backends = seen.value("devices", "cuda") or [], seen.value("torch", "backends") or []
    if cuda and "nccl" not in backends:
        yield _error(f"There are {len(cuda)} CUDA devices, but this torch has no NCCL.", "Install torch's CUDA build.")
    if not cuda and seen.value("torch", "cuda"):
        yield _warning(
            "This torch was built for CUDA, but no device is found.",
            "Check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES.",
        )


def _network(seen: Seen) -> Iterator[Problem]:
    there = seen.value("machine", "network_interfaces")
    wanted = [name for name in seen.env.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    unknown = [name for name in wanted if there is not None and name not in there]
    if unknown:
        yield _error(
            f"GLOO_SOCKET_IFNAME names {unknown[0]}, but this machine has {', '.join(there)}.", "Name one of these."
        )
    if "machine" in seen.sections and seen.sections["machine"].missing("address") and not wanted:
        yield _error(
            f"The name of this host, {seen.value('machine', 'host')}, has no address: gloo cannot listen.",
            "Add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface.",
        )
    several = seen.described.get("size", 1) > seen.described.get("local_size", 1)
    if several and seen.env.get("NCCL_SOCKET_IFNAME", "").lstrip("=") == "lo":
        yield _error("NCCL_SOCKET_IFNAME is lo in a run of several machines.", "Name the interface between them.")


def _memory(seen: Seen) -> Iterator[Problem]:
    shared = seen.value("machine", "shared_memory_bytes")
    if shared is not None and shared < _LEAST_SHARED_MEMORY:
        yield _warning(
            f"/dev/shm has {shared / 2**20:.0f} MiB: workers of data loaders pass batches through it.",
            "Give the container more, as with docker run --shm-size 8g.",
        )


def _measurements(seen: Seen) -> Iterator[Problem]:
    for fact in seen.sections["all_reduce"].facts if "all_reduce" in seen.sections else ():
        if fact.missing is not None:
            lines = [line for line in fact.missing.strip().splitlines() if not line.startswith("Then rank")]
            reason = lines[-1]
            yield _error(f"Two processes cannot reduce a tensor by {fact.name}: {reason}", "See the whole text above.")

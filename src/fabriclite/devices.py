"""From what a user writes (``accelerator=``, ``devices=``) to a list of devices. Pure, given the machine as a value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from fabriclite.errors import ConfigError

_ALIASES: Final = {"gpu": "cuda"}
_KNOWN: Final = ("auto", "cpu", "cuda", "gpu", "mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has.

    Attributes:
        cuda: number of CUDA devices.
        mps: whether Apple's Metal back end is usable.
    """

    cuda: int = 0
    mps: bool = False

    @classmethod
    def probe(cls) -> "Machine":
        return cls(cuda=torch.cuda.device_count(), mps=torch.backends.mps.is_available())


def pick_accelerator(accelerator: object, machine: Machine) -> str:
    """The device type to use: ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        ConfigError: the name is unknown or the machine has no such device.
    """
    if accelerator not in _KNOWN:
        raise ConfigError(f"`accelerator` must be one of {', '.join(_KNOWN)}, but is {accelerator!r}.")
    name = _ALIASES.get(str(accelerator), str(accelerator))
    if name == "auto":
        name = "cuda" if machine.cuda else "mps" if machine.mps else "cpu"
    if (name == "cuda" and not machine.cuda) or (name == "mps" and not machine.mps):
        raise ConfigError(
            f"`accelerator` must be a device this machine has, but is {accelerator!r} and none was found."
            " Use accelerator='auto' or 'cpu'."
        )
    return name


def pick_devices(
    devices: object, accelerator: str, machine: Machine, launched: int | None, own: bool = False
) -> dict[int, torch.device]:
    """The device of each local rank.

    Args:
        devices: ``"auto"``, a count (``2`` or ``"2"``), ``-1`` for all, or indices (``[0, 3]`` or ``"0,3"``).
        accelerator: a result of :func:`pick_accelerator`.
        machine: what there is.
        launched: how many local processes an external launcher started; ``None`` when there is no launcher.
        own: the launcher lets each process see one device of its own, so that for each it is number 0.

    Raises:
        ConfigError: the value has no meaning, or asks for more than the machine has.
    """
    indices = _indices(devices, accelerator, machine, launched)
    if accelerator == "cpu":
        return {rank: torch.device("cpu") for rank in range(len(indices))}
    available = machine.cuda if accelerator == "cuda" else 1
    if own and launched is not None and available == 1 and list(indices) == list(range(launched)):
        return {rank: torch.device(accelerator, 0) for rank in range(launched)}
    beyond = [i for i in indices if not 0 <= i < available]
    if beyond:
        raise ConfigError(
            f"`devices` must name devices among the {available} of type {accelerator!r} on this machine,"
            f" but asks for {devices!r}, so also for index {beyond[0]}."
            + (f" Launch {available} processes on it instead of {launched}." if launched is not None else "")
        )
    return {rank: torch.device(accelerator, i) for rank, i in enumerate(indices)}


def _indices(devices: object, accelerator: str, machine: Machine, launched: int | None) -> Sequence[int]:
    value = devices.strip() if isinstance(devices, str) else devices
    if value == "auto":
        default = {"cpu": 1, "mps": 1, "cuda": machine.cuda}[accelerator]
        return range(default if launched is None else launched)
    if isinstance(value, str) and "," in value:
        value = [part for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        return _listed(value, devices, accelerator)
    count = _whole(value, devices)
    if count == -1:
        if accelerator == "cpu":
            raise ConfigError("`devices` must be a number of processes on the CPU, but is -1. Give a count.")
        count = {"mps": 1, "cuda": machine.cuda}[accelerator]
    if count < 1:
        raise ConfigError(f"`devices` must be at least 1, but is {devices!r}.")
    return range(count)


def _listed(values: Sequence[object], devices: object, accelerator: str) -> Sequence[int]:
    indices = [_whole(v, devices) for v in values]
    if not indices or len(set(indices)) != len(indices):
        raise ConfigError(f"`devices` must list each device once and at least one, but is {devices!r}.")
    if accelerator == "cpu":
        raise ConfigError(f"`devices` must be a number of processes on the CPU, but is {devices!r}. Give a count.")
    return indices


def _whole(value: object, devices: object) -> int:
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            pass
    raise ConfigError(f"`devices` must be 'auto', a count, -1 or a list of indices, but is {devices!r}.")


def summary(device_for: Mapping[int, torch.device]) -> str:
    """``"2 x cpu"``: the devices in words, for messages."""
    return f"{len(device_for)} x {device_for[0].type}"

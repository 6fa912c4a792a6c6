"""What a plan is held against: memory, speed and links of one device. Given, never measured."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fabriclite.errors import ConfigError
from fabriclite.layout import Link

LINKS: Final[Mapping[str, float]] = {
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    "pcie4": 32e9,
    "pcie5": 64e9,
    "ib-200": 25e9,
    "ib-400": 50e9,
    "ib-800": 100e9,
    "ethernet-100": 12.5e9,
    "ethernet-400": 50e9,
}
"""Bytes a second that one device sends, one way, at most. Makers state NVLink both ways together: 600, 900, 1800 GB/s
(data sheets of A100, H100 and B200 in their SXM forms); PCIe is for 16 lanes; networks carry the bits of their name by
8, for one adapter a device."""

_UNITS: Final = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BINARY: Final = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device and its links. ``None`` is: not given, and no time is worked out for it.

    Attributes:
        memory: bytes of one device.
        flops: floating-point operations a second at most, in the precision that is computed in.
        node: bytes a second that a device sends to others of its machine, one way.
        network: the same to other machines.
        host: the same to the memory of its host.
    """

    memory: int | None = None
    flops: float | None = None
    node: float | None = None
    network: float | None = None
    host: float | None = None

    def bandwidth(self, link: Link) -> float | None:
        return {"node": self.node, "network": self.network, "host": self.host}[link]


REFERENCE: Final = Hardware(flops=989e12, node=LINKS["nvlink4"], network=LINKS["ib-400"], host=LINKS["pcie5"])
"""What layouts are ranked at where nothing was given: H100 SXM, dense bfloat16 (its data sheet), its usual links."""


def ranked(hardware: Hardware, memory: int) -> Hardware:
    """With ``memory``, and with the speeds of ``REFERENCE`` where none is given."""
    return Hardware(
        memory=memory,
        flops=hardware.flops or REFERENCE.flops,
        node=hardware.node or REFERENCE.node,
        network=hardware.network or REFERENCE.network,
        host=hardware.host or REFERENCE.host,
    )


def parse_bytes(text: str | int | float, name: str = "memory") -> int:
    """``"80GB"`` (10**9), ``"80GiB"`` (2**30) or a number of bytes, as bytes.

    Raises:
        ConfigError: it is no positive size.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = {**_UNITS, **_BINARY}.get(match[2].upper()) if match else None
    number = _number(match[1]) if match else None
    if unit is None or number is None or number * unit < 1:
        raise ConfigError(f"`{name}` must be a size such as 80GB or 80GiB, but is {text!r}.")
    return int(number * unit)


def parse_bandwidth(text: str | float, name: str) -> float:
    """A name of ``LINKS``, or a number of GB (10**9 bytes) a second, as bytes a second.

    Raises:
        ConfigError: it is neither.
    """
    if text in LINKS:
        return LINKS[str(text)]
    number = _number(str(text))
    if number is None or number <= 0:
        raise ConfigError(f"`{name}` must be GB/s above 0 or one of {', '.join(LINKS)}, but is {text!r}.")
    return number * 1e9


def parse_tflops(text: str | float) -> float:
    """A number of 10**12 floating-point operations a second, as operations a second.

    Raises:
        ConfigError: it is none above 0.
    """
    number = _number(str(text))
    if number is None or number <= 0:
        raise ConfigError(f"`peak_tflops` must be a number above 0, but is {text!r}.")
    return number * 1e12


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

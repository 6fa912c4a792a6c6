"""What ``fabric.monitor`` was asked for, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, get_args

from torch import Tensor

from fabriclite.errors import ConfigError
from fabriclite.watching.profiling import ProfilerWindow

NonFinite = Literal["raise", "warn", "ignore"]

RESERVED: Final = ("steps_per_second", "samples_per_second", "tokens_per_second", "flops_per_second", "mfu")
"""Metrics that the monitor makes itself."""


class Asked(TypedDict, total=False):
    """What :meth:`fabriclite.Fabric.monitor` takes beside the folder."""

    total_steps: int | None
    first_step: int
    every: int
    samples: float | None
    tokens: float | None
    flops: float | None
    peak_flops: float | None
    bar: bool
    nonfinite: NonFinite
    spikes: bool
    profile: ProfilerWindow | None
    name: str | None
    plan: Mapping[str, Any] | None
    report: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See :meth:`fabriclite.Fabric.monitor`, which has the same names."""

    run_dir: Path | None = None
    total_steps: int | None = None
    first_step: int = 0
    every: int = 10
    samples: float | None = None
    tokens: float | None = None
    flops: float | None = None
    peak_flops: float | None = None
    bar: bool = True
    nonfinite: NonFinite = "raise"
    spikes: bool = True
    profile: ProfilerWindow | None = None
    name: str | None = None
    plan: Mapping[str, Any] | None = None
    report: str = ""

    def check(self, world_size: int) -> None:
        """Raise unless it has a meaning in a world of so many processes.

        Raises:
            ConfigError: see above.
        """
        _whole("first_step", self.first_step, 0)
        _whole("every", self.every, 1)
        if self.total_steps is not None:
            _whole("total_steps", self.total_steps, 0)
        for name in ("samples", "tokens", "flops", "peak_flops"):
            amount(name, getattr(self, name))
        if self.nonfinite not in get_args(NonFinite):
            raise ConfigError(f"`nonfinite` must be 'raise', 'warn' or 'ignore', but is {self.nonfinite!r}.")
        if self.profile is not None:
            if not isinstance(self.profile, ProfilerWindow):
                raise ConfigError(
                    f"`profile` must be a fabriclite.ProfilerWindow, but is {self.profile!r}."
                    " Write ProfilerWindow(start=10, steps=3)."
                )
            self.profile.check(self.run_dir, self.first_step, self.total_steps, world_size)


def amount(name: str, value: object) -> None:
    """Raise unless ``value`` is ``None`` or a number above 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"`{name}` must be None or a number above 0, but is {value!r}.")


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raise if a metric is no number, or has the name of one that the monitor makes itself. Reads no tensor.

    Raises:
        ConfigError: see above.
    """
    for name, value in metrics.items():
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ConfigError(f"A metric must be a number or a tensor of one element, but {name!r} is {shown}.")
    taken = [name for name in metrics if name in RESERVED]
    if taken:
        raise ConfigError(
            f"A metric must not be named {taken[0]!r}, which the monitor works out itself, but one is."
            " Give monitor.step(tokens=...) or choose another name."
        )


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"`{name}` must be a whole number of at least {least}, but is {value!r}.")

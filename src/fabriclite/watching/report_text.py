"""A report as lines of plain text."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from fabriclite.spread import Wrapped

if TYPE_CHECKING:
    from fabriclite.watching.report import ModuleReport, Range, Report

_WIDTH: Final = 100
_LABEL: Final = 13
_FEW: Final = 3
_PARTS: Final = ("agree", "spread", "fill", "verify")


def lines(report: "Report") -> Iterator[str]:
    """One screen: what runs, then each module, then memory and time."""
    yield from _row("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    yield from _row("strategy", report.strategy)
    yield from _row("precision", report.precision)
    yield from _row("environment", report.environment)
    machines = f" on {_count(report.nodes, 'machine')}" if report.nodes > 1 else ""
    mesh = ", mesh " + " x ".join(f"{axis} {size}" for axis, size in report.mesh.items()) if report.mesh else ""
    yield from _row("world", f"{_count(report.world_size, 'process', 'processes')}{machines}, {report.device}{mesh}")
    for module in report.modules:
        yield from _module(module)
    for load in report.loads:
        yield from _row("loaded", load)
    if report.memory is not None and report.peak is not None:
        yield from _row("memory", f"now {_range(report.memory)}, at most {_range(report.peak)} per rank")
    yield from _row("seconds", _times(report))


def _module(module: "ModuleReport") -> Iterator[str]:
    whole = f"{_number(module.parameters)} in {_count(module.tensors, 'tensor')}, {size(module.bytes)}"
    yield from _row(module.name, f"{whole}; {_range(module.rank_bytes)} on each rank")
    yield from _row("  wrapped", _wrapped(module.wrapped))
    yield from _row("  dtypes", _dtypes(module.dtypes))
    yield from _row("  values", _values(module))
    if module.tied:
        yield from _row("  tied", _names([" = ".join(group) for group in module.tied]))
    if module.frozen:
        share = f"{_number(module.frozen_parameters)} in {_count(len(module.frozen), 'tensor')}"
        yield from _row("  frozen", f"{share}: {_names(module.frozen)}")
    if module.buffers:
        yield from _row("  buffers", f"{module.buffers}, {size(module.buffer_bytes)}")
    for optimizer in module.optimizers:
        yield from _row("  optimizer", optimizer)


def _wrapped(wrapped: Sequence[Wrapped]) -> str:
    parts = []
    for how, group in groupby(wrapped, key=lambda item: item.how):
        items = [item.what if item.count is None else f"{item.count} x {item.what}" for item in group]
        parts.append(f"{how}: {', '.join(items)}")
    return "; ".join(parts) or "nothing: one device holds it all"


def _dtypes(by_role: Mapping[str, str]) -> str:
    roles: dict[str, list[str]] = {}
    for role, dtype in by_role.items():
        roles.setdefault(dtype, []).append(role)
    if len(roles) == 1:
        return f"{next(iter(roles))} throughout"
    return "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in roles.items())


def _values(module: "ModuleReport") -> str:
    parts = []
    if module.initialised:
        parts.append(f"{len(module.initialised)} initialised by setup as recorded")
    if module.loaded:
        parts.append(f"{len(module.loaded)} loaded by setup: {_names(module.loaded)}")
    if module.made:
        parts.append(f"{module.made} made before setup")
    return "; ".join(parts) or "none"


def _times(report: "Report") -> str:
    parts = [f"{name} {seconds:.2f}" for name, seconds in report.seconds.items()]
    for module in report.modules:
        inner = ", ".join(f"{name} {module.seconds[name]:.2f}" for name in _PARTS if name in module.seconds)
        name = "setup" if len(report.modules) == 1 else f"setup of {module.name}"
        parts.append(f"{name} {module.seconds.get('setup', 0.0):.2f}" + (f" ({inner})" if inner else ""))
    return ", ".join(parts) or "none"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _row(label: str, text: str) -> list[str]:
    first = f"{label:<{_LABEL}}" if len(label) < _LABEL else f"{label} "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label]


def _range(both: "Range") -> str:
    least, most = size(both.least), size(both.most)
    return most if least == most else f"{least} to {most}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _number(count: int) -> str:
    """``1.25 G``: three digits, and how many thousands."""
    return _scaled(count, 1000, {0: "", 1: " k", 2: " M", 3: " G", 4: " T"}) + " parameters"


def size(count: int) -> str:
    """Bytes as ``1.25 GiB``."""
    return _scaled(count, 1024, {0: " B", 1: " KiB", 2: " MiB", 3: " GiB", 4: " TiB"})


def _scaled(count: int, base: int, units: Mapping[int, str]) -> str:
    power = 0
    value = float(count)
    while value >= 999.5 and power < max(units):
        value, power = value / base, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f}{units[power]}"

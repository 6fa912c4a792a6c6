"""Weights alone, of our making or anyone's, into a module: before it is set up, or after."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fabriclite import _torch, module_state
from fabriclite.checkpoint import disk, place, sums
from fabriclite.checkpoint.parts import Part
from fabriclite.checkpoint.read.source import open_checkpoint, open_state
from fabriclite.checkpoint.report import LoadReport
from fabriclite.errors import CheckpointError, ConfigError
from fabriclite.stored import Stored

Rename = Mapping[str, str] | Callable[[str], str] | None
Agreed = Callable[[Callable[[], Any], str], Any]
"""Runs a function, and raises on every rank if it failed on one."""

_AT_ONCE: Final = 1 << 22
"""Elements that are compared at once."""


def check_rename(rename: Any) -> None:
    """Raise unless ``rename`` maps regular expressions to replacements, or is a function.

    Raises:
        ConfigError: it does not.
    """
    if rename is None or callable(rename):
        return
    try:
        for pattern, replacement in rename.items():
            re.compile(pattern).sub(replacement, "")
    except (AttributeError, TypeError, re.error, IndexError) as error:
        raise ConfigError(
            f"`rename` must map regular expressions to replacements, or be a function of a name, but is {rename!r}:"
            f" {error}. Example: {{r'^bert\\.': ''}}."
        ) from error


def load_raw(
    path: str | Path,
    part: Part,
    strict: bool,
    weights_only: bool,
    rename: Rename,
    agreed: Agreed,
    share: tuple[int, int],
) -> LoadReport | None:
    """Load weights, or the state of one optimizer, from a file or folder that holds nothing else.

    Args:
        path: what holds them.
        part: what takes them.
        strict: names must be the same on both sides.
        weights_only: unpickle nothing that could run code.
        rename: how names in the file become those of the module.
        agreed: how to fail together.
        share: ``(rank, ranks)``: which of the checksums this rank compares, of what fabriclite wrote.

    Returns:
        A report, for a module.

    Raises:
        CheckpointError: it cannot be read, or does not fit; nothing was changed then.
    """
    where = place.found(disk.located(path))
    module = part.module()
    if module is None:
        tree = agreed(lambda: open_checkpoint(where, weights_only).tree, f"read {path}")
        value = agreed(lambda: part.checked(tree, strict), f"load {path}")
        agreed(lambda: part.load(value), f"load {path}")
        return None
    opened = agreed(lambda: open_state(where, weights_only), f"read {path}")
    if opened.ours:
        agreed(lambda: sums.verify(where, share), f"verify {path}")
    stored = {**opened.tensors, **opened.other}
    values, report = agreed(lambda: _matched(part, module, stored, rename, strict, where), f"load {path}")
    agreed(lambda: part.load(values), f"load {path}")
    return report  # type: ignore[no-any-return]


def _matched(
    part: Part, module: nn.Module, stored: Mapping[str, Any], rename: Rename, strict: bool, path: Path
) -> tuple[dict[str, Any], LoadReport]:
    """What to load under the module's names, checked, and the report. Changes nothing."""
    state = renamed(stored, rename, path)
    own = part.layout()
    covered: set[str] = set()
    for names in module_state.tied_names(module):
        present = [name for name in names if name in state]
        if present:
            covered.update(name for name in names if name in own and name not in state)
            _check_equal(present, state, path)
    expected = {name: value for name, value in own.items() if name not in covered}
    module_state.check_fits(expected, state, strict)
    values = {name: value for name, value in state.items() if name in own}
    with _torch.raw():
        converted = {
            name: value.dtype
            for name, value in values.items()
            if isinstance(value, Stored) and isinstance(own[name], Tensor) and value.dtype != own[name].dtype
        }
    report = LoadReport(
        loaded=tuple(name for name in own if name in values or name in covered),
        initialized=tuple(name for name in own if name not in values and name not in covered),
        ignored=tuple(name for name in state if name not in own),
        converted=converted,
    )
    return values, report


def renamed(stored: Mapping[str, Any], rename: Rename, path: Path) -> dict[str, Any]:
    """The same under new names. Pure.

    Raises:
        CheckpointError: two get one name.
    """
    if rename is None:
        return dict(stored)
    state: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in stored.items():
        new = rename(name) if callable(rename) else _substituted(name, rename)
        if new in state:
            raise CheckpointError(
                f"`rename` must give each name in {path} one of its own, but makes {origin[new]} and {name} both {new}."
            )
        state[new], origin[new] = value, name
    return state


def _substituted(name: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def _check_equal(names: list[str], state: Mapping[str, Any], path: Path) -> None:
    """Raise if the file has different values for what is one tensor in the module."""
    first, *others = (state[name] for name in names)
    for name, other in zip(names[1:], others, strict=True):
        if not isinstance(first, Stored) or not isinstance(other, Stored) or first.shape != other.shape:
            continue  # shapes are told later, with all others
        if not _equal(first, other):
            raise CheckpointError(
                f"{names[0]} and {name} must be equal in {path}, since they are one tensor in the module, but differ."
                " Untie them in the model, or leave one out."
            )


def _equal(one: Stored, two: Stored) -> bool:
    if one.dtype != two.dtype:
        return False
    for begin in range(0, one.shape.numel(), _AT_ONCE):
        parts = [torch.empty(min(_AT_ONCE, one.shape.numel() - begin), dtype=one.dtype) for _ in range(2)]
        one.read_flat(begin, parts[0])
        two.read_flat(begin, parts[1])
        if not torch.equal(parts[0].view(torch.uint8), parts[1].view(torch.uint8)):
            return False
    return True

"""The largest size that fits, with as few looks as can be: each is a trace of the model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

from fabriclite.planning.plan import Choice
from fabriclite.planning.planner import Planner

_TOKENS: Final = 128
"""Sequences are looked at in multiples of so many."""


def fitted(what: Literal["batch", "sequence"], planner: Planner, choice: Choice) -> Choice:
    """``choice`` with the largest batch, or the longest sequence in steps of 128 tokens, that fits.

    Args:
        what: which of the two.
        planner: its hardware says the memory.
        choice: the rest of it.

    Returns:
        With the smallest if none fits.
    """
    assert planner.hardware.memory is not None
    unit = 1 if what == "batch" else _TOKENS

    def at(count: int) -> Choice:
        return replace(choice, batch=count) if what == "batch" else replace(choice, sequence=count)

    found = largest(lambda count: planner.plan(at(count)).peak, planner.hardware.memory, unit)
    return at(unit if found is None else found)


def largest(peak: Callable[[int], int], memory: int, unit: int = 1, limit: int = 2**24) -> int | None:
    """The largest multiple of ``unit`` whose peak is at most ``memory``.

    The peak is taken to grow with the size. Between a size that fits and one that does not, the next look is where a
    straight line between their peaks crosses ``memory``, or half way.

    Args:
        peak: bytes at a size.
        memory: bytes that there are.
        unit: sizes are multiples of it.
        limit: no larger size is looked at.

    Returns:
        ``None`` if not even ``unit`` fits.
    """
    seen: dict[int, int] = {}

    def look(count: int) -> int:
        return seen.setdefault(count, peak(count * unit))

    if look(1) > memory:
        return None
    low, high = 1, 2
    most = max(1, limit // unit)
    while high <= most and look(high) <= memory:
        below, low = low, high
        rise = (seen[low] - seen[below]) / (low - below)
        reach = low + int((memory - seen[low]) / rise) if rise > 0 else most
        high = min(max(reach + 1, low + 1), low * 16)
    high = min(high, most + 1)
    straight = True
    while high - low > 1:
        rise = (seen[high] - seen[low]) / (high - low) if high in seen else 0
        guess = low + int((memory - seen[low]) / rise) if straight and rise > 0 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        straight = not straight  # by turns with halves: where peaks bend, lines come near from one side, in small steps
        if look(guess) > memory:
            high = guess
            continue
        low = guess
        if low + 1 < high and not straight and look(low + 1) > memory:
            high = low + 1
    return low * unit

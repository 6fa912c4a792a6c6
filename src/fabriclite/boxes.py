"""Parts of a tensor, as numbers. Pure."""

from collections.abc import Sequence
from math import prod

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: ``(start, length)`` in every dimension."""


def all_of(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, length) for length in shape)


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(length for _, length in box)


def flat_boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """The boxes, in order, that make up values ``start`` to ``start + length`` of a tensor in row-major order."""
    if length == 0:
        return []
    if not shape:
        return [()]
    row = prod(shape[1:])
    first, ahead = divmod(start, row)
    boxes: list[Box] = []
    if ahead:
        part = min(row - ahead, length)
        boxes += [((first, 1), *inner) for inner in flat_boxes(shape[1:], ahead, part)]
        first, length = first + 1, length - part
    rows, rest = divmod(length, row)
    if rows:
        boxes.append(((first, rows), *all_of(shape[1:])))
    if rest:
        boxes += [((first + rows, 1), *inner) for inner in flat_boxes(shape[1:], 0, rest)]
    return boxes

"""SLURM's short forms: ``node[001-003,7],b2`` for hosts, ``4(x2),3`` for tasks per node. Pure."""

import re
from itertools import product

from fabriclite.errors import WorldError

_RANGES = re.compile(r"\[([^\[\]]*)\]")


def expand(text: str) -> list[str]:
    """All hosts of a node list, in its order. Numbers keep their leading zeros; several brackets multiply out.

    Raises:
        WorldError: brackets do not close, or hold something else than numbers and ranges.
    """
    hosts = [host for part in _split(text) for host in _hosts(part, text)]
    if not hosts:
        raise _wrong(text)
    return hosts


def _split(text: str) -> list[str]:
    """Parts between commas and spaces that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise _wrong(text)
        if char in ", " and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    if depth:
        raise _wrong(text)
    return [part for part in (*parts, text[begin:]) if part]


def _hosts(part: str, text: str) -> list[str]:
    pieces = _RANGES.split(part)  # fixed text and the inside of brackets take turns
    choices = [_numbers(piece, text) if at % 2 else [piece] for at, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(inside: str, text: str) -> list[str]:
    numbers: list[str] = []
    for item in inside.split(","):
        first, dash, last = item.partition("-")
        last = last if dash else first
        if not (re.fullmatch("[0-9]+", first) and re.fullmatch("[0-9]+", last)) or int(last) < int(first):
            raise _wrong(text)
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """``"4(x2),3"`` is ``[4, 4, 3]``.

    Raises:
        WorldError: it is of another form.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item.strip())
        if match is None:
            raise WorldError(
                f"SLURM's tasks per node must be of the form '4(x2),3', but are {text!r}. Launch with srun, which sets"
                " SLURM_STEP_TASKS_PER_NODE."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _wrong(text: str) -> WorldError:
    return WorldError(
        f"SLURM's node list must be of the form 'node[001-003,7],b2', but is {text!r}. Launch with srun, which sets"
        " SLURM_STEP_NODELIST, or set MASTER_ADDR to the host of rank 0."
    )

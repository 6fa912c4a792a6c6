"""Plans as rows of words, and as plain text."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of words under a title; without a head they are sentences."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def numbers(self, column: int) -> bool:
        """Whether a column holds numbers, with or without units, and is to be aligned on the right."""
        return column > 0 and all(row[column][:1] in "+-x0123456789" for row in self.rows)

    def dense(self) -> "Table":
        """Without columns that hold nothing: times, where no speed was given."""
        kept = [n for n in range(len(self.head)) if any(row[n] for row in self.rows)]
        if not self.head:
            return self
        return Table(
            self.title, tuple(self.head[n] for n in kept), tuple(tuple(row[n] for n in kept) for row in self.rows)
        )


def size(count: float) -> str:
    """Bytes, in the largest unit of which there is one."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def number(count: float) -> str:
    """A count with the letter of its thousands."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def seconds(value: float | None) -> str:
    """A time; nothing where it is not known."""
    if value is None:
        return ""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value * 1e6:.1f} us"


def plain(tables: Sequence[Table]) -> str:
    """All of them, aligned by spaces."""
    return "\n\n".join(_plain(table) for table in map(Table.dense, tables) if table.rows)


def _plain(table: Table) -> str:
    if not table.head:
        return "\n".join([table.title, *(f"  {' '.join(row)}" for row in table.rows)])
    rows = [table.head, *table.rows]
    columns = range(len(table.head))
    widths = [max(len(row[column]) for row in rows) for column in columns]
    right = [table.numbers(column) for column in columns]
    lines = ("  ".join(_cell(row[n], widths[n], right[n]) for n in columns).rstrip() for row in rows)
    return "\n".join([table.title, *(f"  {line}" for line in lines)])


def _cell(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)

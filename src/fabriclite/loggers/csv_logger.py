"""Metrics as a table of comma-separated values."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from typing_extensions import override

from fabriclite.errors import ConfigError
from fabriclite.loggers.base import RankZeroLogger, Status
from fabriclite.loggers.folders import RunFolder

_STEP: Final = "step"


@final
class CSVLogger(RankZeroLogger):
    """Writes ``ROOT_DIR/NAME/VERSION/metrics.csv``: one row for each call, one column for each name.

    A row is in the file when ``log_metrics`` returns: a process that is killed leaves whole rows. A name that comes
    later gets a column, and older rows an empty place in it. With a ``version`` that exists the table goes on; steps
    that a resumed run does again come again, and the later rows count.

    Args:
        root_dir: where runs are kept.
        name: of the experiment; ``""`` for no folder of its own.
        version: of the run; ``None`` is the next free ``version_0``, ``version_1``, ..., a number one of those.
        prefix: put before the name of each metric, with ``/`` between.
    """

    def __init__(
        self, root_dir: str | Path, name: str = "logs", version: int | str | None = None, prefix: str = ""
    ) -> None:
        super().__init__(prefix)
        self.name = name
        self._folder = RunFolder(Path(root_dir), name, version)

    @property
    def version(self) -> int | str | None:
        """As it was given, or chosen when first something was written."""
        return self._folder.version

    @property
    def log_dir(self) -> str:
        """The folder of the run.

        Raises:
            ConfigError: on other ranks than 0, where ``version`` was not given.
        """
        return str(self._folder.path(self._writes))

    @override
    def _open(self) -> "_Table":
        folder = self._folder.path(self._writes)
        folder.mkdir(parents=True, exist_ok=True)
        return _Table(folder / "metrics.csv")

    @override
    def _write(self, opened: "_Table", metrics: Mapping[str, Any], step: int) -> None:
        if _STEP in metrics:
            raise ConfigError(
                "`metrics` must not name 'step', which CSVLogger writes itself, but does. Pass step=... instead."
            )
        opened.add({_STEP: step, **metrics})

    @override
    def _write_params(self, opened: "_Table", params: Mapping[str, Any]) -> None:
        (opened.path.parent / "hparams.json").write_text(json.dumps(params, indent=2, default=str) + "\n")

    @override
    def _close(self, opened: "_Table", status: Status) -> None:
        opened.close()


class _Table:
    """A file that rows are added to, each by one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns, rows, torn = _read(path)
        if torn:
            _replace(path, self._columns, rows)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # open as long as the run lasts

    def add(self, row: Mapping[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        self._file.write(_lines([[row.get(name, "") for name in self._columns]]))

    def _widen(self, new: Sequence[str]) -> None:
        _, rows, _ = _read(self.path)
        self._columns = [*self._columns, *new]
        _replace(self.path, self._columns, rows)
        self._file.close()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> tuple[list[str], list[list[str]], bool]:
    """Columns, whole rows, and whether a torn one was left out that a process began to write when it was killed."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    torn = bool(text) and (not text.endswith("\n") or text.count('"') % 2 == 1)  # or within a quoted line end
    rows = rows[:-1] if torn else rows
    return (rows[0], rows[1:], torn) if rows else ([], [], torn)


def _replace(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write the table anew beside the old one, which it then replaces: there is a whole one at every moment."""
    beside = path.with_suffix(".csv.new")
    with open(beside, "wb") as file:
        file.write(_lines([columns] if columns else []))
        file.write(_lines([*row, *[""] * (len(columns) - len(row))] for row in rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    """With line ends as ``csv`` knows them it quotes all that a reader could take for one."""
    text = io.StringIO(newline="")
    for row in rows:
        text.write(_line(row))
    return text.getvalue().encode(errors="replace")


def _line(row: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(row)
    return text.getvalue().removesuffix("\r\n") + "\n"

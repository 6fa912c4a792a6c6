"""A progress bar, where there are a terminal and the package for it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fabriclite.checkpoint.read.kinds import Progress


@contextmanager
def bar(label: str) -> Iterator[Progress | None]:
    """Gives what is to be told of bytes that are done; ``None`` where nobody would see them."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield None
        return
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)

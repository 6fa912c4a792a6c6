"""What a starter of this machine's ranks gives each of them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def threads_each(size: int) -> int:
    """CPU threads per process such that all of them share the machine."""
    return max(1, len(os.sched_getaffinity(0)) // size) if hasattr(os, "sched_getaffinity") else 1


@contextmanager
def private_folder() -> Iterator[Path]:
    """For what ranks tell who started them; readable by this user alone, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fabriclite-", ignore_cleanup_errors=True) as name:
        yield Path(name)  # made with mode 0700

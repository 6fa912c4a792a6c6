"""A real browser without a window: what it makes of a page, and a picture of it."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

_NAMES: Final = ("chromium-headless-shell", "chromium", "google-chrome")
_QUIET: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--log-level=0",
)


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page.

    Attributes:
        dom: its elements, after scripts have run.
        console: what it told: errors of the page, and all that the page tried to fetch.
    """

    dom: str
    console: list[str]


def find() -> str:
    """The browser; a test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is installed")
    return found


def look(page: Path, width: int = 1240) -> Seen:
    """Open a page from the disk in a window so many pixels wide, run its scripts, and read it."""
    done = _run(["--virtual-time-budget=2000", f"--window-size={width},1000", "--dump-dom", page.as_uri()])
    console = re.findall(r"CONSOLE[^\]]*\]\s*(.*)", done.stderr)
    return Seen(done.stdout, console)


def picture(page: Path, out: Path, width: int = 1240, height: int = 1200, scale: float = 1.0) -> Path:
    """Write what is seen of a page as PNG: ``width`` by ``height`` points, each ``scale`` pixels wide."""
    size = f"--window-size={width},{height}"
    _run([size, f"--force-device-scale-factor={scale}", f"--screenshot={out}", page.as_uri()])
    assert out.stat().st_size > 0
    return out


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [find(), *_QUIET, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)

"""A real terminal of which only the screen is missing: what a command shows there, and a picture of it."""

import fcntl
import html
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte

import browser

_COLOURS = {
    "default": "#d7dae0", "black": "#5c6370", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#d7dae0",
}  # fmt: skip


class Shown:
    """What stood on the screen of a terminal, at the end and before.

    Attributes:
        screen: as pyte keeps it.
        frames: the lines of each time that something was written, the same ones once.
        status: of the command.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.frames: list[list[str]] = []
        self.status: int | None = None

    @property
    def lines(self) -> list[str]:
        """Visible lines, without blanks at their ends and empty lines at the end."""
        text = [line.rstrip() for line in self.screen.display]
        while text and not text[-1]:
            text.pop()
        return text

    def feed(self, written: bytes) -> None:
        self._stream.feed(written)
        if not self.frames or self.frames[-1] != self.lines:
            self.frames.append(self.lines)


def show(
    words: Sequence[str],
    *,
    columns: int = 100,
    lines: int = 24,
    timeout: float = 60.0,
    stop_when: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Shown:
    """Run a command whose input and output are a terminal, to its end.

    Args:
        words: the command.
        columns, lines: size of the terminal.
        timeout: seconds after which it is killed, which is an error.
        stop_when: once this pattern is found on the screen the command is stopped, and the screen stays as it is.
        env: what is added to this process's environment.
    """
    shown = Shown(columns, lines)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    wishes = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(lines), **(env or {})}
    process = subprocess.Popen(
        words, stdin=follower, stdout=follower, stderr=follower, env=wishes, start_new_session=True
    )
    os.close(follower)
    end = time.monotonic() + timeout
    try:
        stopped = False
        while written := _next(leader, end):
            if stopped:
                continue  # what it says while it ends is read, or it could not end
            shown.feed(written)
            if stop_when is not None and re.search(stop_when, "\n".join(shown.lines)):
                stopped = True
                process.terminate()
        shown.status = process.wait(max(1.0, end - time.monotonic()))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(leader)
    return shown


def picture(shown: Shown, out: Path, scale: float = 1.5) -> Path:
    """Write the screen as PNG, drawn by a browser."""
    page = out.with_suffix(".html")
    height = len(shown.lines) or 1
    rows = "\n".join(_row(shown.screen, number) for number in range(height))
    page.write_text(
        "<!DOCTYPE html><meta charset=utf-8><style>body{margin:0;background:#1e2127}pre{margin:0;padding:14px 16px;"
        f"font:14px/20px 'DejaVu Sans Mono',monospace;color:{_COLOURS['default']}}}</style><pre>{rows}</pre>"
    )
    try:
        return browser.picture(page, out, int(shown.screen.columns * 8.43 + 34), height * 20 + 28, scale)
    finally:
        page.unlink()


def _next(leader: int, end: float) -> bytes:
    ready, _, _ = select.select([leader], [], [], max(0.0, end - time.monotonic()))
    if not ready:
        raise TimeoutError("the command did not end in time")
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux: the last process that had the terminal has closed it
        return b""


def _row(screen: pyte.Screen, number: int) -> str:
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    parts: list[tuple[str, str]] = []
    for cell in cells:
        style = f"color:{_colour(cell.fg)}" + (";font-weight:bold" if cell.bold else "")
        if parts and parts[-1][0] == style:
            parts[-1] = (style, parts[-1][1] + cell.data)
        else:
            parts.append((style, cell.data))
    return "".join(f'<span style="{style}">{html.escape(text)}</span>' for style, text in parts)


def _colour(name: str) -> str:
    known = _COLOURS.get(name.removeprefix("bright"))
    return known or (f"#{name}" if len(name) == 6 else _COLOURS["default"])

"""What people see while a run trains: a bar in a terminal, lines elsewhere, nothing on ranks other than 0."""

import os
import stat
import sys
import time
from typing import Any, Final, Protocol

from fabriclite.watching import words
from fabriclite.watching.records import StepRecord

_REFRESH: Final = 0.25
"""Seconds between two drawings of the bar, at least,"""
_SHARE: Final = 0.003
"""and at most this share of the time goes into drawing: one takes rich a millisecond or more."""
_BAR: Final = 16
"""Letters of the bar itself."""
_BURST: Final = 20
"""So many lines come at once, and then one for each second that passes: a log of fast steps stays readable."""


class Screen(Protocol):
    """Who shows a run."""

    def progress(self, done: int) -> None:
        """``done`` steps are done."""

    def show(self, record: StepRecord, remaining: float, last: bool) -> None:
        """A step was logged; the rest takes about ``remaining`` seconds. ``last``: none comes after it."""

    def note(self, text: str) -> None:
        """Something happened that people must see."""

    def close(self) -> None:
        """Nothing more comes."""


class Dark:
    """Shows nothing."""

    def progress(self, done: int) -> None: ...

    def show(self, record: StepRecord, remaining: float, last: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Quiet(Dark):
    """Only what people must see, on standard error."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Lines:
    """A line for each logged step, without any control characters."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._held: str | None = None
        self._allowed = float(_BURST)
        self._time = time.monotonic()

    def progress(self, done: int) -> None: ...

    def show(self, record: StepRecord, remaining: float, last: bool) -> None:
        now = time.monotonic()
        self._allowed, self._time = min(_BURST, self._allowed + now - self._time), now
        text = words.line(record, self._total, remaining)
        if self._allowed >= 1 or last:
            self._allowed -= 1
            self._held = None
            print(text, flush=True)
        else:
            self._held = text

    def note(self, text: str) -> None:
        self.close()
        print(text, flush=True)

    def close(self) -> None:
        if self._held is not None:  # the last that is known of a run that ends
            print(self._held, flush=True)
            self._held = None


class Bar:
    """A bar that stays below what is printed. Drawn at the end of steps: no thread takes time from the training."""

    def __init__(self, total: int | None, done: int, stream: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        on_stdout = stream is sys.stdout
        self._total = total
        self._bar = Progress(
            BarColumn(bar_width=_BAR),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=_console(stream),
            auto_refresh=False,
            redirect_stdout=on_stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=total, completed=done, words="")
        self._next = 0.0
        self._bar.start()

    def progress(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        begin = time.monotonic()
        if begin >= self._next:
            self._bar.refresh()
            end = time.monotonic()
            self._next = end + max(_REFRESH, (end - begin) / _SHARE)

    def show(self, record: StepRecord, remaining: float, last: bool) -> None:
        room = self._bar.console.width - _BAR - len(f" {self._total}/{self._total} ") - 1
        said = words.fitting(words.summary(record, remaining), room)
        self._bar.update(self._task, completed=record.step, words=said)
        self.progress(record.step)
        if last:
            self._bar.refresh()

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.stop()


class Both:
    """A bar for who looks on, and lines for the file that standard output goes to."""

    def __init__(self, screens: tuple[Screen, ...]) -> None:
        self._screens = screens

    def progress(self, done: int) -> None:
        for screen in self._screens:
            screen.progress(done)

    def show(self, record: StepRecord, remaining: float, last: bool) -> None:
        for screen in self._screens:
            screen.show(record, remaining, last)

    def note(self, text: str) -> None:
        for screen in self._screens:
            screen.note(text)

    def close(self) -> None:
        for screen in self._screens:
            screen.close()


def screen_for(rank: int, wanted: bool, total: int | None, done: int) -> Screen:
    """Where standard output is a terminal, a bar there; else lines. Into a file: also a bar on a terminal of stderr.

    Not beside a pipe: what reads it (``tee``) often writes to the same terminal, in the middle of the bar. Without
    rich there are lines everywhere.
    """
    if rank != 0:
        return Dark()
    if not wanted:
        return Quiet()
    if _draws(sys.stdout):
        return Bar(total, done, sys.stdout)
    if _is_file(sys.stdout) and _draws(sys.stderr):
        return Both((Lines(total), Bar(total, done, sys.stderr)))
    return Lines(total)


def _console(stream: Any) -> Any:
    from rich.console import Console

    return Console(file=stream)


def _draws(stream: Any) -> bool:
    """Whether a bar can be drawn on ``stream``."""
    if stream is None or not stream.isatty():
        return False
    try:
        console = _console(stream)
    except ImportError:
        return False
    return bool(console.is_terminal and not console.is_dumb_terminal)


def _is_file(stream: Any) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, AttributeError, ValueError):  # something that stands for a stream
        return False
    return stat.S_ISREG(mode)

"""When recording is on: inside ``init_module``, and after it for what was recorded, until that has memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fabriclite import _torch
from fabriclite.birth import draws, truncated
from fabriclite.birth.answers import Answers
from fabriclite.birth.record import Recorder
from fabriclite.birth.recording import Recording


@dataclass(slots=True)
class _Modes:
    """The two modes of one recording."""

    recorder: Recorder
    answers: Answers

    @classmethod
    def of(cls, recording: Recording, device: torch.device, makes: bool) -> "_Modes":
        recorder = Recorder(recording, device, makes)
        return cls(recorder, Answers(recorder))


class _Now:
    """What this process records. One per process, as the stacks of modes that torch keeps."""

    recording: Recording | None = None
    recorder: Recorder | None = None
    """Set while inside a recording ``init_module``."""
    after: _Modes | None = None
    """Set between ``init_module`` and the last ``setup``: below all other modes, it notes what is done to recorded
    tensors and lets everything else pass."""


def current() -> Recording | None:
    """The recording that tensors may belong to."""
    return _Now.recording


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Record what is made within it. Afterwards every generator is where it would be."""
    if _Now.recorder is not None:
        with _inside(device, makes=True):
            yield
        return
    _stop_after()
    draws.trusted()
    truncated.by_rejection()
    if _Now.recording is None:
        _Now.recording = Recording()
    here = _Now.recording
    modes = _Modes.of(here, device, makes=True)
    _Now.recorder = modes.recorder
    try:
        trunc_normal = truncated.for_recorded(modes.recorder)
        with _torch.replaced(trunc_normal, here.show_streams), modes.recorder, modes.answers:
            yield
    finally:
        _Now.recorder = None
        here.show_streams()
        _go_on_after()


@contextmanager
def making() -> Iterator[None]:
    """Within it new tensors are real, also inside :func:`recording`."""
    if _Now.recorder is None:
        yield
        return
    with _inside(_Now.recorder.device, makes=False):
        yield


@contextmanager
def _inside(device: torch.device, makes: bool) -> Iterator[None]:
    recorder = _Now.recorder
    assert recorder is not None
    before = (recorder.device, recorder.makes)
    recorder.device, recorder.makes = device, makes
    try:
        yield
    finally:
        recorder.device, recorder.makes = before


@contextmanager
def paused() -> Iterator[None]:
    """Within it nothing is noted or answered; after it, what still has no memory is looked after again."""
    _stop_after()
    try:
        yield
    finally:
        _go_on_after()


def tidy() -> None:
    """Stop looking after recorded tensors once there are none: it costs every operation a little."""
    if _Now.after is not None and not _Now.after.recorder.recording.waits():
        _stop_after()
        _Now.recording = None


def _go_on_after() -> None:
    if _Now.recording is None or _Now.after is not None:
        return
    if not _Now.recording.waits():
        _Now.recording = None
        return
    for stream in _Now.recording.streams.values():
        stream.lazy = False  # others draw from the generators now
    _Now.after = _Modes.of(_Now.recording, torch.device("cpu"), makes=False)
    _torch.put_below(_Now.after.recorder, _Now.after.answers)


def _stop_after() -> None:
    if _Now.after is not None:
        _torch.take_away(_Now.after.recorder, _Now.after.answers)
        _Now.after = None
        if _Now.recording is not None:
            for stream in _Now.recording.streams.values():
                stream.lazy = stream.may_lag

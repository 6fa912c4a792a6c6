"""When recording is on: inside ``init_module``, and after it for what was recorded, until that has memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fabriclite import _torch
from fabriclite.birth import draws, truncated
from fabriclite.birth.answers import Answers
from fabriclite.birth.record import RECORDABLE as RECORDABLE
from fabriclite.birth.record import Recorder
from fabriclite.birth.recording import Recording
from fabriclite.errors import SetupOrderError


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
    inference: bool = False
    """Whether ``after`` was set inside ``torch.inference_mode``."""
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
    """Within it nothing is noted or answered; after it, what still has no memory is looked after again.

    Raises:
        SetupOrderError: inside of a recording ``init_module``, or only partly inside ``torch.inference_mode``.
    """
    if _Now.recorder is not None:
        raise SetupOrderError(
            "A model must be complete before it gets memory, but `init_module` has not ended yet."
            " Call setup or materialize after its block."
        )
    _stop_after()
    try:
        yield
    finally:
        _go_on_after()


def attend(module: nn.Module) -> None:
    """Look after a module that shares recorded tensors with one that was set up before."""
    if _Now.recording is None or _Now.after is not None or _Now.recorder is not None:
        return
    with _torch.raw():
        tensors = [t for t in (*module.parameters(), *module.buffers()) if _Now.recording.knows(t)]
        _Now.recording.reopen({_Now.recording.ref(t).storage for t in tensors})
    if tensors:
        _go_on_after()


def tidy() -> None:
    """Stop looking after recorded tensors once there are none: it costs every operation a little."""
    if _Now.after is None or _Now.after.recorder.recording.waits():
        return
    if _Now.inference or not torch.is_inference_mode_enabled():  # else torch would ask for what is gone, see below
        _stop_after()
        _forget()


def _go_on_after() -> None:
    if _Now.recording is None or _Now.after is not None:
        return
    if not _Now.recording.waits():
        _forget()
        return
    for stream in _Now.recording.streams.values():
        stream.lazy = False  # others draw from the generators now
    _Now.after = _Modes.of(_Now.recording, torch.device("cpu"), makes=False)
    _Now.inference = torch.is_inference_mode_enabled()
    _torch.put_below(_Now.after.recorder, _Now.after.answers)


def _forget() -> None:
    """Let go of the tape, unless somebody shares a tensor with what was set up."""
    if _Now.recording is not None and not _Now.recording.lives():
        _Now.recording = None


def _stop_after() -> None:
    if _Now.after is not None:
        if _Now.inference != torch.is_inference_mode_enabled() and _Now.after.recorder.recording.waits():
            # Torch puts back which modes it asks when inference mode ends: taken away inside it, they would be asked
            # for, and put there inside it, not be asked.
            raise SetupOrderError(
                "`init_module` and what follows up to setup must be inside of one torch.inference_mode, or all outside,"
                f" but only {'init_module' if _Now.inference else 'the later part'} is inside. Move one to the other."
            )
        _torch.take_away(_Now.after.recorder, _Now.after.answers)
        _Now.after = None
        if _Now.recording is not None:
            for stream in _Now.recording.streams.values():
                stream.lazy = stream.may_lag

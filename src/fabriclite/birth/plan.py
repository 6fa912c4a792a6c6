"""The plan of a birth is a value; one context manager enters it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum

import torch

from fabriclite.birth import session
from fabriclite.spelling import as_code


class Birth(Enum):
    """What happens to a tensor that a module's ``__init__`` creates."""

    INITIALISED = "initialised"
    """Real memory, values from the module's own code, at once. ``setup`` keeps this rank's cut."""

    RECORDED = "recorded"
    """No memory: what the module's code does is noted. ``setup`` does it then, for this rank's part alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitPlan:
    """What ``init_module`` will do, before it does it.

    Attributes:
        birth: how tensors come to be.
        device: where they come to be.
        dtype: the default floating-point dtype while they do.
    """

    birth: Birth
    device: torch.device
    dtype: torch.dtype

    __repr__ = as_code

    @classmethod
    def of(cls, *, record: bool, device: torch.device, dtype: torch.dtype) -> "InitPlan":
        """``record``: whether the strategy gains from it. Random streams are known of CPU and CUDA devices alone."""
        birth = Birth.RECORDED if record and device.type in session.RECORDABLE else Birth.INITIALISED
        return cls(birth=birth, device=device, dtype=dtype)


@contextmanager
def enter(plan: InitPlan) -> Iterator[None]:
    """Enter ``plan``. Nothing happens before ``with``; everything is undone after it, also on an error."""
    record = session.recording(plan.device) if plan.birth is Birth.RECORDED else session.making()
    with default_dtype(plan.dtype), record, _by_default_on(plan.device):
        yield


def _by_default_on(device: torch.device) -> AbstractContextManager[object]:
    """Torch's own context, unless it changes nothing: in Python it looks at every call."""
    return nullcontext() if torch.get_default_device() == device else device


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the dtype of floating-point tensors that are created without one."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)

"""Looks at the losses of each step before the optimizer does, and says what is behind a bad one."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fabriclite.errors import NonFiniteError
from fabriclite.watching.losses import Call, Looking, Losses, Usual
from fabriclite.watching.options import NonFinite
from fabriclite.watching.records import EventKind
from fabriclite.watching.repeating import Finding
from fabriclite.watching.spikes import Spike, Spikes

Tell = Callable[[EventKind, str, Mapping[str, Any], bool], None]
"""``tell(kind, text, details, show)``: ``show`` it to people too."""


class Guard:
    """One for each rank; all make the same calls.

    Args:
        losses: notes them.
        looking: finds modules.
        nonfinite: what a loss that is not finite leads to.
        spikes: whether losses far above the last ones are told.
        tell: receives what happened.
    """

    def __init__(self, losses: Losses, looking: Looking, nonfinite: NonFinite, spikes: bool, tell: Tell) -> None:
        self._losses = losses
        self._looking = looking
        self._nonfinite = nonfinite
        self._usual = Usual() if spikes else None
        self._spikes = Spikes()
        self._tell = tell
        self._was_bad = False

    @property
    def active(self) -> bool:
        return self._nonfinite != "ignore" or self._usual is not None

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any, step: int) -> None:
        """A forward that will be differentiated begins, in ``step`` (counted from this start)."""
        if self.active:
            self._losses.keep(Call(module, args, kwargs))
        if self._usual is not None:
            self._usual.begin(module, step)

    def after_forward(self) -> None:
        if self._usual is not None:
            self._usual.end()

    def note(self, loss: Tensor) -> None:
        if self.active:
            self._losses.note(loss)

    def check(self, step: int, stepped: str) -> None:
        """Look at the losses since the last check. Every rank must call this.

        Args:
            step: that is being made.
            stepped: what became of the weights, for a message.

        Raises:
            NonFiniteError: one is not finite on some rank, and that was to be raised.
        """
        if not self.active:
            return
        agreed = self._losses.agree()
        if not agreed.finite and self._nonfinite != "ignore":
            self._bad(step, agreed.here, stepped)
        elif agreed.finite and self._usual is not None:
            spike = self._spikes.judge(agreed.mean)
            if spike is not None:
                self._far(step, spike, self._usual)
        self._was_bad = not agreed.finite

    def forget(self) -> None:
        """The step is done."""
        self._losses.forget()

    def _bad(self, step: int, here: float | None, stepped: str) -> None:
        if self._was_bad:
            return  # of several in a row only the first is looked into
        found = self._looking.find(self._losses.calls, here)
        rank, value, finding = next((r, v, f) for r, (v, f) in enumerate(found) if v is not None)
        others = sum(v is not None for v, _ in found) - 1
        text = f"The loss must be finite, but is {value} on rank {rank}" + (f" and {others} more" if others else "")
        text = f"{text} in step {step}. {finding}"
        raises = self._nonfinite == "raise"
        self._tell("nonfinite", text, {"module": finding.module, "rank": rank, **_details(finding)}, not raises)
        if raises:
            raise NonFiniteError(f"{text} {stepped} To go on in spite of it, pass nonfinite='warn' to fabric.monitor.")

    def _far(self, step: int, spike: Spike, usual: Usual) -> None:
        where = self._looking.far(self._losses.calls, usual)
        text = f"The loss of step {step} is {spike.value:.4g}, far above the {spike.median:.4g} of the steps before"
        details = {"value": spike.value, "median": spike.median, "limit": spike.limit}
        self._tell("spike", f"{text}; {where}." if where else f"{text}.", details, True)


def _details(finding: Finding) -> dict[str, Any]:
    return {"kind": finding.kind, "type": finding.type, "shape": finding.shape, "tensors": finding.tensors}

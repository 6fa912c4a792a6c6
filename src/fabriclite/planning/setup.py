"""What set-up and loading take at their highest, beside what they leave behind."""

from collections.abc import Mapping
from typing import Final

from fabriclite.birth.parts import AT_ONCE
from fabriclite.layout import Layout
from fabriclite.planning.trace import Trace
from fabriclite.planning.values import Kind, Memory, Moment, Phase

_MASTER: Final = 4


def setup_peaks(trace: Trace, layout: Layout, device: Mapping[Kind, int], state: int, part: int) -> dict[Phase, Moment]:
    """The highest moments of set-up and of loading a checkpoint with the optimizer's state.

    Args:
        trace: of the model.
        layout: how it is spread.
        device: what set-up leaves on the device.
        state: bytes of the optimizer's state there.
        part: elements that this rank's optimizer steps.
    """
    built, resting = trace.building - trace.buffers, Memory(device)
    whole = sum(weight.bytes for weight in trace.weights)
    begun = 0
    if layout.flat and layout.gathers:
        extra = _found_hooks(trace, device)
    elif layout.flat:
        extra = 0 if layout.optimizer_on_host else part * _MASTER  # a gradient is made, and let go again
        begun = max(built, whole + device.get("parameters", 0))
    elif layout.shards_parameters or layout.tensor > 1:
        extra = _piece(layout)
    else:
        extra, begun = 0, built
    ended = Memory({**resting.by_kind, "temporary": extra})
    making = Memory({"parameters": whole, "temporary": begun - whole, "buffers": trace.buffers})
    highest = making if begun and making.total > ended.total else ended
    largest = max(w.rows(layout.shard if layout.shards_parameters else 1) * w.dtype.itemsize for w in trace.weights)
    loading = {**resting.by_kind, "temporary": largest}
    loading["optimizer"] = loading.get("optimizer", 0) + state
    return {"init": Moment("init", "", highest), "load": Moment("load", "", Memory(loading))}


def _piece(layout: Layout) -> int:
    """Scratch memory of one thread that draws what it then cuts: rows are drawn without the rest, columns are not."""
    return AT_ONCE * layout.param_dtype.itemsize if layout.tensor > 1 else 0


def _found_hooks(trace: Trace, device: Mapping[Kind, int]) -> int:
    """Parts are held twice until set-up ends, while every parameter is gathered once to find its hooks.

    Gloo gathers into memory of its own.
    """
    largest = max(weight.bytes for weight in trace.weights)
    return device.get("parameters", 0) + largest * (2 if trace.device == "cpu" else 1)

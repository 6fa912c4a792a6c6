"""What set-up and loading take at their highest, beside what they leave behind."""

from collections.abc import Mapping
from typing import Final

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
    built, resting = _built(trace, layout), Memory(device)
    begun: Memory | None = None
    if layout.flat and layout.gathers:
        extra = _gathered_once(trace, layout)
    elif layout.flat:
        extra = 0 if layout.optimizer_on_host else part * _MASTER  # a gradient is made, and let go again
        begun = Memory({"parameters": built, "temporary": device.get("parameters", 0), "buffers": trace.buffers})
    elif layout.shards_parameters or layout.tensor > 1:
        extra = _piece(trace, layout)
    else:
        extra = 0
        begun = Memory({"parameters": built, "buffers": trace.buffers})
    ended = Memory({**resting.by_kind, "temporary": extra})
    highest = max((m for m in (begun, ended) if m is not None), key=lambda memory: memory.total)
    largest = max(w.rows(layout.shard if layout.shards_parameters else 1) * w.dtype.itemsize for w in trace.weights)
    loading = {**resting.by_kind, "temporary": largest}
    loading["optimizer"] = loading.get("optimizer", 0) + state
    return {"init": Moment("init", "", highest), "load": Moment("load", "", Memory(loading))}


def _built(trace: Trace, layout: Layout) -> int:
    """Bytes of parameters at the highest moment of the constructor, where that makes real ones."""
    return max(trace.building - trace.buffers, sum(weight.bytes for weight in trace.weights))


def _piece(trace: Trace, layout: Layout) -> int:
    """What is made whole to be cut: nothing where a part can be made by itself, else a parameter.

    Rows can be made without the rest. Columns of a matrix cannot, and rows of columns are cut in two steps.
    """
    if layout.tensor == 1:
        return 0
    largest = max(weight.whole * weight.dtype.itemsize for weight in trace.weights)
    return largest * (2 if layout.shards_parameters else 1)


def _gathered_once(trace: Trace, layout: Layout) -> int:
    """Parameters that stay gathered are first gathered in set-up, and the others one by one to find their hooks."""
    small = sum(weight.bytes for weight in trace.weights if weight.numel < layout.persistent_numel)
    return 2 * small + max(weight.bytes for weight in trace.weights)

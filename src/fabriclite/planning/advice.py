"""Sentences beside a plan: what it does not know, and what people ask."""

from collections.abc import Iterator

from fabriclite.layout import Layout
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.text import size
from fabriclite.planning.trace import Trace
from fabriclite.planning.values import Estimate


def notes(estimate: Estimate, layout: Layout, hardware: Hardware, traced: Trace, unread: bool) -> tuple[str, ...]:
    """Advice on one estimate of ``traced``. ``unread``: tensor parallelism sends what was not counted."""
    found = [*_rule_of_thumb(estimate, hardware), *_states(layout), *_host(estimate)]
    if traced.simulated != traced.device:
        found.append(
            f"Kernels of {traced.simulated} were looked at, since this torch has none of {traced.device}: attention and"
            " fused operations may keep other things there."
        )
    if unread:
        found.append("What tensor parallelism sends is not all counted: its plan holds more than columns and rows.")
    return tuple(found)


def _rule_of_thumb(estimate: Estimate, hardware: Hardware) -> Iterator[str]:
    """4 N >= M: https://www.colossalai.org/docs/features/lazy_init."""
    if hardware.memory is None:
        return
    left, right = 4 * estimate.parameters / 1e9, hardware.memory / 1e9
    if left >= right:
        yield (
            "A rule of thumb of the field asks for lazy initialisation where 4 x billions of parameters"
            f" ({left:.0f}) is at least the GB of memory ({right:.0f}), as here: make the model in"
            " fabric.init_module()."
        )


def _states(layout: Layout) -> Iterator[str]:
    if layout.param_dtype.itemsize == 2 and not layout.master:
        yield (
            "Parameters and the optimizer's state are kept in 16 bits, with no float32 copy; a mixed precision keeps"
            " float32 ones."
        )


def _host(estimate: Estimate) -> Iterator[str]:
    if estimate.host.total:
        yield (
            f"Offloading keeps {size(estimate.host.total)} a rank in host memory,"
            f" {size(estimate.host.total * estimate.ranks_per_node)} a machine."
        )

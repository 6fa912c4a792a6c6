"""What tensor parallelism sends for the products it splits: read off the plan and the shapes of the layers."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fabriclite.layout import Layout
from fabriclite.planning.cost import TENSOR
from fabriclite.planning.trace import Trace
from fabriclite.planning.traffic import Pattern, axes, collective
from fabriclite.planning.values import Traffic


def traffic(
    traced: Trace, config: Any, layout: Layout, ranks_per_node: int, recomputed: Sequence[str]
) -> list[Traffic]:
    """Collectives of activations in forward and backward, as torch's styles make them.

    Each layer sends by itself: three layers split by columns behind one input reduce its gradient three times. What is
    computed again in backward is sent again. Layers whose style says something else than columns and rows, and all
    of ``parallelize_fn``, are not read; :func:`unread` says so.

    Args:
        traced: its skeleton is the model before it is split.
        config: of the strategy that splits it.
        layout: of that.
        ranks_per_node: ranks of one machine.
        recomputed: names of the modules that are computed again in backward.
    """
    tokens = traced.batch * (traced.sequence or 1)
    sizes: dict[tuple[Pattern, str], list[int]] = {}
    for name, layer, style in _split(traced, config, layout):
        for pattern, when, width in _sent(layer, style):
            each = tokens * width * layout.compute_dtype.itemsize
            sizes.setdefault((pattern, when), []).append(each)
            if when == "forward" and any(name.startswith(f"{block}.") for block in recomputed):
                sizes.setdefault((pattern, "recomputation"), []).append(each)
    axis = axes(layout)["tensor"]
    return [
        item
        for (pattern, when), each in sizes.items()
        for item in collective(pattern, f"activations {TENSOR}, {when}", sum(each), len(each), axis, ranks_per_node)
    ]


def unread(traced: Trace, config: Any, layout: Layout) -> bool:
    """Whether tensor parallelism may send what is not counted."""
    split = list(_split(traced, config, layout))
    return layout.tensor > 1 and (not split or any(not list(_sent(layer, style)) for _, layer, style in split))


def _split(traced: Trace, config: Any, layout: Layout) -> list[tuple[str, nn.Module, Any]]:
    """``(name, layer, style)`` of what the plan splits."""
    if layout.tensor == 1 or config.parallelize_fn is not None:
        return []
    from fabriclite.strategies import tp_plan

    plan = config.plan if config.plan is not None else tp_plan.carried_by(traced.skeleton)
    styles = tp_plan.expand(traced.skeleton, plan)
    return [(name, traced.skeleton.get_submodule(name), style) for name, style in styles.items()]


def _sent(layer: nn.Module, style: Any) -> Iterator[tuple[Pattern, str, int]]:
    """``(collective, when, width of the activation)`` of one layer."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    match layer, style:
        case nn.Linear(in_features=width, out_features=made), ColwiseParallel():
            if style.input_layouts[0].is_shard():  # a sequence in parts is put together, and its gradient cut again
                yield "all-gather", "forward", width
                yield "reduce-scatter", "backward", width
            else:
                yield "all-reduce", "backward", width
            if style.output_layouts[0].is_replicate():
                yield "all-gather", "forward", made
        case nn.Linear(in_features=width, out_features=made), RowwiseParallel():
            yield _summing(style), "forward", made
            if style.output_layouts[0].is_shard():
                yield "all-gather", "backward", made
            if style.input_layouts[0].is_replicate():
                yield "all-gather", "backward", width
        case nn.Embedding(embedding_dim=width), RowwiseParallel():
            yield _summing(style), "forward", width
            if style.output_layouts[0].is_shard():
                yield "all-gather", "backward", width
        case nn.Embedding(embedding_dim=width), ColwiseParallel() if style.output_layouts[0].is_replicate():
            yield "all-gather", "forward", width


def _summing(style: Any) -> Pattern:
    return "reduce-scatter" if style.output_layouts[0].is_shard() else "all-reduce"

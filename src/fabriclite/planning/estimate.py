"""What one layout of a traced step costs one rank. Pure and fast: no tensor is made."""

from collections.abc import Mapping, Sequence
from typing import Final

from fabriclite.errors import ConfigError
from fabriclite.layout import Layout
from fabriclite.planning.ledger import Ledger
from fabriclite.planning.rules import Gathering, Replicated, Rule
from fabriclite.planning.trace import Trace
from fabriclite.planning.tracing import trace as trace
from fabriclite.planning.values import Estimate, Kind, Memory, Moment
from fabriclite.precision import Precision
from fabriclite.strategy import StrategyConfig

_MOMENTS: Final = 400
"""Points of a timeline at most: more cannot be seen in a picture."""


def estimate(
    trace: Trace, config: StrategyConfig, *, world_size: int, ranks_per_node: int, precision: Precision
) -> Estimate:
    """What ``config`` on ``world_size`` ranks makes of a traced step. ``traffic`` and ``notes`` stay empty.

    Args:
        trace: of the model, at the batch of one rank, with the tensor parallelism of ``config``.
        config: a strategy.
        world_size: processes.
        ranks_per_node: of them on one machine.
        precision: that of the trace.

    Raises:
        ConfigError: ``config`` cannot run on so many ranks or in this precision, or ``trace`` is of another one.
    """
    config.check_world(world_size)
    layout = config.layout(world_size, precision)
    _check(trace, config, layout, precision)
    rule = rule_of(trace, layout)
    step = trace.steps[rule.computes_in]
    device, host = _at_rest(trace, layout, rule)
    ledger = Ledger(device)
    for beat in step.beats:
        ledger.phase, ledger.module = beat.phase, beat.module
        ledger.see(beat.peak)
        ledger.own, ledger.module = beat.end, beat.mark.name
        rule.at(beat.mark, ledger)
        ledger.keep()
    _step(trace, layout, rule, ledger, host)
    return Estimate(
        model=trace.model,
        parameters=trace.parameters,
        strategy=repr(config),
        precision=precision.name,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        batch=trace.batch,
        sequence=trace.sequence,
        peaks=ledger.peaks,
        timeline=thinned(ledger.moments),
        host=Memory(host),
        flops=step.flops,
        by_module=step.by_module,
    )


def _check(trace: Trace, config: StrategyConfig, layout: Layout, precision: Precision) -> None:
    if precision.name != trace.precision:
        raise ConfigError(
            f"`precision` must be that of the trace, {trace.precision}, but is {precision.name}. Trace again."
        )
    if precision.name not in config.precisions:
        raise ConfigError(
            f"`precision` must be one of {', '.join(sorted(config.precisions))} with {type(config).__name__}, but is"
            f" {precision.name}."
        )
    if layout.tensor != trace.tensor:
        raise ConfigError(
            f"`trace` must be of {layout.tensor} ranks that share one matrix product, as the strategy has them, but is"
            f" of {trace.tensor}. Trace with tensor={layout.tensor}."
        )


def rule_of(trace: Trace, layout: Layout) -> Rule:
    """How ``layout`` spreads the traced model."""
    if layout.groups is not None:
        return Gathering(layout, trace.weights, layout.groups(trace.skeleton))
    return Replicated(layout, trace.weights)


def _at_rest(trace: Trace, layout: Layout, rule: Rule) -> tuple[dict[Kind, int], dict[Kind, int]]:
    """What the first step leaves on the device and on the host, gradients apart."""
    held = rule.resident()
    state = _state(trace, layout, rule)
    device: dict[Kind, int] = {
        "parameters": held.get("parameters", 0),
        "communication": held.get("communication", 0),
        "optimizer": held.get("optimizer", 0) + (0 if layout.optimizer_on_host else state),
        "buffers": trace.buffers,
        "input": trace.inputs,
    }
    host: dict[Kind, int] = {
        "parameters": held.get("host parameters", 0),
        "optimizer": held.get("host optimizer", 0) + (state if layout.optimizer_on_host else 0),
    }
    return device, {kind: size for kind, size in host.items() if size}


def _state(trace: Trace, layout: Layout, rule: Rule) -> int:
    """Bytes of the optimizer's state, of which ``layout.master`` makes float32 what is like the parameters."""
    kept, elements = trace.optimizing, rule.stepped()
    width = 4 if layout.master else layout.param_dtype.itemsize
    trained = sum(weight.trainable for weight in trace.weights)
    return round(elements * (kept.like * width + kept.other) + kept.fixed * trained)


def _step(trace: Trace, layout: Layout, rule: Rule, ledger: Ledger, host: Mapping[Kind, int]) -> None:
    ledger.phase, ledger.module = "step", ""
    ledger.see(ledger.own)
    rule.step(ledger)
    if not layout.optimizer_on_host:
        width = 4 if layout.master else layout.param_dtype.itemsize
        ledger.pass_by("temporary", round(trace.optimizing.temporary * rule.stepped() * width))
    rule.stepping(ledger)
    ledger.keep()


def thinned(moments: Sequence[Moment]) -> tuple[Moment, ...]:
    """At most ``_MOMENTS`` of ``moments``: of each stretch the highest."""
    size = -(-len(moments) // _MOMENTS)
    parts = [moments[i : i + size] for i in range(0, len(moments), size or 1)]
    return tuple(max(part, key=lambda moment: moment.memory.total) for part in parts)

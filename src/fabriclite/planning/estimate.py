"""What one layout of a traced step costs one rank. Pure and fast: no tensor is made."""

from typing import Final
from weakref import WeakKeyDictionary

from torch import nn

from fabriclite.errors import ConfigError
from fabriclite.layout import Group, Groups, Layout
from fabriclite.planning.flat import ByModule, Flat
from fabriclite.planning.ledger import Ledger
from fabriclite.planning.rules import Gathering, Replicated, Rule
from fabriclite.planning.setup import setup_peaks
from fabriclite.planning.trace import Trace
from fabriclite.planning.tracing import trace as trace
from fabriclite.planning.values import KINDS, Estimate, Kind, Memory
from fabriclite.precision import Precision
from fabriclite.strategy import StrategyConfig

_MOMENTS: Final = 400
"""Points of a timeline at most: more cannot be seen in a picture."""
_CHOSEN: Final[WeakKeyDictionary[nn.Module, list[tuple[Groups, tuple[Group, ...]]]]] = WeakKeyDictionary()
"""By skeleton, what was asked for and what it chose."""


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
    device, host = _at_rest(trace, rule)
    state = _state(trace, layout, rule)
    before = setup_peaks(trace, layout, device, 0 if layout.optimizer_on_host else state, rule.stepped())
    stateful = host if layout.optimizer_on_host else device
    stateful["optimizer"] = stateful.get("optimizer", 0) + state
    if rule.gradients_on_host:
        host["gradients"] = rule.gradients_on_host
    ledger = Ledger({**device, "input": trace.inputs})
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
        peaks={**before, **ledger.peaks()},
        timeline=ledger.timeline(_MOMENTS),
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
        return Gathering(layout, trace.weights, groups_of(trace, layout.groups), trace.device == "cpu")
    if layout.flat and layout.gathers:
        return ByModule(layout, trace.weights, _own(trace.skeleton), trace)
    if layout.flat:
        return Flat(layout, trace.weights)
    return Replicated(layout, trace.weights)


def groups_of(trace: Trace, groups: Groups) -> tuple[Group, ...]:
    """``groups(trace.skeleton)``, looked up where it was asked for before: a search asks again for every layout."""
    known = _CHOSEN.setdefault(trace.skeleton, [])
    for asked, found in known:
        if asked == groups:
            return found
    known.append((groups, groups(trace.skeleton)))
    return known[-1][1]


def _own(module: nn.Module) -> dict[str, list[str]]:
    """The parameters that each module holds itself, under their first names."""
    first: dict[int, str] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(param), name)
    return {
        name: [first[id(param)] for param in sub.parameters(recurse=False)]
        for name, sub in module.named_modules(remove_duplicate=False)
    }


def at_rest(trace: Trace, layout: Layout) -> tuple[dict[Kind, int], dict[Kind, int]]:
    """What set-up leaves on the device and on the host."""
    return _at_rest(trace, rule_of(trace, layout))


def _at_rest(trace: Trace, rule: Rule) -> tuple[dict[Kind, int], dict[Kind, int]]:
    device: dict[Kind, int] = {"buffers": trace.buffers}
    host: dict[Kind, int] = {}
    for name, size in rule.resident().items():
        where = host if name.startswith("host ") else device
        kind = name.removeprefix("host ")
        assert kind in KINDS
        where[kind] = where.get(kind, 0) + size
    return device, host


def _state(trace: Trace, layout: Layout, rule: Rule) -> int:
    """Bytes of the optimizer's state, of which ``layout.master`` makes float32 what is like the parameters."""
    kept, elements = trace.optimizing, rule.stepped()
    stepped = 1 if rule.together else sum(weight.trainable for weight in trace.weights)
    return round(elements * (kept.like * _width(layout) + kept.other) + kept.fixed * stepped)


def _width(layout: Layout) -> int:
    """Bytes of an element that the optimizer steps."""
    return 4 if layout.master else layout.param_dtype.itemsize


def _step(trace: Trace, layout: Layout, rule: Rule, ledger: Ledger, host: dict[Kind, int]) -> None:
    ledger.phase, ledger.module = "step", ""
    ledger.see(ledger.own)
    ledger.keep()
    rule.step(ledger)
    share = trace.optimizing.together if rule.together else trace.optimizing.temporary
    temporary = round(share * rule.stepped() * _width(layout))
    if layout.optimizer_on_host:
        host["temporary"] = temporary
    else:
        ledger.pass_by("temporary", temporary)
    ledger.keep()

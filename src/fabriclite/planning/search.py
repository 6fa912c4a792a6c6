"""Which ways to train a model fit into memory, the cheapest first, and why the others do not."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fabriclite.errors import ConfigError
from fabriclite.planning import text
from fabriclite.planning.plan import Choice, Plan, code
from fabriclite.planning.text import Table, size
from fabriclite.precision import Precision
from fabriclite.strategies.configs import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from fabriclite.strategy import StrategyConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A strategy of which no way fits.

    Attributes:
        config: the strategy.
        reason: why, of the way that takes least memory; or why it cannot be meant at all.
        way: which way that is.
        least: bytes of that way's peak; ``None`` where it cannot be meant.
    """

    config: StrategyConfig
    reason: str
    way: str = ""
    least: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Layouts:
    """What a search found. ``print(layouts)`` shows it.

    Attributes:
        fitting: plans that fit, the cheapest first: the most samples a second that their bound allows with all going on
            at one time, then with nothing doing so, then the smallest peak.
        refused: strategies of which none fits.
    """

    fitting: tuple[Plan, ...]
    refused: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers; plans without their timelines."""
        plans = [{key: item for key, item in plan.to_json().items() if key != "timeline"} for plan in self.fitting]
        refused = [{"strategy": code(each.config), "reason": each.reason, "least": each.least} for each in self.refused]
        return {"fitting": plans, "refused": refused}

    def tables(self, most: int = 10) -> list[Table]:
        """Of the fitting plans at most ``most``."""
        rows = tuple(_row(plan) for plan in self.fitting[:most])
        more = f", the first {most} of {len(self.fitting)}" if len(self.fitting) > most else ""
        head = ("strategy", "precision", "recomputes", "peak", "computing", "sending", "limited by", "samples/s below")
        reasons = tuple((code(each.config), each.way, each.reason) for each in self.refused)
        return [
            Table(f"These fit, the cheapest first{more}", head, rows),
            Table("These do not", ("strategy", "with least memory", "why"), reasons),
            Table("Notes", (), self._notes()),
        ]

    def _notes(self) -> tuple[tuple[str, ...], ...]:
        if not self.fitting:
            return ()
        speeds = self.fitting[0].hardware
        rates = (("others of its machine", speeds.node), ("other machines", speeds.network), ("its host", speeds.host))
        links = ", ".join(f"{rate / 1e9:.4g} GB/s to {to}" for to, rate in rates if rate)
        return (
            (f"Times are for {(speeds.flops or 0) / 1e12:.4g} TFLOP/s a device, and {links}: say those of yours.",),
            ("They are bounds from below: real steps take longer. What an offloaded optimizer takes is not in them.",),
        )

    def __str__(self) -> str:
        return text.plain(self.tables())


def _row(plan: Plan) -> tuple[str, ...]:
    slowest = max(plan.bound.links.values(), default=0.0)
    return (
        code(plan.choice.config),
        plan.choice.precision.name,
        "blocks" if plan.choice.checkpointing else "nothing",
        size(plan.peak),
        text.seconds(plan.bound.compute),
        text.seconds(slowest),
        plan.bound.limited_by or "",
        _rate(_samples(plan) / plan.bound.step) if plan.bound.step else "",
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _samples(plan: Plan) -> int:
    """Of a step, over all ranks: those that share a matrix product read the same."""
    return plan.choice.batch * plan.layout.data


def configs(world_size: int, ranks_per_node: int) -> Iterator[StrategyConfig]:
    """The strategies that are looked at on so many ranks."""
    if world_size == 1:
        yield SingleDeviceStrategy()
    else:
        yield DDPStrategy()
        yield FSDPStrategy()
        yield FSDPStrategy(reshard_after_forward=False)
        for shard in _parts(world_size, ranks_per_node):
            yield FSDPStrategy(device_mesh=(world_size // shard, shard))
    yield FSDPStrategy(cpu_offload=True)
    for tensor in _divisors(min(world_size, ranks_per_node)):
        if tensor > 1 and world_size % tensor == 0:
            yield ModelParallelStrategy(tensor_parallel_size=tensor)
    if world_size > 1:
        yield DeepSpeedStrategy(stage=1)
        yield DeepSpeedStrategy(stage=2)
        yield DeepSpeedStrategy(stage=3)
    yield DeepSpeedStrategy(stage=2, offload_optimizer=True)
    yield DeepSpeedStrategy(stage=3, offload_optimizer=True)
    yield DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _parts(world_size: int, ranks_per_node: int) -> list[int]:
    """Sizes of hybrid sharding: parts of a machine, a machine, twice as many machines each time."""
    sizes = _divisors(ranks_per_node)
    while sizes[-1] * 2 < world_size:
        sizes.append(sizes[-1] * 2)
    return [n for n in sizes if 1 < n < world_size and world_size % n == 0]


def search(
    planned: Callable[[Choice], Plan],
    among: Sequence[StrategyConfig],
    precisions: Sequence[Precision],
    batch: int,
    sequence: int | None,
) -> Layouts:
    """Plan every strategy in every precision; with activation checkpointing too where it does not fit without.

    Args:
        planned: plans one choice, held against a memory that was given.
        among: strategies.
        precisions: those that a strategy cannot mean are left out for it.
        batch, sequence: of one rank.

    Raises:
        ConfigError: the model cannot be planned at all.
    """
    fitting: list[Plan] = []
    refused: list[Refusal] = []
    possible = False
    for config in among:
        plans, error = _ways(planned, config, precisions, batch, sequence)
        if error is not None and not possible:
            raise error  # it is the model that cannot be planned: the first strategies ask nothing special of it
        possible = True
        fits = [plan for plan in plans if plan.fits]
        fitting += fits
        if not plans:
            refused.append(Refusal(config, _why(config, precisions, error)))
        elif not fits:
            least = min(plans, key=lambda plan: plan.peak)
            refused.append(Refusal(config, least.too_much or "", _way(least), least.peak))
    return Layouts(tuple(sorted(fitting, key=_price)), tuple(sorted(refused, key=lambda each: each.least or 2**63)))


def _ways(
    planned: Callable[[Choice], Plan],
    config: StrategyConfig,
    precisions: Sequence[Precision],
    batch: int,
    sequence: int | None,
) -> tuple[list[Plan], ConfigError | None]:
    """The plans of a strategy, and what stopped it if there is none without checkpointing."""
    plans: list[Plan] = []
    for precision in precisions:
        if precision.name not in config.precisions:
            continue
        for checkpointing in (False, True):
            choice = Choice(
                config=config, precision=precision, batch=batch, sequence=sequence, checkpointing=checkpointing
            )
            try:
                plans.append(planned(choice))
            except ConfigError as error:
                if not checkpointing:
                    return plans, error
                break  # a model without repeated blocks has nothing to compute again
            if plans[-1].fits:
                break  # computing blocks again costs time, and saves memory that is there
    return plans, None


def _why(config: StrategyConfig, precisions: Sequence[Precision], error: ConfigError | None) -> str:
    if error is not None:
        return str(error)
    return f"it knows none of {', '.join(precision.name for precision in precisions)}"


def _way(plan: Plan) -> str:
    return f"{plan.choice.precision.name}{', recomputing blocks' if plan.choice.checkpointing else ''}"


def _price(plan: Plan) -> tuple[float, float, int]:
    samples = _samples(plan)
    return ((plan.bound.step or 0.0) / samples, plan.bound.in_turn / samples, plan.peak)

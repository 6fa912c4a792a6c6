"""Estimates of one model under many layouts. What they share, the traces, is made once."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from fabriclite import arguments, seed
from fabriclite.errors import ConfigError
from fabriclite.layout import Layout
from fabriclite.planning import advice, products
from fabriclite.planning.cost import bound
from fabriclite.planning.estimate import estimate
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.models import Model
from fabriclite.planning.plan import Choice, Plan, fed
from fabriclite.planning.subject import Subject
from fabriclite.planning.trace import Trace, Weight
from fabriclite.planning.tracing import MakeOptimizer, trace
from fabriclite.planning.traffic import Parcel, of_data_parallelism, timed, to_host


@dataclass(slots=True, kw_only=True)
class Planner:
    """Plans one model on one set of devices.

    Attributes:
        model: what is trained.
        optimizer: makes one of parameters.
        optimizer_name: for people.
        world_size: processes.
        ranks_per_node: of them on one machine.
        hardware: what they run on.
        device: type of the devices, ``"cpu"`` or ``"cuda"``.
        tell: is told in a few words of each trace before it is made: those take most of the time.
    """

    model: Model
    optimizer: MakeOptimizer
    optimizer_name: str
    world_size: int
    ranks_per_node: int
    hardware: Hardware
    device: str
    tell: Callable[[str], None] = lambda words: None
    _traces: dict[tuple[object, ...], Trace] = field(default_factory=dict)

    def plan(self, choice: Choice) -> Plan:
        """What ``choice`` costs.

        Raises:
            ConfigError: it cannot be meant, of this model or on so many devices.
        """
        config, precision = choice.config, choice.precision
        arguments.check_precision(precision, config)
        config.check_world(self.world_size)
        layout = config.layout(self.world_size, precision)
        subject = self.model.recomputing if choice.checkpointing else self.model.plain
        traced = self._trace(subject, choice, layout.tensor)
        size, per_node = self.world_size, self.ranks_per_node
        made = estimate(traced, config, world_size=size, ranks_per_node=per_node, precision=precision)
        parcels, recomputed = parcels_of(traced, layout), subject.recomputed(traced.skeleton)
        sent = of_data_parallelism(parcels, layout, per_node) + to_host(parcels, layout)
        sent += products.traffic(traced, config, layout, per_node, recomputed)
        made = replace(made, traffic=timed(sent, self.hardware))
        said = advice.notes(made, layout, self.hardware, traced, products.unread(traced, config, layout))
        made = replace(made, notes=(*made.notes, *said))
        return Plan(
            choice=choice,
            layout=layout,
            estimate=made,
            bound=bound(made, self.hardware),
            hardware=self.hardware,
            optimizer=self.optimizer_name,
        )

    def _trace(self, subject: Subject, choice: Choice, tensor: int) -> Trace:
        splitting, precision = choice.config if tensor > 1 else None, choice.precision
        key = (
            precision.name,
            precision.param_dtype,
            precision.compute_dtype,
            choice.batch,
            choice.sequence,
            choice.checkpointing,
            tensor,
            repr(splitting),
        )
        if key not in self._traces:
            again = ", recomputing blocks" if choice.checkpointing else ""
            split = f", split over {tensor}" if tensor > 1 else ""
            self.tell(f"tracing {subject.name} in {precision.name}{split}{again}, {fed(choice)}")
            with seed.seeded(0), _splitting(subject.name, tensor):
                self._traces[key] = trace(
                    subject,
                    batch=choice.batch,
                    sequence=choice.sequence,
                    precision=choice.precision,
                    optimizer=self.optimizer,
                    tensor=tensor,
                    config=splitting,
                    device=self.device,
                )
        return self._traces[key]


@contextmanager
def _splitting(name: str, tensor: int) -> Iterator[None]:
    """Say of what fails that it is the split, where there is one: models count on sizes that it changes."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ConfigError) else error  # what the model raised, if it did
        if tensor == 1 or cause is None:
            raise
        raise ConfigError(
            f"`tensor_parallel_size` must split {name} so that it still runs, but is {tensor}, and then:"
            f" {type(cause).__name__}: {cause}. Its number of (key and value) heads must be a multiple, as a rule."
        ) from cause


def parcels_of(traced: Trace, layout: Layout) -> list[Parcel]:
    """What travels together under ``layout``: its groups where it gathers, else the model as one."""
    weights = traced.named()
    if layout.groups is None:
        kept, freed = _kept(traced.weights, layout)
        return [_by_module(kept, root=True), _by_module(freed, root=False)]
    return [
        _parcel([weights[name] for name in group.parameters], root=group.module == "", wire=group.dtype)
        for group in layout.groups(traced.skeleton)
    ]


def _kept(weights: Sequence[Weight], layout: Layout) -> tuple[list[Weight], list[Weight]]:
    """What stays gathered from forward to backward where modules gather their own, and what does not.

    Small parameters stay, and what is used again soon: between its two uses all that comes after it is used twice.
    """
    kept: list[Weight] = []
    freed: list[Weight] = []
    left = sum(weight.numel for weight in weights)
    for weight in weights:
        soon = 2 * left <= layout.reuse_numel or weight.numel < layout.persistent_numel
        (kept if soon else freed).append(weight)
        left -= weight.numel
    return kept, freed


def _by_module(weights: Sequence[Weight], root: bool) -> Parcel:
    """Each module gathers its own."""
    owners = {weight.name.rpartition(".")[0] for weight in weights}
    return replace(_parcel(weights, root, wire=None), calls=len(owners))


def _parcel(weights: Sequence[Weight], root: bool, wire: torch.dtype | None) -> Parcel:
    elements: Counter[torch.dtype] = Counter()
    trainable: Counter[torch.dtype] = Counter()
    for weight in weights:
        elements[weight.dtype] += weight.numel
        trainable[weight.dtype] += weight.numel * weight.trainable
    return Parcel(elements, trainable, root, wire)

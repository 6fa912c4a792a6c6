"""Planning as functions: one layout, or a search. Nothing is launched, and no weights are allocated."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fabriclite.errors import ConfigError
from fabriclite.planning import optimizers, search
from fabriclite.planning.hardware import Hardware, parse_bytes, ranked
from fabriclite.planning.models import Loss, Model, model_of
from fabriclite.planning.plan import Choice, Plan
from fabriclite.planning.search import Layouts
from fabriclite.precision import Precision, PrecisionInput
from fabriclite.registry import resolve
from fabriclite.strategy import StrategyConfig

if TYPE_CHECKING:
    from fabriclite.planning.planner import Planner

Device = Literal["cuda", "cpu"]


def plan(
    model: Any,
    inputs: Any = None,
    *,
    strategy: str | StrategyConfig = "auto",
    devices: int = 1,
    per_node: int | None = None,
    precision: PrecisionInput | Precision | None = None,
    optimizer: Any = None,
    loss: Loss | None = None,
    batch: int = 1,
    sequence: int | None = None,
    checkpointing: bool = False,
    hardware: Hardware | None = None,
    device: Device = "cuda",
) -> Plan:
    """What one way to train ``model`` costs one rank: memory by phase and kind, traffic, the least time of a step.

    No weights are allocated, no process is started, and neither the model nor a random state changes.

    Args:
        model: a module (also from ``init_module``), or a function that returns one, ``(model, inputs)`` or ``(model,
            inputs, loss)``.
        inputs: arguments of the model: a tensor, a tuple, a dictionary, or a function ``(batch, sequence)`` that makes
            them. ``None`` guesses: tokens for models that take them, numbers for a linear first layer.
        strategy: as for ``Fabric``.
        devices: how many in all.
        per_node: of them on one machine; ``None`` is 8, or all if they are fewer.
        precision: as for ``Fabric``.
        optimizer: a name such as ``"adamw"``, a class, a function from parameters to one, or an optimizer whose like is
            meant; ``None`` is AdamW.
        loss: from the model's output to one number; ``None`` takes ``output.loss`` or the mean of the largest tensor.
        batch: samples per rank and forward.
        sequence: tokens of a sample.
        checkpointing: compute the model's repeated blocks again in backward (activation checkpointing).
        hardware: what it is held against: memory, speed, bandwidths.
        device: type of the devices.

    Raises:
        ConfigError: an argument has no meaning, or the model cannot be planned.
        SetupOrderError: the model was set up already.
    """
    said = precision if isinstance(precision, Precision) else Precision.parse(precision)
    planner = planner_of(
        model_of(model, inputs, loss=loss),
        optimizer=optimizer,
        devices=devices,
        per_node=per_node,
        hardware=hardware or Hardware(),
        device=device,
    )
    choice = Choice(
        config=resolve(strategy, devices),
        precision=said,
        batch=batch,
        sequence=sequence,
        checkpointing=checkpointing,
    )
    return planner.plan(choice)


def find_layouts(
    model: Any,
    inputs: Any = None,
    *,
    memory: str | int,
    devices: int = 1,
    per_node: int | None = None,
    precisions: Sequence[PrecisionInput] = ("bf16-true", "bf16-mixed"),
    optimizer: Any = None,
    loss: Loss | None = None,
    batch: int = 1,
    sequence: int | None = None,
    hardware: Hardware | None = None,
    device: Device = "cuda",
) -> Layouts:
    """Which strategies fit into ``memory``, the cheapest first, and why the others do not.

    Looked at are DDP, FSDP (full, hybrid, without resharding, offloaded), tensor parallelism within a machine with
    FSDP over the rest where the model says how it splits, and ZeRO 1, 2, 3 with and without offloading; each with
    activation checkpointing too where it does not fit without.

    Args:
        memory: of one device, such as ``"80GB"``, or bytes.
        precisions: those to look at.
        hardware: speeds to rank by; what is missing there is that of an H100 with its usual links.
        model, inputs, devices, per_node, optimizer, loss, batch, sequence, device: as for :func:`plan`.

    Raises:
        ConfigError: an argument has no meaning, or the model cannot be planned.
        SetupOrderError: the model was set up already.
    """
    planner = planner_of(
        model_of(model, inputs, loss=loss),
        optimizer=optimizer,
        devices=devices,
        per_node=per_node,
        hardware=ranked(hardware or Hardware(), parse_bytes(memory)),
        device=device,
    )
    return search_with(planner, [Precision.parse(name) for name in precisions], batch, sequence)


def search_with(planner: "Planner", precisions: Sequence[Precision], batch: int, sequence: int | None) -> Layouts:
    """Search with a planner whose hardware says its memory."""
    among = list(search.configs(planner.world_size, planner.ranks_per_node))
    return search.search(planner.plan, among, precisions, batch, sequence)


def planner_of(
    model: Model,
    *,
    optimizer: Any,
    devices: int,
    per_node: int | None,
    hardware: Hardware,
    device: str,
    tell: Callable[[str], None] = lambda words: None,
) -> "Planner":
    """A planner, its arguments checked; ``tell`` is told of each trace.

    Raises:
        ConfigError: one has no meaning.
    """
    from fabriclite.planning.planner import Planner  # a trace imports torch's DTensor, which takes 0.6 s

    for name, value in (("devices", devices), ("per_node", per_node)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")
    on_one = min(devices, 8) if per_node is None else min(devices, per_node)
    if devices % on_one:
        raise ConfigError(
            f"`devices` must be a multiple of those on one machine, but is {devices} with {on_one}. Set per_node."
        )
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"`device` must be 'cuda' or 'cpu', but is {device!r}.")
    return Planner(
        model=model,
        optimizer=optimizers.maker(optimizer),
        optimizer_name=optimizers.name_of(optimizer),
        world_size=devices,
        ranks_per_node=on_one,
        hardware=hardware,
        device=device,
        tell=tell,
    )

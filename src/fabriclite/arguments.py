"""From what a user passes to ``Fabric`` to checked values."""

import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fabriclite.devices import Machine, pick_accelerator, pick_devices, summary
from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch.environment import from_launchers
from fabriclite.launch.environments.choose import find
from fabriclite.launch.environments.described import Described, Environment
from fabriclite.launch.wishes import Wishes
from fabriclite.precision import NAMES, Precision
from fabriclite.registry import resolve
from fabriclite.strategy import StrategyConfig
from fabriclite.world import World


def as_list(value: Any) -> list[Any]:
    """``None`` is no item, a list or tuple its items, anything else one item."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def split_plugins(plugins: Any) -> tuple[list[Precision], Environment | None]:
    """The precisions among ``plugins``, and the environment if they name one.

    Raises:
        ConfigError: one is neither, or two name an environment.
    """
    values = as_list(plugins)
    precisions = [p for p in values if isinstance(p, Precision)]
    others = [p for p in values if not isinstance(p, Precision)]
    environments = [p for p in others if isinstance(p, Environment) and not isinstance(p, type)]
    unknown = [p for p in others if p not in environments]
    if unknown:
        raise ConfigError(
            "`plugins` must be None, a fabriclite.Precision or one of fabriclite.environments, but holds"
            f" {type(unknown[0]).__name__}. Strategies are passed as strategy=..., loggers as loggers=..."
        )
    if len(environments) > 1:
        raise ConfigError(f"`plugins` must name one environment at most, but holds {environments!r}. Keep one.")
    return precisions, environments[0] if environments else None


def one_precision(precision: object, plugins: Any) -> Precision:
    """The precision that ``precision`` or a :class:`Precision` among ``plugins`` says.

    Raises:
        ConfigError: unknown name, unknown plugin, or both given.
    """
    values, _ = split_plugins(plugins)
    if len(values) + (precision is not None) > 1:
        raise ConfigError(
            f"`precision` and `plugins` must not both name a precision, but are {precision!r} and {values!r}. Keep one."
        )
    return values[0] if values else Precision.parse(precision)


def wished_precision(precision: object, plugins: Any) -> Precision:
    """:func:`one_precision`; what the script leaves open is as the command line says.

    Raises:
        ConfigError: script and command line say different things.
    """
    wish = Wishes.of_this_process().precision
    if wish is None:
        return one_precision(precision, plugins)
    if precision is None and not split_plugins(plugins)[0]:
        return Precision.parse(wish)
    said = one_precision(precision, plugins)
    if said != Precision.parse(wish):
        raise ConfigError(_contradiction("precision", said.name, wish, "None"))
    return said


def wished_strategy(strategy: object, processes: int) -> object:
    """``strategy``, or what the command line says where the script leaves it ``"auto"``.

    A config of the script's agrees with the name of its kind, and is used.

    Raises:
        ConfigError: script and command line say different things.
    """
    wish = Wishes.of_this_process().strategy
    if wish is None or strategy == "auto" or wish == "auto":
        return wish if wish is not None and strategy == "auto" else strategy
    said, wished = resolve(strategy, processes), resolve(wish, processes)
    if type(said) is not type(wished) or (isinstance(strategy, str) and said != wished):
        raise ConfigError(_contradiction("strategy", strategy, wish, "'auto'"))
    return strategy


def _contradiction(name: str, said: object, wish: str, default: str) -> str:
    return (
        f"`{name}` must be the same in the script and on the command line, but is {said!r} in the script and"
        f" --{name} {wish}. Leave it {default} in the script, or leave --{name} out."
    )


def check_precision(precision: Precision, config: StrategyConfig) -> None:
    """Raise unless the strategy can mean the precision.

    Raises:
        ConfigError: it cannot; lists those it can.
    """
    if precision.name not in config.precisions:
        allowed = ", ".join(name for name in NAMES if name in config.precisions)
        raise ConfigError(
            f"`precision` must be one of {allowed} with {type(config).__name__}, but is {precision.name!r}."
        )


def check_loggers(loggers: list[Any]) -> list[Any]:
    """Raise unless each has ``log_metrics``."""
    for logger in loggers:
        if not callable(getattr(logger, "log_metrics", None)):
            raise ConfigError(
                f"`loggers` must have a method log_metrics(metrics, step), but {type(logger).__name__} has none."
            )
    return loggers


def this_environment(plugins: Any) -> Described:
    """What the launcher says of this process: the one that ``plugins`` name, else the one that is found.

    Raises:
        ConfigError: a name is unknown, or two contradict each other.
        WorldError: the named environment does not describe this process, or a variable is missing.
    """
    return find(split_plugins(plugins)[1], from_launchers())


def this_world(accelerator: object, devices: object, num_nodes: object, found: Described) -> World:
    """This process's world: as a launcher described it, else as rank 0 of the processes asked for.

    Raises:
        ConfigError: an argument has no meaning on this machine.
        WorldError: the launcher's description is incomplete or contradicts the arguments.
    """
    if num_nodes != "auto" and (isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1):
        raise ConfigError(f"`num_nodes` must be 'auto' or a whole number of at least 1, but is {num_nodes!r}.")
    machine = Machine.probe()
    kind = pick_accelerator(accelerator, machine)
    device_for = pick_devices(devices, kind, machine, found.local_size if found.launched else None, found.own_device)
    if not found.launched:
        nodes = num_nodes if isinstance(num_nodes, int) else 1
        return World(size=len(device_for) * nodes, local_size=len(device_for), device=device_for[0])
    if found.local_size != len(device_for):
        raise WorldError(
            f"`devices` must be the number of processes that were launched on this machine ({found.local_size}), but"
            f" {devices!r} means {summary(device_for)}. Pass devices='auto', or launch that many."
            + (" FABRICLITE_ENVIRONMENT=none has fabriclite start them." if found.size == 1 else "")
        )
    if found.local_rank not in device_for:
        raise WorldError(
            f"LOCAL_RANK must be in [0, {len(device_for)}), the devices used on this machine, but is"
            f" {found.local_rank}. Start one process per device."
        )
    world = World(
        rank=found.rank,
        size=found.size,
        local_rank=found.local_rank,
        local_size=found.local_size,
        node_rank=found.node_rank,
        device=device_for[found.local_rank],
    )
    if isinstance(num_nodes, int) and world.size != len(device_for) * num_nodes:
        raise WorldError(
            f"`devices` x `num_nodes` must be the number of processes that were launched ({world.size}), but"
            f" {len(device_for)} x {num_nodes} is {len(device_for) * num_nodes}. Pass both as launched:"
            f" {found.size_name} is {world.size}."
        )
    return world


def runs_a_script() -> bool:
    """Whether this process runs a file that can be run again (no notebook, no prompt, no ``python -c``)."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None or hasattr(sys, "ps1"):
        return False
    # An installed program (pytest, jupyter) that happens to run this code is no script of the user's.
    homes = [Path(sysconfig.get_path(name)) for name in ("scripts", "purelib", "platlib", "stdlib")]
    return not any(Path(file).resolve().is_relative_to(home.resolve()) for home in homes)


def check_function(function: object) -> None:
    """Raise unless ``launch`` got nothing or something to call."""
    if function is not None and not isinstance(function, Callable):  # type: ignore[arg-type]
        raise ConfigError(f"`function` must be callable as function(fabric, ...), but is {function!r}.")


def check_scheduler(scheduler: Any, optimizers: Sequence[Optimizer]) -> None:
    """Raise unless ``scheduler`` is ``None`` or sets the learning rate of one of ``optimizers``.

    Raises:
        ConfigError: it is no scheduler, or one of another optimizer.
    """
    if scheduler is None or any(getattr(scheduler, "optimizer", None) is o for o in optimizers):
        return
    of = getattr(scheduler, "optimizer", None)
    found = f"{type(scheduler).__name__} is of another {type(of).__name__}" if of else f"is {scheduler!r}"
    raise ConfigError(
        f"`scheduler` must be of an optimizer that is set up in the same call, but {found}."
        " Write fabric.setup(model, optimizer, scheduler=SomeLR(optimizer, ...))."
    )


def number(name: str, value: Any) -> Any:
    """A tensor of one element as a Python number; anything else as it is.

    Raises:
        ConfigError: the tensor has more elements, or none.
    """
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ConfigError(
            f"A metric must be a number or a tensor of one element, but {name!r} has shape {tuple(value.shape)}."
            " Reduce it first, with .mean() say."
        )
    return value.item()


def check_clipping(clip_val: object, max_norm: object, norm_type: object = 2.0) -> None:
    """Raise unless exactly one of the first two is given, as a positive number, and the norm has a meaning.

    Raises:
        ConfigError: see above.
    """
    if (clip_val is None) == (max_norm is None):
        raise ConfigError(
            "`clip_gradients` must get exactly one of `clip_val` and `max_norm`, but got"
            f" clip_val={clip_val!r} and max_norm={max_norm!r}. Keep one."
        )
    name, value = ("clip_val", clip_val) if max_norm is None else ("max_norm", max_norm)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"`{name}` must be a number above 0, but is {value!r}.")
    if norm_type != "inf" and (not isinstance(norm_type, int | float) or not norm_type > 0):
        raise ConfigError(f"`norm_type` must be a number above 0 or inf, but is {norm_type!r}.")

"""``fabriclite plan``: what a model will take, before any of it is there."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fabriclite.errors import ConfigError

if TYPE_CHECKING:
    from fabriclite.planning.hardware import Hardware
    from fabriclite.planning.models import Model
    from fabriclite.planning.planner import Planner
    from fabriclite.planning.text import Table
    from fabriclite.strategy import StrategyConfig


def add_to(rooms: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command's arguments."""
    plan = rooms.add_parser(
        "plan",
        help="memory, traffic and least time of a model under a strategy, or which strategies fit; allocates nothing",
        description="With --strategy, plan that one; without, search all that fit into --memory, the cheapest first."
        " Exit status: 0; 1 if what was asked for does not fit into --memory; 2 if arguments contradict each other.",
    )
    _add_model(plan)
    _add_training(plan)
    _add_hardware(plan)
    shown = plan.add_argument_group("what is shown")
    shown.add_argument("--fit", choices=("batch", "sequence"), help="the largest that fits into --memory")
    shown.add_argument("--what-if", action="store_true", help="what single changes would do")
    shown.add_argument("--top", type=int, default=10, metavar="N", help="of a search, show so many that fit")
    shown.add_argument("--json", action="store_true", help="for programs")
    shown.add_argument("--picture", metavar="FILE", help="draw one plan, or the cheapest, into FILE.png or FILE.svg")
    plan.set_defaults(run=run)


def _add_model(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("the model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="package.module:Name",
        help="a class of modules, or a function that returns a model, (model, inputs) or (model, inputs, loss)",
    )
    group.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="WORD",
        help="its arguments: a JSON file, a JSON object, or key=value; can be given several times",
    )
    group.add_argument("--hf-config", metavar="PATH", help="instead: a Hugging Face config.json, or its folder")


def _add_training(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("the training")
    group.add_argument("--strategy", help="as in Fabric(strategy=...); without it, a search")
    group.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the strategy's config, such as device_mesh=[8,8] or reshard_after_forward=false",
    )
    group.add_argument(
        "--precision", action="append", default=[], help="as in Fabric(precision=...); several for a search"
    )
    group.add_argument("--optimizer", default="adamw", help="of torch.optim, sgd-momentum, or package.module:Name")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="samples of one rank in a forward")
    group.add_argument("--sequence", type=int, metavar="N", help="tokens of a sample")
    group.add_argument("--checkpointing", action="store_true", help="compute repeated blocks again in backward")


def _add_hardware(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("the devices", "times are worked out where their speeds are given")
    group.add_argument("--devices", type=int, default=1, metavar="N", help="how many in all")
    group.add_argument("--per-node", type=int, metavar="N", help="of them on one machine; else 8, or all if fewer")
    group.add_argument("--memory", metavar="SIZE", help="of one device, such as 80GB (10**9) or 80GiB (2**30)")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="their type")
    group.add_argument("--gpu", metavar="NAME", help="their name as torch gives it, such as H100: for their speed")
    group.add_argument("--peak-tflops", metavar="N", help="instead: of one device, in the precision it computes in")
    for link, to in (("node", "others of its machine"), ("network", "other machines"), ("host", "its host's memory")):
        group.add_argument(
            f"--{link}-bandwidth", metavar="GB/s", help=f"of one device to {to}, one way; or such as nvlink4, ib-400"
        )


# -- running ----------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Plan and show; 1 if what was asked for does not fit."""
    _check(arguments)
    model = _model(arguments)
    return _one(arguments, model) if arguments.strategy else _search(arguments, model)


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.hf_config is None):
        raise ConfigError("Exactly one of MODEL and --hf-config must be given. Name the model once.")
    if arguments.config and arguments.model is None:
        raise ConfigError("--config must come with MODEL, but --hf-config was given. Change that file instead.")
    if arguments.gpu is not None and arguments.peak_tflops is not None:
        raise ConfigError("--gpu and --peak-tflops must not both be given: each says the speed. Keep one.")
    if arguments.memory is None and (arguments.fit or not arguments.strategy):
        what = f"--fit {arguments.fit}" if arguments.fit else "A search (no --strategy)"
        raise ConfigError(f"{what} must know the memory of a device, but --memory is missing. Add --memory 80GB, say.")
    if arguments.strategy:
        if len(arguments.precision) > 1:
            raise ConfigError("--precision must be given once with --strategy, but is given more often. Keep one.")
        return
    for name in ("settings", "fit", "what_if", "checkpointing"):
        if getattr(arguments, name):
            option = "set" if name == "settings" else name.replace("_", "-")
            raise ConfigError(f"--{option} must come with --strategy, but a search was asked for. Name a strategy.")


def _model(arguments: argparse.Namespace) -> "Model":
    from fabriclite.planning import hugging_face, models

    if arguments.hf_config is not None:
        return hugging_face.model_from(arguments.hf_config)
    return models.model_at(arguments.model, models.parse_config(arguments.config))


def _one(arguments: argparse.Namespace, model: "Model") -> int:
    from fabriclite.planning import what_if
    from fabriclite.planning.fit import fitted
    from fabriclite.planning.plan import Choice
    from fabriclite.precision import Precision

    planner = _planner(arguments, model, _hardware(arguments))
    choice = Choice(
        config=_config(arguments),
        precision=Precision.parse(next(iter(arguments.precision), None)),
        batch=arguments.batch,
        sequence=arguments.sequence,
        checkpointing=arguments.checkpointing,
    )
    if arguments.fit:
        choice = fitted(arguments.fit, planner, choice)
    plan = planner.plan(choice)
    differences = [what_if.table(plan, planner.plan)] if arguments.what_if else []
    if arguments.picture:
        plan.picture(arguments.picture)
    if arguments.json:
        changes = [dict(zip(table.head, row, strict=True)) for table in differences for row in table.rows]
        print(json.dumps({**plan.to_json(), "what_if": changes} if differences else plan.to_json(), indent=2))
    else:
        _show([*plan.tables()[:-1], *differences, plan.tables()[-1]])
    return 1 if plan.fits is False else 0


def _search(arguments: argparse.Namespace, model: "Model") -> int:
    from fabriclite.planning import api
    from fabriclite.planning.hardware import ranked
    from fabriclite.precision import Precision

    given = _hardware(arguments)
    assert given.memory is not None  # `_check` asked for it
    planner = _planner(arguments, model, ranked(given, given.memory))
    precisions = [Precision.parse(name) for name in arguments.precision or ("bf16-true", "bf16-mixed")]
    found = api.search_with(planner, precisions, arguments.batch, arguments.sequence)
    if arguments.picture and found.fitting:
        found.fitting[0].picture(arguments.picture)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(found.tables(arguments.top))
    return 0 if found.fitting else 1


def _config(arguments: argparse.Namespace) -> "StrategyConfig":
    from fabriclite.planning.models import configured
    from fabriclite.registry import resolve

    return configured(resolve(arguments.strategy, arguments.devices), arguments.settings)


def _planner(arguments: argparse.Namespace, model: "Model", hardware: "Hardware") -> "Planner":
    from fabriclite.planning.api import planner_of

    return planner_of(
        model,
        optimizer=arguments.optimizer,
        devices=arguments.devices,
        per_node=arguments.per_node,
        hardware=hardware,
        device=arguments.device,
        tell=_tell,
    )


def _tell(words: str) -> None:
    """Say what takes time, on a line that the next one replaces; only where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{words} ...", end="\r", file=sys.stderr, flush=True)


def _hardware(arguments: argparse.Namespace) -> "Hardware":
    from fabriclite.planning.hardware import Hardware, parse_bandwidth, parse_bytes, parse_tflops

    def given(name: str) -> float | None:
        value = getattr(arguments, name)
        return None if value is None else parse_bandwidth(value, name)

    return Hardware(
        memory=None if arguments.memory is None else parse_bytes(arguments.memory),
        flops=_flops_of(arguments) if arguments.peak_tflops is None else parse_tflops(arguments.peak_tflops),
        node=given("node_bandwidth"),
        network=given("network_bandwidth"),
        host=given("host_bandwidth"),
    )


def _flops_of(arguments: argparse.Namespace) -> float | None:
    """The peak rate of ``--gpu`` in the (first) precision that is planned; a search's own begins with bfloat16."""
    if arguments.gpu is None:
        return None
    from fabriclite.precision import Precision
    from fabriclite.watching.devices import peak_flops

    usual = None if arguments.strategy else "bf16-true"
    precision = Precision.parse(next(iter(arguments.precision), usual))
    found = peak_flops(arguments.gpu, precision.compute_dtype)
    if found is None:
        raise ConfigError(
            f"--gpu must name a device whose rate in {str(precision.compute_dtype).removeprefix('torch.')} is known,"
            f" such as H100, B200 or MI300X, but is {arguments.gpu!r}. Give --peak-tflops instead."
        )
    return found


# -- as text ----------------------------------------------------------------------------------------------------------


def _show(tables: "Sequence[Table]") -> None:
    shown = [table.dense() for table in tables if table.rows]
    if not _print_tables(shown):
        from fabriclite.planning import text

        print(text.plain(shown))


def _print_tables(tables: "Sequence[Table]") -> bool:
    """Print tables, if there are a terminal and the package for them."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text
    except ImportError:
        return False
    console = Console()
    for table in tables:
        console.print(Text(table.title, style="bold"))
        grid: Any = Grid(show_header=bool(table.head))
        for number, name in enumerate(table.head or ("",)):
            grid.add_column(name, justify="right" if table.head and table.numbers(number) else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row), style="bold" if row[0] == "total" else "")
        console.print(grid)
    return True

"""``fabriclite run``: a script on several processes, as torchrun does it, and with the first failure printed last."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from fabriclite.devices import Machine
from fabriclite.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Run what ``argv`` says, without the word ``run``.

    Returns:
        The exit status, see :func:`fabriclite.launch.elastic.run`.

    Raises:
        ConfigError: options contradict each other.
    """
    from fabriclite.launch import elastic
    from fabriclite.launch.wishes import Wishes

    args = _parser().parse_args(argv)
    args.nproc_per_node = _processes(args)
    return elastic.run(args, Wishes(strategy=args.strategy, precision=args.precision))


def _parser() -> ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser: ArgumentParser = get_args_parser()
    parser.prog = "fabriclite run"
    parser.description = (
        "Run a script on several processes. All options of torchrun hold; on one machine they meet on a free port of"
        " the loopback."
    )
    ours = parser.add_argument_group("of fabriclite", "for what the script leaves at its default; else they must agree")
    ours.add_argument("--devices", metavar="N|auto", help="processes on this machine, as --nproc-per-node")
    ours.add_argument("--strategy", help="as in Fabric(strategy=...)")
    ours.add_argument("--precision", help="as in Fabric(precision=...)")
    parser.set_defaults(nproc_per_node=None)  # to see whether it was given
    return parser


def _processes(args: Namespace) -> str | None:
    asked: str | None = args.devices
    given: str | None = args.nproc_per_node
    if asked == "auto":
        asked = str(max(1, Machine.probe().cuda))
    if asked is not None and not (asked.isdecimal() and int(asked) > 0):
        raise ConfigError(f"--devices must be a whole number of at least 1 or auto, but is {asked!r}.")
    if asked is not None and given is not None and asked != given:
        raise ConfigError(
            f"--devices and --nproc-per-node must not say different things, but are {args.devices} and {given}."
            " Keep one of them."
        )
    return asked or given

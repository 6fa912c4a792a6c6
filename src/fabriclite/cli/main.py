"""Arguments of the command line, and what each command runs."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from fabriclite.checkpoint.formats import FORMATS
from fabriclite.cli import doctor, report
from fabriclite.errors import CheckpointError, ConfigError

_DTYPES = ("float16", "bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: without the program's name; ``None`` takes them from the process.

    Returns:
        The exit code: 0, or 1 if the command failed, or 2 if its arguments contradict each other.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] == ["run"]:  # its options are torchrun's, and all after the script is the script's
            from fabriclite.cli.run import run

            return run(words[1:])
        arguments = _parser().parse_args(words)
        return int(arguments.run(arguments))
    except ConfigError as error:
        return _failed(error, 2)
    except CheckpointError as error:
        return _failed(error, 1)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("stopped", 130)


def _failed(error: object, code: int) -> int:
    print(f"fabriclite: {error}", file=sys.stderr)
    return code


# -- commands: what they need is imported when one runs ---------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    from fabriclite.checkpoint.describe import describe

    described = describe(arguments.path, arguments.weights_only)
    if arguments.json:
        print(json.dumps(described.as_dict(), indent=2))
        return 0
    from fabriclite.cli.show import show

    show(described, arguments.depth)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from fabriclite.checkpoint.read.kinds import verify
    from fabriclite.cli.progress import bar

    with bar("comparing") as progress:
        found, compared = verify(arguments.path, arguments.weights_only, progress)
    if compared:
        print(f"{found.path}: {found.kind}, whole; all {compared} bytes are as they were written")
    else:
        print(f"{found.path}: {found.kind}, whole as far as its sizes tell; it carries no checksums to compare")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from fabriclite.checkpoint.convert import convert
    from fabriclite.cli.progress import bar

    with bar("converting") as progress:
        done = convert(
            arguments.source,
            arguments.target,
            arguments.to,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            key=arguments.key,
            max_file_bytes=arguments.max_file_bytes,
            overwrite=arguments.overwrite,
            weights_only=arguments.weights_only,
            progress=progress,
        )
    print(f"{done.path}: {done.nbytes} bytes of tensors")
    if done.left_out:
        print(
            f"fabriclite: left out, since safetensors holds tensors alone: {', '.join(done.left_out)}", file=sys.stderr
        )
    return 0


# -- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabriclite", description="Run scripts on several processes, work on what they saved, and on the machine."
    )
    rooms = parser.add_subparsers(required=True, metavar="run|checkpoint|doctor|report")
    rooms.add_parser("run", help="run a script on several processes; see fabriclite run --help")
    doctor.add_to(rooms)
    report.add_to(rooms)
    room = rooms.add_parser("checkpoint", help="look at checkpoints of every kind, and convert them")
    commands = room.add_subparsers(required=True, metavar="inspect|verify|convert|consolidate")

    inspect = commands.add_parser("inspect", help="what a checkpoint is and holds; reads no tensor")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--depth", type=_count, help="levels of keys to show")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compare all checksums and sizes; exit code 1 if something is damaged")
    verify.add_argument("path", metavar="PATH")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser("convert", help="write a checkpoint of any kind in another form")
    _add_paths(convert)
    convert.add_argument("--to", choices=FORMATS, required=True, help="the form")
    convert.add_argument("--max-file-bytes", type=_count, metavar="N", help="of each file of safetensors")

    consolidate = commands.add_parser("consolidate", help="the same as convert --to file: one file of all shards")
    _add_paths(consolidate)
    consolidate.set_defaults(to="file", max_file_bytes=None)

    for command in (inspect, verify, convert, consolidate):
        command.add_argument(
            "--no-weights-only",
            dest="weights_only",
            action="store_false",
            help="restore objects that need code to run: for files whose author you trust",
        )
    return parser


def _add_paths(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC")
    command.add_argument("target", metavar="DST")
    command.add_argument(
        "--dtype", choices=_DTYPES, help="of the modules' floating-point tensors; optimizers keep theirs"
    )
    command.add_argument("--key", help="the module to export; or the entry that weights alone become")
    command.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST")
    command.set_defaults(run=_convert)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return value

"""What building a model costs: time, memory, and whether it is the model. fabriclite beside its peers.

    python benchmarks/init.py                              # a model of 100 M parameters, about two minutes
    python benchmarks/init.py --sizes 100M,300M,1B --dtypes float32,bfloat16 --worlds 1,2,4 --variants plain,hf
    python benchmarks/init.py --only share                 # one section (build, deepspeed, share), or one contender
    python benchmarks/init.py --scale                      # rank 0 of 1024 of a model of 70 B, about a minute
    python benchmarks/init.py --device cuda                # 7 B and 70 B on an accelerator
    python benchmarks/init.py --json init.json             # then: python benchmarks/plot_init.py init.json

README.md, next to this file, says what the figures mean.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

SECTIONS: Final = ("build", "deepspeed", "share")
PEERS: Final = ("lightning_fabric", "accelerate", "deepspeed")
ACCELERATE_ALONE: Final = (
    "accelerate is left out of worlds of several processes: its FSDP2 `prepare` silently gives DDP on the CPU."
)
SHARE_SIZE: Final = "1B"


def parsed() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=names, help="parameters, of 100M, 300M, 1B (default: 100M)")
    parser.add_argument("--dtypes", type=names, help="float32, bfloat16 (default: float32; both with --scale and cuda)")
    parser.add_argument("--worlds", type=names, default=["1", "2"], help="numbers of processes (default: 1,2)")
    parser.add_argument("--variants", type=names, default=["plain"], help="plain, hf (default: plain)")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is built (default: 3)")
    parser.add_argument("--only", metavar="NAME", help=f"of {', '.join(SECTIONS)}, or a contender, beside eager")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB; what takes more is left out (default: 10)")
    parser.add_argument("--scale", action="store_true", help="rank 0 of 1024 of a model of 70 B, and nothing else")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also add all samples to this file")
    options = parser.parse_args()
    if not find_spec("fabriclite"):
        parser.error("fabriclite must be installed, or found through PYTHONPATH=src, but is not.")
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from init_cases import DTYPES, SIZES
    from init_contenders import CONTENDERS

    known = {"sizes": SIZES, "dtypes": DTYPES, "variants": ("plain", "hf")}
    for name, values in known.items():
        for value in getattr(options, name) or []:
            if value not in values:
                parser.error(f"--{name} must be of {', '.join(values)}, but holds {value!r}.")
    if not all(world.isdigit() and int(world) > 0 for world in options.worlds):
        parser.error(f"--worlds must be numbers of processes such as 1,2,4, but is {','.join(options.worlds)}.")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {options.rounds}.")
    if options.only not in (None, *SECTIONS, *CONTENDERS):
        parser.error(
            f"--only must be of {', '.join(dict.fromkeys([*SECTIONS, *CONTENDERS]))}, but is {options.only!r}."
        )


# -- what is measured --------------------------------------------------------------------------------------------------


def entrants(section: str, case: Any, only: str | None) -> dict[str, tuple[str, Any]]:
    """By the name in the table: contender and case. The first is what the others are compared with."""
    from init_contenders import SHARES

    if section == "share":
        return {"eager": ("eager", case), f"fabriclite, 1 of {SHARES}": (f"fabriclite, 1 of {SHARES}", case)}
    if section == "deepspeed":
        return {name: (name, case) for name in ("deepspeed", "fabriclite, deepspeed")}
    found = {name: (name, case) for name in ("eager", "fabriclite", "lightning_fabric", "accelerate")}
    if case.world == 1:
        found |= {f"{name}, 2 threads": (name, replace(case, threads=2)) for name in ("eager", "fabriclite")}
    return {label: e for label, e in found.items() if only in (None, "build", e[0]) or label == "eager"}


def cases(section: str, options: argparse.Namespace) -> list[Any]:
    from init_cases import Case

    worlds = [int(world) for world in options.worlds]
    sizes, variants = options.sizes or ["100M"], options.variants
    if section == "deepspeed":  # what it costs does not depend on who initialises
        worlds, variants = [world for world in worlds if world > 1], variants[:1]
    elif section == "share":
        worlds, sizes = [1], [SHARE_SIZE]
    dtypes = options.dtypes or ["float32"]
    return [Case(s, d, v, w) for s in sizes for d in dtypes for v in variants for w in worlds]


def outcomes_of(section: str, case: Any, options: argparse.Namespace) -> list[Any]:
    """Every contender of one case: one after the other, in an order that is shuffled every round."""
    from init_contenders import CONTENDERS
    from init_ranks import measured
    from init_tables import Outcome

    ready = {}
    for label, (name, own) in entrants(section, case, options.only).items():
        gib = CONTENDERS[name].needed(own) / 2**30
        if CONTENDERS[name].runs(own) and gib > options.memory:
            print(f"{case}: {label} is left out: it takes {gib:.0f} GiB, more than --memory {options.memory:g}.")
        elif CONTENDERS[name].runs(own):
            ready[label] = name, own
    if len(ready) < 2 and section == "deepspeed":
        return []
    samples: dict[str, list[Any]] = {label: [] for label in ready}
    shuffler, order = random.Random(0), list(ready)
    for _ in range(options.rounds):
        shuffler.shuffle(order)
        for label in order:
            samples[label].append(measured(*ready[label]))
    base = samples.get(next(iter(entrants(section, case, options.only))), [])
    return [Outcome(section, case, label, found, base) for label, found in samples.items()]


def figures(options: argparse.Namespace) -> list[Any]:
    """Run all sections and print what they say."""
    from init_ranks import prepare_server
    from init_tables import table, targets

    for name in PEERS:
        if not find_spec(name):
            print(f"{name} is not installed: left out.")
    if find_spec("accelerate") and "build" in _sections(options.only) and options.worlds != ["1"]:
        print(ACCELERATE_ALONE)
    prepare_server()
    found: list[Any] = []
    for section in _sections(options.only):
        before = len(found)
        for case in cases(section, options):
            begin = time.monotonic()
            found += outcomes_of(section, case, options)
            print(f"{section}: {case}: {time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        if found[before:]:
            print(f"\n{table(found[before:])}\n", flush=True)
    print(targets(found))
    return [one.document() for one in found]


def _sections(only: str | None) -> Sequence[str]:
    if only is None:
        return SECTIONS
    if only in SECTIONS:
        return [only]
    return ["deepspeed"] if only.endswith("deepspeed") else ["share"] if "1 of" in only else ["build"]


def environment() -> dict[str, Any]:
    packages = ["torch", *(name for name in (*PEERS, "transformers") if find_spec(name))]
    found = {name: version(name.replace("_", "-")) for name in packages}
    return {"date": date.today().isoformat(), "cores": os.cpu_count(), "load": os.getloadavg()[1], **found}


def main() -> None:
    options = parsed()
    document: dict[str, list[Any]] = {"environment": [environment()]}
    if options.device == "cuda":
        import init_cuda

        document["device"] = init_cuda.figures(options.sizes, options.dtypes, options.rounds)
    elif options.scale:
        import init_scale

        document["scale"] = init_scale.figures(options.dtypes, options.rounds)
    else:
        document["build"] = figures(options)
    if options.json:
        write(options.json, document)


def write(file: Path, document: dict[str, Any]) -> None:
    """Add what was measured to what the file holds, one row a line."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = known | {key: [*known.get(key, []), *value] for key, value in document.items()}
    lists = (f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in value) + "\n]" for key, value in rows.items())
    file.write_text("{" + ",\n".join(lists) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

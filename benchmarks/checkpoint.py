"""What saving and loading cost: time, memory, and bytes read. fabriclite beside its peers, on one disk.

    python benchmarks/checkpoint.py                        # 1.29 GB of weights, about six minutes
    python benchmarks/checkpoint.py --quick                # 50 MB, one round: does it run?
    python benchmarks/checkpoint.py --only load            # one section (load, checkpoint, save), or one case
    python benchmarks/checkpoint.py --device cuda
    python benchmarks/checkpoint.py --json checkpoint.json # also add all samples to this file

README.md, next to this file, says what the figures mean.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

SECTIONS: Final = ("load", "checkpoint", "save")
PEERS: Final = ("safetensors", "transformers", "accelerate", "lightning_fabric")
QUICK_GB: Final = 0.05
NEEDED: Final = 4.5
"""Times the weights: what lies on the disk at once, at most."""
ADAMW: Final = 3
"""Bytes of weights and AdamW's state, for one byte of weights."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, help="GB of weights (default: 1.29)")
    parser.add_argument("--rounds", type=int, help="how often everything is loaded (default: 5)")
    parser.add_argument("--cold", type=int, help="of those rounds, with a cold page cache as well (default: half)")
    parser.add_argument("--saves", type=int, help="how often everything is saved (default: half of the rounds)")
    parser.add_argument("--threads", type=int, help="of each process (default: cores by processes)")
    parser.add_argument("--only", metavar="NAME", help=f"of {', '.join(SECTIONS)}, or a case of one")
    parser.add_argument("--folder", type=Path, help="where to write (default: runs/ of the repository; emptied again)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_GB} GB and one round, if nothing else is said")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also add all samples to this file")
    options = parser.parse_args()
    if not find_spec("fabriclite"):
        parser.error("fabriclite must be installed, or found through PYTHONPATH=src, but is not.")
    options.size = options.size or (QUICK_GB if options.quick else 1.29)
    options.rounds = (1 if options.quick else 5) if options.rounds is None else options.rounds
    half = -(-options.rounds // 2)
    options.saves = half if options.saves is None else options.saves
    options.cold = half if options.cold is None else min(options.cold, options.rounds)
    options.folder = options.folder or Path(__file__).parent.parent / "runs"
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("rounds", "cold", "saves"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(options, name)}.")
    if not 0.001 <= options.size <= 100:
        parser.error(f"--size must be from 0.001 to 100 (GB), but is {options.size}.")
    known = [*SECTIONS, *(case for section in SECTIONS for case in cases(section))]
    if options.only not in (None, *known):
        parser.error(f"--only must be of {', '.join(dict.fromkeys(known))}, but is {options.only!r}.")
    options.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.folder).free / 1e9
    if free < NEEDED * options.size:
        parser.error(f"{options.folder} must have {NEEDED * options.size:.1f} GB free, but has {free:.1f}.")


# -- what is measured --------------------------------------------------------------------------------------------------


def cases(section: str) -> Mapping[str, tuple[int, tuple[str, ...]]]:
    """By name: processes and contenders."""
    import checkpoint_load
    import checkpoint_save

    known = {"load": checkpoint_load.CASES, "checkpoint": checkpoint_load.CHECKPOINTS, "save": checkpoint_save.CASES}
    return known[section]


def wanted(section: str, options: argparse.Namespace) -> Iterator[tuple[str, int, list[str]]]:
    """The cases that were asked for and can run here: name, processes, contenders that are installed."""
    import torch

    known = contenders(section)
    for case, (world, names) in cases(section).items():
        if options.only not in (None, section, case):
            continue
        if options.device == "cuda" and torch.cuda.device_count() < world:
            print(f"{case} is left out: it takes {world} accelerators.")
            continue
        yield case, world, [name for name in names if known[name].runs()]


def contenders(section: str) -> Mapping[str, Any]:
    import checkpoint_load
    import checkpoint_save

    return checkpoint_save.CONTENDERS if section == "save" else checkpoint_load.CONTENDERS


def loads(section: str, options: argparse.Namespace, root: Path) -> Iterator[Any]:
    """Every contender of every case, warm and cold by turns, in an order that is shuffled every round."""
    from checkpoint_load import CONTENDERS, HUB
    from checkpoint_model import Shape, largest_in, share_of
    from checkpoint_probe import cached, drop_cache, fill_cache
    from checkpoint_ranks import Job, Sample, measured
    from checkpoint_tables import Outcome

    shape, shuffler = Shape.near(options.size * 1e9), random.Random(0)
    for case, world, names in wanted(section, options):
        samples: dict[tuple[str, str], list[Sample]] = {(c, n): [] for c in ("warm", "cold") for n in names}
        for turn in range(options.rounds):
            caches = ("warm", "cold") if turn < options.cold else ("warm",)
            order = [(c, n) for c, n in samples if c in caches and (turn == 0 or not CONTENDERS[n].once)]
            shuffler.shuffle(order)
            for cache, name in order:
                path = root / "real" / CONTENDERS[name].reads
                (drop_cache if cache == "cold" else fill_cache)(path)
                job = Job(name, shape, root, world, options.device, threads(options, world))
                samples[cache, name].append(measured(job, "load", cached(path)))
        hub = root / "real" / HUB
        share, largest = max(share_of(hub, rank, world) for rank in range(world)), largest_in(hub)
        for (cache, name), found in samples.items():
            base = samples[cache, names[0]]
            yield Outcome(section, case, cache, name, role(CONTENDERS[name], name), share, largest, found, base)


def saves(options: argparse.Namespace, root: Path) -> Iterator[Any]:
    """Every contender of every case by turns, in an order that is shuffled every round."""
    from checkpoint_model import Shape
    from checkpoint_probe import bytes_of
    from checkpoint_ranks import Job, Sample, measured
    from checkpoint_save import CONTENDERS, OUT
    from checkpoint_tables import Outcome

    shuffler = random.Random(0)
    for case, world, names in wanted("save", options):
        optimized = "AdamW" in case
        shape = Shape.near(options.size * 1e9 / (ADAMW if optimized else 1))
        share = weights(shape) * (ADAMW if optimized else 1)
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for _ in range(options.saves):
            order = list(names)
            shuffler.shuffle(order)
            for name in order:
                clear(root, OUT)
                os.sync()  # what others have not written yet would be written meanwhile
                job = Job(name, shape, root, world, options.device, threads(options, world))
                samples[name].append(measured(job, "save"))
                if role(CONTENDERS[name], name) != "floor" and bytes_of(root / "real" / OUT) < share:
                    raise RuntimeError(f"{name} must save {share} bytes, but wrote {bytes_of(root / 'real' / OUT)}.")
        clear(root, OUT)
        for name, found in samples.items():
            own = role(CONTENDERS[name], name)
            yield Outcome("save", case, "", name, own, share // world, 0, found, samples[names[0]])


def role(contender: Any, name: str) -> str:
    """See ``Outcome``."""
    if name.startswith("fabriclite"):
        return "ours"
    if not contender.peer:
        return "floor"
    return "peer" if getattr(contender, "synced", True) else "weaker"


def threads(options: argparse.Namespace, world: int) -> int:
    return options.threads or max(1, (os.cpu_count() or 1) // world)


def weights(shape: Any) -> int:
    """Bytes of a model."""
    from checkpoint_model import without_memory

    return sum(param.nbytes for param in without_memory(shape).parameters())


def clear(root: Path, name: str) -> None:
    for path in (root / "tiny" / name, root / "real" / name):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# -- the whole ---------------------------------------------------------------------------------------------------------


def figures(options: argparse.Namespace, root: Path) -> list[Any]:
    """Run all sections and print what they say."""
    from checkpoint_ranks import prepare_server
    from checkpoint_tables import goals, table

    for name in PEERS:
        if not find_spec(name):
            print(f"{name} is not installed: left out.")
    prepare_server()
    found: list[Any] = []
    for section in SECTIONS:
        if not list(wanted(section, options)):
            continue
        begin, before = time.monotonic(), len(found)
        write(section, options, root)
        found += saves(options, root) if section == "save" else loads(section, options, root)
        check(found[before:])
        print(f"{section}: {time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")
        print(f"\n{table(found[before:])}\n", flush=True)
    print(goals(found))
    return [one.document() for one in found]


def write(section: str, options: argparse.Namespace, root: Path) -> None:
    """What the contenders of a section read; what those of another read goes."""
    from checkpoint_load import DCP, FILE, FOLDER, HUB, THEIRS, WEIGHTS, write_checkpoints, write_hub
    from checkpoint_model import TINY, Shape
    from checkpoint_ranks import alone

    for name in (WEIGHTS, FOLDER, FILE, THEIRS, DCP):
        clear(root, name)
    for folder, shape in (("tiny", TINY), ("real", Shape.near(options.size * 1e9))):
        if section != "save" and not (root / folder / HUB).exists():
            alone(write_hub, root / folder, shape)
        if section == "checkpoint":
            clear(root, WEIGHTS)
            alone(write_checkpoints, root / folder, shape)


def check(outcomes: list[Any]) -> None:
    """Raise unless everybody who loaded values has the same ones.

    Raises:
        RuntimeError: somebody has others.
    """
    sums = {one.name: sample.values for one in outcomes for sample in one.samples if sample.values}
    for name, value in sums.items():
        first = next(iter(sums.values()))
        if abs(value - first) > 1e-3 * abs(first):
            raise RuntimeError(f"{name} must load values of the sum {first}, but has {value}.")


def environment(options: argparse.Namespace) -> dict[str, Any]:
    packages = ["torch", *(name for name in PEERS if find_spec(name))]
    found = {name: version(name.replace("_", "-")) for name in packages}
    machine = {"date": date.today().isoformat(), "cores": os.cpu_count(), "load": os.getloadavg()[1]}
    asked = {
        "size": options.size,
        "rounds": options.rounds,
        "cold": options.cold,
        "saves": options.saves,
        "device": options.device,
    }
    return {**machine, **asked, **found}


def main() -> None:
    from init import write as add

    options = parsed()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as root:
        found = figures(options, Path(root))
    print(f"\n{time.monotonic() - begin:.0f} s in all.")
    if options.json:
        add(options.json, {"environment": [environment(options)], "checkpoint": found})


if __name__ == "__main__":
    main()

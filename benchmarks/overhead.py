"""What fabriclite costs over hand-written PyTorch, next to its peers: per step, on two ranks, and at import.

    python benchmarks/overhead.py                        # everything, about five minutes
    python benchmarks/overhead.py --only step            # time per step of a tiny model in one process
    python benchmarks/overhead.py --only ranks           # DDP and FSDP on two processes
    python benchmarks/overhead.py --only import          # time of `import fabriclite`
    python benchmarks/overhead.py --rounds 20 --json overhead.json

README.md, next to this file, says what the figures mean.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from pairs import Row, compare, elapsed, measure, table

ROUNDS: Final = {"step": 400, "ranks": 40, "import": 12}
PEERS: Final = ("fabriclite", "lightning_fabric", "accelerate")
HEAVY: Final = (
    "deepspeed",
    "transformers",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
)
"""What `import fabriclite` must leave to those who use it."""


def import_rows(rounds: int) -> list[Row]:
    """Seconds of a process that imports torch alone, or torch and one front end, and ends at once."""
    blocks = {"torch": "import torch", "torch, again": "import torch"}
    blocks |= {name: f"import torch, {name}" for name in PEERS if find_spec(name)}
    with tempfile.TemporaryDirectory() as folder:
        # Byte code of its own, which the rounds of warm-up write: also for a checkout that never wrote any.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder

        def run(code: str) -> None:
            # Without torch's teardown, 0.3 s that vary more than what is measured.
            whole = f"{code}, os; os._exit(0)"
            subprocess.run([sys.executable, "-c", whole], env=environment, check=True, timeout=300)

        runs = {name: lambda code=code: run(code) for name, code in blocks.items()}
        by_clock = measure(runs, rounds, [children_cpu, elapsed])
        return [*compare("import, cpu", by_clock[0]), *compare("import, elapsed", by_clock[1])]


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def heavy_imports() -> list[str]:
    """Which of ``HEAVY`` are loaded by `import fabriclite`."""
    code = f"import sys, fabriclite; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    return done.stdout.split()


def section(name: str, rounds: int) -> list[Row]:
    if name == "import":
        print(f"\n`import fabriclite` loads of {', '.join(HEAVY)}: {', '.join(heavy_imports()) or 'none'}.", flush=True)
        return import_rows(rounds)
    if name == "ranks":
        from ranks import rank_rows  # here and not above: `--only import` needs no torch

        return rank_rows(rounds)
    from training import step_rows

    return list(step_rows(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"rounds of every section (default: {ROUNDS})")
    parser.add_argument("--only", choices=list(ROUNDS), help="one section only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, in seconds")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {options.rounds}.")
    if not find_spec("fabriclite"):
        parser.error("fabriclite must be installed, or found through PYTHONPATH=src, but is not.")
    for name in PEERS:
        if not find_spec(name):
            print(f"{name} is not installed: left out.")
    rows: list[Row] = []
    for name in [options.only] if options.only else ROUNDS:
        found = section(name, options.rounds or ROUNDS[name])
        print(f"\n{table(found)}", flush=True)
        rows += found
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

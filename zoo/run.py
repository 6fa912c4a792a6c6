"""``python -m zoo.run``: tries the whole zoo, or a part of it, and writes what came of it."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fabriclite import Fabric
from zoo.entry import Entry
from zoo.pool import trials
from zoo.report import page
from zoo.trial import Outcome, Verdict

BAD = (Verdict.WRONG, Verdict.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every model that can be built came out exact or was refused rightly."""
    options = _options(argv)
    if not hasattr(Fabric, "materialize"):
        sys.exit("this fabriclite has no Fabric.materialize")
    entries = _chosen(options)
    if not entries:
        sys.exit(f"nothing in the zoo is called {options.only!r}")
    start, rows = time.perf_counter(), []
    for entry, outcome in trials(entries, options.jobs, options.timeout):
        rows.append((entry, outcome))
        _say(entry, outcome, options.verbose)
        if len(rows) % 50 == 0:
            print(f"... {len(rows)} of {len(entries)}, {time.perf_counter() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: entries.index(row[0]))
    counts = Counter(outcome.verdict for _, outcome in rows)
    print(", ".join(f"{counts[v]} {v}" for v in Verdict), f"in {time.perf_counter() - start:.0f} s")
    if options.out is not None:
        options.out.write_text(page(rows))
    return int(any(outcome.verdict in BAD for _, outcome in rows))


def _say(entry: Entry, outcome: Outcome, verbose: bool) -> None:
    if outcome.verdict in BAD or verbose:
        print(f"{outcome.verdict}: {entry.library} {entry.model_type} {entry.class_name}", flush=True)
        for reason in outcome.reasons[:5]:
            print(f"    {reason}", flush=True)
        if outcome.uninitialised:
            print(f"    never written by its own code: {', '.join(outcome.uninitialised[:5])}", flush=True)


def _chosen(options: argparse.Namespace) -> list[Entry]:
    found: list[Entry] = []
    if options.library in (None, "transformers"):
        from zoo import transformers_types

        found += transformers_types.entries(options.all or bool(options.only))
    if options.library in (None, "timm"):
        from zoo import timm_models

        found += timm_models.entries(options.all or bool(options.only))
    wanted = set(options.only or ())
    return [e for e in found if not wanted or wanted & {e.model_type, e.class_name}]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.run", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a model type, class or timm name; repeatable")
    parser.add_argument("--library", choices=("transformers", "timm"))
    parser.add_argument(
        "--all", action="store_true", help="every class and every timm model, not one or two of each kind"
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one model")
    parser.add_argument("--out", type=Path, help="where to write the page, such as docs/zoo.md")
    parser.add_argument("--verbose", action="store_true", help="print every outcome, not only failures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

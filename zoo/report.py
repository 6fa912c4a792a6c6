"""The zoo's outcomes as a page of the documentation."""

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from zoo.entry import Entry
from zoo.trial import Outcome, Verdict

Row = tuple[Entry, Outcome]

_HEAD = """# The zoo

Every model that [transformers](https://github.com/huggingface/transformers) and
[timm](https://github.com/huggingface/pytorch-image-models) can build offline from a small config, built twice at one
seed: plainly, and with `fabric.init_module(empty_init=True)` followed by `fabric.materialize`. *Exact* means equal bit
for bit: parameters and buffers, their names, order, dtypes, strides and ties, every tensor and number that a module
holds, and the state in which torch's generator is left. *Refused, rightly* are models whose own code leaves a parameter
uninitialised: an error names it. *Not buildable* are those that fail without fabriclite too, or are large. `make zoo`
writes this page.
"""


def page(rows: Sequence[Row]) -> str:
    """The whole page: totals, what is not exact, then one line a model type."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("fabriclite", "torch", "transformers", "timm"))
    parts = [_HEAD, f"{versions}; Python {platform.python_version()}.\n", _totals(rows)]
    for library in sorted({entry.library for entry, _ in rows}):
        parts.append(f"## {library}\n\n{_table([row for row in rows if row[0].library == library])}")
    return "\n".join(parts)


def _totals(rows: Sequence[Row]) -> str:
    lines = ["| library | of | " + " | ".join(Verdict) + " |", "|---|---|" + "---|" * len(Verdict)]
    for library in sorted({entry.library for entry, _ in rows}):
        classes = Counter(o.verdict for e, o in rows if e.library == library)
        lines.append(f"| {library} | models | " + " | ".join(str(classes[v]) for v in Verdict) + " |")
        types = Counter(_worst(group) for group in _groups(rows, library).values())
        lines.append(f"| {library} | model types | " + " | ".join(str(types[v]) for v in Verdict) + " |")
    return "\n".join(lines) + "\n"


def _groups(rows: Sequence[Row], library: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for entry, outcome in sorted(rows, key=lambda row: row[0].model_type):
        if entry.library == library:
            groups.setdefault(entry.model_type, []).append((entry, outcome))
    return groups


def _worst(group: Sequence[Row]) -> Verdict:
    """A type is what its worst class is; one class that can be built makes the type buildable."""
    order = (Verdict.WRONG, Verdict.ERROR, Verdict.REFUSED, Verdict.EXACT, Verdict.NOT_BUILDABLE)
    return min((outcome.verdict for _, outcome in group), key=order.index)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| model type | tried | result |", "|---|---|---|"]
    for model_type, group in _groups(rows, rows[0][0].library).items():
        names = ", ".join(entry.class_name for entry, _ in group)
        lines.append(f"| {model_type} | {names} | {_result(group)} |")
    return "\n".join(lines) + "\n"


def _result(group: Sequence[Row]) -> str:
    if all(outcome.verdict is Verdict.EXACT for _, outcome in group):
        return "exact"
    if all(outcome == group[0][1] for _, outcome in group):
        return _cell(group[0][1])
    exact = sum(outcome.verdict is Verdict.EXACT for _, outcome in group)
    rest = [f"{entry.class_name}: {_cell(outcome)}" for entry, outcome in group if outcome.verdict is not Verdict.EXACT]
    return "; ".join([f"exact: {exact} of {len(group)}", *rest])


def _cell(outcome: Outcome) -> str:
    why = outcome.uninitialised if outcome.verdict is Verdict.REFUSED else outcome.reasons
    more = f" (and {len(why) - 2} more)" if len(why) > 2 else ""
    text = f"{outcome.verdict}: {'; '.join(why[:2])}"[:240] + more
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")

"""``fabriclite doctor``: what was found as a table, or as JSON."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabriclite.doctor.facts import Fact, Json, Report


def add_to(rooms: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command's arguments."""
    doctor = rooms.add_parser("doctor", help="what there is to train on, who started this process, what is wrong")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument(
        "--no-bandwidth", dest="bandwidth", action="store_false", help="start no processes that reduce a tensor"
    )
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show it; 1 if a problem is an error, else 0."""
    from fabriclite.doctor.examine import examine
    from fabriclite.launch.environment import from_launchers

    report = examine(from_launchers(), measure=arguments.bandwidth)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    elif not _print_tables(report):
        _print_lines(report)
    return 1 if report.failed else 0


# -- as text ----------------------------------------------------------------------------------------------------------


def _rows(fact: "Fact") -> list[tuple[str, str]]:
    """A fact in words: several rows where it is a list or has parts."""
    if fact.missing is not None:
        return [(_name(fact.name), f"could not be found: {fact.missing.strip()}")]
    value = fact.value
    if isinstance(value, dict):
        return [(_name(fact.name), "")] + [(f"  {_name(n)}", _text(n, v)) for n, v in value.items() if v is not None]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [(f"{fact.name} {n}", ", ".join(_text(k, v) for k, v in one.items())) for n, one in enumerate(value)]
    return [(_name(fact.name), _text(fact.name, value))]


def _name(name: str) -> str:
    for unit in ("_bytes", "_s"):
        name = name.removesuffix(unit)
    return name if name.isupper() else name.replace("_", " ")


def _text(name: str, value: "Json") -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ("\n" if name == "topology" else ", ").join(map(str, value))
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if name == "bytes_per_second" and isinstance(value, int):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_s") and isinstance(value, float):
        return f"{value * 1e3:.3f} ms"
    return str(value)


def _verdict(report: "Report") -> str:
    errors = sum(problem.level == "error" for problem in report.problems)
    warnings = len(report.problems) - errors
    if not report.problems:
        return "No problem found."
    return f"{errors} {'error' if errors == 1 else 'errors'}, {warnings} {'warning' if warnings == 1 else 'warnings'}."


def _problems(report: "Report") -> list[tuple[str, str]]:
    from fabriclite.doctor.secrets import hidden

    return [(problem.level, f"{hidden(problem.what)} {problem.mend}") for problem in report.problems]


def _print_lines(report: "Report") -> None:
    for section in report.sections:
        print(section.title.replace("_", "-"))
        for fact in section.facts:
            for name, text in _rows(fact):
                first, *more = text.splitlines() or [""]
                print(f"  {name:<24} {first}".rstrip())
                for line in more:
                    print(f"  {'':<24} {line}".rstrip())
    print("problems")
    for level, text in _problems(report):
        print(f"  {level:<24} {text}")
    print(_verdict(report))


def _print_tables(report: "Report") -> bool:
    """Print tables, if there are a terminal and the package for them."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console()
    rooms: list[tuple[str, list[tuple[str, str]]]] = [
        (s.title.replace("_", "-"), [row for fact in s.facts for row in _rows(fact)]) for s in report.sections
    ]
    for title, rows in [*rooms, ("problems", _problems(report))]:
        table: Any = Table(title=title, title_justify="left", show_header=False, title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(Text(name, style=_STYLES.get(name, "")), Text(text))
        if rows:
            console.print(table)
    console.print(Text(_verdict(report)))
    return True


_STYLES = {"error": "bold red", "warning": "yellow"}

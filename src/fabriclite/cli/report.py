"""``fabriclite report``: what a run's folder tells, as a page."""

import argparse


def add_to(rooms: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command's arguments."""
    report = rooms.add_parser("report", help="one HTML page of a run: what fabric.monitor wrote to its folder")
    report.add_argument("folder", metavar="RUN_DIR")
    report.add_argument("--out", metavar="FILE", help="the page; report.html in RUN_DIR unless given")
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write it, and say where it is."""
    from fabriclite.watching.page.write import write

    print(write(arguments.folder, arguments.out))
    return 0

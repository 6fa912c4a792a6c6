"""Run every case of failing, and write what came of it into the table of ``docs/guides/failures.md``.

    python tests/failures_table.py [JOBS [WORD...]]

A quarter of an hour. With words, only the cases that have all of them run, and the other rows stay. The same cases,
with the same demands, run in ``FULL=1 pytest tests/test_failures.py``.
"""

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starters import HOW, STARTERS, WHERE, Start, told
from test_failures import ALL, limit_s

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "failures.md"
BEGIN, END = "<!-- table: python tests/failures_table.py -->", "<!-- end of table -->"
_SAID = r"Rank \d of \d [^\n(,:]*(?:\(\w+\))?|traceback : Signal [^\n]* received|exitcode  : \S+"
Case = tuple[str, str, str]


def row(case: Case) -> str:
    starter, where, how = case
    with tempfile.TemporaryDirectory() as folder, Start(Path(folder), starter, where, how) as start:
        ended = start.end()
    wrong = told(ended, starter, where, how)
    wrong += [f"{len(ended.left)} processes left"] if ended.left else []
    wrong += [] if all(ended.status) else [f"status {ended.status}"]
    late = ended.after_s is None or ended.after_s > limit_s(starter, where, how)
    wrong += ["too late"] if late else []
    seconds = "-" if ended.after_s is None else f"{ended.after_s:.1f}"
    print(*case, seconds, wrong, flush=True)
    said = re.findall(
        r"Rank \d of \d [^\n(,:]*(?:\(\w+\))?|traceback : Signal [^\n]* received|exitcode  : \S+", ended.err
    )
    page = said[-1].strip().replace("|", "/") if said else "Python's own traceback, then torchrun's page"
    return f"| {starter} | {where} | {how} | {seconds} | {'; '.join(wrong) or page} |"


def main(jobs: int, words: Sequence[str]) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(GUIDE.parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    names = (STARTERS, WHERE, HOW)
    cases = sorted(ALL, key=lambda case: [known.index(word) for known, word in zip(names, case, strict=True)])
    before, rest = GUIDE.read_text().split(BEGIN)
    old, after = rest.split(END)
    rows = {tuple(re.findall(r"\w+", line)[:3]): line for line in old.splitlines()}
    chosen = [case for case in cases if set(words) <= set(case)]
    with ThreadPoolExecutor(jobs) as pool:
        rows |= dict(zip(chosen, pool.map(row, chosen), strict=True))
    head = ["| starter | where | how | seconds | the first failure, as printed |", "|---|---|---|---|---|"]
    lines = [BEGIN, "", *head, *(rows[case] for case in cases if case in rows), "", END]
    GUIDE.write_text(before + "\n".join(lines) + after)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, sys.argv[2:])

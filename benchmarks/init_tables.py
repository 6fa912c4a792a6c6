"""The figures of `init.py` as tables, and what they say about its targets."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from init_cases import Case
from init_contenders import SHARES
from init_ranks import Sample

SLACK_MIB: Final = 96.0
"""What a rank may take beside 1.05 times its part."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rounds of one contender of one case.

    Attributes:
        section: ``build``, ``deepspeed`` or ``share``.
        name: the contender.
        samples: one for each round.
        base: those of the contender that it is compared with, of the same rounds; its own for that one itself, empty
            where that was left out.
    """

    section: str
    case: Case
    name: str
    samples: Sequence[Sample]
    base: Sequence[Sample]

    def middle(self, value: Callable[[Sample], float | None]) -> float | None:
        """Median over the rounds."""
        values = [v for v in map(value, self.samples) if v is not None]
        return statistics.median(values) if values else None

    def ratio(self, value: Callable[[Sample], float]) -> float | None:
        """Median over the rounds of what it took as a part of what the base took in the same round."""
        pairs = zip(self.samples, self.base, strict=False)
        return statistics.median(value(own) / value(base) for own, base in pairs) if self.base else None

    @property
    def equal(self) -> bool:
        return all(sample.equal for sample in self.samples)

    def document(self) -> dict[str, Any]:
        """For the JSON file."""
        samples = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(s).items()} for s in self.samples]
        return {
            "section": self.section,
            **asdict(self.case),
            "contender": self.name,
            "seconds_ratio": _rounded(self.ratio(seconds)),
            "cpu_ratio": _rounded(self.ratio(cpu)),
            "samples": samples,
        }


def seconds(sample: Sample) -> float:
    return sample.seconds


def cpu(sample: Sample) -> float:
    return sample.cpu


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown: medians over the rounds."""
    lines = [
        "| case | contender | elapsed | cpu of a rank | elapsed, ratio | cpu, ratio | of that recording"
        " | peak over base | part of a rank | equal to eager |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in outcomes:
        cells = [
            str(one.case),
            one.name,
            _shown(one.middle(seconds), "{:.2f} s"),
            _shown(one.middle(cpu), "{:.2f} s"),
            _shown(one.ratio(seconds), "{:.2f}"),
            _shown(one.ratio(cpu), "{:.2f}"),
            _shown(one.middle(lambda s: s.recorded_s), "{:.2f} s"),
            _shown(one.middle(lambda s: s.peak_mib), "{:.0f} MiB"),
            _shown(one.middle(lambda s: s.share_mib), "{:.0f} MiB"),
            "yes" if one.equal else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets(outcomes: Sequence[Outcome]) -> str:
    """What was wanted and what was measured, as Markdown; those of which nothing was measured are left out."""
    rows = [row for judge in (_recording, _one_thread, _two_threads, _memory, _share) if (row := judge(outcomes))]
    if not rows:
        return ""
    lines = ["| target | measured | reached |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {wanted} | {found} | {'yes' if met else 'no'} |" for wanted, found, met in rows)])


_Verdict = tuple[str, str, bool] | None


def _ours(outcomes: Sequence[Outcome], section: str, name: str) -> list[Outcome]:
    return [o for o in outcomes if o.section == section and o.name == name]


def _recording(outcomes: Sequence[Outcome]) -> _Verdict:
    found = [o for o in _ours(outcomes, "share", f"fabriclite, 1 of {SHARES}") if o.case.size == "1B"]
    times = [time for o in found if (time := o.middle(lambda s: s.recorded_s)) is not None]
    return ("recording 1B < 0.2 s", f"{_span(times, '{:.2f}')} s", max(times) < 0.2) if times else None


def _one_thread(outcomes: Sequence[Outcome]) -> _Verdict:
    found = [o for o in _ours(outcomes, "build", "fabriclite") if o.case.world == 1 and o.base]
    return _at_most("one process, one thread: <= 1.00 of eager", found, 1.0)


def _two_threads(outcomes: Sequence[Outcome]) -> _Verdict:
    found = [o for o in _ours(outcomes, "build", "fabriclite, 2 threads") if o.base]
    return _at_most("one process, two threads: <= 0.62 of eager in one", found, 1 / 1.6, cpu_too=False)


def _share(outcomes: Sequence[Outcome]) -> _Verdict:
    found = [o for o in _ours(outcomes, "share", f"fabriclite, 1 of {SHARES}") if o.base]
    return _at_most(f"rank 0 of {SHARES}: < 0.20 of eager", found, 0.2)


def _at_most(wanted: str, found: Sequence[Outcome], most: float, cpu_too: bool = True) -> _Verdict:
    if not found:
        return None
    ratios = [ratio for o in found if (ratio := o.ratio(seconds)) is not None]
    text = f"{_span(ratios)} elapsed"
    if cpu_too:
        text += f", {_span([ratio for o in found if (ratio := o.ratio(cpu)) is not None])} cpu"
    late = [str(o.case) for o in found if (o.ratio(seconds) or 0) > most]
    return wanted, text + (f"; above in: {'; '.join(late)}" if late else ""), not late


def _memory(outcomes: Sequence[Outcome]) -> _Verdict:
    found = [o for o in _ours(outcomes, "build", "fabriclite") if o.case.world > 1]
    if not found:
        return None
    over = [max(s.peak_mib - 1.05 * s.share_mib for s in o.samples) for o in found]
    wanted = f"several processes: peak <= 1.05 x part of a rank + {SLACK_MIB:.0f} MiB"
    return wanted, f"1.05 x part {max(over):+.0f} MiB at most", max(over) <= SLACK_MIB


def _span(values: Sequence[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

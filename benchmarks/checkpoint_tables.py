"""The figures of `checkpoint.py` as tables, and what they say about its goals."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from checkpoint_ranks import Sample

Value = Callable[[Sample], float]
Verdict = tuple[str, str, bool]
"""What is wanted, what was measured, and whether that is enough."""

SLACK: Final = 64e6
"""Bytes that a load may take beside the rank's part and the largest tensor."""
NOISE: Final = 1.1
"""How much longer than a host copy an asynchronous save may block."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rounds of one contender of one case.

    Attributes:
        section: ``load``, ``checkpoint`` or ``save``.
        case: its name.
        cache: ``warm`` or ``cold``; of a save nothing.
        name: the contender.
        role: ``ours``, ``peer`` (what it saves is on the disk, as ours is), ``weaker`` (it is not), or ``floor``: no
            model or checkpoint, but what cannot be done without.
        share: bytes that a rank loads or saves.
        largest: bytes of the largest tensor.
        samples: one for each round.
        base: those of the first contender of the case, of the same rounds.
    """

    section: str
    case: str
    cache: str
    name: str
    role: str
    share: int
    largest: int
    samples: Sequence[Sample]
    base: Sequence[Sample]

    def middle(self, value: Value) -> float:
        """Median over the rounds."""
        return statistics.median(map(value, self.samples))

    def ratio(self, value: Value, base: Sequence[Sample] | None = None) -> float:
        """Median over the rounds of what it took as a part of what the base took in the same round."""
        pairs = zip(self.samples, self.base if base is None else base, strict=False)
        return statistics.median(value(own) / value(other) for own, other in pairs)

    @property
    def world(self) -> str:
        return f"{self.case}, {self.cache}" if self.cache else self.case

    def document(self) -> dict[str, Any]:
        """For the JSON file."""
        samples = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(s).items()} for s in self.samples]
        names = ("section", "case", "cache", "name", "role", "share", "largest")
        return {**{name: getattr(self, name) for name in names}, "samples": samples}


# -- tables ------------------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown: medians over the rounds."""
    columns = _SAVE_COLUMNS if outcomes[0].section == "save" else _LOAD_COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    return "\n".join([*lines, *(f"| {' | '.join(show(one) for show in columns.values())} |" for one in outcomes)])


def _seconds(value: Value) -> Callable[[Outcome], str]:
    return lambda one: f"{one.middle(value):.3f} s"


def _ratio(value: Value) -> Callable[[Outcome], str]:
    return lambda one: f"{one.ratio(value):.2f}"


def _megabytes(value: Value) -> Callable[[Outcome], str]:
    return lambda one: f"{one.middle(value) / 1e6:.0f} MB"


def _speed(value: Value) -> Callable[[Outcome], str]:
    return lambda one: f"{one.share / one.middle(value) / 1e9:.2f} GB/s"


def _case(one: Outcome) -> str:
    return one.world


def _name(one: Outcome) -> str:
    return one.name if len(one.samples) > 1 else f"{one.name} (one round)"


def ready(sample: Sample) -> float:
    return sample.ready


def used(sample: Sample) -> float:
    return sample.used


def read(sample: Sample) -> float:
    return sample.read


def cpu(sample: Sample) -> float:
    return sample.cpu


def seconds(sample: Sample) -> float:
    return sample.seconds


_LOAD_COLUMNS: Final[dict[str, Callable[[Outcome], str]]] = {
    "case": _case,
    "contender": _name,
    "built and loaded": _seconds(ready),
    "of that loading": _seconds(seconds),
    "cpu": _seconds(cpu),
    "of that checksums": lambda one: _seconds(lambda s: s.verifying)(one) if one.middle(lambda s: s.verifying) else "",
    "and every value read": _seconds(used),
    "speed": _speed(used),
    "ratio: loaded": _ratio(ready),
    "ratio: read": _ratio(used),
    "ratio: cpu": _ratio(cpu),
    "peak over base": _megabytes(lambda s: s.peak),
    "read calls": _megabytes(lambda s: s.called),
    "from disk": _megabytes(lambda s: s.fetched),
    "part of a rank": lambda one: f"{one.share / 1e6:.0f} MB",
    "cached before": lambda one: f"{100 * one.middle(lambda s: s.cached):.0f} %",
}
_SAVE_COLUMNS: Final[dict[str, Callable[[Outcome], str]]] = {
    "case": _case,
    "contender": _name,
    "until it returns": _seconds(seconds),
    "and until it is whole": lambda one: _seconds(lambda s: s.seconds + s.after)(one),
    "speed": _speed(lambda s: s.seconds + s.after),
    "ratio": _ratio(seconds),
    "cpu": _seconds(cpu),
    "peak over base": _megabytes(lambda s: s.peak),
    "part of a rank": lambda one: f"{one.share / 1e6:.0f} MB",
    "on the disk": lambda one: "yes" if one.role in ("ours", "peer") else "" if one.role == "floor" else "not synced",
}


# -- goals -------------------------------------------------------------------------------------------------------------


def goals(outcomes: Sequence[Outcome]) -> str:
    """What was wanted and what was measured, as Markdown; those of which nothing was measured are left out."""
    rows = [
        row for judge in (_pretrained, _disk, _fastest, _economy, _memory, _blocking, _sums) for row in judge(outcomes)
    ]
    lines = ["| goal | measured | met |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {wanted} | {found} | {'yes' if met else 'NO'} |" for wanted, found, met in rows)])


def _one(outcomes: Sequence[Outcome], case: str, cache: str, name: str) -> Outcome | None:
    return next((o for o in outcomes if (o.case, o.cache, o.name) == (case, cache, name)), None)


def _groups(outcomes: Sequence[Outcome], section: str) -> Iterator[list[Outcome]]:
    """The contenders of each case."""
    for key in dict.fromkeys((o.section, o.case, o.cache) for o in outcomes if o.section == section):
        yield [o for o in outcomes if (o.section, o.case, o.cache) == key]


def _pretrained(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for value, what in ((ready, "loaded"), (used, "every value read")):
        peer, own = (_one(outcomes, "new model", "warm", name) for name in ("from_pretrained", "fabriclite"))
        if peer and own:
            ratio = own.ratio(value, peer.samples)
            yield f"1 rank, warm: no slower than from_pretrained ({what})", f"{ratio:.2f} of its time", ratio <= 1


def _disk(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for case in ("new model", "fsdp"):
        own = _one(outcomes, case, "cold", "fabriclite")
        floors = {
            "into one buffer, against every value read": ("bytes into one buffer", seconds),
            "into fresh memory, every value read": ("bytes into fresh memory", read),
        }
        for what, (name, value) in floors.items():
            floor = _one(outcomes, case, "cold", name)
            if own and floor:
                pairs = zip(own.samples, floor.samples, strict=True)
                part = statistics.median(value(there) / here.read for here, there in pairs)
                yield f"{case}, cold: at least 0.9 of the speed of plain reading ({what})", f"{part:.2f}", part >= 0.9


def _fastest(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for section in ("load", "save"):
        for group in _groups(outcomes, section):
            peers = [o for o in group if o.role == "peer"]
            values = ((ready, "loaded"), (used, "every value read")) if section == "load" else ((seconds, "saved"),)
            for own in (o for o in group if o.role == "ours" and peers):
                for value, what in values:
                    best = min(peers, key=lambda o: o.middle(value))
                    ratio = own.ratio(value, best.samples)
                    wanted = f"{own.world}: {own.name} no slower than the fastest peer ({what})"
                    yield wanted, f"{ratio:.2f} of the time of {best.name}", ratio <= 1


def _economy(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    found = [o for o in outcomes if o.section == "load" and o.role == "ours"]
    if found:
        worst = max(found, key=lambda o: o.middle(lambda s: s.called) / o.share)
        ratio = worst.middle(lambda s: s.called) / worst.share
        yield (
            "bytes that read calls give a rank: at most 1.05 x its part",
            f"{ratio:.3f} ({worst.world})",
            ratio <= 1.05,
        )


def _memory(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for one in (o for o in outcomes if o.section == "load" and o.role == "ours"):
        share = 0 if one.case == "existing memory" else one.share  # there it is in the base already
        limit, peak = share + SLACK + one.largest, max(sample.peak for sample in one.samples)
        wanted = f"{one.world}: peak over base at most {'part + ' if share else ''}64 MB + largest tensor"
        yield wanted, f"{peak / 1e6:.0f} of {limit / 1e6:.0f} MB", peak <= limit


def _blocking(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for group in _groups(outcomes, "save"):
        floor = next((o for o in group if o.role == "floor"), None)
        for own in (o for o in group if o.role == "ours" and floor):
            ratio = own.ratio(seconds, floor.samples)
            yield f"{own.world}: blocks at most {NOISE} x a host copy", f"{ratio:.2f}", ratio <= NOISE


def _sums(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """No peer compares checksums, so ours are set beside theirs with and without that."""
    for group in _groups(outcomes, "checkpoint"):
        peers = [o for o in group if o.role == "peer"]
        for own in (o for o in group if o.role == "ours" and peers):
            best = min(peers, key=lambda o: o.middle(used))
            whole = own.ratio(used, best.samples)
            if own.cache == "cold":  # comparing fetches the files, and loading finds them: not to be told apart
                wanted = f"{own.world}: {own.name} with checksums no slower than the fastest peer, which compares none"
                yield wanted, f"{whole:.2f} of the time of {best.name}", whole <= 1
                continue
            pairs = zip(own.samples, best.samples, strict=True)
            bare = statistics.median((here.used - here.verifying) / there.used for here, there in pairs)
            found = f"{bare:.2f} of the time of {best.name}; with checksums, which only ours compares, {whole:.2f}"
            yield f"{own.world}: {own.name} without checksums no slower than the fastest peer", found, bare <= 1

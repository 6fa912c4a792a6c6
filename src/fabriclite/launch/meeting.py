"""How ranks find each other in a store that may hold what earlier attempts left there.

An agent that starts ranks again keeps its store. What the dead wrote there (addresses, above all) must not be read by
the living, and numbers of attempts do not tell them apart: an agent that joins late counts its own. So rank 0 makes up
a name for every meeting, under which all keys lie, and each rank asks for it with a word of its own that nobody used.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.errors import ConfigError, WorldError
from fabriclite.launch.failures.members import Member
from fabriclite.launch.failures.record import Failure

_PAUSE_S: Final = 0.02
_BASE: Final = "fabriclite/meeting"
SHORTEST: Final = timedelta(seconds=60)
"""A meeting waits at least so long: ranks take their time to start, whatever the timeout of collectives."""

Facts = Mapping[str, str]
"""What must be the same on all ranks: argument to value."""


class FailedBeforeError(Exception):
    """Another rank failed before all had met."""

    def __init__(self, first: Failure) -> None:
        super().__init__(first.line)
        self.first = first


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """All ranks have come.

    Attributes:
        prefix: of every key of this meeting, and of no other.
        roster: all ranks, in order.
    """

    prefix: str
    roster: Sequence[Member]


def meet(store: Store, run: str, me: Member, size: int, facts: Facts, patience: timedelta) -> Meeting:
    """Wait until every rank has come, and compare what must be the same. Every rank must call this.

    Args:
        store: the same for all.
        run: name of the run in the store.
        me: this rank.
        size: number of ranks.
        facts: of this rank.
        patience: how long to wait, at least a minute.

    Raises:
        ConfigError: ``facts`` differ; on every rank.
        FailedBeforeError: another rank failed before.
        WorldError: somebody did not come in time.
    """
    patience_s = max(patience, SHORTEST).total_seconds()
    here = _Here(store, f"{_BASE}/{run}", size, patience_s, time.monotonic() + patience_s)
    card = json.dumps({"member": asdict(me), "facts": dict(facts)})
    prefix, told = _host(here, card) if me.rank == 0 else _visit(here, me.rank, card)
    cards = [json.loads(text) for text in json.loads(told)]
    _compare([found["facts"] for found in cards])
    return Meeting(prefix=prefix, roster=tuple(Member(**found["member"]) for found in cards))


def tell_failed(store: Store, run: str, failure: Failure) -> None:
    """Say that a rank failed that cannot come any more."""
    store.compare_set(f"{_BASE}/{run}/failed", "", failure.to_json())


@dataclass(frozen=True, slots=True)
class _Here:
    store: Store
    base: str
    size: int
    patience_s: float
    deadline: float

    def get(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def until(self, done: Callable[[], bool], missing: Callable[[], str]) -> None:
        pause = _PAUSE_S
        while not done():
            failed = self.get(f"{self.base}/failed")
            if failed is not None:
                raise FailedBeforeError(Failure.from_json(failed))
            if time.monotonic() > self.deadline:
                raise WorldError(
                    f"All {self.size} ranks must meet within {self.patience_s:.0f} s, but {missing()} did not come."
                    " Look at what they printed, and whether every process was started."
                )
            time.sleep(pause)
            pause = min(2 * pause, 10 * _PAUSE_S)


def _host(here: _Here, card: str) -> tuple[str, str]:
    """Rank 0: welcome whoever asks, as long as not all have come, and tell all who came."""
    prefix = f"fabriclite/{uuid.uuid4().hex}"
    waiting = set(range(1, here.size))

    def all_came() -> bool:
        for rank in sorted(waiting):
            word = here.get(f"{here.base}/{rank}")
            if word is None:
                continue
            here.store.set(f"{here.base}/{word}", prefix)  # word may be one of the dead: then nobody comes for it
            if here.store.check([f"{prefix}/came/{rank}"]):
                waiting.discard(rank)
        return not waiting

    here.until(all_came, lambda: f"rank {', '.join(map(str, sorted(waiting)))}")
    cards = [card, *(here.store.get(f"{prefix}/came/{rank}").decode() for rank in range(1, here.size))]
    told = json.dumps(cards)
    here.store.set(f"{prefix}/cards", told)
    return prefix, told


def _visit(here: _Here, rank: int, card: str) -> tuple[str, str]:
    word = uuid.uuid4().hex
    here.store.set(f"{here.base}/{rank}", word)
    found: list[str] = []  # the meetings this rank was welcomed to: a rank 0 of an earlier attempt may yet welcome it

    def complete() -> bool:
        prefix = here.get(f"{here.base}/{word}")
        if prefix is None:
            return False
        if prefix not in found[-1:]:
            here.store.set(f"{prefix}/came/{rank}", card)
            found.append(prefix)
        return bool(here.store.check([f"{prefix}/cards"]))

    here.until(complete, lambda: "rank 0, or one of the others," if found else "rank 0")
    return found[-1], here.store.get(f"{found[-1]}/cards").decode()


def _compare(facts: Sequence[Facts]) -> None:
    for name, expected in facts[0].items():
        ranks: dict[str, list[str]] = {}
        for rank, told in enumerate(facts):
            ranks.setdefault(told.get(name, expected), []).append(str(rank))
        if len(ranks) > 1:
            found = " and ".join(f"{value} on rank {', '.join(who[:8])}" for value, who in ranks.items())
            raise ConfigError(
                f"`{name}` must be the same on all ranks, but is {found}. Every rank must make the same Fabric:"
                " choose it by what all of them know, not by the rank."
            )

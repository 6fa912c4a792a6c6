"""Facts as values. One that cannot be found says why, and stops no other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fabriclite.doctor.secrets import hidden

Json: TypeAlias = str | int | float | bool | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was looked for.

    Attributes:
        name: what it is; one that ends in ``_bytes`` is a number of bytes, in ``_s`` of seconds.
        value: as JSON; ``None`` means that there is none.
        missing: why it could not be found; ``None`` where it was.
    """

    name: str
    value: Json
    missing: str | None = None

    def as_json(self) -> Json:
        return self.value if self.missing is None else {"could_not_be_found": self.missing}


@dataclass(frozen=True, slots=True)
class Section:
    """Facts of one kind."""

    title: str
    facts: tuple[Fact, ...]

    def value(self, name: str) -> Any:
        """What the fact of this name is; ``None`` too where it could not be found."""
        return next((fact.value for fact in self.facts if fact.name == name), None)

    def missing(self, name: str) -> str | None:
        return next((fact.missing for fact in self.facts if fact.name == name), None)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that will fail (``"error"``) or cost (``"warning"``), and how to mend it."""

    level: Literal["error", "warning"]
    what: str
    mend: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    sections: tuple[Section, ...]
    problems: tuple[Problem, ...]

    @property
    def failed(self) -> bool:
        return any(problem.level == "error" for problem in self.problems)

    def as_json(self) -> dict[str, Json]:
        rooms: dict[str, Json] = {s.title: {fact.name: fact.as_json() for fact in s.facts} for s in self.sections}
        found: list[Any] = [{"level": p.level, "what": hidden(p.what), "mend": p.mend} for p in self.problems]
        return {**rooms, "problems": found}


def look(title: str, finders: Mapping[str, Callable[[], Json]]) -> Section:
    """Ask each for its fact. Whatever one raises is written down in its place."""
    return Section(title, tuple(_ask(name, find) for name, find in finders.items()))


def _ask(name: str, find: Callable[[], Json]) -> Fact:
    try:
        return Fact(name, hidden(find()))
    except Exception as error:  # drivers and libraries raise what they like
        return Fact(name, None, hidden(f"{error}" or type(error).__name__))

"""What ranks tell each other about failing, in the store under the keys of one meeting."""

from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

from fabriclite.launch.failures.line import Line
from fabriclite.launch.failures.record import Failure, Note


class Board:
    """Every method asks the store, and raises what :meth:`Line.ask` does.

    Args:
        line: to the store.
        prefix: of all keys; of no other meeting.
        size: number of ranks.
    """

    def __init__(self, line: Line, prefix: str, size: int) -> None:
        self._line = line
        self._prefix = prefix
        self._size = size

    def first(self) -> Failure | None:
        """The first failure, if there was one."""
        found = self._line.ask(lambda store: _get(store, self._key("first")))
        return None if found is None else Failure.from_json(found)

    def claim(self, failure: Failure) -> Failure:
        """Record ``failure`` unless another is there; whichever is there now."""
        key, value = self._key("first"), failure.to_json()
        return Failure.from_json(self._line.ask(lambda store: store.compare_set(key, "", value)))

    def say(self, note: Note) -> None:
        self._line.ask(lambda store: store.set(self._key(f"note/{note.rank}"), note.to_json()))

    def notes(self) -> list[Note]:
        keys = [self._key(f"note/{rank}") for rank in range(self._size)]
        found = self._line.ask(lambda store: [_get(store, key) for key in keys])
        return [Note.from_json(text) for text in found if text is not None]

    def leave(self, rank: int) -> None:
        """``rank`` has done its work, and may end without a word."""
        self._line.ask(lambda store: store.set(self._key(f"left/{rank}"), "1"))

    def left(self, ranks: Sequence[int]) -> set[int]:
        """Those of ``ranks`` that have done their work."""
        return self._line.ask(lambda store: {rank for rank in ranks if store.check([self._key(f"left/{rank}")])})

    def beat(self, place: int, count: int) -> None:
        """The machine of number ``place`` lives."""
        self._line.ask(lambda store: store.set(self._key(f"beat/{place}"), str(count)))

    def beats(self, places: int) -> list[bytes | None]:
        """The last beat of each machine."""
        return self._line.ask(lambda store: [_get(store, self._key(f"beat/{place}")) for place in range(places)])

    def _key(self, name: str) -> str:
        return f"{self._prefix}/failing/{name}"


def _get(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None

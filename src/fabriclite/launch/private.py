"""Objects that a new process gets as its own."""

import copyreg
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any


class Private:
    """What a process gets as its own. Torch has multiprocessing pass tensors as memory that all processes share: ranks
    would write into each other's arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        box = io.BytesIO()
        pickler = pickle.Pickler(box)
        reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # queues and locks still need theirs
        own = {cls: how for cls, how in reducers.items() if not cls.__module__.startswith("torch")}
        pickler.dispatch_table = {**copyreg.dispatch_table, **own}
        pickler.dump(self.value)
        return Private._restore, (box.getvalue(),)

    @staticmethod
    def _restore(data: bytes) -> "Private":
        return Private(pickle.loads(data))

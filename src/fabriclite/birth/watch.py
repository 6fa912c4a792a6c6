"""While user code spreads a recorded model, nothing is noted: see that it does not compute with it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import facts, session
from fabriclite.birth.recording import Recording
from fabriclite.birth.replay import flat
from fabriclite.errors import MaterializeError

_MOVES: Final = frozenset({"clone", "_to_copy", "detach", "alias", "lift_fresh"})


@contextmanager
def watched() -> Iterator[None]:
    """Within it, changing a recorded tensor, or making values of one, raises; cutting and distributing does not.

    Raises:
        MaterializeError: see above.
    """
    recording = session.current()
    with nullcontext() if recording is None else _Watch(recording):
        yield


class _Watch(_torch.DispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, _torch.OpOverload) and not self._spreads(func, args, kwargs):
            raise MaterializeError(
                f"`parallelize_fn` must only spread a recorded model, but calls {facts.of(func).name} on one of its"
                " tensors, which has no values yet. Compute before setup, or build the model with"
                " fabric.init_module(empty_init=False)."
            )
        return func(*args, **kwargs)

    def _spreads(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = [t for t in flat([args, list(kwargs.values())]) if isinstance(t, Tensor)]
        if not any(self._recording.knows(t) for t in tensors):
            return True
        known = facts.of(func)
        if known.views or known.reshapes or known.name in _MOVES | facts.METADATA_ONLY or func.namespace != "aten":
            return True
        written = [t for t in flat([facts.argument(func, i, args, kwargs) for i in known.written])]
        return known.name == "copy_" and not any(self._recording.knows(t) for t in written)

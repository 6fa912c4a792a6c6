"""What may be passed as ``Fabric(loggers=...)``."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """Any object with ``log_metrics``; nothing of ours needs to be imported.

    Where it has these methods as well, they are called too:

    - ``on_rank(rank) -> bool``: once, when ``Fabric`` knows which rank this process is; whether ``log_metrics`` and
      ``finalize`` are to be called here. Without it they are called on every rank.
    - ``finalize(status)``: at the end, with ``"success"`` or ``"failed"``. It may be called more than once.

    ``log_hyperparams(params)`` is for the script to call: ``fabric.logger.log_hyperparams({"lr": 1e-3})``.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers (or whatever the script logs) of one step."""

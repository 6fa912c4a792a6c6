"""Metrics at Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from typing_extensions import override

from fabriclite.errors import ConfigError
from fabriclite.loggers.base import RankZeroLogger, Status, imported

_STEP: Final = "step"


@final
class WandbLogger(RankZeroLogger):
    """Logs to a run of Weights & Biases. ``experiment`` is that run.

    Metrics are drawn over ``step``, which is logged with them: a resumed run may do steps again, which wandb's own
    count would refuse.

    Args:
        name: shown for the run.
        save_dir: where wandb keeps its files.
        version: the run's id; with one that exists the run goes on.
        offline: write to ``save_dir`` alone, for ``wandb sync`` to send.
        project: where the run belongs.
        prefix: put before the name of each metric, with ``/`` between.
        kwargs: for ``wandb.init``.

    Raises:
        ConfigError: wandb is not installed, or ``version`` and ``id`` differ.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | Path = ".",
        version: str | None = None,
        offline: bool = False,
        project: str | None = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(prefix)
        if version is not None and kwargs.get("id", version) != version:
            raise ConfigError(
                f"`version` and `id` must be the same, the run's id, but are {version!r} and {kwargs['id']!r}."
                " Keep one."
            )
        imported("wandb", "WandbLogger")
        self.name = name
        self._id: str | None = kwargs.pop("id", version)
        mode = {"mode": "offline"} if offline else {}
        self._kwargs = {"name": name, "dir": str(save_dir), "project": project, "resume": "allow", **mode, **kwargs}

    @property
    def version(self) -> str | None:
        """The run's id: as it was given, or as wandb chose it when first something was written."""
        return self._id

    @override
    def _open(self) -> Any:
        wandb = imported("wandb", "WandbLogger")
        Path(self._kwargs["dir"]).mkdir(parents=True, exist_ok=True)  # wandb takes the folder for temporary files else
        run = wandb.init(id=self._id, **self._kwargs)
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        self._id = run.id
        return run

    @override
    def _write(self, opened: Any, metrics: Mapping[str, Any], step: int) -> None:
        if _STEP in metrics:
            raise ConfigError(
                "`metrics` must not name 'step', which WandbLogger logs itself, but does. Pass step=... instead."
            )
        opened.log({**metrics, _STEP: step})

    @override
    def _write_params(self, opened: Any, params: Mapping[str, Any]) -> None:
        opened.config.update(dict(params), allow_val_change=True)

    @override
    def _close(self, opened: Any, status: Status) -> None:
        opened.finish(exit_code=0 if status == "success" else 1)

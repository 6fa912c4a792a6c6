"""Metrics at an MLflow server, or in its files."""

import time
from collections.abc import Mapping
from typing import Any, Final, final

from typing_extensions import override

from fabriclite.loggers.base import RankZeroLogger, Status, as_number, imported

_AT_ONCE: Final = 100
"""Parameters that MLflow takes in one request; of metrics it takes 1000."""
_LONGEST: Final = 6000
"""Characters of a parameter's value."""


@final
class MLflowLogger(RankZeroLogger):
    """Logs to a run of MLflow. ``experiment`` is an ``MlflowClient``; ``run_id`` says which run.

    Each call of ``log_metrics`` is one request, and has been answered when it returns.

    Args:
        experiment_name: where the run belongs; it is made if it is not there.
        run_name: shown for the run; ``None`` lets MLflow choose one.
        tracking_uri: of the server or the files; ``None`` as MLflow itself is told.
        tags: of the run.
        run_id: of a run that exists and goes on; ``None`` makes one.
        artifact_location: of a new experiment.
        prefix: put before the name of each metric, with ``/`` between.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        artifact_location: str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(prefix)
        imported("mlflow.tracking", "MLflowLogger")
        self.name = experiment_name
        self._run_name = run_name
        self._uri = tracking_uri
        self._tags = dict(tags or {})
        self._run_id = run_id
        self._artifacts = artifact_location

    @property
    def version(self) -> str | None:
        """The run's id: as it was given, or as MLflow chose it when first something was written."""
        return self._run_id

    run_id = version

    @override
    def _open(self) -> Any:
        client = imported("mlflow.tracking", "MLflowLogger").MlflowClient(tracking_uri=self._uri)
        if self._run_id is None:
            found = client.get_experiment_by_name(self.name)
            where = found.experiment_id if found else client.create_experiment(self.name, self._artifacts)
            self._run_id = client.create_run(where, tags=self._tags, run_name=self._run_name).info.run_id
        else:
            client.update_run(self._run_id, status="RUNNING")
        return client

    @override
    def _write(self, opened: Any, metrics: Mapping[str, Any], step: int) -> None:
        entities, now = imported("mlflow.entities", "MLflowLogger"), int(time.time() * 1000)
        numbers = {name: as_number("MLflowLogger", name, value) for name, value in metrics.items()}
        found = [entities.Metric(name, value, now, step) for name, value in numbers.items()]
        opened.log_batch(self._run_id, metrics=found)

    @override
    def _write_params(self, opened: Any, params: Mapping[str, Any]) -> None:
        entities = imported("mlflow.entities", "MLflowLogger")
        found = [entities.Param(name, str(value)[:_LONGEST]) for name, value in params.items()]
        for start in range(0, len(found), _AT_ONCE):
            opened.log_batch(self._run_id, params=found[start : start + _AT_ONCE])

    @override
    def _close(self, opened: Any, status: Status) -> None:
        opened.set_terminated(self._run_id, "FINISHED" if status == "success" else "FAILED")

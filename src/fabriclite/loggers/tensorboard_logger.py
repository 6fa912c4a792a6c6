"""Metrics as TensorBoard shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from typing_extensions import override

from fabriclite.loggers.base import RankZeroLogger, Status, as_number, imported
from fabriclite.loggers.folders import RunFolder

_FLUSH_S: Final = 1


@final
class TensorBoardLogger(RankZeroLogger):
    """Writes event files to ``ROOT_DIR/NAME/VERSION``; a resumed run adds one beside those that are there.

    They are brought to the disk each second by a thread of TensorBoard's: a process that is killed loses that much.

    Args:
        root_dir: where runs are kept.
        name: of the experiment; ``""`` for no folder of its own.
        version: of the run; ``None`` is the next free ``version_0``, ``version_1``, ..., a number one of those.
        prefix: put before the name of each metric, with ``/`` between.
        kwargs: for ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(
        self,
        root_dir: str | Path,
        name: str = "logs",
        version: int | str | None = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(prefix)
        imported("tensorboard", "TensorBoardLogger")
        self.name = name
        self._folder = RunFolder(Path(root_dir), name, version)
        self._kwargs = {"flush_secs": _FLUSH_S, **kwargs}

    @property
    def version(self) -> int | str | None:
        """As it was given, or chosen when first something was written."""
        return self._folder.version

    @property
    def log_dir(self) -> str:
        """The folder of the run.

        Raises:
            ConfigError: on other ranks than 0, where ``version`` was not given.
        """
        return str(self._folder.path(self._writes))

    @override
    def _open(self) -> Any:
        writer = imported("torch.utils.tensorboard", "TensorBoardLogger").SummaryWriter
        return writer(log_dir=self.log_dir, **self._kwargs)

    @override
    def _write(self, opened: Any, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            opened.add_scalar(name, as_number("TensorBoardLogger", name, value), step)

    @override
    def _write_params(self, opened: Any, params: Mapping[str, Any]) -> None:
        summaries = imported("torch.utils.tensorboard.summary", "TensorBoardLogger")
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in params.items()}
        for summary in summaries.hparams(plain, {}):
            opened.file_writer.add_summary(summary)

    @override
    def _close(self, opened: Any, status: Status) -> None:
        opened.close()

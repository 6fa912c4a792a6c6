"""The folder of one run among others."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from fabriclite.errors import ConfigError

_NUMBERED: Final = re.compile(r"version_(\d+)")


class RunFolder:
    """``ROOT/NAME/VERSION``. Two loggers that choose for themselves get two folders.

    Args:
        root: where runs are kept.
        name: of the experiment.
        version: a number ``n`` is the folder ``version_n``; ``None`` chooses the next free one when first asked.
    """

    def __init__(self, root: Path, name: str, version: int | str | None) -> None:
        self._experiment = root / name
        self.version = version

    def path(self, may_choose: bool) -> Path:
        """``may_choose``: whether this rank says which version it is.

        Raises:
            ConfigError: it does not, and none was given.
        """
        if self.version is None:
            if not may_choose:
                raise ConfigError(
                    "`version` must be given to know `log_dir` on other ranks than 0, but is None: rank 0 chooses it"
                    " when it first writes. Write version='my-run', say."
                )
            self.version = self._take_next()
        return self._experiment / (f"version_{self.version}" if isinstance(self.version, int) else self.version)

    def _take_next(self) -> int:
        """The next number; its folder is made at once, so that no other run takes it too."""
        while True:
            taken = [_NUMBERED.fullmatch(p.name) for p in self._experiment.glob("version_*")]
            number = max((int(found[1]) for found in taken if found), default=-1) + 1
            with suppress(FileExistsError):
                (self._experiment / f"version_{number}").mkdir(parents=True)
                return number

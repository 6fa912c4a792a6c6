"""What was loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What ``fabric.load_raw`` did, by name.

    Attributes:
        loaded: of the module, what has the file's values now, tied names included.
        initialized: of the module, what was not in the file, and keeps the values of its own code.
        ignored: of the file, what the module does not have.
        converted: what was loaded from another dtype, and that dtype.
    """

    loaded: tuple[str, ...]
    initialized: tuple[str, ...]
    ignored: tuple[str, ...]
    converted: Mapping[str, torch.dtype]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded, {len(self.converted)} of them from another dtype"]
        for what, names in (("keep their own values", self.initialized), ("in the file were ignored", self.ignored)):
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(names)}")
        return "; ".join(lines)

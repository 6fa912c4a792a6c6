"""What the command line of ``fabriclite run`` says of the arguments of ``Fabric``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

_STRATEGY: Final = "FABRICLITE_STRATEGY"
_PRECISION: Final = "FABRICLITE_PRECISION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """``None``: nothing was said.

    Attributes:
        strategy, precision: by name.
    """

    strategy: str | None = None
    precision: str | None = None

    @classmethod
    def of_this_process(cls) -> Self:
        return cls(strategy=os.environ.get(_STRATEGY), precision=os.environ.get(_PRECISION))

    def variables(self) -> Mapping[str, str]:
        """How a starter tells them to its ranks."""
        said = {_STRATEGY: self.strategy, _PRECISION: self.precision}
        return {name: value for name, value in said.items() if value is not None}

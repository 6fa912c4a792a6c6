"""The forms of a checkpoint, as users name them."""

from dataclasses import dataclass
from typing import Final, Literal

from fabriclite.errors import ConfigError
from fabriclite.spelling import as_code

Format = Literal["folder", "file", "safetensors"]
OWN: Final = "fabriclite"
"""The entry of a checkpoint that holds what belongs to the run: loss scale, random states, version of the layout."""
VERSION: Final = 2
"""Of the layout. From 2 on a folder lists checksums."""
FORMATS: Final[tuple[Format, ...]] = ("folder", "file", "safetensors")
DEFAULT_MAX_BYTES: Final = 5_000_000_000
"""Of one file of an export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Safetensors:
    """The format of an export.

    Attributes:
        max_file_bytes: the tensors of one file are at most this large together; a larger one has a file of its own.

    Raises:
        ConfigError: it is no count.
    """

    max_file_bytes: int = DEFAULT_MAX_BYTES

    __repr__ = as_code

    def __post_init__(self) -> None:
        size: object = self.max_file_bytes
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"`max_file_bytes` must be a count of at least 1, but is {size!r}. Example: 5 * 10**9.")

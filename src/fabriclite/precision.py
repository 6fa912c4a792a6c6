"""Which dtype is used where. A value, not a plug-in: strategies read it, it knows no strategy."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from fabriclite.errors import ConfigError
from fabriclite.spelling import as_code

PrecisionName = Literal["64-true", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]
PrecisionInput = PrecisionName | Literal["64", "32", "16", "bf16", 64, 32, 16]

NAMES: Final[tuple[PrecisionName, ...]] = get_args(PrecisionName)
_SHORT: Final[dict[str, PrecisionName]] = {
    "64": "64-true",
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}
_DTYPES: Final = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are stored, computed and sent.

    Attributes:
        name: the name users write, such as ``"bf16-mixed"``.
        param_dtype: parameters and optimizer state at rest.
        compute_dtype: matrix products in forward and backward.
        reduce_dtype: gradients on the wire. Mixed precision reduces in float32.
    """

    name: PrecisionName
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype

    def __repr__(self) -> str:
        usual = self.name in NAMES and Precision.parse(self.name) == self
        return f"Precision.parse({self.name!r})" if usual else as_code(self)

    @property
    def mixed(self) -> bool:
        """Whether parameters are kept in another dtype than the one they compute in."""
        return self.param_dtype != self.compute_dtype

    @property
    def half(self) -> bool:
        """Whether parameters themselves are kept in 16 bits."""
        return self.param_dtype in (torch.bfloat16, torch.float16)

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients underflow without a scaled loss (float16 under float32 parameters)."""
        return self.mixed and self.compute_dtype == torch.float16

    @classmethod
    def parse(cls, value: object) -> "Precision":
        """Make a value from what a user writes.

        Args:
            value: one of ``NAMES``, a short form (``"bf16"`` and ``16`` mean mixed; ``32`` and ``64`` mean true), or
                ``None`` for ``"32-true"``.

        Raises:
            ConfigError: the name is unknown.
        """
        text = "32-true" if value is None else str(value)
        name = _SHORT.get(text, text)
        if isinstance(value, bool) or name not in NAMES:
            raise ConfigError(
                f"`precision` must be one of {', '.join(NAMES)}, but is {value!r}."
                " Short forms: 'bf16' and '16' mean mixed, '32' and '64' mean true."
            )
        bits, kind = name.split("-")
        compute = _DTYPES[bits]
        param = torch.float32 if kind == "mixed" else compute
        return cls(name=name, param_dtype=param, compute_dtype=compute, reduce_dtype=param)

"""Numbers and names out of the environment, with errors that name the launcher."""

from collections.abc import Mapping
from dataclasses import dataclass

from fabriclite.errors import WorldError


@dataclass(frozen=True, slots=True)
class Variables:
    """The environment, as one launcher should have written it.

    Attributes:
        env: usually ``os.environ``.
        launcher: the command that sets the variables.
    """

    env: Mapping[str, str]
    launcher: str

    def require(self, *names: str) -> None:
        """Raise unless all are set.

        Raises:
            WorldError: names those that are not.
        """
        missing = [name for name in names if name not in self.env]
        found = [name for name in names if name in self.env]
        if missing:
            when = f" when {', '.join(found)} {'is' if len(found) == 1 else 'are'} set" if found else ""
            raise WorldError(
                f"{', '.join(missing)} must be set{when}, but the environment lacks"
                f" {'it' if len(missing) == 1 else 'them'}. Launch with {self.launcher}, or unset them to run in one"
                " process."
            )

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number; ``default``, where there is one, if it is not set.

        Raises:
            WorldError: it is not set and must be, or is no whole number.
        """
        if name not in self.env:
            if default is not None:
                return default
            self.require(name)
        try:
            return int(self.env[name])
        except ValueError:
            raise WorldError(
                f"{name} must be a whole number, but is {self.env[name]!r}. Launch with {self.launcher}, which sets it."
            ) from None

    def count(self, name: str) -> int:
        """A whole number of at least 1.

        Raises:
            WorldError: it is not.
        """
        value = self.number(name)
        if value < 1:
            raise WorldError(f"{name} must be at least 1, but is {value}. Launch with {self.launcher}, which sets it.")
        return value

    def rank(self, name: str, size: int, size_name: str) -> int:
        """A whole number in ``[0, size)``.

        Raises:
            WorldError: it is not.
        """
        value = self.number(name)
        if not 0 <= value < size:
            raise WorldError(
                f"{name} must be in [0, {size}), as {size_name} says, but is {value}. Launch with {self.launcher},"
                " which sets both."
            )
        return value

    def port(self) -> int | None:
        """MASTER_PORT, if it is set.

        Raises:
            WorldError: it is no port.
        """
        port = self.env.get("MASTER_PORT")
        if port is None:
            return None
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise WorldError(
                f"MASTER_PORT must be a port number from 1 to 65535, but is {port!r}. Set it to a free one, the same on"
                " all ranks."
            )
        return int(port)

    def digits(self, name: str) -> int:
        """The number in a job's name, and 0 where there is none: it only has to be the same in all processes."""
        return int("".join(c for c in self.env.get(name, "") if c in "0123456789") or 0)

"""Every error fabriclite raises on purpose.

::

    FabricError
    ├── ConfigError       (ValueError)    the arguments contradict each other: mend the script
    ├── WorldError        (RuntimeError)  the processes or their environment are wrong: mend the launch
    ├── SetupOrderError   (RuntimeError)  a method was called too early, too late or twice
    ├── MaterializeError  (RuntimeError)  a parameter or buffer cannot be given its value
    ├── CheckpointError   (RuntimeError)  a checkpoint does not fit, or cannot be written or read
    ├── NonFiniteGradientError (RuntimeError)  a gradient norm is NaN or infinite
    ├── NonFiniteError   (RuntimeError)  a loss is NaN or infinite
    └── LaunchError       (RuntimeError)  a worker process failed; carries its traceback
"""


class FabricError(Exception):
    """Base class: catch this to catch everything fabriclite raises on purpose."""


class ConfigError(FabricError, ValueError):
    """The arguments contradict each other, or the strategy cannot mean them."""


class WorldError(FabricError, RuntimeError):
    """The process environment is incomplete, or does not fit what the script asks for."""


class SetupOrderError(FabricError, RuntimeError):
    """A method was called too early, too late or twice."""


class MaterializeError(FabricError, RuntimeError):
    """A parameter or buffer has no value, and nothing says which value it should get."""


class CheckpointError(FabricError, RuntimeError):
    """A checkpoint cannot be written, cannot be read, or does not fit its target."""


class NonFiniteGradientError(FabricError, RuntimeError):
    """The norm of the gradients is NaN or infinite."""


class NonFiniteError(FabricError, RuntimeError):
    """A loss is NaN or infinite. The weights were not stepped with it."""


class LaunchError(FabricError, RuntimeError):
    """A worker process failed. The message holds the traceback of the first one that did."""

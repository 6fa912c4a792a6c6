"""fabriclite: one PyTorch training script, on one device or thousands."""

from fabriclite.checkpoint.formats import Safetensors
from fabriclite.checkpoint.report import LoadReport
from fabriclite.checkpoint.saving import SaveHandle
from fabriclite.errors import (
    CheckpointError,
    ConfigError,
    FabricError,
    LaunchError,
    MaterializeError,
    NonFiniteError,
    NonFiniteGradientError,
    SetupOrderError,
    WorldError,
)
from fabriclite.fabric import Fabric
from fabriclite.planning.api import find_layouts, plan
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.plan import Plan
from fabriclite.planning.search import Layouts
from fabriclite.precision import Precision
from fabriclite.preemption import Preemption
from fabriclite.strategies.configs import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from fabriclite.watching.profiling import ProfilerWindow
from fabriclite.world import World

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "Fabric",
    "FabricError",
    "Hardware",
    "LaunchError",
    "Layouts",
    "LoadReport",
    "MaterializeError",
    "ModelParallelStrategy",
    "NonFiniteError",
    "NonFiniteGradientError",
    "Plan",
    "Precision",
    "Preemption",
    "ProfilerWindow",
    "Safetensors",
    "SaveHandle",
    "SetupOrderError",
    "SingleDeviceStrategy",
    "World",
    "WorldError",
    "find_layouts",
    "plan",
    "seed_everything",
]

from fabriclite.seed import seed_everything

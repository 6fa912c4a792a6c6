"""Running functions in real worlds of processes, through the public API."""

from collections.abc import Callable
from typing import Any

from fabriclite import (
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

STRATEGIES: dict[str, Any] = {
    "single_device": SingleDeviceStrategy(),
    "ddp": DDPStrategy(start_method="forkserver"),
    "ddp_views": DDPStrategy(gradient_as_bucket_view=True, static_graph=True, start_method="forkserver"),
    "fsdp": FSDPStrategy(start_method="forkserver"),
    "fsdp_offload": FSDPStrategy(cpu_offload=True, reshard_after_forward=True, start_method="forkserver"),
    "hsdp": FSDPStrategy(device_mesh=(2, 2), reshard_after_forward=False, start_method="forkserver"),
    "tp": ModelParallelStrategy(start_method="forkserver"),
    "tp_only": ModelParallelStrategy(data_parallel_size=1, start_method="forkserver"),
    "zero1": DeepSpeedStrategy(stage=1, start_method="forkserver"),
    "zero2": DeepSpeedStrategy(stage=2, start_method="forkserver"),
    "zero3": DeepSpeedStrategy(stage=3, start_method="forkserver"),
}


def run(function: Callable[..., Any], strategy: str, world: int, *args: Any, precision: Any = "32-true") -> Any:
    """``function(fabric, *args)`` on ``world`` processes; what rank 0 returned."""
    fabric = Fabric(accelerator="cpu", strategy=STRATEGIES[strategy], devices=world, precision=precision)
    return fabric.launch(function, *args)

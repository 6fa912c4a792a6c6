"""Names to configs. A literal, not a decorator: everything registered is visible here."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from fabriclite.errors import ConfigError
from fabriclite.strategies.configs import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from fabriclite.strategy import StrategyConfig

STRATEGIES: Final[Mapping[str, Callable[[], StrategyConfig]]] = {
    "single_device": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "tensor_parallel": ModelParallelStrategy,
    "deepspeed": DeepSpeedStrategy,
}
"""The names we teach."""

ALIASES: Final[Mapping[str, Callable[[], StrategyConfig]]] = {
    "ddp_find_unused_parameters_true": partial(DDPStrategy, find_unused_parameters=True),
    "ddp_find_unused_parameters_false": DDPStrategy,
    "ddp_spawn": partial(DDPStrategy, start_method="spawn"),
    "ddp_fork": partial(DDPStrategy, start_method="fork"),
    "ddp_notebook": partial(DDPStrategy, start_method="fork"),
    "fsdp2": FSDPStrategy,
    "fsdp_cpu_offload": partial(FSDPStrategy, cpu_offload=True),
    "model_parallel": ModelParallelStrategy,
    "deepspeed_stage_1": partial(DeepSpeedStrategy, stage=1),
    "deepspeed_stage_2": partial(DeepSpeedStrategy, stage=2),
    "deepspeed_stage_2_offload": partial(DeepSpeedStrategy, stage=2, offload_optimizer=True),
    "deepspeed_stage_3": DeepSpeedStrategy,
    "deepspeed_stage_3_offload": partial(DeepSpeedStrategy, offload_optimizer=True, offload_parameters=True),
}
"""Names that scripts written for Lightning Fabric use. The list does not grow."""


def resolve(strategy: object, processes: int) -> StrategyConfig:
    """The config that ``strategy`` means.

    Args:
        strategy: a config, a name, or ``"auto"``: ``"single_device"`` for one process, ``"ddp"`` for more.
        processes: how many processes will run.

    Raises:
        ConfigError: the name is unknown or the value is neither.
    """
    if strategy == "auto":
        strategy = "single_device" if processes == 1 else "ddp"
    if isinstance(strategy, str):
        known = {**STRATEGIES, **ALIASES}
        if strategy not in known:
            near = difflib.get_close_matches(strategy, known, n=1)
            raise ConfigError(
                f"`strategy` must be a config or one of {', '.join(STRATEGIES)}, but is {strategy!r}."
                + (f" Did you mean {near[0]!r}?" if near else f" Also accepted: {', '.join(ALIASES)}.")
            )
        return known[strategy]()
    if isinstance(strategy, type) or not isinstance(strategy, StrategyConfig):
        raise ConfigError(
            f"`strategy` must be a name or a config such as FSDPStrategy(), but is {strategy!r}."
            f" Names: {', '.join(STRATEGIES)}."
        )
    return strategy

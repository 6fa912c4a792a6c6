"""The one interface Fabric talks to, and the protocol of what users write to get it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fabriclite.birth.plan import InitPlan
from fabriclite.layout import Layout
from fabriclite.precision import Precision, PrecisionName
from fabriclite.spread import Spread
from fabriclite.world import World

if TYPE_CHECKING:
    from fabriclite.birth.births import Births
    from fabriclite.birth.verify import Parts
    from fabriclite.optim_state import OptimizerLayout

StartMethod = Literal["auto", "popen", "spawn", "fork", "forkserver"]
Finish = Callable[[Any], Any]
"""Receives what a user's method returned and gives back what its caller gets."""


class Strategy(ABC):
    """Owns how a model is born, sharded, stepped and saved in one ``World`` at one ``Precision``.

    Every subclass is a frozen dataclass and final: it implements all abstract methods and is not subclassed. An
    *engine* is whatever ``setup`` returned for a module: the module itself, or a library's wrapper around it.
    """

    sharded: ClassVar[bool]
    """Whether ranks hold different parts of a parameter."""

    joint_setup: ClassVar[bool]
    """Whether ``setup`` needs the optimizers together with the module."""

    world: World
    precision: Precision
    scaler: GradScaler

    # -- birth: pure -------------------------------------------------------
    @abstractmethod
    def plan_init(self, empty_init: bool | None) -> InitPlan:
        """What ``init_module(empty_init)`` will do."""

    # -- settle ------------------------------------------------------------
    @abstractmethod
    def home(self, move_to_device: bool) -> torch.device | None:
        """Where a module goes before it is spread; ``None`` leaves it where it is."""

    @abstractmethod
    def setup(
        self, module: nn.Module, births: "Births", optimizers: Sequence[Optimizer]
    ) -> tuple[nn.Module, list[Optimizer]]:
        """Spread ``module`` over the world in place, and let ``births`` fill what has no memory.

        Every rank must call this.

        Returns:
            The engine, and the optimizers to step with, in the order given. ``Fabric`` rewires their parameters.
        """

    @abstractmethod
    def user_module(self, engine: nn.Module) -> nn.Module:
        """The user's own module inside an engine."""

    @abstractmethod
    def local_parts(self, engine: nn.Module) -> "Parts":
        """This rank's part of every parameter and buffer."""

    @abstractmethod
    def hand_out(self, engine: nn.Module) -> None:
        """Called before parameters or submodules reach the user: bring them into the form an optimizer may hold."""

    @abstractmethod
    def spread(self, engine: nn.Module) -> Spread:
        """How ``engine`` lies over the world. It looks at the engine, and changes nothing."""

    # -- step --------------------------------------------------------------
    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward computes."""

    @abstractmethod
    def forward(self, engine: nn.Module) -> Callable[..., Any]:
        """The function that runs one forward of ``engine``."""

    @abstractmethod
    def region(self, engine: nn.Module, through_root: bool) -> AbstractContextManager[Finish]:
        """Around the part of a method, other than ``forward``, that computes with the model.

        ``through_root``: the method computes by calling the root module, whose own hooks run then.
        """

    @abstractmethod
    def backward(self, engine: nn.Module | None, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate ``loss``. ``engine`` is the one it came from where the user said so."""

    @abstractmethod
    def no_sync(self, engine: nn.Module) -> AbstractContextManager[None]:
        """Within it, ``backward`` need not make gradients agree between ranks."""

    @abstractmethod
    def clip_grad_norm(
        self, engine: nn.Module, optimizer: Optimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients of ``optimizer`` to at most ``max_norm``. Every rank must call this.

        Returns:
            The norm before scaling, of shape ``()``, equal on all ranks.
        """

    @abstractmethod
    def clip_grad_value(self, engine: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]``."""

    # -- state -------------------------------------------------------------
    @property
    @abstractmethod
    def sharded_checkpoint(self) -> bool:
        """Whether ``save`` writes a folder of shards (else one file by rank 0)."""

    @abstractmethod
    def state_dict(self, engine: nn.Module) -> dict[str, Any]:
        """The module's state under its own names: live tensors, sharded ones as ``DTensor`` or ``Stretch``."""

    @abstractmethod
    def layout(self, engine: nn.Module) -> dict[str, Any]:
        """The same names with tensors, or stand-ins, of full shape."""

    @abstractmethod
    def load_state_dict(self, engine: nn.Module, state: Mapping[str, Any]) -> None:
        """Copy this rank's part of full (or equally sharded) tensors, or of those in a file, into the module.

        ``state`` was checked against :meth:`layout`. Every rank must call this.
        """

    @abstractmethod
    def optimizer_state(self, engine: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """State by parameter *name*, so that it fits any strategy: ``{"state": {name: {}}, "param_groups": []}``."""

    @abstractmethod
    def optimizer_layout(self, engine: nn.Module, optimizer: Optimizer) -> "OptimizerLayout":
        """What a saved state is checked against."""

    @abstractmethod
    def load_optimizer_state(self, engine: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`optimizer_state` gave, of this strategy or another, and
        :func:`~fabriclite.optim_state.checked` returned. Every rank must call this."""

    # -- data --------------------------------------------------------------
    @abstractmethod
    def sampler_shard(self) -> tuple[int, int]:
        """``(replicas, index)``: into how many parts data is split, and which one this rank reads."""


@runtime_checkable
class StrategyConfig(Protocol):
    """What a user writes down. Frozen; holds no process, device or tensor."""

    @property
    def precisions(self) -> frozenset[PrecisionName]: ...

    @property
    def distributed(self) -> bool:
        """Whether it needs a process group (also in a world of one)."""

    @property
    def start_method(self) -> StartMethod: ...

    @property
    def process_group_backend(self) -> str | None:
        """``None``: chosen by device."""

    @property
    def timeout(self) -> timedelta: ...

    def check_world(self, size: int) -> None:
        """Raise ``ConfigError`` if it cannot run on ``size`` processes."""

    def layout(self, size: int, precision: Precision) -> Layout:
        """How a model lies on ``size`` processes: a pure value, no process is needed."""

    def split(self, module: nn.Module, size: int) -> nn.Module:
        """``module``, its matrix products split over ``size`` ranks where the strategy does that. For planning: needs
        a process group of ``size`` ranks, and gives no memory or values."""

    def build(self, *, world: World, precision: Precision) -> Strategy: ...

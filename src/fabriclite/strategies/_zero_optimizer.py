"""What a script steps under DeepSpeed."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from fabriclite.errors import ConfigError

StepHook = Callable[[Any, Any, Any], Any]
"""``hook(optimizer, args, kwargs)``, as torch calls it."""


class EngineOptimizer(Optimizer):
    """Steps through a DeepSpeed engine. Shares groups and state with the optimizer it was made from, so that learning
    rates can be set and scheduled on either.

    Args:
        engine: a ``DeepSpeedEngine``.
        base: the user's optimizer inside it.
        unstepped: see :class:`DeepSpeed`.
    """

    def __init__(self, engine: Any, base: Optimizer, unstepped: "WeakSet[nn.Module]") -> None:
        super().__init__([torch.zeros(0)], dict(base.defaults))
        self.engine = engine
        self.base = base
        self.unstepped = unstepped
        self._before: OrderedDict[int, StepHook] = OrderedDict()
        self._after: OrderedDict[int, StepHook] = OrderedDict()
        self._stepped = False
        me = weakref.ref(self)  # the engine holds ``base``, and this the engine

        def begin(base: Optimizer, args: Any, kwargs: Any) -> None:
            if (owner := me()) is not None:
                owner._begin()

        base.register_step_pre_hook(begin)
        self.param_groups = base.param_groups
        self.state = base.state

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ConfigError("`closure` must be None with DeepSpeedStrategy, but one was given. Call backward first.")
        self._stepped = False
        self.engine.step()
        self.unstepped.discard(self.engine)
        if self._stepped:
            for hook in list(self._after.values()):
                hook(self, (self,), {})

    def _begin(self) -> None:
        """The engine steps the user's optimizer, once for each partition; after an overflow it does not."""
        if not self._stepped:
            self._stepped = True
            for hook in list(self._before.values()):
                hook(self, (self,), {})

    @override
    def register_step_pre_hook(self, hook: StepHook) -> RemovableHandle:
        """Call ``hook`` before each step that is not skipped, as ``GradScaler`` has it elsewhere."""
        return _registered(self._before, hook)

    @override
    def register_step_post_hook(self, hook: StepHook) -> RemovableHandle:
        """Call ``hook`` after each step that was not skipped."""
        return _registered(self._after, hook)

    @override
    def state_dict(self) -> dict[str, Any]:
        raise ConfigError(
            "The state of an optimizer under DeepSpeedStrategy must be saved with its engine, but `state_dict` was"
            " called. Use fabric.save(path, {'optimizer': optimizer})."
        )

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        raise ConfigError(
            "The state of an optimizer under DeepSpeedStrategy must be loaded with its engine, but"
            " `load_state_dict` was called. Use fabric.load(path, {'optimizer': optimizer})."
        )

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.optimizer.zero_grad()
        self.unstepped.discard(self.engine)


def _registered(hooks: "OrderedDict[int, StepHook]", hook: StepHook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle

"""Whom a ``Fabric`` tells of what happens: the objects passed as ``callbacks=``, and its own monitor.

A callback is any object. At each of the moments below its method of that name is called, if it has one, with keyword
arguments; what it raises ends the run like any other error.

=============================  =====================================================================================
``on_after_setup``             ``fabric, module``: a module was set up
``on_before_batch``            ``loader``: the script asks a loader for a batch, also where none is left
``on_after_batch``             ``loader, batch``: it gets it
``on_before_forward``          ``module, args, kwargs``: what ``setup`` returned is called; not told of what a method of
                               it, such as ``generate()``, calls inside
``on_after_forward``           ``module, output``
``on_before_backward``         ``loss``
``on_after_backward``          ``loss``
``on_before_clip_gradients``   ``module, optimizer``
``on_after_clip_gradients``    ``module, optimizer, norm``: ``norm`` is that before clipping, ``None`` if by value
``on_before_optimizer_step``   ``strategy, optimizer``: not told where a loss scaler skips the step
``on_after_optimizer_step``    ``strategy, optimizer``
``on_after_save``              ``path, asynchronous``: written, or handed over to be written beside the training
``on_after_load``              ``path``
=============================  =====================================================================================

Every rank tells its own callbacks. Others of your choice are called by ``fabric.call(name, ...)``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch.optim import Optimizer

from fabriclite.errors import ConfigError

HOOKS: Final = (
    "on_after_setup",
    "on_before_batch",
    "on_after_batch",
    "on_before_forward",
    "on_after_forward",
    "on_before_backward",
    "on_after_backward",
    "on_before_clip_gradients",
    "on_after_clip_gradients",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_after_save",
    "on_after_load",
)


class Callbacks:
    """The callbacks of one ``Fabric``, in the order in which they are told."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = list(items)

    def add(self, callback: Any) -> None:
        """Tell ``callback`` too, after the others."""
        self._items = [*self._items, callback]  # a new list: who is being told now stays as it is

    def remove(self, callback: Any) -> None:
        """Tell ``callback`` no longer."""
        self._items = [item for item in self._items if item is not callback]

    def call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Run the method ``hook`` of every callback that has it.

        Raises:
            ConfigError: a callback's attribute of that name is no method.
        """
        for callback in self._items:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            if not callable(method):
                raise ConfigError(f"{type(callback).__name__}.{hook} must be a method to be called, but is {method!r}.")
            try:
                method(*args, **kwargs)
            except Exception as error:
                error.add_note(f"Raised by the callback {type(callback).__name__}.{hook}.")
                raise

    def __reduce__(self) -> Any:
        """Copies and pickles of what is told of, a loader say, tell nobody: callbacks belong to one ``Fabric``."""
        return Callbacks, ()

    def holds(self, kind: type) -> bool:
        """Whether one of them is a ``kind``."""
        return any(isinstance(item, kind) for item in self._items)

    def around_forward(self, forward: Callable[..., Any], module: Callable[[], Any]) -> Callable[..., Any]:
        """``forward``, told of before and after. ``module``: a weak reference to what it is the forward of."""

        def told(*args: Any, **kwargs: Any) -> Any:
            if not self._items:
                return forward(*args, **kwargs)
            self.call("on_before_forward", module=module(), args=args, kwargs=kwargs)
            output = forward(*args, **kwargs)
            self.call("on_after_forward", module=module(), output=output)
            return output

        return told

    def listen_to(self, optimizer: Optimizer, strategy: Any) -> None:
        """Tell of the steps of ``optimizer``; ``strategy`` is what the script knows as ``fabric.strategy``."""

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.call("on_before_optimizer_step", strategy=strategy, optimizer=optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.call("on_after_optimizer_step", strategy=strategy, optimizer=optimizer)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

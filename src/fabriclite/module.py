"""What ``fabric.setup`` gives back: the user's own module, seen through a thin pane.

The pane is no ``nn.Module`` around the module; it *stands for* it. Attributes, methods, ``isinstance``, ``len``,
state-dict keys, pickling and copying are those of the user's module. It acts in three places only: calling it runs the
strategy's forward; a method of the user's class that computes runs with the strategy's hooks; parameters that are
handed out are the ones an optimizer may hold.
"""

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fabriclite.callbacks import Callbacks
from fabriclite.errors import ConfigError
from fabriclite.strategy import Finish, Strategy
from fabriclite.stretch import Stretch

_SLOTS: Final = ("_fl_module", "_fl_engine", "_fl_strategy", "_fl_forward", "_fl_marked")
_TORCH: Final = frozenset(dir(nn.Module))


class FabricModule:
    """The user's module after ``setup``. Made by ``Fabric``, not by users.

    Args:
        engine: what the strategy made of the module.
        strategy: the running strategy.
        callbacks: who is told of its calls.
    """

    __slots__ = (*_SLOTS, "__weakref__")

    _fl_module: nn.Module
    _fl_engine: nn.Module
    _fl_strategy: Strategy
    _fl_forward: Callable[..., Any]
    _fl_marked: set[str]

    def __init__(self, engine: nn.Module, strategy: Strategy, callbacks: Callbacks) -> None:
        module = strategy.user_module(engine)
        forward = callbacks.around_forward(strategy.forward(engine), weakref.ref(self))
        values = (module, engine, strategy, forward, set[str]())
        for name, value in zip(_SLOTS, values, strict=True):
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]  # what stands for an object answers isinstance as it would
    def __class__(self) -> type:
        return type(self._fl_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fl_forward(*args, **kwargs)

    # -- attributes ----------------------------------------------------------
    def __getattr__(self, name: str) -> Any:
        if name == "forward":
            return functools.wraps(self._fl_module.forward)(lambda *a, **k: self._fl_forward(*a, **k))
        own = _OWN.get(name)
        if own is not None and (name in _TORCH or not hasattr(self._fl_module, name)):
            return own.__get__(self)
        value = getattr(self._fl_module, name)
        if isinstance(value, nn.Module | Tensor):
            self._fl_strategy.hand_out(self._fl_engine)
            return getattr(self._fl_module, name)
        if getattr(value, "__self__", None) is not self._fl_module:
            return value
        return self._fl_torch_method(value) if name in _TORCH else self._fl_user_method(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fl_module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fl_module, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._fl_module), *_OWN})

    def __repr__(self) -> str:
        return repr(self._fl_module)

    # -- containers ----------------------------------------------------------
    def __len__(self) -> int:
        return len(self._fl_module)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._fl_module)  # type: ignore[call-overload, no-any-return]

    def __getitem__(self, key: Any) -> Any:
        self._fl_strategy.hand_out(self._fl_engine)
        return self._fl_module[key]  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._fl_module.__setitem__(key, value)  # type: ignore[operator]

    def __delitem__(self, key: Any) -> None:
        self._fl_module.__delitem__(key)  # type: ignore[operator]

    def __contains__(self, item: Any) -> bool:
        return item in self._fl_module  # type: ignore[operator]

    def __bool__(self) -> bool:
        return True

    # -- copies ----------------------------------------------------------------
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A plain copy of the user's module, not set up (FSDP refuses: torch cannot copy what it sharded)."""
        return copy.deepcopy(self._fl_module, memo)

    def __copy__(self) -> nn.Module:
        return copy.copy(self._fl_module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the user's module: what is loaded is a plain module, to be set up again."""
        return self._fl_module.__reduce_ex__(protocol)

    # -- methods -----------------------------------------------------------------
    def _fl_torch_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``nn.Module``'s own: on sharded parameters, and ``train()`` or ``to()`` give back the pane."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._fl_strategy.hand_out(self._fl_engine)
            result = method(*args, **kwargs)
            return self if result is self._fl_module else result

        return call

    def _fl_user_method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _Region(self, at_once=name in self._fl_marked) as region:
                try:
                    return region.finish(method(*args, **kwargs))
                except RuntimeError as error:
                    if "mixed torch.Tensor and DTensor" in str(error):
                        error.add_note(
                            f"`{name}` uses a sharded parameter before it calls a submodule. Say so after setup:"
                            f" model.mark_forward_method({name!r})."
                        )
                    raise

        return call


class _Region:
    """A call of a user's method. The strategy's hooks start when the method first calls the model, if it ever does.

    So ``generate`` computes as forward does, while ``configure_optimizers`` sees the parameters as they rest, and a
    method that only counts parameters starts no collective.
    """

    def __init__(self, pane: FabricModule, at_once: bool) -> None:
        self._pane = pane
        self._at_once = at_once
        self._stack = ExitStack()
        self._finish: Finish | None = None  # None: the method has not called the model

    def __enter__(self) -> "_Region":
        self._pane._fl_strategy.hand_out(self._pane._fl_engine)
        self._stack.enter_context(self._pane._fl_strategy.autocast())
        if self._at_once:
            self._start(through_root=False)
        else:
            # A global hook for the time of one call, instead of one on every submodule. The first call removes it.
            hook: Any = self._on_forward
            if "torch._dynamo" in sys.modules:  # a compiled forward would trace into the hook; importing it costs 1 s
                hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
            self._handle = register_module_forward_pre_hook(hook)
            self._stack.callback(self._handle.remove)
        return self

    def __exit__(self, *exc: Any) -> bool | None:
        return self._stack.__exit__(*exc)

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if self._finish is None and any(module is sub for sub in self._pane._fl_module.modules()):
            self._handle.remove()
            self._start(through_root=module is self._pane._fl_module)

    def _start(self, through_root: bool) -> None:
        strategy, engine = self._pane._fl_strategy, self._pane._fl_engine
        self._finish = self._stack.enter_context(strategy.region(engine, through_root))

    def finish(self, output: Any) -> Any:
        return output if self._finish is None else self._finish(output)


def _state_dict(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
    """The module's state under its own names; sharded values come as ``DTensor``. Every rank must call this."""
    if args or kwargs:
        self._fl_strategy.hand_out(self._fl_engine)
        return self._fl_module.state_dict(*args, **kwargs)
    state = self._fl_strategy.state_dict(self._fl_engine)
    return {name: value.gather() if isinstance(value, Stretch) else value for name, value in state.items()}


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict`` found on one side only, as torch returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _load_state_dict(
    self: FabricModule, state_dict: Any, strict: bool = True, assign: bool = False
) -> IncompatibleKeys:
    """Copy full or sharded tensors into the module, cutting where it is sharded. Every rank must call this."""
    if assign:
        raise ConfigError(
            "`assign` must be False after setup, but is True: an optimizer would keep the tensors it replaces."
            " Load without it."
        )
    if not isinstance(state_dict, Mapping):
        raise ConfigError(
            f"`state_dict` must map names to tensors, but is {type(state_dict).__name__}."
            " For a file, use fabric.load or fabric.load_raw."
        )
    from fabriclite import module_state  # its DTensor costs 0.6 s to import

    own = self._fl_strategy.layout(self._fl_engine)
    module_state.check_fits(own, state_dict, strict)
    self._fl_strategy.load_state_dict(self._fl_engine, state_dict)
    return IncompatibleKeys([k for k in own if k not in state_dict], [k for k in state_dict if k not in own])


def _mark_forward_method(self: FabricModule, method: str | Callable[..., Any]) -> None:
    """Gather everything for the whole of a method, also for parameters it uses before it calls any submodule."""
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    if not callable(getattr(self._fl_module, name, None)):
        raise ConfigError(f"`method` must name a method of {type(self._fl_module).__name__}, but is {name!r}.")
    self._fl_marked.add(name)


class _ModuleProperty:
    def __get__(self, instance: FabricModule) -> nn.Module:
        return instance._fl_module


_OWN: Final[dict[str, Any]] = {
    "state_dict": _state_dict,
    "load_state_dict": _load_state_dict,
    "mark_forward_method": _mark_forward_method,
    "module": _ModuleProperty(),
}
"""What the pane answers itself; the last two only where the user's module has no such attribute."""


def unwrap(module: Any) -> nn.Module:
    """The user's own module behind a pane; a plain module is returned as it is."""
    return module._fl_module if type(module) is FabricModule else module

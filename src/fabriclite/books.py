"""Who was set up: modules, their optimizers, and which parameters replaced which."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from fabriclite import optim
from fabriclite.clock import Clock
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.module import FabricModule, unwrap
from fabriclite.strategy import Strategy

if TYPE_CHECKING:
    from fabriclite.birth.verify import Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A module that was set up, and still lives.

    Attributes:
        module: the user's own.
        engine: what the strategy made of it.
        promise: what it was.
        clock: how long setting it up took.
        optimizers: those of its parameters, in no order.
    """

    module: nn.Module
    engine: nn.Module
    promise: "Promise"
    clock: Clock
    optimizers: tuple[Optimizer, ...]


class Books:
    """The modules and optimizers of one ``Fabric``. Holds none of them alive.

    Attributes:
        loads: what was read from files into them, a line each.
    """

    def __init__(self) -> None:
        # A pane holds its module: held here by a strong reference it would keep both alive.
        self._panes: WeakKeyDictionary[nn.Module, weakref.ref[FabricModule]] = WeakKeyDictionary()
        self._bindings: WeakKeyDictionary[nn.Module, Mapping[int, optim.Binding]] = WeakKeyDictionary()
        self._promises: WeakKeyDictionary[nn.Module, Promise] = WeakKeyDictionary()
        self._owners: WeakKeyDictionary[Optimizer, nn.Module] = WeakKeyDictionary()
        self._clocks: WeakKeyDictionary[nn.Module, Clock] = WeakKeyDictionary()
        self.loads: list[str] = []

    # -- checks ------------------------------------------------------------------
    def check_module(self, module: Any) -> None:
        """Raise unless ``module`` is one, and new."""
        if not isinstance(module, nn.Module):
            raise ConfigError(f"`module` must be a torch.nn.Module, but is {type(module).__name__}.")
        inner = unwrap(module)
        name = type(inner).__name__
        if self.knows_module(module):
            raise SetupOrderError(
                f"A module must be set up once, but this {name} was already. Use what setup returned."
            )
        if any(sub in self._panes for sub in inner.modules()):
            part = next(sub for sub in inner.modules() if sub in self._panes)
            raise SetupOrderError(
                f"A module must be set up as a whole or in parts, but this {name} holds a {type(part).__name__}"
                " that was set up before. Set up the whole alone, or each part alone."
            )
        if inner is not module:
            raise SetupOrderError(
                f"A module must be set up by one Fabric, but this {name} was by another. Keep one Fabric."
            )

    def check_optimizers(self, optimizers: Sequence[Any], module: nn.Module | None = None) -> None:
        """Raise unless each could be set up now, and none is there twice."""
        for pane in [ref() for ref in self._panes.values()]:
            if (
                pane is not None
            ):  # parameters that a forward left gathered are then nobody's, and not taken for the real
                pane._fl_strategy.hand_out(pane._fl_engine)
        for place, optimizer in enumerate(optimizers):
            self.check_optimizer(optimizer, module)
            if any(optimizer is other for other in optimizers[:place]):
                name = type(optimizer).__name__
                raise SetupOrderError(
                    f"An optimizer must be set up once, but this {name} was passed twice. Pass it once."
                )

    def check_optimizer(self, optimizer: Any, module: nn.Module | None = None) -> None:
        """Raise unless ``optimizer`` is one, new, and steps only parameters of ``module`` or of modules set up."""
        if self.knows_optimizer(optimizer):
            name = type(optimizer).__name__
            raise SetupOrderError(f"An optimizer must be set up once, but this {name} was already. Use it as it is.")
        optim.check_fresh(optimizer)
        for known, bindings in self._bindings.items():
            optim.rewire(optimizer, bindings, known)
        optim.check_steps(optimizer, self._spread() | {id(p) for p in ([] if module is None else module.parameters())})

    def _spread(self) -> set[int]:
        """Ids of the parameters that were there at setup, or came instead; not of any that were added after."""
        found: set[int] = set()
        for module, bindings in self._bindings.items():
            names = {binding.name for binding in bindings.values()}
            found |= {id(p) for n, p in module.named_parameters(remove_duplicate=False) if n in names}
        return found

    # -- entries -----------------------------------------------------------------
    def enter_module(
        self, pane: FabricModule, bindings: Mapping[int, optim.Binding], promise: "Promise", clock: Clock
    ) -> None:
        module = unwrap(pane)
        self._panes[module] = weakref.ref(pane)
        self._bindings[module] = bindings
        self._promises[module] = promise
        self._clocks[module] = clock

    def enter_optimizer(self, optimizer: Optimizer, strategy: Strategy, owner: nn.Module | None = None) -> None:
        """Note whose optimizer it is, make it step current parameters, and scale its steps if the precision needs it.

        ``owner``: the module it came with; ``None`` looks it up by the parameters.
        """
        for module, bindings in self._bindings.items():
            optim.rewire(optimizer, bindings, module)
        self._owners[optimizer] = self._owner(optimizer) if owner is None else unwrap(owner)
        optim.scale_steps(optimizer, strategy.scaler)

    def _owner(self, optimizer: Optimizer) -> nn.Module:
        first = optim.params_of(optimizer)[0]
        return next(module for module in self._panes if any(first is p for p in module.parameters()))

    # -- questions ---------------------------------------------------------------
    def modules(self) -> list[nn.Module]:
        """The users' own modules that are set up and still there, in the order of setup."""
        return [module for module, pane in self._panes.items() if pane() is not None]

    def knows_module(self, module: Any) -> bool:
        return isinstance(module, nn.Module) and unwrap(module) in self._panes

    def knows_optimizer(self, optimizer: Any) -> bool:
        return isinstance(optimizer, Optimizer) and optimizer in self._owners

    def engine(self, module: Any) -> nn.Module:
        """The engine of a module that was set up.

        Raises:
            SetupOrderError: it was not.
        """
        if not self.knows_module(module):
            raise SetupOrderError(
                f"`module` must be one that fabric.setup returned, but is a {type(module).__name__} that was not."
                " Write model = fabric.setup(model) first."
            )
        return self._engine_behind(unwrap(module))

    def promise(self, module: nn.Module) -> "Promise":
        """What a module was when it was set up."""
        return self._promises[unwrap(module)]

    def entries(self) -> list[Entry]:
        """The modules that still live, in the order in which they were set up."""
        return [
            Entry(
                module=module,
                engine=pane._fl_engine,
                promise=self._promises[module],
                clock=self._clocks[module],
                optimizers=tuple(optimizer for optimizer, owner in self._owners.items() if owner is module),
            )
            for module, ref in self._panes.items()
            if (pane := ref()) is not None
        ]

    def engine_of(self, optimizer: Any) -> nn.Module:
        """The engine whose parameters ``optimizer`` steps.

        Raises:
            SetupOrderError: it was not set up.
        """
        if not self.knows_optimizer(optimizer):
            raise SetupOrderError(
                f"`optimizer` must be one that was set up, but is a {type(optimizer).__name__} that was not."
                " Pass it to fabric.setup or fabric.setup_optimizers first."
            )
        return self._engine_behind(self._owners[optimizer])

    def all_of(self, optimizer: Optimizer, strategy: Strategy) -> nn.Module:
        """The engine whose parameters ``optimizer`` steps; of several modules a list of them, in the order of setup.

        Raises:
            SetupOrderError: it was not set up.
        """
        own = self.engine_of(optimizer)
        stepped = {id(p) for p in optim.params_of(optimizer)}
        owners = [module for module in self._panes if any(id(p) in stepped for p in module.parameters())]
        if len(owners) < 2:
            return own
        return nn.ModuleList(strategy.user_module(self._engine_behind(module)) for module in owners)

    def _engine_behind(self, module: nn.Module) -> nn.Module:
        pane = self._panes[module]()
        if pane is None:
            raise SetupOrderError(
                f"What fabric.setup returned for this {type(module).__name__} must be kept, but is gone."
                " Write model = fabric.setup(model)."
            )
        return pane._fl_engine

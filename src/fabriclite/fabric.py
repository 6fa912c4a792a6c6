"""The front door. Checks the order of calls, then delegates. It names no strategy and no collective of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabriclite import _torch, arguments, checks, collectives, optim, preemption, seed
from fabriclite import data as loaders
from fabriclite.birth import session
from fabriclite.birth.plan import enter
from fabriclite.books import Books
from fabriclite.callbacks import Callbacks
from fabriclite.checkpoint.formats import Format, Safetensors
from fabriclite.checkpoint.report import LoadReport
from fabriclite.checkpoint.saving import SaveHandle, Saver, wait_for_all
from fabriclite.clock import Clock
from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.launch import process_group, rerun, signals, spawn
from fabriclite.launch.choose import Situation, choose
from fabriclite.launch.determinism import Deterministic, make_deterministic
from fabriclite.launch.environments.described import Described
from fabriclite.loggers.handing import Loggers, closed_after
from fabriclite.loggers.reduction import Reduce, over_ranks
from fabriclite.module import FabricModule
from fabriclite.precision import Precision, PrecisionInput
from fabriclite.registry import resolve
from fabriclite.strategy import Strategy, StrategyConfig
from fabriclite.world import World

if TYPE_CHECKING:
    from fabriclite.checkpoint.parts import Part
    from fabriclite.planning.hardware import Hardware
    from fabriclite.planning.plan import Plan
    from fabriclite.watching.monitor import Monitor
    from fabriclite.watching.options import Asked
    from fabriclite.watching.report import Report

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Fabric:
    """Runs one plain PyTorch script on one device or many.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` (or ``"gpu"``) or ``"mps"``.
        strategy: ``"auto"``, a name (``"single_device"``, ``"ddp"``, ``"fsdp"``, ``"tensor_parallel"``,
            ``"deepspeed"``) or a config such as ``FSDPStrategy(cpu_offload=True)``.
        devices: ``"auto"``, how many on each machine, ``-1`` for all, or which (``[0, 3]``).
        num_nodes: number of machines; ``"auto"`` as many as were launched on, one without a launcher.
        precision: ``"32-true"`` (also ``None``), ``"bf16-true"``, ``"16-true"``, ``"bf16-mixed"``, ``"16-mixed"``,
            ``"64-true"``.
        plugins: a :class:`~fabriclite.Precision` instead of ``precision``; one of :mod:`fabriclite.environments` that
            says which launcher started this process; a list of both; or ``None``.
        callbacks: objects whose methods :meth:`call` runs.
        loggers: objects with ``log_metrics(metrics, step)``, such as those of :mod:`fabriclite.loggers`.
        deterministic: ``True``: an operation that could give other bits another time is an error, ``"warn"``: a
            warning. It holds for the whole process, also after; the processes that :meth:`launch` starts get it too.

    Raises:
        ConfigError: an argument has no meaning, or two contradict each other.
        WorldError: the environment is incomplete, or does not fit ``devices`` and ``num_nodes``.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | StrategyConfig = "auto",
        devices: int | str | Sequence[int] = "auto",
        num_nodes: int | Literal["auto"] = "auto",
        precision: PrecisionInput | None = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
        deterministic: Deterministic = False,
    ) -> None:
        self._arguments = dict(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
            callbacks=callbacks,
            loggers=loggers,
            deterministic=deterministic,
        )
        make_deterministic(deterministic)
        arguments.check_loggers(arguments.as_list(loggers))
        self._callbacks = Callbacks(arguments.as_list(callbacks))
        self._loggers = arguments.as_list(loggers)
        self._handing = Loggers(self._loggers)
        self._environment = arguments.this_environment(plugins)
        process_group.expect(self._environment)
        self._precision = arguments.wished_precision(precision, plugins)
        self._world = arguments.this_world(accelerator, devices, num_nodes, self._environment)
        self._config = resolve(arguments.wished_strategy(strategy, self._world.size), self._world.size)
        self._config.check_world(self._world.size)
        arguments.check_precision(self._precision, self._config)
        self._num_nodes = self._world.size // self._world.local_size
        self._books = Books()
        self._clock = Clock()
        self._saver = Saver()
        # None: other processes are still to be started by `launch`.
        self._strategy: Strategy | None = None
        if self._environment.launched or self._world.size == 1:
            self._strategy = self._start()

    # -- who am I --------------------------------------------------------------
    @property
    def strategy(self) -> StrategyConfig:
        """The strategy as its config, such as ``FSDPStrategy(...)``."""
        return self._config

    @property
    def precision(self) -> Precision:
        return self._precision

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._world.device

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._world.rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its machine."""
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        return self._world.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world.size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first process of all."""
        return self._world.rank == 0

    @property
    def environment(self) -> Described:
        """How its launcher described this process; ``environment.why`` says in a line which launcher, and why that."""
        return self._environment

    @property
    def loggers(self) -> list[Any]:
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            ConfigError: there is none.
        """
        if not self._loggers:
            raise ConfigError("`loggers` must hold a logger to ask for one, but is empty. Pass Fabric(loggers=...).")
        return self._loggers[0]

    # -- launching -------------------------------------------------------------
    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Start the other processes if no launcher did; then run ``function(fabric, *args, **kwargs)`` in each.

        Under torchrun, or with one device, nothing is started. Otherwise this script is run again for the other ranks,
        or, where there is no script (a notebook), ``function`` runs in forked processes. ``start_method`` of the
        strategy says so explicitly.

        Returns:
            What ``function`` returned: on every rank, or rank 0's where it ran in new processes.

        Raises:
            ConfigError: the start method needs a script, or a function, and there is none.
            LaunchError: a new process failed.
        """
        arguments.check_function(function)
        situation = Situation(
            launched=self._strategy is not None,
            processes=self._world.local_size,
            nodes=self._num_nodes,
            script=arguments.runs_a_script(),
            function=function is not None,
        )
        way = choose(situation, self._config.start_method)
        if way == "rerun":
            with self._clock.phase("launch"):
                rerun.rerun_script(self._world.size, self._config.timeout)
            self._environment = arguments.this_environment(self._arguments["plugins"])
            self._strategy = self._start()
        elif way != "nothing":
            assert function is not None  # `choose` raised otherwise
            work = (self._arguments, seed.carried(), function, args, kwargs)
            size, timeout = self._world.size, self._config.timeout
            return spawn.run_function(_run_in_worker, work, {}, size, way, timeout)  # type: ignore[no-any-return]
        return None if function is None else function(self, *args, **kwargs)

    def _start(self) -> Strategy:
        if self._config.distributed:
            with self._clock.phase("meeting"):
                process_group.join(
                    self._world,
                    self._environment,
                    self._config.process_group_backend,
                    self._config.timeout,
                    {"strategy": type(self._config).__name__, "precision": self._precision.name},
                )
        self._handing.start(self._world.rank)
        return self._config.build(world=self._world, precision=self._precision)

    @property
    def _running(self) -> Strategy:
        if self._strategy is None:
            raise SetupOrderError(
                f"`launch` must be called before the {self._world.size} processes can work together, but was not."
                " Call fabric.launch() right after Fabric(...), or start the script with torchrun."
            )
        return self._strategy

    # -- birth -----------------------------------------------------------------
    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Create modules in the run's precision, where the strategy wants them.

        Args:
            empty_init: ``None`` as cheaply as the strategy can; ``False`` real tensors at once; ``True`` for a model
                that will be loaded. In every case a tensor that is not loaded has the values its own code gives.

        Raises:
            ConfigError: ``empty_init`` is none of the three.
        """
        if empty_init not in (None, False, True):
            raise ConfigError(f"`empty_init` must be None, False or True, but is {empty_init!r}.")
        with self._clock.phase("init_module"), enter(self._running.plan_init(empty_init)):
            yield

    def materialize(self, module: M) -> M:
        """Give a module from ``init_module(empty_init=True)`` memory and values, whole, on this process alone.

        :meth:`setup` does this by itself, for this rank's part. This is for a module that is used without it. What has
        memory already is left as it is.

        Args:
            module: any module.

        Returns:
            The same object.

        Raises:
            MaterializeError: a parameter has no value.
        """
        from fabriclite.birth.settle import settled

        if not isinstance(module, nn.Module):
            raise ConfigError(f"`module` must be a torch.nn.Module, but is {type(module).__name__}.")
        with settled(module, None, None) as (module, births):
            births.fill()
        return module

    def init_tensor(self) -> AbstractContextManager[None]:
        """Create tensors on this process's device, in the run's precision."""
        return self.init_module(empty_init=False)

    def plan(
        self,
        model: nn.Module | Callable[[], Any],
        inputs: Any = None,
        *,
        optimizer: Any = None,
        loss: Callable[[Any], Tensor] | None = None,
        batch: int = 1,
        sequence: int | None = None,
        checkpointing: bool = False,
        hardware: "Hardware | None" = None,
    ) -> "Plan":
        """What ``model`` will cost one rank under this strategy, precision and world: :func:`fabriclite.plan`.

        Needs no launch, allocates no weights, and changes neither the model nor a random state.

        Args:
            model: a module that is not set up, also from :meth:`init_module`, or a function that makes one.
            inputs, optimizer, loss, batch, sequence, checkpointing, hardware: as there.

        Raises:
            ConfigError: an argument has no meaning, or the model cannot be planned.
            SetupOrderError: the model was set up already.
        """
        from fabriclite.planning.api import plan

        return plan(
            model,
            inputs,
            strategy=self._config,
            devices=self._world.size,
            per_node=self._world.local_size,
            precision=self._precision,
            optimizer=optimizer,
            loss=loss,
            batch=batch,
            sequence=sequence,
            checkpointing=checkpointing,
            hardware=hardware,
            device="cuda" if self.device.type == "cuda" else "cpu",
        )

    # -- settling --------------------------------------------------------------
    def setup(
        self, module: nn.Module, *optimizers: Optimizer, scheduler: Any = None, move_to_device: bool = True
    ) -> Any:
        """Spread a module, and optimizers made for it, over the processes. Every rank must call this.

        Args:
            module: the model; it is changed in place.
            optimizers: made from ``module.parameters()`` before; they step what replaced those.
            scheduler: a learning-rate scheduler of one of the optimizers; comes back as the last item.
            move_to_device: put the module on this process's device.

        Returns:
            The module alone, or ``(module, *optimizers)``, with ``scheduler`` last if one was given.

        Raises:
            SetupOrderError: ``launch`` is missing, something was set up already, or an optimizer holds state.
            ConfigError: an argument is of the wrong kind, or an optimizer steps other parameters.
            MaterializeError: a parameter has no value, or the model differs between ranks.
        """
        from fabriclite.birth.settle import settled
        from fabriclite.birth.verify import Promise

        strategy = self._running
        self._books.check_module(module)
        self._books.check_optimizers(optimizers, module)
        if strategy.joint_setup and not optimizers and any(p.requires_grad for p in module.parameters()):
            raise SetupOrderError(
                f"With {type(self._config).__name__} module and optimizer must be set up together, but `setup` got no"
                " optimizer. Write model, optimizer = fabric.setup(model, optimizer)."
            )
        arguments.check_scheduler(scheduler, optimizers)
        module = _torch.compile_in_place(module)
        bindings, clock, home = optim.bind(module), Clock(), strategy.home(move_to_device)
        with clock.phase("setup"), settled(module, home, strategy.precision, optimizers) as (module, births):
            checks.same_on_all(strategy.world, module)
            promise, born = Promise.of(module, births), bool(births)
            with clock.phase("spread"):
                engine, stepping = strategy.setup(module, births, optimizers)
            clock.add(births.clock.seconds)
            if strategy.sharded and born:
                with clock.phase("verify"):
                    checks.verify(strategy, engine, promise, at_birth=True)
            pane = FabricModule(engine, strategy, self._callbacks)
            self._books.enter_module(pane, bindings, promise, clock)
            for before, after in zip(optimizers, stepping, strict=True):
                self._books.enter_optimizer(after, strategy, module)
                self._callbacks.listen_to(after, self._config)
                if scheduler is not None and scheduler.optimizer is before:
                    scheduler.optimizer = after
        self._callbacks.call("on_after_setup", fabric=self, module=pane)
        result = [pane, *stepping] if scheduler is None else [pane, *stepping, scheduler]
        return tuple(result) if len(result) > 1 else pane

    def verify(self, module: nn.Module) -> None:
        """Check that a module that was set up holds what it should on every rank. Every rank must call this.

        Looked for: tensors without memory, memory that was never written, replicas that differ between ranks, shards
        of random values that are equal, ties that broke, dtypes that changed. :meth:`setup` does this by itself for
        what ``init_module`` recorded and the strategy sharded. It reads every tensor twice, and writes none.

        Args:
            module: as :meth:`setup` returned it.

        Raises:
            SetupOrderError: it was not set up.
            MaterializeError: something is wrong; every finding names the tensor and the cause.
        """
        engine = self._books.engine(module)
        self._running.hand_out(engine)
        checks.verify(self._running, engine, self._books.promise(module), at_birth=False)

    def setup_module(self, module: nn.Module, move_to_device: bool = True) -> Any:
        """Spread a module over the processes; make its optimizers after, and pass them to :meth:`setup_optimizers`."""
        return self.setup(module, move_to_device=move_to_device)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers of modules that were set up before ready to step. Every rank must call this.

        Returns:
            The optimizer, or a tuple of them.

        Raises:
            SetupOrderError: the strategy sets up module and optimizer together, or one holds state.
            ConfigError: one steps parameters of no module that was set up.
        """
        strategy = self._running
        if strategy.joint_setup:
            raise SetupOrderError(
                f"With {type(self._config).__name__} module and optimizer must be set up together, but"
                " `setup_optimizers` was called. Write model, optimizer = fabric.setup(model, optimizer)."
            )
        if not optimizers:
            raise ConfigError("`setup_optimizers` must get at least one optimizer, but got none.")
        self._books.check_optimizers(optimizers)
        for optimizer in optimizers:
            self._books.enter_optimizer(optimizer, strategy)
            self._callbacks.listen_to(optimizer, self._config)
        return optimizers if len(optimizers) > 1 else optimizers[0]

    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
    ) -> Any:
        """Let each data-parallel rank read its part of the data, on its device. Every rank must call this.

        Args:
            dataloaders: loaders; a sampler of yours is kept, and split.
            use_distributed_sampler: ``False`` leaves the reading to you.
            move_to_device: move batches to this process's device.

        Returns:
            The loader, or a list of them. ``loader.set_epoch(e)`` says which pass comes next. One that was saved with
            :meth:`save` goes on at the batch after the last one that was handed out.

        Raises:
            ConfigError: an argument is no ``DataLoader``, or its sampler cannot be split.
        """
        shard = self._running.sampler_shard()
        if not dataloaders:
            raise ConfigError("`setup_dataloaders` must get at least one DataLoader, but got none.")
        for loader in dataloaders:
            loaders.check_loader(loader)
        device = self.device if move_to_device else None
        parts = shard if use_distributed_sampler else None
        ready = [loaders.set_up(loader, self._world, parts, device, self._callbacks) for loader in dataloaders]
        return ready if len(ready) > 1 else ready[0]

    # -- training --------------------------------------------------------------
    def backward(self, tensor: Tensor, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Differentiate ``tensor``: ``tensor.backward(*args, **kwargs)`` as precision and strategy need it.

        Args:
            tensor: usually a loss of shape ``()``.
            args: for ``Tensor.backward``.
            model: the module it came from, where the strategy cannot tell (several under DeepSpeed).
            kwargs: for ``Tensor.backward``.

        Raises:
            ConfigError: ``tensor`` is none.
            SetupOrderError: ``model`` was not set up, or the strategy cannot tell where the loss came from.
        """
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"`tensor` must be a Tensor to differentiate, but is {type(tensor).__name__}."
                " Pass the loss itself, not loss.item() or a model's whole output."
            )
        session.tidy()
        engine = None if model is None else self._books.engine(model)
        self._callbacks.call("on_before_backward", loss=tensor)
        self._running.backward(engine, tensor, *args, **kwargs)
        self._callbacks.call("on_after_backward", loss=tensor)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients that ``optimizer`` steps, by value or by norm. Every rank must call this.

        Args:
            module: the module, as set up.
            optimizer: its optimizer, as set up.
            clip_val: clamp each element to ``[-clip_val, clip_val]``.
            max_norm: scale all together to a norm of at most this.
            norm_type: ``p`` of the norm, or ``inf``.
            error_if_nonfinite: raise if the norm is NaN or infinite.

        Returns:
            With ``max_norm``: the norm before, a plain tensor of shape ``()``, the same under every strategy.

        Raises:
            ConfigError: not exactly one of ``clip_val`` and ``max_norm``, or not above 0.
            SetupOrderError: module or optimizer was not set up.
            NonFiniteGradientError: see ``error_if_nonfinite``.
        """
        arguments.check_clipping(clip_val, max_norm, norm_type)
        engine = self._books.engine(module)
        self._books.engine_of(optimizer)
        self._callbacks.call("on_before_clip_gradients", module=module, optimizer=optimizer)
        norm = None
        if clip_val is not None:
            self._running.clip_grad_value(engine, optimizer, float(clip_val))
        else:
            assert max_norm is not None  # checked above
            largest, p = float(max_norm), float(norm_type)
            with checks.naming_gradients(self._running, engine):
                norm = self._running.clip_grad_norm(engine, optimizer, largest, p, error_if_nonfinite)
        self._callbacks.call("on_after_clip_gradients", module=module, optimizer=optimizer, norm=norm)
        return norm

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """Within it, ``backward`` need not make gradients agree between ranks: for all but the last of several
        accumulated batches. What was before is restored after.

        Args:
            module: the module, as set up.
            enabled: ``False`` makes it do nothing.
        """
        engine = self._books.engine(module)
        return self._running.no_sync(engine) if enabled else nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute as a module's forward does in this precision: for code outside of a module."""
        return self._running.autocast()

    # -- together --------------------------------------------------------------
    def all_gather(self, data: T, group: Any = None, sync_grads: bool = False) -> T:
        """Stack tensors (or numbers, or trees of them) of all ranks: shape ``(world_size, *shape)``, also for one."""
        return collectives.all_gather(self._ready_world, data, sync_grads, group)

    def all_reduce(self, data: T, group: Any = None, reduce_op: Any = "mean") -> T:
        """Reduce tensors (or numbers, or trees of them) over all ranks: mean, sum, max, min or product."""
        return collectives.all_reduce(self._ready_world, data, reduce_op, group)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Give every rank the object of rank ``src``."""
        return collectives.broadcast(self._ready_world, obj, src)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank has come here. ``name`` is for the reader of the script."""
        collectives.barrier(self._ready_world)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Run a block on rank 0 first (of each machine, with ``local``), then on the others: downloads, caches."""
        first = (self.local_rank if local else self.global_rank) == 0
        if not first:
            self.barrier()
        try:
            yield
        finally:
            if first:
                self.barrier()

    @property
    def _ready_world(self) -> World:
        return self._running.world

    # -- saving ----------------------------------------------------------------
    def save(
        self,
        path: str | Path,
        state: dict[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
        *,
        format: Format | Safetensors | None = None,
        keep_last: int | None = None,
        asynchronous: bool = False,
    ) -> SaveHandle | None:
        """Write a checkpoint of modules, optimizers, anything with ``state_dict``, and plain values.

        Every rank must call this. It is written beside, brought to the disk and looked at, and then takes its name; a
        process that is killed at any moment leaves the older checkpoint whole.

        Args:
            path: file or folder, local or with a protocol that fsspec knows.
            state: what to save, under names of your choice.
            filter: per name, ``fn(key, value) -> bool``: what of that entry's state to keep.
            format: ``"folder"`` (every rank writes its part), ``"file"`` (whole tensors, by rank 0) or
                ``"safetensors"`` (an export of one module for ``from_pretrained``; also ``Safetensors(...)``). ``None``
                is the strategy's own: a folder where it shards, else a file. Every strategy loads all of them.
            keep_last: of the checkpoints beside it whose names differ in numbers only, keep so many; ``latest`` beside
                them leads to this one.
            asynchronous: return once this rank's part is copied to host memory; the rest goes on beside the training.

        Returns:
            A handle whose ``wait()`` ends when the checkpoint is whole, if ``asynchronous``; else ``None``.

        Raises:
            ConfigError: ``state`` is no dictionary, a filter has no entry, or arguments contradict each other.
            CheckpointError: it, or the asynchronous one before it, cannot be written; raised on every rank.
        """
        from fabriclite.checkpoint import session  # torch.distributed.checkpoint costs 0.6 s to import

        parts = self._parts(state)
        order = session.ordered(path, filter, format, keep_last, asynchronous, parts)
        handle = session.save(self._running, self._saver, parts, order)
        self._callbacks.call("on_after_save", path=path, asynchronous=asynchronous)
        return handle

    def load(
        self, path: str | Path, state: dict[str, Any] | None = None, strict: bool = True, *, weights_only: bool = True
    ) -> dict[str, Any]:
        """Read a checkpoint, of any strategy, into the objects of ``state``. Every rank must call this.

        All is compared with its checksums, and with the objects, before anything in them changes.

        Args:
            path: what :meth:`save` wrote, also ``.../latest``; checkpoints of Lightning Fabric are read too.
            state: the same names with this run's objects. Plain values are replaced in it. ``None`` reads all.
            strict: names must be the same on both sides.
            weights_only: restore tensors and plain values only; ``False`` may run code from the file.

        Returns:
            What the checkpoint holds beyond ``state``, less what is sharded there.

        Raises:
            CheckpointError: it cannot be read, is damaged, or does not fit; all differing names are listed.
        """
        from fabriclite.checkpoint import loading

        self._saver.wait()
        parts = None if state is None else self._parts(state)
        with self._clock.phase("load"):
            rest = loading.load(self._running, path, parts, strict, weights_only)
        self._books.loads.append(f"load {path}: {', '.join(parts or ()) or 'returned'}")
        self._callbacks.call("on_after_load", path=path)
        return rest

    def load_raw(
        self,
        path: str | Path,
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool = True,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
    ) -> LoadReport | None:
        """Load weights alone: a Hugging Face folder, ``.safetensors``, ``.pt``/``.pth``/``.bin``, or our checkpoint.

        Every rank must call this. Each reads only its own part of the files, and of what :meth:`save` wrote compares
        its share of the checksums first. Before :meth:`setup` a model from ``init_module`` just notes where its values
        lie: setting it up then reads them, and draws only what the files
        lack. On the CPU whole tensors may use the files' own memory, so files must not be changed in place while the
        model lives (replacing them is fine).

        Args:
            path: where the weights are.
            obj: a module, set up or not, or an optimizer that was set up.
            strict: names must be the same on both sides; a tied name needs to be there once.
            weights_only: restore tensors and plain values only; ``False`` may run code from the file.
            rename: how names in the files become those of the module: regular expressions and their replacements, in
                order, or a function.

        Returns:
            For a module, what was loaded, what keeps the values of its own code, and what was ignored.

        Raises:
            CheckpointError: it cannot be read, or does not fit; nothing was changed then.
        """
        from fabriclite.checkpoint import raw
        from fabriclite.checkpoint.agree import READER_S_ADVICE, Crew
        from fabriclite.entries import part_of

        raw.check_rename(rename)
        self._saver.wait()
        part = part_of({"obj": obj}, "obj", self._running, self._books)
        # What was not set up is this process's own business: another rank may not load it at all.
        together = self._books.knows_module(obj) or self._books.knows_optimizer(obj)
        agreed = Crew(self._world, advice=READER_S_ADVICE).on_all if together else _alone
        share = (self._world.rank, self._world.size)
        with self._clock.phase("load"):
            report = raw.load_raw(path, part, strict, weights_only, rename, agreed, share)
        self._books.loads.append(f"load_raw {path}: {'optimizer' if report is None else report}")
        return report

    def _parts(self, state: Any) -> "dict[str, Part]":
        from fabriclite.entries import parts_of

        return parts_of(state, self._running, self._books)

    # -- going on --------------------------------------------------------------
    def preemption(
        self, signals: Sequence[int] = signals.DEFAULT, *, every: int = 1, requeue: bool = False
    ) -> preemption.Preemption:
        """Note signals that ask the run to stop, so that it stops between two steps. Every rank must call this.

        Ask ``requested()`` of the result after each step, and, when it is true, save and call its ``exit()``: the
        process ends with status 75. A signal to any rank is enough. SIGTERM or SIGINT a second time (more than two
        seconds later) ends the process at once. Handlers of yours are called as well, and are back after ``close()``.

        Args:
            signals: which.
            every: look only at each such call of ``requested()``, where steps take microseconds.
            requeue: have SLURM start the job again, unless it was SIGTERM or SIGINT that asked.

        Raises:
            ConfigError: a signal cannot be handled, ``every`` is no count, or this is not the main thread.
            SetupOrderError: ``launch`` is missing, or signals are noted already.
            WorldError: ``requeue`` is asked for where there is no SLURM.
        """
        return preemption.watch(self._ready_world, self._config.timeout, signals, every, requeue)

    # -- seeing ----------------------------------------------------------------
    def report(self) -> "Report":
        """What runs here: strategy, mesh, modules and how they are spread, memory, time. Every rank must call this.

        Printed it is one screen; each rank gets rank 0's. Before :meth:`setup` it tells of no module.

        Raises:
            SetupOrderError: ``launch`` is missing.
        """
        from fabriclite.watching.reporting import Known, report

        known = Known(
            strategy=repr(self._config),
            precision=self._precision.name,
            environment=self._environment.why,
            nodes=self._num_nodes,
            layout=self._config.layout(self._world.size, self._precision),
            seconds=self._clock.seconds,
        )
        return report(self._running, self._books, known)

    def monitor(self, run_dir: str | Path | None = None, **options: "Unpack[Asked]") -> "Monitor":
        """Watch training: ``with fabric.monitor(...) as monitor:``, and ``monitor.step(loss=loss)`` after each step.

        Every rank must call this, after :meth:`setup`, and make the same steps. Rank 0 shows the run.

        Args:
            run_dir: folder for what ``fabriclite report`` reads; a run that goes on goes on in it. ``None``: none.
            options: all by name.

                - ``total_steps``: of the whole run, with those before ``first_step``.
                - ``first_step``: steps that were done before, by a run that is gone on with.
                - ``every``: steps between two that are logged (shown, written, handed to the loggers); 10.
                - ``samples``, ``tokens``: that each rank works through in a step, where it is always as many.
                - ``flops``: operations of a step of the whole model with one rank's data; counted in the first step
                  if it is not given.
                - ``peak_flops``: of one device, per second; that of its data sheet, if it is in the table.
                - ``bar``: a bar in a terminal and lines elsewhere; ``False``: only what must be seen.
                - ``nonfinite``: what follows a loss that is NaN or infinite on any rank: ``"raise"`` before any
                  weights are stepped, ``"warn"`` and step, or ``"ignore"``.
                - ``spikes``: tell of losses far above those before, and the module behind; ``True``.
                - ``profile``: a :class:`~fabriclite.ProfilerWindow`, steps to record with ``torch.profiler``.
                - ``name``: of the run; the model's class.
                - ``plan``, ``report``: to be kept with the run: a plan's ``to_json()``, and a text.

        Raises:
            ConfigError: an argument has no meaning, or the profiler's window cannot happen.
            SetupOrderError: ``launch`` is missing.
        """
        from fabriclite.watching.monitor import Monitor, Watched
        from fabriclite.watching.options import Options

        watched = Watched(
            strategy=self._running,
            config=self._config,
            books=self._books,
            callbacks=self._callbacks,
            log=self.log_dict,
            nodes=self._num_nodes,
        )
        return Monitor(watched, Options(run_dir=None if run_dir is None else Path(run_dir), **options))

    # -- small help ------------------------------------------------------------
    def to_device(self, obj: Any) -> Any:
        """Move a module, a tensor or a tree of tensors to this process's device."""
        return obj.to(self.device) if isinstance(obj, nn.Module) else loaders.to_device(obj, self.device)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print``, on one process of each machine."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Run ``hook_name(*args, **kwargs)`` of every callback that has it. What one raises ends the run.

        :mod:`fabriclite.callbacks` has the hooks that are called by themselves.

        Raises:
            ConfigError: a callback's attribute of that name is no method.
        """
        self._callbacks.call(hook_name, *args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None, *, reduce: Reduce | None = None) -> None:
        """Hand one number to every logger; see :meth:`log_dict`."""
        self.log_dict({name: value}, step, reduce=reduce)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None, *, reduce: Reduce | None = None) -> None:
        """Hand numbers (or tensors of one element) to every logger. With ``reduce`` every rank must call this.

        Args:
            metrics: by name; with ``reduce`` the same names on every rank.
            step: which step they are of.
            reduce: ``None`` this rank's own, or ``"mean"``, ``"sum"``, ``"max"`` or ``"min"`` over the ranks, as
                floats, in one collective for all.

        Raises:
            ConfigError: ``reduce`` is unknown, or a value is not what it or a logger takes.
            SetupOrderError: ``reduce`` is given, and ``launch`` is missing.
        """
        self._handing.hand(metrics if reduce is None else over_ranks(self._ready_world, metrics, reduce), step)

    seed_everything = staticmethod(seed.seed_everything)


def _alone(act: Callable[[], T], what: str) -> T:
    return act()


def _run_in_worker(
    arguments: dict[str, Any],
    seeds: dict[str, Any],
    function: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    seed.carry_on(seeds)
    with closed_after():
        fabric = Fabric(**arguments)
        result = function(fabric, *args, **kwargs)
    wait_for_all()  # this process may end without the interpreter's own waiting
    preemption.close_all()
    return result

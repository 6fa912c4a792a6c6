"""``fabric.monitor(...)``: a callback that measures a run, shows it and writes it down."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from fabriclite import arguments
from fabriclite.books import Books
from fabriclite.callbacks import Callbacks
from fabriclite.errors import SetupOrderError
from fabriclite.layout import Layout
from fabriclite.module import unwrap
from fabriclite.preemption import Preemption
from fabriclite.spelling import class_name
from fabriclite.strategy import Strategy, StrategyConfig
from fabriclite.watching import devices, flops, memory, phases, rates
from fabriclite.watching.gathering import everyones
from fabriclite.watching.guard import Guard
from fabriclite.watching.journal import Journal
from fabriclite.watching.losses import Looking, Losses
from fabriclite.watching.options import Options, amount, check_metrics
from fabriclite.watching.profiling import Profiling
from fabriclite.watching.records import EventKind, StepRecord
from fabriclite.watching.screen import Screen, screen_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What of a ``Fabric`` its monitor sees.

    Attributes:
        strategy, config: as it runs, and as it was written.
        books: which modules were set up.
        callbacks: where the monitor is told of what happens.
        log: hands metrics of a step to the loggers.
        nodes: number of machines.
    """

    strategy: Strategy
    config: StrategyConfig
    books: Books
    callbacks: Callbacks
    log: Callable[[Mapping[str, Any], int], None]
    nodes: int

    @property
    def layout(self) -> Layout:
        return self.config.layout(self.strategy.world.size, self.strategy.precision)

    def forward(self, module: nn.Module) -> Callable[..., Any]:
        """How the strategy calls ``module``, without telling callbacks."""
        return self.strategy.forward(self.books.engine(module))

    def settle(self, module: nn.Module) -> None:
        self.strategy.hand_out(self.books.engine(module))

    def parameters(self) -> int | None:
        """Of all modules that were set up, whole, shared ones once; ``None``: there is none."""
        modules = self.books.modules()
        return sum(self._parameters_of(module) for module in modules) if modules else None

    def _parameters_of(self, module: nn.Module) -> int:
        whole = self.strategy.layout(self.books.engine(module))
        return sum(whole[name].shape.numel() for name, _ in module.named_parameters() if name in whole)


@final
class Monitor:
    """What ``fabric.monitor(...)`` returns, to be used with ``with``. All ranks make the same calls.

    Attributes:
        done: steps done, counted from the run's very first.
        last: the step logged last; ``None`` before.
    """

    def __init__(self, watched: Watched, options: Options) -> None:
        world = watched.strategy.world
        options.check(world.size)
        self.done = options.first_step
        self.last: StepRecord | None = None
        self._watched = watched
        self._options = options
        self._world = world
        self._layout = watched.layout
        self._journal = Journal(options.run_dir, world.rank)
        self._open = ExitStack()
        self._entered = False
        # None: no forward that a count or a sample surrounds is running
        self._outer: nn.Module | None = None
        self._counted: list[float] | None = [] if options.flops is None else None
        self._counter = ExitStack()
        self._flops = options.flops or 0.0
        self._flops_per_token = 0.0
        self._checked_by_clipping = False
        self._checks = 0

    # -- begin and end -----------------------------------------------------------
    def __enter__(self) -> Self:
        watched, options, world = self._watched, self._options, self._world
        if watched.callbacks.holds(Monitor):
            raise SetupOrderError(
                "`monitor` must be left before another one begins, but one is watching. Use one for the whole run."
            )
        modules = watched.books.modules()
        buffers = any(True for module in modules for _ in module.buffers())
        self._clock = phases.clock_for(world.device, phases.waiting(self._layout, buffers))
        looking = Looking(world, watched.forward, watched.settle)
        self._guard = Guard(Losses(world), looking, options.nonfinite, options.spikes, self._tell)
        self._peak_flops = options.peak_flops or devices.peak_flops(
            devices.name_of(world.device),
            watched.strategy.precision.compute_dtype,
            tf32=devices.tf32_is_allowed(),
        )
        self._journal.start(
            first_step=options.first_step,
            name=options.name or ", ".join(class_name(module) for module in modules),
            strategy=repr(watched.config),
            precision=watched.strategy.precision.name,
            world_size=world.size,
            nodes=watched.nodes,
            device=devices.name_of(world.device),
            parameters=watched.parameters(),
            total_steps=options.total_steps,
            plan=options.plan,
            report=options.report,
        )
        self._profiling = self._profiling_here()
        if self._profiling is not None:
            self._open.callback(self._profiling.close)
            self._profiling.after(self.done)
        self._screen: Screen = screen_for(world.rank, options.bar, options.total_steps, options.first_step)
        self._open.callback(self._screen.close)
        watched.callbacks.add(self)
        self._open.callback(watched.callbacks.remove, self)
        self._reset()
        self._remaining = rates.Remaining(options.total_steps, self.done, self._begun)
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._entered = False
        with self._open:
            self._close_forward()
            if error is None and self._steps:
                self._log(self._given)
            code = error.code if isinstance(error, SystemExit) else None
            if error is None or (isinstance(error, SystemExit) and code in (None, 0)):
                self._tell("end", f"{self.done} steps", {}, False)
            elif code == Preemption.status:
                self._tell("preempted", f"stopped after {self.done} steps, to go on", {}, False)
            else:
                self._journal.failure(self.done, error)

    def _profiling_here(self) -> Profiling | None:
        window, folder = self._options.profile, self._options.run_dir
        if window is None or folder is None or not window.holds(self._world.rank):
            return None
        return Profiling(window, folder, self._world.rank, self._world.device.type == "cuda")

    def _reset(self) -> None:
        """A new interval begins."""
        self._steps = 0
        self._samples = self._tokens = 0.0
        self._begun = time.perf_counter()

    # -- a step ------------------------------------------------------------------
    def step(
        self,
        metrics: Mapping[str, Any] | None = None,
        /,
        *,
        samples: float | None = None,
        tokens: float | None = None,
        **more: Any,
    ) -> None:
        """A step is done. Every rank must call this, once for each.

        Args:
            metrics: numbers, or tensors of one element, by name. They are read in steps that are logged only.
            samples, tokens: that this rank worked through in it; ``None``: as ``fabric.monitor`` was told.
            more: metrics too: ``monitor.step(loss=loss, lr=lr)``.

        Raises:
            SetupOrderError: this is outside of ``with``.
            ConfigError: a metric has more than one element or a name that is taken; an amount is not above 0.
            NonFiniteError: a loss is not finite, and no optimizer that was set up stepped with it.
        """
        if not self._entered:
            raise SetupOrderError(
                "`step` must be called inside `with fabric.monitor(...) as monitor:`, but was called outside."
            )
        given = {**(metrics or {}), **more}
        check_metrics(given)
        # without its graph, which would otherwise live until the next step
        given = {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}
        amount("samples", samples)
        amount("tokens", tokens)
        self._clock.enter("other")
        self._close_forward()
        if self._checks == 0:  # a loss scaler left the step out, or nothing was stepped
            self._guard.check(self.done + 1, "No optimizer stepped with it.")
        self._checks = 0
        self._checked_by_clipping = False
        self._guard.forget()
        self._count(samples, tokens)
        self._given = given
        if self.done % self._options.every == 0 or self.done == self._options.total_steps:
            self._log(given)
        else:
            self._screen.progress(self.done)
        self._profile()
        self._clock.enter("start")

    def _count(self, samples: float | None, tokens: float | None) -> None:
        self.done += 1
        self._steps += 1
        samples = self._options.samples if samples is None else samples
        tokens = self._options.tokens if tokens is None else tokens
        self._samples += samples or 0.0
        self._tokens += tokens or 0.0
        if self._counted is not None:  # the first step
            self._flops = flops.FORWARD_AND_BACKWARD * sum(self._counted)
            self._flops_per_token = self._flops / tokens if tokens else 0.0
            self._counted = None

    def _profile(self) -> None:
        written = None if self._profiling is None else self._profiling.after(self.done)
        if written is not None:
            self._journal.event("profile", self.done, f"trace in {written}", {"path": str(written)})

    def _log(self, given: Mapping[str, Any]) -> None:
        """Tell each other of the steps since the last one logged. Every rank must call this."""
        everyone = everyones(self._world, self._measured(given))
        now = time.perf_counter()
        self.last = rates.record(everyone, self.done, time.time(), self._layout.data, self._peak_flops)
        self._remaining.mark(self.done, now)
        self._journal.step(self.last)
        self._screen.show(self.last, self._remaining.seconds(), self.done == self._options.total_steps)
        self._watched.log(_for_loggers(self.last), self.done)
        self._reset()

    def _measured(self, given: Mapping[str, Any]) -> rates.Measured:
        metrics = {name: float(arguments.number(name, value)) for name, value in given.items()}
        times = self._clock.take()
        now, peak = memory.used(self._world.device)
        counted = self._flops_per_token * self._tokens if self._flops_per_token else self._flops * self._steps
        return rates.Measured(
            steps=self._steps,
            seconds=time.perf_counter() - self._begun,
            own=times.own,
            memory=now,
            peak=peak,
            samples=self._samples,
            tokens=self._tokens,
            flops=counted,
            metrics=metrics,
            phases=times.wall,
        )

    # -- hooks -------------------------------------------------------------------
    def on_before_batch(self, loader: Any) -> None:
        self._clock.enter("data")

    def on_after_batch(self, loader: Any, batch: Any) -> None:
        self._clock.enter("start")

    def on_before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._clock.enter("forward")
        module = unwrap(module)
        if self._outer is None and torch.is_grad_enabled():
            self._outer = module
            self._guard.before_forward(module, args, kwargs, self.done - self._options.first_step + 1)
            if self._counted is not None:
                self._count_flops(module, args, kwargs, self._counted)

    def _count_flops(self, module: nn.Module, args: Any, kwargs: Any, tell: list[float]) -> None:
        tensor = self._layout.tensor
        if flops.may_be_compiled():
            flops.count_aside(module, self._watched.forward(module), args, kwargs, tensor, tell)
            self._watched.settle(module)
        else:
            self._counter.enter_context(flops.counting(module, tensor, tell))

    def on_after_forward(self, module: nn.Module, output: Any) -> None:
        if unwrap(module) is self._outer:
            self._close_forward()
        self._clock.enter("loss")

    def _close_forward(self) -> None:
        self._counter.close()
        self._guard.after_forward()
        self._outer = None

    def on_before_backward(self, loss: Tensor) -> None:
        self._clock.enter("backward")
        self._guard.note(loss)

    def on_after_backward(self, loss: Tensor) -> None:
        self._clock.enter("other")

    def on_before_clip_gradients(self, module: Any, optimizer: Any) -> None:
        # Before clipping: it would raise for gradients of a bad loss, and could not name the module that made it.
        self._check()
        self._checked_by_clipping = True
        self._clock.enter("optimizer")

    def on_after_clip_gradients(self, module: Any, optimizer: Any, norm: Any) -> None:
        self._clock.enter("other")

    def on_before_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        if not self._checked_by_clipping:
            self._check()
        self._checked_by_clipping = False
        self._clock.enter("optimizer")

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self._clock.enter("other")

    def on_after_save(self, path: Any, asynchronous: bool) -> None:
        self._tell("save", f"saved {path}", {"path": str(path), "asynchronous": asynchronous}, False)

    def on_after_load(self, path: Any) -> None:
        self._tell("load", f"loaded {path}", {"path": str(path)}, False)

    def _check(self) -> None:
        self._clock.enter("other")
        self._checks += 1
        self._guard.check(self.done + 1, "The weights were not stepped.")

    def _tell(self, kind: EventKind, text: str, details: Mapping[str, Any], show: bool) -> None:
        """What all ranks know: one of them says so."""
        if self._world.rank == 0:
            self._journal.event(kind, self.done, text, details)
        if show:
            self._screen.note(text)


def _for_loggers(record: StepRecord) -> dict[str, float]:
    """A logged step as plain metrics."""
    return {**record.metrics, "memory_bytes": max(record.memory), "peak_memory_bytes": max(record.peak)}

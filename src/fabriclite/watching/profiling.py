"""A window of steps under ``torch.profiler``."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from fabriclite.errors import ConfigError


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerWindow:
    """Which steps to record, as they are counted in a run's lines: its very first is 1.

    Attributes:
        start: the first step that is recorded. The one before it warms the profiler up, where there is one.
        steps: how many.
        ranks: on which ranks; ``"all"`` for all of them.
        format: ``"chrome"`` for one JSON that Perfetto and ``chrome://tracing`` open, ``"tensorboard"`` for a folder.
        record_shapes, profile_memory, with_stack: as of ``torch.profiler.profile``.
    """

    start: int = 10
    steps: int = 3
    ranks: tuple[int, ...] | Literal["all"] = (0,)
    format: Literal["chrome", "tensorboard"] = "chrome"
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False

    @property
    def last(self) -> int:
        return self.start + self.steps - 1

    def check(self, run_dir: Path | None, first_step: int, total_steps: int | None, world_size: int) -> None:
        """Raise unless it can happen in such a run.

        Raises:
            ConfigError: see above.
        """
        if run_dir is None:
            raise ConfigError(
                "`profile` must come with a folder to write to, but run_dir is None. Pass fabric.monitor('runs/name')."
            )
        if self.steps < 1:
            raise ConfigError(f"`steps` of ProfilerWindow must be at least 1, but is {self.steps!r}.")
        if self.format not in ("chrome", "tensorboard"):
            raise ConfigError(f"`format` of ProfilerWindow must be 'chrome' or 'tensorboard', but is {self.format!r}.")
        if self.start <= first_step:
            raise ConfigError(
                f"`start` of ProfilerWindow must be a step to come, but is {self.start!r}, and {first_step} are done."
                f" Choose {first_step + 1} or later."
            )
        if total_steps is not None and self.last > total_steps:
            raise ConfigError(
                f"`start` and `steps` of ProfilerWindow must end by total_steps, but end with step {self.last} of"
                f" {total_steps}. Begin earlier."
            )
        unknown = [rank for rank in self._listed() if not 0 <= rank < world_size]
        if unknown:
            raise ConfigError(
                f"`ranks` of ProfilerWindow must be in [0, {world_size}), but hold {unknown[0]!r}. Use ranks='all'."
            )

    def _listed(self) -> tuple[int, ...]:
        return () if self.ranks == "all" else self.ranks

    def holds(self, rank: int) -> bool:
        """Whether ``rank`` records."""
        return self.ranks == "all" or rank in self.ranks


class Profiling:
    """Runs a window on one rank."""

    def __init__(self, window: ProfilerWindow, folder: Path, rank: int, cuda: bool) -> None:
        self._window = window
        self._rank = rank
        self._path = folder / "profile"
        self._cuda = cuda
        self._profile: Any = None

    def after(self, done: int) -> Path | None:
        """``done`` steps are done: begin, go on or end. Gives what was written, when it is."""
        window = self._window
        if done == max(window.start - 2, 0) and self._profile is None:
            self._begin(warm=window.start - 1 - done)
            return None
        if self._profile is None and window.start - 1 == done:
            self._begin(warm=0)
            return None
        if self._profile is None:
            return None
        self._profile.step()
        return self._end() if done == window.last else None

    def _begin(self, warm: int) -> None:
        from torch import profiler

        window = self._window
        kinds = [profiler.ProfilerActivity.CPU] + ([profiler.ProfilerActivity.CUDA] if self._cuda else [])
        self._path.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # there is no step before the first
            schedule = profiler.schedule(wait=0, warmup=warm, active=window.steps, repeat=1)
        self._profile = profiler.profile(
            activities=kinds,
            schedule=schedule,
            on_trace_ready=self._write,
            record_shapes=window.record_shapes,
            profile_memory=window.profile_memory,
            with_stack=window.with_stack,
        )
        self._profile.start()

    @property
    def _file(self) -> Path:
        if self._window.format == "tensorboard":
            return self._path
        return self._path / f"steps-{self._window.start}-{self._window.last}-rank-{self._rank}.json"

    def _write(self, profile: Any) -> None:
        if self._window.format == "tensorboard":
            from torch.profiler import tensorboard_trace_handler

            tensorboard_trace_handler(str(self._path), worker_name=f"rank-{self._rank}")(profile)
        else:
            profile.export_chrome_trace(str(self._file))

    def _end(self) -> Path:
        self.close()
        return self._file

    def close(self) -> None:
        """End what still runs."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

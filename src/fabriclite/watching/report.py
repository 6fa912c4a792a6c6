"""What ``fabric.report()`` gives: one frozen value, one screen when printed. Sizes are bytes, times are seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fabriclite.spread import Wrapped
from fabriclite.watching import report_text


@dataclass(frozen=True, slots=True)
class Range:
    """A number that each rank has its own of: the least and the most over the ranks."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One module that was set up. What is tied counts once.

    Attributes:
        name: its class.
        wrapped: what the strategy did to it.
        tensors, parameters, bytes: parameters of the whole model: objects, elements, bytes.
        rank_parameters, rank_bytes: elements and bytes of them that each rank keeps.
        buffers, buffer_bytes: of the whole model: objects, bytes.
        frozen: parameters that get no gradient, by name.
        frozen_parameters: elements of those.
        tied: names that are one tensor.
        dtypes: by role: ``parameters compute gradients reduce``, and ``optimizer`` (its state) where there is one.
        loaded: names of parameters and buffers that set-up read from files.
        initialised: names of those whose recorded initialisation set-up ran.
        made: how many had values before set-up.
        optimizers: one line each.
        seconds: ``setup`` as a whole, and of it ``agree spread fill verify``; of rank 0.
    """

    name: str
    wrapped: tuple[Wrapped, ...]
    tensors: int
    parameters: int
    bytes: int
    rank_parameters: Range
    rank_bytes: Range
    buffers: int
    buffer_bytes: int
    frozen: tuple[str, ...]
    frozen_parameters: int
    tied: tuple[tuple[str, ...], ...]
    dtypes: Mapping[str, str]
    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    made: int
    optimizers: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What runs here, as rank 0 sees it. ``str()`` is one screen.

    Attributes:
        strategy: the config, as the code that makes it.
        precision: its name.
        environment: which launcher described this process, and why that one.
        world_size, nodes: processes and machines.
        device: of rank 0.
        mesh: axis to size, outermost first; empty where nothing is spread, and before a module is set up.
        modules: in the order in which they were set up, those that still live.
        loads: what ``load`` and ``load_raw`` read, a line each.
        memory: held now. On CUDA what torch allocated on the device; on the CPU the process; ``None``: not known.
        peak: the same, at most so far.
        seconds: ``launch meeting init_module load``, as far as they happened; of rank 0.
        versions: of fabriclite, torch, python.
    """

    strategy: str
    precision: str
    environment: str
    world_size: int
    nodes: int
    device: str
    mesh: Mapping[str, int]
    modules: tuple[ModuleReport, ...]
    loads: tuple[str, ...]
    memory: Range | None
    peak: Range | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join(report_text.lines(self))

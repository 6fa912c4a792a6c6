"""Gathering what a report says. It looks at what was set up, and changes nothing."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

import fabriclite
from fabriclite import collectives
from fabriclite.books import Books, Entry
from fabriclite.layout import Layout
from fabriclite.spelling import spelt
from fabriclite.spread import Wrapped
from fabriclite.strategy import Strategy
from fabriclite.watching.held import memory
from fabriclite.watching.report import ModuleReport, Range, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What ``Fabric`` knows: see :class:`~fabriclite.watching.report.Report`."""

    strategy: str
    precision: str
    environment: str
    nodes: int
    layout: Layout
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Here:
    """What differs between ranks.

    Attributes:
        held: ``(now, peak)`` in bytes.
        kept: for each module, elements and bytes of parameters.
    """

    held: tuple[int, int] | None
    kept: tuple[tuple[int, int], ...]


def report(running: Strategy, books: Books, known: Known) -> Report:
    """Every rank must call this; each gets the report of rank 0."""
    entries = books.entries()
    own = _Here(memory(running.world.device), tuple(_kept(running, entry) for entry in entries))
    ranks = collectives.gather_objects(running.world, own)
    mine = _report(running, books, known, entries, ranks) if running.world.rank == 0 else None
    found = collectives.broadcast(running.world, mine)
    assert found is not None  # rank 0 made it
    return found


def _report(running: Strategy, books: Books, known: Known, entries: Sequence[Entry], ranks: Sequence[_Here]) -> Report:
    world = running.world
    spreads = [running.spread(entry.engine) for entry in entries]
    held = [here.held for here in ranks if here.held is not None]
    cuda = world.device.type == "cuda"
    return Report(
        strategy=known.strategy,
        precision=known.precision,
        environment=known.environment,
        world_size=world.size,
        nodes=known.nodes,
        device=torch.cuda.get_device_name(world.device) if cuda else world.device.type,
        mesh=spreads[0].mesh if spreads else {},
        modules=tuple(
            _module(entry, known.layout, spread.wrapped, [here.kept[place] for here in ranks])
            for place, (entry, spread) in enumerate(zip(entries, spreads, strict=True))
        ),
        loads=tuple(books.loads),
        memory=_range([now for now, _ in held]),
        peak=_range([peak for _, peak in held]),
        seconds=dict(known.seconds),
        versions=_versions(),
    )


def _module(entry: Entry, layout: Layout, wrapped: Sequence[Wrapped], kept: Sequence[tuple[int, int]]) -> ModuleReport:
    module, promise = entry.module, entry.promise
    named = dict(module.named_parameters(remove_duplicate=False))
    again = {name for group in promise.ties for name in group[1:]}
    sizes = {name: _numel(promise.shapes.get(name, ())) for name in promise.dtypes if name not in again}
    params = {name: count for name, count in sizes.items() if name in named}
    buffers = {name: count for name, count in sizes.items() if name not in named}
    frozen = tuple(name for name in params if not named[name].requires_grad)
    return ModuleReport(
        name=promise.kind,
        wrapped=tuple(wrapped),
        tensors=len(params),
        parameters=sum(params.values()),
        bytes=sum(count * promise.dtypes[name].itemsize for name, count in params.items()),
        rank_parameters=Range(min(n for n, _ in kept), max(n for n, _ in kept)),
        rank_bytes=Range(min(size for _, size in kept), max(size for _, size in kept)),
        buffers=len(buffers),
        buffer_bytes=sum(count * promise.dtypes[name].itemsize for name, count in buffers.items()),
        frozen=frozen,
        frozen_parameters=sum(params[name] for name in frozen),
        tied=tuple(tuple(group) for group in promise.ties),
        dtypes=_dtypes({name: promise.dtypes[name] for name in params}, params, layout, entry.optimizers),
        loaded=tuple(name for name in sizes if name in promise.loaded),
        initialised=tuple(name for name in sizes if name in promise.recorded - promise.loaded),
        made=len(sizes.keys() - promise.recorded),
        optimizers=tuple(_optimizer(optimizer) for optimizer in entry.optimizers),
        seconds=_own_seconds(entry.clock.seconds),
    )


def _kept(running: Strategy, entry: Entry) -> tuple[int, int]:
    """Elements and bytes of parameters that this rank keeps between steps."""
    running.hand_out(entry.engine)
    again = {name for group in entry.promise.ties for name in group[1:]}
    named = {name for name, _ in entry.module.named_parameters(remove_duplicate=False)}
    parts = [t for name, (t, _) in running.local_parts(entry.engine).items() if name in named - again]
    return sum(t.numel() for t in parts), sum(t.numel() * t.element_size() for t in parts)


def _dtypes(
    dtypes: Mapping[str, torch.dtype], sizes: Mapping[str, int], layout: Layout, optimizers: Sequence[Optimizer]
) -> dict[str, str]:
    """By role. What autocast and the wire use is the strategy's word; parameters and state are looked at."""
    elements: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        elements[dtype] += sizes[name]
    found = {
        "parameters": _shares(elements),
        "compute": _short(layout.compute_dtype),
        "gradients": _short(layout.grad_dtype),
        "reduce": _short(layout.reduce_dtype),
    }
    state = {dtype for optimizer in optimizers for dtype in _state_dtypes(optimizer)}
    if state:
        found["optimizer"] = ", ".join(sorted(map(_short, state)))
    elif optimizers:
        found["optimizer"] = "float32" if layout.master else found["parameters"]
    return found


def _state_dtypes(optimizer: Optimizer) -> set[torch.dtype]:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {t.dtype for t in tensors if t.dim() > 0}


def _shares(elements: Mapping[torch.dtype, int]) -> str:
    """One dtype, or each with its share."""
    total = sum(elements.values())
    if len(elements) == 1 or not total:
        return ", ".join(_short(dtype) for dtype in elements) or "none"
    parts = sorted(elements.items(), key=lambda item: -item[1])
    return " + ".join(f"{100 * count / total:.3g} % {_short(dtype)}" for dtype, count in parts)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _optimizer(optimizer: Optimizer) -> str:
    base = getattr(optimizer, "base", optimizer)  # DeepSpeed's has the user's own inside
    groups = optimizer.param_groups
    rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
    some = f", {len(groups)} groups" if len(groups) > 1 else ""
    return type(base).__name__ + (f"(lr={', '.join(map(spelt, rates))})" if rates else "") + some


def _own_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """What was spent on spreading alone: agreeing and filling happen within it."""
    inner = seconds.get("agree", 0.0) + seconds.get("fill", 0.0)
    return {name: value - inner if name == "spread" else value for name, value in seconds.items()}


def _versions() -> dict[str, str]:
    return {"fabriclite": fabriclite.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _range(values: Sequence[int]) -> Range | None:
    return Range(min(values), max(values)) if values else None

"""Running a forward once more to look inside: which module's output is the first that is wrong."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fabriclite import _torch, seed, shards
from fabriclite.spelling import class_name

_NAMED: Final = 3
"""How many parameters a finding names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rank found in its forward.

    Attributes:
        kind: ``"module"`` made it; the model's ``"input"`` held it; the ``"loss"`` made it, as all modules' outputs are
            finite; ``"unknown"``: the forward could not be repeated.
        module: name of the module, ``""`` for the root.
        type: class of the module.
        shape, dtype: of the tensor.
        nans, infinite: how many of its elements are NaN, and infinite.
        tensors: parameters and buffers that are not finite already, of this rank's part.
        why: for ``"unknown"``.
    """

    kind: Literal["module", "input", "loss", "unknown"]
    module: str = ""
    type: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    nans: int = 0
    infinite: int = 0
    tensors: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        label = f"{self.module or 'the root'} ({self.type})"
        tensor = f"shape {self.shape}, {self.dtype}, {self.nans} NaN and {self.infinite} infinite"
        match self.kind:
            case "module":
                text = f"{label} is the first module whose output is not finite though its inputs are: {tensor}."
            case "input":
                text = f"The model's input is not finite already: {tensor}."
            case "loss":
                text = "Every module's output is finite, so what computes the loss from them made it."
            case "unknown":
                text = f"The forward could not be repeated to find the module: {self.why}."
        more = ", ..." if len(self.tensors) > _NAMED else ""
        return f"{text} Not finite already: {', '.join(self.tensors[:_NAMED])}{more}." if self.tensors else text


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors in a tree, of sharded ones this rank's part."""
    leaves = [shards.local(leaf) for leaf in _torch.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]


def is_finite(tensor: Tensor) -> bool:
    """Whether it has only finite elements, or is an additive mask: zeros and negative infinities."""
    if bool(torch.isfinite(tensor).all()):
        return True
    return bool(((tensor == 0) | (tensor == -math.inf)).all())


def first_bad(tree: Any) -> Tensor | None:
    return next((tensor for tensor in floats(tree) if not is_finite(tensor)), None)


class _Look:
    """Hooks that find the first module with finite inputs and an output that is not."""

    def __init__(self) -> None:
        self.found: Finding | None = None
        self._clean: list[bool] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._clean.append(self.found is None and first_bad((args, kwargs)) is None)

    def after(self, name: str, module: nn.Module, output: Any) -> None:
        clean = self._clean.pop()
        bad = first_bad(output) if clean and self.found is None else None
        if bad is not None:
            self.found = _described("module", bad, name, class_name(module))


def find(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Finding:
    """Repeat a forward and say where it goes wrong. Where it holds collectives, every rank must call this.

    Args:
        model: the user's module.
        run: its forward, as the strategy calls it.
        args, kwargs: of the forward.
    """
    broken = tuple(name for name, tensor in _tensors(model) if any(not is_finite(t) for t in floats(tensor)))
    look = _Look()
    try:
        with _hooks(model, look.before, look.after), undone(model):
            run(*args, **kwargs)
    except Exception as error:  # what is looked for is told all the same, and this is only part of it
        return Finding("unknown", tensors=broken, why=f"{type(error).__name__}: {error}")
    if look.found is not None:
        return _with(look.found, broken)
    bad = first_bad((args, kwargs))
    if bad is not None:
        return _with(_described("input", bad, "", class_name(model)), broken)
    return Finding("loss", tensors=broken)


def magnitudes(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, float]:
    """Repeat a forward, and give the root mean square of every module's output, by name, in order of execution.

    Where the forward holds collectives, every rank must call this.
    """
    seen: dict[str, Tensor] = {}
    with _hooks(model, None, lambda name, module, output: note_magnitude(seen, name, output)), undone(model):
        run(*args, **kwargs)
    return {name: float(value) for name, value in seen.items()}


def note_magnitude(seen: dict[str, Tensor], name: str, output: Any) -> None:
    """Add the root mean square of ``output`` under ``name``, as a tensor: reading it would wait for the device."""
    tensors = floats(output)
    if tensors:
        tensor = tensors[0].detach()
        dtype = torch.float32 if tensor.dtype.itemsize < 4 else None  # squares of half precision numbers overflow
        seen[name] = torch.linalg.vector_norm(tensor, dtype=dtype) / math.sqrt(tensor.numel())


@contextmanager
def _hooks(model: nn.Module, before: Any, after: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, sub in model.named_modules():
            if before is not None:
                stack.callback(sub.register_forward_pre_hook(before, with_kwargs=True).remove)
            told = sub.register_forward_hook(lambda sub, args, output, name=name: after(name, sub, output))
            stack.callback(told.remove)
        yield


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Run forwards that leave no trace: no gradients, random numbers and buffers as before, nothing compiled."""
    states = seed.rng_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    # hooks are not seen by code that is compiled already
    eager: Any = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        seed.set_rng_state(states)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _described(kind: Literal["module", "input"], tensor: Tensor, name: str, type_name: str) -> Finding:
    nans = int(torch.isnan(tensor).sum())
    infinite = int(torch.isinf(tensor).sum())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Finding(kind, name, type_name, tuple(tensor.shape), dtype, nans, infinite)


def _with(finding: Finding, tensors: tuple[str, ...]) -> Finding:
    from dataclasses import replace

    return replace(finding, tensors=tensors)

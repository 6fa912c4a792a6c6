"""How many floating-point operations a step takes: counted once, in the first real forward."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from fabriclite import _torch
from fabriclite.watching import repeating

FORWARD_AND_BACKWARD: Final = 3
"""A backward takes twice a forward: a product each for the gradient of the inputs and of the weights."""


@contextmanager
def counting(module: nn.Module, tensor_parallel: int, tell: list[float]) -> Iterator[None]:
    """Count the operations of a forward of ``module``, as the whole model's over all ranks that share its products.

    Torch counts an operation on a ``DTensor`` with the shapes of the whole, on every rank. What a rank computes on
    plain tensors between two layers that are split (attention over its heads) is counted with its own shapes, and
    taken ``tensor_parallel`` times here.

    Args:
        module: whose forward runs inside.
        tensor_parallel: ranks that share one matrix product.
        tell: the count is appended to it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # not at the top: 30 ms, for those who count

    counter = FlopCounterMode(display=False, custom_mapping={_torch.cpu_attention(): _attention})
    with counter:
        yield
    total = float(counter.get_total_flops())
    if tensor_parallel > 1:
        counts = {name: float(sum(ops.values())) for name, ops in counter.get_flop_counts().items()}
        total += (tensor_parallel - 1) * sum(own_count(name, counts) for name in around_split(module))
    tell.append(total)


def count_aside(
    module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, tensor_parallel: int, tell: list[float]
) -> None:
    """Count a forward that is run for it alone, uncompiled and without gradients.

    Compiled code that is first called inside a counter is never compiled: torch 2.13 gives up on it for good. Where the
    forward holds collectives, every rank must call this. If it cannot run uncompiled (it may need more memory), nothing
    is counted.
    """
    try:
        with repeating.undone(module), counting(module, tensor_parallel, tell):
            run(*args, **kwargs)
    except RuntimeError:
        tell.clear()


def may_be_compiled() -> bool:
    """Whether anything in this process may be: modules, or functions that they call."""
    return "torch._dynamo" in sys.modules


def own_count(name: str, counts: Mapping[str, float]) -> float:
    """Of operations by module (each with those of the modules inside), what ``name`` did in its own forward. Pure."""
    if name not in counts:  # a container whose forward nobody calls
        return 0.0
    inside = [n for n in counts if n.startswith(f"{name}.")]
    outermost = [n for n in inside if not any(n.startswith(f"{other}.") for other in inside)]
    return counts[name] - sum(counts[n] for n in outermost)


def around_split(module: nn.Module) -> list[str]:
    """Names, as torch's counter writes them, of modules that hold split layers and no split parameter of their own."""
    root, found = type(module).__name__, []
    for name, sub in module.named_modules():
        own = any(_is_split(p) for p in sub.parameters(recurse=False))
        if not own and any(_is_split(p) for p in sub.parameters()):
            found.append(f"{root}.{name}" if name else root)
    return found


def _is_split(param: nn.Parameter) -> bool:
    """Whether tensor parallelism cuts it."""
    mesh = getattr(param, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if "tensor_parallel" not in names:
        return False
    placements: Any = param.placements  # type: ignore[attr-defined]  # a DTensor's, as it has a mesh
    return bool(placements[names.index("tensor_parallel")].is_shard())


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of every query with every key, from shapes (batch, heads, length, width).

    What a causal mask leaves out is not taken off, as is usual for model FLOPs and as torch does for CUDA's kernels.
    """
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))

"""What the recording has to know about an operation of torch: from its schema, and from a few lists of names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

METADATA_ONLY: Final = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
)
"""Reads of its tensor argument nothing but shape, dtype and device."""

UNWRITTEN: Final = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
)
"""Takes memory and leaves it as it is."""

FILLS: Final = frozenset({"fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "exponential_", "log_normal_"})
"""Writes all of its first argument whatever was there."""
DRAWN_FILLS: Final = frozenset({"cauchy_", "geometric_", "bernoulli_", "trunc_normal_"})

OVERWRITES: Final = FILLS | {"cauchy_", "geometric_", "trunc_normal_"}
WRITES_PART: Final = (
    FILLS
    | DRAWN_FILLS
    | {"index_put_", "_index_put_impl_", "index_fill_", "index_copy_", "masked_fill_", "masked_scatter_", "scatter_"}
)
"""May give memory a value that held none; anything else in place (``mul_``) only changes values."""

EXACT: Final = frozenset(
    {"mul", "mul_", "sub", "sub_", "add", "add_", "div", "div_", "neg", "neg_", "abs", "abs_", "sqrt", "sqrt_"}
    | {"clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"}
    | {"clone", "_to_copy", "copy_", "fill_", "zero_", "detach", "alias"}
)
"""Element by element and correctly rounded, so that a part comes out as in the whole. Not ``exp`` or ``erfinv``: vector
and scalar code of theirs differ in the last bit, and which element gets which depends on where a part begins."""

FACTORIES: Final = frozenset(
    {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
)
"""Makes a tensor of one value."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one operation.

    Attributes:
        name: without namespace and overload, ``normal_``.
        overload: ``float_float``, or ``default``.
        arguments: their names, in order.
        written: places of the arguments that it writes.
        views: whether it returns a view and writes nothing.
        reshapes: whether it changes shape or place of its argument, and no value.
        random: whether it draws.
        into_out: whether it writes what was passed as ``out``, and does not read it.
        takes_device: whether it makes tensors on a device that may be named.
    """

    name: str
    overload: str
    arguments: tuple[str, ...]
    written: tuple[int, ...]
    views: bool
    reshapes: bool
    random: bool
    into_out: bool = False
    takes_device: bool = False

    def has(self, argument: str) -> bool:
        return argument in self.arguments


@dataclass(frozen=True, slots=True)
class Macro:
    """A function of Python that is recorded as one operation, writing its first argument.

    ``torch.nn.init.trunc_normal_`` asks whether it is done by looking at values: recorded step by step it would need
    every one of them while recording.
    """

    name: str
    run: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


_KNOWN: Final[dict[int, tuple[Any, Facts]]] = {}
"""By ``id``, which the function beside it keeps from being used again: ``OpOverload`` has its hash in Python."""


def of(func: Any) -> Facts:
    """Facts of an ``OpOverload`` or a :class:`Macro`."""
    known = _KNOWN.get(id(func))
    if known is None:
        known = _KNOWN[id(func)] = (func, _learned(func))
    return known[1]


def _learned(func: Any) -> Facts:
    if isinstance(func, Macro):
        return Facts(func.name, "default", ("tensor",), (0,), views=False, reshapes=False, random=True)
    schema = func._schema
    written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    aliases = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    name = schema.name.split("::")[1]
    arguments = tuple(a.name for a in schema.arguments)
    return Facts(
        name=name,
        overload=schema.overload_name or "default",
        arguments=arguments,
        written=written,
        views=aliases and not written,
        reshapes=torch.Tag.inplace_view in func.tags and name not in ("resize_", "resize_as_"),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        into_out=any(schema.arguments[i].is_out for i in written),
        takes_device="device" in arguments,
    )


def argument(func: Any, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What was passed at ``place`` of the schema, by position or by name."""
    return args[place] if place < len(args) else kwargs.get(of(func).arguments[place])

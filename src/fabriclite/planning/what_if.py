"""What single changes of a plan change."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from fabriclite.errors import ConfigError
from fabriclite.planning import text
from fabriclite.planning.plan import Choice, Plan
from fabriclite.planning.text import Table, size


def table(plan: Plan, planned: Callable[[Choice], Plan]) -> Table:
    """Differences to ``plan`` in peak, bytes sent and least time, one change a row; what cannot be is left out."""
    rows = []
    for name, choice in changes(plan.choice):
        try:
            other = planned(choice)
        except ConfigError:
            continue
        rows.append((name, *_differences(plan, other)))
    return Table(
        "What changes would do", ("change", "peak", "sent a step", "operations", "a step at least"), tuple(rows)
    )


def changes(choice: Choice) -> Iterator[tuple[str, Choice]]:
    """Each in words, and the choice that it makes."""
    if choice.checkpointing:
        yield "keep activations", dataclasses.replace(choice, checkpointing=False)
    else:
        yield "activation checkpointing of blocks", dataclasses.replace(choice, checkpointing=True)
    for field, value in _SETTINGS:
        name = f"{field}={value}" if isinstance(value, bool) else "linear layers and embeddings gathered one by one"
        changed = _with(choice, field, value)
        if changed is not None:
            yield name, changed
    precision = choice.precision
    sends = "reshard_after_forward" in _fields(choice)  # FSDP alone sends gradients in a dtype that can be chosen
    if sends and precision.mixed and precision.reduce_dtype == torch.float32:
        lower = dataclasses.replace(precision, reduce_dtype=precision.compute_dtype)
        yield "gradients sent in 16 bits", dataclasses.replace(choice, precision=lower)


_SETTINGS: Final[tuple[tuple[str, Any], ...]] = (
    ("reshard_after_forward", True),
    ("reshard_after_forward", False),
    ("auto_wrap_policy", frozenset({nn.Linear, nn.Embedding})),
    ("cpu_offload", True),
    ("offload_optimizer", True),
    ("offload_parameters", True),
    ("gradient_as_bucket_view", True),
)


def _fields(choice: Choice) -> set[str]:
    config: Any = choice.config
    return {field.name for field in dataclasses.fields(config)}


def _with(choice: Choice, field: str, value: Any) -> Choice | None:
    """The choice with another field of its config; ``None`` where that has none, or says so already."""
    config: Any = choice.config
    if field not in _fields(choice) or getattr(config, field) == value:
        return None
    try:
        return dataclasses.replace(choice, config=dataclasses.replace(config, **{field: value}))
    except ConfigError:
        return None


def _differences(plan: Plan, other: Plan) -> tuple[str, ...]:
    def sent(of: Plan) -> int:
        return sum(item.bytes for item in of.estimate.traffic)

    flops = (other.estimate.flops or 0.0) / (plan.estimate.flops or 1.0)
    step = None if plan.bound.step is None or other.bound.step is None else other.bound.step - plan.bound.step
    return (
        _signed(other.peak - plan.peak, size),
        _signed(sent(other) - sent(plan), size),
        f"x {flops:.2f}" if plan.estimate.flops else "",
        "" if step is None else _signed(step, text.seconds),
    )


def _signed(value: float, words: Callable[[float], str]) -> str:
    return f"{'-' if value < 0 else '+'}{words(abs(value))}" if value else "0"

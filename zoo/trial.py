"""One model of the zoo: built plainly, then recorded and materialised, and the two compared."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn

from fabriclite import Fabric, MaterializeError
from zoo.compare import differences, tensors
from zoo.entry import Entry, NotBuildable, describe

SEED = 1234


class Verdict(StrEnum):
    """How a trial ended."""

    EXACT = "exact"
    REFUSED = "refused, rightly"
    """Its own code leaves parameters uninitialised, and `materialize` said so."""
    WRONG = "wrong"
    ERROR = "error"
    NOT_BUILDABLE = "not buildable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found.

    Attributes:
        verdict: how it ended.
        reasons: differences, the error, or why the model could not be built.
        uninitialised: tensors that the model's own code never writes.
        parameters: how many the model has.
        seconds: of plain construction, and of recording and materialising.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    uninitialised: tuple[str, ...] = ()
    parameters: int = 0
    seconds: tuple[float, float] = field(default=(0.0, 0.0))


def run(entry: Entry) -> Outcome:
    """Build the model in both ways at the same seed and compare."""
    try:
        expected, end, eager = _timed(entry.build)
    except NotBuildable as error:
        return Outcome(Verdict.NOT_BUILDABLE, (str(error),))
    except Exception as error:
        return Outcome(Verdict.NOT_BUILDABLE, (describe(error),))
    blank = uninitialised(entry, expected)
    count = sum(p.numel() for p in expected.parameters())
    fabric = Fabric(accelerator="cpu", devices=1, strategy="single_device", precision="32-true")
    try:
        actual, actual_end, deferred = _timed(lambda: materialized(fabric, entry))
    except MaterializeError as error:
        right = bool(blank) and any(name in str(error) for name in blank)
        return Outcome(Verdict.REFUSED if right else Verdict.ERROR, (describe(error),), blank, count)
    except Exception as error:
        return Outcome(Verdict.ERROR, (describe(error),), blank, count)
    reasons = differences(expected, actual, ignore=blank)
    if not torch.equal(end, actual_end):
        reasons.append("torch's generator ends in another state")
    if blank:
        reasons.append("materialize accepted tensors that are never written")
    return Outcome(Verdict.WRONG if reasons else Verdict.EXACT, tuple(reasons), blank, count, (eager, deferred))


def materialized(fabric: Fabric, entry: Entry) -> nn.Module:
    """The model, recorded and then replayed."""
    with fabric.init_module(empty_init=True):
        model = entry.build()
    return fabric.materialize(model)


def uninitialised(entry: Entry, expected: nn.Module) -> tuple[str, ...]:
    """Tensors of which some element keeps what ``torch.empty`` found, seen by poisoning what it finds."""
    with _poisoned():
        poisoned = tensors(_timed(entry.build)[0])
    plain = tensors(expected)
    return tuple(name for name in plain if name in poisoned and _more_poison(plain[name], poisoned[name]))


def _more_poison(plain: Tensor, poisoned: Tensor) -> bool:
    if plain.shape != poisoned.shape or plain.device.type == "meta" or plain.layout != torch.strided:
        return False
    return int(_poison(poisoned)) > int(_poison(plain))


def _poison(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.isnan().sum()
    if tensor.dtype == torch.bool:  # poisoned with True, which says nothing
        return torch.tensor(0)
    return (tensor == torch.iinfo(tensor.dtype).max).sum()


@contextmanager
def _poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before)


def _timed(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, float]:
    """The model, the generator's state after it, and the time it took, from the zoo's seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    model = build()
    return model, torch.get_rng_state(), time.perf_counter() - start

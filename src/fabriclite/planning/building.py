"""The model of a subject as one rank of a tensor-parallel group has it, without memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fabriclite import _torch
from fabriclite.birth.places import is_lazy, named_tensors, plain_tensors, replace
from fabriclite.birth.plan import InitPlan, enter
from fabriclite.birth.settle import settled
from fabriclite.errors import ConfigError
from fabriclite.launch.process_group import pretended
from fabriclite.planning.recorder import Recorder
from fabriclite.planning.subject import Subject
from fabriclite.precision import Precision
from fabriclite.shards import local
from fabriclite.strategy import StrategyConfig

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Built:
    """A model twice.

    Attributes:
        module: of fake tensors, which one step can be run with.
        skeleton: on the meta device, before it was split.
        building: the most bytes that its constructor held, were they real.
    """

    module: nn.Module
    skeleton: nn.Module
    building: int


@contextmanager
def built(
    subject: Subject, precision: Precision, tensor: int, config: StrategyConfig | None, fake: Any, device: torch.device
) -> Iterator[Built]:
    """The model of ``subject``; within it a process group of ``tensor`` ranks is pretended, if that is more than one.

    Args:
        subject: what is planned.
        precision: parameters are made in its dtype.
        tensor: ranks that share one matrix product.
        config: knows how they do.
        fake: a fake mode, not entered.
        device: where its tensors say they are.

    Raises:
        ConfigError: ``build`` made no module, or one with parameters whose shape the first batch decides; ``tensor`` is
            more than one without a config.
    """
    if tensor > 1 and config is None:
        raise ConfigError(
            f"`config` must be a ModelParallelStrategy when `tensor` is {tensor}, but is None. It says what is split."
        )
    plan, births = InitPlan.of(record=True, device=CPU, dtype=precision.param_dtype), Recorder((), 1)
    with torch.random.fork_rng(devices=[]), enter(plan), births:
        module = subject.build()
    _check(module)
    with settled(module, None, precision) as pair:
        module = pair[0]
        del pair  # its births would keep recorded tensors alive, which nothing is to wait for
        skeleton = deepcopy(module)
        _to_meta(skeleton)
        with pretended(tensor):
            if config is not None and tensor > 1:
                module = config.split(module, tensor)
            with fake:
                _fake_all(module, device)
            yield Built(module, skeleton, births.most())


def _check(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"`build` must return an nn.Module, but returned {type(module).__name__}. Add a return.")
    lazy = [name for name, tensor in named_tensors(module) if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"A model must know its shapes to be planned, but {lazy[0]} gets its own from the first batch."
            " Run one batch in `build`, or give the sizes."
        )


def _to_meta(module: nn.Module) -> None:
    for sub in module.modules():
        for store in (sub._parameters, sub._buffers):
            for key, tensor in store.items():
                if tensor is not None and tensor.device.type != "meta":
                    store[key] = _like(tensor, tensor.detach().to("meta"))  # type: ignore[assignment]


def _fake_all(module: nn.Module, device: torch.device) -> None:
    """Put fake tensors in place of all that ``module`` holds. Call inside of a fake mode."""
    done: dict[int, Tensor] = {}
    for sub in module.modules():
        for store in (sub._parameters, sub._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = done.setdefault(id(tensor), _fake(tensor, device))  # type: ignore[assignment]
        for old in plain_tensors(sub):
            replace(sub, old, done.setdefault(id(old), _fake(old, device)))


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    inner = local(tensor.detach())
    new = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device=device)
    return _like(tensor, _wrapped(tensor, new))


def _wrapped(tensor: Tensor, new: Tensor) -> Tensor:
    """``new`` as the local part of what ``tensor`` is."""
    if local(tensor) is tensor:
        return new
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        new, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def cast(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Put parameters of other dtypes, by name, in place of those that ``module`` has. Call inside of a fake mode."""
    done: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        dtype = dtypes.get(name)
        if dtype is None or dtype == old.dtype:
            continue
        if id(old) not in done:
            inner = local(old.detach())
            new = torch.empty_strided(inner.shape, inner.stride(), dtype=dtype, device=inner.device)
            done[id(old)] = nn.Parameter(_wrapped(old, new), requires_grad=old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, done[id(old)])


def fake_inputs(subject: Subject, batch: int, sequence: int | None, device: torch.device) -> Any:
    """``(args, kwargs)`` of one forward. Call inside of a fake mode.

    Raises:
        ConfigError: ``inputs`` gave something else.
    """
    given = subject.inputs(batch, sequence)
    if not (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict)
    ):
        raise ConfigError(
            f"`inputs` must return (args, kwargs), a tuple and a dictionary, but returned {type(given).__name__}."
            " Example: lambda batch, sequence: ((tokens,), {})."
        )

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)

    return _torch.tree_map(fake, given)

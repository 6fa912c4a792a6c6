"""What all ranks hold of a module, compared."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import nn

from fabriclite import collectives
from fabriclite.errors import MaterializeError, NonFiniteGradientError
from fabriclite.strategy import Strategy
from fabriclite.world import World

if TYPE_CHECKING:
    from fabriclite.birth.verify import Promise


def verify(strategy: Strategy, engine: nn.Module, promise: "Promise", at_birth: bool) -> None:
    """Raise unless ``engine`` holds what ``promise`` says, on every rank. Every rank must call this.

    Raises:
        MaterializeError: every finding names the tensor and the cause.
    """
    from fabriclite.birth import verify

    parts = strategy.local_parts(engine)
    own = verify.own_findings(promise, parts, verify.ties_of(strategy.user_module(engine)))
    told = collectives.gather_objects(strategy.world, (verify.names_digest(parts), own, promise.loaded))
    found = verify.of_all([(names, findings) for names, findings, _ in told])
    if len({names for names, _, _ in told}) == 1:
        just_read = at_birth and len({loaded for _, _, loaded in told}) == 1
        looks = collectives.all_gather(strategy.world, verify.look(parts, promise, just_read).to(strategy.world.device))
        found += verify.findings(promise, list(parts), looks, at_birth)
    if found:
        raise MaterializeError(
            f"The {promise.kind} must hold the values that its code gives, on every rank, but:"
            f" {'; '.join(found)}. Build it inside init_module, set it up, and change it only through what setup"
            " returned."
        )


def same_on_all(world: World, module: nn.Module) -> None:
    """Raise unless the parameters of ``module`` are alike on all ranks: strategies send them by their order, and a rank
    with others would wait in vain, or read one parameter as another. Every rank must call this.

    Raises:
        MaterializeError: names the first that differs; on every rank.
    """
    if world.size == 1:
        return
    own = [
        f"{name} {list(p.shape)} {str(p.dtype).removeprefix('torch.')}{'' if p.requires_grad else ' frozen'}"
        for name, p in module.named_parameters()
    ]
    digest = hashlib.blake2b("\n".join(own).encode(), digest_size=16).digest()
    if len(set(collectives.gather_objects(world, digest))) == 1:
        return
    told = collectives.gather_objects(world, own)
    rank = next(rank for rank, theirs in enumerate(told) if theirs != told[0])
    here, there = next(pair for pair in zip_longest(told[0], told[rank], fillvalue="nothing") if pair[0] != pair[1])
    raise MaterializeError(
        f"All ranks must build the same model, but where the {type(module).__name__} of rank 0 has {here}, that of rank"
        f" {rank} has {there}. Let no part of the model's code depend on the rank."
    )


@contextmanager
def naming_gradients(strategy: Strategy, engine: nn.Module) -> Iterator[None]:
    """Add to an error about gradients that are not finite the names of those on this rank.

    Gradients flow from the loss to the input: the one nearest to the loss tells most. No other rank is asked, since
    where gradients were not made to agree only some ranks raise.
    """
    from fabriclite.shards import local  # its DTensor costs 0.6 s to import

    try:
        yield
    except NonFiniteGradientError as error:
        strategy.hand_out(engine)
        grads = {n: local(p.grad) for n, p in strategy.user_module(engine).named_parameters() if p.grad is not None}
        bad = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
        if bad:
            told = (
                f"On rank {strategy.world.rank} {len(bad)} of {len(grads)} gradients are not finite; the last of them,"
            )
            error.args = (f"{error} {told} in the order of the model's parameters, is that of {bad[-1]}.",)
        raise

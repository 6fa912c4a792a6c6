"""What all ranks hold of a module, compared."""

from typing import TYPE_CHECKING

from torch import nn

from fabriclite import collectives
from fabriclite.errors import MaterializeError
from fabriclite.strategy import Strategy

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

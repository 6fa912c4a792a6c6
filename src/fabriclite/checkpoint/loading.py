"""Loading as ``Fabric`` offers it: any form, into any strategy, all or nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabriclite import seed
from fabriclite.checkpoint import disk, sums
from fabriclite.checkpoint.agree import READER_S_ADVICE, Crew
from fabriclite.checkpoint.formats import OWN
from fabriclite.checkpoint.parts import Part
from fabriclite.checkpoint.read.kinds import located
from fabriclite.checkpoint.read.source import Opened, open_checkpoint
from fabriclite.errors import CheckpointError
from fabriclite.stored import Stored, in_memory
from fabriclite.strategy import Strategy


def load(
    strategy: Strategy, path: str | Path, parts: Mapping[str, Part] | None, strict: bool, weights_only: bool
) -> dict[str, Any]:
    """Read a checkpoint of any form into ``parts``. Every rank must call this.

    The files are compared with their checksums, and all entries with what is to take them, before anything changes.
    With an optimizer among the parts, the run goes on: loss scale and random states are put back too.

    Returns:
        What the checkpoint holds beyond ``parts``, less what is sharded there; without ``parts`` all, tensors whole.

    Raises:
        CheckpointError: it cannot be read, is damaged, or does not fit; raised on every rank.
    """
    crew = Crew(strategy.world, advice=READER_S_ADVICE)
    opened = _open(crew, disk.located(path), weights_only)
    tree = opened.tree
    if parts is None:
        return {key: in_memory(value) for key, value in tree.items() if key != OWN}
    missing = [key for key in parts if key not in tree]
    if missing and strict:
        raise CheckpointError(
            f"{path} must hold {', '.join(parts)}, but lacks {', '.join(missing)}. It holds:"
            f" {', '.join(k for k in tree if k != OWN)}. Pass strict=False to load what is there."
        )
    # Modules first: an optimizer may hold master weights, which a module's would round.
    order = sorted((key for key in parts if key not in missing), key=lambda key: parts[key].module() is None)
    fits = crew.on_all(lambda: {key: parts[key].checked(tree[key], strict) for key in order}, f"load {path}")
    crew.on_all(lambda: _load_all(parts, fits), f"load {path}")
    if any(part.resumes for part in parts.values()):
        _resume(strategy, tree.get(OWN, {}))
    others = [key for key in tree if key not in parts and key != OWN]
    return {key: in_memory(tree[key]) for key in others if opened.kind == "file" or not _holds_stored(tree[key])}


def _load_all(parts: Mapping[str, Part], fits: Mapping[str, Any]) -> None:
    for key, value in fits.items():
        parts[key].load(value)


def _open(crew: Crew, path: Path, weights_only: bool) -> Opened:
    where = crew.on_rank_zero(lambda: located(path), f"find {path}")
    crew.on_all(lambda: sums.verify(where, (crew.world.rank, crew.world.size)), f"verify {path}")
    return crew.on_all(lambda: open_checkpoint(where, weights_only), f"read {path}")


def _holds_stored(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(_holds_stored(value) for value in tree.values())
    return isinstance(tree, Stored)


def _resume(strategy: Strategy, extra: Mapping[str, Any]) -> None:
    if extra.get("scaler"):
        strategy.scaler.load_state_dict(extra["scaler"])
    states = extra.get("rng", [])
    if len(states) == strategy.world.size:  # another number of ranks has no streams to go on with
        seed.set_rng_state(states[strategy.world.rank])

"""Seeds: of this process, and of data-loading workers."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fabriclite.errors import ConfigError

_LIMIT = 2**32


class _Chosen:
    """What ``seed_everything`` was told, for data loaders made later. One per process, as the generators it seeds."""

    workers: bool = False


def seed_everything(
    seed: int | None = None, workers: bool | None = None, verbose: bool = True, *, rank: int | None = None
) -> int:
    """Seed Python, NumPy and torch (all devices) of this process.

    Args:
        seed: in ``[0, 2**32)``; ``None`` draws one.
        workers: also give each worker process of each rank's data loaders a stream of its own.
        verbose: print a seed that was drawn, so that the run can be repeated.
        rank: ``None`` gives every rank the same numbers, which models and loaders want: then no rank has to send its
            own to the others. ``rank=fabric.global_rank`` gives each a stream of its own, for noise, masks or
            augmentation; call it after model and loaders are set up.

    Returns:
        The seed; the one given, also with ``rank``.

    Raises:
        ConfigError: the seed is out of range, or the rank is none.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(_LIMIT)
        if verbose:
            print(f"Seed drawn: {seed}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _LIMIT:
        raise ConfigError(f"`seed` must be a whole number in [0, 2**32), but is {seed!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ConfigError(f"`rank` must be None or a rank, as fabric.global_rank is, but is {rank!r}.")
    own = seed if rank is None else random.Random(f"{seed}/{rank}").getrandbits(32)  # a str seeds by its hash in full
    random.seed(own)
    torch.manual_seed(own)
    np.random.seed(own)
    _Chosen.workers = bool(workers)
    return seed


def worker_init(rank: int) -> Callable[[int], None] | None:
    """A ``worker_init_fn`` that tells ranks apart, if ``seed_everything(workers=True)`` asked for it."""
    return _SeedWorker(rank) if _Chosen.workers else None


class _SeedWorker:
    """Torch seeds worker ``i`` with ``base + i``, alike on ranks whose generators agree; this adds the rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, worker: int) -> None:
        mixed = random.Random(f"{torch.initial_seed()}/{worker}/{self.rank}")  # a str seeds by its hash in full
        random.seed(mixed.getrandbits(64))
        torch.manual_seed(mixed.getrandbits(63))
        np.random.seed(mixed.getrandbits(32))


@contextmanager
def seeded(seed: int, *generators: torch.Generator) -> Iterator[None]:
    """Draw on the host (torch, Python, NumPy and ``generators``) from ``seed``; what was before is put back after."""
    # not torch.manual_seed: it would seed the accelerators too
    before, own = host_rng_state(), [generator.get_state() for generator in generators]
    for generator in (torch.default_generator, *generators):
        generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % _LIMIT)
    try:
        yield
    finally:
        set_rng_state(before)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)


def carried() -> dict[str, Any]:
    """What a new process must know to go on as this one would. Starts no accelerator: it may be forked next."""
    return {"rng": host_rng_state(), "workers": _Chosen.workers}


def carry_on(state: dict[str, Any]) -> None:
    """In a new process, take over what :func:`carried` gave."""
    set_rng_state(state["rng"])
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(torch.initial_seed())
    _Chosen.workers = state["workers"]


def rng_state() -> dict[str, Any]:
    """The generators' states of this process as tensors, numbers and tuples (loads with ``weights_only``)."""
    state = host_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def host_rng_state() -> dict[str, Any]:
    """:func:`rng_state` without the accelerator's, which asking for would start."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    kind, keys, *rest = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state["numpy"] = (str(kind), words, *(float(v) if isinstance(v, float) else int(v) for v in rest))
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))

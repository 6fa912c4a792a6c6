"""A module's state: whether one fits it, and how it is put back. The module may be sharded, recorded, or neither."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fabriclite import _torch, shards
from fabriclite.birth import session
from fabriclite.errors import CheckpointError
from fabriclite.stored import Stored


@torch.no_grad()
def load_into(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy what ``state`` has of ``module``'s names into its tensors in place, of each this rank's part.

    Extra state (``get_extra_state``) is handed to its module. A recorded tensor only notes where its values lie.

    Args:
        module: any.
        state: checked by :func:`check_fits`; tensors are whole, sharded alike, or in a file.
    """
    own = module.state_dict(keep_vars=True)
    reads: list[tuple[Tensor, Stored]] = []
    for name, value in state.items():
        if name not in own:
            continue
        if shards.is_extra(name):
            module.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        elif isinstance(own[name], Tensor) and isinstance(value, Stored):
            if not _noted(own[name], value):
                reads.append((own[name], value))
        elif isinstance(own[name], Tensor):
            shards.write(own[name], value)
    _read_all(reads)


def put(target: Tensor, value: Tensor | Stored) -> None:
    """Give ``target`` the values of ``value``, of the same shape."""
    if not isinstance(value, Stored) or not _noted(target, value):
        shards.write(target, value)


def _noted(target: Tensor, value: Stored) -> bool:
    """Whether ``target`` was recorded; then it is noted where its values lie."""
    recording = session.current()
    if recording is None:
        return False
    with _torch.raw():
        if not recording.knows(target):
            return False
        recording.load(target, value)
        return True


def _read_all(reads: Sequence[tuple[Tensor, Stored]]) -> None:
    """Read into memory that is there, with as many threads as torch computes with."""
    threads = min(torch.get_num_threads(), len(reads))
    if threads < 2 or torch.is_inference_mode_enabled():  # which other threads would not be in
        for target, value in reads:
            shards.write(target, value)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(shards.write, target, value) for target, value in reads]:
            done.result()


def check_fits(own: Mapping[str, Any], state: Mapping[str, Any], strict: bool) -> None:
    """Raise, naming every key, unless ``state`` fits ``own``. Pure.

    Args:
        own: the module's state, or stand-ins of full shape.
        state: what is to replace it.
        strict: names must be the same on both sides.

    Raises:
        CheckpointError: names are missing or unexpected (``strict``), or a shape differs.
    """
    with _torch.raw():  # of a recorded tensor too, shapes are torch's to tell
        _check_fits(own, state, strict)


def _check_fits(own: Mapping[str, Any], state: Mapping[str, Any], strict: bool) -> None:
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    wrong = [
        f"{k}: {_look(own[k])} here, {_look(v)} in the checkpoint"
        for k, v in state.items()
        if isinstance(own.get(k), Tensor) and not shards.is_extra(k) and _look(v) != _look(own[k])
    ]
    names = f"missing: {missing or 'none'}; unexpected: {unexpected or 'none'}."
    if wrong:
        also = f" Also {names}" if strict and (missing or unexpected) else ""
        raise CheckpointError(
            f"Shapes must agree with the checkpoint's, but do not: {'; '.join(wrong)}.{also}"
            " Build the model with the sizes it was saved with."
        )
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The checkpoint must hold just the module's keys, but {names} Pass strict=False to load what fits."
        )


def _look(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor | Stored) else f"no tensor but {type(value).__name__}"


def tied_names(module: nn.Module) -> list[list[str]]:
    """Names in the module's state that are one tensor, where there are several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _named(module):
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _named(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)

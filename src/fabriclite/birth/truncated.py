"""``torch.nn.init.trunc_normal_`` on a recorded tensor, as one operation.

Since torch 2.12 it draws normals, and draws all of them again for as long as one is outside of its bounds, keeping
those that were inside. So the value of an element is its first draw that is inside, found for a part alone.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from fabriclite import _torch
from fabriclite.birth import draws, facts
from fabriclite.birth.record import Recorder
from fabriclite.birth.replay import Hand, at_rest
from fabriclite.birth.streams import At

MACRO: Final = facts.Macro("trunc_normal_", _torch.trunc_normal_of_torch())
_NEVER: Final = 9.0
"""Standard deviations that no 32-bit draw reaches: the farthest is at 6.7, for 64 bits at 8.6."""
_PART: Final = 1 << 20
_RESAMPLES_FROM: Final = 0.3
"""Below this chance of being inside torch goes another way."""


def for_recorded(recorder: Recorder) -> Callable[..., Tensor]:
    """What takes the place of torch's own function while ``recorder`` records."""
    recording = recorder.recording

    def trunc_normal(
        tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> Tensor:
        with _torch.raw():
            recorded = recording.knows(tensor)
        if not recorded or not by_rejection():
            return MACRO.run(tensor, mean, std, a, b, generator=generator)  # type: ignore[no-any-return]
        if min(b - mean, mean - a) > _NEVER * std > 0:
            with torch.no_grad():  # nothing is ever outside: the same as
                return tensor.normal_(mean, std, generator=generator)
        with _torch.no_modes():
            stream = recording.stream(generator, recording.device(tensor))
            rounds = None
            if in_parts(tensor, mean, std, a, b) and stream.generator.device.type == "cpu":
                once = draws.normal_count(tensor.numel(), tensor.dtype)
                stream.look()
                here = stream.draw(0)
                rounds = _rounds(tensor, here, (mean, std, a, b))
                recorder.note_macro(MACRO, tensor, (mean, std, a, b), stream.draw(rounds * once))
            else:
                draw = stream.held()
                with at_rest():
                    scratch = torch.empty_strided(
                        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=recording.device(tensor)
                    )
                    MACRO.run(scratch, mean, std, a, b, generator=stream.generator)
                stream.look()
                recorder.note_macro(MACRO, tensor, (mean, std, a, b), draw)
        return tensor

    return trunc_normal


def in_parts(tensor: Any, mean: float, std: float, a: float, b: float) -> bool:
    """Whether :func:`fill_part` draws what torch draws. ``tensor`` tells dtype, number of elements and layout."""
    contiguous = tensor.is_contiguous() if isinstance(tensor, Tensor) else tensor.contiguous
    numel = tensor.numel() if isinstance(tensor, Tensor) else tensor.numel
    if std <= 0 or not contiguous or not draws.by_parts("normal", numel, tensor.dtype):
        return False
    inside = (math.erf((b - mean) / std / math.sqrt(2)) - math.erf((a - mean) / std / math.sqrt(2))) / 2
    return inside > _RESAMPLES_FROM


@cache
def by_rejection() -> bool:
    """Whether the running torch rejects and draws again, as this file says; up to 2.11 it transforms uniforms, step by
    step without a look at a value, which are then recorded as they are."""
    generator, whole = torch.Generator().manual_seed(3), torch.empty(64, device="cpu")
    before = generator.get_state()
    with torch.no_grad():
        MACRO.run(whole, 0.0, 1.0, -0.5, 1.0, generator=generator)

    def seek(place: int, _: int) -> torch.Generator:
        at = torch.Generator().set_state(before)
        if place:
            torch.empty(place, device="cpu").uniform_(generator=at)
        return at

    part = torch.empty(20, device="cpu")
    fill_part(part, 30, 64, (0.0, 1.0, -0.5, 1.0), seek)
    return torch.equal(part, whole[30:50])


def fill_part(out: Tensor, begin: int, n: int, args: tuple[float, ...], seek: draws.Seek) -> int:
    """Fill ``out`` as :func:`draws.fill_part` does; gives the number of rounds until all were inside.

    Args:
        out, begin, n, seek: as there.
        args: mean, standard deviation, lower and upper bound.
    """
    mean, std, a, b = args
    low, high = (torch.tensor(bound, dtype=out.dtype, device="cpu").item() for bound in (a, b))
    once = draws.normal_count(n, out.dtype)
    draws.fill_part("normal", out, begin, n, (mean, std), seek)
    rounds, again = 1, None
    while bool((outside := (out < low) | (out > high)).any()):
        first = rounds * once
        again = torch.empty_like(out) if again is None else again
        draws.fill_part("normal", again, begin, n, (mean, std), lambda place, count: seek(first + place, count))  # noqa: B023
        torch.where(outside, again, out, out=out)
        rounds += 1
    return rounds


def _rounds(like: Tensor, here: At, args: tuple[float, ...]) -> int:
    """How often the whole is drawn; found part by part, in little memory."""
    hand, n, most = Hand(), like.numel(), 1
    with at_rest():
        part = torch.empty(min(n, _PART), dtype=like.dtype, device="cpu")
        for begin in range(0, n, _PART):
            out = part[: min(_PART, n - begin)]
            most = max(most, fill_part(out, begin, n, args, lambda place, count: hand.at(here, place, count)))
    return most

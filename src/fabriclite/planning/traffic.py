"""What one rank sends in a step, over which link. Pure: a layout, the groups that are gathered, and where ranks are.

Collectives are counted as rings make them: of ``n`` ranks, each sends ``(n - 1) / n`` of what is gathered or
reduce-scattered, and twice that to all-reduce. Neighbours in a ring are on one machine where they can be; with ``k``
ranks of a ring on each machine (and as many rings, one to a network adapter) one message of ``k`` leaves it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

from fabriclite.layout import Layout, Link
from fabriclite.planning.hardware import Hardware
from fabriclite.planning.values import Traffic

Pattern = Literal["all-gather", "reduce-scatter", "all-reduce"]
_ROUNDS: Final[Mapping[Pattern, int]] = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True, slots=True)
class Parcel:
    """Parameters that travel together.

    Attributes:
        elements: how many, on one rank of tensor parallelism, by dtype at rest.
        trainable: of them, how many get gradients, by dtype.
        root: whether it is what no other group took.
        wire: floating-point numbers are gathered in it; ``None``: in that which they have at rest.
        calls: in so many collectives.
    """

    elements: Mapping[torch.dtype, int]
    trainable: Mapping[torch.dtype, int]
    root: bool = False
    wire: torch.dtype | None = None
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Axis:
    """Ranks of one collective: ``size`` of them, ``stride`` apart."""

    size: int
    stride: int

    def shares(self, ranks_per_node: int) -> dict[Link, float]:
        """Which part of what a rank sends goes over which link."""
        if self.size == 1:
            return {}
        if self.size * self.stride <= ranks_per_node:
            return {"node": 1.0}
        together = min(self.size, max(1, ranks_per_node // self.stride))
        shares: dict[Link, float] = {"network": 1 / together}
        if together > 1:
            shares["node"] = (together - 1) / together
        return shares


def axes(layout: Layout) -> dict[str, Axis]:
    """Tensor parallelism is innermost, then sharding, then replicas: the order of the meshes that strategies make."""
    return {
        "tensor": Axis(layout.tensor, 1),
        "shard": Axis(layout.shard, layout.tensor),
        "replicate": Axis(layout.replicate, layout.tensor * layout.shard),
    }


def collective(pattern: Pattern, of: str, size: int, calls: int, axis: Axis, ranks_per_node: int) -> list[Traffic]:
    """One kind of collective over ``axis``: ``size`` bytes of whole tensors, in all calls together."""
    sent = _ROUNDS[pattern] * size * (axis.size - 1) / axis.size
    shares = axis.shares(ranks_per_node) if sent else {}
    return [Traffic(f"{pattern} of {of}", link, round(sent * share), calls) for link, share in shares.items()]


def of_data_parallelism(parcels: Sequence[Parcel], layout: Layout, ranks_per_node: int) -> list[Traffic]:
    """What travels so that all ranks step the same model, offloading included. Buffers that DDP sends are left out."""
    axis = axes(layout)
    found: list[Traffic] = []
    if layout.gathers:
        found += _gathered(parcels, layout, axis["shard"], ranks_per_node)
    shards = layout.shards_optimizer and layout.shard > 1
    gradients, calls = _gradients(parcels, layout), _gradient_calls(parcels, layout)
    if shards:
        found += collective("reduce-scatter", "gradients", gradients, calls, axis["shard"], ranks_per_node)
    else:
        replicas = Axis(layout.data, layout.tensor)
        return found + collective("all-reduce", "gradients", gradients, calls, replicas, ranks_per_node)
    if layout.replicate > 1:
        part = -(-gradients // layout.shard)
        found += collective("all-reduce", "gradients' shards", part, calls, axis["replicate"], ranks_per_node)
    if not layout.gathers:
        found += collective("all-gather", "stepped parameters", _learned(parcels), calls, axis["shard"], ranks_per_node)
    return found


def to_host(parcels: Sequence[Parcel], layout: Layout) -> list[Traffic]:
    """What offloading moves between a device and its host."""
    gradients = _learned(parcels) // layout.shard
    stepped = [Traffic("offloaded gradients", "host", gradients, len(parcels))]
    if layout.parameters_on_host:
        times = _gathers(parcels, layout)
        moved = sum(n * _size(parcel.elements, None) for n, parcel in zip(times, parcels, strict=True))
        return [Traffic("offloaded parameters", "host", moved // layout.shard, sum(times)), *stepped]
    if layout.optimizer_on_host:
        return [*stepped, Traffic("stepped parameters", "host", gradients, len(parcels))]
    return []


def timed(traffic: Iterable[Traffic], hardware: Hardware) -> tuple[Traffic, ...]:
    """The same with the least time each takes, where a bandwidth is given."""

    def seconds(item: Traffic) -> float | None:
        bandwidth = hardware.bandwidth(item.link)
        return None if bandwidth is None else item.bytes / bandwidth

    return tuple(replace(item, seconds=seconds(item)) for item in traffic)


def _gathered(parcels: Sequence[Parcel], layout: Layout, axis: Axis, ranks_per_node: int) -> list[Traffic]:
    again = [parcel for parcel, times in zip(parcels, _gathers(parcels, layout), strict=True) if times > 1]

    def once(of: Sequence[Parcel], when: str) -> list[Traffic]:
        size = sum(_size(parcel.elements, parcel.wire) for parcel in of)
        calls = sum(parcel.calls for parcel in of)
        return collective("all-gather", f"parameters in {when}", size, calls, axis, ranks_per_node)

    return once(parcels, "forward") + once(again, "backward")


def _gathers(parcels: Sequence[Parcel], layout: Layout) -> list[int]:
    """How often each group is gathered in a step: FSDP keeps the root after forward unless it is told not to."""
    resharded = layout.reshard_after_forward
    return [2 if (not parcel.root if resharded is None else resharded) else 1 for parcel in parcels]


def _gradients(parcels: Sequence[Parcel], layout: Layout) -> int:
    """Bytes of all gradients as they travel: their own dtype, or ``reduce_dtype`` where FSDP is told another."""
    chosen = layout.groups is not None and layout.param_dtype != layout.reduce_dtype
    dtype = layout.reduce_dtype if chosen else None
    return sum(_size(parcel.trainable, dtype) for parcel in parcels)


def _gradient_calls(parcels: Sequence[Parcel], layout: Layout) -> int:
    if layout.bucket_numel:
        return -(-sum(n for parcel in parcels for n in parcel.trainable.values()) // layout.bucket_numel)
    if layout.gathers or not layout.bucket_bytes:
        return sum(1 for parcel in parcels if sum(parcel.trainable.values()))
    return -(-_learned(parcels) // layout.bucket_bytes)


def _learned(parcels: Sequence[Parcel]) -> int:
    """Bytes of what gets gradients, at rest."""
    return sum(_size(parcel.trainable, None) for parcel in parcels)


def _size(elements: Mapping[torch.dtype, int], dtype: torch.dtype | None) -> int:
    """Bytes; floating-point numbers in ``dtype`` if one is given."""
    return sum(
        n * (own if dtype is None or not own.is_floating_point else dtype).itemsize for own, n in elements.items()
    )

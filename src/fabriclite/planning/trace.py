"""What one step of a model does with memory, as values: the result of a trace, and what an estimate starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import nn

from fabriclite.layout import Group
from fabriclite.planning.values import Phase

What = Literal["enter", "leave", "enter backward", "leave backward", "gradient", "forward ends", "backward ends"]


class Mark(NamedTuple):
    """Something that happens between two operations, at which a strategy may act.

    Attributes:
        what: a module's forward or backward begins or ends, a parameter's gradient is complete, or a phase ends.
        name: of the module or parameter.
        bytes: of the gradient.
    """

    what: What
    name: str = ""
    bytes: int = 0


class Held(NamedTuple):
    """Bytes that the model's own operations hold: the kinds that no strategy changes."""

    activations: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.temporary


class Beat(NamedTuple):
    """The operations between two marks.

    Attributes:
        phase: ``"forward"`` or ``"backward"``.
        module: the module at whose operation the most was held.
        peak: the most that was held.
        end: what is held after them.
        mark: what happens then.
    """

    phase: Phase
    module: str
    peak: Held
    end: Held
    mark: Mark


@dataclass(frozen=True, slots=True)
class Step:
    """One forward and backward.

    Attributes:
        beats: in order.
        flops: floating-point operations of matrix products, convolutions and attention, with recomputation.
        by_module: bytes held at the end of forward, by the module that made them; largest first.
        kernels: attention kernels that ran.
    """

    beats: tuple[Beat, ...]
    flops: float
    by_module: Mapping[str, int]
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter, as one rank of a tensor-parallel group holds it before it is sharded.

    Attributes:
        name: its first name, if it has several.
        shape: on this rank.
        whole: number of elements over all tensor-parallel ranks.
        dtype: at rest.
        trainable: whether it gets a gradient.
    """

    name: str
    shape: tuple[int, ...]
    whole: int
    dtype: torch.dtype
    trainable: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def rows(self, ranks: int) -> int:
        """Elements of the largest part when the first dimension is cut over ``ranks``; a scalar is not cut."""
        if not self.shape or ranks == 1:
            return self.numel
        return -(-self.shape[0] // ranks) * prod(self.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizing:
    """What an optimizer keeps and needs, per element of the parameters it steps.

    Attributes:
        like: state elements in the dtype of the parameter.
        other: bytes of states of another dtype that grow with the parameter.
        fixed: bytes of state per parameter that do not grow with it.
        temporary: elements held at the peak of a step beside state and gradients.
        together: the same, where all is one tensor.
    """

    like: float
    other: float
    fixed: float
    temporary: float
    together: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One step of one model at one batch, of which layouts are estimated.

    Attributes:
        model: its name.
        batch, sequence: of the inputs.
        precision: its name.
        tensor: ranks that share one matrix product.
        device: type of the device that is planned for.
        simulated: type of the device whose kernels were traced; another one where this torch cannot trace ``device``.
        weights: parameters, each once.
        buffers: bytes of the model's buffers.
        building: the most bytes that the constructor held, were its tensors real.
        inputs: bytes of one batch.
        steps: by the dtype that parameters of ``precision.param_dtype`` compute in when they are gathered.
        optimizing: what the optimizer takes.
        skeleton: the model on the meta device, to choose groups from.
    """

    model: str
    batch: int
    sequence: int | None
    precision: str
    tensor: int
    device: str
    simulated: str
    weights: tuple[Weight, ...]
    buffers: int
    building: int
    inputs: int
    steps: Mapping[torch.dtype, Step]
    optimizing: Optimizing
    skeleton: nn.Module = field(repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(weight.whole for weight in self.weights)

    def named(self) -> dict[str, Weight]:
        return {weight.name: weight for weight in self.weights}

    def gathered(self, groups: tuple[Group, ...]) -> list[tuple[str, list[tuple[int, torch.dtype]], bool]]:
        """Groups as ``(module, [(elements, dtype)], root or not)``, innermost first, the root last. Pure.

        Elements are those of one tensor-parallel rank.

        Args:
            groups: such as ``estimate.groups_of(trace, layout.groups)``.
        """
        weights = self.named()
        found = []
        for group in groups:
            sizes = [(weights[name].numel, group.dtype or weights[name].dtype) for name in group.parameters]
            found.append((group.module, sizes, group.module == ""))
        return found

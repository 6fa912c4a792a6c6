"""Random programs of initialisation, run plainly and recorded: what they leave must be the same to the bit.

A program is a list of steps over a small pool of tensors. Each step picks its operands by number, so that every list is
a valid program and shrinks to a short one.
"""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fabriclite import Fabric
from patterns import seed
from snapshots import differences, moved, rng_states, snapshot

pytestmark = pytest.mark.skipif(not hasattr(Fabric, "materialize"), reason="there is no Fabric.materialize yet")

Step = tuple[str, int, int]
"""What is done, to which tensor, and in which form."""

SHAPES: Final = ((1,), (7,), (15,), (16,), (17,), (33,), (7, 5), (3, 17), (16, 4), (2, 3, 5), (0, 3), ())
DTYPES: Final = (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Program(nn.Module):
    """Runs ``steps`` in its ``__init__``. Everything that a step makes is held under a name of its own."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.pool: list[Tensor] = []
        self.read: list[Any] = []
        self.hold(nn.Parameter(torch.randn(7, 5)))
        with torch.no_grad():
            for what, which, form in steps:
                STEPS[what](self, which, form)

    def hold(self, tensor: Tensor) -> None:
        name = f"t{len(self.pool)}"
        self.pool.append(tensor)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def any(self, which: int) -> Tensor:
        return self.pool[which % len(self.pool)]

    def floating(self, which: int) -> Tensor:
        found = [tensor for tensor in self.pool if tensor.is_floating_point()]
        return found[which % len(found)]


def view_of(tensor: Tensor, form: int) -> Tensor:
    """The whole, or a part of it that shares its memory."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    views: list[Callable[[], Tensor]] = [
        lambda: tensor,
        lambda: tensor.data,
        lambda: tensor[0],
        lambda: tensor[..., ::2],
        lambda: tensor[1:],
        lambda: tensor.chunk(3)[-1],
        lambda: tensor.transpose(0, -1),
        lambda: tensor.narrow(-1, 0, 1),
        lambda: tensor.unsqueeze(0).expand(1, *tensor.shape)[0],
        lambda: tensor.diagonal() if tensor.dim() > 1 else tensor[-1:],
        lambda: tensor.flatten()[3:] if tensor.is_contiguous() else tensor,
        lambda: tensor.detach().unbind(-1)[-1],
    ]
    return views[form % len(views)]()


# -- steps: makers -----------------------------------------------------------------------------------------------------


def make(program: Program, which: int, form: int) -> None:
    shape, dtype = SHAPES[form % len(SHAPES)], DTYPES[which % len(DTYPES)]
    factories: list[Callable[[], Tensor]] = [
        lambda: torch.randn(shape, dtype=dtype),
        lambda: torch.rand(shape, dtype=dtype),
        lambda: torch.zeros(shape, dtype=dtype),
        lambda: torch.full(shape, 1.5),
        lambda: torch.empty(shape, dtype=dtype).normal_(0.5, 2),
        lambda: torch.linspace(0, 1, 17),
        lambda: torch.randn(shape, dtype=dtype).add(1).mul(0.02),
    ]
    program.hold(nn.Parameter(factories[which % len(factories)]()))


def make_whole_numbers(program: Program, which: int, form: int) -> None:
    factories: list[Callable[[], Tensor]] = [
        lambda: torch.randint(0, 99, SHAPES[form % len(SHAPES)]),
        lambda: torch.randperm(form + 3),
        lambda: torch.arange(form, form + 7),
        lambda: torch.tensor([form, which]),
    ]
    program.hold(factories[which % len(factories)]())


def make_layer(program: Program, which: int, form: int) -> None:
    layers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(form + 1, which + 1),
        lambda: nn.Embedding(form + 1, 5, padding_idx=0),
        lambda: nn.Conv1d(3, form + 1, 3),
    ]
    layer = layers[which % len(layers)]()
    for param in layer.parameters():
        program.hold(param)


# -- steps: in place ---------------------------------------------------------------------------------------------------


def fill(program: Program, which: int, form: int) -> None:
    """A random fill of a view."""
    target = view_of(program.floating(which), form)
    fills: list[Callable[[], Any]] = [
        lambda: target.normal_(0, 0.02),
        lambda: target.uniform_(-1, 1),
        lambda: nn.init.trunc_normal_(target, std=1.0, a=-1.0, b=0.5),
        lambda: target.bernoulli_(0.3),
        lambda: target.exponential_(),
        lambda: nn.init.trunc_normal_(target, std=0.02),
    ]
    fills[(which + form) % len(fills)]()


def compute(program: Program, which: int, form: int) -> None:
    """A pointwise change of a view."""
    target = view_of(program.floating(which), form // 2)
    changes: list[Callable[[], Any]] = [
        lambda: target.mul_(0.3),
        lambda: target.add_(1),
        lambda: target.clamp_(-0.5, 0.5),
        lambda: target.neg_(),
        lambda: target.zero_(),
        lambda: target.abs_().sqrt_(),
        lambda: target.erf_().tanh_(),
    ]
    changes[(which + form) % len(changes)]()


def write(program: Program, which: int, form: int) -> None:
    """One tensor into another, or into a part of it."""
    target = view_of(program.floating(which), form)
    source = program.any(form).clone()  # torch refuses to write what it reads
    if target.numel() == 0 or source.numel() == 0:
        return
    writes: list[Callable[[], Any]] = [
        lambda: target.copy_(source.flatten()[0]),
        lambda: target.add_(source.flatten()[-1].to(target.dtype)),
        lambda: target.masked_fill_(target > 0.1, 0.25),
        lambda: target.copy_(torch.where(target < 0, torch.zeros_like(target), target)),
        lambda: target.index_fill_(0, torch.tensor([0]), 3.0) if target.dim() else target.fill_(3),
    ]
    writes[(which + form) % len(writes)]()


def mask(program: Program, which: int, form: int) -> None:
    target = program.floating(which)
    target[target > 0.5] = float(form)
    if target.dim() and target.numel():
        target[torch.tensor([0, target.size(0) - 1])] = 0.125


def replace_data(program: Program, which: int, form: int) -> None:
    target, source = program.floating(which), program.floating(form)
    if form % 3 == 0:
        target.data = source.data.to(target.dtype).clone()
    elif form % 3 == 1:
        target.data = torch.randn(form, dtype=target.dtype)
    elif target.dtype == source.dtype:
        target.data, source.data = source.data, target.data


# -- steps: new ones out of old ones -----------------------------------------------------------------------------------


def derive(program: Program, which: int, form: int) -> None:
    source = program.any(which)
    flat = source.detach().reshape(-1)
    made: list[Callable[[], Tensor]] = [
        lambda: source.detach().clone(),
        lambda: source.detach() * 2,
        lambda: torch.cat([flat, flat + 1]),
        lambda: torch.outer(flat[:5], flat[:3]),
        lambda: flat.cumsum(0),
        lambda: torch.stack([flat, flat.flip(0)]),
        lambda: flat.double() @ flat.double(),
        lambda: torch.zeros_like(source),
        lambda: flat.sort().values,
        lambda: flat.new_tensor([1, 2, 3]),
        lambda: flat.new_empty(form).fill_(2),
        lambda: torch.randn_like(flat, dtype=torch.float32),
    ]
    program.hold(made[form % len(made)]())


def view(program: Program, which: int, form: int) -> None:
    """A buffer that shares memory with what it was cut from."""
    program.hold(view_of(program.any(which).detach(), form))


def cast(program: Program, which: int, form: int) -> None:
    program.hold(program.any(which).detach().to(DTYPES[form % len(DTYPES)]))


def again(program: Program, which: int, form: int) -> None:
    """One object under a second name."""
    program.hold(program.any(which))


# -- steps: looking, and generators ------------------------------------------------------------------------------------


def look(program: Program, which: int, form: int) -> None:
    tensor = program.any(which).detach()
    looks: list[Callable[[], Any]] = [
        lambda: tensor.double().sum().item(),
        lambda: tensor.tolist(),
        lambda: bool((tensor > 0).any()),
        lambda: len(torch.nonzero(tensor)),
        lambda: tensor.float().numpy().copy(),
        lambda: torch.equal(tensor, program.any(form)),
    ]
    program.read.append(looks[form % len(looks)]())


def branch(program: Program, which: int, form: int) -> None:
    if program.floating(which).sum() > 0:
        program.hold(torch.rand(form))


def generators(program: Program, which: int, form: int) -> None:
    if form % 3 == 0:
        torch.manual_seed(which)
    elif form % 3 == 1:
        g = torch.Generator().manual_seed(which)
        program.hold(torch.randn(SHAPES[form % len(SHAPES)], generator=g))
        program.hold(torch.rand(form, generator=g))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(which)
            program.hold(torch.randn(form))


STEPS: Final[dict[str, Callable[[Program, int, int], None]]] = {
    step.__name__: step
    for step in (
        make,
        make_whole_numbers,
        make_layer,
        fill,
        compute,
        write,
        mask,
        replace_data,
        derive,
        view,
        cast,
        again,
        look,
        branch,
        generators,
    )
}

programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 11), st.integers(0, 11)), max_size=14)


@settings(
    max_examples=600,
    deadline=None,  # the first recording in a process imports a compiler
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(steps=programs, number=st.integers(0, 2**31))
@example(steps=[("make", 0, 1), ("fill", 1, 0), ("make", 0, 5), ("make", 0, 2)], number=3)  # an odd count, twice
@example(steps=[("again", 0, 0), ("generators", 0, 2), ("view", 2, 3), ("derive", 3, 11)], number=0)  # one element
@example(steps=[("view", 0, 6), ("fill", 1, 0), ("look", 0, 0)], number=3)  # a transposed fill, read by its base
@example(steps=[("fill", 0, 2), ("generators", 5, 0), ("make", 0, 3)], number=3)  # seeded between two draws
def test_a_recorded_program_leaves_what_a_plain_one_leaves(steps: list[Step], number: int) -> None:
    seed(number)
    plain = Program(steps)
    states, expected = rng_states(), snapshot(plain)
    fabric = Fabric(accelerator="cpu", strategy="single_device", devices=1)
    seed(number)
    with fabric.init_module(empty_init=True):
        recorded = Program(steps)
    assert moved(states, rng_states(), "init_module") == []
    seed(number + 1)  # the run goes on drawing; what was recorded keeps its place in the stream
    before = rng_states()
    fabric.materialize(recorded)
    assert moved(before, rng_states(), "materialize") == []
    assert differences(expected, snapshot(recorded), layout=True) == []

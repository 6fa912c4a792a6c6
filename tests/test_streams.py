"""Random numbers without drawing them: what ``birth/`` says of torch's generators and kernels, against the real ones.

Every test draws for real beside it: a torch that draws otherwise, or a mistake in a jump, shows as other bits.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fabriclite.birth import draws, replay, session, truncated
from fabriclite.birth.fill import Goal, Whole, fill
from fabriclite.birth.parts import Box, Recipe
from fabriclite.birth.replay import Hand
from fabriclite.birth.streams import At, Stream
from fabriclite.birth.tape import Ref
from fabriclite.birth.twister import advanced, keeps_a_normal

DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU: Final = torch.device("cpu")
BLOCK: Final = 624
"""32-bit numbers that the Mersenne twister makes at once."""

seeds = st.integers(0, 2**64 - 1)
sizes = st.integers(16, 300) | st.sampled_from([1000, 1024, 4093])


def generator_at(seed: int, place: int, keeps: bool = False) -> torch.Generator:
    """One that drew ``place`` numbers; with ``keeps`` it has the second of a pair of normals left."""
    generator = torch.Generator().manual_seed(seed)
    if keeps:
        torch.empty(1).normal_(generator=generator)
    return draw(generator, place)


def draw(generator: torch.Generator, numbers: int) -> torch.Generator:
    """Move it by drawing. Of nothing torch would draw nothing, but it does make a tensor of none."""
    if numbers:
        torch.empty(numbers).uniform_(generator=generator)
    return generator


def seek_from(state: Tensor) -> draws.Seek:
    """A seek by the twister, from the state at the beginning of a draw."""
    return lambda place, _: torch.Generator().set_state(advanced(state, place))


def _keeps_none() -> bool:
    return False


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- the twister -------------------------------------------------------------------------------------------------------

near_blocks = st.builds(lambda blocks, by: max(0, blocks * BLOCK + by), st.integers(0, 70), st.integers(-2, 2))
distances = near_blocks | st.integers(0, 3000) | st.integers(35_000, 45_000) | st.integers(0, 6_000_000)


@settings(deadline=None, max_examples=120)
@given(seed=seeds, place=st.integers(0, 2000) | near_blocks, distance=distances, keeps=st.booleans())
@example(seed=0, place=0, distance=0, keeps=False)
@example(seed=0, place=0, distance=1, keeps=False)
@example(seed=1, place=0, distance=BLOCK, keeps=True)
@example(seed=2**64 - 1, place=BLOCK, distance=BLOCK, keeps=True)
@example(seed=5, place=BLOCK - 1, distance=2, keeps=False)
@example(seed=5, place=1, distance=64 * BLOCK - 1, keeps=False)  # the longest walk
@example(seed=5, place=1, distance=65 * BLOCK, keeps=False)  # the shortest jump
@example(seed=6, place=3, distance=5_000_003, keeps=True)
def test_a_jump_ends_where_drawing_ends(seed: int, place: int, distance: int, keeps: bool) -> None:
    generator = generator_at(seed, place, keeps)
    before = generator.get_state()
    untouched = before.clone()
    jumped = advanced(before, distance)
    assert torch.equal(jumped, draw(generator, distance).get_state())
    assert keeps_a_normal(jumped) is keeps
    assert torch.equal(before, untouched), "a jump writes into what it was given"


@settings(deadline=None, max_examples=25)
@given(seed=seeds, first=st.integers(0, 10**13), second=st.integers(0, 10**13))
def test_two_jumps_are_one(seed: int, first: int, second: int) -> None:
    """As far as no test can draw: the numbers of a model of many trillion parameters."""
    start = torch.Generator().manual_seed(seed).get_state()
    assert torch.equal(advanced(advanced(start, first), second), advanced(start, first + second))


# -- how many numbers --------------------------------------------------------------------------------------------------

COUNTED: Final[dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]]] = {
    "normal_": lambda n, dtype, g: torch.empty(n, dtype=dtype).normal_(generator=g),
    "randn": lambda n, dtype, g: torch.randn(n, dtype=dtype, generator=g),
    "randn_like": lambda n, dtype, g: torch.randn_like(torch.empty(n, dtype=dtype), generator=g),
    "uniform_": lambda n, dtype, g: torch.empty(n, dtype=dtype).uniform_(generator=g),
    "rand": lambda n, dtype, g: torch.rand(n, dtype=dtype, generator=g),
    "rand_like": lambda n, dtype, g: torch.rand_like(torch.empty(n, dtype=dtype), generator=g),
}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COUNTED)
def test_a_fill_draws_what_is_counted(name: str, dtype: torch.dtype, keeps: bool) -> None:
    for n in (*range(1, 101), 623, 1024, 4095, 10_007, 100_001):
        generator = generator_at(n, 7, keeps)
        before = generator.get_state()
        out = COUNTED[name](n, dtype, generator)
        count = draws.count(name, "default", out, (), lambda: keeps)
        after = generator.get_state()
        if count is None:
            assert draws.kind_of(name) == "normal", "uniforms are always known"
            assert n < 16, "only pairs that are cut are unknown"
            assert n % 2 == 1 or keeps
        else:
            assert torch.equal(after, advanced(before, count)), n


def strided(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, 2, dtype=dtype)[:, 0]


def transposed(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(2, n, dtype=dtype).t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize("name", ["normal_", "uniform_"])
def test_other_layouts_draw_what_is_counted(
    name: str, layout: Callable[[int, torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    known = 0
    for n in (1, 2, 7, 8, 15, 16, 17, 31, 32, 99, 1000):
        generator = generator_at(n, 3)
        before = generator.get_state()
        out = layout(n, dtype)
        getattr(out, name)(generator=generator)
        count = draws.count(name, "default", out, (), keeps_a_normal=_keeps_none)
        if count is not None:
            known += 1
            assert torch.equal(generator.get_state(), advanced(before, count)), n
    assert known >= 5


def can_hold(bound: int, dtype: torch.dtype) -> bool:
    return bound <= (torch.iinfo(dtype).max if not dtype.is_floating_point else 2**11)


@settings(deadline=None, max_examples=150)
@given(
    seed=seeds,
    n=st.integers(0, 100) | st.just(4097),
    low=st.integers(-(2**40), 2**40) | st.just(0),
    span=st.integers(1, 200) | st.integers(2**27, 2**34) | st.sampled_from([2**28, 2**32 - 1, 2**32, 2**32 + 1, 2**62]),
)
def test_whole_numbers_draw_what_is_counted(seed: int, n: int, low: int, span: int) -> None:
    cases = [(torch.int64, low, low + span), (torch.int64, 0, span)]
    cases += [(d, 0, span) for d in (torch.int32, torch.uint8, torch.float32, torch.float64) if can_hold(span, d)]
    for dtype, begin, end in cases:
        generator = torch.Generator().manual_seed(seed)
        before = generator.get_state()
        out = torch.randint(begin, end, (n,), dtype=dtype, generator=generator)
        counts = {draws.count("randint", "low", out, (begin, end, (n,)), _keeps_none)}
        if begin == 0:
            counts.add(draws.count("randint", "default", out, (end, (n,)), _keeps_none))
        assert len(counts) == 1
        count = counts.pop()
        if count is None:
            assert end - begin >= 2**28, "from here on it depends on torch's version: it may be drawn for real"
        else:
            assert torch.equal(generator.get_state(), advanced(before, count)), (dtype, begin, end)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 99, 623, 624, 625, 10_007, 300_000])
def test_a_shuffle_draws_what_is_counted(n: int) -> None:
    generator = generator_at(n, 11)
    before = generator.get_state()
    out = torch.randperm(n, generator=generator)
    count = draws.count("randperm", "default", out, (n,), _keeps_none)
    assert count is not None
    assert torch.equal(generator.get_state(), advanced(before, count))


def test_what_is_not_in_the_table_is_unknown() -> None:
    out = torch.empty(64)
    assert draws.count("exponential_", "default", out, (), _keeps_none) is None
    assert draws.count("randint", "generator", out, (5, (64,)), _keeps_none) is None


# -- a part of a fill --------------------------------------------------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Elements of the whole, and the beginning and end of a part."""
    n = draw(sizes)
    begin = draw(st.integers(0, n))
    return n, begin, draw(st.integers(begin, n))


ends = [(16, 0, 16), (17, 0, 16), (17, 16, 17), (17, 0, 1), (31, 15, 31), (33, 32, 33), (47, 30, 33), (4093, 1, 4092)]


def with_examples(test: Callable[..., None]) -> Callable[..., None]:
    """Around the last 16 values, which a normal fill draws once more if 16 does not divide the whole."""
    for part in ends:
        test = example(part=part, seed=3, place=0)(test)
    return test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_part_of_a_fill_is_cut_from_the_whole(kind: Any, dtype: torch.dtype) -> None:
    @settings(deadline=None, max_examples=80)
    @with_examples
    @given(part=parts(), seed=seeds, place=st.integers(0, 1300))
    def check(part: tuple[int, int, int], seed: int, place: int) -> None:
        n, begin, end = part
        generator = generator_at(seed, place)
        before = generator.get_state()
        args = (0.25, 1.5)
        whole = getattr(torch.empty(n, dtype=dtype), f"{kind}_")(*args, generator=generator)
        out = torch.full((end - begin,), float("nan"), dtype=dtype)
        draws.fill_part(kind, out, begin, n, args, seek_from(before))
        assert same_bits(out, whole[begin:end])

    check()


def test_a_seek_says_how_much_is_drawn() -> None:
    """Threads go on from where their generator stands: a wrong count would place all that follows wrongly."""
    for dtype in DTYPES:
        for kind in ("normal", "uniform"):
            asked: list[tuple[torch.Generator, Tensor, int]] = []
            start = generator_at(8, 5).get_state()

            def seek(place: int, count: int, start: Tensor = start, asked: Any = asked) -> torch.Generator:
                generator = torch.Generator().set_state(advanced(start, place))
                asked.append((generator, generator.get_state(), count))
                return generator

            for n, begin, end in (*ends, (100, 3, 97), (64, 16, 64)):
                draws.fill_part(kind, torch.empty(end - begin, dtype=dtype), begin, n, (0.0, 1.0), seek)
            assert asked
            for generator, before, count in asked:
                assert torch.equal(generator.get_state(), advanced(before, count)), (dtype, kind)


BOUNDS: Final = (
    (0.0, 1.0, -2.0, 2.0),  # nearly all inside
    (0.0, 0.02, -2.0, 2.0),  # nothing ever outside
    (0.0, 1.0, -0.6, 0.6),  # every second one drawn again, and again
    (1.0, 0.5, 0.9, 4.0),  # one near side
    (0.3, 1.0, -0.4000001, 0.7000003),  # bounds that half precision cannot hold
)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_truncated_normals_is_cut_from_the_whole(
    dtype: torch.dtype, bounds: tuple[float, float, float, float]
) -> None:
    @settings(deadline=None, max_examples=25)
    @with_examples
    @given(part=parts(), seed=seeds, place=st.integers(0, 1300))
    def check(part: tuple[int, int, int], seed: int, place: int) -> None:
        n, begin, end = part
        generator = generator_at(seed, place)
        before = generator.get_state()
        whole = nn.init.trunc_normal_(torch.empty(n, dtype=dtype), *bounds, generator=generator)
        assert truncated.in_parts(whole, *bounds)
        out = torch.full((end - begin,), 77.0, dtype=dtype)
        rounds = truncated.fill_part(out, begin, n, bounds, seek_from(before))
        assert same_bits(out, whole[begin:end])
        if begin == 0 and end == n:
            once = draws.normal_count(n, dtype)
            assert torch.equal(generator.get_state(), advanced(before, rounds * once)), "other rounds than torch"

    check()


@pytest.mark.parametrize("bounds", [(0.0, 1.0, -0.1, 0.1), (0.0, 1.0, 2.0, 3.0), (0.0, 0.0, -1.0, 1.0)])
def test_bounds_where_torch_goes_another_way_are_left_to_torch(bounds: tuple[float, float, float, float]) -> None:
    assert not truncated.in_parts(torch.empty(64), *bounds)


# -- streams -----------------------------------------------------------------------------------------------------------

Action = tuple[str, int]
actions = st.lists(
    st.tuples(st.just("note"), st.integers(0, 2000))
    | st.tuples(st.just("seed"), st.integers(0, 2))
    | st.tuples(st.sampled_from(["user", "restore"]), st.integers(1, 700))
    | st.tuples(st.sampled_from(["show", "odd", "held"]), st.just(0)),
    max_size=12,
)


def act(stream: Stream, plain: torch.Generator, action: Action) -> None:
    """The same on the stream's generator, which may lag, and on ``plain``."""
    what, number = action
    if what == "seed":
        stream.generator.manual_seed(number)
        plain.manual_seed(number)
    elif what == "user":  # an operation that is not recorded: the recorder shows the stream before it
        stream.show()
        draw(stream.generator, number)
        draw(plain, number)
    elif what == "restore":
        state = generator_at(number, number).get_state()
        stream.generator.set_state(state)
        plain.set_state(state)
    elif what == "show":
        stream.show()
    else:  # a draw of unknown length, which leaves a kept normal if it is odd
        if what == "held":
            held = stream.held()
            assert torch.equal(held.state, plain.get_state())
        else:
            stream.show()
        for generator in (stream.generator, plain):
            torch.empty(1).normal_(generator=generator)
        stream.look()


@pytest.mark.parametrize("lazy", [True, False])
def test_a_stream_knows_its_place(lazy: bool) -> None:
    @settings(deadline=None, max_examples=150)
    @given(steps=actions, start=st.integers(0, 2))
    @example(steps=[("note", 5), ("seed", 0), ("note", 5)], start=0)  # seeded alike again: back at the beginning
    @example(steps=[("seed", 0), ("note", 0), ("seed", 0), ("note", 3)], start=0)
    @example(steps=[("note", 5), ("show", 0), ("seed", 0), ("note", 0), ("show", 0)], start=0)
    def check(steps: list[Action], start: int) -> None:
        plain = torch.Generator().manual_seed(start)
        stream = Stream(torch.Generator().manual_seed(start), lazy=lazy)
        noted: list[tuple[At, Tensor]] = []
        for action in steps:
            if action[0] != "note":
                act(stream, plain, action)
                continue
            before = plain.get_state()
            assert stream.keeps_a_normal() is keeps_a_normal(before)
            at = stream.draw(action[1])
            assert at.count == action[1]
            noted.append((at, before))
            draw(plain, action[1])
            assert lazy or torch.equal(stream.generator.get_state(), plain.get_state()), (
                "its owner may look at any time"
            )
        stream.show()
        assert torch.equal(stream.generator.get_state(), plain.get_state())
        for at, before in reversed(noted):
            assert torch.equal(stream.state_at(at.epoch, at.offset), before)

    check()


def test_a_lazy_stream_hides_and_draws_nothing() -> None:
    """A model of a trillion parameters is noted in no time."""
    generator = torch.Generator().manual_seed(4)
    stream = Stream(generator, lazy=True)
    stream.draw(10)
    for _ in range(1000):
        stream.draw(10**9)
    assert generator.initial_seed() == 4, "who asks for the seed is told"
    stream.show()
    assert torch.equal(generator.get_state(), advanced(torch.Generator().manual_seed(4).get_state(), 10**12 + 10))
    stream.show()
    assert stream.draw(1).epoch == 0, "to show it begins nothing new"


def test_epochs_begin_where_the_user_sets_the_generator() -> None:
    generator = torch.Generator().manual_seed(4)
    stream = Stream(generator, lazy=True)
    assert [stream.draw(3).epoch, stream.draw(3).epoch] == [0, 0]
    generator.manual_seed(4)
    at = stream.draw(3)
    assert (at.epoch, at.offset) == (1, 0)
    generator.manual_seed(5)
    assert stream.draw(1).epoch == 2
    expected = [torch.Generator().manual_seed(seed).get_state() for seed in (4, 4, 5)]
    assert all(torch.equal(a, b) for a, b in zip([stream.state_at(e, 0) for e in range(3)], expected, strict=True))


# -- a box of a recorded parameter -------------------------------------------------------------------------------------


def captured(w: Tensor) -> None:
    w.copy_(torch.from_numpy(np.arange(w.numel(), dtype=np.float64)).view(w.shape))


def head(w: Tensor) -> None:
    w[: len(w) // 2].uniform_(-3, 3)


def truncate(w: Tensor) -> None:
    nn.init.trunc_normal_(w, std=0.5, a=-0.4, b=0.6)


FILLS: Final[tuple[Callable[[Tensor], Any], ...]] = (
    lambda w: w.normal_(0.5, 2.0),
    lambda w: w.uniform_(-1.0, 3.0),
    truncate,
    head,
    captured,
    lambda w: w.fill_(0.5),
    lambda w: w.zero_(),
    lambda w: w[-1].normal_(),
    lambda w: w.mul_(0.3).add_(1.0),
    lambda w: w.copy_(torch.randn_like(w) * 0.1),
    lambda w: w.add_(torch.rand(w.shape, dtype=w.dtype)),
    lambda w: w.sub_(torch.ones_like(w)).clamp_(-1.0, 1.0),
)


def build(shape: tuple[int, ...], dtype: torch.dtype, fills: list[int], skip: int) -> Tensor:
    """A tensor that begins ``skip`` elements into its storage."""
    count = torch.Size(shape).numel()
    w = torch.randn(skip + count, dtype=dtype)[skip:].view(shape)
    for number in fills:
        FILLS[number % len(FILLS)](w)
    return w


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(st.lists(st.integers(3, 24), min_size=2, max_size=3).map(tuple))
    cut = draw(st.sets(st.integers(0, len(shape) - 1), max_size=2))
    box = []
    for dim, n in enumerate(shape):
        start = draw(st.integers(0, n)) if dim in cut else 0
        box.append((start, draw(st.integers(0, n - start)) if dim in cut else n))
    return shape, tuple(box)


def recorded_box(make: Callable[[], Tensor], box: Box, threads: int | None = None) -> Tensor | None:
    """This box of what ``make`` makes, made alone; ``None`` if it has to be made whole."""
    torch.manual_seed(3)
    with session.recording(CPU), CPU:
        tensor = make()
    with session.paused():
        recording = session.current()
        assert recording is not None
        ref, tape = recording.ref(tensor), recording.tape
        recipe = Recipe.of(tape, ref)
        out = torch.full([length for _, length in box], 99.0, dtype=ref.dtype)
        if recipe is None:
            return None
        if threads is None:
            with replay.at_rest():
                recipe.fill_box(out, ref, box, Hand())
        else:
            fill(tape, [Goal(ref, box, out)], [], threads)
        return out


def cut(whole: Tensor, box: Box) -> Tensor:
    for dim, (start, length) in enumerate(box):
        whole = whole.narrow(dim, start, length)
    return whole


def expected_box(make: Callable[[], Tensor], box: Box) -> Tensor:
    torch.manual_seed(3)
    return cut(make(), box)


@pytest.fixture(autouse=True)
def _nothing_pending() -> Any:
    yield
    session.tidy()
    assert session.current() is None


@settings(deadline=None, max_examples=300)
@given(
    form=boxes(),
    dtype=st.sampled_from(DTYPES),
    fills=st.lists(st.integers(0, len(FILLS) - 1), max_size=4),
    skip=st.sampled_from([0, 0, 5, 16]),
)
@example(form=((5, 7, 3), ((1, 3), (2, 4), (0, 3))), dtype=torch.float32, fills=[2], skip=0)
def test_a_box_is_cut_from_the_whole(
    form: tuple[tuple[int, ...], Box], dtype: torch.dtype, fills: list[int], skip: int
) -> None:
    shape, box = form

    def make() -> Tensor:
        return build(shape, dtype, fills, skip)

    made = recorded_box(make, box)
    if made is None:
        few = (
            torch.Size(shape).numel() < 64 or torch.Size(shape[1:]).numel() < 16
        )  # a row of normals is one of the fills
        assert skip or few, "should be in parts"
        return
    assert same_bits(made, expected_box(make, box))


LARGE: Final = {
    "rows at once": ((1500, 1400), ((100, 1300), (37, 1000))),
    "long rows": ((3, (1 << 20) + 5), ((1, 2), ((1 << 19) + 3, (1 << 19) - 1))),
    "long rows of rows": ((2, 1100, 1000), ((1, 1), (5, 1090), (1, 998))),
    "one part": ((1 << 21, 1), ((17, (1 << 20) + 400), (0, 1))),
}


@pytest.mark.parametrize("fills", [[0], [2], [9]], ids=["normal", "truncated", "sum"])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_box_is_cut_from_the_whole(name: str, fills: list[int]) -> None:
    """Larger than what is made at once beside the result."""
    shape, box = LARGE[name]

    def make() -> Tensor:
        return build(shape, torch.float32, fills, 0)

    made = recorded_box(make, box)
    assert made is not None
    assert same_bits(made, expected_box(make, box))


def test_threads_share_a_storage_and_make_the_same() -> None:
    """Three storages, one of them large enough to be shared out; whole ones and boxes at once."""

    def make() -> list[Tensor]:
        a, b, c = torch.randn(3100, 3000), torch.rand(130, 70), nn.init.trunc_normal_(torch.empty(777, 33))
        return [a.mul_(0.5), b, c]

    torch.manual_seed(3)
    expected = make()
    torch.manual_seed(3)
    with session.recording(CPU), CPU:
        recorded = make()
    with session.paused():
        recording = session.current()
        assert recording is not None
        refs = [recording.ref(tensor) for tensor in recorded]
        box = ((3, 100), (10, 50))
        for threads in (1, 3):
            wholes = [Whole(ref.storage, ref.dtype) for ref in refs]
            goals = [Goal(ref, box if i < 2 else ((5, 700), (0, 33)), torch.empty(0)) for i, ref in enumerate(refs)]
            for goal in goals:
                goal.out = torch.empty([length for _, length in goal.box])
            fill(recording.tape, goals, wholes, threads)
            for whole, goal, ref, tensor in zip(wholes, goals, refs, expected, strict=True):
                assert whole.memory is not None
                assert same_bits(replay.view(whole.memory, ref), tensor)
                assert same_bits(goal.out, cut(tensor, goal.box))


def test_flat_ranges_of_a_tensor() -> None:
    """As ZeRO-3 wants them: values in row-major order."""
    torch.manual_seed(3)
    expected = torch.randn(7, 33)
    torch.manual_seed(3)
    with session.recording(CPU), CPU:
        tensor = torch.randn(7, 33)
    with session.paused():
        recording = session.current()
        assert recording is not None
        ref = recording.ref(tensor)
        flat = Ref(ref.storage, ref.dtype, (ref.numel,), (1,), ref.offset)
        for start, length in ((0, 116), (115, 116), (230, 1), (231, 0)):
            out = torch.empty(length)
            fill(recording.tape, [Goal(flat, ((start, length),), out)], [], 1)
            assert same_bits(out, expected.view(-1)[start : start + length])

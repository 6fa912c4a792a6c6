"""The Mersenne twister behind torch's CPU generator, moved ahead without drawing.

One step of MT19937 is linear over bits: n steps are a polynomial in one step, x^n modulo its characteristic polynomial.
Source: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998), appendix A; Haramoto et al., "Efficient Jump
Ahead for F2-Linear Random Number Generators", INFORMS J. Computing 20 (2008).
"""

from functools import cache, lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from torch import Tensor

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]

_N: Final = 624
_M: Final = 397
_A: Final = 0x9908B0DF
_DEGREE: Final = 19937
_GAP: Final = 623
"""Between the characteristic polynomial's highest terms: so many bits of a quotient are seen at once."""
_LENGTH: Final = 40960
"""Of transforms: a product of two of that degree fits, and its factors are small."""
_WALK: Final = 1600
"""Blocks up to which stepping is cheaper than jumping: 2.5 ns a number, against 2 to 5 ms a jump."""


def advanced(state: Tensor, draws: int) -> Tensor:
    """The generator's state after ``draws`` 32-bit numbers; a kept second normal stays kept.

    Args:
        state: ``torch.Generator().get_state()`` of a CPU generator, uint8 of shape ``(5056,)``.
        draws: at least 0.
    """
    if draws == 0:
        return state.clone()
    words, place = _read(state)
    blocks, place = divmod(place + draws, _N)
    if place == 0:  # the block is used up, the next is not yet made
        blocks, place = blocks - 1, _N
    return _written(state, _block_after(words, blocks), place)


def follows(state: Tensor, earlier: Tensor, blocks: int) -> bool:
    """Whether ``state`` is ``earlier`` some numbers later: in one of the next ``blocks`` blocks of 624."""
    words, _ = _read(state)
    generator = _stepper(_read(earlier)[0])
    return any(np.array_equal(_walked(generator, 1), words) for _ in range(blocks))


def keeps_a_normal(state: Tensor) -> bool:
    """Whether the generator holds the second of a pair of float64 normals, which the next draw of one would take."""
    return bool(state.numpy()[5040:5044].view(np.int32)[0])


# -- the state's bytes: seed u64 | left i32 | seeded i32 | next u64 | words u64[624] | kept normals ----------


def _read(state: Tensor) -> tuple[Words, int]:
    """The block of words, and how many of them are used."""
    raw = state.numpy()
    left, following = int(raw[8:12].view(np.int32)[0]), int(raw[16:24].view(np.uint64)[0])
    words = raw[24 : 24 + 8 * _N].view(np.uint64).astype(np.uint32)
    return words, _N if left == 1 else following  # freshly seeded: one left, next 0


def _written(state: Tensor, words: Words, place: int) -> Tensor:
    result = state.clone()
    raw = result.numpy()
    raw[8:12].view(np.int32)[0] = _N + 1 - place
    raw[16:24].view(np.uint64)[0] = place
    raw[24 : 24 + 8 * _N].view(np.uint64)[:] = words
    return result


# -- blocks ------------------------------------------------------------------------------------------------------------


def _block_after(words: Words, blocks: int) -> Words:
    if blocks == 0:
        return words
    return _jumped(words, blocks * _N) if blocks > _WALK else _walked(_stepper(words), blocks)


def _stepper(words: Words) -> np.random.MT19937:
    """NumPy's generator with ``words`` as its block, all used up."""
    generator = np.random.MT19937(0)
    generator.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": _N}}
    return generator


def _walked(generator: np.random.MT19937, blocks: int) -> Words:
    generator.random_raw(blocks * _N, output=False)
    return np.array(generator.state["state"]["key"], np.uint32)


def _jumped(words: Words, steps: int) -> Words:
    """The block ``steps`` words further: the sum of the shifted sequences that the polynomial names."""
    generator = _stepper(words)
    blocks = [words, *(_walked(generator, 1) for _ in range((_DEGREE + _N) // _N + 2))]
    # 31 bits of the first word never enter the sequence: start one word later, and jump one less.
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(blocks)[1:], _N)
    terms, result = _terms(steps - 1), np.zeros(_N, np.uint32)
    for start in range(0, len(terms), 512):
        result ^= np.bitwise_xor.reduce(windows[terms[start : start + 512]], axis=0)
    return result


# -- polynomials over bits, as whole numbers: bit i is the coefficient of x^i ----------


@cache
def _characteristic() -> tuple[int, ...]:
    """Exponents of the characteristic polynomial's terms below the leading one."""

    def times(polynomial: int, high: int, low: int, power: int) -> int:
        for _ in range(power):
            polynomial = (polynomial << high) ^ (polynomial << low)
        return polynomial

    total = times(times(1, _N, _M, 1), _N - 1, _M - 1, 31)
    for bit in range(31):
        if _A >> bit & 1:
            total ^= times(times(1, _N, _M, 1), _N - 1, _M - 1, 30 - bit)
    total ^= _A >> 31 & 1
    assert total.bit_length() == _DEGREE + 1
    return tuple(np.flatnonzero(_bits(total ^ 1 << _DEGREE)).tolist())


def _reduced(polynomial: int) -> int:
    """The remainder of one of degree below twice the characteristic polynomial's."""
    high = polynomial >> _DEGREE
    return _minus(polynomial, high if high.bit_length() <= _GAP else _quotient(high))


def _minus(polynomial: int, quotient: int) -> int:
    """Less ``quotient`` times the characteristic polynomial."""
    polynomial ^= quotient << _DEGREE
    for term in _characteristic():
        polynomial ^= quotient << term
    return polynomial


def _quotient(high: int) -> int:
    """Of a polynomial by the characteristic one: its upper half times the reciprocal, whose lower half is dropped.

    Barrett's way. The product is a convolution of bits, by Fourier transforms. Its sums of at most 19937 ones come out
    with an error below 0.01 in float32: the float's step times the length of both factors (141) and the root of the
    number of stages. Step by step, 623 bits at a time, it would take four times as long.
    """
    product = np.fft.irfft(np.fft.rfft(_bits(high).astype(np.float32), _LENGTH) * _reciprocal(), _LENGTH)
    ones = np.rint(product[_DEGREE : 2 * _DEGREE]).astype(np.int64) & 1
    return int.from_bytes(np.packbits(ones.astype(np.uint8), bitorder="little").tobytes(), "little")


@cache
def _reciprocal() -> "np.ndarray[Any, np.dtype[np.complexfloating[Any, Any]]]":
    """The transform of x^(2 * degree) divided by the characteristic polynomial.

    Backwards, that is the inverse of a power series p: of f known up to some term, p f^2 is right up to twice that.
    """
    inverse, known = 1, _GAP
    while known <= _DEGREE:
        known *= 2
        square = inverse = _spread_out(inverse)
        for term in _characteristic():
            inverse ^= square << (_DEGREE - term)
        inverse &= (1 << known) - 1
    inverse &= (1 << _DEGREE + 1) - 1
    return np.fft.rfft(_bits(inverse)[_DEGREE::-1].astype(np.float32), _LENGTH)


def _bits(polynomial: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    raw = np.frombuffer(polynomial.to_bytes(_DEGREE // 8 + 1, "little"), np.uint8)
    return np.unpackbits(raw, bitorder="little")


@cache
def _spread() -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """By byte, its bits with a zero behind each."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.asarray((bits.astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)).sum(1, dtype=np.uint16))


def _spread_out(polynomial: int) -> int:
    """The square: over bits it has no mixed terms."""
    raw = np.frombuffer(polynomial.to_bytes(_DEGREE // 8 + 1, "little"), np.uint8)
    return int.from_bytes(_spread()[raw].astype("<u2").tobytes(), "little")


@lru_cache(4096)
def _terms(power: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Exponents of x^power modulo the characteristic polynomial."""
    known = max(0, power.bit_length() - _DEGREE.bit_length() + 1)  # up to there it is one term
    result = 1 << (power >> known)
    for bit in bin(power)[2:][power.bit_length() - known :]:
        result = _reduced(_spread_out(result))
        if bit == "1":
            result = _reduced(result << 1)
    return np.flatnonzero(_bits(result))

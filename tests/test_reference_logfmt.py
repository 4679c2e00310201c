"""The oracle's LogFMT-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import BF16, Array, few, same_bits

from ep_rt.errors import ArrayError
from ep_rt.reference import logfmt10_decode, logfmt10_encode


def block(*values: float, rest: float) -> Array:
    """One block of 128 channels, `rest` after the given values."""
    filled: Array = np.concatenate([values, np.full(128 - len(values), rest)]).astype(BF16)
    return filled


@st.composite
def rows(draw: st.DrawFn) -> Array:
    """[T, H] bfloat16 below 1 in magnitude, spread over a drawn number of octaves; some zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(0, 3)), 128 * draw(st.integers(1, 3)))
    octaves = draw(st.sampled_from([0.05, 1.0, 8.0, 40.0]))
    lowest = draw(st.sampled_from([0.0, 1.0, 80.0]))
    x: Array = 2.0 ** -(lowest + 0.01 + octaves * rng.random(shape)) * rng.choice([-1.0, 1.0], shape)
    x[rng.random(shape) < draw(st.sampled_from([0.0, 0.1]))] *= 0.0
    return x.astype(BF16)


def test_codes_by_hand() -> None:
    """0.5 and 0.25 are the ends of the scale; 2^-1.5 lies in its middle."""
    x = block(0.5, -0.5, 0.25, -0.25, 2**-1.5, rest=0.25)
    encoded = logfmt10_encode(x)
    sign = 1 << 9
    assert encoded.is_cast.tolist() == [True]
    assert encoded.codes.dtype == np.uint16
    assert encoded.codes[:6].tolist() == [511, 511 | sign, 1, 1 | sign, 256, 1]
    assert encoded.amax.astype(np.float32).tolist() == [0.5]
    assert encoded.amin.astype(np.float32).tolist() == [0.25]
    assert same_bits(logfmt10_decode(encoded), x)


def test_zeros_and_the_range_of_32_octaves() -> None:
    """With a zero the scale reaches 32 octaves down: code 1 is amax * 2^-32, what is far below it code 0."""
    x = block(0.5, -0.0, 0.0, 2.0**-33, 2.0**-40, -(2.0**-33), rest=0.5)
    encoded = logfmt10_encode(x)
    sign = 1 << 9
    assert encoded.codes[:7].tolist() == [511, sign, 0, 1, 0, 1 | sign, 511]
    decoded = logfmt10_decode(encoded)
    assert decoded[:5].astype(np.float64).tolist() == [0.5, 0, 0, 2.0**-33, 0]
    assert np.signbit(decoded[:3].astype(np.float32)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "x",
    [
        block(1.0, rest=0.25),
        block(-3.0, 0.1, rest=0.25),
        block(np.inf, rest=0.25),
        block(np.nan, rest=0.25),
        block(rest=0.0),
        block(-0.0, rest=0.0),
        block(-0.375, rest=0.375),
        np.random.default_rng(0).integers(0, 2**16, 128, np.uint16).view(BF16),
    ],
    ids=["one", "above", "inf", "nan", "zeros", "signed zeros", "constant", "any bits"],
)
def test_blocks_not_cast_pass_unchanged(x: Array) -> None:
    """Each beside a block that is cast: they are decided one by one."""
    both = np.concatenate([x, block(0.5, rest=0.25)])
    encoded = logfmt10_encode(both)
    assert encoded.is_cast.tolist() == [False, True]
    assert np.array_equal(encoded.codes[:128], x.view(np.uint16))
    assert same_bits(logfmt10_decode(encoded), both)


@few
@given(rows())
def test_error_is_at_most_half_a_step(x: Array) -> None:
    """Thresholds lie at the mean of two levels, so the relative error is at most (2^step - 1) / 2.

    bfloat16 rounding adds 2^-8 of the level (at most 2^step x), or 2^-134 for subnormals; eight float32
    roundings in the logarithm, of numbers up to 133, add 8 * 133 * 2^-24 * ln 2 < 2^-14.
    Below 2^log_amin there are two values: zero and 2^log_amin.
    """
    encoded = logfmt10_encode(x)
    exact = np.abs(x.astype(np.float64)).reshape(*encoded.is_cast.shape, 128)
    decoded = np.abs(logfmt10_decode(encoded).astype(np.float64)).reshape(exact.shape)
    amax = exact.max(axis=-1, keepdims=True)
    lowest = np.maximum(exact.min(axis=-1, keepdims=True), amax * 2.0**-32)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (amax / lowest) ** (1 / 510)
    relative = (ratio - 1) / 2 + 2.0**-8 * ratio + 2.0**-14
    bound = np.where(exact >= lowest, exact, lowest) * relative + 2.0**-134
    is_cast = encoded.is_cast[..., None]
    assert (np.abs(decoded - exact) <= bound)[is_cast & (exact >= lowest)].all()
    assert (np.minimum(decoded, np.abs(decoded - lowest)) <= bound)[is_cast & (exact < lowest)].all()
    assert (encoded.codes.reshape(exact.shape) < 1024)[np.broadcast_to(is_cast, exact.shape)].all()


def test_every_value_goes_to_the_nearest_level() -> None:
    """All of bfloat16 over the 32 octaves of a block with a zero, but for what is next to a threshold."""
    low, high = (int(np.array(end, BF16).view(np.uint16)) for end in (2.0**-33, 0.5))
    bits = np.arange(low, high, dtype=np.uint16)
    values = np.resize(bits, (-(-len(bits) // 126), 126)).view(BF16)
    ends = np.tile(np.array([0.5, 0], BF16), (len(values), 1))
    encoded = logfmt10_encode(np.concatenate([ends, values], axis=1))
    levels = 2.0 ** (32 * np.arange(511) / 510 - 33)
    exact = values.astype(np.float64)
    thresholds = (levels[1:] + levels[:-1]) / 2
    nearest = np.searchsorted(thresholds, exact)
    near = np.abs(exact[..., None] / thresholds - 1).min(axis=-1) < 2.0**-13
    assert near.mean() < 0.1
    assert np.array_equal(encoded.codes[:, 2:][~near], nearest[~near] + 1)


@few
@given(rows())
def test_signs_zeros_and_order_are_kept(x: Array) -> None:
    """Signs come back, zeros too, and a larger magnitude never gets a smaller code or value."""
    encoded = logfmt10_encode(x)
    decoded = logfmt10_decode(encoded)
    assert np.array_equal(np.signbit(decoded), np.signbit(x))
    assert not decoded[x == 0].astype(np.float32).any()
    shape = (*encoded.is_cast.shape, 128)
    order = np.argsort(np.abs(x.astype(np.float32)).reshape(shape), axis=-1)
    values = np.abs(decoded.astype(np.float32)).reshape(shape)
    assert (np.diff(np.take_along_axis(values, order, axis=-1), axis=-1) >= 0).all()
    codes = np.take_along_axis((encoded.codes & 511).reshape(shape).astype(int), order, axis=-1)
    assert (np.diff(codes, axis=-1) >= 0)[encoded.is_cast].all()


def test_neighbours_come_back_exactly() -> None:
    """Blocks of two adjacent values, all of bfloat16 below 1: the finest steps, where float32 is coarsest."""
    one = int(np.array(1, BF16).view(np.uint16))
    low = np.arange(1, one - 1, dtype=np.uint16)
    pairs = np.stack([low, low + np.uint16(1)], axis=1)
    x = np.tile(pairs, (1, 64)).view(BF16)
    encoded = logfmt10_encode(x)
    assert encoded.is_cast.all()
    assert (encoded.codes[:, 0] >= 1).all()
    assert (encoded.codes <= 511).all()
    assert same_bits(logfmt10_decode(encoded), x)


@few
@given(rows())
def test_blocks_are_independent(x: Array) -> None:
    flat: Any = x.reshape(-1, 128)
    assert same_bits(
        logfmt10_decode(logfmt10_encode(x)).reshape(-1, 128), logfmt10_decode(logfmt10_encode(flat))
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArrayError):
        logfmt10_encode(np.zeros(128, np.float32))
    with pytest.raises(ArrayError):
        logfmt10_encode(np.zeros((1, 100), BF16))

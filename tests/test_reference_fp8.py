"""The oracle's FP8 cast: scales, rounding, UE8M0 packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_cases import BF16, E4M3, Array, few, same_bits

from ep_rt.errors import ArrayError, ConfigError
from ep_rt.reference import dequantize_fp8, quantize_fp8

MODES: list[dict[str, bool]] = [{}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}]


def block(*values: float, dtype: Any = np.float32) -> Array:
    """One block of 128 channels, zero after the given values."""
    return np.pad(np.array(values, np.float32), (0, 128 - len(values))).astype(dtype)


blocks = hnp.arrays(
    np.float32,
    st.sampled_from([(128,), (2, 256), (3, 640), (0, 128)]),
    elements=st.floats(-(2.0**20), 2.0**20, width=32),
    fill=st.floats(-(2.0**-12), 2.0**-12, width=32),
)


def test_scales_by_hand() -> None:
    x = np.concatenate([block(448, -1), block(1, 0.5), block(-3.5)])[None].astype(BF16)
    q, sf = quantize_fp8(x)
    inv = np.float32(1) / np.float32(448)
    assert inv.view(np.uint32) == 0x3B124925
    assert sf.dtype == np.float32
    assert q.dtype == E4M3
    assert sf.tolist() == [[1, float(inv), float(np.float32(3.5) * inv)]]
    assert q[0, [0, 1, 128, 129, 256]].astype(np.float32).tolist() == [448, -1, 448, 224, -448]

    q, sf = quantize_fp8(x, round_scale=True)
    assert sf.tolist() == [[1, 2**-8, 2**-7]]  # 1/448 lies between 2^-9 and 2^-8; 3.5 is 448 * 2^-7
    assert q[0, [0, 1, 128, 129, 256]].astype(np.float32).tolist() == [448, -1, 256, 128, -448]


def test_amax_is_clamped() -> None:
    floor = np.float32(1e-4)
    for x in (block(), block(5e-5), block(-1e-4)):
        q, sf = quantize_fp8(x)
        assert sf[0] == floor * (np.float32(1) / np.float32(448))
        expected = np.array(x[0] * (np.float32(448) / floor)).astype(E4M3)
        assert q[0] == expected
    assert quantize_fp8(block(5e-5))[0][0] == 224
    assert not quantize_fp8(block())[0].astype(np.float32).any()
    assert quantize_fp8(block(), round_scale=True)[1][0] == 2.0**-22


def test_negative_zero_is_kept() -> None:
    q, _ = quantize_fp8(block(-0.0, -1e-9, 1))
    assert q.view(np.uint8)[:2].tolist() == [0x80, 0x80]


def test_plain_scale_is_divided_and_its_inverse_multiplied() -> None:
    """Against the same float32 steps, on elements that land on or next to a rounding midpoint."""
    rng = np.random.default_rng(0)
    amax = rng.uniform(0.01, 100, (256, 1)).astype(np.float32)
    values = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    scale = np.float32(448) / amax
    x = np.concatenate([(values[1:] + values[:-1]) / 2 / scale, -amax, amax / 3], axis=1)
    q, sf = quantize_fp8(x)
    assert same_bits(q, (x * scale).astype(E4M3))
    assert same_bits(sf, (amax.astype(np.float64) * (np.float32(1) / np.float32(448))).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
def test_power_of_two_scale_is_the_exact_ceiling(dtype: Any) -> None:
    """amax = 448 * 2^n needs 2^n, its successor in the dtype 2^(n+1), its predecessor 2^n."""
    bits: Any = np.uint32 if dtype is np.float32 else np.uint16
    powers = np.arange(-22, 110)
    exact = np.ldexp(448.0, powers).astype(dtype)
    assert np.array_equal(exact.astype(np.float64), np.ldexp(448.0, powers))
    for step, expected in ((-1, powers), (0, powers), (1, powers + 1)):
        amax = (exact.view(bits) + bits(step % 2 ** (8 * exact.itemsize))).astype(bits).view(dtype)
        x = np.zeros((len(powers), 128), dtype)
        x[:, 77] = amax
        _, sf = quantize_fp8(x, round_scale=True)
        above_clamp = amax.astype(np.float32) >= np.float32(1e-4)
        assert above_clamp.all()
        assert np.array_equal(sf[:, 0].astype(np.float64), np.ldexp(1.0, expected))


def test_rounding_to_nearest_even_for_every_e4m3_value() -> None:
    """Scale 1: the midpoint of two values goes to the even code, its float32 neighbours to the nearer one."""
    codes = np.arange(0x7F, dtype=np.uint8)
    values = codes.view(E4M3).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2
    even = codes[:-1] + codes[:-1] % 2
    for sign in (1, -1):
        for x, expected in (
            (values[:-1], codes[:-1]),
            (middle, even),
            (np.nextafter(middle, np.float32(0)), codes[:-1]),
            (np.nextafter(middle, np.float32(np.inf)), codes[1:]),
        ):
            q, sf = quantize_fp8(block(*(sign * x), 448))
            assert sf[0] == 1
            assert np.array_equal(q.view(np.uint8)[: len(x)], expected | (0x80 if sign < 0 else 0))


def test_ue8m0_is_little_endian_and_padded_with_zero_bytes() -> None:
    x = np.concatenate([block(448 * 2.0**n) for n in range(5)])[None]
    _, packed = quantize_fp8(x, round_scale=True, use_ue8m0=True)
    assert packed.dtype == np.int32
    assert packed.shape == (1, 2)
    assert packed.view(np.uint32).tolist() == [[127 | 128 << 8 | 129 << 16 | 130 << 24, 131]]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nan_and_infinity(mode: dict[str, bool]) -> None:
    x = np.concatenate([block(np.nan, -np.nan, 1), block(np.inf, -np.inf, 1, -1), block(1)])[None]
    q, sf = quantize_fp8(x, **mode)
    clean_q, clean_sf = quantize_fp8(x[:, 256:], **mode)
    codes = q.view(np.uint8)[0]
    assert codes[:2].tolist() == [0x7F, 0x7F]
    assert q[0, 2] == clean_q[0, 0]
    assert codes[128:132].tolist() == [0x7F, 0x7F, 0x00, 0x80]
    if "use_ue8m0" in mode:
        expected = int(clean_sf[0, 0])
        assert sf.tolist() == [[expected | 255 << 8 | expected << 16]]
    else:
        assert sf.tolist() == [[clean_sf[0, 0], np.inf, clean_sf[0, 0]]]
    restored = dequantize_fp8(q, sf)[0]
    assert np.isnan(restored[:2]).all()
    assert np.isnan(restored[128:256]).all()
    assert np.isfinite(restored[2:128]).all()


@few
@given(blocks, st.sampled_from(MODES), st.sampled_from([np.float32, BF16]))
def test_dequantised_error(x: Array, mode: dict[str, bool], dtype: Any) -> None:
    """Half a unit in the last of 4 bits, or half a subnormal of 2^-9; the float32 steps add a few 2^-24."""
    x = x.astype(dtype)
    q, sf = quantize_fp8(x, **mode)
    restored = dequantize_fp8(q, sf).astype(np.float64)
    exact = x.astype(np.float64)
    _, float_sf = quantize_fp8(x, round_scale=bool(mode))
    sf_of_channel = np.repeat(float_sf.astype(np.float64), 128, axis=-1)
    bound = np.maximum(np.abs(exact) * 2.0**-4, sf_of_channel * 2.0**-10) + np.abs(exact) * 2.0**-21
    assert (np.abs(restored - exact) <= bound).all()
    assert (np.abs(q.astype(np.float32)) <= 448).all()


@few
@given(blocks)
def test_packed_and_float_scales_say_the_same(x: Array) -> None:
    q, sf = quantize_fp8(x, round_scale=True)
    packed_q, packed = quantize_fp8(x, round_scale=True, use_ue8m0=True)
    assert same_bits(q, packed_q)
    assert packed.shape == (*x.shape[:-1], -(-x.shape[-1] // 512))
    assert same_bits(dequantize_fp8(q, sf), dequantize_fp8(q, packed))
    mantissa, _ = np.frexp(sf)
    assert (mantissa == 0.5).all()


@few
@given(blocks)
def test_blocks_are_independent(x: Array) -> None:
    q, sf = quantize_fp8(x)
    flat_q, flat_sf = quantize_fp8(x.reshape(-1, 128))
    assert same_bits(q.reshape(-1, 128), flat_q)
    assert same_bits(sf.reshape(-1, 1), flat_sf)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError):
        quantize_fp8(block(), use_ue8m0=True)
    with pytest.raises(ArrayError):
        quantize_fp8(block().astype(np.float16))
    with pytest.raises(ArrayError):
        quantize_fp8(block()[:127])
    q, sf = quantize_fp8(block())
    with pytest.raises(ArrayError):
        dequantize_fp8(q, sf[None])
    with pytest.raises(ArrayError):
        dequantize_fp8(block(), sf)

"""The FP8 cast: float8_e4m3fn with one scale per 128 channels, float32 or packed UE8M0."""

from __future__ import annotations

import numpy as np

from ..errors import ArrayError, ConfigError
from .checks import check_array
from .numerics import BFLOAT16, FLOAT8_E4M3, FLOAT32, Array

CHANNELS_PER_SCALE = 128
SCALES_PER_WORD = 4
E4M3_MAX = np.float32(448)
E4M3_MAX_INV = np.float32(1) / E4M3_MAX
E4M3_NAN = np.uint8(0x7F)
AMAX_MIN = np.float32(1e-4)


def quantize_fp8(x: Array, *, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Array, Array]:
    """Cast blocks of 128 channels to float8_e4m3fn, in float32 arithmetic, each step rounded to nearest even.

    Per block: amax = max(1e-4, max |x|), NaN ignored by max, 1e-4 as the float32 nearest to it;
    inv = the float32 nearest to 1/448 (0x3b124925). Then

    - plain:        sf = amax * inv, scale = 448 / amax.
    - round_scale:  e = ceil(log2(amax * inv)), from the bits: exponent plus one if any mantissa bit is set;
                    sf = 2^e, scale = 2^-e, both exact.

    q = x * scale, saturated to -448 .. 448 and then rounded to the nearest e4m3 value, ties to even,
    subnormals kept, -0.0 kept. A NaN becomes 0x7f whatever its sign.

    A block that holds an infinity has sf = +inf and scale = +0 in both modes: its finite elements become 0
    with their sign, its infinities NaN, and all of it dequantises to NaN.

    Args:
        x: bfloat16 or float32 [..., H], H a multiple of 128.
        round_scale: powers of two as scales.
        use_ue8m0: scales as exponents; needs round_scale.

    Returns:
        q: float8_e4m3fn [..., H].
        sf: float32 [..., H/128]. With use_ue8m0 int32 [..., ceil(H/512)]: byte i (little endian) of word w is
            the exponent byte of scale 4w + i, that is bits 23-30 of sf; bytes past the last scale are zero.

    Raises:
        ArrayError: dtype, or H not a multiple of 128.
        ConfigError: use_ue8m0 without round_scale.

    Source: DeepEP csrc/kernels, calculate_fp8_scales in utils.cuh and the cast in internode_ll.cu. With
    round_scale DeepEP makes a scale of -inf out of an infinity; its scale tensors are column-major, these are
    not.
    """
    if use_ue8m0 and not round_scale:
        raise ConfigError("use_ue8m0 needs round_scale: UE8M0 holds powers of two only")
    check_array(x, "x", dtypes=(BFLOAT16, FLOAT32))
    blocks = _blocks(x, "x").astype(np.float32)

    amax = np.fmax.reduce(np.abs(blocks), axis=-1, initial=AMAX_MIN)
    sf = amax * E4M3_MAX_INV
    if round_scale:
        bits = sf.view(np.uint32)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        sf = (exponent << 23).astype(np.uint32).view(np.float32)
        # 255 is infinity; a finite block has an exponent of 105 .. 247, so both powers are normal numbers.
        inverse_exponent = np.where(exponent == 255, 0, 254 - exponent)
        scale = (inverse_exponent << 23).astype(np.uint32).view(np.float32)
    else:
        scale = E4M3_MAX / amax

    with np.errstate(invalid="ignore"):
        scaled = np.clip(blocks * scale[..., None], -E4M3_MAX, E4M3_MAX)
        q = scaled.astype(FLOAT8_E4M3)
    q.view(np.uint8)[np.isnan(scaled)] = E4M3_NAN
    return q.reshape(x.shape), _pack_ue8m0(sf) if use_ue8m0 else sf


def dequantize_fp8(q: Array, sf: Array) -> Array:
    """float32(q) * sf, per block of 128 channels, rounded to float32.

    Args:
        q: float8_e4m3fn [..., H], H a multiple of 128.
        sf: float32 [..., H/128], or packed UE8M0 int32 [..., ceil(H/512)], whose byte b is the float32 with
            the bits b << 23 (2^(b-127); 0 for 0, +inf for 255).

    Returns:
        float32 [..., H].
    """
    check_array(q, "q", dtypes=(FLOAT8_E4M3,))
    blocks = _blocks(q, "q").astype(np.float32)
    num_scales = blocks.shape[-2]
    is_packed = sf.dtype == np.int32
    num_words = -(-num_scales // SCALES_PER_WORD) if is_packed else num_scales
    check_array(sf, "sf", dtypes=(FLOAT32, np.dtype(np.int32)), shape=(*q.shape[:-1], num_words))
    if is_packed:
        sf = _unpack_ue8m0(sf, num_scales)
    with np.errstate(invalid="ignore", over="ignore"):
        product: Array = blocks * sf[..., None]
    return product.reshape(q.shape)


def _blocks(x: Array, name: str) -> Array:
    if x.ndim < 1 or x.shape[-1] % CHANNELS_PER_SCALE:
        raise ArrayError(f"{name} has shape {x.shape}; hidden is not a multiple of {CHANNELS_PER_SCALE}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // CHANNELS_PER_SCALE, CHANNELS_PER_SCALE)


def _pack_ue8m0(sf: Array) -> Array:
    num_scales = sf.shape[-1]
    num_words = -(-num_scales // SCALES_PER_WORD)
    packed = np.zeros((*sf.shape[:-1], num_words * SCALES_PER_WORD), np.uint8)
    packed[..., :num_scales] = (sf.view(np.uint32) >> 23).astype(np.uint8)
    return packed.view("<i4").astype(np.int32)


def _unpack_ue8m0(sf: Array, num_scales: int) -> Array:
    exponent = np.ascontiguousarray(sf.astype("<i4")).view(np.uint8)[..., :num_scales]
    return (exponent.astype(np.uint32) << 23).view(np.float32)

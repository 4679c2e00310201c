"""LogFMT-10: bfloat16 rows in 10 bits an element, evenly spaced in the logarithm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArrayError
from .checks import check_array
from .numerics import BFLOAT16, Array

CHANNELS_PER_BLOCK = 128
SIGN_BIT = 9
MAX_CODE = 511
MAX_LOG_RANGE = np.float32(32)
NUM_STEPS = np.float32(MAX_CODE - 1)


@dataclass(frozen=True, slots=True)
class LogFmt10:
    """Encoded rows [..., H], H/128 blocks each.

    codes: uint16 [..., H]. In a cast block bits 0-8 are the code and bit 9 the sign; in a block that is not
        cast, the 16 bits of the bfloat16.
    is_cast: bool [..., H/128]. It follows from amax and amin, so that the wire need not carry it.
    amax, amin: bfloat16 [..., H/128], of |x| over the block.
    """

    codes: Array
    is_cast: Array
    amax: Array
    amin: Array


def logfmt10_encode(x: Array) -> LogFmt10:
    """Encode bfloat16 rows. Float32 arithmetic, each step rounded to nearest even, in the order written.

    Per block of 128 channels, amax and amin of |x| (a NaN makes both NaN):

        log_amax = log2(amax)                       log_amin = max(log2(amin), log_amax - 32)
        is_cast  = log_amax < 0 and log_amin < log_amax
        step     = (log_amax - log_amin) / 510      step_inv = 1 / step
        rounding = 2 - log2((1 + exp2(step)) * 0.5) * step_inv
        code     = min(floor(max(log2|x| * step_inv + (rounding - log_amin * step_inv), 0)), 511)

    log2 and exp2 are the float32 nearest to the exact value (taken through float64); log2(0) is -inf.
    Code 0 stands for zero and code c for 2^((c-1) * step + log_amin); `rounding` puts the threshold between
    two codes at the arithmetic mean of their values. The sign bit is that of x, -0.0 included.

    Blocks that are not cast travel unchanged: those with an element of magnitude 1 or more, an infinity or a
    NaN, and those of constant magnitude (all zero among them).

    Args:
        x: bfloat16 [..., H], H a multiple of 128.

    Raises:
        ArrayError: dtype, or H not a multiple of 128.

    Source: DeepEP csrc/kernels/internode_ll.cu logfmt_encode. Differences: DeepEP casts the 4 or 8 blocks
    that a warp holds only together, uses the approximate lg2 and ex2 instructions, ignores NaN in amax and
    amin (so that a NaN in a cast block decodes to 0), and does not cap the code.
    """
    check_array(x, "x", dtypes=(BFLOAT16,))
    if x.ndim < 1 or x.shape[-1] % CHANNELS_PER_BLOCK:
        raise ArrayError(f"x has shape {x.shape}; hidden is not a multiple of {CHANNELS_PER_BLOCK}")
    block_shape = (*x.shape[:-1], x.shape[-1] // CHANNELS_PER_BLOCK, CHANNELS_PER_BLOCK)
    bits = np.ascontiguousarray(x).view(np.uint16).reshape(block_shape)
    magnitude = (bits & np.uint16(0x7FFF)).view(BFLOAT16).astype(np.float32)
    amax = magnitude.max(axis=-1).astype(BFLOAT16)
    amin = magnitude.min(axis=-1).astype(BFLOAT16)
    is_cast, log_amin, step = _grid(amax, amin)

    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    step_inv = one / step
    rounding = two - _log2((one + _exp2(step)) * half) * step_inv
    shift = rounding - log_amin * step_inv
    with np.errstate(invalid="ignore"):
        position = _log2(magnitude) * step_inv[..., None] + shift[..., None]
        code = np.minimum(np.floor(np.maximum(position, np.float32(0))), np.float32(MAX_CODE))
        code = np.where(is_cast[..., None], code, np.float32(0)).astype(np.uint16)
    codes = np.where(is_cast[..., None], code | ((bits >> 15) << SIGN_BIT), bits)
    return LogFmt10(codes=codes.reshape(x.shape), is_cast=is_cast, amax=amax, amin=amin)


def logfmt10_decode(encoded: LogFmt10) -> Array:
    """bfloat16 [..., H] of encoded rows.

    In a cast block a code of 0 is zero and c is exp2((c - 1) * step + log_amin): float32 product and sum,
    exp2 rounded to float32 and then to bfloat16, to nearest even both times; step and log_amin as in
    logfmt10_encode, from amax and amin. The sign bit is applied to zero too. Other blocks come back bit for
    bit.

    Source: DeepEP csrc/kernels/internode_ll.cu decode_and_accumulate, which adds the float32 value without
    the rounding to bfloat16.
    """
    _, log_amin, step = _grid(encoded.amax, encoded.amin)
    codes = encoded.codes.reshape(*encoded.is_cast.shape, CHANNELS_PER_BLOCK)
    code = np.where(encoded.is_cast[..., None], codes & np.uint16(MAX_CODE), np.uint16(0))
    exponent = (code.astype(np.float32) - np.float32(1)) * step[..., None] + log_amin[..., None]
    value = np.where(code == 0, np.float32(0), _exp2(exponent)).astype(BFLOAT16)
    sign = ((codes >> SIGN_BIT) & np.uint16(1)) << 15
    decoded = np.where(encoded.is_cast[..., None], value.view(np.uint16) | sign, codes)
    restored: Array = decoded.view(BFLOAT16).reshape(encoded.codes.shape)
    return restored


def _grid(amax: Array, amin: Array) -> tuple[Array, Array, Array]:
    """is_cast, log_amin and step per block; log_amin 0 and step 1 where the block is not cast."""
    log_amax = _log2(amax.astype(np.float32))
    with np.errstate(invalid="ignore"):
        log_amin = np.maximum(_log2(amin.astype(np.float32)), log_amax - MAX_LOG_RANGE)
        is_cast = (log_amax < 0) & (log_amin < log_amax)
        step = (log_amax - log_amin) / NUM_STEPS
    return is_cast, np.where(is_cast, log_amin, np.float32(0)), np.where(is_cast, step, np.float32(1))


def _log2(value: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(value.astype(np.float64)).astype(np.float32)


def _exp2(value: Array) -> Array:
    return np.exp2(value.astype(np.float64)).astype(np.float32)

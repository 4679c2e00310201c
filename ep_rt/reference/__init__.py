"""The oracle: the meaning of every operation, in NumPy, all ranks in one process.

The docstrings here are the specification of ep_rt. Every engine is tested against these functions:
bit for bit, also where floats are added, because the order of the additions is stated. What an engine is
free to choose is named below.

Conventions, valid for every function:

- A list holds one array per rank. R ranks, T tokens of a rank (may differ between ranks, may be 0),
  H hidden, K top-k, E experts, El = E / R experts of one rank. Rank r owns experts r * El to
  (r + 1) * El - 1.
- Expert ids are -1 for "none" or 0 .. E-1, int64 (int32 is accepted), in any order; an id may repeat in
  a row.
- Payload that only moves may be float32, float16, bfloat16, float8_e4m3fn or uint8; its bits arrive
  unchanged, NaN payloads and -0.0 included. Payload that is summed is float32, float16 or bfloat16.
- Sums are taken in float32, each addition and each product rounded to nearest even on its own (no fused
  multiply-add), strictly in the stated order, starting from the first term and not from +0 (so that a sum of
  -0.0 stays -0.0), +0.0 where there is no term; the result is rounded once, to nearest even, to the dtype.
- Free to an engine: the sign and payload bits of a NaN that comes out of a sum, and the contents of rows that
  are called unspecified (here they are zero).

Errors: ArrayError for an array of the wrong shape or dtype or with ids out of range; ConfigError for a number
that cannot work and for arrays that must agree between ranks and do not. Nothing here is collective.

Source: the operations, row order and scale rule are those of DeepEP (deepseek-ai/DeepEP, csrc/kernels:
layout.cu, intranode.cu, internode_ll.cu, utils.cuh); the expert-major layout is that of its elastic buffer.
"""

from __future__ import annotations

from .expert_major import Expanded, collapse, expand
from .fp8 import dequantize_fp8, quantize_fp8
from .logfmt import LogFmt10, logfmt10_decode, logfmt10_encode
from .low_latency import LowLatencyDispatched, low_latency_combine, low_latency_dispatch
from .normal import Combined, Dispatched, Layout, combine, dispatch, dispatch_cached, dispatch_layout

__all__ = [
    "Combined",
    "Dispatched",
    "Expanded",
    "Layout",
    "LogFmt10",
    "LowLatencyDispatched",
    "collapse",
    "combine",
    "dequantize_fp8",
    "dispatch",
    "dispatch_cached",
    "dispatch_layout",
    "expand",
    "logfmt10_decode",
    "logfmt10_encode",
    "low_latency_combine",
    "low_latency_dispatch",
    "quantize_fp8",
]

"""What must be the same on every rank of a call, as 32 bits that the kernels compare. Pure."""

from __future__ import annotations

import zlib
from typing import Final

from ..requests import (
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
)

_ODD: Final = 0x9E3779B1  # spreads small numbers over 32 bits


def dispatch_digest(request: DispatchRequest) -> int:
    """Of a dispatch."""
    x, sf, ids = request.x, request.sf, request.topk_idx
    return _digest(
        "dispatch",
        x.dtype,
        x.shape[1],
        request.layout,
        request.quantize,
        None if sf is None else (sf.dtype, sf.shape[1:]),
        None if ids is None else (ids.dtype, ids.shape[1]),
        request.topk_weights is not None,
        request.num_experts,
        request.num_worst_tokens > 0 and request.handle is None,
        request.num_max_tokens_per_rank,
    )


def combine_digest(request: CombineRequest) -> int:
    """Of a combine."""
    weights = request.topk_weights
    is_summed = weights is not None and request.handle.layout == "rank"
    num_columns = weights.shape[1] if weights is not None and is_summed else None
    return _digest("combine", request.x.dtype, request.x.shape[1], num_columns)


def low_latency_digest(request: LowLatencyDispatchRequest, zone: int, max_send_blocks: int) -> int:
    """Of a low-latency dispatch. Sizes are compared when an area is made."""
    return _digest(
        "low-latency dispatch",
        request.use_fp8,
        request.round_scale,
        request.use_ue8m0,
        request.topk_weights is not None,
        request.layout,
        zone,
        max_send_blocks,
    )


def low_latency_combine_digest(
    request: LowLatencyCombineRequest, wire: str, zone: int, max_send_blocks: int
) -> int:
    """Of a low-latency combine."""
    return _digest(
        "low-latency combine", wire, request.reduce, request.topk_weights is None, zone, max_send_blocks
    )


def along(digest: int, handle_call: int) -> int:
    """Of the same call along the routes of dispatch number `handle_call`, or new ones for 0."""
    return (digest + handle_call * _ODD) & 0xFFFFFFFF


def _digest(*facts: object) -> int:
    # Not hash(): it differs between processes.
    return zlib.crc32(repr(facts).encode())

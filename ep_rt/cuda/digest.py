"""What must be the same on every rank of a call, as 32 bits that the kernels compare. Pure."""

from __future__ import annotations

import zlib
from functools import lru_cache

from ..requests import CombineRequest, DispatchRequest


def dispatch_digest(request: DispatchRequest, *, handle_call: int) -> int:
    """Of a dispatch; `handle_call` is the number of the dispatch that it repeats, or 0."""
    x, sf, ids = request.x, request.sf, request.topk_idx
    return _digest(
        "dispatch",
        x.dtype,
        x.shape[1],
        None if sf is None else (sf.dtype, sf.shape[1:]),
        None if ids is None else (ids.dtype, ids.shape[1]),
        request.topk_weights is not None,
        request.num_experts,
        request.num_worst_tokens > 0 and request.handle is None,
        handle_call,
    )


def combine_digest(request: CombineRequest, *, handle_call: int) -> int:
    """Of a combine along the routes of dispatch number `handle_call`."""
    weights = request.topk_weights
    return _digest(
        "combine",
        request.x.dtype,
        request.x.shape[1],
        None if weights is None else weights.shape[1],
        handle_call,
    )


@lru_cache(maxsize=1024)
def _digest(*facts: object) -> int:
    # Not hash(): it differs between processes.
    return zlib.crc32(repr(facts).encode())

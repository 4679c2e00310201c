"""Dispatch and combine of the low-latency mode: padded, expert-major, weighted on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArrayError, ConfigError
from .checks import (
    check_agreement,
    check_array,
    check_positive,
    check_same_length,
    check_topk_idx,
    local_experts,
)
from .fp8 import dequantize_fp8, quantize_fp8
from .logfmt import logfmt10_decode, logfmt10_encode
from .numerics import BFLOAT16, FLOAT32, MOVED_DTYPES, SUMMED_DTYPES, Array, RowSum, multiply


@dataclass(frozen=True, slots=True)
class LowLatencyDispatched:
    """What one rank received. R ranks, M = num_max_dispatch_tokens_per_rank, El local experts.

    The rows of an expert are packed from 0 in ascending order of (source rank, token, k); rows from
    recv_count on are unspecified in recv_x and sf (zero here) and -1 in src_info.

    recv_x: [El, R*M, H], dtype of x, or float8_e4m3fn with use_fp8.
    sf: float32 [El, R*M, H/128], or int32 [El, R*M, ceil(H/512)] with use_ue8m0; None without use_fp8.
        With layout "rank" recv_x and sf are [R, M, ...]: a row for each (source rank, token), unspecified
        where that token has no expert here.
    recv_count: int32 [El], rows of each expert.
    src_info: int32 [El, R*M], the token's index at its source rank.
    layout_range: int64 [El, R], (begin << 32) | count of the rows that came from each source rank; begin is
        the running count also where count is 0.
    expert_rows: int32 [El, R*M], with layout "rank": source rank * M + token of each row, -1 for none; else
        None.
    """

    recv_x: Array
    sf: Array | None
    recv_count: Array
    src_info: Array
    layout_range: Array
    expert_rows: Array | None = None


def low_latency_dispatch(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    *,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
    layout: str = "expert",
) -> list[LowLatencyDispatched]:
    """Send a row to the expert of every (token, k), cast on the way.

    An expert repeated in a row of topk_idx receives the token once per k.

    Args:
        x: [T, H] per rank, T <= M. With use_fp8 bfloat16 or float32 and H a multiple of 128; otherwise any
            payload dtype, bits unchanged. H and dtype agree between ranks.
        topk_idx: int64 or int32 [T, K] per rank, -1 sends nothing. K agrees between ranks.
        use_fp8, round_scale, use_ue8m0: rows and scales are those of quantize_fp8.
        layout: "expert", or "rank" for one row of each token, with a list of them for each expert.

    Raises:
        ArrayError: shapes, dtypes or ids; more than M tokens on a rank; more than M rows from one rank to
            one expert, which takes a repeated expert.
        ConfigError: experts do not divide by ranks, use_ue8m0 without round_scale, round_scale without
            use_fp8, ranks disagree.

    Source: DeepEP Buffer.low_latency_dispatch, whose order within an expert is not fixed; here it is.
    """
    num_ranks = len(x)
    num_local_experts = local_experts(num_experts, num_ranks)
    num_max_tokens = num_max_dispatch_tokens_per_rank
    check_positive(num_max_dispatch_tokens_per_rank=num_max_tokens)
    check_same_length(num_ranks, topk_idx=topk_idx)
    if (round_scale or use_ue8m0) and not use_fp8:
        raise ConfigError("round_scale and use_ue8m0 describe FP8 scales; they need use_fp8")
    for rank in range(num_ranks):
        dtypes = (BFLOAT16, FLOAT32) if use_fp8 else MOVED_DTYPES
        check_array(x[rank], f"x[{rank}]", dtypes=dtypes, shape=(None, None))
        if len(x[rank]) > num_max_tokens:
            raise ArrayError(
                f"x[{rank}] has {len(x[rank])} tokens, num_max_dispatch_tokens_per_rank={num_max_tokens}"
            )
        check_topk_idx(topk_idx[rank], f"topk_idx[{rank}]", num_experts=num_experts, num_tokens=len(x[rank]))
    check_agreement(x, "x")
    check_agreement(topk_idx, "topk_idx")

    sent_x: list[Array] = list(x)
    sent_sf: list[Array] | None = None
    if use_fp8:
        casts = [quantize_fp8(rows, round_scale=round_scale, use_ue8m0=use_ue8m0) for rows in x]
        sent_x = [q for q, _ in casts]
        sent_sf = [sf for _, sf in casts]
    received = []
    for rank in range(num_ranks):
        shape = (num_local_experts, num_ranks * num_max_tokens)
        recv_x = np.zeros((*shape, sent_x[0].shape[1]), sent_x[0].dtype)
        recv_sf = None if sent_sf is None else np.zeros((*shape, sent_sf[0].shape[1]), sent_sf[0].dtype)
        recv_count = np.zeros(num_local_experts, np.int32)
        src_info = np.full(shape, -1, np.int32)
        layout_range = np.zeros((num_local_experts, num_ranks), np.int64)
        for local in range(num_local_experts):
            begin = 0
            for src in range(num_ranks):
                token, _ = np.nonzero(topk_idx[src] == rank * num_local_experts + local)
                count = len(token)
                if count > num_max_tokens:
                    raise ArrayError(
                        f"topk_idx[{src}] sends {count} rows to expert {rank * num_local_experts + local}, "
                        f"num_max_dispatch_tokens_per_rank={num_max_tokens}"
                    )
                recv_x[local, begin : begin + count] = sent_x[src][token]
                if recv_sf is not None and sent_sf is not None:
                    recv_sf[local, begin : begin + count] = sent_sf[src][token]
                src_info[local, begin : begin + count] = token
                layout_range[local, src] = (begin << 32) | count
                begin += count
            recv_count[local] = begin
        mine = LowLatencyDispatched(recv_x, recv_sf, recv_count, src_info, layout_range)
        received.append(mine if layout == "expert" else _by_rank(mine, sent_x, sent_sf, num_max_tokens))
    return received


def _by_rank(
    mine: LowLatencyDispatched, sent_x: list[Array], sent_sf: list[Array] | None, num_max_tokens: int
) -> LowLatencyDispatched:
    """The same with layout "rank"."""
    num_ranks = len(sent_x)
    expert_rows = np.full_like(mine.src_info, -1)
    for local, count in enumerate(mine.recv_count):
        src = np.repeat(np.arange(num_ranks), mine.layout_range[local] & 0xFFFFFFFF)
        expert_rows[local, :count] = src * num_max_tokens + mine.src_info[local, :count]
    here = np.unique(expert_rows[expert_rows >= 0])
    src, token = here // num_max_tokens, here % num_max_tokens

    def placed(sent: list[Array]) -> Array:
        rows = np.zeros((num_ranks, num_max_tokens, *sent[0].shape[1:]), sent[0].dtype)
        for rank in range(num_ranks):
            mine_of = src == rank
            rows[rank, token[mine_of]] = sent[rank][token[mine_of]]
        return rows

    return LowLatencyDispatched(
        recv_x=placed(sent_x),
        sf=None if sent_sf is None else placed(sent_sf),
        recv_count=mine.recv_count,
        src_info=mine.src_info,
        layout_range=mine.layout_range,
        expert_rows=expert_rows,
    )


def low_latency_combine(
    y: Sequence[Array],
    dispatched: Sequence[LowLatencyDispatched],
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array],
    *,
    use_logfmt: bool = False,
    use_fp8: bool = False,
    reduce: str = "source",
) -> list[Array]:
    """Return the expert rows of every token to its source rank, weighted and summed.

    With reduce "source" out[t] = round(float32 sum over k ascending of topk_weights[t, k] * y(row of (t,
    k))), each product and each addition rounded to float32, starting from the first product; a k with id -1
    is skipped, whatever its weight; +0.0 for a token without experts. A weight of 0 is a term like any other
    (0 * inf is NaN).

    With "rank" each rank makes that sum over its own experts and rounds it to the dtype of y, and out[t] is
    the float32 sum of those over the ranks in ascending order, starting from the first one, rounded once. A
    rank with no k of the token gives no term. What travels is a row for each rank that has an expert of it.

    Args:
        y: [El, R*M, H] per rank, float32, float16 or bfloat16; rows as in recv_x, unused rows are ignored.
        topk_idx: as given to the dispatch that made `dispatched`.
        topk_weights: float32 [T, K] per rank.
        use_logfmt: every row that travels (of y, or of the ranks' sums) goes through
            logfmt10_decode(logfmt10_encode(row)) first; bfloat16 only.
        use_fp8: it goes through dequantize_fp8(*quantize_fp8(row)), which is float32; bfloat16 or float32.
        reduce: "source" or "rank".

    Returns:
        [T, H] per rank, dtype of y.

    Raises:
        ArrayError: shapes, dtypes or ids; topk_idx is not the one that was dispatched.
        ConfigError: both use_logfmt and use_fp8; another reduce.

    Source: DeepEP Buffer.low_latency_combine, which reduces at the source and adds with a fused multiply-add
    starting from +0.
    """
    num_ranks = len(y)
    check_same_length(num_ranks, dispatched=dispatched, topk_idx=topk_idx, topk_weights=topk_weights)
    num_local_experts, num_rows = dispatched[0].src_info.shape
    for rank in range(num_ranks):
        dtypes = (BFLOAT16,) if use_logfmt else SUMMED_DTYPES
        check_array(y[rank], f"y[{rank}]", dtypes=dtypes, shape=(num_local_experts, num_rows, None))
        check_topk_idx(topk_idx[rank], f"topk_idx[{rank}]", num_experts=num_local_experts * num_ranks)
        check_array(
            topk_weights[rank], f"topk_weights[{rank}]", dtypes=(FLOAT32,), shape=topk_idx[rank].shape
        )
    check_agreement(y, "y")
    if reduce not in ("source", "rank"):
        raise ConfigError(f"reduce={reduce!r}; 'source' or 'rank'")
    if use_logfmt and use_fp8:
        raise ConfigError("use_logfmt and use_fp8 exclude each other")

    def travelled(rows: Array) -> Array:
        if use_fp8:
            return dequantize_fp8(*quantize_fp8(rows))
        return logfmt10_decode(logfmt10_encode(rows)) if use_logfmt else rows

    combined = []
    for rank in range(num_ranks):
        row = _rows_of(topk_idx[rank], dispatched, rank=rank)
        shape, dtype = (len(row), y[rank].shape[2]), y[rank].dtype
        owners = np.where(topk_idx[rank] >= 0, topk_idx[rank] // num_local_experts, -1)

        def terms_of(owner: int, k: int, row: Array = row, rank: int = rank, owners: Array = owners) -> Any:
            here = np.flatnonzero(owners[:, k] == owner)
            return here, y[owner][topk_idx[rank][here, k] % num_local_experts, row[here, k]]

        total = RowSum(*shape)
        if reduce == "source":
            for k in range(row.shape[1]):
                for owner in range(num_ranks):
                    here, terms = terms_of(owner, k)
                    total.add(here, multiply(topk_weights[rank][here, k], travelled(terms)))
        else:
            for owner in range(num_ranks):
                partial = RowSum(*shape)
                for k in range(row.shape[1]):
                    here, terms = terms_of(owner, k)
                    partial.add(here, multiply(topk_weights[rank][here, k], terms))
                here = np.flatnonzero((owners == owner).any(axis=1))
                total.add(here, travelled(partial.rounded(dtype)[here]))
        combined.append(total.rounded(dtype))
    return combined


def _rows_of(topk_idx: Array, dispatched: Sequence[LowLatencyDispatched], *, rank: int) -> Array:
    """int64 [T, K]: the row, within its expert, that (t, k) of `rank` was sent to; -1 for none."""
    row = np.full(topk_idx.shape, -1, np.int64)
    for owner, d in enumerate(dispatched):
        for local in range(len(d.recv_count)):
            expert = owner * len(d.recv_count) + local
            token, k = np.nonzero(topk_idx == expert)
            packed = int(d.layout_range[local, rank])
            begin, count = packed >> 32, packed & 0xFFFFFFFF
            if not np.array_equal(d.src_info[local, begin : begin + count], token):
                raise ArrayError(
                    f"topk_idx[{rank}] is not the one dispatched: expert {expert} has other tokens"
                )
            row[token, k] = begin + np.arange(count)
    return row

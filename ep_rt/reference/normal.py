"""Layout, dispatch, cached dispatch and combine of the normal mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..errors import ConfigError
from .checks import (
    check_agreement,
    check_array,
    check_positive,
    check_same_length,
    check_topk_idx,
    local_experts,
)
from .numerics import FLOAT32, MOVED_DTYPES, SUMMED_DTYPES, Array, RowSum, align_up

SF_DTYPES = (FLOAT32, np.dtype(np.int32))
Bias: TypeAlias = "Array | tuple[Array, Array] | None"


@dataclass(frozen=True, slots=True)
class Layout:
    """What one rank sends where. T tokens, R ranks, N nodes, E experts.

    num_tokens_per_rank: int32 [R], tokens with at least one expert on that rank.
    num_tokens_per_node: int32 [N], tokens with at least one expert on that node; None without nodes.
    num_tokens_per_expert: int32 [E], (token, k) pairs: an id repeated in one row counts each time.
    is_token_in_rank: bool [T, R].
    """

    num_tokens_per_rank: Array
    num_tokens_per_node: Array | None
    num_tokens_per_expert: Array
    is_token_in_rank: Array


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What one rank received. N rows: the rows that arrived, or num_worst_tokens = C rows.

    Rows come in ascending order of (src_rank, src_token). With C > 0 the arrays have exactly C rows whatever
    arrived; rows from num_recv_tokens on hold no token: recv_x and recv_sf unspecified (zero here),
    recv_topk_idx -1, recv_topk_weights +0.0, src_rank and src_token -1.

    recv_x: [N, H], dtype of x, bits unchanged.
    recv_sf: [N, S], dtype of sf, bits unchanged; None without sf.
    recv_topk_idx: int64 [N, K], *local* expert ids (0 .. El-1) in the columns of the sender, -1 in the
        columns that hold another rank's expert or none.
    recv_topk_weights: float32 [N, K], +0.0 where recv_topk_idx is -1; None without topk_weights.
    num_recv_tokens: tokens that were sent here, the dropped ones included.
    num_recv_tokens_per_expert: El counts of the (token, k) pairs sent here, also those of dropped tokens,
        each rounded up to expert_alignment; 0 stays 0.
    src_rank, src_token: int32 [N], where each row came from.
    overflow: more than C > 0 tokens were sent here; the last num_recv_tokens - C were dropped.
    """

    recv_x: Array
    recv_sf: Array | None
    recv_topk_idx: Array
    recv_topk_weights: Array | None
    num_recv_tokens: int
    num_recv_tokens_per_expert: list[int]
    src_rank: Array
    src_token: Array
    overflow: bool


@dataclass(frozen=True, slots=True)
class Combined:
    """x: [T, H], dtype of y. topk_weights: float32 [T, K], None where none were given."""

    x: Array
    topk_weights: Array | None


def dispatch_layout(
    topk_idx: Array, *, num_experts: int, num_ranks: int, ranks_per_node: int | None = None
) -> Layout:
    """Count where one rank's tokens go.

    Args:
        topk_idx: int64 or int32 [T, K]; -1 goes nowhere.
        ranks_per_node: with it, num_tokens_per_node is counted over nodes of that many consecutive ranks.

    Raises:
        ArrayError: shape, dtype or ids of `topk_idx`.
        ConfigError: experts do not divide by ranks, or ranks by ranks_per_node.

    Source: DeepEP get_dispatch_layout.
    """
    num_local_experts = local_experts(num_experts, num_ranks)
    check_topk_idx(topk_idx, "topk_idx", num_experts=num_experts)
    num_tokens = len(topk_idx)

    token, k = np.nonzero(topk_idx >= 0)
    expert = topk_idx[token, k]
    is_token_in_rank = np.zeros((num_tokens, num_ranks), np.bool_)
    is_token_in_rank[token, expert // num_local_experts] = True

    num_tokens_per_node = None
    if ranks_per_node is not None:
        check_positive(ranks_per_node=ranks_per_node)
        if num_ranks % ranks_per_node:
            raise ConfigError(f"num_ranks={num_ranks} is not divisible by ranks_per_node={ranks_per_node}")
        by_node = is_token_in_rank.reshape(num_tokens, num_ranks // ranks_per_node, ranks_per_node)
        num_tokens_per_node = by_node.any(axis=2).sum(axis=0, dtype=np.int32)

    return Layout(
        num_tokens_per_rank=is_token_in_rank.sum(axis=0, dtype=np.int32),
        num_tokens_per_node=num_tokens_per_node,
        num_tokens_per_expert=np.bincount(expert, minlength=num_experts).astype(np.int32),
        is_token_in_rank=is_token_in_rank,
    )


def dispatch(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    *,
    num_experts: int,
    topk_weights: Sequence[Array] | None = None,
    sf: Sequence[Array] | None = None,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
) -> list[Dispatched]:
    """Send every token once to each rank that owns at least one of its experts.

    Args:
        x: [T, H] per rank; float32, float16, bfloat16, float8_e4m3fn or uint8. H and dtype agree between
            ranks.
        topk_idx: int64 or int32 [T, K] per rank. K agrees between ranks.
        topk_weights: float32 [T, K] per rank; moved, never applied.
        sf: float32 or int32 [T, S] per rank: scale factors that travel with the rows, untouched.
        expert_alignment: num_recv_tokens_per_expert is rounded up to it; no row moves because of it.
        num_worst_tokens: C > 0 fixes the number of rows of every returned array (see Dispatched). If more
            than C tokens are sent to a rank, its first C rows are kept, the others dropped, and overflow set.

    Returns:
        One Dispatched per rank.

    Source: DeepEP Buffer.dispatch; the overflow flag is ours.
    """
    num_ranks = len(x)
    num_local_experts = local_experts(num_experts, num_ranks)
    check_same_length(num_ranks, topk_idx=topk_idx, topk_weights=topk_weights, sf=sf)
    check_positive(expert_alignment=expert_alignment)
    if num_worst_tokens < 0:
        raise ConfigError(f"num_worst_tokens={num_worst_tokens} is negative")
    _check_payload(x, sf)
    for rank in range(num_ranks):
        num_tokens = len(x[rank])
        check_topk_idx(topk_idx[rank], f"topk_idx[{rank}]", num_experts=num_experts, num_tokens=num_tokens)
        if topk_weights is not None:
            shape = (num_tokens, topk_idx[rank].shape[1])
            check_array(topk_weights[rank], f"topk_weights[{rank}]", dtypes=(FLOAT32,), shape=shape)
    check_agreement(topk_idx, "topk_idx")

    is_token_in_rank = [
        dispatch_layout(ids, num_experts=num_experts, num_ranks=num_ranks).is_token_in_rank
        for ids in topk_idx
    ]
    received = []
    for rank in range(num_ranks):
        tokens = [np.flatnonzero(is_in_rank[:, rank]) for is_in_rank in is_token_in_rank]
        num_recv_tokens = sum(map(len, tokens))
        num_rows = num_worst_tokens or num_recv_tokens
        num_kept = min(num_rows, num_recv_tokens)
        src_rank = np.full(num_rows, -1, np.int32)
        src_token = np.full(num_rows, -1, np.int32)
        src_rank[:num_kept] = np.repeat(np.arange(num_ranks), [len(part) for part in tokens])[:num_kept]
        src_token[:num_kept] = np.concatenate(tokens)[:num_kept]

        local_idx = _gather(topk_idx, src_rank, src_token, fill=-1).astype(np.int64)
        local_idx -= rank * num_local_experts
        local_idx[(local_idx < 0) | (local_idx >= num_local_experts)] = -1
        weights = None
        if topk_weights is not None:
            weights = _gather(topk_weights, src_rank, src_token)
            weights[local_idx < 0] = 0
        all_ids = np.concatenate([ids.reshape(-1) for ids in topk_idx]) - rank * num_local_experts
        mine = all_ids[(all_ids >= 0) & (all_ids < num_local_experts)]
        counts = np.bincount(mine, minlength=num_local_experts)
        received.append(
            Dispatched(
                recv_x=_gather(x, src_rank, src_token),
                recv_sf=None if sf is None else _gather(sf, src_rank, src_token),
                recv_topk_idx=local_idx,
                recv_topk_weights=weights,
                num_recv_tokens=num_recv_tokens,
                num_recv_tokens_per_expert=[align_up(int(count), expert_alignment) for count in counts],
                src_rank=src_rank,
                src_token=src_token,
                overflow=num_recv_tokens > num_rows,
            )
        )
    return received


def dispatch_cached(
    x: Sequence[Array], dispatched: Sequence[Dispatched], sf: Sequence[Array] | None = None
) -> list[tuple[Array, Array | None]]:
    """Send new payload along the routes of an earlier dispatch.

    Args:
        x: [T, H] per rank, T as in the dispatch that made `dispatched`; H and dtype may differ from it.
        sf: [T, S] per rank, given or not whatever the earlier dispatch had.

    Returns:
        Per rank (recv_x, recv_sf), in the rows of `dispatched`; rows without a token are unspecified (zero
        here).

    Source: DeepEP Buffer.dispatch with a handle. It is also the backward pass of combine.
    """
    check_same_length(len(x), dispatched=dispatched, sf=sf)
    _check_payload(x, sf)
    _check_sources(dispatched, [len(part) for part in x])
    return [
        (
            _gather(x, d.src_rank, d.src_token),
            None if sf is None else _gather(sf, d.src_rank, d.src_token),
        )
        for d in dispatched
    ]


def combine(
    y: Sequence[Array],
    dispatched: Sequence[Dispatched],
    *,
    num_tokens: Sequence[int],
    topk_weights: Sequence[Array] | None = None,
    bias: Sequence[Bias] | None = None,
    ranks_per_node: int | None = None,
) -> list[Combined]:
    """Return every token to its source rank, summed over the ranks it was sent to.

    out[t] = round(float32 sum, left to right: the rows of token t in ascending order of the rank that
    received them, then bias 0, then bias 1). Nothing is weighted: the expert side has done that.
    Combined topk_weights follow the same rule per element, in float32: every received row of t adds all of
    its K elements, the +0.0 of columns that belong to other ranks included.

    Args:
        y: per rank [N, H], float32, float16 or bfloat16, N the number of rows of its recv_x. Rows that hold
            no token are ignored; tokens dropped by num_worst_tokens add nothing.
        num_tokens: T of each rank.
        topk_weights: per rank float32 [N, K].
        bias: per rank None, one array, or a tuple of two, each [T, H] of y's dtype.
        ranks_per_node: with it, the rows of each node of that many consecutive ranks are summed and rounded
            to y's dtype first (weights stay float32); these sums are the terms then, nodes ascending.

    Returns:
        One Combined per rank. A token that was sent nowhere and has no bias is +0.0.

    Source: DeepEP Buffer.combine. It is also the backward pass of dispatch: the transpose of its row map.
    """
    num_ranks = len(y)
    check_same_length(
        num_ranks, dispatched=dispatched, num_tokens=num_tokens, topk_weights=topk_weights, bias=bias
    )
    _check_sources(dispatched, num_tokens)
    for rank, d in enumerate(dispatched):
        check_array(y[rank], f"y[{rank}]", dtypes=SUMMED_DTYPES, shape=(len(d.src_rank), None))
        if topk_weights is not None:
            shape = (len(d.src_rank), None)
            check_array(topk_weights[rank], f"topk_weights[{rank}]", dtypes=(FLOAT32,), shape=shape)
    check_agreement(y, "y")
    if topk_weights is not None:
        check_agreement(topk_weights, "topk_weights")

    combined = []
    for rank in range(num_ranks):
        total = _return_rows(
            y, dispatched, rank=rank, num_tokens=num_tokens[rank], ranks_per_node=ranks_per_node
        )
        biases = () if bias is None else _as_tuple(bias[rank])
        for i, term in enumerate(biases):
            shape = (num_tokens[rank], y[rank].shape[1])
            check_array(term, f"bias[{rank}][{i}]", dtypes=(y[rank].dtype,), shape=shape)
            total.add(np.arange(num_tokens[rank]), term)
        weights = None
        if topk_weights is not None:
            summed = _return_rows(
                topk_weights,
                dispatched,
                rank=rank,
                num_tokens=num_tokens[rank],
                ranks_per_node=ranks_per_node,
            )
            weights = summed.rounded(np.float32)
        combined.append(Combined(x=total.rounded(y[rank].dtype), topk_weights=weights))
    return combined


def _return_rows(
    rows: Sequence[Array],
    dispatched: Sequence[Dispatched],
    *,
    rank: int,
    num_tokens: int,
    ranks_per_node: int | None,
) -> RowSum:
    """Sum the rows that came from `rank`, receivers in ascending order."""
    total = RowSum(num_tokens, rows[0].shape[1])
    num_each = ranks_per_node or len(rows)
    for first in range(0, len(rows), num_each):
        part = total if ranks_per_node is None else RowSum(num_tokens, rows[0].shape[1])
        tokens = np.zeros(num_tokens, bool)
        for received, d in zip(rows[first : first + num_each], dispatched[first:], strict=False):
            here = np.flatnonzero(d.src_rank == rank)
            part.add(d.src_token[here], received[here])
            tokens[d.src_token[here]] = True
        if ranks_per_node is not None:
            total.add(np.flatnonzero(tokens), part.rounded(rows[0].dtype)[tokens])
    return total


def _gather(arrays: Sequence[Array], src_rank: Array, src_token: Array, fill: int = 0) -> Array:
    """Row i is arrays[src_rank[i]][src_token[i]], or `fill` where src_rank is -1."""
    rows = np.full((len(src_rank), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for rank, array in enumerate(arrays):
        from_rank = src_rank == rank
        rows[from_rank] = array[src_token[from_rank]]
    return rows


def _as_tuple(bias: Bias) -> tuple[Array, ...]:
    if bias is None:
        return ()
    if isinstance(bias, tuple):
        if len(bias) > 2:
            raise ConfigError(f"{len(bias)} biases; at most 2 are added")
        return bias
    return (bias,)


def _check_payload(x: Sequence[Array], sf: Sequence[Array] | None) -> None:
    for rank, array in enumerate(x):
        check_array(array, f"x[{rank}]", dtypes=MOVED_DTYPES, shape=(None, None))
        if sf is not None:
            check_array(sf[rank], f"sf[{rank}]", dtypes=SF_DTYPES, shape=(len(array), None))
    check_agreement(x, "x")
    if sf is not None:
        check_agreement(sf, "sf")


def _check_sources(dispatched: Sequence[Dispatched], num_tokens: Sequence[int]) -> None:
    for d in dispatched:
        for rank, count in enumerate(num_tokens):
            tokens = d.src_token[d.src_rank == rank]
            if len(tokens) and tokens.max() >= count:
                raise ConfigError(
                    f"token {tokens.max()} of rank {rank} was dispatched, but it has {count} tokens now"
                )

"""The expert-major layout on the host: received rows to their experts, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..handle import ExpertRows
from .memory import HostPool
from .rows import Array, Term, sum_terms


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where the experts' rows lie.

    Attributes:
        segments: their padded lengths.
        psum_num_tokens: int32, where the true rows of each end.
    """

    rows: ExpertRows
    segments: list[int]
    psum_num_tokens: NDArray[np.int32]


def lay_out(
    topk_idx: Array, *, num_local_experts: int, alignment: int, num_recv_tokens: int, num_worst_tokens: int
) -> ExpertLayout:
    """Sort received (row, column) pairs by expert.

    Args:
        topk_idx: [kept rows, num_topk], local expert ids, -1 for none.
        num_recv_tokens: kept or not.
        num_worst_tokens: rows of the layout; 0 for as many as there are.

    Source: reference.expand.
    """
    expert = topk_idx.reshape(-1)
    pairs = np.flatnonzero(expert >= 0)
    pairs = pairs[np.argsort(expert[pairs], kind="stable")]
    counts = np.bincount(expert[pairs], minlength=num_local_experts)
    segments = -(-counts // alignment) * alignment
    begins = np.cumsum(segments) - segments
    num_needed_rows = int(segments.sum())
    num_rows = num_worst_tokens or num_needed_rows

    place = np.arange(len(pairs)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
    fits = place < num_rows
    received_row, topk = np.full((2, num_rows), -1, np.int64)
    received_row[place[fits]], topk[place[fits]] = np.divmod(pairs[fits], max(1, topk_idx.shape[1]))
    return ExpertLayout(
        rows=ExpertRows(
            received_row=received_row,
            topk=topk,
            num_received_rows=len(topk_idx),
            # Every token has an expert here, so more tokens than kept rows need more rows than there are.
            num_needed_rows=max(num_needed_rows, num_recv_tokens),
        ),
        segments=segments.tolist(),
        psum_num_tokens=np.minimum(begins + counts, num_rows).astype(np.int32),
    )


def expand(received: Array, rows: ExpertRows, *, zero_padding: bool, pool: HostPool) -> Array:
    """The received row of every expert-major row. Padding is zero, or unspecified."""
    is_there = rows.received_row >= 0
    out = pool.empty((len(is_there), *received.shape[1:]), received.dtype)
    if zero_padding:
        out[~is_there] = 0
    out[is_there] = received[rows.received_row[is_there]]
    return out


def expand_weights(topk_weights: Array, rows: ExpertRows) -> NDArray[np.float32]:
    """The weight of every expert-major row, 0 in padding."""
    is_there = rows.received_row >= 0
    out = np.zeros(len(is_there), np.float32)
    out[is_there] = topk_weights[rows.received_row[is_there], rows.topk[is_there]]
    return out


def collapse(y: Array, rows: ExpertRows, weights: Array | None, *, pool: HostPool) -> Array:
    """Sum each received token's expert-major rows, columns ascending. Source: reference.collapse."""
    out = pool.empty((rows.num_received_rows, *y.shape[1:]), y.dtype)
    sum_terms(_terms(y, rows, weights), [], out)
    return out


def _terms(y: Array, rows: ExpertRows, weights: Array | None) -> Sequence[Term]:
    """One for each column that occurs."""
    is_there = np.flatnonzero(rows.received_row >= 0)
    ordered = is_there[np.lexsort((rows.received_row[is_there], rows.topk[is_there]))]
    columns, firsts = np.unique(rows.topk[ordered], return_index=True)
    return [
        Term(
            rows=y,
            tokens=rows.received_row[index],
            index=index,
            weights=None if weights is None else weights[index],
        )
        for index in np.split(ordered, firsts[1:])[: len(columns)]
    ]

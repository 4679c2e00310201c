"""The expert-major ("expanded") layout: one row per (received token, local expert), experts in segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArrayError, ConfigError
from .checks import check_array, check_positive
from .normal import Dispatched
from .numerics import SUMMED_DTYPES, Array, RowSum, align_up, multiply


@dataclass(frozen=True, slots=True)
class Expanded:
    """One rank's received tokens, sorted by local expert. P rows, El local experts.

    Rows are in ascending order of (expert, received row, k); a repeated expert in a row gives a row per k.
    Each expert's segment starts at a multiple of `alignment` and is padded to one; P is the sum of the
    padded segments. With num_worst_tokens = C > 0, P is C: rows that would lie at C or beyond are dropped,
    and those behind the last segment are padding. Padding rows: x, sf and weights zero, row and topk -1.

    x: [P, H], dtype of recv_x, bits unchanged. sf: [P, S], or None.
    weights: float32 [P], the weight of (row, k); None without weights.
    row, topk: int32 [P], the received row and the k it stands for.
    num_tokens_per_expert: El padded segment lengths, dropped rows included; they sum to P without C.
    psum_num_tokens_per_expert: int32 [El], where the true rows of an expert end: begin of its segment plus
        its true count, and at most P. Segment e begins at align(psum[e - 1]), segment 0 at 0; it is the
        grouped layout that DeepGEMM takes with use_psum_layout.
    num_needed_rows: the sum of the padded segments, but at least the tokens that were sent here: those that
        the dispatch dropped already are in no segment, and each would have a row.
    overflow: num_needed_rows is more than C > 0.
    """

    x: Array
    sf: Array | None
    weights: Array | None
    row: Array
    topk: Array
    num_tokens_per_expert: list[int]
    psum_num_tokens_per_expert: Array
    num_needed_rows: int
    overflow: bool


def expand(
    d: Dispatched, *, num_local_experts: int, alignment: int = 1, num_worst_tokens: int = 0
) -> Expanded:
    """Lay one rank's received tokens out by expert. Rows of `d` that hold no token are left out.

    Args:
        num_worst_tokens: C > 0 fixes the number of rows (see Expanded). Give the dispatch the same.

    Raises:
        ArrayError: recv_topk_idx names an expert beyond num_local_experts.
        ConfigError: num_local_experts or alignment below 1, num_worst_tokens below 0.

    Source: DeepEP's elastic buffer, dispatch with do_expand; here the order within a segment is fixed.
    """
    check_positive(num_local_experts=num_local_experts, alignment=alignment)
    if num_worst_tokens < 0:
        raise ConfigError(f"num_worst_tokens={num_worst_tokens} is negative")
    if (d.recv_topk_idx >= num_local_experts).any():
        raise ArrayError(f"recv_topk_idx has {d.recv_topk_idx.max()}, a rank has {num_local_experts} experts")

    rows: list[Array] = []
    ks: list[Array] = []
    psum: list[int] = []
    padded: list[int] = []
    for expert in range(num_local_experts):
        row, k = np.nonzero(d.recv_topk_idx == expert)
        padded.append(align_up(len(row), alignment))
        psum.append(sum(padded[:-1]) + len(row))
        padding = np.full(padded[-1] - len(row), -1)
        rows += [row, padding]
        ks += [k, padding]
    num_rows = num_worst_tokens or sum(padded)
    behind = np.full(max(0, num_rows - sum(padded)), -1)
    row = np.concatenate([*rows, behind])[:num_rows].astype(np.int32)
    topk = np.concatenate([*ks, behind])[:num_rows].astype(np.int32)
    num_needed_rows = max(sum(padded), d.num_recv_tokens)

    weights = None
    if d.recv_topk_weights is not None:
        weights = np.zeros(len(row), np.float32)
        weights[row >= 0] = d.recv_topk_weights[row[row >= 0], topk[row >= 0]]
    return Expanded(
        x=_spread(d.recv_x, row),
        sf=None if d.recv_sf is None else _spread(d.recv_sf, row),
        weights=weights,
        row=row,
        topk=topk,
        num_tokens_per_expert=padded,
        psum_num_tokens_per_expert=np.minimum(psum, num_rows).astype(np.int32),
        num_needed_rows=num_needed_rows,
        overflow=num_needed_rows > num_rows,
    )


def collapse(y: Array, e: Expanded, num_recv_tokens: int, *, weighted: bool) -> Array:
    """Sum the expert rows of every received token: what combine takes.

    Args:
        y: [P, H], float32, float16 or bfloat16, rows as in `e`; padding rows are ignored.
        num_recv_tokens: rows of the result. With num_worst_tokens pass C, so that combine can take it.
        weighted: multiply each row by its weight (float32 product, rounded) before it is added.

    Returns:
        [num_recv_tokens, H], dtype of y: float32 sum over k ascending, rounded once. A received row without
        a local expert is +0.0.

    Raises:
        ArrayError: shape or dtype of `y`; `weighted` without weights; `e` has a row beyond num_recv_tokens.

    Source: DeepEP's elastic buffer, combine of an expanded layout.
    """
    check_array(y, "y", dtypes=SUMMED_DTYPES, shape=(len(e.row), None))
    if weighted and e.weights is None:
        raise ArrayError("weighted collapse of a layout that was dispatched without topk_weights")
    if len(e.row) and e.row.max() >= num_recv_tokens:
        raise ArrayError(f"the layout has received row {e.row.max()}, num_recv_tokens={num_recv_tokens}")
    total = RowSum(num_recv_tokens, y.shape[1])
    for k in range(int(e.topk.max(initial=-1)) + 1):
        here = np.flatnonzero(e.topk == k)
        terms = y[here]
        if weighted and e.weights is not None:
            terms = multiply(e.weights[here], terms)
        total.add(e.row[here], terms)
    return total.rounded(y.dtype)


def _spread(array: Array, row: Array) -> Array:
    """array[row], zero where row is -1."""
    rows = np.zeros((len(row), *array.shape[1:]), array.dtype)
    rows[row >= 0] = array[row[row >= 0]]
    return rows

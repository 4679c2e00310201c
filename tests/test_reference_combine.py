"""The oracle's combine: order, rounding, bias, weights, the transpose of dispatch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import BF16, Array, Case, bf16, cases, dispatch, example, few, same_bits

from ep_rt import reference


@few
@given(cases(), st.sampled_from([0, 2, 20]))
def test_combine_is_the_transpose_of_dispatch(case: Case, capacity: int) -> None:
    """<dispatch(x), y> == <x, combine(y)>, exactly: small integers in float64."""
    x = case.integers(4)
    received = dispatch(case, x, num_worst_tokens=capacity)
    rng = np.random.default_rng(case.seed)
    y = [rng.integers(-8, 8, d.recv_x.shape).astype(np.float32) for d in received]
    combined = reference.combine(y, received, num_tokens=case.num_tokens)

    def inner(a: list[Array], b: list[Array]) -> float:
        return sum(float((left.astype(np.float64) * right).sum()) for left, right in zip(a, b, strict=True))

    assert inner([d.recv_x for d in received], y) == inner(x, [c.x for c in combined])


def through_identity_experts(case: Case, x: list[Array], weights: list[Array]) -> list[Array]:
    received = dispatch(case, x, topk_weights=weights)
    y = []
    for d in received:
        e = reference.expand(d, num_local_experts=case.num_local_experts)
        y.append(reference.collapse(e.x, e, d.num_recv_tokens, weighted=True))
    return [c.x for c in reference.combine(y, received, num_tokens=case.num_tokens)]


@few
@given(cases(min_id=0))
def test_identity_experts_give_x_back_exactly(case: Case) -> None:
    """Power-of-two weights that sum to one, x of 4 bits: no step of the way rounds, in bfloat16."""
    x = case.integers(8, limit=15, dtype=BF16)
    weights = case.weights()
    for rows in weights:
        rows[:, -1] *= 2
        assert (rows.sum(axis=1) == 1).all()
    for out, rows in zip(through_identity_experts(case, x, weights), x, strict=True):
        assert np.array_equal(out, rows)


@few
@given(cases(min_id=0), st.sampled_from([np.float32, np.float16, BF16]))
def test_identity_experts_give_x_back_within_rounding(case: Case, dtype: Any) -> None:
    """Any x, positive weights that sum to one.

    With u the unit roundoff of the dtype and v = 2^-24 of float32: the weights sum to 1 within v, each of at
    most 3K products and sums rounds by v, each partial row and the result round by u. All terms have one
    sign, so that the relative error is at most 2u + u^2 + (3K + 1) v, the last doubled for second orders.
    """
    rng = np.random.default_rng(case.seed)
    x = [rng.uniform(1, 2, (count, 8)).astype(dtype) for count in case.num_tokens]
    weights = []
    for count in case.num_tokens:
        raw = rng.uniform(0.1, 1, (count, case.num_topk))
        weights.append((raw / raw.sum(axis=1, keepdims=True)).astype(np.float32))
    roundoff = {np.float32: 2.0**-24, np.float16: 2.0**-11, BF16: 2.0**-8}[dtype]
    bound = 2 * roundoff + roundoff**2 + 2 * (3 * case.num_topk + 1) * 2.0**-24
    for out, rows in zip(through_identity_experts(case, x, weights), x, strict=True):
        exact = rows.astype(np.float64)
        assert (np.abs(out.astype(np.float64) - exact) <= bound * exact).all()


@few
@given(cases())
def test_combined_weights_are_those_dispatched(case: Case) -> None:
    weights = case.weights()
    received = dispatch(case, case.origins(), topk_weights=weights)
    recv_weights = [d.recv_topk_weights for d in received if d.recv_topk_weights is not None]
    combined = reference.combine(
        [d.recv_x for d in received], received, num_tokens=case.num_tokens, topk_weights=recv_weights
    )
    for out, ids, rows in zip(combined, case.topk_idx, weights, strict=True):
        assert out.topk_weights is not None
        assert same_bits(out.topk_weights, np.where(ids >= 0, rows, np.float32(0)))


def combine_rows(rows: list[Array], bias: Any = None) -> Array:
    """One token of rank 0 that went to len(rows) ranks, which return these rows."""
    num_ranks, width = len(rows), rows[0].shape[1]
    ids = [np.arange(num_ranks)[None], *[np.zeros((0, num_ranks), np.int64)] * (num_ranks - 1)]
    x = [np.zeros((len(part), width), rows[0].dtype) for part in ids]
    received = reference.dispatch(x, ids, num_experts=num_ranks)
    num_tokens = [1] + [0] * (num_ranks - 1)
    biases = None if bias is None else [bias] + [None] * (num_ranks - 1)
    return reference.combine(rows, received, num_tokens=num_tokens, bias=biases)[0].x


def test_negative_zero_survives() -> None:
    assert same_bits(combine_rows([bf16(-0.0)]), bf16(-0.0))
    assert same_bits(combine_rows([bf16(-0.0), bf16(-0.0)]), bf16(-0.0))
    assert same_bits(combine_rows([bf16(-0.0), bf16(0.0)]), bf16(0.0))
    assert same_bits(combine_rows([bf16(-0.0)], bias=bf16(-0.0)), bf16(-0.0))


def test_nan_and_infinity_pass_through() -> None:
    inf, nan = np.inf, np.nan
    out = combine_rows([bf16(nan, 1, inf, inf, -inf), bf16(1, nan, 1, -inf, -inf)])
    assert np.array_equal(out.astype(np.float32), [[nan, nan, inf, nan, -inf]], equal_nan=True)


def test_rounding_is_to_nearest_even() -> None:
    ulp = 2.0**-7  # of bfloat16 at 1
    out = combine_rows([bf16(1, 1 + ulp, 1, 1, -1), bf16(ulp / 2, ulp / 2, ulp / 4, 0.75 * ulp, -ulp / 2)])
    assert out.astype(np.float64).tolist() == [[1, 1 + 2 * ulp, 1, 1 + ulp, -1]]
    half = [
        np.array([[1, 1 + 2**-10, 65504, 65504]], np.float16),
        np.array([[2**-11, 2**-11, 15, 16]], np.float16),
    ]
    assert combine_rows(half).tolist() == [[1, 1 + 2**-9, 65504, np.inf]]
    assert combine_rows([bf16(1.0) * BF16.type(2.0**127)] * 2).astype(np.float32).tolist() == [[np.inf]]


def test_sums_run_in_rank_order_in_float32_and_round_once() -> None:
    big, one = np.array([[2.0**24]], np.float32), np.ones((1, 1), np.float32)
    assert combine_rows([big, one, one]).item() == 2**24
    assert combine_rows([one, one, big]).item() == 2**24 + 2
    assert combine_rows([one], bias=(one, big)).item() == 2**24 + 2
    assert combine_rows([big], bias=(one, one)).item() == 2**24
    # Rounding after each addition would lose both halves of the last place.
    assert combine_rows([bf16(1), bf16(2**-8), bf16(2**-8)]).astype(np.float64).item() == 1 + 2**-7


@few
@given(cases(), st.integers(0, 2))
def test_bias_is_added_to_every_token(case: Case, num_biases: int) -> None:
    received = dispatch(case, case.integers(4))
    y = [d.recv_x for d in received]
    plain = reference.combine(y, received, num_tokens=case.num_tokens)
    terms = [[rows + np.float32(i) for i in range(num_biases)] for rows in case.integers(4)]
    bias: list[Any] = [term[0] if num_biases == 1 else tuple(term) for term in terms]
    biased = reference.combine(y, received, num_tokens=case.num_tokens, bias=bias)
    for a, b, term in zip(plain, biased, terms, strict=True):
        assert np.array_equal(b.x, sum(term, start=a.x))


def test_rows_past_the_received_ones_are_ignored() -> None:
    case = example()
    received = dispatch(case, case.origins(), num_worst_tokens=9)
    y = [d.recv_x.copy() for d in received]
    for rows, d in zip(y, received, strict=True):
        rows[d.num_recv_tokens :] = np.nan
    for out in reference.combine(y, received, num_tokens=case.num_tokens):
        assert np.isfinite(out.x).all()


def test_sums_of_nodes_are_rounded_on_their_way() -> None:
    """1 + 2**-8 is 1 in bfloat16: what two ranks of a node add to 1 is lost, or not, as they are grouped."""
    one, small = np.full((1, 8), 1, BF16), np.full((1, 8), 2**-8, BF16)
    x = [np.zeros((count, 8), BF16) for count in (1, 0, 0, 0)]
    ids = [np.arange(4)[None, :], *[np.zeros((0, 4), np.int64)] * 3]
    sent = reference.dispatch(x, ids, num_experts=4)

    def first(y: list[Array], **options: Any) -> Array:
        return reference.combine(y, sent, num_tokens=[1, 0, 0, 0], **options)[0].x

    y = [one, small, small, np.zeros_like(one)]
    assert (first(y) > one).all()
    assert (first(y, ranks_per_node=2) == one).all()
    assert same_bits(first(y, ranks_per_node=1), first(y))
    assert same_bits(first(y, ranks_per_node=4), first(y))
    weights = [np.full((1, 4), 2.0**-rank, np.float32) for rank in range(4)]
    combined = reference.combine(y, sent, num_tokens=[1, 0, 0, 0], topk_weights=weights, ranks_per_node=2)[0]
    assert np.asarray(combined.topk_weights == np.float32(1.875)).all()

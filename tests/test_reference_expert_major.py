"""The oracle's expert-major layout: expand and collapse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import BF16, Case, cases, few, same_bits

from ep_rt import reference
from ep_rt.errors import ArrayError, ConfigError


def received(case: Case, *, num_worst_tokens: int = 0) -> list[reference.Dispatched]:
    return reference.dispatch(
        case.integers(4, dtype=BF16),
        case.topk_idx,
        num_experts=case.num_experts,
        topk_weights=case.weights(),
        sf=case.integers(2),
        num_worst_tokens=num_worst_tokens,
    )


def test_expand_by_hand() -> None:
    ids = np.array([[1, 0], [1, -1], [2, 2]])
    weights = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    x = np.array([[10], [20], [30]], np.float32)
    (d,) = reference.dispatch([x], [ids], num_experts=4, topk_weights=[weights])
    e = reference.expand(d, num_local_experts=4, alignment=2)
    assert e.row.tolist() == [0, -1, 0, 1, 2, 2]
    assert e.topk.tolist() == [1, -1, 0, 0, 0, 1]
    assert e.x.ravel().tolist() == [10, 0, 10, 20, 30, 30]
    assert e.weights is not None
    assert e.weights.tolist() == [2, 0, 1, 3, 5, 6]
    assert e.num_tokens_per_expert == [2, 2, 2, 0]
    assert e.psum_num_tokens_per_expert.tolist() == [1, 4, 6, 6]
    assert e.sf is None
    assert e.row.dtype == e.topk.dtype == e.psum_num_tokens_per_expert.dtype == np.int32

    assert reference.collapse(e.x, e, 3, weighted=False).ravel().tolist() == [20, 20, 60]
    assert reference.collapse(e.x, e, 3, weighted=True).ravel().tolist() == [30, 60, 330]


@few
@given(cases(), st.integers(1, 5), st.sampled_from([0, 2, 20]))
def test_expanded_rows(case: Case, alignment: int, capacity: int) -> None:
    """Every (row, k) with a local expert once, in order, segments aligned, padding zero."""
    for d in received(case, num_worst_tokens=capacity):
        e = reference.expand(d, num_local_experts=case.num_local_experts, alignment=alignment)
        assert e.sf is not None
        assert e.weights is not None
        assert d.recv_sf is not None
        assert d.recv_topk_weights is not None
        begin = 0
        for expert in range(case.num_local_experts):
            end = int(e.psum_num_tokens_per_expert[expert])
            next_begin = begin + e.num_tokens_per_expert[expert]
            assert begin % alignment == 0
            assert next_begin == -(-end // alignment) * alignment
            expected = [
                (row, k)
                for row in range(len(d.recv_topk_idx))
                for k in range(case.num_topk)
                if d.recv_topk_idx[row, k] == expert
            ]
            pairs = zip(e.row[begin:end].tolist(), e.topk[begin:end].tolist(), strict=True)
            assert list(pairs) == expected
            assert (e.row[end:next_begin] == -1).all()
            assert (e.topk[end:next_begin] == -1).all()
            begin = next_begin
        assert begin == len(e.x) == len(e.sf) == len(e.weights)
        real = e.row >= 0
        assert same_bits(e.x[real], d.recv_x[e.row[real]])
        assert same_bits(e.sf[real], d.recv_sf[e.row[real]])
        assert same_bits(e.weights[real], d.recv_topk_weights[e.row[real], e.topk[real]])
        for array in (e.x, e.sf, e.weights):
            assert not np.frombuffer(array[~real].tobytes(), np.uint8).any()


@few
@given(cases(), st.integers(1, 5), st.integers(1, 30))
def test_fixed_number_of_rows(case: Case, alignment: int, capacity: int) -> None:
    """The rows of the unlimited layout of what was kept, cut off or padded."""
    unlimited = received(case)
    for d, everything in zip(received(case, num_worst_tokens=capacity), unlimited, strict=True):
        layout = {"num_local_experts": case.num_local_experts, "alignment": alignment}
        e = reference.expand(d, **layout, num_worst_tokens=capacity)
        kept = reference.expand(d, **layout)
        num_rows = min(capacity, len(kept.row))
        assert len(e.row) == len(e.topk) == len(e.x) == capacity
        assert same_bits(e.row[:num_rows], kept.row[:num_rows])
        assert same_bits(e.topk[:num_rows], kept.topk[:num_rows])
        assert (e.row[num_rows:] == -1).all()
        psum = kept.psum_num_tokens_per_expert
        assert e.psum_num_tokens_per_expert.tolist() == [min(end, capacity) for end in psum]
        needed = sum(reference.expand(everything, **layout).num_tokens_per_expert)
        assert e.overflow == (needed > capacity)
        assert e.num_needed_rows <= needed
        out = reference.collapse(e.x, e, capacity, weighted=False)
        times = np.bincount(e.row[e.row >= 0], minlength=capacity)[:, None]
        assert np.array_equal(out, d.recv_x.astype(np.float32) * times)


@few
@given(cases(), st.integers(1, 4), st.booleans())
def test_collapse_undoes_expand(case: Case, alignment: int, weighted: bool) -> None:
    """Small integers are exact: a row comes back times the number, or the weights, of its local experts."""
    for d in received(case):
        e = reference.expand(d, num_local_experts=case.num_local_experts, alignment=alignment)
        y = e.x.copy()
        y[e.row < 0] = np.nan
        out = reference.collapse(y, e, d.num_recv_tokens, weighted=weighted)
        assert d.recv_topk_weights is not None
        factors = d.recv_topk_weights if weighted else (d.recv_topk_idx >= 0).astype(np.float32)
        assert out.dtype == BF16
        assert np.array_equal(out, d.recv_x.astype(np.float32) * factors.sum(axis=1, keepdims=True))


def test_expand_agrees_with_the_counts_of_dispatch() -> None:
    case = Case(2, 2, [np.array([[0, 3], [1, 1]]), np.array([[2, 0]])], seed=1)
    x = case.origins()
    for d in reference.dispatch(x, case.topk_idx, num_experts=4, expert_alignment=4):
        e = reference.expand(d, num_local_experts=2, alignment=4)
        assert e.num_tokens_per_expert == d.num_recv_tokens_per_expert
        assert e.weights is None


def test_collapse_order_rounding_and_zeros() -> None:
    """k ascending although the rows lie in expert order; one rounding; -0.0; rows without an expert."""
    ids = np.array([[2, 1, 0], [-1, -1, 1], [-1, -1, -1]])
    (d,) = reference.dispatch([np.zeros((3, 1), np.float32)], [ids], num_experts=3, num_worst_tokens=4)
    e = reference.expand(d, num_local_experts=3)
    assert e.row.tolist() == [0, 0, 1, 0]
    y = np.array([[1], [1], [-0.0], [2.0**24]], np.float32)
    out = reference.collapse(y, e, 4, weighted=False)
    assert out.ravel().tolist() == [2.0**24, 0, 0, 0]
    assert np.signbit(out).ravel().tolist() == [False, True, False, False]
    tie = np.array([[2**-8], [2**-8], [0], [1]], BF16)
    assert reference.collapse(tie, e, 4, weighted=False)[0, 0] == 1 + 2**-7


def test_collapse_rounds_the_product_before_the_sum() -> None:
    """(1 + 2^-12)^2 - 1 loses its 2^-24 when the product is rounded; a fused multiply-add keeps it."""
    a = np.float32(1 + 2**-12)
    (d,) = reference.dispatch(
        [np.zeros((1, 1), np.float32)],
        [np.array([[0, 1]])],
        num_experts=2,
        topk_weights=[np.array([[-1, a]], np.float32)],
    )
    e = reference.expand(d, num_local_experts=2)
    out = reference.collapse(np.array([[1], [a]], np.float32), e, 1, weighted=True)
    assert out.item() == 2**-11


def test_bad_input_is_refused() -> None:
    (d,) = reference.dispatch([np.zeros((1, 1), np.float32)], [np.array([[0, 1]])], num_experts=2)
    e = reference.expand(d, num_local_experts=2)
    with pytest.raises(ConfigError):
        reference.expand(d, num_local_experts=2, alignment=0)
    with pytest.raises(ConfigError):
        reference.expand(d, num_local_experts=2, num_worst_tokens=-1)
    with pytest.raises(ArrayError):
        reference.expand(d, num_local_experts=1)
    with pytest.raises(ArrayError):
        reference.collapse(e.x[:1], e, 1, weighted=False)
    with pytest.raises(ArrayError):
        reference.collapse(e.x, e, 1, weighted=True)
    with pytest.raises(ArrayError):
        reference.collapse(e.x, e, 0, weighted=False)
    with pytest.raises(ArrayError):
        reference.collapse(e.x.astype(np.uint8), replace(e, weights=None), 1, weighted=False)

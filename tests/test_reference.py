"""The oracle's layout, dispatch and cached dispatch; what the normal mode refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import BF16, E4M3, Case, cases, dispatch, example, few, same_bits

from ep_rt import reference
from ep_rt.errors import ArrayError, ConfigError


def sources(d: reference.Dispatched) -> list[tuple[int, int]]:
    return list(zip(d.src_rank.tolist(), d.src_token.tolist(), strict=True))


# Layout


def test_layout_by_hand() -> None:
    layout = reference.dispatch_layout(example().topk_idx[0], num_experts=4, num_ranks=2, ranks_per_node=2)
    assert layout.num_tokens_per_rank.tolist() == [2, 2]
    assert layout.num_tokens_per_expert.tolist() == [2, 1, 1, 1]
    assert layout.is_token_in_rank.tolist() == [[True, True], [True, False], [False, True]]
    assert layout.num_tokens_per_node is not None
    assert layout.num_tokens_per_node.tolist() == [3]
    assert layout.num_tokens_per_rank.dtype == layout.num_tokens_per_expert.dtype == np.int32
    assert layout.num_tokens_per_node.dtype == np.int32


def test_layout_without_nodes_and_with_a_repeated_expert() -> None:
    layout = reference.dispatch_layout(np.array([[5, 5, 4]]), num_experts=6, num_ranks=3)
    assert layout.num_tokens_per_node is None
    assert layout.num_tokens_per_rank.tolist() == [0, 0, 1]
    assert layout.num_tokens_per_expert.tolist() == [0, 0, 0, 0, 1, 2]


@few
@given(cases(num_ranks=4), st.sampled_from([1, 2, 4]))
def test_layout_counts_destinations(case: Case, ranks_per_node: int) -> None:
    for rank, ids in enumerate(case.topk_idx):
        layout = reference.dispatch_layout(
            ids, num_experts=case.num_experts, num_ranks=4, ranks_per_node=ranks_per_node
        )
        to = [case.destinations(rank, token) for token in range(len(ids))]
        nodes = [{dst // ranks_per_node for dst in dsts} for dsts in to]
        assert layout.is_token_in_rank.tolist() == [[dst in dsts for dst in range(4)] for dsts in to]
        assert layout.num_tokens_per_rank.tolist() == [sum(dst in dsts for dsts in to) for dst in range(4)]
        assert layout.num_tokens_per_node is not None
        assert layout.num_tokens_per_node.tolist() == [
            sum(node in seen for seen in nodes) for node in range(4 // ranks_per_node)
        ]
        counts = Counter(ids.ravel().tolist())
        assert layout.num_tokens_per_expert.tolist() == [counts[e] for e in range(case.num_experts)]


# Dispatch


def test_dispatch_by_hand() -> None:
    case = example()
    weights = [np.array([[1, 2], [3, 4], [5, 6]], np.float32), np.array([[7, 8], [9, 10]], np.float32)]
    first, second = dispatch(case, case.origins(), topk_weights=weights)

    assert sources(first) == [(0, 0), (0, 1)]
    assert first.recv_x.tolist() == [[0, 0, 7], [0, 1, 7]]
    assert first.recv_topk_idx.tolist() == [[0, -1], [1, 0]]
    assert first.recv_topk_weights is not None
    assert first.recv_topk_weights.tolist() == [[1, 0], [3, 4]]
    assert first.num_recv_tokens_per_expert == [2, 1]

    assert sources(second) == [(0, 0), (0, 2), (1, 0)]
    assert second.recv_topk_idx.tolist() == [[-1, 1], [-1, 0], [0, 1]]
    assert second.recv_topk_weights is not None
    assert second.recv_topk_weights.tolist() == [[0, 2], [0, 6], [7, 8]]
    assert second.num_recv_tokens_per_expert == [2, 2]
    assert (second.num_recv_tokens, second.overflow, second.recv_sf) == (3, False, None)
    assert second.recv_topk_idx.dtype == np.int64
    assert second.recv_topk_weights.dtype == np.float32
    assert second.src_rank.dtype == second.src_token.dtype == np.int32


@few
@given(cases())
def test_every_token_arrives_once_per_rank_in_order(case: Case) -> None:
    """Nothing is lost, nothing invented: the list of sources is exactly the expected one."""
    for rank, d in enumerate(dispatch(case, case.origins())):
        assert sources(d) == case.sources(rank)
        assert d.recv_x[:, :2].tolist() == [list(source) for source in case.sources(rank)]
        assert d.num_recv_tokens == len(d.recv_x)


@few
@given(cases(), st.integers(1, 5))
def test_received_ids_weights_and_counts(case: Case, alignment: int) -> None:
    weights = case.weights()
    received = dispatch(case, case.origins(), topk_weights=weights, expert_alignment=alignment)
    for rank, d in enumerate(received):
        first = rank * case.num_local_experts
        true_counts = [0] * case.num_local_experts
        assert d.recv_topk_weights is not None
        for row, (src_rank, token) in enumerate(case.sources(rank)):
            for k, expert in enumerate(case.topk_idx[src_rank][token]):
                is_here = first <= expert < first + case.num_local_experts
                assert d.recv_topk_idx[row, k] == (expert - first if is_here else -1)
                assert d.recv_topk_weights[row, k] == (weights[src_rank][token, k] if is_here else 0)
                if is_here:
                    true_counts[expert - first] += 1
        assert d.num_recv_tokens_per_expert == [-(-count // alignment) * alignment for count in true_counts]


@pytest.mark.parametrize("num_tokens", [(0, 0, 0), (0, 4, 0), (3, 3, 3)])
def test_nothing_to_send(num_tokens: tuple[int, ...]) -> None:
    """No tokens on some or all ranks, and ids that are all -1."""
    ids = [np.full((count, 2), -1) for count in num_tokens]
    case = Case(num_ranks=3, num_local_experts=1, topk_idx=ids, seed=0)
    received = dispatch(case, case.origins(BF16))
    for d in received:
        assert d.recv_x.shape == (0, 3)
        assert d.recv_topk_idx.shape == (0, 2)
        assert d.num_recv_tokens_per_expert == [0]
    combined = reference.combine([d.recv_x for d in received], received, num_tokens=num_tokens)
    for out, count in zip(combined, num_tokens, strict=True):
        assert same_bits(out.x, np.zeros((count, 3), BF16))


@few
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_experts_within_ranks_moves_no_row(case: Case, random: Any) -> None:
    local = case.num_local_experts
    renamed = [random.sample(range(r * local, (r + 1) * local), local) for r in range(case.num_ranks)]
    table = np.array([e for rank in renamed for e in rank] + [-1])
    permuted = Case(case.num_ranks, local, [table[ids] for ids in case.topk_idx], case.seed)
    before, after = dispatch(case, case.origins()), dispatch(permuted, case.origins())
    for rank, (a, b) in enumerate(zip(before, after, strict=True)):
        assert same_bits(a.recv_x, b.recv_x)
        assert sources(a) == sources(b)
        is_here = a.recv_topk_idx >= 0
        assert np.array_equal(is_here, b.recv_topk_idx >= 0)
        expected = table[a.recv_topk_idx[is_here] + rank * local] - rank * local
        assert np.array_equal(b.recv_topk_idx[is_here], expected)


def test_repeated_expert_counts_twice_and_travels_once() -> None:
    case = Case(num_ranks=2, num_local_experts=1, topk_idx=[np.array([[1, 1]]), np.array([[0, -1]])], seed=0)
    first, second = dispatch(case, case.origins())
    assert sources(first) == [(1, 0)]
    assert sources(second) == [(0, 0)]
    assert second.recv_topk_idx.tolist() == [[0, 0]]
    assert second.num_recv_tokens_per_expert == [2]


@few
@given(cases(), st.integers(1, 12))
def test_num_worst_tokens(case: Case, capacity: int) -> None:
    """C rows whatever arrives; the first C are kept; the true count is told."""
    exact = dispatch(case, case.integers(4), topk_weights=case.weights())
    worst = dispatch(case, case.integers(4), topk_weights=case.weights(), num_worst_tokens=capacity)
    for e, w in zip(exact, worst, strict=True):
        kept = min(capacity, e.num_recv_tokens)
        assert w.num_recv_tokens == e.num_recv_tokens
        assert w.overflow == (e.num_recv_tokens > capacity)
        assert w.num_recv_tokens_per_expert == e.num_recv_tokens_per_expert
        assert e.recv_topk_weights is not None
        assert w.recv_topk_weights is not None
        assert same_bits(w.recv_x[:kept], e.recv_x[:kept])
        assert same_bits(w.recv_topk_idx[:kept], e.recv_topk_idx[:kept])
        assert same_bits(w.recv_topk_weights[:kept], e.recv_topk_weights[:kept])
        assert sources(w)[:kept] == sources(e)[:kept]
        assert len(w.recv_x) == capacity
        assert (w.recv_topk_idx[kept:] == -1).all()
        assert not w.recv_topk_weights[kept:].any()
        assert (w.src_rank[kept:] == -1).all()
        assert (w.src_token[kept:] == -1).all()


@few
@given(cases(), st.sampled_from([0, 3, 20]))
def test_cached_dispatch_is_dispatch_with_new_payload(case: Case, capacity: int) -> None:
    handles = dispatch(case, case.origins(), num_worst_tokens=capacity)
    x, sf = case.integers(6, limit=100, dtype=BF16), case.integers(2)
    fresh = dispatch(case, x, sf=sf, num_worst_tokens=capacity)
    cached = reference.dispatch_cached(x, handles, sf)
    for d, (recv_x, recv_sf) in zip(fresh, cached, strict=True):
        assert same_bits(recv_x, d.recv_x)
        assert recv_sf is not None
        assert d.recv_sf is not None
        assert same_bits(recv_sf, d.recv_sf)
    assert all(recv_sf is None for _, recv_sf in reference.dispatch_cached(x, handles))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3, np.uint8], ids=str)
@pytest.mark.parametrize("sf_dtype", [np.float32, np.int32], ids=str)
def test_bits_travel_unchanged(dtype: Any, sf_dtype: Any) -> None:
    """Every bit pattern, NaN payloads included, in each payload dtype."""
    case = example()
    rng = np.random.default_rng(0)
    x, sf = (
        [rng.integers(0, 256, (count, 512), np.uint8).view(kind) for count in case.num_tokens]
        for kind in (dtype, sf_dtype)
    )
    for d in dispatch(case, x, sf=sf):
        assert d.recv_sf is not None
        assert d.recv_x.dtype == dtype
        assert d.recv_sf.dtype == sf_dtype
        for row, (rank, token) in enumerate(sources(d)):
            assert same_bits(d.recv_x[row], x[rank][token])
            assert same_bits(d.recv_sf[row], sf[rank][token])


def test_int32_ids_and_strided_rows_are_accepted() -> None:
    case = example()
    wide = [np.repeat(rows, 2, axis=1) for rows in case.origins()]
    strided = reference.dispatch(
        [rows[:, ::2] for rows in wide], [ids.astype(np.int32) for ids in case.topk_idx], num_experts=4
    )
    for a, b in zip(strided, dispatch(case, case.origins()), strict=True):
        assert same_bits(a.recv_x, b.recv_x)
        assert same_bits(a.recv_topk_idx, b.recv_topk_idx)


# What is refused

IDS = np.array([[0, 1]])
X = np.zeros((1, 4), np.float32)
HANDLES = reference.dispatch([X, X], [IDS, IDS], num_experts=2)


def refuse(**changes: Any) -> None:
    kwargs = {"x": [X, X], "topk_idx": [IDS, IDS], "num_experts": 2, **changes}
    reference.dispatch(**kwargs)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda: reference.dispatch_layout(IDS, num_experts=3, num_ranks=2)),
        (ConfigError, lambda: reference.dispatch_layout(IDS, num_experts=0, num_ranks=1)),
        (ConfigError, lambda: reference.dispatch_layout(IDS, num_experts=4, num_ranks=4, ranks_per_node=3)),
        (ArrayError, lambda: reference.dispatch_layout(IDS[0], num_experts=2, num_ranks=2)),
        (ArrayError, lambda: reference.dispatch_layout(IDS.astype(np.float32), num_experts=2, num_ranks=2)),
        (ArrayError, lambda: reference.dispatch_layout(IDS + 1, num_experts=2, num_ranks=2)),
        (ArrayError, lambda: reference.dispatch_layout(IDS - 2, num_experts=2, num_ranks=2)),
        (ConfigError, lambda: refuse(num_experts=3)),
        (ConfigError, lambda: refuse(expert_alignment=0)),
        (ConfigError, lambda: refuse(num_worst_tokens=-1)),
        (ConfigError, lambda: refuse(topk_idx=[IDS])),
        (ConfigError, lambda: refuse(x=[X, X[:, :2]])),
        (ConfigError, lambda: refuse(x=[X, X.astype(np.float16)])),
        (ConfigError, lambda: refuse(topk_idx=[IDS, IDS[:, :1]])),
        (ArrayError, lambda: refuse(x=[X[0], X[0]])),
        (ArrayError, lambda: refuse(x=[X.astype(np.float64)] * 2)),
        (ArrayError, lambda: refuse(x=[X.tolist()] * 2)),
        (ArrayError, lambda: refuse(topk_idx=[IDS, IDS[:0]])),
        (ArrayError, lambda: refuse(topk_weights=[IDS, IDS])),
        (ArrayError, lambda: refuse(topk_weights=[X, X])),
        (ArrayError, lambda: refuse(sf=[X[:0], X])),
        (ConfigError, lambda: reference.dispatch_cached([X[:0], X], HANDLES)),
        (ConfigError, lambda: reference.dispatch_cached([X], HANDLES)),
        (ConfigError, lambda: reference.combine([X] * 2, HANDLES, num_tokens=[1])),
        (ConfigError, lambda: reference.combine([X] * 2, HANDLES, num_tokens=[1, 0])),
        (ArrayError, lambda: reference.combine([X] * 2, HANDLES, num_tokens=[1, 1])),
        (ArrayError, lambda: reference.combine([np.zeros((2, 4), np.uint8)] * 2, HANDLES, num_tokens=[1, 1])),
        (
            ArrayError,
            lambda: reference.combine(
                [np.zeros((2, 4), np.float32)] * 2, HANDLES, num_tokens=[1, 1], bias=[X, X[:, :2]]
            ),
        ),
        (
            ConfigError,
            lambda: reference.combine(
                [np.zeros((2, 4), np.float32)] * 2,
                HANDLES,
                num_tokens=[1, 1],
                bias=[(X, X, X), None],  # type: ignore[list-item]
            ),
        ),
    ],
)
def test_bad_input_is_refused(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()

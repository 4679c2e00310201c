"""The oracle's low-latency mode: packing, counts, cast, weighted combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import BF16, E4M3, Array, Case, cases, few, same_bits

from ep_rt import reference
from ep_rt.errors import ArrayError, ConfigError

CAPACITY = 20  # the tokens of a case times its top-k, so that any repetition fits


def dispatch(case: Case, x: list[Array], **kwargs: Any) -> list[reference.LowLatencyDispatched]:
    kwargs = {"use_fp8": False, "num_max_dispatch_tokens_per_rank": CAPACITY, **kwargs}
    return reference.low_latency_dispatch(x, case.topk_idx, num_experts=case.num_experts, **kwargs)


def rows_of_expert(case: Case, expert: int) -> list[tuple[int, int]]:
    """(source rank, token), once per k, in the order in which the expert is to receive them."""
    return [
        (rank, token)
        for rank in range(case.num_ranks)
        for token in range(case.num_tokens[rank])
        for chosen in case.topk_idx[rank][token]
        if chosen == expert
    ]


def test_dispatch_by_hand() -> None:
    ids = [np.array([[0, 3], [1, 0]]), np.array([[0, 0], [-1, 2], [3, -1]])]
    case = Case(num_ranks=2, num_local_experts=2, topk_idx=ids, seed=5)
    first, second = dispatch(case, case.origins(), num_max_dispatch_tokens_per_rank=3)
    assert first.recv_x.shape == (2, 6, 3)
    assert first.recv_x[0, :, :2].tolist() == [[0, 0], [0, 1], [1, 0], [1, 0], [0, 0], [0, 0]]
    assert first.src_info.tolist() == [[0, 1, 0, 0, -1, -1], [1, -1, -1, -1, -1, -1]]
    assert first.recv_count.tolist() == [4, 1]
    assert first.layout_range.tolist() == [[2, 2 << 32 | 2], [1, 1 << 32]]
    assert first.sf is None
    assert second.src_info.tolist() == [[1, -1, -1, -1, -1, -1], [0, 2, -1, -1, -1, -1]]
    assert second.layout_range.tolist() == [[0, 1], [1, 1 << 32 | 1]]
    assert first.recv_count.dtype == first.src_info.dtype == np.int32
    assert first.layout_range.dtype == np.int64


@few
@given(cases())
def test_packing_counts_and_ranges(case: Case) -> None:
    for rank, d in enumerate(dispatch(case, case.origins())):
        for local in range(case.num_local_experts):
            expected = rows_of_expert(case, rank * case.num_local_experts + local)
            count = len(expected)
            assert d.recv_count[local] == count
            assert d.recv_x[local, :count, :2].tolist() == [list(source) for source in expected]
            assert d.src_info[local].tolist() == [token for _, token in expected] + [-1] * (
                case.num_ranks * CAPACITY - count
            )
            begin = 0
            for src in range(case.num_ranks):
                from_src = sum(source == src for source, _ in expected)
                assert divmod(int(d.layout_range[local, src]), 1 << 32) == (begin, from_src)
                begin += from_src


@few
@given(
    cases(),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.sampled_from([BF16, np.float32]),
)
def test_rows_are_cast_on_the_way(case: Case, mode: tuple[bool, bool], dtype: Any) -> None:
    round_scale, use_ue8m0 = mode
    x = case.integers(640, limit=1000, dtype=dtype)
    casts = [reference.quantize_fp8(rows, round_scale=round_scale, use_ue8m0=use_ue8m0) for rows in x]
    received = dispatch(case, x, use_fp8=True, round_scale=round_scale, use_ue8m0=use_ue8m0)
    for rank, d in enumerate(received):
        assert d.sf is not None
        assert d.recv_x.dtype == E4M3
        assert d.sf.shape[2] == (2 if use_ue8m0 else 5)
        for local in range(case.num_local_experts):
            for row, (src, token) in enumerate(rows_of_expert(case, rank * case.num_local_experts + local)):
                assert same_bits(d.recv_x[local, row], casts[src][0][token])
                assert same_bits(d.sf[local, row], casts[src][1][token])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3, np.uint8], ids=str)
def test_bits_travel_unchanged_without_fp8(dtype: Any) -> None:
    case = Case(2, 1, [np.array([[1], [0]]), np.array([[1]])], seed=0)
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 256, (count, 512), np.uint8).view(dtype) for count in case.num_tokens]
    first, second = dispatch(case, x)
    assert same_bits(first.recv_x[0, :1], x[0][1:])
    assert same_bits(second.recv_x[0, :2], np.concatenate([x[0][:1], x[1]]))


def test_no_tokens() -> None:
    case = Case(2, 2, [np.full((3, 2), -1), np.zeros((0, 2), np.int64)], seed=0)
    received = dispatch(case, case.integers(128, dtype=BF16), use_fp8=True)
    assert all(not d.recv_count.any() and not d.layout_range.any() for d in received)
    y = [np.full((2, 2 * CAPACITY, 4), np.nan, BF16) for _ in received]
    first, second = reference.low_latency_combine(y, received, case.topk_idx, case.weights())
    assert same_bits(first, np.zeros((3, 4), BF16))
    assert second.shape == (0, 4)


@few
@given(cases(), st.sampled_from([np.float32, np.float16, BF16]))
def test_combine_bit_for_bit(case: Case, dtype: Any) -> None:
    """Against scalars added one by one; unused rows hold NaN, and so do the weights of -1."""
    received = dispatch(case, case.origins())
    rng = np.random.default_rng(case.seed)
    y = [rng.standard_normal((*d.src_info.shape, 5)).astype(dtype) for d in received]
    for rows, d in zip(y, received, strict=True):
        rows[d.src_info < 0] = np.nan
    weights = [rng.random(ids.shape, np.float32) for ids in case.topk_idx]
    for ids, row in zip(case.topk_idx, weights, strict=True):
        row[ids < 0] = np.nan

    next_row = np.zeros(case.num_experts, int)
    combined = reference.low_latency_combine(y, received, case.topk_idx, weights)
    for rank, out in enumerate(combined):
        for token in range(case.num_tokens[rank]):
            terms = []
            for k, expert in enumerate(case.topk_idx[rank][token]):
                if expert >= 0:
                    owner, local = divmod(int(expert), case.num_local_experts)
                    row = y[owner][local, next_row[expert]].astype(np.float32)
                    next_row[expert] += 1
                    terms.append(weights[rank][token, k] * row)
            total = np.zeros(5, np.float32) if not terms else terms[0]
            for term in terms[1:]:
                total = total + term
            assert same_bits(out[token], total.astype(dtype))


@few
@given(cases(min_id=0))
def test_identity_experts_give_x_back_exactly(case: Case) -> None:
    x = case.integers(8, limit=15, dtype=BF16)
    weights = case.weights()
    for rows in weights:
        rows[:, -1] *= 2
    received = dispatch(case, x)
    combined = reference.low_latency_combine([d.recv_x for d in received], received, case.topk_idx, weights)
    for out, rows in zip(combined, x, strict=True):
        assert np.array_equal(out, rows)


def test_negative_zero_and_order() -> None:
    """The sum starts from the first product and runs in k order, whoever owns the experts."""
    case = Case(2, 1, [np.array([[1, 0, 1]]), np.zeros((0, 3), np.int64)], seed=0)
    received = dispatch(case, case.origins())
    y = [np.zeros((1, 2 * CAPACITY, 2), np.float32) for _ in received]
    y[0][0, 0] = [1, -0.0]
    y[1][0, :2] = [[1, -0.0], [2.0**24, -0.0]]
    weights = [np.ones((1, 3), np.float32), np.zeros((0, 3), np.float32)]
    out = reference.low_latency_combine(y, received, case.topk_idx, weights)[0]
    assert same_bits(out, np.array([[2.0**24 + 2, -0.0]], np.float32))
    y[1][0, :2, 0] = [2.0**24, 1]
    assert reference.low_latency_combine(y, received, case.topk_idx, weights)[0][0, 0] == 2.0**24


@few
@given(cases())
def test_logfmt_combine_is_combine_of_decoded_rows(case: Case) -> None:
    received = dispatch(case, case.origins())
    rng = np.random.default_rng(case.seed)
    y = [(0.1 * rng.standard_normal((*d.src_info.shape, 256))).astype(BF16) for d in received]
    decoded = [reference.logfmt10_decode(reference.logfmt10_encode(rows)) for rows in y]
    args = (received, case.topk_idx, case.weights())
    for a, b in zip(
        reference.low_latency_combine(y, *args, use_logfmt=True),
        reference.low_latency_combine(decoded, *args),
        strict=True,
    ):
        assert same_bits(a, b)


IDS = [np.array([[0, 1]]), np.array([[1, -1]])]
X = [np.zeros((1, 128), BF16)] * 2
W = [np.ones((1, 2), np.float32)] * 2
HANDLES = reference.low_latency_dispatch(
    X, IDS, num_max_dispatch_tokens_per_rank=1, num_experts=2, use_fp8=False
)
Y = [d.recv_x for d in HANDLES]


def refuse(**changes: Any) -> None:
    kwargs = {"x": X, "topk_idx": IDS, "num_max_dispatch_tokens_per_rank": 1, "num_experts": 2, **changes}
    reference.low_latency_dispatch(**kwargs)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda: refuse(num_experts=3)),
        (ConfigError, lambda: refuse(num_max_dispatch_tokens_per_rank=0)),
        (ConfigError, lambda: refuse(use_ue8m0=True)),
        (ConfigError, lambda: refuse(use_fp8=False, round_scale=True)),
        (ConfigError, lambda: refuse(topk_idx=IDS[:1])),
        (ConfigError, lambda: refuse(x=[X[0], np.zeros((1, 256), BF16)])),
        (ArrayError, lambda: refuse(x=[np.zeros((2, 128), BF16)] * 2, topk_idx=[np.full((2, 1), -1)] * 2)),
        (ArrayError, lambda: refuse(topk_idx=[np.array([[0, 0]])] * 2)),
        (ArrayError, lambda: refuse(topk_idx=[np.array([[0, 2]])] * 2)),
        (ArrayError, lambda: refuse(x=[np.zeros((1, 64), BF16)] * 2)),
        (ArrayError, lambda: refuse(x=[np.zeros((1, 128), np.float16)] * 2)),
        (ArrayError, lambda: reference.low_latency_combine(X, HANDLES, IDS, W)),
        (ArrayError, lambda: reference.low_latency_combine(Y, HANDLES, IDS[::-1], W)),
        (ArrayError, lambda: reference.low_latency_combine(Y, HANDLES, IDS, [w[:, :1] for w in W])),
        (ConfigError, lambda: reference.low_latency_combine(Y, HANDLES, IDS, W[:1])),
        (
            ArrayError,
            lambda: reference.low_latency_combine(
                [y.astype(np.float32) for y in Y], HANDLES, IDS, W, use_logfmt=True
            ),
        ),
    ],
)
def test_bad_input_is_refused(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


@given(cases())
def test_layouts_hold_the_same_rows(case: Case) -> None:
    x = [rows.astype(np.float32) for rows in case.origins()]
    by_expert, by_rank = dispatch(case, x), dispatch(case, x, layout="rank")
    for packed, native in zip(by_expert, by_rank, strict=True):
        assert packed.expert_rows is None
        assert native.expert_rows is not None
        assert native.recv_x.shape == (case.num_ranks, CAPACITY, x[0].shape[1])
        assert np.array_equal(packed.src_info, native.src_info)
        assert np.array_equal(packed.layout_range, native.layout_range)
        rows = native.recv_x.reshape(-1, x[0].shape[1])
        for expert, count in enumerate(native.recv_count):
            listed = native.expert_rows[expert]
            assert (listed[count:] == -1).all()
            assert np.array_equal(rows[listed[:count]], packed.recv_x[expert, :count])


@given(cases(), st.sampled_from(["rank", "source"]))
def test_identity_experts_give_the_weighted_token_back(case: Case, reduce: str) -> None:
    x = [np.ones((count, 8), np.float32) for count in case.num_tokens]
    dispatched = dispatch(case, x)
    y = [each.recv_x.astype(BF16) for each in dispatched]
    weights = [np.full(ids.shape, 0.5, np.float32) for ids in case.topk_idx]
    combined = reference.low_latency_combine(y, dispatched, case.topk_idx, weights, reduce=reduce)
    for ids, rows in zip(case.topk_idx, combined, strict=True):
        expected = 0.5 * (ids >= 0).sum(axis=1, keepdims=True)
        assert np.array_equal(rows.astype(np.float32), np.broadcast_to(expected, rows.shape))


@given(cases(), st.integers(0, 1000))
def test_sums_on_the_experts_ranks_cost_one_rounding(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = [np.zeros((count, 8), np.float32) for count in case.num_tokens]
    dispatched = dispatch(case, x)
    shape = (*dispatched[0].src_info.shape, 8)
    y = [rng.standard_normal(shape, np.float32).astype(BF16) for _ in dispatched]
    weights = [rng.random(ids.shape, np.float32) for ids in case.topk_idx]
    at_source, on_rank = (
        reference.low_latency_combine(y, dispatched, case.topk_idx, weights, reduce=reduce)
        for reduce in ("source", "rank")
    )
    magnitude = reference.low_latency_combine(
        [np.abs(each.astype(np.float32)) for each in y], dispatched, case.topk_idx, weights
    )
    for exact, rounded, most in zip(at_source, on_rank, magnitude, strict=True):
        difference = np.abs(exact.astype(np.float32) - rounded.astype(np.float32))
        # Of each rank's sum by half a last place, and of both results.
        assert (difference <= 2**-8 * most + 2 * 2**-8 * np.abs(exact.astype(np.float32)) + 1e-6).all()


def test_rows_may_travel_as_fp8() -> None:
    ids = [np.array([[0, 1]])]
    case = Case(num_ranks=1, num_local_experts=2, topk_idx=ids, seed=0)
    dispatched = dispatch(case, [np.zeros((1, 128), np.float32)])
    rng = np.random.default_rng(0)
    y = [rng.standard_normal((2, CAPACITY, 128), np.float32).astype(BF16)]
    weights = [np.array([[0.25, 0.5]], np.float32)]
    rows = [y[0][expert, :1] for expert in range(2)]
    seen = [reference.dequantize_fp8(*reference.quantize_fp8(row)) for row in rows]
    at_source = reference.low_latency_combine(y, dispatched, ids, weights, use_fp8=True)[0]
    assert same_bits(at_source, (np.float32(0.25) * seen[0] + np.float32(0.5) * seen[1]).astype(BF16))
    partial = (
        np.float32(0.25) * rows[0].astype(np.float32) + np.float32(0.5) * rows[1].astype(np.float32)
    ).astype(BF16)
    on_rank = reference.low_latency_combine(y, dispatched, ids, weights, use_fp8=True, reduce="rank")[0]
    assert same_bits(on_rank, reference.dequantize_fp8(*reference.quantize_fp8(partial)).astype(BF16))
    with pytest.raises(ConfigError, match="exclude"):
        reference.low_latency_combine(y, dispatched, ids, weights, use_fp8=True, use_logfmt=True)
    with pytest.raises(ConfigError, match="reduce="):
        reference.low_latency_combine(y, dispatched, ids, weights, reduce="tree")


def test_what_travelling_rows_lose() -> None:
    """Figures of README.md, in percent of the root mean square of exact sums."""
    rng = np.random.default_rng(1)
    num_ranks, num_tokens, num_experts, num_topk, hidden = 8, 16, 256, 8, 512
    x = [np.zeros((num_tokens, hidden), BF16)] * num_ranks
    ids = [np.argsort(rng.random((num_tokens, num_experts)))[:, :num_topk] for _ in x]
    weights = [
        each / each.sum(axis=1, keepdims=True) for each in rng.random((num_ranks, num_tokens, num_topk))
    ]
    weights = [each.astype(np.float32) for each in weights]
    dispatched = reference.low_latency_dispatch(
        x, ids, num_max_dispatch_tokens_per_rank=num_tokens, num_experts=num_experts, use_fp8=False
    )
    y = [rng.standard_normal(each.recv_x.shape).astype(BF16) for each in dispatched]

    def combined(rows: list[Array], **options: Any) -> Array:
        sums = reference.low_latency_combine(rows, dispatched, ids, weights, **options)
        return np.concatenate(sums).astype(np.float64)

    exact = combined([each.astype(np.float32) for each in y])
    expected = {
        ("rank", None): 0.23,
        ("rank", "use_logfmt"): 0.45,
        ("rank", "use_fp8"): 2.6,
        ("source", None): 0.17,
        ("source", "use_logfmt"): 0.17,
        ("source", "use_fp8"): 2.6,
    }
    for (reduce, cast), percent in expected.items():
        error = combined(y, reduce=reduce, **({cast: True} if cast else {})) - exact
        measured = 100 * np.sqrt((error**2).mean() / (exact**2).mean())
        assert 0.9 * percent < measured < 1.1 * percent, (reduce, cast, measured)

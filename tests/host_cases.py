"""Random operations of the host backend beside the oracle; the same for threads and MPI ranks.

Every rank draws the whole case from its seed, so each can compute what the oracle says all ranks get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ep_rt import Buffer, reference

Array = NDArray[Any]

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, np.uint8)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Any bit pattern, NaNs included: what moves must arrive unchanged."""
    kind = np.dtype(dtype)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * kind.itemsize), np.uint8)
    return raw.view(kind)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Values of very different size, so that any other order of additions gives other bits."""
    scale = np.exp2(rng.integers(-6, 7, shape)).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * scale).astype(dtype)


def same_bits(got: Array, expected: Array | None) -> bool:
    return (
        expected is not None
        and got.shape == expected.shape
        and got.dtype == expected.dtype
        and got.tobytes() == expected.tobytes()
    )


@dataclass(frozen=True)
class Case:
    """One layer's routing for all ranks."""

    rng: np.random.Generator
    num_ranks: int
    num_experts: int
    num_tokens: list[int]
    topk_idx: list[Array]
    topk_weights: list[Array]
    hidden: int

    @classmethod
    def draw(cls, seed: int, num_ranks: int, *, hidden: int | None = None, max_tokens: int = 40) -> Case:
        rng = np.random.default_rng(seed)
        num_experts = num_ranks * int(rng.integers(1, 9))
        num_topk = int(rng.integers(1, 10))
        num_tokens = [int(n) for n in rng.integers(0, max_tokens + 1, num_ranks)]
        num_tokens[int(rng.integers(num_ranks))] *= int(rng.integers(2))  # now and then a rank without any
        style = rng.integers(4)
        ids = []
        for count in num_tokens:
            some = rng.integers(-1, num_experts, (count, num_topk))
            if style == 0:  # everything to one expert
                some[:] = num_experts - 1
                some[:, 1:] = -1
            if style == 1 and num_topk <= num_experts:  # distinct, as gates choose them
                some = np.argsort(rng.random((count, num_experts)), axis=1)[:, :num_topk]
            ids.append(some.astype(np.int64))
        return cls(
            rng=rng,
            num_ranks=num_ranks,
            num_experts=num_experts,
            num_tokens=num_tokens,
            topk_idx=ids,
            topk_weights=[rng.random(some.shape, np.float32) for some in ids],
            hidden=hidden or 16 * int(rng.integers(1, 20)),
        )


def check_normal(buffer: Buffer, seed: int) -> None:
    """dispatch, cached dispatch and combine of one random layer, against the oracle."""
    case = Case.draw(seed, buffer.num_ranks)
    rng, rank = case.rng, buffer.rank
    dtype = DTYPES[seed % len(DTYPES)]
    x = [random_bits(rng, (count, case.hidden), dtype) for count in case.num_tokens]
    again = [random_bits(rng, (count, case.hidden), dtype) for count in case.num_tokens]
    sf_dtype = (np.float32, np.int32)[seed % 2]
    sf = [random_bits(rng, (count, 1 + seed % 5), sf_dtype) for count in case.num_tokens]
    alignment = int(rng.choice([1, 8, 128]))
    expected = reference.dispatch(
        x,
        case.topk_idx,
        num_experts=case.num_experts,
        topk_weights=case.topk_weights,
        sf=sf,
        expert_alignment=alignment,
    )

    # Column-major scale factors, as some quantisers make them: any strides must do.
    out = buffer.dispatch(
        (x[rank], np.asfortranarray(sf[rank])),
        topk_idx=case.topk_idx[rank],
        topk_weights=case.topk_weights[rank],
        num_experts=case.num_experts,
        expert_alignment=alignment,
    )
    mine = expected[rank]
    recv_x, recv_sf = out.recv_x
    assert same_bits(recv_x, mine.recv_x)
    assert same_bits(recv_sf, mine.recv_sf)
    assert same_bits(out.recv_topk_idx, mine.recv_topk_idx)
    assert same_bits(out.recv_topk_weights, mine.recv_topk_weights)
    assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert
    assert out.handle.num_recv_tokens == mine.num_recv_tokens
    num_local_experts = case.num_experts // case.num_ranks
    from_each = [int((ids // num_local_experts == rank).any(axis=1).sum()) for ids in case.topk_idx]
    assert out.handle.num_recv_tokens_per_rank == from_each
    by_expert = np.cumsum(mine.num_recv_tokens_per_expert, dtype=np.int32)
    assert same_bits(out.handle.psum_num_recv_tokens_per_expert, by_expert)
    by_number = np.zeros(max(buffer.topology.node_sizes), np.int32)
    for node in range(buffer.topology.num_nodes):
        for number, src in enumerate(buffer.topology.ranks_of(node)):
            by_number[number:] += from_each[src]
    assert same_bits(out.handle.psum_num_recv_tokens_per_local_rank, by_number)
    assert not out.handle.overflow

    cached = buffer.dispatch((again[rank], sf[rank]), handle=out.handle)
    expected_x, expected_sf = reference.dispatch_cached(again, expected, sf)[rank]
    assert same_bits(cached.recv_x[0], expected_x)
    assert same_bits(cached.recv_x[1], expected_sf)
    assert cached.recv_topk_idx is None
    assert cached.handle is out.handle

    summed = (ml_dtypes.bfloat16, np.float16, np.float32)[seed % 3]
    y = [random_values(rng, each.recv_x.shape, summed) for each in expected]
    shape = [(count, case.hidden) for count in case.num_tokens]
    biases = [tuple(random_values(rng, each, summed) for _ in range(seed % 3)) for each in shape]
    bias = [each if len(each) == 2 else each[0] for each in biases] if seed % 3 else None
    weights = [each.recv_topk_weights for each in expected if each.recv_topk_weights is not None]
    combined = reference.combine(
        y,
        expected,
        num_tokens=case.num_tokens,
        topk_weights=weights,
        bias=bias,
    )
    back = buffer.combine(y[rank], out.handle, topk_weights=weights[rank], bias=bias and bias[rank])
    assert same_bits(back.combined_x, combined[rank].x)
    assert same_bits(back.combined_topk_weights, combined[rank].topk_weights)


def check_worst_case(buffer: Buffer, seed: int) -> None:
    """num_worst_tokens, with and without overflow, and the combine that follows."""
    case = Case.draw(seed, buffer.num_ranks)
    rng, rank = case.rng, buffer.rank
    x = [random_values(rng, (count, case.hidden), np.float32) for count in case.num_tokens]
    capacity = int(rng.integers(1, 2 * sum(case.num_tokens) + 2))
    expected = reference.dispatch(
        x,
        case.topk_idx,
        num_experts=case.num_experts,
        topk_weights=case.topk_weights,
        num_worst_tokens=capacity,
    )
    out = buffer.dispatch(
        x[rank],
        topk_idx=case.topk_idx[rank],
        topk_weights=case.topk_weights[rank],
        num_experts=case.num_experts,
        num_worst_tokens=capacity,
    )
    mine = expected[rank]
    rows = min(capacity, mine.num_recv_tokens)
    assert out.recv_x.shape == (capacity, case.hidden)
    assert same_bits(out.recv_x[:rows], mine.recv_x[:rows])
    assert same_bits(out.recv_topk_idx, mine.recv_topk_idx)
    assert same_bits(out.recv_topk_weights, mine.recv_topk_weights)
    assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert
    assert out.handle.overflow == mine.overflow
    assert out.handle.num_recv_tokens == mine.num_recv_tokens

    y = [random_values(rng, each.recv_x.shape, np.float32) for each in expected]
    combined = reference.combine(y, expected, num_tokens=case.num_tokens)
    assert same_bits(buffer.combine(y[rank], out.handle).combined_x, combined[rank].x)


@dataclass(frozen=True)
class ExpertMajorCase:
    """One random layer in the expert-major layout: what is given, and what each rank is to get.

    `payload` is what the ranks dispatch; the rows of `dispatched` and `expanded` are those that travel, which
    `quantize` makes of it. `again` is the same for a repeated dispatch.
    """

    case: Case
    quantize: str | None
    alignment: int
    num_worst_tokens: int
    num_max_tokens_per_rank: int | None
    payload: list[tuple[Array, Array | None]]
    again: list[tuple[Array, Array | None]]
    topk_weights: list[Array] | None
    dispatched: list[reference.Dispatched]
    expanded: list[reference.Expanded]

    @classmethod
    def draw(cls, seed: int, num_ranks: int, *, is_exact: bool, case: Case | None = None) -> ExpertMajorCase:
        quantize = "fp8" if seed % 4 == 3 else None
        case = case or Case.draw(seed, num_ranks, hidden=128 * (1 + seed % 3) if quantize else None)
        rng = case.rng
        alignment = (1, 8, 128, 3)[seed // 2 % 4]
        with_weights, with_sf = seed % 3 != 1, seed % 3 != 0 and quantize is None
        dtype = DTYPES[seed % len(DTYPES)]

        def draw() -> list[tuple[Array, Array | None]]:
            if quantize:
                shapes = [(count, case.hidden) for count in case.num_tokens]
                return [(random_values(rng, shape, ml_dtypes.bfloat16), None) for shape in shapes]
            return [
                (
                    random_bits(rng, (count, case.hidden), dtype),
                    random_bits(rng, (count, (1, 4, 56, 37)[seed % 4]), np.float32) if with_sf else None,
                )
                for count in case.num_tokens
            ]

        payload, again = draw(), draw()
        weights = case.topk_weights if with_weights else None
        most = sum(int((ids >= 0).sum()) for ids in case.topk_idx) // num_ranks + alignment
        num_worst_tokens = 0 if is_exact else int(rng.integers(1, 3 * most + 2))
        num_max_tokens = max(case.num_tokens) + seed % 2 if seed % 5 > 1 else None
        x, sf = _columns(cls.travelling(payload, quantize))
        dispatched = reference.dispatch(
            x,
            case.topk_idx,
            num_experts=case.num_experts,
            topk_weights=weights,
            sf=sf,
            expert_alignment=alignment,
            num_worst_tokens=num_worst_tokens,
        )
        expanded = [
            reference.expand(
                each,
                num_local_experts=case.num_experts // num_ranks,
                alignment=alignment,
                num_worst_tokens=num_worst_tokens,
            )
            for each in dispatched
        ]
        return cls(
            case=case,
            quantize=quantize,
            alignment=alignment,
            num_worst_tokens=num_worst_tokens,
            num_max_tokens_per_rank=num_max_tokens,
            payload=payload,
            again=again,
            topk_weights=weights,
            dispatched=dispatched,
            expanded=expanded,
        )

    @staticmethod
    def travelling(
        payload: list[tuple[Array, Array | None]], quantize: str | None
    ) -> list[tuple[Array, Array | None]]:
        """The rows and scale factors that are sent."""
        return payload if quantize is None else [reference.quantize_fp8(x) for x, _ in payload]

    def expanded_again(self, rank: int) -> tuple[Array, Array | None]:
        """The rows and scale factors of a repeated dispatch, zero in padding."""
        x, sf = _columns(self.travelling(self.again, self.quantize))
        recv_x, recv_sf = reference.dispatch_cached(x, self.dispatched, sf)[rank]
        row = self.expanded[rank].row

        def spread(array: Array) -> Array:
            rows = np.zeros((len(row), *array.shape[1:]), array.dtype)
            rows[row >= 0] = array[row[row >= 0]]
            return rows

        return spread(recv_x), None if recv_sf is None else spread(recv_sf)

    def check_rows(self, rank: int, got: Array | None, expected: Array | None, *, zero_padding: bool) -> None:
        """Padding rows count only with `zero_padding`."""
        assert got is not None
        assert expected is not None
        assert got.shape == expected.shape
        is_there = self.expanded[rank].row >= 0
        if zero_padding:
            assert same_bits(got, expected)
        assert same_bits(got[is_there], expected[is_there])

    def combined(
        self,
        y: list[Array],
        weights: list[Array] | None,
        biases: list[tuple[Array, ...]],
        *,
        ranks_per_node: int | None = None,
    ) -> list[reference.Combined]:
        """What a combine of the expert-major rows `y` gives, weighted if `weights` is given."""
        collapsed = [
            reference.collapse(
                rows,
                e if weights is None else replace(e, weights=weights[rank]),
                len(self.dispatched[rank].src_rank),
                weighted=weights is not None,
            )
            for rank, (rows, e) in enumerate(zip(y, self.expanded, strict=True))
        ]
        return reference.combine(
            collapsed,
            self.dispatched,
            num_tokens=self.case.num_tokens,
            bias=[each if len(each) == 2 else each[0] for each in biases] if biases[0] else None,
            ranks_per_node=ranks_per_node,
        )


def _columns(pairs: list[tuple[Array, Array | None]]) -> tuple[list[Array], list[Array] | None]:
    sf = [second for _, second in pairs if second is not None]
    return [first for first, _ in pairs], sf or None


def check_expert_major(buffer: Buffer, seed: int, *, is_exact: bool = True) -> None:
    """dispatch, cached dispatch and combine of one random layer with layout "expert", against the oracle."""
    drawn = ExpertMajorCase.draw(seed, buffer.num_ranks, is_exact=is_exact)
    case, rank = drawn.case, buffer.rank
    e, zero_padding = drawn.expanded[rank], bool(seed % 2)
    x, sf = drawn.payload[rank]
    out = buffer.dispatch(
        x if sf is None else (x, sf),
        topk_idx=case.topk_idx[rank].astype((np.int64, np.int32)[seed % 2]),
        topk_weights=None if drawn.topk_weights is None else drawn.topk_weights[rank],
        num_experts=case.num_experts,
        expert_alignment=drawn.alignment,
        num_worst_tokens=drawn.num_worst_tokens,
        layout="expert",
        zero_padding=zero_padding,
        quantize=drawn.quantize,
        num_max_tokens_per_rank=drawn.num_max_tokens_per_rank,
    )
    recv_x, recv_sf = out.recv_x if e.sf is not None else (out.recv_x, None)
    drawn.check_rows(rank, recv_x, e.x, zero_padding=zero_padding)
    if e.sf is not None:
        drawn.check_rows(rank, recv_sf, e.sf, zero_padding=zero_padding)
    assert out.recv_topk_idx is None
    if e.weights is None:
        assert out.recv_topk_weights is None
    else:
        assert same_bits(out.recv_topk_weights, e.weights)
    handle = out.handle
    assert out.num_recv_tokens_per_expert_list == drawn.dispatched[rank].num_recv_tokens_per_expert
    assert same_bits(handle.psum_num_tokens_per_expert, e.psum_num_tokens_per_expert)
    assert (handle.layout, handle.num_recv_rows) == ("expert", len(e.row))
    assert handle.num_recv_tokens == drawn.dispatched[rank].num_recv_tokens
    assert (handle.num_needed_rows, handle.overflow) == (e.num_needed_rows, e.overflow)

    x, sf = drawn.again[rank]
    cached = buffer.dispatch(
        x if sf is None else (x, sf), handle=handle, quantize=drawn.quantize, zero_padding=not zero_padding
    )
    again_x, again_sf = cached.recv_x if e.sf is not None else (cached.recv_x, None)
    expected_x, expected_sf = drawn.expanded_again(rank)
    drawn.check_rows(rank, again_x, expected_x, zero_padding=not zero_padding)
    if e.sf is not None:
        drawn.check_rows(rank, again_sf, expected_sf, zero_padding=not zero_padding)
    assert cached.recv_topk_idx is cached.recv_topk_weights is None
    assert cached.handle is handle

    rng = case.rng
    summed = (ml_dtypes.bfloat16, np.float16, np.float32)[seed % 3]
    y = [random_values(rng, (len(each.row), case.hidden), summed) for each in drawn.expanded]
    weights = [rng.random(len(each.row), np.float32) - 0.5 for each in drawn.expanded] if seed % 5 else None
    shapes = [(count, case.hidden) for count in case.num_tokens]
    biases = [tuple(random_values(rng, each, summed) for _ in range(seed // 3 % 3)) for each in shapes]
    combined = drawn.combined(y, weights, biases)[rank]
    back = buffer.combine(
        y[rank], handle, topk_weights=None if weights is None else weights[rank], bias=biases[rank] or None
    )
    assert same_bits(back.combined_x, combined.x)
    assert back.combined_topk_weights is None


def check_low_latency(buffer: Buffer, seed: int, *, hook: bool = False) -> None:
    """low_latency_dispatch and combine of one random layer, against the oracle."""
    case = Case.draw(seed, buffer.num_ranks, hidden=128 * (1 + seed % 5))
    rng, rank = case.rng, buffer.rank
    use_fp8, round_scale, use_ue8m0 = ((False,) * 3, (True, False, False), (True, True, False), (True,) * 3)[
        seed % 4
    ]
    num_max_tokens = max([1, *(ids.size for ids in case.topk_idx)])
    x = [random_values(rng, (count, case.hidden), ml_dtypes.bfloat16) for count in case.num_tokens]
    layout = ("expert", "rank")[int(rng.integers(2))]
    options: dict[str, Any] = {
        "use_fp8": use_fp8,
        "round_scale": round_scale,
        "use_ue8m0": use_ue8m0,
        "layout": layout,
    }
    sends_weights = bool(rng.integers(2))
    expected = reference.low_latency_dispatch(
        x,
        case.topk_idx,
        num_max_dispatch_tokens_per_rank=num_max_tokens,
        num_experts=case.num_experts,
        **options,
    )
    stats = np.full(case.num_experts // case.num_ranks, 5, np.int32)
    waited = np.zeros(case.num_ranks, np.int64)
    out = buffer.low_latency_dispatch(
        x[rank],
        case.topk_idx[rank],
        num_max_tokens,
        case.num_experts,
        stats,
        waited,
        **options,
        return_recv_hook=hook,
        topk_weights=case.topk_weights[rank] if sends_weights else None,
    )
    if hook:
        assert out.hook is not None
        out.hook()
    mine = expected[rank]
    recv_x, recv_sf = out.recv_x if use_fp8 else (out.recv_x, None)
    assert same_bits(out.recv_count, mine.recv_count)
    assert same_bits(stats, mine.recv_count + np.int32(5))
    assert (waited >= 0).all()
    assert same_bits(out.handle.src_info, mine.src_info)
    assert same_bits(out.handle.layout_range, mine.layout_range)
    assert recv_x.shape == mine.recv_x.shape
    check_low_latency_rows(recv_x, recv_sf, mine, out.handle.expert_rows)

    shape = (*mine.src_info.shape, case.hidden)
    y = [(random_values(rng, shape, np.float32) / 64).astype(ml_dtypes.bfloat16) for _ in expected]
    back_options = low_latency_combine_options(rng)
    combined = reference.low_latency_combine(y, expected, case.topk_idx, case.topk_weights, **back_options)
    zero_copy = bool(rng.integers(2))
    target = np.zeros((case.num_tokens[rank], case.hidden), ml_dtypes.bfloat16) if rng.integers(2) else None
    if zero_copy:
        buffer.get_next_low_latency_combine_buffer(out.handle)[...] = y[rank]
    back = buffer.low_latency_combine(
        np.zeros_like(y[rank]) if zero_copy else y[rank],
        case.topk_idx[rank],
        case.topk_weights[rank],
        out.handle,
        **back_options,
        zero_copy=zero_copy,
        return_recv_hook=hook,
        out=target,
    )
    if hook:
        assert back.hook is not None
        back.hook()
    assert same_bits(back.combined_x, combined[rank])
    assert target is None or back.combined_x is target


def check_low_latency_rows(
    recv_x: Array, recv_sf: Array | None, mine: reference.LowLatencyDispatched, expert_rows: Array | None
) -> None:
    """The rows that count, in either layout."""
    if mine.expert_rows is not None:
        assert expert_rows is not None
        assert same_bits(expert_rows, mine.expert_rows)
        here = np.unique(mine.expert_rows[mine.expert_rows >= 0])
        num_rows = mine.src_info.shape[1]
        assert same_bits(recv_x.reshape(num_rows, -1)[here], mine.recv_x.reshape(num_rows, -1)[here])
        if recv_sf is not None and mine.sf is not None:
            assert same_bits(recv_sf.reshape(num_rows, -1)[here], mine.sf.reshape(num_rows, -1)[here])
        return
    assert expert_rows is None
    for expert, count in enumerate(mine.recv_count):
        assert same_bits(recv_x[expert, :count], mine.recv_x[expert, :count])
        if recv_sf is not None and mine.sf is not None:
            assert same_bits(recv_sf[expert, :count], mine.sf[expert, :count])
            assert recv_sf.strides[1] == recv_sf.itemsize


def low_latency_combine_options(rng: np.random.Generator, *, over_network: bool = False) -> dict[str, Any]:
    """How rows come back."""
    wire, at_source = int(rng.integers(3)), bool(rng.integers(2))
    return {
        "reduce": "source" if at_source and not over_network else "rank",
        "use_logfmt": wire == 1,
        "use_fp8": wire == 2,
    }

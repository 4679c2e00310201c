"""Layers through the calls of `ep_rt.compat.deep_ep` beside the oracle, on torch's default device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch_places
from host_cases import Array, Case, random_bits, random_values, same_bits
from torch_places import NUM_TOKENS, Streams

from ep_rt import arrays, reference
from ep_rt.compat import deep_ep
from ep_rt.compat.deep_ep.utils import gate, math, refs

BF16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn


def tensor(array: Array) -> Any:
    made = arrays.to_framework(array, "torch")
    assert isinstance(made, torch.Tensor)
    return made.to(torch.get_default_device())


def equal(got: Any, expected: Array | None) -> bool:
    """The same bits, in a torch tensor of the default device."""
    assert isinstance(got, torch.Tensor)
    assert got.device.type == torch.get_default_device().type
    return same_bits(arrays.host(got.cpu()), expected)


def rows_at(rows: Any, where: Any) -> Any:
    """Rows by index, of any dtype: not all of torch's kernels know float8."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.view(torch.uint8)[where].view(rows.dtype)
    return rows[where]


def options_of(buffer: Any, number: int) -> dict[str, Any]:
    """Every way to order a call, in turn; none changes a result."""
    chunk = 1 + number % 7
    options: dict[str, Any] = {"async_finish": bool(number & 1)}
    if number & 2:
        options["previous_event"] = buffer.capture()
        options["allocate_on_comm_stream"] = options["async_finish"]
    if number & 4:
        options["config"] = deep_ep.Config(24, chunk, 256, 2 * chunk, 128)
    return options


def check_normal(
    buffer: Any, seed: int, *, ranks_per_node: int | None = None, rounds_nodes: bool = False
) -> None:
    """One layer, with and without ids, FP8 or bfloat16, cached, worst case, and combined.

    Args:
        rounds_nodes: a combine rounds the sums of each node.
    """
    summed_ranks = ranks_per_node if rounds_nodes else None
    num_ranks, rank = buffer.group_size, buffer.rank
    case = Case.draw(seed, num_ranks, hidden=128 * (1 + seed % 3))
    rng, ids = case.rng, case.topk_idx
    is_fp8 = bool(seed % 2)
    alignment = (1, 8)[seed // 2 % 2]
    counts, hidden = case.num_tokens, case.hidden
    dtype = FP8 if is_fp8 else BF16
    x = [random_bits(rng, (count, hidden), dtype) for count in counts]
    sf = [random_values(rng, (count, hidden // 128), np.float32) for count in counts] if is_fp8 else None
    # Column-major scale factors, as DeepEP's users make them for TMA.
    given: Any = tensor(x[rank])
    if sf is not None:
        given = given, tensor(np.ascontiguousarray(sf[rank].T)).T

    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        tensor(ids[rank]), case.num_experts, async_finish=True
    )
    event.current_stream_wait()
    layout = reference.dispatch_layout(
        ids[rank], num_experts=case.num_experts, num_ranks=num_ranks, ranks_per_node=ranks_per_node
    )
    assert equal(per_rank, layout.num_tokens_per_rank)
    assert equal(per_expert, layout.num_tokens_per_expert)
    assert equal(in_rank, layout.is_token_in_rank)
    if ranks_per_node is None:
        assert per_node is None
    else:
        assert equal(per_node, layout.num_tokens_per_node)

    for number, with_topk in enumerate((True, False)):
        expected = reference.dispatch(
            x,
            ids,
            num_experts=case.num_experts,
            topk_weights=case.topk_weights,
            sf=sf,
            expert_alignment=alignment,
        )
        mine = expected[rank]
        call: dict[str, Any] = {
            "x": given,
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
            "expert_alignment": alignment,
        }
        if with_topk:
            call |= {"topk_idx": tensor(ids[rank]), "topk_weights": tensor(case.topk_weights[rank])}
        recv_x, recv_idx, recv_weights, recv_list, handle, event = buffer.dispatch(
            **call, **options_of(buffer, seed + number)
        )
        event.current_stream_wait()
        check_rows(recv_x, mine.recv_x, mine.recv_sf)
        assert type(recv_list) is list
        assert recv_list == mine.num_recv_tokens_per_expert
        if with_topk:
            assert equal(recv_idx, mine.recv_topk_idx)
            assert equal(recv_weights, mine.recv_topk_weights)
        else:
            assert recv_idx is recv_weights is None
        check_handle(handle, in_rank, x, ids, case, rank, ranks_per_node)

        again = [random_bits(rng, (count, hidden), dtype) for count in counts]
        expected_x, expected_sf = reference.dispatch_cached(again, expected, sf)[rank]
        cached = buffer.dispatch(
            tensor(again[rank]) if sf is None else (tensor(again[rank]), given[1]),
            handle=handle,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            **options_of(buffer, seed + number + 1),
        )
        cached[5].current_stream_wait()
        assert cached[1:5] == (None, None, None, None)
        check_rows(cached[0], expected_x, expected_sf)

        y = [random_values(rng, each.recv_x.shape, BF16) for each in expected]
        num_biases = (seed + number) % 3
        biases: list[Any] = [
            tuple(random_values(rng, (count, hidden), BF16) for _ in range(num_biases)) for count in counts
        ]
        if num_biases < 2:
            biases = [each[0] if each else None for each in biases]
        weights = [each.recv_topk_weights for each in expected if each.recv_topk_weights is not None]
        combined = reference.combine(
            y,
            expected,
            num_tokens=counts,
            bias=biases,
            topk_weights=weights if with_topk else None,
            ranks_per_node=summed_ranks,
        )[rank]
        bias = biases[rank]
        if bias is not None:
            bias = tuple(map(tensor, bias)) if isinstance(bias, tuple) else tensor(bias)
        combined_x, combined_weights, event = buffer.combine(
            tensor(y[rank]),
            handle,
            topk_weights=tensor(weights[rank]) if with_topk else None,
            bias=bias,
            **options_of(buffer, seed + number + 2),
        )
        event.current_stream_wait()
        assert equal(combined_x, combined.x)
        if with_topk:
            assert equal(combined_weights, combined.topk_weights)
        else:
            assert combined_weights is None

        if with_topk:
            call["num_worst_tokens"] = capacity = max(1, sum(counts))
            worst_x, worst_idx, worst_weights, empty, worst_handle, event = buffer.dispatch(
                **call, async_finish=True
            )
            with event:
                pass
            rows = mine.num_recv_tokens
            assert empty == []
            parts = worst_x if is_fp8 else (worst_x,)
            assert all(len(part) == capacity for part in (*parts, worst_idx, worst_weights))
            check_rows(tuple(part[:rows] for part in parts), mine.recv_x, mine.recv_sf)
            assert equal(worst_idx[:rows], mine.recv_topk_idx)
            assert (worst_idx[rows:] == -1).all()
            y_worst = np.concatenate([y[rank], np.ones((capacity - rows, hidden), BF16)])
            back = buffer.combine(tensor(y_worst), worst_handle)
            plain = reference.combine(y, expected, num_tokens=counts, ranks_per_node=summed_ranks)[rank]
            assert equal(back[0], plain.x)


def check_rows(got: Any, x: Array, sf: Array | None) -> None:
    parts = got if isinstance(got, tuple) else (got,)
    assert equal(parts[0], x)
    assert len(parts) == (1 if sf is None else 2)
    if sf is not None:
        assert equal(parts[1], sf)


def check_handle(
    handle: Any,
    in_rank: Any,
    x: list[Array],
    ids: list[Array],
    case: Case,
    rank: int,
    ranks_per_node: int | None,
) -> None:
    """What programs look at: where the rows of each source end."""
    num_ranks = len(x)
    from_each = [
        int(
            reference.dispatch_layout(
                each, num_experts=case.num_experts, num_ranks=num_ranks
            ).num_tokens_per_rank[rank]
        )
        for each in ids
    ]
    ends = np.cumsum(from_each).tolist()
    if ranks_per_node is None:
        prefix, _, _, _, is_token_in_rank, _ = handle
        assert prefix.shape == (num_ranks, num_ranks)
        assert prefix[:, rank].tolist() == ends
    else:
        assert len(handle) == 10
        is_token_in_rank = handle[0]
        assert handle[-4].tolist() == ends
    assert is_token_in_rank is in_rank


def check_low_latency(buffer: Any, seed: int, *, reduce: str = "source") -> None:
    """One layer of decode in every mode: formats, hooks, zero-copy, LogFMT, -1 ids, statistics.

    Args:
        reduce: where a combine sums unless it is told.
    """
    num_ranks, rank = buffer.group_size, buffer.rank
    case = Case.draw(seed, num_ranks, hidden=512)
    rng, ids, counts = case.rng, case.topk_idx, case.num_tokens
    num_local_experts = case.num_experts // num_ranks
    # An expert may repeat in a row of ids, so one rank may send it more rows than it has tokens.
    num_max_tokens = max(1, *(np.bincount(each[each >= 0]).max(initial=len(each)) for each in ids))
    formats = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
    stats = tensor(np.zeros(num_local_experts, np.int32))
    waits = tensor(np.zeros(num_ranks, np.int64))
    total = np.zeros(num_local_experts, np.int32)
    for number, ((use_fp8, round_scale, use_ue8m0), with_hook) in enumerate(product(formats, (False, True))):
        x = [random_values(rng, (count, case.hidden), BF16) for count in counts]
        expected = reference.low_latency_dispatch(
            x,
            ids,
            num_max_dispatch_tokens_per_rank=num_max_tokens,
            num_experts=case.num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )
        mine = expected[rank]
        recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
            tensor(x[rank]),
            tensor(ids[rank]),
            num_max_tokens,
            case.num_experts,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            async_finish=not with_hook,
            return_recv_hook=with_hook,
        )
        src_info, layout_range, *sizes = handle  # before the hook, which fills them
        hook() if with_hook else event.current_stream_wait()
        assert sizes == [num_max_tokens, case.hidden, case.num_experts]
        assert equal(recv_count, mine.recv_count)
        assert equal(src_info, mine.src_info)
        assert equal(layout_range, mine.layout_range)
        assert handle[0] is src_info
        total += mine.recv_count
        assert equal(stats, total)
        rows, scales = recv_x if use_fp8 else (recv_x, None)
        for expert, count in enumerate(mine.recv_count):
            assert equal(rows[expert, :count].contiguous(), mine.recv_x[expert, :count])
            if scales is not None and mine.sf is not None:
                assert scales.stride(1) == 1  # column-major
                assert equal(scales[expert, :count].contiguous(), mine.sf[expert, :count])

        shape = (*mine.src_info.shape, case.hidden)
        for zero_copy, use_logfmt in ((False, False), (True, False), (False, True)):
            y = [(random_values(rng, shape, np.float32) / 64).astype(BF16) for _ in expected]
            combined = reference.low_latency_combine(
                y, expected, ids, case.topk_weights, use_logfmt=use_logfmt, reduce=reduce
            )[rank]
            given = tensor(y[rank])
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = given
            target = tensor(np.zeros((counts[rank], case.hidden), BF16)) if number % 2 else None
            got, event, hook = buffer.low_latency_combine(
                given,
                tensor(ids[rank]),
                tensor(case.topk_weights[rank]),
                handle,
                use_logfmt=use_logfmt,
                zero_copy=zero_copy,
                async_finish=not with_hook,
                return_recv_hook=with_hook,
                out=target,
                combine_wait_recv_cost_stats=waits,
            )
            hook() if with_hook else event.current_stream_wait()
            assert equal(got, combined)
            assert target is None or got is target
    assert (waits >= 0).all()


def full_case(seed: int, buffer: Any, *, hidden: int) -> Case:
    """As many tokens as an `ElasticBuffer` was made for, each to 8 experts, of which a rank has 8."""
    rng = np.random.default_rng(seed)
    num_ranks, num_tokens = buffer.num_ranks, buffer.num_max_tokens_per_rank
    num_experts = 8 * num_ranks
    shape = num_tokens, num_experts
    ids = [np.argsort(rng.random(shape), axis=1)[:, :8].astype(np.int64) for _ in range(num_ranks)]
    return Case(
        rng=rng,
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=[num_tokens] * num_ranks,
        topk_idx=ids,
        topk_weights=[rng.random(each.shape, np.float32) for each in ids],
        hidden=hidden,
    )


def check_elastic(
    buffer: Any,
    seed: int,
    *,
    do_cpu_sync: bool = True,
    summed_ranks: int | None = None,
    case: Case | None = None,
) -> None:
    """One layer through `ElasticBuffer` or `EPBuffer`, by rank and expanded: dispatched, repeated, combined.

    Args:
        summed_ranks: so many ranks, those of a node, sum and round before the whole is summed.
    """
    num_ranks, rank = buffer.num_ranks, buffer.rank_idx
    case = case or Case.draw(seed, num_ranks, hidden=128 * (1 + seed % 3))
    rng, ids, counts, hidden = case.rng, case.topk_idx, case.num_tokens, case.hidden
    if not do_cpu_sync:  # no capacity for experts that repeat within a row
        ids = [distinct(each) for each in ids]
    num_local_experts = case.num_experts // num_ranks
    num_max_tokens = max(1, *counts)
    alignment = (1, 16)[seed % 2]
    is_fp8 = bool(seed // 2 % 2)
    x = [random_bits(rng, (count, hidden), FP8 if is_fp8 else BF16) for count in counts]
    sf = [random_values(rng, (count, hidden // 128), np.float32) for count in counts] if is_fp8 else None
    given: Any = tensor(x[rank]) if sf is None else (tensor(x[rank]), tensor(sf[rank]))
    dispatched = reference.dispatch(
        x,
        ids,
        num_experts=case.num_experts,
        topk_weights=case.topk_weights,
        sf=sf,
        expert_alignment=alignment,
    )
    mine = dispatched[rank]
    num_recv_tokens = mine.num_recv_tokens
    expanded = [
        reference.expand(each, num_local_experts=num_local_experts, alignment=alignment)
        for each in dispatched
    ]
    e = expanded[rank]
    is_row = e.row >= 0
    ids_here, weights_here = tensor(ids[rank]), tensor(case.topk_weights[rank])
    is_async = bool(seed // 3 % 2)
    is_ep_buffer = isinstance(buffer, deep_ep.EPBuffer)
    keeps_copy = bool(seed % 2) and not is_ep_buffer

    def launch(name: str, *args: Any, **options: Any) -> Any:
        if seed % 3 == 0:
            options |= {"previous_event": buffer.capture(), "allocate_on_comm_stream": True}
        if seed % 3 == 1 and not is_ep_buffer:
            options["previous_event_before_epilogue"] = buffer.capture()
        if is_ep_buffer and is_async and seed % 3 != 1:
            event = getattr(buffer, name)(
                *args, **options, async_with_compute_stream=True, defer_epilogue=True
            )
            return event.current_stream_wait()
        *results, event = getattr(buffer, name)(*args, **options, async_with_compute_stream=is_async)
        if is_async:
            event.current_stream_wait()
        return results

    def rows_of(got: Any, keep: Any) -> Any:
        return tuple(rows_at(part, keep) for part in got) if isinstance(got, tuple) else rows_at(got, keep)

    for do_expand in (False, True):
        stats = tensor(np.zeros(num_local_experts, np.int32))
        recv_x, recv_idx, recv_weights, handle = launch(
            "dispatch",
            given,
            ids_here,
            weights_here,
            cumulative_local_expert_recv_stats=stats,
            num_experts=case.num_experts,
            num_max_tokens_per_rank=num_max_tokens,
            expert_alignment=alignment,
            do_handle_copy=keeps_copy,
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand,
            use_tma_aligned_col_major_sf=is_fp8,
        )
        keep = torch.from_numpy(np.flatnonzero(is_row)) if do_expand else slice(num_recv_tokens)
        sf_rows = None
        if is_fp8:
            sf_rows = e.sf[is_row] if do_expand and e.sf is not None else mine.recv_sf
            assert recv_x[1].stride(0) == 1
            assert recv_x[1].stride(1) % 4 == 0 or len(recv_x[1]) == 0
        x_rows = e.x[is_row] if do_expand else mine.recv_x
        got = rows_of(recv_x, keep)
        check_rows((got[0], got[1].contiguous()) if is_fp8 else got, x_rows, sf_rows)
        true_counts = [int((mine.recv_topk_idx == each).sum()) for each in range(num_local_experts)]
        assert stats.tolist() == true_counts
        if do_expand:
            assert recv_idx is None
            assert equal(recv_weights[keep], None if e.weights is None else e.weights[is_row])
        else:
            assert equal(recv_idx[keep], mine.recv_topk_idx)
            assert equal(recv_weights[keep], mine.recv_topk_weights)

        # What programs read of a handle.
        assert (handle.do_expand, handle.num_experts) == (do_expand, case.num_experts)
        assert torch.equal(handle.topk_idx, ids_here)
        assert (handle.topk_idx is ids_here) == (not keeps_copy)
        known_counts = mine.num_recv_tokens_per_expert if do_cpu_sync else []
        assert handle.num_recv_tokens_per_expert_list == known_counts
        by_number = handle.psum_num_recv_tokens_per_scaleup_rank
        assert by_number.tolist() == sources_of(buffer, ids, case.num_experts)
        if do_cpu_sync:
            assert handle.num_recv_tokens == num_recv_tokens
        slots = np.full(ids[rank].shape, -1, np.int32)
        for dst in range(num_ranks):
            is_there = ids[rank] // num_local_experts == dst
            numbers = np.cumsum(is_there.any(axis=1)) - 1
            slots = np.where(is_there, numbers[:, None], slots)
        assert equal(handle.dst_buffer_slot_idx, slots.astype(np.int32))
        assert handle.dst_buffer_slot_idx is handle.dst_buffer_slot_idx
        ends = handle.psum_num_recv_tokens_per_expert
        if do_expand:
            assert equal(ends, e.psum_num_tokens_per_expert)
            assert handle.num_unaligned_recv_tokens_per_expert.tolist() == true_counts
        else:
            assert ends.tolist() == np.cumsum(mine.num_recv_tokens_per_expert).tolist()
        metadata = handle.recv_src_metadata
        sources = [
            src * num_max_tokens + token
            for src, each in enumerate(ids)
            for token in np.flatnonzero((each // num_local_experts == rank).any(axis=1))
        ]
        assert metadata.shape == (num_recv_tokens, 2 + ids_here.shape[1])
        assert metadata[:, 0].tolist() == sources
        slots = np.full((num_recv_tokens, ids_here.shape[1]), -1, np.int32)
        if do_expand:
            slots[e.row[is_row], e.topk[is_row]] = np.flatnonzero(is_row)
        assert equal(metadata[:, 2:].contiguous(), slots)
        assert handle.recv_src_metadata is metadata

        again_x, again_idx, again_weights, same = launch(
            "dispatch", given, handle=handle, do_expand=do_expand
        )
        assert same is handle
        assert again_idx is recv_idx
        assert again_weights is None
        check_rows(rows_of(again_x, keep), x_rows, sf_rows)
        again_x, _, again_weights, _ = launch(
            "dispatch",
            given,
            topk_weights=weights_here,
            handle=handle,
            do_expand=do_expand,
            do_zero_padding=do_expand,
        )
        check_rows(rows_of(again_x, keep), x_rows, sf_rows)
        assert torch.equal(again_weights[keep], recv_weights[keep])
        num_rows = len(again_weights)
        if do_expand:
            assert num_rows >= len(e.row)
            padding = torch.ones(num_rows, dtype=torch.bool, device="cpu")
            padding[keep] = False
            first = again_x[0] if is_fp8 else again_x
            assert (rows_at(first, padding).float() == 0).all()
            assert (again_weights[padding] == 0).all()

        biases: list[Any] = [None] * num_ranks
        if seed % 2:
            biases = [random_values(rng, (count, hidden), BF16) for count in counts]
        if do_expand:
            y = [random_values(rng, (len(each.row), hidden), BF16) for each in expanded]
            sent = [
                reference.collapse(rows, each, d.num_recv_tokens, weighted=False)
                for rows, each, d in zip(y, expanded, dispatched, strict=True)
            ]
        else:
            sent = y = [random_values(rng, each.recv_x.shape, BF16) for each in dispatched]
        expected = reference.combine(
            sent, dispatched, num_tokens=counts, bias=biases, ranks_per_node=summed_ranks
        )[rank]
        mine_y = np.concatenate([y[rank], np.zeros((num_rows - len(y[rank]), hidden), BF16)])
        combined_x, combined_weights = launch(
            "combine",
            tensor(mine_y),
            handle,
            topk_weights=recv_weights,
            bias=None if biases[rank] is None else tensor(biases[rank]),
        )
        assert equal(combined_x, expected.x)
        assert torch.equal(combined_weights, weights_here.masked_fill(ids_here < 0, 0))
        assert launch("combine", tensor(mine_y), handle)[1] is None


def distinct(ids: Array) -> Array:
    """The same without experts that repeat within a row."""
    out = ids.copy()
    for column in range(1, ids.shape[1]):
        out[(out[:, column, None] == out[:, :column]).any(axis=1), column] = -1
    return out


def check_tuning(buffer: Any) -> None:
    """Whatever the `Config`, the rows and sums are the same, as programs expect that try many of them."""
    num_ranks, rank = buffer.group_size, buffer.rank
    ids = torch_places.everywhere(num_ranks)
    x = torch.full((len(ids), 256), rank + 1.0, dtype=torch.bfloat16)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_ranks)
    first, _, _, _, handle, _ = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert)
    configs = [deep_ep.Config(num_sms, chunk, 256) for num_sms in (4, 24) for chunk in range(4, 33, 4)]
    for config in (*configs, buffer.get_dispatch_config(num_ranks), buffer.get_combine_config(num_ranks)):
        recv_x, *_ = buffer.dispatch(x, handle, config=config)
        combined_x, _, _ = buffer.combine(recv_x, handle, config=config)
        assert torch.equal(recv_x, first)
        assert torch.equal(combined_x, num_ranks * x)


def check_elastic_refs(
    buffer: Any, *, use_fp8: bool, num_biases: int, do_cpu_sync: bool = True, rounds_nodes: bool = False
) -> None:
    """A layer of an elastic buffer beside DeepEP's helpers, bit for bit, as its own test compares.

    Ranks are those of torch's default process group. One has no token, and some tokens miss experts.

    Args:
        rounds_nodes: a combine rounds the sums of each node.
    """
    num_ranks, rank = buffer.num_ranks, buffer.rank_idx
    num_max, hidden, num_topk, num_experts = 16, 256, 5, 3 * num_ranks
    num_tokens = 0 if rank == 1 else num_max - rank
    scores = gate.get_unbalanced_scores(num_tokens, num_experts, num_ranks, num_topk, 1.0, False)
    topk_weights, topk_idx = torch.topk(scores.float(), num_topk, dim=-1, sorted=False)
    topk_idx.masked_fill_(torch.rand(topk_idx.shape) < 0.2, -1)
    topk_weights.masked_fill_(topk_idx < 0, 0)
    x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16)
    given = math.per_token_cast_to_fp8(x) if use_fp8 else x
    bias = tuple(torch.randn(num_tokens, hidden, dtype=torch.bfloat16) for _ in range(num_biases))

    def dispatch(**options: Any) -> Any:
        return buffer.dispatch(given, **options)

    routing = {
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "num_experts": num_experts,
        "num_max_tokens_per_rank": num_max,
        "do_cpu_sync": do_cpu_sync,
    }
    recv_x, recv_idx, recv_weights, handle, _ = dispatch(**routing)
    cached_x, cached_idx, _, _, _ = dispatch(handle=handle)
    out_x, none, out_weights, out_handle, _ = dispatch(**routing, expert_alignment=8, do_expand=True)
    again_x, _, again_weights, _, _ = dispatch(
        handle=out_handle, topk_weights=topk_weights, do_expand=True, do_zero_padding=True
    )
    assert none is None

    # What came, against torch's own collectives.
    ref_x, ref_idx, ref_weights, ref_src, ref_counts = refs.dispatch(
        given, topk_idx, topk_weights, num_max, num_experts
    )
    num_received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    assert num_received == int(out_handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == len(ref_src)
    received = slice(num_received)
    parts = [recv_x, cached_x, ref_x, out_x, again_x]
    for got, cached, ref, out, again in zip(*parts, strict=True) if use_fp8 else [parts]:
        assert got.dtype == cached.dtype == out.dtype == ref.dtype
        slots = out_handle.recv_src_metadata[received, 2:]
        token, column = torch.nonzero(slots >= 0, as_tuple=True)
        rows = slots[token, column].long()
        for each in (got[received], cached[received]):
            assert same_bytes(each, ref)
        for each in (out, again):
            assert same_bytes(rows_at(each, rows), rows_at(ref, token))
        is_padding = torch.ones(len(again), dtype=torch.bool)
        is_padding[rows] = False
        assert not rows_at(again, is_padding).view(torch.uint8).any()
        for each in (out_weights, again_weights):
            assert torch.equal(each[rows], ref_weights[token, column])
        assert not again_weights[is_padding].any()
    assert torch.equal(recv_idx[received], ref_idx)
    assert torch.equal(cached_idx[received], ref_idx)
    assert torch.equal(recv_weights[received], ref_weights.masked_fill(ref_idx < 0, 0))
    src = handle.recv_src_metadata[received, 0]
    assert torch.equal(src, ref_src)
    assert torch.equal(src, out_handle.recv_src_metadata[received, 0])
    assert torch.equal(src.long() // num_max, torch.arange(num_ranks).repeat_interleave(ref_counts))

    # What comes back, against the sums that every rank can make.
    def made(tokens: Any, ids: Any) -> Any:
        rows = refs.generate_pre_combine_data(tokens, num_max, num_topk, hidden)
        rows[ids < 0] = 0
        return rows

    expected = refs.combine(
        made(rank * num_max + torch.arange(num_tokens), topk_idx),
        topk_idx,
        buffer.num_scaleout_ranks,
        buffer.num_scaleup_ranks,
        num_experts,
        (None, bias[0] if bias else None, bias)[num_biases],
        True,
        rounds_nodes,
    )
    rows = made(src, ref_idx)
    y = torch.full((len(recv_weights), hidden), torch.nan, dtype=torch.bfloat16)
    y[received] = refs.ordered_accumulate(rows)
    out_y = torch.full((len(out_weights) + 1, hidden), torch.nan, dtype=torch.bfloat16)
    out_y[out_handle.recv_src_metadata[received, 2:].flatten().long()] = rows.view(-1, hidden)
    biases = {"bias": bias if num_biases == 2 else bias[0]} if bias else {}
    back, weights_back, _ = buffer.combine(y, handle, recv_weights, **biases)
    out_back, out_weights_back, _ = buffer.combine(out_y[:-1], out_handle, out_weights, **biases)
    for got, weights in ((back, weights_back), (out_back, out_weights_back)):
        assert torch.equal(got, expected)
        assert torch.equal(weights, topk_weights)


def same_bytes(one: Any, other: Any) -> bool:
    """Of two tensors, of any dtype."""
    in_bytes, others = (each.contiguous().view(torch.uint8) for each in (one, other))
    return one.shape == other.shape and bool(torch.equal(in_bytes, others))


def check_masks(buffer: Any) -> None:
    """The last rank and the others leave each other out. Of 2 ranks or more."""
    num_ranks, rank, last = buffer.group_size, buffer.rank, buffer.group_size - 1
    others = [peer for peer in range(num_ranks) if (peer == last) != (rank == last)]
    ids = torch.arange(2 * num_ranks).repeat(3, 1)
    x = torch.full((3, 128), rank + 1.0, dtype=torch.bfloat16)
    weights = torch.ones(ids.shape)
    status = torch.full((num_ranks,), 7, dtype=torch.int)
    for masked in ([], others):
        for peer in masked:
            buffer.low_latency_update_mask_buffer(peer, True)
        here = [peer for peer in range(num_ranks) if peer not in masked]
        recv_x, recv_count, handle, _, _ = buffer.low_latency_dispatch(
            x, ids, 3, 2 * num_ranks, use_fp8=False
        )
        combined_x, _, _ = buffer.low_latency_combine(recv_x, ids, weights, handle)
        assert recv_count.tolist() == [3 * len(here)] * 2
        for expert in range(2):
            values = recv_x[expert, : 3 * len(here), 0].tolist()
            assert values == [src + 1.0 for src in here for _ in range(3)]
        assert torch.equal(combined_x, 2 * len(here) * x)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(peer in masked) for peer in range(num_ranks)]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()


def check_ranks_that_stop(buffer: Any) -> None:
    """Rank 1 stops where others dispatch for the first time, 2 where they combine, 3 where they clean.

    Those that stop return at once.
    """
    rank, num_ranks = buffer.rank, buffer.group_size
    stopping = dict(zip(("dispatch", "combine", "clean"), range(1, num_ranks), strict=False))
    num_experts = 2 * num_ranks
    ids = torch.tensor([[0, 2], [num_experts - 1, 1], [-1, 3]])
    weights, x = torch.ones(ids.shape), torch.ones(3, 128, dtype=torch.bfloat16)
    masked: set[int] = set()
    status = torch.zeros(num_ranks, dtype=torch.int)

    def stops(call: str) -> bool:
        masked.update({stopping[call]} if call in stopping else {})
        return rank in masked

    def check() -> None:
        buffer.low_latency_query_mask_buffer(status)
        assert set(status.nonzero().view(-1).tolist()) == masked

    for with_hook in (False, True):
        if stops("dispatch"):
            return
        recv_x, recv_count, handle, _, hook = buffer.low_latency_dispatch(
            x, ids, 3, num_experts, use_fp8=False, return_recv_hook=with_hook
        )
        hook() if hook else None
        check()
        own = (ids // 2 == rank) & (ids >= 0)
        assert recv_count.sum().item() == own.sum().item() * (num_ranks - len(masked))
        if stops("combine"):
            return
        combined_x, _, hook = buffer.low_latency_combine(
            recv_x, ids, weights, handle, return_recv_hook=with_hook
        )
        hook() if hook else None
        check()
        is_here = torch.tensor([owner not in masked for owner in range(num_ranks)])
        assert torch.equal(combined_x, x * ((ids >= 0) & is_here[ids // 2]).sum(dim=1, keepdim=True))
        if stops("clean"):
            return
        buffer.clean_low_latency_buffer(3, 128, num_experts)
        check()


def replays(
    buffer: Any,
    calls: Callable[[], Any],
    draw: Callable[[], tuple[list[Array], ...]],
    given: list[Any],
    *,
    has_threads_beside: bool,
) -> Iterator[tuple[tuple[list[Array], ...], Any]]:
    """What `draw` drew for all ranks, and what `calls` made of it in one graph, for a few replays.

    Args:
        given: the tensors that `calls` reads, for this rank's part of what is drawn.
    """
    inner = buffer._buffer
    torch_places.meet(inner)
    replay = torch_places.Replay(inner.group, calls, has_threads_beside=has_threads_beside)
    for _ in range(4):
        drawn = draw()
        for static, values in zip(given, drawn, strict=True):
            static.copy_(tensor(values[inner.rank]))
        torch_places.meet(inner)
        replay()
        torch_places.meet(inner)
        yield drawn, replay.results


def check_graph(
    buffer: Any,
    *,
    has_threads_beside: bool,
    first: contextlib.AbstractContextManager[None] | None = None,
    reduce: str = "source",
    summed_ranks: int | None = None,
) -> None:
    """Calls of both modes in one graph, replayed with other tokens and other routing.

    Args:
        first: around the calls before the capture.
        reduce: see `check_low_latency`.
        summed_ranks: see `check_elastic`.
    """
    num_ranks, rank = buffer.group_size, buffer.rank
    num_tokens, hidden, num_experts = 24, 256, 2 * num_ranks
    capacity = num_ranks * num_tokens
    rng = np.random.default_rng(7)

    def draw() -> tuple[list[Array], ...]:
        """x, ids, weights and outputs of experts, of all ranks; an expert is not named twice by a token."""
        x = [random_values(rng, (num_tokens, hidden), BF16) for _ in range(num_ranks)]
        ids = [np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :2] for _ in x]
        for each in ids:
            each[rng.random(each.shape) < 0.1] = -1
        weights = [rng.random(each.shape, np.float32) for each in ids]
        return x, ids, weights, [random_values(rng, (2, capacity, hidden), BF16) for _ in x]

    given = [tensor(each[rank]) for each in draw()]
    x, ids, weights, y = given

    def calls() -> Any:
        layout = buffer.get_dispatch_layout(ids, num_experts)
        per_rank, per_node, per_expert, in_rank, _ = layout
        sent = buffer.dispatch(
            x, None, per_rank, per_node, in_rank, per_expert, ids, weights, num_worst_tokens=capacity
        )
        back = buffer.combine(sent[0], sent[4], topk_weights=sent[2])
        few = buffer.low_latency_dispatch(x, ids, num_tokens, num_experts)
        return layout, sent, back, few, buffer.low_latency_combine(y, ids, weights, few[2])

    with first or contextlib.nullcontext():
        calls()
    for drawn, results in replays(buffer, calls, draw, given, has_threads_beside=has_threads_beside):
        layout, sent, back, few, few_back = results
        all_x, all_ids, all_weights, all_y = drawn
        counts = [num_tokens] * num_ranks
        expected = reference.dispatch(
            all_x, all_ids, num_experts=num_experts, topk_weights=all_weights, num_worst_tokens=capacity
        )
        mine = expected[rank]
        wanted = reference.dispatch_layout(all_ids[rank], num_experts=num_experts, num_ranks=num_ranks)
        assert equal(layout[0], wanted.num_tokens_per_rank)
        assert equal(layout[2], wanted.num_tokens_per_expert)
        num_rows = mine.num_recv_tokens
        assert equal(sent[0][:num_rows], mine.recv_x[:num_rows])
        assert equal(sent[1], mine.recv_topk_idx)
        recv_weights = [each.recv_topk_weights for each in expected if each.recv_topk_weights is not None]
        assert equal(sent[2], recv_weights[rank])
        combined = reference.combine(
            [each.recv_x for each in expected],
            expected,
            num_tokens=counts,
            topk_weights=recv_weights,
            ranks_per_node=summed_ranks,
        )[rank]
        assert equal(back[0], combined.x)
        assert equal(back[1], combined.topk_weights)
        dispatched = reference.low_latency_dispatch(
            all_x, all_ids, num_max_dispatch_tokens_per_rank=num_tokens, num_experts=num_experts
        )
        here = dispatched[rank]
        (rows, scales), count = few[0], few[1]
        assert equal(count, here.recv_count)
        assert here.sf is not None
        for expert, length in enumerate(here.recv_count):
            assert equal(rows[expert, :length], here.recv_x[expert, :length])
            assert equal(scales[expert, :length], here.sf[expert, :length])
        few_combined = reference.low_latency_combine(all_y, dispatched, all_ids, all_weights, reduce=reduce)[
            rank
        ]
        assert equal(few_back[0], few_combined)


def check_order(buffer: Any, streams: Streams, mode: str) -> None:
    """Calls of a `Buffer`, "exact", "worst", "low-latency" or "hook", in the order of streams and events."""
    num_ranks = buffer.group_size
    ids = torch_places.everywhere(num_ranks)
    weights = torch.ones(ids.shape)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_ranks)

    def normal(x: Any, *, is_async: bool, previous: Any) -> tuple[Any, Any]:
        options = {"async_finish": is_async, "allocate_on_comm_stream": is_async, "previous_event": previous}
        capacity = len(ids) * num_ranks if mode == "worst" else 0
        recv_x, _, _, _, handle, event = buffer.dispatch(
            x, None, per_rank, per_node, in_rank, per_expert, ids, num_worst_tokens=capacity, **options
        )
        event.current_stream_wait()
        y = 2 * recv_x
        options["previous_event"] = buffer.capture() if is_async else None
        combined_x, _, event = buffer.combine(y, handle, **options)
        with event:
            pass
        return recv_x, combined_x

    def low_latency(x: Any, *, is_async: bool, previous: Any) -> tuple[Any, Any]:
        if previous is not None:
            previous.current_stream_wait()
        options = {"async_finish": is_async and mode != "hook", "return_recv_hook": mode == "hook"}
        recv_x, _, handle, event, hook = buffer.low_latency_dispatch(
            x, ids, NUM_TOKENS, num_ranks, use_fp8=False, **options
        )
        hook() if hook else event.current_stream_wait()
        y = 2 * recv_x
        combined_x, event, hook = buffer.low_latency_combine(y, ids, weights, handle, **options)
        hook() if hook else event.current_stream_wait()
        return recv_x[0], combined_x

    layer = normal if mode in ("exact", "worst") else low_latency
    torch_places.check_order(buffer._buffer, streams, layer, dtype=torch.bfloat16)


def check_elastic_order(buffer: Any, streams: Streams, *, do_expand: bool, do_cpu_sync: bool) -> None:
    """Calls of an `ElasticBuffer` in the order of streams and events."""
    num_ranks = buffer.num_ranks
    ids = torch_places.everywhere(num_ranks)

    def layer(x: Any, *, is_async: bool, previous: Any) -> tuple[Any, Any]:
        options = {
            "async_with_compute_stream": is_async,
            "allocate_on_comm_stream": is_async,
            "previous_event": previous,
        }
        recv_x, _, _, handle, event = buffer.dispatch(
            x,
            ids,
            num_experts=num_ranks,
            num_max_tokens_per_rank=NUM_TOKENS,
            do_expand=do_expand,
            do_cpu_sync=do_cpu_sync,
            **options,
        )
        event.current_stream_wait()
        y = 2 * recv_x
        options["previous_event"] = buffer.capture() if is_async else None
        combined_x, _, event = buffer.combine(y, handle, **options)
        event.current_stream_wait()
        return recv_x, combined_x

    torch_places.check_order(buffer._buffer, streams, layer, dtype=torch.bfloat16)


def check_elastic_counts_first(buffer: Any, streams: Streams) -> None:
    """Who looks at a handle's counts before waiting for its dispatch gets them, too."""
    num_ranks, rank = buffer.num_ranks, buffer.rank_idx
    num_experts = 3 * num_ranks
    rng = np.random.default_rng(5)
    drawn = [[rng.integers(0, num_experts, (NUM_TOKENS, 1)) for _ in range(num_ranks)] for _ in range(4)]
    given = [tensor(ids[rank]) for ids in drawn]
    x = torch.ones((NUM_TOKENS, 256), dtype=torch.bfloat16)
    torch_places.meet(buffer._buffer)
    results = []
    for ids in given:
        with streams.current(0):
            torch_places.slow()
            *_, handle, event = buffer.dispatch(
                x,
                ids,
                num_experts=num_experts,
                num_max_tokens_per_rank=NUM_TOKENS,
                expert_alignment=8,
                do_expand=True,
                do_cpu_sync=False,
                async_with_compute_stream=True,
            )
        with streams.current(1):
            counts, ends = handle.num_unaligned_recv_tokens_per_expert, handle.psum_num_recv_tokens_per_expert
            by_number = handle.psum_num_recv_tokens_per_scaleup_rank
            event.current_stream_wait()
            results.append((counts.clone(), ends.clone(), by_number.clone()))
    streams.settle()
    torch_places.meet(buffer._buffer)
    for all_ids, (counts, ends, by_number) in zip(drawn, results, strict=True):
        each = np.bincount(np.concatenate(all_ids).flat, minlength=num_experts)[3 * rank : 3 * rank + 3]
        assert counts.tolist() == each.tolist()
        begins = np.cumsum([0, *(-(-each[:-1] // 8) * 8)])
        assert ends.tolist() == (begins + each).tolist()
        assert by_number.tolist() == sources_of(buffer, all_ids, num_experts)


def sources_of(buffer: Any, all_ids: list[Array], num_experts: int) -> list[int]:
    """``psum_num_recv_tokens_per_scaleup_rank``: the ranks of the same number on all nodes count together."""
    num_local_experts = num_experts // buffer.num_ranks
    from_ranks = [np.sum((each // num_local_experts == buffer.rank_idx).any(axis=1)) for each in all_ids]
    by_number = np.reshape(from_ranks, (-1, buffer.num_scaleup_ranks)).sum(axis=0)
    ends: list[int] = np.cumsum(by_number).tolist()
    return ends


def check_elastic_graph(
    buffer: Any,
    *,
    has_threads_beside: bool,
    first: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """A layer in a graph that asks the device how many tokens came, replayed with other routing.

    Args:
        first: around the calls before the capture.
    """
    num_ranks, rank = buffer.num_ranks, buffer.rank_idx
    num_tokens, hidden, num_experts, num_topk = 24, 256, 2 * num_ranks, 2
    rng = np.random.default_rng(11)

    def draw() -> tuple[list[Array], list[Array]]:
        """x and ids of all ranks; an expert is not named twice by a token, and some tokens go nowhere."""
        x = [rng.integers(-9, 10, (num_tokens, hidden)).astype(BF16) for _ in range(num_ranks)]
        ids = [np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :num_topk] for _ in x]
        for each in ids:
            each[rng.random(num_tokens) < rng.random()] = -1
        return x, ids

    given = [tensor(each[rank]) for each in draw()]
    x, ids = given

    def calls() -> Any:
        results = []
        for do_expand in (False, True):
            recv_x, _, _, handle, _ = buffer.dispatch(
                x,
                ids,
                num_experts=num_experts,
                num_max_tokens_per_rank=num_tokens,
                expert_alignment=16,
                do_expand=do_expand,
                do_cpu_sync=False,
            )
            ends = handle.psum_num_recv_tokens_per_scaleup_rank
            last = handle.psum_num_recv_tokens_per_expert
            counts = handle.num_unaligned_recv_tokens_per_expert
            # What lies behind the last received row is anything.
            is_there = torch.arange(len(recv_x)) < ends[-1]
            if do_expand:
                row = torch.arange(len(recv_x)).view(-1, 1)
                is_there = ((row < last) & (row >= last - counts)).any(dim=1)
            y = torch.where(is_there.view(-1, 1), 2 * recv_x, 0)
            results.append((ends, last, counts, buffer.combine(y, handle)[0]))
        return results

    with first or contextlib.nullcontext():
        calls()
    for drawn, results in replays(buffer, calls, draw, given, has_threads_beside=has_threads_beside):
        all_x, all_ids = drawn
        places = all_ids[rank] // 2
        num_copies = np.stack([(places == dst).any(axis=1) for dst in range(num_ranks)]).sum(axis=0)
        num_rows = (all_ids[rank] >= 0).sum(axis=1)
        per_expert = np.array([sum(int((ids == 2 * rank + e).sum()) for ids in all_ids) for e in range(2)])
        rounded = -(-per_expert // 16) * 16
        for number, (ends, last, counts, combined) in enumerate(results):
            assert ends.dtype == torch.int32
            assert ends.tolist() == sources_of(buffer, all_ids, num_experts)
            if number == 0:
                assert last.tolist() == np.cumsum(rounded).tolist()
            else:
                assert last.tolist() == [per_expert[0], rounded[0] + per_expert[1]]
                assert counts.tolist() == per_expert.tolist()
            times = 2 * (num_copies, num_rows)[number].astype(np.float32)
            # Of numbers so small that all sums are exact.
            expected = all_x[rank].astype(np.float32) * times[:, None]
            assert torch.equal(combined, tensor(expected.astype(BF16)))

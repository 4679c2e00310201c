"""Random operations of the CUDA backend beside the oracle; every rank draws the whole case from its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from device_arrays import Array, fetch, overwrite, put
from host_cases import DTYPES, Case, random_bits, random_values, same_bits
from ranks import RANKS_PER_NODE

from ep_rt import Buffer, Config, reference
from ep_rt.cuda.handle import CudaDispatchHandle
from ep_rt.cuda.layout import ReceivedRow
from ep_rt.handle import FlatShape
from ep_rt.planner import Flow, Routes

SUMMED = (ml_dtypes.bfloat16, np.float16, np.float32)


def check_normal(
    buffer: Buffer,
    seed: int,
    *,
    case: Case | None = None,
    num_sms: int = 16,
    framework: str = "cupy",
    pause: Callable[[], None] = lambda: None,
    carry: Callable[[Any], Any] = lambda handle: handle,
    **options: Any,
) -> list[Any]:
    """dispatch, cached dispatch and combine of one random layer; the results, for whoever keeps them.

    Args:
        carry: makes the handle of the later calls from that of the first.
    """
    case = case or Case.draw(seed, buffer.num_ranks)
    rng, rank = case.rng, buffer.rank
    dtype = DTYPES[seed % len(DTYPES)]
    config = Config(num_sms=num_sms)
    x = [random_bits(rng, (count, case.hidden), dtype) for count in case.num_tokens]
    again = [random_bits(rng, (count, case.hidden), dtype) for count in case.num_tokens]
    with_sf, with_weights = seed % 4 != 1, seed % 3 != 1
    sf = [
        random_bits(rng, (count, 1 + seed % 70), (np.float32, np.int32)[seed % 2])
        for count in case.num_tokens
    ]
    ids = [some.astype((np.int64, np.int32)[seed // 2 % 2]) for some in case.topk_idx]
    alignment = int(rng.choice([1, 8, 128]))
    expected = reference.dispatch(
        x,
        ids,
        num_experts=case.num_experts,
        topk_weights=case.topk_weights if with_weights else None,
        sf=sf if with_sf else None,
        expert_alignment=alignment,
    )
    mine = expected[rank]

    def payload(rows: list[Array]) -> Any:
        given = put(rows[rank], framework)
        return (given, put(sf[rank], framework)) if with_sf else given

    pause()
    out = buffer.dispatch(
        payload(x),
        topk_idx=put(ids[rank], framework),
        topk_weights=put(case.topk_weights[rank], framework) if with_weights else None,
        num_experts=case.num_experts,
        expert_alignment=alignment,
        config=config,
        **options,
    )
    out.event.current_stream_wait()
    recv_x, recv_sf = out.recv_x if with_sf else (out.recv_x, None)
    assert same_bits(fetch(recv_x, dtype), mine.recv_x)
    if with_sf:
        assert same_bits(fetch(recv_sf), mine.recv_sf)
    assert same_bits(fetch(out.recv_topk_idx), mine.recv_topk_idx.astype(ids[0].dtype))
    if with_weights:
        assert same_bits(fetch(out.recv_topk_weights), mine.recv_topk_weights)
    else:
        assert out.recv_topk_weights is None
    assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert
    handle = carry(out.handle)
    assert handle.num_recv_tokens == mine.num_recv_tokens
    by_rank = np.bincount(mine.src_rank, minlength=buffer.num_ranks)
    assert handle.num_recv_tokens_per_rank == by_rank.tolist()
    by_expert = np.cumsum(mine.num_recv_tokens_per_expert, dtype=np.int32)
    assert same_bits(fetch(handle.psum_num_recv_tokens_per_expert), by_expert)
    by_number = np.cumsum(by_rank.reshape(-1, RANKS_PER_NODE or buffer.num_ranks).sum(axis=0))
    assert same_bits(fetch(handle.psum_num_recv_tokens_per_local_rank), by_number.astype(np.int32))
    assert not handle.overflow

    pause()
    cached = buffer.dispatch(payload(again), handle=handle, config=config, **options)
    cached.event.current_stream_wait()
    expected_x, expected_sf = reference.dispatch_cached(again, expected, sf if with_sf else None)[rank]
    cached_x, cached_sf = cached.recv_x if with_sf else (cached.recv_x, None)
    assert same_bits(fetch(cached_x, dtype), expected_x)
    assert not with_sf or same_bits(fetch(cached_sf), expected_sf)

    summed = SUMMED[seed % 3]
    y = [random_values(rng, each.recv_x.shape, summed) for each in expected]
    shape = [(count, case.hidden) for count in case.num_tokens]
    biases = [tuple(random_values(rng, each, summed) for _ in range(seed // 3 % 3)) for each in shape]
    weights = [rng.random(each.recv_topk_idx.shape, np.float32) - 0.5 for each in expected]
    combined = reference.combine(
        y,
        expected,
        num_tokens=case.num_tokens,
        topk_weights=weights if with_weights else None,
        bias=[each if len(each) == 2 else each[0] for each in biases] if biases[0] else None,
        ranks_per_node=RANKS_PER_NODE,
    )[rank]
    if seed % 2 and framework == "cupy":
        mine_y = buffer.empty(y[rank].shape, y[rank].dtype)
        overwrite(mine_y, y[rank])
    else:
        mine_y = put(y[rank], framework)
    pause()
    back = buffer.combine(
        mine_y,
        handle,
        topk_weights=put(weights[rank], framework) if with_weights else None,
        bias=tuple(put(each, framework) for each in biases[rank]) or None,
        config=config,
        **options,
    )
    back.event.current_stream_wait()
    assert same_bits(fetch(back.combined_x), combined.x)
    if with_weights:
        assert same_bits(fetch(back.combined_topk_weights), combined.topk_weights)
    return [out, cached, back]


def carried(buffer: Buffer, handle: CudaDispatchHandle) -> Any:
    """The handle from copies of its bytes, which are overwritten where they were."""
    shape = FlatShape(
        handle.shape,
        num_landed_rows=handle.landed.num_landed_rows,
        num_local_experts=handle.landed.num_local_experts,
        expert_alignment=handle.landed.expert_alignment,
        is_exact=handle.known_recv_tokens is not None,
    )
    parts = buffer.flatten_handle(handle, shape, "cupy")
    assert [part.nbytes for part in parts] == list(buffer.flat_layout(shape).num_bytes)
    copies = [put(fetch(part)) for part in parts]
    for part in parts:
        overwrite(part, np.full(part.nbytes, 0xA5, np.uint8))
    return buffer.unflatten_handle(shape, copies)


def check_worst_case(buffer: Buffer, seed: int, *, num_sms: int = 16) -> None:
    """num_worst_tokens, with and without overflow, the cached dispatch and the combine that follow."""
    case = Case.draw(seed, buffer.num_ranks)
    rng, rank = case.rng, buffer.rank
    config = Config(num_sms=num_sms)
    x, again = ([random_values(rng, (n, case.hidden), np.float32) for n in case.num_tokens] for _ in range(2))
    capacity = int(rng.integers(1, 2 * sum(case.num_tokens) + 2))
    expected = reference.dispatch(
        x,
        case.topk_idx,
        num_experts=case.num_experts,
        topk_weights=case.topk_weights,
        num_worst_tokens=capacity,
    )
    out = buffer.dispatch(
        put(x[rank]),
        topk_idx=put(case.topk_idx[rank]),
        topk_weights=put(case.topk_weights[rank]),
        num_experts=case.num_experts,
        num_worst_tokens=capacity,
        config=config,
    )
    mine = expected[rank]
    rows = min(capacity, mine.num_recv_tokens)
    assert out.recv_x.shape == (capacity, case.hidden)
    assert same_bits(fetch(out.recv_x)[:rows], mine.recv_x[:rows])
    assert same_bits(fetch(out.recv_topk_idx), mine.recv_topk_idx)
    assert same_bits(fetch(out.recv_topk_weights), mine.recv_topk_weights)
    assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert
    assert out.handle.overflow == mine.overflow
    assert out.handle.num_recv_tokens == mine.num_recv_tokens

    cached = buffer.dispatch(put(again[rank]), handle=out.handle, num_worst_tokens=capacity, config=config)
    expected_x, _ = reference.dispatch_cached(again, expected)[rank]
    assert same_bits(fetch(cached.recv_x)[:rows], expected_x[:rows])

    y = [random_values(rng, each.recv_x.shape, np.float32) for each in expected]
    combined = reference.combine(y, expected, num_tokens=case.num_tokens, ranks_per_node=RANKS_PER_NODE)
    back = buffer.combine(put(y[rank]), out.handle, config=config)
    assert same_bits(fetch(back.combined_x), combined[rank].x)


def check_quantized(
    buffer: Buffer, seed: int, *, hidden: int, num_tokens: int, num_sms: int = 16, **options: Any
) -> None:
    """quantize="fp8", with NaNs of both kinds, infinities and small numbers among the rows; and cached."""
    case = wide_case(
        seed, buffer.num_ranks, num_tokens=num_tokens, hidden=hidden, num_topk=2, num_local_experts=3
    )
    rng, rank = case.rng, buffer.rank

    def rows() -> list[Array]:
        drawn = []
        for count in case.num_tokens:
            # Mostly numbers of one block's size, so that few of them vanish, and any bits in between.
            x = random_values(rng, (count, hidden), ml_dtypes.bfloat16)
            odd = random_bits(rng, (count, hidden), ml_dtypes.bfloat16)
            mask = rng.random((count, hidden)) < 0.002
            x[mask] = odd[mask]
            if count > 3:
                x[1], x[2, :128] = 0, 1e-6
                x.view(np.uint16)[3, :3] = 0x7F81, 0xFF80, 0x8000  # signalling NaN, -inf, -0.0
            drawn.append(x)
        return drawn

    config = Config(num_sms=num_sms)
    x, again = rows(), rows()
    quantized = [reference.quantize_fp8(each) for each in x]
    q, sf = [list(each) for each in zip(*quantized, strict=True)]
    expected = reference.dispatch(q, case.topk_idx, num_experts=case.num_experts, sf=sf)
    out = buffer.dispatch(
        put(x[rank]),
        topk_idx=put(case.topk_idx[rank]),
        num_experts=case.num_experts,
        quantize="fp8",
        config=config,
        **options,
    )
    assert same_bits(fetch(out.recv_x[0], q[0].dtype), expected[rank].recv_x)
    assert same_bits(fetch(out.recv_x[1]), expected[rank].recv_sf)
    cached = buffer.dispatch(put(again[rank]), handle=out.handle, quantize="fp8", config=config)
    q, sf = [list(each) for each in zip(*map(reference.quantize_fp8, again), strict=True)]
    expected_x, expected_sf = reference.dispatch_cached(q, expected, sf)[rank]
    assert same_bits(fetch(cached.recv_x[0], q[0].dtype), expected_x)
    assert same_bits(fetch(cached.recv_x[1]), expected_sf)


def check_bytes(buffer: Buffer, seed: int, *, quantizes: bool) -> None:
    """Bytes of a dispatch, a repeated one and a combine, as kernels count them, beside the planner's.

    Those over NVLink only where the buffer counts them. tests/emulator/test_bytes.py is the twin.
    """
    hidden, num_topk = 384, 4
    case = wide_case(
        seed, buffer.num_ranks, num_tokens=300, hidden=hidden, num_topk=num_topk, num_local_experts=3
    )
    rank, topology = buffer.rank, buffer.topology
    routes = Routes.of(case.topk_idx, num_experts=case.num_experts, ranks_per_node=topology.num_local_ranks)
    given = ReceivedRow(row_bytes=2 * hidden, sf_bytes=0, idx_bytes=8 * num_topk, weights_bytes=4 * num_topk)
    row = replace(given, row_bytes=hidden, sf_bytes=4 * hidden // 128) if quantizes else given
    quantize = "fp8" if quantizes else None
    seen = buffer.stats

    def compare(network: Flow, nvlink_bytes: Array) -> None:
        nonlocal seen
        before, seen = seen, buffer.stats
        if topology.num_nodes > 1:
            sent = np.subtract(seen.network_bytes_by_node, before.network_bytes_by_node)
            assert sent.tolist() == network.sent_bytes_by_node(topology.num_local_ranks)[rank].tolist()
        else:
            assert seen.network_bytes_by_node == ()
        if seen.nvlink_bytes is not None and before.nvlink_bytes is not None:
            assert seen.nvlink_bytes - before.nvlink_bytes == nvlink_bytes[rank]

    x = put(random_values(case.rng, (case.num_tokens[rank], hidden), ml_dtypes.bfloat16))
    out = buffer.dispatch(
        x,
        topk_idx=put(case.topk_idx[rank]),
        topk_weights=put(case.topk_weights[rank]),
        num_experts=case.num_experts,
        quantize=quantize,
    )
    plan = routes.dispatch(row, given=given)
    compare(plan.network, plan.nvlink.sent_bytes)

    buffer.dispatch(x, handle=out.handle, quantize=quantize)
    plan = routes.dispatch(
        replace(row, idx_bytes=0, weights_bytes=0), given=replace(given, idx_bytes=0, weights_bytes=0)
    )
    compare(plan.network, plan.nvlink.sent_bytes)

    y = put(random_values(case.rng, (out.handle.num_recv_tokens, hidden), ml_dtypes.bfloat16))
    buffer.combine(y, out.handle, topk_weights=out.recv_topk_weights)
    plan = routes.combine(replace(given, idx_bytes=0))
    compare(plan.network, plan.nvlink.received_bytes)


def wide_case(
    seed: int, num_ranks: int, *, num_tokens: int, hidden: int, num_topk: int, num_local_experts: int
) -> Case:
    """As a model has it: distinct experts, rows of many pieces."""
    rng = np.random.default_rng(seed)
    num_experts = num_ranks * num_local_experts
    counts = [max(0, num_tokens - 7 * rank) for rank in range(num_ranks)]
    ids = [
        np.argsort(rng.random((count, num_experts)), axis=1)[:, :num_topk].astype(np.int64)
        for count in counts
    ]
    return Case(
        rng=rng,
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=counts,
        topk_idx=ids,
        topk_weights=[rng.random(some.shape, np.float32) for some in ids],
        hidden=hidden,
    )


def raised(call: Callable[[], Any]) -> Exception | None:
    """What a call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


def check_after_reset(buffer: Buffer) -> None:
    """All ranks reset after a call that was given up, and the buffer, and the device, go on."""
    buffer.group.barrier()
    buffer.reset()
    context_is_alive()
    buffer.group.barrier()
    check_normal(buffer, 2)


def context_is_alive() -> None:
    """Work that has nothing to do with ep_rt still runs. No rank is waiting."""
    stream = cupy.cuda.get_current_stream()
    assert int(cupy.arange(1000).sum()) == 499500
    stream.synchronize()

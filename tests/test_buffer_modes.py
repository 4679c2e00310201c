"""What the host backend offers beside plain calls: layout arguments, frameworks, hooks, masks, events."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_cases import Case, check_low_latency, check_normal, random_values, same_bits

import ep_rt
from ep_rt import Buffer, Config, EventOverlap, Group, reference
from ep_rt.cuda import plan
from ep_rt.groups import thread_groups
from ep_rt.host.memory import HostPool

BF16 = ml_dtypes.bfloat16


def test_layout_arguments_in_deep_ep_order() -> None:
    def run(group: Group) -> None:
        case = Case.draw(5, 4, hidden=16)
        x = np.ones((case.num_tokens[group.rank], 16), np.float32)
        ids = case.topk_idx[group.rank]
        with Buffer(group, backend="host", ranks_per_node=2) as buffer:
            layout = buffer.get_dispatch_layout(ids, case.num_experts)
            expected = reference.dispatch_layout(
                ids, num_experts=case.num_experts, num_ranks=4, ranks_per_node=2
            )
            assert same_bits(layout.num_tokens_per_rank, expected.num_tokens_per_rank)
            assert same_bits(layout.num_tokens_per_rdma_rank, expected.num_tokens_per_node)
            assert same_bits(layout.num_tokens_per_expert, expected.num_tokens_per_expert)
            assert same_bits(layout.is_token_in_rank, expected.is_token_in_rank)
            per_rank, per_node, per_expert, in_rank, event = layout
            computed = buffer.dispatch(x, topk_idx=ids, num_experts=case.num_experts)
            given = buffer.dispatch(
                x,
                None,
                per_rank,
                per_node,
                in_rank,
                per_expert,
                ids,
                previous_event=event,
                config=Buffer.get_dispatch_config(4),
            )
            assert same_bits(given.recv_topk_idx, computed.recv_topk_idx)
            without_ids = buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
            assert without_ids.recv_topk_idx is None
            assert same_bits(without_ids.recv_x, computed.recv_x)
            counts = computed.num_recv_tokens_per_expert_list
            assert without_ids.num_recv_tokens_per_expert_list == counts
            assert counts == given.num_recv_tokens_per_expert_list

    ep_rt.run_local(run, 4, timeout_s=10)


def test_single_node_has_no_layout_per_node() -> None:
    with Buffer(backend="host") as buffer:
        assert buffer.get_dispatch_layout(np.zeros((1, 1), np.int64), 1).num_tokens_per_rdma_rank is None


def test_int32_ids_come_back_as_int32() -> None:
    with Buffer(backend="host") as buffer:
        ids = np.array([[1, -1]], np.int32)
        out = buffer.dispatch(np.ones((1, 4), np.float32), topk_idx=ids, num_experts=2)
        assert same_bits(out.recv_topk_idx, ids)


def test_torch_arrays_come_back_as_torch_arrays() -> None:
    torch = pytest.importorskip("torch")

    def run(group: Group) -> None:
        generator = torch.Generator().manual_seed(group.rank)
        x = torch.randn((6, 128), generator=generator).to(torch.bfloat16)
        ids = torch.randint(0, 4, (6, 2), generator=generator)
        weights = torch.rand((6, 2), generator=generator)
        with Buffer(group, backend="host") as buffer:
            out = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, num_experts=4)
            assert out.recv_x.dtype == torch.bfloat16
            assert out.recv_topk_idx.dtype == torch.int64
            assert out.recv_topk_weights.dtype == torch.float32
            quantised = x.to(torch.float8_e4m3fn), torch.rand((1, 6)).T
            recv_x, recv_sf = buffer.dispatch(quantised, handle=out.handle).recv_x
            assert (recv_x.dtype, recv_sf.dtype) == (torch.float8_e4m3fn, torch.float32)
            back = buffer.combine(out.recv_x, out.handle)
            num_ranks = buffer.get_dispatch_layout(ids, 4).is_token_in_rank.sum(dim=1, keepdim=True)
            assert torch.equal(back.combined_x, x * num_ranks)
            low = buffer.low_latency_dispatch(x, ids, 8, 4, return_recv_hook=True)
            assert low.hook is not None
            low.hook()
            rows, scales = low.recv_x
            assert (rows.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert scales.stride(1) == 1
            y = torch.ones(rows.shape, dtype=torch.bfloat16)
            buffer.get_next_low_latency_combine_buffer(low.handle).copy_(y)
            sums = buffer.low_latency_combine(
                y, ids, weights, low.handle, zero_copy=True, reduce="source"
            ).combined_x
            assert torch.equal(sums[:, :1], weights.sum(dim=1, keepdim=True).to(torch.bfloat16))

    ep_rt.run_local(run, 2, timeout_s=20)


def test_torch_arrays_in_expert_major_layout() -> None:
    torch = pytest.importorskip("torch")

    def run(group: Group) -> None:
        generator = torch.Generator().manual_seed(group.rank)
        x = torch.randn((6, 128), generator=generator).to(torch.bfloat16)
        ids = torch.randint(0, 4, (6, 2), generator=generator)
        weights = torch.rand((6, 2), generator=generator)
        with Buffer(group, backend="host") as buffer:
            out = buffer.dispatch(
                x,
                topk_idx=ids,
                topk_weights=weights,
                num_experts=4,
                expert_alignment=8,
                layout="expert",
                quantize="fp8",
            )
            rows, scales = out.recv_x
            assert (rows.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert out.recv_topk_weights.shape == (len(rows),)
            ends = out.handle.psum_num_tokens_per_expert
            assert ends.dtype == torch.int32
            y = torch.zeros((len(rows), 128), dtype=torch.bfloat16)
            begin = 0
            for end, length in zip(ends.tolist(), out.num_recv_tokens_per_expert_list, strict=True):
                y[begin:end] = 1
                begin += length
            back = buffer.combine(y, out.handle, topk_weights=torch.ones(len(rows)))
            assert torch.equal(back.combined_x, torch.full((6, 128), 2, dtype=torch.bfloat16))

    ep_rt.run_local(run, 2, timeout_s=20)


@pytest.mark.parametrize("capacity", [0, 7])
def test_rows_quantised_before_they_travel(capacity: int) -> None:
    def run(group: Group) -> None:
        case = Case.draw(6, 4, hidden=256)
        x, again = (
            [random_values(case.rng, (count, 256), BF16) for count in case.num_tokens] for _ in range(2)
        )
        me = group.rank
        with Buffer(group, backend="host") as buffer:
            options: dict[str, Any] = {
                "topk_idx": case.topk_idx[me],
                "topk_weights": case.topk_weights[me],
                "num_experts": case.num_experts,
                "num_worst_tokens": capacity,
            }
            out = buffer.dispatch(x[me], **options, quantize="fp8")
            other = buffer.dispatch(reference.quantize_fp8(x[me]), **options)
            rows = min(capacity or out.handle.num_recv_tokens, out.handle.num_recv_tokens)
            for got, expected in zip(out.recv_x, other.recv_x, strict=True):
                assert same_bits(got[:rows], expected[:rows])
            assert same_bits(out.recv_topk_idx, other.recv_topk_idx)
            assert same_bits(out.recv_topk_weights, other.recv_topk_weights)
            cached = buffer.dispatch(again[me], handle=other.handle, quantize="fp8")
            cached_other = buffer.dispatch(reference.quantize_fp8(again[me]), handle=out.handle)
            for got, expected in zip(cached.recv_x, cached_other.recv_x, strict=True):
                assert same_bits(got[:rows], expected[:rows])

    ep_rt.run_local(run, 4, timeout_s=20)


def test_expert_major_layout_of_no_tokens() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            for num_tokens, num_worst_tokens in ((0, 0), (5, 0), (0, 4), (5, 4)):
                x = np.ones((num_tokens, 4), np.float32)
                ids = np.full((num_tokens, 3), -1, np.int64)
                out = buffer.dispatch(
                    x,
                    topk_idx=ids,
                    num_experts=4,
                    expert_alignment=128,
                    num_worst_tokens=num_worst_tokens,
                    layout="expert",
                    zero_padding=True,
                )
                assert same_bits(out.recv_x, np.zeros((num_worst_tokens, 4), np.float32))
                assert out.num_recv_tokens_per_expert_list == [0, 0]
                assert out.handle.psum_num_tokens_per_expert.tolist() == [0, 0]
                assert not out.handle.overflow
                back = buffer.combine(np.full_like(out.recv_x, np.nan), out.handle)
                assert same_bits(back.combined_x, np.zeros((num_tokens, 4), np.float32))

    ep_rt.run_local(run, 2, timeout_s=10)


def test_jax_arrays_come_back_as_jax_arrays() -> None:
    jnp = pytest.importorskip("jax.numpy")

    def run(group: Group) -> None:
        x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128).astype(jnp.bfloat16)
        ids = jnp.arange(16).reshape(8, 2) % 4
        with Buffer(group, backend="host") as buffer:
            out = buffer.dispatch(x, topk_idx=ids, num_experts=4)
            assert out.recv_x.dtype == jnp.bfloat16
            assert out.recv_topk_idx.dtype == ids.dtype
            assert jnp.array_equal(buffer.combine(out.recv_x, out.handle).combined_x, x)
            low = buffer.low_latency_dispatch(x, ids, 8, 4)
            assert low.recv_x[0].dtype == jnp.float8_e4m3fn
            with pytest.raises(ep_rt.ConfigError, match="immutable"):
                buffer.low_latency_dispatch(x, ids, 8, 4, return_recv_hook=True)

    ep_rt.run_local(run, 2, timeout_s=20)


def test_hooks_of_two_batches_complete_in_any_order() -> None:
    """Two-batch overlap: sends of both are out before either is received, ranks in different order."""

    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            ids = [np.full((3, 1), (group.rank + shift) % 2, np.int64) for shift in range(2)]
            x = [np.full((3, 8), 10 * group.rank + batch, BF16) for batch in range(2)]
            outs = [
                buffer.low_latency_dispatch(x[b], ids[b], 4, 2, use_fp8=False, return_recv_hook=True)
                for b in range(2)
            ]
            for batch in (0, 1) if group.rank else (1, 0):
                hook = outs[batch].hook
                assert hook is not None
                hook()
            for batch, out in enumerate(outs):
                src = group.rank if batch == 0 else 1 - group.rank
                assert out.recv_count.tolist() == [3]
                assert (out.recv_x[0, :3] == np.full((3, 8), 10 * src + batch, BF16)).all()

    ep_rt.run_local(run, 2, timeout_s=10)


def test_hook_needs_the_peers_call_but_not_their_hook() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host", timeout_s=5) as buffer:
            ids = np.full((1, 1), 1 - group.rank, np.int64)
            x = np.full((1, 8), group.rank, BF16)
            out = buffer.low_latency_dispatch(x, ids, 1, 2, use_fp8=False, return_recv_hook=True)
            assert out.hook is not None
            if group.rank == 0:
                out.hook()
                assert out.recv_x[0, 0, 0] == 1
            group.barrier()
            if group.rank == 1:
                out.hook()
                assert out.recv_x[0, 0, 0] == 0

    ep_rt.run_local(run, 2, timeout_s=10)


def test_a_hook_receives_once() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host", timeout_s=5) as buffer:
            ids, stats = np.full((1, 1), 1 - group.rank, np.int64), np.zeros(1, np.int32)
            x, weights = np.full((1, 8), 1 + group.rank, BF16), np.ones((1, 1), np.float32)
            sent = buffer.low_latency_dispatch(
                x, ids, 1, 2, stats, use_fp8=False, topk_weights=weights, return_recv_hook=True
            )
            assert sent.hook is not None
            sent.hook()
            back = buffer.low_latency_combine(sent.recv_x, ids, weights, sent.handle, return_recv_hook=True)
            assert back.hook is not None
            back.hook()
            combined_x = back.combined_x.copy()
            sent.recv_x[...], back.combined_x[...] = 7, 7
            sent.hook()
            back.hook()
            assert stats == 1
            assert (sent.recv_x == 7).all()
            assert (back.combined_x == 7).all()
            assert (combined_x == x).all()

    ep_rt.run_local(run, 2, timeout_s=10)


def test_hook_that_is_never_called_does_not_hold_the_peers() -> None:
    def run(group: Group) -> None:
        began = time.monotonic()
        with Buffer(group, backend="host", timeout_s=5) as buffer:
            ids = np.full((64, 1), 1 - group.rank, np.int64)
            x = np.full((64, 1024), group.rank, BF16)
            out = buffer.low_latency_dispatch(x, ids, 64, 2, use_fp8=False, return_recv_hook=True)
            if group.rank == 0:
                assert out.hook is not None
                out.hook()
            group.barrier()
        assert time.monotonic() - began < 2

    ep_rt.run_local(run, 2, timeout_s=10)


def test_masked_rank_is_left_out_and_comes_back() -> None:
    def run(group: Group) -> None:
        status = np.full(3, 7, np.int32)
        with Buffer(group, backend="host", enable_shrink=True, timeout_s=5) as buffer:
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 0, 0]
            if group.rank != 2:
                buffer.low_latency_update_mask_buffer(2, True)
                buffer.low_latency_query_mask_buffer(status)
                assert status.tolist() == [0, 0, 1]
                shrunk_round(buffer, lost=2)
                buffer.low_latency_clean_mask_buffer()
            else:  # lives in other rounds meanwhile: it must not disturb, and must catch up
                for lost in (0, 1):
                    buffer.low_latency_update_mask_buffer(lost, True)
                shrunk_round(buffer, lost=None, alone=True)
                buffer.low_latency_clean_mask_buffer()
            check_low_latency(buffer, 8)
            check_low_latency(buffer, 9)
            check_normal(buffer, 9)
            with pytest.raises(ep_rt.ConfigError, match="rank_to_mask=3"):
                buffer.low_latency_update_mask_buffer(3, True)

    ep_rt.run_local(run, 3, timeout_s=10)


def shrunk_round(buffer: Buffer, *, lost: int | None, alone: bool = False) -> None:
    """One dispatch and combine in which the tokens and experts of `lost` (or of all others) are missing."""
    here = [buffer.rank] if alone else [rank for rank in range(buffer.num_ranks) if rank != lost]
    case = Case.draw(11, buffer.num_ranks, hidden=128)
    num_local_experts = case.num_experts // case.num_ranks
    ids = [
        np.where(np.isin(some // num_local_experts, here) & (rank in here), some, -1)
        for rank, some in enumerate(case.topk_idx)
    ]
    x = [random_values(case.rng, (len(some), case.hidden), BF16) for some in ids]
    capacity = max(some.size for some in ids)
    options: dict[str, Any] = {
        "num_max_dispatch_tokens_per_rank": capacity,
        "num_experts": case.num_experts,
    }
    expected = reference.low_latency_dispatch(x, ids, use_fp8=False, **options)
    y = [random_values(case.rng, each.recv_x.shape, BF16) for each in expected]
    reduce = ("rank", "source")[int(alone)]
    combined = reference.low_latency_combine(y, expected, ids, case.topk_weights, reduce=reduce)
    me = buffer.rank
    out = buffer.low_latency_dispatch(x[me], case.topk_idx[me], use_fp8=False, **options)
    assert same_bits(out.recv_count, expected[me].recv_count)
    assert same_bits(out.handle.layout_range, expected[me].layout_range)
    back = buffer.low_latency_combine(
        y[me], case.topk_idx[me], case.topk_weights[me], out.handle, reduce=reduce
    )
    assert same_bits(back.combined_x, combined[me])


@pytest.mark.parametrize("lost", [0, 2])
def test_rank_that_dies_is_masked_and_the_others_go_on(lost: int) -> None:
    groups = thread_groups(3)
    failures: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            buffer = Buffer(group, backend="host", enable_shrink=True, timeout_s=2.0)
            check_low_latency(buffer, 2)
            if group.rank == lost:
                return
            time.sleep(0.3 * group.rank)
            began = time.monotonic()
            shrunk_round(buffer, lost=lost)
            assert time.monotonic() - began < 4.5
            began = time.monotonic()
            shrunk_round(buffer, lost=lost)  # masked now: nobody waits any more
            assert time.monotonic() - began < 1.8
            status = np.zeros(3, np.int32)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [int(rank == lost) for rank in range(3)]
            began = time.monotonic()
            buffer.close()
            assert time.monotonic() - began < 1.8
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures, failures


def test_rank_that_missed_calls_is_taken_back_by_reset() -> None:
    """It makes none while the others lose it, from their first call on, and catches up with nothing."""
    lost, met = 1, threading.Barrier(3)

    def run(group: Group) -> None:
        with Buffer(group, backend="host", enable_shrink=True, timeout_s=2) as buffer:
            for turn in range(2):
                if group.rank != lost:
                    for _ in range(1 + turn):
                        shrunk_round(buffer, lost=lost)
                met.wait(20)
                buffer.reset()
                buffer.low_latency_clean_mask_buffer()
                check_low_latency(buffer, 10 + turn)
                check_normal(buffer, 12 + turn)

    ep_rt.run_local(run, 3, timeout_s=10)


def test_reset_names_ranks_that_do_not_come() -> None:
    met = threading.Barrier(2)

    def run(group: Group) -> None:
        with Buffer(group, backend="host", enable_shrink=True, timeout_s=2) as buffer:
            if group.rank == 0:
                with pytest.raises(ep_rt.PeerTimeoutError, match="rank 1 did not arrive in reset"):
                    buffer.reset()
            met.wait(10)
            buffer.reset()
            check_normal(buffer, 14)

    ep_rt.run_local(run, 2, timeout_s=10)


def test_reset_and_another_call_are_told_apart() -> None:
    def run(group: Group) -> float:
        began = time.monotonic()
        x, ids = np.ones((1, 4), np.float32), np.zeros((1, 1), np.int64)
        with (
            pytest.raises(ep_rt.CollectiveMismatchError),
            Buffer(group, backend="host", enable_shrink=True, timeout_s=20) as buffer,
        ):
            buffer.reset() if group.rank == 0 else buffer.dispatch(x, topk_idx=ids, num_experts=2)
        return time.monotonic() - began

    assert max(ep_rt.run_local(run, 2, timeout_s=30)) < 10


def test_masks_need_enable_shrink() -> None:
    with Buffer(backend="host") as buffer, pytest.raises(ep_rt.ConfigError, match="enable_shrink"):
        buffer.low_latency_clean_mask_buffer()


def test_events_are_complete_and_chain() -> None:
    with Buffer(backend="host") as buffer:
        x, ids = np.ones((1, 4), np.float32), np.zeros((1, 1), np.int64)
        out = buffer.dispatch(
            x,
            topk_idx=ids,
            num_experts=1,
            previous_event=Buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        assert out.event.query()
        with out.event as event:
            assert isinstance(event, EventOverlap)
        assert buffer.combine(x, out.handle, previous_event=out.event).event.query()
        buffer.clean_low_latency_buffer(1, 128, 1)
        for call in (buffer.get_comm_stream, lambda: buffer.get_local_buffer_tensor("uint8")):
            with pytest.raises(ep_rt.BackendError, match="host backend"):
                call()


def test_previous_event_is_waited_for() -> None:
    class Slow:
        waited = False

        def wait(self, stream: Any) -> None: ...

        def synchronize(self) -> None:
            self.waited = True

        def query(self) -> bool:
            return False

    slow = Slow()
    with Buffer(backend="host") as buffer:
        buffer.dispatch(
            np.ones((1, 4), np.float32),
            topk_idx=np.zeros((1, 1), np.int64),
            num_experts=1,
            previous_event=EventOverlap(slow),
        )
    assert slow.waited


def test_config_and_size_hints() -> None:
    assert Config(24, 8, 512) == Config(
        num_sms=24, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=512
    )
    with pytest.raises(ep_rt.ConfigError, match="num_sms=0"):
        Config(0)
    config = Buffer.get_combine_config(6)
    assert config.get_nvl_buffer_size_hint(14336, 8) >= 8 * 256 * 14336
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    usual = plan.rings(2, 0, plan.record_bytes(0, 0))
    assert config.get_rdma_buffer_size_hint(14336, 16) == 2 * usual.num_bytes(2)
    # A node may be a single GPU.
    for num_ranks in range(9, 33):
        hint = config.get_rdma_buffer_size_hint(14336, num_ranks)
        for num_nodes in range(2, num_ranks + 1):
            rings = plan.rings(num_nodes, hint, plan.record_bytes(0, 0))
            assert 2 * rings.num_bytes(num_nodes) <= hint
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert 4 * 8 * 128 * 14336 < hint < 64 << 20
    before = Buffer.num_sms
    Buffer.set_num_sms(12)
    try:
        assert Buffer.get_dispatch_config(8).num_sms == 12
    finally:
        Buffer.set_num_sms(before)


def test_pool_reuses_memory_only_when_nobody_holds_it() -> None:
    pool = HostPool()
    first = pool.empty((1000, 100), np.float32)
    address = first.ctypes.data
    assert address % 128 == 0
    part = first[10:20].view(np.uint8)
    del first
    gc.collect()
    other = pool.empty((1000, 100), np.float32)
    assert other.ctypes.data != address
    del part
    gc.collect()
    again = pool.empty((900, 100), np.float32)
    assert again.ctypes.data == address


def test_results_are_not_overwritten_by_later_calls() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            ids = np.zeros((64, 1), np.int64)
            kept = []
            for number in range(4):
                x = np.full((64, 1024), 100 * number + group.rank, np.float32)
                out = buffer.dispatch(x, topk_idx=ids, num_experts=2)
                back = buffer.combine(out.recv_x, out.handle)
                kept.append((number, out.recv_x, back.combined_x))
                x[:] = -1  # the caller's memory is its own again
            for number, recv_x, combined_x in kept:
                assert (combined_x == 100 * number + group.rank).all()
                if group.rank == 0:
                    assert (recv_x == 100 * number + np.repeat([0, 1], 64)[:, None]).all()

    ep_rt.run_local(run, 2, timeout_s=10)

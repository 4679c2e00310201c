"""Low-latency mode on GPUs: against the oracle, split, captured, masked, and under faults.

With ``EP_RT_RANKS_PER_NODE`` under mpirun all calls go through NVSHMEM's memory, and with
``EP_RT_TEST_LOW_LATENCY=puts`` by its puts alone.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import pytest
from host_cases import low_latency_combine_options, random_values, same_bits
from ranks import (
    LOW_LATENCY_OVER_NETWORK,
    PLACES,
    WITH_PUTS_ALONE,
    device_count,
    num_ranks_of,
    run_ranks,
)

import ep_rt
from ep_rt import Buffer, Group, as_group, reference
from ep_rt.cuda import low_latency_plan as plan
from ep_rt.cuda.launch import Launch
from ep_rt.cuda.layout import MAX_LOCAL_EXPERTS, MAX_LOCAL_RANKS
from ep_rt.cuda.plan import LOW_LATENCY_BLOCKS_PER_SM
from ep_rt.exchange import PeerGroup

if device_count():
    import cupy
    from device_arrays import Mismatches, copy, cuda_buffer, fetch, overwrite, poison, put
    from low_latency_cases import (
        ChangingTokens,
        NegatingExperts,
        check_low_latency,
        check_received,
        expert_outputs,
        rows_in_use,
        same_but_for_nan,
    )
    from normal_cases import check_normal, context_is_alive, wide_case
    from occupants import Filler, Holder

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("place", PLACES)]

T = TypeVar("T")
BF16 = np.dtype(ml_dtypes.bfloat16)
SLAB_BYTES = 512 << 20
SHORT_S = 2.0
NUM_ROUNDS = 200
NUM_SMALL_ROUNDS = 10_000
NUM_REPLAYS = 3000


def run(place: str, body: Callable[[Group], T], *, num_virtual_ranks: int = 4) -> list[T]:
    return run_ranks(place, body, num_virtual_ranks=num_virtual_ranks)


def low_latency_buffer(group: Group, **options: Any) -> Any:
    given = {
        "low_latency_mode": True,
        "num_nvl_bytes": SLAB_BYTES,
        "allow_nvlink_for_low_latency_mode": not WITH_PUTS_ALONE,
    }
    return cuda_buffer(group, **{**given, **options})


def again_and_again(call: Callable[[], Any]) -> None:
    """Until it raises what an earlier one has met."""
    for _ in range(1000):
        call()
        time.sleep(0.01)


@pytest.mark.parametrize("hook", [False, True])
def test_random_layers_equal_the_oracle(place: str, hook: bool) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            poison(buffer, 0xA5)
            for seed in range(32):
                check_low_latency(buffer, seed, hook=hook, async_finish=not hook and seed % 3 == 0)

    run(place, body)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 6, 7, 8])
def test_any_number_of_ranks(place: str, num_ranks: int) -> None:
    if place != "virtual":
        pytest.skip("as many ranks as GPUs")

    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            for seed in range(6):
                check_low_latency(buffer, seed)

    run_ranks(place, body, num_virtual_ranks=num_ranks)


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_topk", "num_local_experts"),
    [
        (128, 7168, 8, 8),
        (8, 7168, 8, 8),
        (33, 4096, 4, 3),
        (200, 136, 5, 4),
        (1000, 64, 8, 4),
        (20, 8, 2, 1),
        (17, 1832, 64, 64),
    ],
)
def test_shapes_of_models(
    place: str, num_tokens: int, hidden: int, num_topk: int, num_local_experts: int
) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group, num_nvl_bytes=1 << 30) as buffer:
            for seed in range(4):
                case = wide_case(
                    seed,
                    group.size,
                    num_tokens=num_tokens,
                    hidden=hidden,
                    num_topk=min(num_topk, group.size * num_local_experts),
                    num_local_experts=num_local_experts,
                )
                check_low_latency(buffer, seed, case=case)

    run(place, body, num_virtual_ranks=2)


def test_room_for_far_more_tokens_than_there_are(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            for seed in range(8):
                case = wide_case(seed, group.size, num_tokens=9, hidden=256, num_topk=2, num_local_experts=2)
                check_low_latency(buffer, seed, case=case, num_max_tokens=1024, hook=seed > 3)

    run(place, body)


@pytest.mark.parametrize("framework", ["torch"])
def test_other_frameworks(place: str, framework: str) -> None:
    torch = pytest.importorskip(framework)
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")

    def body(group: Group) -> None:
        torch.cuda.set_device(cupy.cuda.runtime.getDevice())
        with torch.cuda.stream(torch.cuda.Stream()), low_latency_buffer(group) as buffer:
            for seed in range(8):
                check_low_latency(buffer, seed, framework=framework, hook=seed % 2 == 1)

    run(place, body)


def test_many_rounds_with_sleeps_mixed_with_the_normal_mode(place: str) -> None:
    def body(group: Group) -> None:
        sleeps = random.Random(group.rank)

        def pause() -> None:
            if sleeps.random() < 0.1:
                time.sleep(sleeps.random() * 2e-3)

        with low_latency_buffer(group) as buffer:
            for seed in range(NUM_ROUNDS):
                check_low_latency(buffer, seed % 50, hook=seed % 3 == 0, pause=pause)
                if seed % 7 == 0:
                    check_normal(buffer, seed, pause=pause)

    run(place, body)


def test_ten_thousand_rounds(place: str) -> None:
    """Small calls of all kinds, one after another; every word of every result is compared on the device."""
    num_topk, hidden, num_max = 3, 256, 8

    def body(group: Group) -> None:
        rank, num_experts = group.rank, 3 * group.size
        errors = Mismatches()
        rounds = []
        for seed in range(16):
            rng = np.random.default_rng(seed)
            counts = rng.integers(0, num_max + 1, group.size)
            x = [random_values(rng, (int(n), hidden), BF16) for n in counts]
            ids = [rng.integers(-1, num_experts, (int(n), num_topk)) for n in counts]
            weights = [rng.random(some.shape, np.float32) for some in ids]
            use_fp8, is_packed = seed % 2 == 1, seed // 2 % 2 == 0
            options: dict[str, Any] = {
                "num_max_dispatch_tokens_per_rank": num_topk * num_max,
                "num_experts": num_experts,
                "use_fp8": use_fp8,
                "round_scale": use_fp8 and seed // 4 > 1,
                "use_ue8m0": use_fp8 and seed // 4 > 2,
                "layout": "expert" if is_packed else "rank",
            }
            dispatched = reference.low_latency_dispatch(x, ids, **options)
            mine = dispatched[rank]
            back_options = low_latency_combine_options(rng, over_network=LOW_LATENCY_OVER_NETWORK)
            y = [expert_outputs(rng, (*mine.src_info.shape, hidden)) for _ in dispatched]
            combined = reference.low_latency_combine(y, dispatched, ids, weights, **back_options)[rank]
            rows, sf = rows_in_use(mine), mine.sf
            sf_rows = rows
            if sf is not None and is_packed:  # column-major, so by words
                sf = sf.swapaxes(1, 2)
                sf_rows = np.repeat(rows[:, None], sf.shape[1], axis=1)
            here = [put(each[rank]) for each in (x, ids, weights, y)]
            expected = {
                "recv_x": mine.recv_x.view(np.uint8),
                "sf": sf,
                "recv_count": mine.recv_count,
                "src_info": mine.src_info,
                "layout_range": mine.layout_range,
                "expert_rows": mine.expert_rows,
                "combined_x": combined,
                "rows": rows.astype(np.uint8),
                "sf_rows": sf_rows.astype(np.uint8),
            }
            on_device = {name: put(each) for name, each in expected.items() if each is not None}
            rounds.append((options, back_options, here, on_device))
        with low_latency_buffer(group) as buffer:
            for number in range(NUM_SMALL_ROUNDS):
                options, back_options, (x_, ids_, weights_, y_), there = rounds[number % 16]
                hook = number % 5 == 0
                out = buffer.low_latency_dispatch(
                    x_, ids_, topk_weights=weights_ if number % 3 else None, return_recv_hook=hook, **options
                )
                if hook:
                    out.hook()
                recv_x, recv_sf = out.recv_x if options["use_fp8"] else (out.recv_x, None)
                handle, is_packed = out.handle, options["layout"] == "expert"
                errors.add(recv_x, there["recv_x"], there["rows"])
                if recv_sf is not None:
                    recv_sf = recv_sf.swapaxes(1, 2) if is_packed else recv_sf
                    errors.add(recv_sf, there["sf"], there["sf_rows"])
                errors.add(out.recv_count, there["recv_count"])
                errors.add(handle.src_info, there["src_info"])
                errors.add(handle.layout_range, there["layout_range"])
                assert (handle.expert_rows is None) == is_packed
                if not is_packed:
                    errors.add(handle.expert_rows, there["expert_rows"])
                back = buffer.low_latency_combine(y_, ids_, weights_, handle, **back_options)
                if ids_.shape[0]:
                    errors.add(back.combined_x, there["combined_x"])
                if number % 1000 == 999:
                    assert errors.total() == 0

    run(place, body)


def test_garbage_is_collected_while_peers_wait(place: str) -> None:
    """What a buffer leaves must not go back to the driver then: it would wait for the peers' kernels."""

    def body(group: Group) -> None:
        with low_latency_buffer(group) as old:
            check_low_latency(old, 0)
            held: list[Any] = [old, check_normal(old, 0)]
        held.append(held)  # only garbage collection finds it
        del old, held
        with low_latency_buffer(group, timeout_s=5.0) as buffer:
            for seed in range(8):
                group.barrier()
                if seed % group.size == group.rank:
                    time.sleep(0.1)
                    gc.collect()
                check_low_latency(buffer, seed)
            group.barrier()

    gc.collect()
    gc.disable()
    try:
        run(place, body)
    finally:
        gc.enable()


def test_no_sm_is_held_between_send_and_hook(place: str) -> None:
    """Once all have sent, and none has received, a kernel gets every SM with all its shared memory."""

    def body(group: Group) -> None:
        filler = Filler()
        with low_latency_buffer(group) as buffer:

            def fill() -> None:
                cupy.cuda.get_current_stream().synchronize()
                for turn in range(group.size):  # ranks may share the GPU
                    group.barrier()
                    assert turn != group.rank or filler.fills()
                group.barrier()

            for seed in range(4):
                check_low_latency(buffer, seed, hook=True, between=fill)

    run(place, body)


def test_calls_keep_to_the_sms_that_they_may_take(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call has more blocks than fit there, and calls come and go while another kernel holds the others."""
    num_tokens, num_topk, num_local_experts = 128, 4, 4
    most_blocks: dict[int, int] = {}  # by thread
    enqueue = Launch.__call__

    def counted(launch: Launch, stream: int, num_blocks: int | None = None) -> None:
        thread = threading.get_ident()
        most_blocks[thread] = max(most_blocks.get(thread, 0), num_blocks or launch.max_blocks)
        enqueue(launch, stream, num_blocks)

    monkeypatch.setattr(Launch, "__call__", counted)

    def body(group: Group) -> None:
        rng = np.random.default_rng(group.rank)
        x = put(random_values(rng, (num_tokens, 7168), "bfloat16"))
        ids = put(rng.integers(0, num_local_experts * group.size, (num_tokens, num_topk)))
        weights = put(rng.random((num_tokens, num_topk), np.float32))
        stream, device = cupy.cuda.get_current_stream(), cupy.cuda.Device()
        gpus = group.allgather(device.pci_bus_id)
        num_sms = group.size + 8
        num_others = int(device.attributes["MultiProcessorCount"]) - num_sms * gpus.count(device.pci_bus_id)
        holder = Holder(num_others) if gpus.index(device.pci_bus_id) == group.rank else None

        def layer(buffer: Buffer) -> tuple[int, Any]:
            """The most blocks of a call, and sums."""
            most_blocks[threading.get_ident()] = 0
            sizes = num_tokens, num_local_experts * group.size
            buffer.low_latency_dispatch(x, ids, *sizes, use_fp8=True)
            out = buffer.low_latency_dispatch(x, ids, *sizes, use_fp8=False)
            combined = buffer.low_latency_combine(out.recv_x, ids, weights, out.handle).combined_x
            stream.synchronize()
            group.barrier()
            return most_blocks[threading.get_ident()], combined

        with low_latency_buffer(group) as buffer:
            num_blocks, expected = layer(buffer)
            assert num_blocks > LOW_LATENCY_BLOCKS_PER_SM * num_sms
        with low_latency_buffer(group, num_low_latency_sms=num_sms) as buffer:
            layer(buffer)
            if holder is not None:
                holder.start()
            group.barrier()
            num_blocks, beside = layer(buffer)
            assert holder is None or holder.is_holding()
            assert num_blocks <= LOW_LATENCY_BLOCKS_PER_SM * num_sms
            group.barrier()
            if holder is not None:
                holder.wait()
            assert same_bits(fetch(beside, BF16), fetch(expected, BF16))
            for seed in range(8):
                check_low_latency(buffer, seed)

    run(place, body)


def test_hooks_on_another_stream(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            stream = cupy.cuda.Stream(non_blocking=True)
            for seed in range(16):
                check_low_latency(buffer, seed, hook=True, hook_stream=stream)

    run(place, body)


def test_two_batches_overlap(place: str) -> None:
    """Sends of both are out before either is received; ranks take their hooks in different order."""

    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            for number in range(50):
                ids = [
                    np.full((3, 1), (group.rank + shift + number) % group.size, np.int64)
                    for shift in range(2)
                ]
                x = [np.full((3, 8), 10 * group.rank + batch + number, BF16) for batch in range(2)]
                outs = [
                    buffer.low_latency_dispatch(
                        put(x[b]), put(ids[b]), 4, group.size, use_fp8=False, return_recv_hook=True
                    )
                    for b in range(2)
                ]
                for batch in (0, 1) if group.rank % 2 else (1, 0):
                    outs[batch].hook()
                for batch, out in enumerate(outs):
                    src = (group.rank - batch - number) % group.size
                    assert fetch(out.recv_count).tolist() == [3]
                    assert same_bits(
                        fetch(out.recv_x)[0, :3], np.full((3, 8), 10 * src + batch + number, BF16)
                    )

    run(place, body)


def test_a_third_call_takes_the_place_of_a_forgotten_hook(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            given = put(np.ones((1, 8), BF16)), put(np.zeros((1, 1), np.int64)), 1, group.size

            def send() -> Any:
                return buffer.low_latency_dispatch(*given, use_fp8=False, return_recv_hook=True)

            outs = [send(), send()]
            if LOW_LATENCY_OVER_NETWORK:
                with pytest.raises(ep_rt.HandleError, match="after the hook of the first"):
                    send()
                outs[0].hook()
                outs.append(send())
            else:
                outs.append(send())
                with pytest.raises(ep_rt.HandleError, match="too late"):
                    outs[0].hook()
            with pytest.raises(ep_rt.ConfigError, match="hook"):
                buffer.low_latency_combine(
                    put(np.ones((1, group.size, 8), BF16)),
                    given[1],
                    put(np.ones((1, 1), np.float32)),
                    outs[1].handle,
                )
            outs[1].hook()
            outs[2].hook()
            outs[2].hook()  # which does nothing
            check_low_latency(buffer, 0)

    run(place, body)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_graph_of_pairs_with_changing_contents(place: str, layout: str, num_pairs: int) -> None:
    """Captured once, replayed thousands of times, with tokens of its own each time; the experts answer what
    they got. Every so often all of the last replay is compared."""

    def body(group: Group) -> None:
        rank, num_tokens, hidden, num_topk = group.rank, 24, 512, 4
        num_experts, num_rows = 4 * group.size, group.size * num_tokens
        rng = np.random.default_rng(3)
        tokens, experts = ChangingTokens(num_tokens, hidden), NegatingExperts(4, num_rows, hidden)
        ids = put(np.full((num_tokens, num_topk), -1, np.int64))
        weights = put(np.zeros((num_tokens, num_topk), np.float32))
        shape = (4, num_rows, hidden) if layout == "expert" else (group.size, num_tokens, hidden)
        with low_latency_buffer(group) as buffer:

            def pair(seen: Any) -> Any:
                tokens.change()
                out = buffer.low_latency_dispatch(
                    tokens.x,
                    ids,
                    num_tokens,
                    num_experts,
                    use_fp8=False,
                    layout=layout,
                    topk_weights=weights,
                )
                copy(seen, out.recv_x)  # before the combine: where rows landed they are valid until then
                experts.answer(out)
                return seen, out, buffer.low_latency_combine(experts.y, ids, weights, out.handle)

            kept_rows = [put(np.zeros(shape, BF16)) for _ in range(num_pairs)]
            pair(kept_rows[0])
            stream = cupy.cuda.get_current_stream()
            stream.synchronize()
            group.barrier()
            stream.begin_capture()
            kept = [pair(seen) for seen in kept_rows]
            graph = stream.end_capture()
            for number in range(NUM_REPLAYS):
                if number % 100 == 0:
                    all_x = [random_values(rng, (num_tokens, hidden), BF16) for _ in range(group.size)]
                    all_ids = [
                        np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :num_topk]
                        for _ in range(group.size)
                    ]
                    all_weights = [rng.random((num_tokens, num_topk), np.float32) for _ in range(group.size)]
                    tokens.restart(all_x[rank])
                    for array, values in ((ids, all_ids), (weights, all_weights)):
                        overwrite(array, values[rank])
                graph.launch(stream)
                if number % 100 == 99:
                    for turn, (seen, out, back) in enumerate(kept):
                        x = [tokens.after(99 * num_pairs + turn, each) for each in all_x]
                        expected = reference.low_latency_dispatch(
                            x,
                            all_ids,
                            num_max_dispatch_tokens_per_rank=num_tokens,
                            num_experts=num_experts,
                            use_fp8=False,
                            layout=layout,
                        )
                        y = [experts.expected(each) for each in expected]
                        combined = reference.low_latency_combine(
                            y, expected, all_ids, all_weights, reduce="rank"
                        )[rank]
                        mine = expected[rank]
                        where = rows_in_use(mine)
                        assert same_bits(fetch(seen)[where], mine.recv_x[where])
                        assert same_bits(fetch(out.recv_count), mine.recv_count)
                        assert same_bits(fetch(out.handle.src_info), mine.src_info)
                        assert same_bits(fetch(out.handle.layout_range), mine.layout_range)
                        if mine.expert_rows is not None:
                            assert same_bits(fetch(out.handle.expert_rows), mine.expert_rows)
                        assert same_but_for_nan(fetch(back.combined_x), combined)
                if number % 500 == 250:
                    check_low_latency(buffer, number)
            del graph, kept
            group.barrier()

    run(place, body)


def test_first_call_of_a_shape_cannot_be_captured(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            stream = cupy.cuda.get_current_stream()
            x, ids = put(np.ones((1, 8), BF16)), put(np.zeros((1, 1), np.int64))
            group.barrier()
            stream.begin_capture()
            try:
                with pytest.raises(ep_rt.ConfigError, match="outside of the capture"):
                    buffer.low_latency_dispatch(x, ids, 1, group.size, use_fp8=False)
            finally:
                stream.end_capture()
            check_low_latency(buffer, 0)

    run(place, body)


def test_too_many_rows_for_an_expert_fail_on_every_rank(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group) as buffer:
            x, ids = put(np.ones((2, 8), BF16)), put(np.zeros((2, 2), np.int64))
            with pytest.raises(ep_rt.ConfigError, match="more than num_max"):
                again_and_again(lambda: buffer.low_latency_dispatch(x, ids, 2, group.size, use_fp8=False))
            buffer.reset()
            check_low_latency(buffer, 1)
            check_normal(buffer, 1)
            context_is_alive()

    run(place, body)


def test_late_rank_is_named(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group, timeout_s=SHORT_S) as buffer:
            check_low_latency(buffer, 1)
            late = group.size - 1
            x, ids = put(np.ones((1, 8), BF16)), put(np.zeros((1, 1), np.int64))
            buffer.low_latency_dispatch(x, ids, 1, group.size, use_fp8=False)
            if group.rank != late:
                with pytest.raises(ep_rt.PeerTimeoutError) as caught:
                    again_and_again(lambda: buffer.low_latency_dispatch(x, ids, 1, group.size, use_fp8=False))
                assert list(caught.value.peers) == [late]
            group.barrier()
            buffer.reset()
            check_low_latency(buffer, 2)
            context_is_alive()

    run(place, body)


def test_waiting_for_a_rank_is_counted(place: str) -> None:
    if place == "mpi" and as_group().size < 2:
        pytest.skip("needs a peer")

    def body(group: Group) -> None:
        late, delay_s = group.size - 1, 0.2
        x, ids = put(np.ones((1, 8), BF16)), put(np.zeros((1, 1), np.int64))
        waited = put(np.zeros(group.size, np.int64))
        with low_latency_buffer(group) as buffer:
            buffer.low_latency_dispatch(x, ids, 1, group.size, use_fp8=False)
            cupy.cuda.get_current_stream().synchronize()
            group.barrier()
            if group.rank == late:
                time.sleep(delay_s)
            buffer.low_latency_dispatch(
                x, ids, 1, group.size, use_fp8=False, dispatch_wait_recv_cost_stats=waited
            )
            microseconds = fetch(waited)
            assert (microseconds[late] > 0.5e6 * delay_s) == (group.rank != late)
            assert (microseconds[:late] < 0.5e6 * delay_s).all()

    run(place, body)


@pytest.mark.parametrize("enable_shrink", [False, True])
def test_waiting_for_the_first_rank_is_charged_to_no_other(place: str, enable_shrink: bool) -> None:
    """Of dispatch and of combine: those that were there in time are not charged for what came before them."""
    if place == "mpi" and as_group().size < 2:
        pytest.skip("needs a peer")

    def body(group: Group) -> None:
        late, delay_s = 0, 0.1
        everyone = np.arange(group.size)[None]  # a token goes to all ranks, so all answer
        x, ids = put(np.ones((1, 128), BF16)), put(everyone)
        y = put(np.ones((1, group.size, 128), BF16))
        weights = put(np.ones((1, group.size), np.float32))
        waited = put(np.zeros(group.size, np.int64))
        with low_latency_buffer(group, enable_shrink=enable_shrink) as buffer:

            def dispatch() -> Any:
                return buffer.low_latency_dispatch(
                    x, ids, 1, group.size, use_fp8=False, dispatch_wait_recv_cost_stats=waited
                )

            def combine(handle: Any) -> Any:
                return buffer.low_latency_combine(
                    y, ids, weights, handle, combine_wait_recv_cost_stats=waited
                )

            def check(call: Callable[[], Any]) -> Any:
                cupy.cuda.get_current_stream().synchronize()
                overwrite(waited, np.zeros(group.size, np.int64))
                group.barrier()
                if group.rank == late:
                    time.sleep(delay_s)
                result = call()
                seconds = fetch(waited) / 1e6
                if group.rank != late:
                    assert 0.5 * delay_s < seconds[late] < 2 * delay_s, seconds
                    seconds[late] = 0
                assert (seconds < 0.3 * delay_s).all(), seconds
                group.barrier()
                return result

            combine(dispatch().handle)  # what is done once per shape is done
            for _ in range(2):
                out = check(dispatch)
                check(partial(combine, out.handle))

    run(place, body)


@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("at_first", [False, True])
def test_rank_that_stops_is_masked_and_comes_back(
    place: str, at_first: bool, layout: str, use_fp8: bool
) -> None:
    """In the middle of a stream of calls, or before the first one of their shape, one rank makes none; the
    others go on with all that they have without it, and take it back."""
    if num_ranks_of(place, 4) < 3:
        pytest.skip("needs three ranks")

    def body(group: Group) -> None:
        lost, num_rounds, num_local_experts, num_max = 1, 6, 2, 15
        rank, num_experts = group.rank, num_local_experts * group.size
        rng = np.random.default_rng(0)
        x = [random_values(rng, (5, 128), BF16) for _ in range(group.size)]
        ids = [rng.integers(0, num_experts, (5, 3)) for _ in range(group.size)]
        y = [
            random_values(rng, (num_local_experts, group.size * num_max, 128), BF16)
            for _ in range(group.size)
        ]
        weights = [rng.random((5, 3), np.float32) for _ in range(group.size)]
        there = [
            np.where((each // num_local_experts == lost) | (src == lost), -1, each)
            for src, each in enumerate(ids)
        ]
        options: dict[str, Any] = {"use_fp8": use_fp8, "layout": layout}
        shrunk, whole = (
            reference.low_latency_dispatch(
                x, some, num_max_dispatch_tokens_per_rank=num_max, num_experts=num_experts, **options
            )
            for some in (there, ids)
        )
        sums_of_shrunk, sums_of_whole = (
            reference.low_latency_combine(y, dispatched, some, weights, reduce="rank")[rank]
            for dispatched, some in ((shrunk, there), (whole, ids))
        )
        given_x, given_ids, given_weights, given_y = (put(each[rank]) for each in (x, ids, weights, y))
        status = np.zeros(group.size, np.int32)
        with low_latency_buffer(group, timeout_s=SHORT_S, enable_shrink=True) as buffer:

            def dispatch() -> Any:
                return buffer.low_latency_dispatch(given_x, given_ids, num_max, num_experts, **options)

            def combine(handle: Any) -> Any:
                return buffer.low_latency_combine(given_y, given_ids, given_weights, handle).combined_x

            if not at_first:
                dispatch()
            check_low_latency(buffer, 3)
            group.barrier()
            if rank == lost:
                time.sleep(1.5 * SHORT_S)  # and does not say that it will not come
            else:
                for number in range(num_rounds):
                    began = time.monotonic()
                    out = dispatch()
                    check_received(out, shrunk[rank])
                    assert same_but_for_nan(fetch(combine(out.handle)), sums_of_shrunk)
                    if number:  # masked now: nobody waits any more
                        assert time.monotonic() - began < SHORT_S
                if at_first:  # nobody knows where it has room
                    buffer.low_latency_clean_mask_buffer()
                    with pytest.raises(ep_rt.ConfigError, match="reset"):
                        buffer.low_latency_update_mask_buffer(lost, False)
                buffer.low_latency_query_mask_buffer(status)
                assert status.tolist() == [int(each == lost) for each in range(group.size)]
            assert isinstance(group, PeerGroup)
            group.rejoin(op="test")
            buffer.reset()  # which also lets the one that stopped count the same calls
            buffer.low_latency_clean_mask_buffer()
            old = out.handle if at_first and rank != lost else None
            for _ in range(2):
                if old is not None:
                    with pytest.raises(ep_rt.HandleError, match="reset"):
                        combine(old)
                out = dispatch()
                check_received(out, whole[rank])
                assert same_but_for_nan(fetch(combine(out.handle)), sums_of_whole)
            check_low_latency(buffer, 4)
            context_is_alive()

    run(place, body)


def test_masks_of_the_caller(place: str) -> None:
    def body(group: Group) -> None:
        with low_latency_buffer(group, enable_shrink=True) as buffer:
            status = put(np.full(group.size, 7, np.int32))
            buffer.low_latency_query_mask_buffer(status)
            assert fetch(status).tolist() == [0] * group.size
            other = (group.rank + 1) % group.size
            if other != group.rank:
                buffer.low_latency_update_mask_buffer(other, True)
                buffer.low_latency_query_mask_buffer(status)
                assert fetch(status).tolist() == [int(rank == other) for rank in range(group.size)]
            buffer.low_latency_clean_mask_buffer()
            group.barrier()
            check_low_latency(buffer, 5)

    run(place, body)


def test_wrong_arguments(place: str) -> None:
    def body(group: Group) -> None:
        x, ids = put(np.ones((1, 8), BF16)), put(np.zeros((1, 1), np.int64))
        with (
            cuda_buffer(group) as plain,
            pytest.raises(ep_rt.BackendError, match="low_latency_mode=True"),
        ):
            plain.low_latency_dispatch(x, ids, 1, 8)
        sizes = {"num_rdma_bytes": 4 << 20} if LOW_LATENCY_OVER_NETWORK else {"num_nvl_bytes": 8 << 20}
        with low_latency_buffer(group, **sizes) as buffer:
            if LOW_LATENCY_OVER_NETWORK:
                out = buffer.low_latency_dispatch(x, ids, 1, group.size, use_fp8=False)
                y, weights = put(np.ones((1, group.size, 8), BF16)), put(np.ones((1, 1), np.float32))
                with pytest.raises(ep_rt.ConfigError, match="within one node"):
                    buffer.low_latency_combine(y, ids, weights, out.handle, reduce="source")
            with pytest.raises(ep_rt.ConfigError, match="num_rdma_bytes"):
                buffer.low_latency_dispatch(
                    put(np.ones((1, 7168), BF16)), put(np.zeros((1, 1), np.int64)), 512, group.size
                )
            with pytest.raises(ep_rt.ConfigError, match="enable_shrink"):
                buffer.low_latency_clean_mask_buffer()
            buffer.clean_low_latency_buffer(1, 128, group.size)
            check_low_latency(buffer, 6)

    run(place, body)


def test_sizes_beyond_the_limits_are_refused_before_anything_happens(place: str) -> None:
    """One rank asks for them, and none misses it."""

    def body(group: Group) -> None:
        x, ids = put(np.ones((1, 8), BF16)), put(np.full((1, 1), -1, np.int64))
        many_ids = put(np.full((1, plan.MAX_TOPK + 1), -1, np.int64))
        most_experts = MAX_LOCAL_RANKS * MAX_LOCAL_EXPERTS
        with low_latency_buffer(group) as buffer:
            check_low_latency(buffer, 0)

            def made() -> tuple[int, int]:
                stats: Any = buffer.stats
                return stats.num_low_latency_dispatches, buffer.memory_report().low_latency_bytes

            before = made()
            if group.rank == 0:
                with pytest.raises(ep_rt.ConfigError, match=f"1 to {plan.MAX_TOPK}"):
                    buffer.low_latency_dispatch(x, many_ids, 1, group.size, use_fp8=False)
                for num_local_experts in (MAX_LOCAL_EXPERTS + 1, most_experts // group.size + 1):
                    with pytest.raises(
                        ep_rt.ConfigError, match=f"{MAX_LOCAL_EXPERTS} on each, and {most_experts} in all"
                    ):
                        buffer.low_latency_dispatch(x, ids, 1, num_local_experts * group.size, use_fp8=False)
            assert made() == before
            check_low_latency(buffer, 1)

    run(place, body)


@pytest.mark.parametrize("enable_shrink", [False, True])
def test_memory_report_says_what_the_plan_says(place: str, enable_shrink: bool) -> None:
    def body(group: Group) -> None:
        num_tokens, num_max, hidden, num_topk, num_experts = 5, 16, 256, 3, 2 * group.size
        shape = plan.AreaShape(
            num_ranks=group.size,
            num_max_tokens=num_max,
            hidden=hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            has_columns=enable_shrink and not LOW_LATENCY_OVER_NETWORK,
            over_network=LOW_LATENCY_OVER_NETWORK,
        )
        x = put(np.ones((num_tokens, hidden), BF16))
        weights = put(np.ones((num_tokens, num_topk), np.float32))
        ids = put(np.arange(num_tokens * num_topk).reshape(num_tokens, num_topk) % num_experts)
        y = put(np.ones((2, group.size * num_max, hidden), BF16))
        with low_latency_buffer(group, enable_shrink=enable_shrink) as buffer:

            def num_bytes() -> int:
                return int(buffer.memory_report().low_latency_bytes)

            assert num_bytes() == 0
            expected = plan.AreaLayout.of(shape).num_bytes
            for layout in ("expert", "rank"):
                out = buffer.low_latency_dispatch(x, ids, num_max, num_experts, layout=layout)
                assert num_bytes() == expected
            buffer.low_latency_combine(y, ids, weights, out.handle)
            assert num_bytes() == expected
            if (
                not enable_shrink and not LOW_LATENCY_OVER_NETWORK
            ):  # what is not polled has an area of its own
                expected += plan.AreaLayout.of(replace(shape, is_main=False, has_columns=True)).num_bytes
            for use_fp8 in (False, True):
                out = buffer.low_latency_dispatch(x, ids, num_max, num_experts)
                buffer.low_latency_combine(
                    y, ids, weights, out.handle, use_logfmt=not use_fp8, use_fp8=use_fp8
                )
                assert num_bytes() == expected

    run(place, body)


def test_landing_zones_of_a_model_stay_below_64_megabytes(place: str) -> None:
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) < 64_000_000

"""Normal mode on GPUs: dispatch and combine against the oracle, and under misuse and faults."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pytest
from host_cases import Case, random_bits, random_values, same_bits
from ranks import PLACES, RANKS_PER_NODE, device_count, run_ranks

import ep_rt
from ep_rt import Buffer, Config, Group, reference

if device_count():
    import cupy
    from cuda.bindings import driver
    from device_arrays import cuda_buffer, fetch, overwrite, poison, put
    from normal_cases import (
        carried,
        check_after_reset,
        check_bytes,
        check_normal,
        check_quantized,
        check_worst_case,
        raised,
        wide_case,
    )

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("place", PLACES)]

T = TypeVar("T")
SHORT_S = 2.0
NUM_ROUNDS = 1000


def run(place: str, body: Callable[[Group], T]) -> list[T]:
    return run_ranks(place, body, num_virtual_ranks=4)


@pytest.mark.parametrize("num_sms", [1, 2, 5, 16])
def test_random_layers_equal_the_oracle(place: str, num_sms: int) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(24):
                if seed % 4 == 0:
                    gc.collect()
                    poison(buffer, 0xFF if seed % 8 else 0xA5)
                check_normal(buffer, seed, num_sms=num_sms)

    run(place, body)


def test_copies_of_the_bytes_of_a_handle_stand_for_it(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(12):
                check_normal(buffer, seed, carry=partial(carried, buffer))

    run(place, body)


@pytest.mark.parametrize("num_sms", [1, 2, 16])
def test_worst_case_capacity_equals_the_oracle(place: str, num_sms: int) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            poison(buffer, 0x5A)
            for seed in range(20):
                check_worst_case(buffer, seed, num_sms=num_sms)

    run(place, body)


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_topk", "num_local_experts"),
    [
        (700, 7168, 8, 32),
        (515, 136, 5, 4),
        (300, 8, 2, 1),
        (257, 16384, 1, 3),
        (130, 1832, 64, 64),
        (2000, 64, 6, 512),
    ],
)
def test_shapes_of_models(
    place: str, num_tokens: int, hidden: int, num_topk: int, num_local_experts: int
) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group, num_nvl_bytes=512 << 20) as buffer:
            for seed in range(2):  # bfloat16, float16
                case = wide_case(
                    seed,
                    group.size,
                    num_tokens=num_tokens,
                    hidden=hidden,
                    num_topk=min(num_topk, group.size * num_local_experts),
                    num_local_experts=num_local_experts,
                )
                check_normal(buffer, 6 * seed, case=case)

    run(place, body)


@pytest.mark.parametrize("seed", [0, 5])
def test_any_number_of_tokens_in_turn(place: str, seed: int) -> None:
    """Calls that differ in the numbers of tokens and rows share what was worked out for the first."""

    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for number, num_tokens in enumerate((200, 0, 1, 2, 37, 8, 611, 200, 612, 15)):
                case = wide_case(
                    number, group.size, num_tokens=num_tokens, hidden=136, num_topk=3, num_local_experts=4
                )
                check_normal(buffer, seed, case=case)
            engine: Any = buffer._engine
            for calls in (engine._dispatch._plans, engine._combine):
                assert len(calls._kinds._plans) < len(calls._plans._plans)

    run(place, body)


def test_numbers_that_do_not_go_together_are_refused(place: str) -> None:
    """Also where calls of the same kind have been made before."""

    def body(group: Group) -> None:
        def rows(count: int) -> Any:
            return put(np.ones((count, 16), np.float32))

        def ids(count: int) -> Any:
            return put(np.arange(2 * count).reshape(count, 2) % group.size)

        def columns(count: int) -> Any:
            return put(np.ones((count, 2), np.float32))

        with cuda_buffer(group) as buffer:

            def dispatch(num_x: int, num_sf: int, num_ids: int, num_weights: int) -> Any:
                return buffer.dispatch(
                    (rows(num_x), rows(num_sf)),
                    topk_idx=ids(num_ids),
                    topk_weights=columns(num_weights),
                    num_experts=group.size,
                )

            def combine(handle: Any, num_rows: int, num_weights: int, num_bias: int) -> None:
                buffer.combine(rows(num_rows), handle, columns(num_weights), (rows(7), rows(num_bias)))

            handle, other = dispatch(7, 7, 7, 7).handle, dispatch(9, 9, 9, 9).handle
            num_rows = handle.num_recv_rows
            assert num_rows != other.num_recv_rows
            for numbers in ((7, 7, 9, 9), (7, 9, 7, 7), (7, 7, 7, 9)):
                with pytest.raises(ep_rt.ArrayError, match="has shape"):
                    dispatch(*numbers)
            buffer.dispatch(rows(7), handle=handle, num_worst_tokens=num_rows)
            buffer.dispatch(rows(9), handle=other)
            with pytest.raises(ep_rt.HandleError, match="x has 9 tokens"):
                buffer.dispatch(rows(9), handle=handle)
            with pytest.raises(ep_rt.HandleError, match=f"num_worst_tokens={num_rows}"):
                buffer.dispatch(rows(9), handle=other, num_worst_tokens=num_rows)
            combine(handle, num_rows, num_rows, 7)
            for each in ((num_rows + 1, num_rows, 7), (num_rows, num_rows + 1, 7), (num_rows, num_rows, 9)):
                with pytest.raises(ep_rt.ArrayError, match="has shape"):
                    combine(handle, *each)
            check_normal(buffer, 3)

    run(place, body)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 6, 7, 8])
def test_any_number_of_ranks(place: str, num_ranks: int) -> None:
    if place != "virtual":
        pytest.skip("as many ranks as GPUs")

    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(6):
                check_normal(buffer, seed, num_sms=8)
            check_worst_case(buffer, 6)

    run_ranks(place, body, num_virtual_ranks=num_ranks)


@pytest.mark.parametrize("num_sms", [1, 16])
@pytest.mark.parametrize("hidden", [128, 640, 7168])
def test_quantized_rows_equal_the_oracle(place: str, hidden: int, num_sms: int) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(3):
                check_quantized(buffer, seed, hidden=hidden, num_tokens=(30, 600, 0)[seed], num_sms=num_sms)

    run(place, body)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_other_frameworks(place: str, framework: str) -> None:
    pytest.importorskip(framework)

    def body(group: Group) -> None:
        if framework == "torch":
            import torch

            torch.cuda.set_device(cupy.cuda.runtime.getDevice())
            current: Any = torch.cuda.stream(torch.cuda.Stream())
        else:
            current = cupy.cuda.Stream(non_blocking=True)
        with current, cuda_buffer(group) as buffer:
            for seed in (0, 4, 8, 12):
                check_normal(buffer, seed, framework=framework)

    if framework == "torch":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch without CUDA")
    else:
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("JAX without CUDA")
        if not jax.config.jax_enable_x64:
            pytest.skip("JAX narrows int64")
        if place == "virtual":
            pytest.skip("JAX's stream is common to the threads")
    run(place, body)


def test_no_tokens_and_no_experts(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for counts in ([0] * group.size, [5 * (rank == 1) for rank in range(group.size)]):
                num_tokens = counts[group.rank]
                x = np.ones((num_tokens, 64), np.float32)
                ids = np.full((num_tokens, 3), 0, np.int64)
                out = buffer.dispatch(put(x), topk_idx=put(ids), num_experts=2 * group.size)
                assert out.recv_x.shape == (sum(counts) if group.rank == 0 else 0, 64)
                back = buffer.combine(out.recv_x, out.handle)
                assert (fetch(back.combined_x) == 1).all()
            nowhere = np.full((7, 2), -1, np.int64)
            out = buffer.dispatch(
                put(np.ones((7, 64), np.float32)), topk_idx=put(nowhere), num_experts=group.size
            )
            assert out.num_recv_tokens_per_expert_list == [0]
            back = buffer.combine(out.recv_x, out.handle)
            assert same_bits(fetch(back.combined_x), np.zeros((7, 64), np.float32))

    run(place, body)


def test_ids_out_of_range_go_nowhere(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            num_experts = 2 * group.size
            ids = [
                np.random.default_rng(rank).integers(-5, num_experts + 5, (50, 3)).astype(np.int64)
                for rank in range(group.size)
            ]
            ids[0][:, 0] = 2**40
            x = [np.full((50, 16), rank, np.float32) for rank in range(group.size)]
            valid = [np.where((some >= 0) & (some < num_experts), some, -1) for some in ids]
            mine = reference.dispatch(x, valid, num_experts=num_experts)[group.rank]
            out = buffer.dispatch(put(x[group.rank]), topk_idx=put(ids[group.rank]), num_experts=num_experts)
            assert same_bits(fetch(out.recv_x), mine.recv_x)
            assert same_bits(fetch(out.recv_topk_idx), mine.recv_topk_idx)
            assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert

    run(place, body)


def test_layout_and_dispatch_from_a_layout(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed, dtype in enumerate((np.int64, np.int32, np.int64)):
                case = Case.draw(seed, group.size, max_tokens=3000)
                ids = case.topk_idx[group.rank].astype(dtype)
                expected = reference.dispatch_layout(
                    ids,
                    num_experts=case.num_experts,
                    num_ranks=group.size,
                    ranks_per_node=RANKS_PER_NODE or group.size,
                )
                layout = buffer.get_dispatch_layout(put(ids), case.num_experts)
                assert same_bits(fetch(layout.num_tokens_per_rank), expected.num_tokens_per_rank)
                assert same_bits(fetch(layout.num_tokens_per_expert), expected.num_tokens_per_expert)
                assert same_bits(fetch(layout.is_token_in_rank), expected.is_token_in_rank)
                if buffer.topology.num_nodes == 1:
                    assert layout.num_tokens_per_rdma_rank is None
                else:
                    assert same_bits(fetch(layout.num_tokens_per_rdma_rank), expected.num_tokens_per_node)
                rng = case.rng
                x, again = (
                    [random_values(rng, (count, 16), np.float32) for count in case.num_tokens]
                    for _ in range(2)
                )
                alignment, capacity = (1, 8, 128)[seed], max(1, sum(case.num_tokens) // 2)
                everyone = reference.dispatch(
                    x, case.topk_idx, num_experts=case.num_experts, expert_alignment=alignment
                )
                mine = everyone[group.rank]
                routing = {
                    "is_token_in_rank": layout.is_token_in_rank,
                    "num_tokens_per_expert": layout.num_tokens_per_expert,
                }
                out = buffer.dispatch(put(x[group.rank]), **routing, expert_alignment=alignment)
                assert same_bits(fetch(out.recv_x), mine.recv_x)
                assert out.recv_topk_idx is None
                assert out.recv_topk_weights is None
                assert out.num_recv_tokens_per_expert_list == mine.num_recv_tokens_per_expert
                by_rank = np.bincount(mine.src_rank, minlength=group.size)
                assert out.handle.num_recv_tokens_per_rank == by_rank.tolist()

                worst = buffer.dispatch(put(x[group.rank]), **routing, num_worst_tokens=capacity)
                rows = min(capacity, mine.num_recv_tokens)
                assert worst.recv_x.shape == (capacity, 16)
                assert same_bits(fetch(worst.recv_x)[:rows], mine.recv_x[:rows])
                assert worst.handle.overflow == (mine.num_recv_tokens > capacity)

                cached = buffer.dispatch(put(again[group.rank]), handle=out.handle)
                expected_x, _ = reference.dispatch_cached(again, everyone)[group.rank]
                assert same_bits(fetch(cached.recv_x), expected_x)
                y = [random_values(rng, each.recv_x.shape, np.float32) for each in everyone]
                combined = reference.combine(
                    y, everyone, num_tokens=case.num_tokens, ranks_per_node=RANKS_PER_NODE
                )
                back = buffer.combine(put(y[group.rank]), out.handle)
                assert same_bits(fetch(back.combined_x), combined[group.rank].x)

    run(place, body)


def test_any_strides(place: str) -> None:
    """Also of scale factors that are packed exponents."""

    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            rng = np.random.default_rng(group.rank)
            for number, sf_dtype in enumerate((np.float32, np.int32), 1):
                x = rng.random((30, 64), np.float32)
                sf = random_bits(rng, (30, 5), sf_dtype)
                ids = rng.integers(0, group.size, (30, 2))
                plain = buffer.dispatch((put(x), put(sf)), topk_idx=put(ids), num_experts=group.size)
                wide = np.zeros((30, 100), np.float32)
                wide[:, 3:67] = x
                strided = buffer.dispatch(
                    (put(wide)[:, 3:67], put(sf.T).T),
                    topk_idx=put(np.repeat(ids, 2, axis=1))[:, ::2],
                    num_experts=group.size,
                )
                assert same_bits(fetch(strided.recv_x[0]), fetch(plain.recv_x[0]))
                assert fetch(strided.recv_x[1]).dtype == sf_dtype
                assert same_bits(fetch(strided.recv_x[1]), fetch(plain.recv_x[1]))
                assert same_bits(fetch(strided.recv_topk_idx), fetch(plain.recv_topk_idx))
                y = fetch(plain.recv_x[0])
                y_wide = np.zeros((len(y), 100), np.float32)
                y_wide[:, 1:65] = y
                back = buffer.combine(put(y_wide)[:, 1:65], plain.handle)
                expected = buffer.combine(put(y), plain.handle)
                assert same_bits(fetch(back.combined_x), fetch(expected.combined_x))
                assert buffer.stats.num_copied_inputs == 3 * number

    run(place, body)


def test_bytes_counted_are_those_planned(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group, counts_bytes=True) as buffer:
            for seed in range(6):
                check_bytes(buffer, seed, quantizes=bool(seed % 2))
            check_normal(buffer, 1)

    run(place, body)


def test_many_rounds_with_sleeps_and_kept_results(place: str) -> None:
    def body(group: Group) -> None:
        sleeps = random.Random(group.rank)

        def pause() -> None:
            if sleeps.random() < 0.1:
                time.sleep(sleeps.random() * 2e-3)

        with cuda_buffer(group) as buffer:
            kept: list[Any] = []
            for seed in range(NUM_ROUNDS):
                results = check_normal(buffer, seed, num_sms=1 + seed % 16, pause=pause)
                # The same on every rank: what is held decides how much fits.
                if seed % 3 == 0:
                    kept.append((fetch(results[2].combined_x), results))
                if len(kept) > 5:
                    kept.pop(seed % 5)
                for combined, held in kept:
                    assert same_bits(fetch(held[2].combined_x), combined)
            del results, held
            kept.clear()
            gc.collect()
            assert buffer.stats.slab.used_bytes == 0
            assert buffer.stats.slab.num_taken == buffer.stats.slab.num_released

    run(place, body)


def test_asynchronous_calls_and_events(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(6):
                check_normal(buffer, seed, async_finish=True, previous_event=Buffer.capture())
            x = np.full((64, 1024), group.rank, np.float32)
            ids = np.arange(64 * group.size).reshape(64, group.size) % group.size
            given_x, given_ids = put(x), put(ids)
            first = buffer.dispatch(given_x, topk_idx=given_ids, num_experts=group.size, async_finish=True)
            other = cupy.cuda.Stream(non_blocking=True)
            with other:  # another stream, ordered by the event alone
                second = buffer.combine(
                    first.recv_x, first.handle, previous_event=first.event, async_finish=True
                )
                with second.event:
                    pass
                assert same_bits(fetch(second.combined_x), x * group.size)
            first.event.synchronize()
            assert first.event.query()

    run(place, body)


def test_calls_from_two_streams(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
            for seed in range(12):
                with streams[seed % 2]:
                    check_normal(buffer, seed, num_sms=4, async_finish=seed % 3 == 0)
            x = [put(np.full((40, 256), 10 * i + group.rank, np.float32)) for i in range(2)]
            ids = put(np.arange(40 * group.size).reshape(40, group.size) % group.size)
            held = []
            for number in range(20):  # no host in between: the buffer alone keeps the calls in order
                with streams[number % 2]:
                    out = buffer.dispatch(
                        x[number % 2],
                        topk_idx=ids,
                        num_experts=group.size,
                        num_worst_tokens=40 * group.size,
                        async_finish=number % 3 == 0,
                    )
                    out.event.current_stream_wait()
                    held.append((number, buffer.combine(out.recv_x, out.handle).combined_x))
            for number, combined in held:
                with streams[number % 2]:
                    assert (fetch(combined) == group.size * (10 * (number % 2) + group.rank)).all()

    run(place, body)


def test_communication_stream_goes_first_and_waits_for_no_other(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            stream = driver.CUstream(buffer.get_comm_stream().ptr)
            success = driver.CUresult.CUDA_SUCCESS
            # The lower the number, the higher the priority.
            range_status, lowest, highest = driver.cuCtxGetStreamPriorityRange()
            status, priority = driver.cuStreamGetPriority(stream)
            assert (range_status, status) == (success, success)
            assert priority == highest < lowest
            status, flags = driver.cuStreamGetFlags(stream)
            assert status == success
            assert flags == driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value

    run(place, body)


def test_calls_allocate_nothing_and_launch_a_kernel_each(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device_count() == 0:
        pytest.skip("no GPU")
    num_rounds = 50
    num_launches: Counter[int] = Counter()  # of the thread of each rank

    def count(module: Any, name: str) -> None:
        launch = getattr(module, name)

        def counted(*args: Any) -> Any:
            num_launches[threading.get_ident()] += 1
            return launch(*args)

        monkeypatch.setattr(module, name, counted)

    def body(group: Group) -> None:
        num_tokens, num_experts = 64, 2 * group.size
        x = put(np.ones((num_tokens, 512), np.float32))
        ids = put(np.arange(3 * num_tokens).reshape(num_tokens, 3) % num_experts)
        weights = put(np.ones((num_tokens, 3), np.float32))
        capacity = num_tokens * group.size
        with cuda_buffer(group) as buffer:

            def layer() -> None:
                out = buffer.dispatch(
                    x,
                    topk_idx=ids,
                    topk_weights=weights,
                    num_experts=num_experts,
                    num_worst_tokens=capacity,
                )
                cached = buffer.dispatch(x, handle=out.handle, num_worst_tokens=capacity)
                buffer.combine(cached.recv_x, out.handle)

            def held() -> tuple[int, ...]:
                report = buffer.memory_report()
                return (
                    report.slab.num_bytes,
                    report.symmetric_bytes,
                    report.control_bytes,
                    report.local_bytes,
                )

            for _ in range(5):
                layer()
            before, num_before = held(), num_launches[threading.get_ident()]
            for _ in range(num_rounds):
                layer()
            assert held() == before
            if buffer.topology.num_nodes == 1:
                assert num_launches[threading.get_ident()] - num_before == 3 * num_rounds

    for module, name in ((cupy.cuda.driver, "launchKernel"), (driver, "cuLaunchKernelEx")):
        count(module, name)
    run(place, body)


def test_two_buffers(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as first, cuda_buffer(group) as second:
            for seed in range(8):
                for buffer in (first, second) if seed % 2 else (second, first):
                    check_normal(buffer, seed, num_sms=4)
            out = first.dispatch(
                put(np.ones((4, 16), np.float32)),
                topk_idx=put(np.zeros((4, 1), np.int64)),
                num_experts=group.size,
            )
            with pytest.raises(ep_rt.HandleError, match="another buffer"):
                second.combine(out.recv_x, out.handle)

    run(place, body)


def test_results_outlive_their_buffer(place: str) -> None:
    def body(group: Group) -> None:
        x = np.full((8, 16), 3, np.float32)
        with cuda_buffer(group) as buffer:
            ids = np.full((8, 1), group.rank, np.int64)
            out = buffer.dispatch(put(x), topk_idx=put(ids), num_experts=group.size, num_worst_tokens=8)
        with cupy.cuda.Stream(non_blocking=True):
            assert same_bits(fetch(out.recv_x), x)
            with pytest.raises(ep_rt.ClosedError):
                out.handle.num_recv_tokens  # noqa: B018
        buffer.close()
        group.barrier()

    run(place, body)


def test_graph_of_dispatch_and_combine_with_changing_routing(place: str) -> None:
    def body(group: Group) -> None:
        num_experts, hidden, num_tokens, capacity = 4 * group.size, 512, 64, 62 * group.size
        rng = np.random.default_rng(5)

        def draw() -> tuple[list[Any], list[Any], list[Any]]:
            x = [random_values(rng, (num_tokens, hidden), np.float32) for _ in range(group.size)]
            ids = [rng.integers(-1, num_experts, (num_tokens, 3)) for _ in range(group.size)]
            weights = [rng.random((num_tokens, 3), np.float32) for _ in range(group.size)]
            return x, ids, weights

        with cuda_buffer(group) as buffer:
            stream = cupy.cuda.get_current_stream()
            given = [put(each[group.rank]) for each in draw()]

            def layer() -> tuple[Any, Any]:
                out = buffer.dispatch(
                    given[0],
                    topk_idx=given[1],
                    topk_weights=given[2],
                    num_experts=num_experts,
                    num_worst_tokens=capacity,
                )
                return out, buffer.combine(out.recv_x, out.handle, topk_weights=out.recv_topk_weights)

            layer()
            stream.begin_capture()
            with pytest.raises(ep_rt.ConfigError, match="num_worst_tokens"):
                buffer.dispatch(given[0], topk_idx=given[1], num_experts=num_experts)
            out, back = layer()
            graph = stream.end_capture()
            graph.upload(stream)
            stream.synchronize()
            group.barrier()
            saw_overflow = set()
            for number in range(12):
                drawn = draw()
                if number == 3:  # everything to one rank: more than fits
                    drawn[1][:] = [np.full((num_tokens, 3), 0, np.int64)] * group.size
                for array, values in zip(given, drawn, strict=True):
                    overwrite(array, values[group.rank])
                for _ in range(1 + number % 3):
                    graph.launch(stream)
                stream.synchronize()
                x, ids, weights = drawn
                expected = reference.dispatch(
                    x, ids, num_experts=num_experts, topk_weights=weights, num_worst_tokens=capacity
                )
                mine = expected[group.rank]
                rows = min(capacity, mine.num_recv_tokens)
                assert same_bits(fetch(out.recv_x)[:rows], mine.recv_x[:rows])
                assert same_bits(fetch(out.recv_topk_idx), mine.recv_topk_idx)
                assert same_bits(fetch(out.recv_topk_weights), mine.recv_topk_weights)
                assert out.handle.num_recv_tokens == mine.num_recv_tokens
                saw_overflow.add(out.handle.overflow)
                combined = reference.combine(
                    [each.recv_x for each in expected],
                    expected,
                    num_tokens=[num_tokens] * group.size,
                    topk_weights=[each.recv_topk_weights for each in expected],  # type: ignore[misc]
                    ranks_per_node=RANKS_PER_NODE,
                )[group.rank]
                assert same_bits(fetch(back.combined_x), combined.x)
                assert same_bits(fetch(back.combined_topk_weights), combined.topk_weights)
                check_normal(buffer, number, num_sms=4)  # eager calls between replays
            assert group.rank != 0 or group.size == 1 or saw_overflow == {False, True}

    run(place, body)


def test_missing_rank_is_named_and_reset_helps(place: str) -> None:
    missing = 1

    def body(group: Group) -> None:
        with cuda_buffer(group, timeout_s=SHORT_S) as buffer:
            check_normal(buffer, 1)
            x, ids = put(np.ones((4, 16), np.float32)), put(np.zeros((4, 1), np.int64))
            group.barrier()
            for num_worst_tokens in (0, 16):
                if group.rank != missing:
                    start = time.monotonic()

                    def dispatch(num_worst_tokens: int = num_worst_tokens) -> Any:
                        return buffer.dispatch(
                            x, topk_idx=ids, num_experts=group.size, num_worst_tokens=num_worst_tokens
                        )

                    error = raised(dispatch)
                    if num_worst_tokens:  # not known when the call returns
                        assert error is None
                        cupy.cuda.runtime.deviceSynchronize()
                        error = raised(dispatch)
                    assert SHORT_S * 0.9 < time.monotonic() - start < SHORT_S * 3
                    assert isinstance(error, ep_rt.PeerTimeoutError)
                    assert error.peers == (missing,)
                    assert "dispatch" in error.phase
                check_after_reset(buffer)

    run(place, body)


def test_rank_that_stops_in_a_stream_of_calls(place: str) -> None:
    """No host waits for any of them. What all ranks called is right, then the others learn who is missing."""
    lost, num_calls, num_made = 1, 12, 7

    def body(group: Group) -> None:
        rng = np.random.default_rng(0)
        x = [random_values(rng, (40 + rank, 64), np.float32) for rank in range(group.size)]
        ids = [rng.integers(-1, 2 * group.size, (len(each), 3)) for each in x]
        capacity = sum(map(len, x))
        expected = reference.dispatch(x, ids, num_experts=2 * group.size, num_worst_tokens=capacity)
        mine = expected[group.rank]
        combined = reference.combine(
            [each.recv_x for each in expected],
            expected,
            num_tokens=[len(each) for each in x],
            ranks_per_node=RANKS_PER_NODE,
        )[group.rank]
        with cuda_buffer(group, timeout_s=SHORT_S) as buffer:
            given, topk_idx = (
                put(x[group.rank]),
                put(ids[group.rank]),
            )  # once: copies wait for the calls before

            def call() -> tuple[Any, Any]:
                out = buffer.dispatch(
                    given,
                    topk_idx=topk_idx,
                    num_experts=2 * group.size,
                    num_worst_tokens=capacity,
                )
                return out, buffer.combine(out.recv_x, out.handle)

            check_normal(buffer, 1)
            group.barrier()
            calls = [call() for _ in range(num_made if group.rank == lost else num_calls)]
            cupy.cuda.runtime.deviceSynchronize()
            for out, back in calls[:num_made]:
                assert same_bits(
                    fetch(out.recv_x)[: mine.num_recv_tokens], mine.recv_x[: mine.num_recv_tokens]
                )
                assert same_bits(fetch(back.combined_x), combined.x)
            if group.rank != lost:
                error = raised(call)
                assert isinstance(error, ep_rt.PeerTimeoutError)
                assert lost in error.peers
            check_after_reset(buffer)

    run(place, body)


def test_ranks_in_different_operations(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            out = buffer.dispatch(
                put(np.ones((4, 16), np.float32)),
                topk_idx=put(np.zeros((4, 1), np.int64)),
                num_experts=group.size,
            )
            x = put(np.ones((4, 16), np.float32))
            cupy.cuda.get_current_stream().synchronize()
            start = time.monotonic()

            def call() -> None:
                if group.rank == 0:
                    buffer.dispatch(x, handle=out.handle)
                else:
                    buffer.combine(out.recv_x, out.handle)
                cupy.cuda.get_current_stream().synchronize()
                buffer.combine(out.recv_x, out.handle)  # says what happened to the last call

            error = raised(call)
            assert isinstance(error, ep_rt.CollectiveMismatchError)
            assert error.operations == ("dispatch", *["combine"] * (group.size - 1))
            assert time.monotonic() - start < 10
            group.barrier()
            buffer.reset()
            check_normal(buffer, 3)

    run(place, body)


@pytest.mark.parametrize(
    "what",
    ["hidden", "dtype", "num_experts", "topk_weights", "num_worst_tokens", "num_max_tokens_per_rank"],
)
def test_arguments_that_differ(place: str, what: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            odd = group.rank == group.size - 1
            dtype = np.dtype(np.float16 if what == "dtype" and odd else np.float32)
            row_bytes = 128 if what == "hidden" and odd else 64
            x = np.ones((4, row_bytes // dtype.itemsize), dtype)
            weights = put(np.ones((4, 1), np.float32)) if what == "topk_weights" and odd else None

            def call() -> None:
                buffer.dispatch(
                    put(x),
                    topk_idx=put(np.zeros((4, 1), np.int64)),
                    topk_weights=weights,
                    num_experts=group.size * (2 if what == "num_experts" and odd else 1),
                    num_worst_tokens=64 * (what == "num_worst_tokens" and odd),
                    num_max_tokens_per_rank=4 if what == "num_max_tokens_per_rank" and odd else None,
                )
                cupy.cuda.get_current_stream().synchronize()
                buffer.dispatch(put(x), topk_idx=put(np.zeros((4, 1), np.int64)), num_experts=group.size)

            error = raised(call)
            assert isinstance(error, ep_rt.ConfigError)
            assert error.is_collective
            assert f"{', '.join(map(str, range(group.size - 1)))}; {group.size - 1}" in str(error)
            group.barrier()
            buffer.reset()
            check_normal(buffer, 4)

    run(place, body)


def test_what_does_not_fit_says_how_much_would(place: str) -> None:
    if RANKS_PER_NODE:
        pytest.skip("over several nodes only the ranks of the node that has no room hear of it")

    def body(group: Group) -> None:
        num_tokens, hidden = 512, 1024
        x = np.full((num_tokens, hidden), group.rank, np.float32)
        ids = np.zeros((num_tokens, 1), np.int64)  # all to rank 0
        with cuda_buffer(group, num_nvl_bytes=4 << 20) as buffer:
            for _ in range(2):
                error = raised(lambda: buffer.dispatch(put(x), topk_idx=put(ids), num_experts=group.size))
                assert isinstance(error, ep_rt.ConfigError)
                assert error.is_collective
                assert "rank 0 receives" in str(error)
                messages = group.allgather(str(error))
                assert len(set(messages)) == 1
            needed = int(str(error).partition("must be at least ")[2].partition(",")[0])
            del error
            check_normal(buffer, 5)  # still in step
            with pytest.raises(ep_rt.ConfigError, match="no room for"):
                buffer.dispatch(put(x), topk_idx=put(ids), num_experts=group.size, num_worst_tokens=1 << 20)
            check_normal(buffer, 6)
        with cuda_buffer(group, num_nvl_bytes=needed) as buffer:
            out = buffer.dispatch(put(x), topk_idx=put(ids), num_experts=group.size)
            assert out.recv_x.shape[0] == (num_tokens * group.size if group.rank == 0 else 0)

    run(place, body)


def test_results_that_leave_no_room_move_out_of_the_slab(place: str) -> None:
    def body(group: Group) -> None:
        num_tokens, hidden = 64, 256
        ids = np.repeat(np.arange(group.size)[None], num_tokens, axis=0)  # every token to every rank
        num_rows = num_tokens * group.size
        row_bytes = 8 * group.size + hidden * 4
        # Room for two results, and no more.
        with cuda_buffer(group, num_nvl_bytes=2 * (num_rows * row_bytes + 1024)) as buffer:
            held = []
            for number in range(12):
                x = np.full((num_tokens, hidden), 10 * number + group.rank, np.float32)
                out = buffer.dispatch(
                    put(x),
                    topk_idx=put(ids),
                    num_experts=group.size,
                    num_worst_tokens=num_rows * (number % 2),
                )
                held.append(out)
            assert buffer.stats.num_copied_results >= 10
            for number, out in enumerate(held):
                expected = np.repeat(np.arange(group.size), num_tokens)[:, None] + np.float32(10 * number)
                assert (fetch(out.recv_x) == expected).all()
                back = fetch(buffer.combine(out.recv_x, out.handle).combined_x)
                assert (back == group.size * (10 * number + group.rank)).all()
            y = buffer.empty((num_rows, hidden), "float32")
            assert buffer.stats.num_arrays_elsewhere == 1
            overwrite(y, np.ones((num_rows, hidden), np.float32))
            assert (fetch(buffer.combine(y, held[0].handle).combined_x) == group.size).all()
            report = str(buffer.memory_report())
            assert "largest free piece" in report

    run(place, body)


def test_misuse_is_refused_before_anything_happens(place: str) -> None:
    def body(group: Group) -> None:
        ids = np.zeros((4, 1), np.int64)
        x = np.ones((4, 16), np.float32)
        with cuda_buffer(group) as buffer:
            with pytest.raises(ep_rt.ArrayError, match="lies on cpu"):
                buffer.dispatch(x, topk_idx=put(ids), num_experts=group.size)
            with pytest.raises(ep_rt.ConfigError, match="num_sms=9999"):
                buffer.dispatch(
                    put(x), topk_idx=put(ids), num_experts=group.size, config=Config(num_sms=9999)
                )
            with pytest.raises(ep_rt.ConfigError, match="at most 512 on each"):
                buffer.dispatch(put(x), topk_idx=put(ids), num_experts=group.size * 513)
            with pytest.raises(ep_rt.BackendError, match="low-latency"):
                buffer.low_latency_dispatch(put(x), put(ids), 4, group.size)
            check_normal(buffer, 7)

    run(place, body)


def test_threads_on_one_gpu_need_streams_of_their_own(place: str) -> None:
    if place != "virtual":
        pytest.skip("ranks that share nothing may use the default stream")

    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            x, ids = put(np.ones((4, 16), np.float32)), put(np.zeros((4, 1), np.int64))
            with cupy.cuda.Stream.null, pytest.raises(ep_rt.ConfigError, match="stream of its own"):
                buffer.dispatch(x, topk_idx=ids, num_experts=group.size)
            check_normal(buffer, 8)

    run(place, body)


def test_nodes_of_threads_are_refused(place: str) -> None:
    if place == "mpi":
        pytest.skip("processes have NVSHMEM: see test_internode.py")

    def body(group: Group) -> None:
        with pytest.raises(ep_rt.TopologyError, match="NVSHMEM cannot serve"):
            Buffer(group, backend="cuda", ranks_per_node=1)
        with cuda_buffer(group) as buffer:
            check_normal(buffer, 9)

    run(place, body)

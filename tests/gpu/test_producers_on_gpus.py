"""Inputs of CuPy and of producers that nobody knows, on GPUs: calls come in the order of their streams.

Inputs are written late, and spoiled as soon as the call is enqueued: a call that does not wait for the stream
of its producer, or lets its own stream go on too early, sees 0xFF. The default stream has no part in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import numpy as np
import pytest
from host_cases import random_values, same_bits
from producers import BF16, WAYS, Results, Writer, follow
from ranks import LOW_LATENCY_OVER_NETWORK, PLACES, RANKS_PER_NODE, WITH_PUTS_ALONE, device_count, run_ranks

from ep_rt import Buffer, Group, reference

if device_count():
    import cupy
    from device_arrays import cuda_buffer, fetch
    from low_latency_cases import expert_outputs
    from normal_cases import wide_case

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL_EXPERTS = 64, 512, 3, 4
SLAB_BYTES = 256 << 20
TIMEOUT_S = 15.0
ALL_LATE, NONE_LATE = 100, 101  # rounds, see `wrong_results`
MOST_CYCLES = 10_000_000_000  # about 5 s, should nobody open the gate

ALL_WAYS = pytest.mark.parametrize("how", WAYS)
OTHER_STREAMS = pytest.mark.parametrize("how", ["cupy", "interface", "dlpack"])
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("place", PLACES)]


class Layer(Protocol):
    """Calls of a layer that are enqueued at once, and what came of them."""

    results: Results

    def enqueue(self, *, is_late: bool) -> None: ...


class NormalLayer:
    """get_dispatch_layout, dispatch, another one with its handle, and combine of what is twice the rows.

    Args:
        mode: "exact"; "worst", "async" on the communication stream, or "flags" for routing by ranks.
    """

    def __init__(self, writer: Writer, buffer: Buffer, seed: int, mode: str) -> None:
        rank, num_ranks = buffer.rank, buffer.num_ranks
        case = wide_case(
            seed,
            num_ranks,
            num_tokens=NUM_TOKENS,
            hidden=HIDDEN,
            num_topk=NUM_TOPK,
            num_local_experts=NUM_LOCAL_EXPERTS,
        )
        shapes = [(count, HIDDEN) for count in case.num_tokens]
        x, again, bias = ([random_values(case.rng, each, np.float32) for each in shapes] for _ in range(3))
        sf = [random_values(case.rng, (count, 5), np.float32) for count, _ in shapes]
        everyone = reference.dispatch(
            x, case.topk_idx, num_experts=case.num_experts, topk_weights=case.topk_weights, sf=sf
        )
        self._layout = reference.dispatch_layout(
            case.topk_idx[rank],
            num_experts=case.num_experts,
            num_ranks=num_ranks,
            ranks_per_node=RANKS_PER_NODE or num_ranks,
        )
        self._mine = everyone[rank]
        self._again = reference.dispatch_cached(again, everyone, sf)[rank]
        self._combined = reference.combine(
            [2 * each.recv_x for each in everyone],
            everyone,
            num_tokens=case.num_tokens,
            bias=bias,
            ranks_per_node=RANKS_PER_NODE,
        )[rank]
        self._num_experts = case.num_experts
        self._capacity = 0 if mode in ("exact", "flags") else sum(case.num_tokens)
        self._writer, self._buffer, self._mode = writer, buffer, mode
        given = x, sf, case.topk_idx, case.topk_weights, again, bias
        self._inputs = [writer.input(each[rank]) for each in given]
        num_rows = self._capacity or self._mine.num_recv_tokens
        self._y = writer.input(np.zeros((num_rows, HIDDEN), np.float32))
        self._flags = writer.input(self._layout.is_token_in_rank)
        self._counts = writer.input(self._layout.num_tokens_per_expert)
        self.results = Results()

    def enqueue(self, *, is_late: bool) -> None:
        writer, buffer, add, mine = self._writer, self._buffer, self.results.add, self._mine
        x, sf, ids, weights, again, bias = self._inputs
        with_ids = self._mode != "flags"
        received = slice(mine.num_recv_tokens)

        writer.write(ids, is_late=is_late)
        layout = buffer.get_dispatch_layout(ids.given, self._num_experts, **self._schedule())
        layout.event.current_stream_wait()
        add("tokens per rank", layout.num_tokens_per_rank, self._layout.num_tokens_per_rank)
        add("tokens per expert", layout.num_tokens_per_expert, self._layout.num_tokens_per_expert)
        add("tokens in ranks", layout.is_token_in_rank, self._layout.is_token_in_rank)
        writer.spoil(ids)

        routing = (ids, weights) if with_ids else (self._flags, self._counts)
        writer.write(x, sf, *routing, is_late=is_late)
        names = ("topk_idx", "topk_weights") if with_ids else ("is_token_in_rank", "num_tokens_per_expert")
        options = {name: each.given for name, each in zip(names, routing, strict=True)}
        out = buffer.dispatch(
            (x.given, sf.given),
            num_experts=self._num_experts,
            num_worst_tokens=self._capacity,
            **options,
            **self._schedule(),
        )
        out.event.current_stream_wait()
        add("x", out.recv_x[0], mine.recv_x, received)
        add("scale factors", out.recv_x[1], mine.recv_sf, received)
        if with_ids:
            add("ids", out.recv_topk_idx, mine.recv_topk_idx, received)
            add("weights", out.recv_topk_weights, mine.recv_topk_weights, received)
        writer.spoil(x, sf, *routing)

        writer.write(again, sf, is_late=is_late)
        cached = buffer.dispatch((again.given, sf.given), handle=out.handle, **self._schedule())
        cached.event.current_stream_wait()
        add("x again", cached.recv_x[0], self._again[0], received)
        writer.spoil(again, sf)

        y = self._y
        writer.write_twice(out.recv_x[0], y, is_late=is_late)
        bias.write()
        back = buffer.combine(y.given, out.handle, bias=bias.given, **self._schedule())
        back.event.current_stream_wait()
        add("combined x", back.combined_x, self._combined.x)
        writer.spoil(y, bias)

    def _schedule(self) -> dict[str, Any]:
        is_async = self._mode == "async"
        return {"previous_event": Buffer.capture(), "async_finish": True} if is_async else {}


class LowLatencyLayer:
    """low_latency_dispatch and combine, with statistics and a target of the caller's."""

    def __init__(self, writer: Writer, buffer: Buffer, seed: int, mode: str) -> None:
        rank = buffer.rank
        case = wide_case(
            seed,
            buffer.num_ranks,
            num_tokens=NUM_TOKENS,
            hidden=HIDDEN,
            num_topk=NUM_TOPK,
            num_local_experts=NUM_LOCAL_EXPERTS,
        )
        x = [random_values(case.rng, (count, HIDDEN), BF16) for count in case.num_tokens]
        ids, weights = case.topk_idx, case.topk_weights
        self._layout = ("expert", "rank")[seed % 2]
        everyone = reference.low_latency_dispatch(
            x,
            ids,
            num_max_dispatch_tokens_per_rank=NUM_TOKENS,
            num_experts=case.num_experts,
            use_fp8=False,
            layout=self._layout,
        )
        mine = self._mine = everyone[rank]
        if mine.expert_rows is None:
            self._where: Any = mine.recv_count[:, None] > np.arange(mine.src_info.shape[1])
        else:
            self._where = np.zeros(mine.src_info.shape[1], bool)
            self._where[mine.expert_rows[mine.expert_rows >= 0]] = True
            self._where = self._where.reshape(mine.recv_x.shape[:2])
        y = [expert_outputs(case.rng, (*each.src_info.shape, HIDDEN)) for each in everyone]
        self._combined = reference.low_latency_combine(y, everyone, ids, weights, reduce="rank")[rank]
        self._num_experts = case.num_experts
        self._writer, self._buffer, self._mode = writer, buffer, mode
        self._x, self._ids, self._weights = (writer.input(each[rank]) for each in (x, ids, weights))
        contiguous = (
            np.full(NUM_LOCAL_EXPERTS, 5, np.int32),
            y[rank],
            np.zeros((len(x[rank]), HIDDEN), BF16),
        )
        self._stats, self._y, self._target = (writer.input(each, is_contiguous=True) for each in contiguous)
        self.results = Results()

    def enqueue(self, *, is_late: bool) -> None:
        writer, buffer, add, mine = self._writer, self._buffer, self.results.add, self._mine
        inputs = x, ids, weights, stats = self._x, self._ids, self._weights, self._stats
        has_hook = self._mode == "hook"

        writer.write(*inputs, is_late=is_late)
        out = buffer.low_latency_dispatch(
            x.given,
            ids.given,
            NUM_TOKENS,
            self._num_experts,
            stats.given,
            use_fp8=False,
            return_recv_hook=has_hook,
            topk_weights=weights.given if has_hook else None,
            layout=self._layout,
        )
        if out.hook is not None:
            out.hook()
        add("counts", out.recv_count, mine.recv_count)
        add("statistics", stats.array, mine.recv_count + np.int32(5))
        add("source tokens", out.handle.src_info, mine.src_info)
        add("x", out.recv_x, mine.recv_x, self._where)
        writer.spoil(*inputs)

        inputs = y, ids, weights, target = self._y, self._ids, self._weights, self._target
        writer.write(*inputs, is_late=is_late)
        back = buffer.low_latency_combine(
            y.given, ids.given, weights.given, out.handle, out=target.given, return_recv_hook=has_hook
        )
        if back.hook is not None:
            back.hook()
        assert back.combined_x is target.given
        add("combined x", target.array, self._combined)
        writer.spoil(*inputs)


LAYERS: dict[str, Callable[[Writer, Buffer, int], Layer]] = {
    "exact": partial(NormalLayer, mode="exact"),
    "worst": partial(NormalLayer, mode="worst"),
    "async": partial(NormalLayer, mode="async"),
    "flags": partial(NormalLayer, mode="flags"),
    "low-latency": partial(LowLatencyLayer, mode="low-latency"),
    "hook": partial(LowLatencyLayer, mode="hook"),
}


def producer_buffer(group: Group) -> Any:
    return cuda_buffer(
        group,
        low_latency_mode=True,
        num_nvl_bytes=SLAB_BYTES,
        allow_nvlink_for_low_latency_mode=not WITH_PUTS_ALONE,
        timeout_s=TIMEOUT_S,
    )


def wrong_results(writer: Writer, buffer: Buffer, modes: Iterable[str], rounds: Iterable[int]) -> list[str]:
    """What is not as the oracle has it. In a round inputs of the rank of its number are late, or of all."""
    wrong = []
    for mode in modes:
        for number in rounds:
            layer = LAYERS[mode](writer, buffer, number)
            layer.enqueue(is_late=number in (buffer.rank, ALL_LATE))
            wrong += [f"{mode}, round {number}: {name}" for name in writer.wrong(layer.results)]
    return wrong


def is_reached(event: Any, limit_s: float) -> bool:
    """Whether an event is, soon."""
    end = time.monotonic() + limit_s
    while not event.done:
        if time.monotonic() > end:
            return False
        time.sleep(1e-3)
    return True


@ALL_WAYS
@pytest.mark.parametrize(
    "modes", [("exact", "worst", "async", "flags"), ("low-latency", "hook")], ids=" ".join
)
def test_calls_in_the_order_of_streams(place: str, modes: tuple[str, ...], how: str) -> None:
    """Slow writers in front of every call, its results used at once, and its inputs spoiled behind it."""

    def body(group: Group) -> None:
        with producer_buffer(group) as buffer:
            writer = Writer(how, buffer)
            assert wrong_results(writer, buffer, modes, (*range(group.size), ALL_LATE)) == []
            assert writer.asked() == set()
            assert (buffer.stats.num_copied_inputs > 0) == WAYS[how].is_strided

    run_ranks(place, body, num_virtual_ranks=2)


@OTHER_STREAMS
def test_calls_do_not_wait_for_the_default_stream(place: str, how: str) -> None:
    """Calls of all kinds are done while it is still busy.

    Not those behind `Buffer.capture`, which is a point in the current streams of every framework.
    """
    modes = [mode for mode in LAYERS if mode != "async"]

    def body(group: Group) -> None:
        with producer_buffer(group) as buffer:
            writer = Writer(how, buffer)
            # Finds all memory: the driver would wait for all streams.
            wrong_results(writer, buffer, modes, [NONE_LATE])
            is_first = place != "virtual" or group.rank == 0
            busy = cupy.cuda.Event(disable_timing=True)
            writer.shut()
            group.barrier()
            try:
                if is_first:
                    writer.hold(cupy.cuda.Stream.null, cycles=MOST_CYCLES, is_gated=True)
                    busy.record(cupy.cuda.Stream.null)
                group.barrier()
                wrong = wrong_results(writer, buffer, modes, [NONE_LATE])
                group.barrier()
                was_busy = not is_first or not busy.done
            finally:
                writer.open()
            busy.synchronize()
            group.barrier()
            assert was_busy
            assert wrong == []

    run_ranks(place, body, num_virtual_ranks=2)


@OTHER_STREAMS
def test_calls_wait_for_the_producer_and_the_default_stream_does_not(place: str, how: str) -> None:
    """What every call depends on is held back: the calls are enqueued, and the default stream goes on."""

    def body(group: Group) -> None:
        with producer_buffer(group) as buffer:
            writer = Writer(how, buffer)
            for is_held in (False, True):  # the first time finds all memory
                layers = [LAYERS[mode](writer, buffer, 1) for mode in ("worst", "low-latency")]
                ends, default = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
                writer.shut()
                group.barrier()
                try:
                    if is_held:
                        writer.hold(writer.own, cycles=MOST_CYCLES, is_gated=True)
                    for layer in layers:
                        layer.enqueue(is_late=False)
                    ends.record(writer.main)
                    default.record(cupy.cuda.Stream.null)
                    default_goes_on = is_reached(default, 1.0)
                    if is_held:
                        time.sleep(0.2)
                    was_pending = not ends.done
                    group.barrier()
                finally:
                    writer.open()
                wrong = [name for layer in layers for name in writer.wrong(layer.results)]
                group.barrier()
                assert default_goes_on
                assert was_pending or not is_held
                assert wrong == []

    run_ranks(place, body, num_virtual_ranks=2)


@ALL_WAYS
def test_results_are_arrays_of_cupy_where_they_landed(place: str, how: str) -> None:
    """Plain producers get CuPy's arrays; contiguous inputs and results are not copied."""

    def body(group: Group) -> None:
        way = WAYS[how]
        with producer_buffer(group) as buffer:
            engine: Any = buffer._engine
            domain = engine._domain

            def is_in_slab(array: Any) -> bool:
                return bool(0 <= array.data.ptr - domain.base < domain.pool.num_bytes)

            writer = Writer(how, buffer)
            x = np.full((NUM_TOKENS, HIDDEN), group.rank + 1, np.float32)
            columns = np.arange(NUM_TOKENS)[:, None] % group.size
            weights = np.ones(columns.shape, np.float32)
            given = [writer.input(each) for each in (x, columns, weights)]
            writer.write(*given, is_late=False)
            rows, ids, topk_weights = (each.given for each in given)
            layout = buffer.get_dispatch_layout(ids, group.size)
            assert type(layout.num_tokens_per_rank) is cupy.ndarray
            assert type(layout.num_tokens_per_expert) is cupy.ndarray
            assert type(layout.is_token_in_rank) is cupy.ndarray
            out = buffer.dispatch(rows, topk_idx=ids, topk_weights=topk_weights, num_experts=group.size)
            for result in (out.recv_x, out.recv_topk_idx, out.recv_topk_weights):
                assert type(result) is cupy.ndarray
                assert is_in_slab(result)
            assert buffer.stats.num_copied_inputs == 4 * way.is_strided

            # Whoever gives memory of the slab is known by its address.
            y = buffer.empty(out.recv_x.shape, "float32")
            assert is_in_slab(y)
            kind = cupy.cuda.runtime.memcpyDeviceToDevice
            cupy.cuda.runtime.memcpyAsync(y.data.ptr, out.recv_x.data.ptr, y.nbytes, kind, writer.main.ptr)
            follow(writer.own, writer.main)
            back = buffer.combine(way.give(y, writer.own), out.handle)
            assert type(back.combined_x) is cupy.ndarray
            assert same_bits(fetch(back.combined_x), x)
            assert buffer.stats.num_staged_inputs == 0
            elsewhere = writer.input(np.zeros(out.recv_x.shape, np.float32))
            writer.write_twice(out.recv_x, elsewhere, is_late=False)
            assert same_bits(fetch(buffer.combine(elsewhere.given, out.handle).combined_x), 2 * x)
            assert buffer.stats.num_staged_inputs == 1
            assert buffer.stats.num_copied_results == 0

            short = writer.input(x.astype(BF16))
            writer.write(short, is_late=False)
            for which in ("expert", "rank"):
                low = buffer.low_latency_dispatch(
                    short.given, ids, NUM_TOKENS, group.size, use_fp8=False, layout=which
                )
                outputs = writer.input(
                    np.ones((1, group.size * NUM_TOKENS, HIDDEN), BF16), is_contiguous=True
                )
                writer.write(outputs, is_late=False)
                done = buffer.low_latency_combine(outputs.given, ids, topk_weights, low.handle)
                for result in (low.recv_x, low.recv_count, low.handle.src_info, done.combined_x):
                    assert type(result) is cupy.ndarray
                if which == "rank" and not LOW_LATENCY_OVER_NETWORK:
                    assert is_in_slab(low.recv_x)
                assert same_bits(fetch(done.combined_x), np.ones(x.shape, BF16))
            # Of each call the ids, and the weights of combines.
            assert buffer.stats.num_copied_inputs == (10 + 2 * way.names_bfloat16) * way.is_strided
            assert writer.asked() == set()

    run_ranks(place, body, num_virtual_ranks=2)

"""The expert-major layout on GPUs against the oracle, eager and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import pytest
from host_cases import Array, Case, ExpertMajorCase, random_values, same_bits
from ranks import PLACES, RANKS_PER_NODE, device_count, run_ranks

import ep_rt
from ep_rt import Buffer, Config, Group, reference
from ep_rt.cuda.handle import CudaDispatchHandle
from ep_rt.moe_sizes import MoeSizes

if device_count():
    import cupy
    from device_arrays import cuda_buffer, fetch, overwrite, poison, put
    from normal_cases import carried, check_normal, wide_case

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("place", PLACES)]

T = TypeVar("T")
SUMMED = (ml_dtypes.bfloat16, np.float16, np.float32)


def run(place: str, body: Callable[[Group], T]) -> list[T]:
    return run_ranks(place, body, num_virtual_ranks=4)


def check_expert_major(
    buffer: Buffer,
    seed: int,
    *,
    is_exact: bool = True,
    case: Case | None = None,
    num_sms: int = 16,
    framework: str = "cupy",
    carry: Callable[[Any], Any] = lambda handle: handle,
    **options: Any,
) -> list[Any]:
    """One random layer; the results, for whoever keeps them. `carry` as in `check_normal`."""
    drawn = ExpertMajorCase.draw(seed, buffer.num_ranks, is_exact=is_exact, case=case)
    case, rank = drawn.case, buffer.rank
    config = Config(num_sms=num_sms)
    e, zero_padding = drawn.expanded[rank], bool(seed % 2)

    def payload(pair: tuple[Array, Array | None]) -> Any:
        x, sf = pair
        return put(x, framework) if sf is None else (put(x, framework), put(sf, framework))

    def check_rows(recv: Any, x: Array, sf: Array | None, *, zero_padding: bool) -> None:
        recv_x, recv_sf = (recv, None) if sf is None else recv
        drawn.check_rows(rank, fetch(recv_x, x.dtype), x, zero_padding=zero_padding)
        if sf is not None:
            drawn.check_rows(rank, fetch(recv_sf), sf, zero_padding=zero_padding)

    ids = case.topk_idx[rank].astype((np.int64, np.int32)[seed % 2])
    out = buffer.dispatch(
        payload(drawn.payload[rank]),
        topk_idx=put(ids, framework),
        topk_weights=None if drawn.topk_weights is None else put(drawn.topk_weights[rank], framework),
        num_experts=case.num_experts,
        expert_alignment=drawn.alignment,
        num_worst_tokens=drawn.num_worst_tokens,
        config=config,
        layout="expert",
        zero_padding=zero_padding,
        quantize=drawn.quantize,
        num_max_tokens_per_rank=drawn.num_max_tokens_per_rank,
        **options,
    )
    out.event.current_stream_wait()
    check_rows(out.recv_x, e.x, e.sf, zero_padding=zero_padding)
    assert out.recv_topk_idx is None
    if e.weights is None:
        assert out.recv_topk_weights is None
    else:
        assert same_bits(fetch(out.recv_topk_weights), e.weights)
    assert same_bits(fetch(out.handle.psum_num_tokens_per_expert), e.psum_num_tokens_per_expert)
    assert out.num_recv_tokens_per_expert_list == drawn.dispatched[rank].num_recv_tokens_per_expert
    handle = carry(out.handle)
    assert (handle.layout, handle.num_recv_rows) == ("expert", len(e.row))
    if not is_exact:  # else only the host is told
        assert handle.num_recv_tokens_per_expert_list == drawn.dispatched[rank].num_recv_tokens_per_expert
    assert handle.num_recv_tokens == drawn.dispatched[rank].num_recv_tokens
    assert (handle.num_needed_rows, handle.overflow) == (e.num_needed_rows, e.overflow)

    cached = buffer.dispatch(
        payload(drawn.again[rank]),
        handle=handle,
        config=config,
        quantize=drawn.quantize,
        zero_padding=not zero_padding,
        **options,
    )
    cached.event.current_stream_wait()
    check_rows(cached.recv_x, *drawn.expanded_again(rank), zero_padding=not zero_padding)
    assert cached.recv_topk_idx is cached.recv_topk_weights is None

    rng = case.rng
    summed = SUMMED[seed % 3]
    y = [random_values(rng, (len(each.row), case.hidden), summed) for each in drawn.expanded]
    weights = [rng.random(len(each.row), np.float32) - 0.5 for each in drawn.expanded] if seed % 5 else None
    shapes = [(count, case.hidden) for count in case.num_tokens]
    biases = [tuple(random_values(rng, each, summed) for _ in range(seed // 3 % 3)) for each in shapes]
    combined = drawn.combined(y, weights, biases, ranks_per_node=RANKS_PER_NODE)[rank]
    if seed % 2 and framework == "cupy":
        mine_y = buffer.empty(y[rank].shape, y[rank].dtype)
        overwrite(mine_y, y[rank])
    else:
        mine_y = put(y[rank], framework)
    back = buffer.combine(
        mine_y,
        handle,
        topk_weights=None if weights is None else put(weights[rank], framework),
        bias=tuple(put(each, framework) for each in biases[rank]) or None,
        config=config,
        **options,
    )
    back.event.current_stream_wait()
    assert same_bits(fetch(back.combined_x), combined.x)
    assert back.combined_topk_weights is None
    return [out, cached, back]


@pytest.mark.parametrize("is_exact", [True, False])
def test_copies_of_the_bytes_of_a_handle_stand_for_it(place: str, is_exact: bool) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(12):
                check_expert_major(buffer, seed, is_exact=is_exact, carry=partial(carried, buffer))

    run(place, body)


@pytest.mark.parametrize("num_sms", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("is_exact", [True, False])
def test_random_layers_equal_the_oracle(place: str, is_exact: bool, num_sms: int) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(24):
                if seed % 4 == 0:
                    gc.collect()
                    poison(buffer, 0xFF if seed % 8 else 0xA5)
                check_expert_major(buffer, seed, is_exact=is_exact, num_sms=num_sms)
                check_normal(buffer, seed, num_sms=num_sms)  # what one leaves does not disturb the other

    run(place, body)


@pytest.mark.parametrize("num_sms", [2, 16])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_topk", "num_local_experts"),
    [(400, 7168, 8, 32), (300, 128, 2, 1), (257, 16384, 1, 3), (130, 1920, 64, 64), (1500, 128, 6, 512)],
)
def test_shapes_of_models(
    place: str, num_tokens: int, hidden: int, num_topk: int, num_local_experts: int, num_sms: int
) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group, num_nvl_bytes=512 << 20) as buffer:
            for seed in (0, 3, 6):  # bfloat16, bfloat16 cast to FP8, float16; alignments 1, 8, 3
                case = wide_case(
                    seed,
                    group.size,
                    num_tokens=num_tokens,
                    hidden=hidden,
                    num_topk=min(num_topk, group.size * num_local_experts),
                    num_local_experts=num_local_experts,
                )
                check_expert_major(buffer, seed, case=case, num_sms=num_sms)

    run(place, body)


def test_torch(place: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")

    def body(group: Group) -> None:
        torch.cuda.set_device(cupy.cuda.runtime.getDevice())
        with torch.cuda.stream(torch.cuda.Stream()), cuda_buffer(group) as buffer:
            for seed in range(8):
                check_expert_major(buffer, seed, is_exact=seed < 6, framework="torch")

    run(place, body)


def test_any_number_of_tokens_in_turn(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(3):
                for number, num_tokens in enumerate((64, 1, 0, 13, 300, 2, 64)):
                    case = wide_case(
                        number,
                        group.size,
                        num_tokens=num_tokens,
                        hidden=136,
                        num_topk=3,
                        num_local_experts=4,
                    )
                    check_expert_major(buffer, seed, case=case)

    run(place, body)


def test_no_tokens(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for num_tokens, num_worst_tokens in ((0, 0), (5, 0), (0, 4), (5, 4)):
                x = np.ones((num_tokens, 64), np.float32)
                ids = np.full((num_tokens, 3), -1, np.int64)
                out = buffer.dispatch(
                    put(x),
                    topk_idx=put(ids),
                    num_experts=2 * group.size,
                    expert_alignment=128,
                    num_worst_tokens=num_worst_tokens,
                    layout="expert",
                    zero_padding=True,
                    num_max_tokens_per_rank=num_tokens,
                )
                assert same_bits(fetch(out.recv_x), np.zeros((num_worst_tokens, 64), np.float32))
                assert fetch(out.handle.psum_num_tokens_per_expert).tolist() == [0, 0]
                assert not out.handle.overflow
                y = put(np.full((num_worst_tokens, 64), np.nan, np.float32))
                back = buffer.combine(y, out.handle)
                assert same_bits(fetch(back.combined_x), np.zeros((num_tokens, 64), np.float32))

    run(place, body)


def test_all_tokens_to_one_expert_many_times(place: str) -> None:
    def body(group: Group) -> None:
        num_tokens, num_topk, hidden = 60, 64, 256
        rng = np.random.default_rng(3)
        counts = [num_tokens - 5 * rank for rank in range(group.size)]
        case = Case(
            rng=rng,
            num_ranks=group.size,
            num_experts=3 * group.size,
            num_tokens=counts,
            topk_idx=[np.full((count, num_topk), 1, np.int64) for count in counts],
            topk_weights=[rng.random((count, num_topk), np.float32) for count in counts],
            hidden=hidden,
        )
        with cuda_buffer(group, num_nvl_bytes=256 << 20) as buffer:
            for seed in (0, 2):
                check_expert_major(buffer, seed, case=case)

    run(place, body)


def test_asynchronous_calls_and_kept_results(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            kept: list[Any] = []
            for seed in range(40):
                options: dict[str, Any] = {}
                if seed % 3:
                    options = {"async_finish": True, "previous_event": Buffer.capture()}
                results = check_expert_major(
                    buffer, seed, is_exact=seed % 4 != 1, num_sms=1 + seed % 16, **options
                )
                kept.append((fetch(results[2].combined_x), results))
                if len(kept) > 4:
                    kept.pop(seed % 4)
                for combined, held in kept:
                    assert same_bits(fetch(held[2].combined_x), combined)
            del results, held
            kept.clear()
            gc.collect()
            assert buffer.stats.slab.used_bytes == 0

    run(place, body)


@pytest.mark.parametrize("is_bounded", [False, True])
def test_graph_with_changing_routing(place: str, is_bounded: bool) -> None:
    def body(group: Group) -> None:
        num_local_experts, hidden, num_tokens, alignment = 4, 512, 64, 8
        num_experts, capacity = num_local_experts * group.size, 184 * group.size
        rng = np.random.default_rng(5)

        def draw() -> tuple[list[Any], list[Any], list[Any]]:
            x = [random_values(rng, (num_tokens, hidden), ml_dtypes.bfloat16) for _ in range(group.size)]
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
                    expert_alignment=alignment,
                    num_worst_tokens=capacity,
                    layout="expert",
                    zero_padding=True,
                    num_max_tokens_per_rank=num_tokens if is_bounded else None,
                )
                return out, buffer.combine(out.recv_x, out.handle, topk_weights=out.recv_topk_weights)

            layer()
            stream.begin_capture()
            out, back = layer()
            graph = stream.end_capture()
            graph.upload(stream)
            stream.synchronize()
            group.barrier()
            saw_overflow = set()
            for number in range(12):
                x, ids, weights = drawn = draw()
                if number == 3:  # everything to one rank: more than fits
                    ids[:] = [np.full((num_tokens, 3), 1, np.int64)] * group.size
                for array, values in zip(given, drawn, strict=True):
                    overwrite(array, values[group.rank])
                for _ in range(1 + number % 3):
                    graph.launch(stream)
                stream.synchronize()
                dispatched = reference.dispatch(
                    x, ids, num_experts=num_experts, topk_weights=weights, num_worst_tokens=capacity
                )
                expanded = [
                    reference.expand(
                        each,
                        num_local_experts=num_local_experts,
                        alignment=alignment,
                        num_worst_tokens=capacity,
                    )
                    for each in dispatched
                ]
                mine = expanded[group.rank]
                assert same_bits(fetch(out.recv_x), mine.x)
                assert same_bits(fetch(out.recv_topk_weights), mine.weights)
                psum = out.handle.psum_num_tokens_per_expert
                assert same_bits(fetch(psum), mine.psum_num_tokens_per_expert)
                assert out.handle.num_needed_rows == mine.num_needed_rows
                assert out.handle.overflow == mine.overflow
                saw_overflow.add(mine.overflow)
                collapsed = [reference.collapse(e.x, e, capacity, weighted=True) for e in expanded]
                combined = reference.combine(
                    collapsed,
                    dispatched,
                    num_tokens=[num_tokens] * group.size,
                    ranks_per_node=RANKS_PER_NODE,
                )
                assert same_bits(fetch(back.combined_x), combined[group.rank].x)
                check_expert_major(buffer, number, num_sms=4)  # eager calls between replays
            assert group.rank != 0 or saw_overflow == {False, True}

    run(place, body)


@pytest.mark.parametrize("for_moe", [False, True])
def test_room_for_what_arrives_is_enough(place: str, for_moe: bool) -> None:
    """Not for all rows that it may become."""

    def body(group: Group) -> None:
        num_tokens, hidden, num_topk = 64, 1024, 8
        case = wide_case(
            0,
            group.size,
            num_tokens=num_tokens,
            hidden=hidden,
            num_topk=num_topk,
            num_local_experts=num_topk,
        )
        num_arriving = num_tokens * group.size
        worst: dict[str, Any] = {
            "topk_idx": put(case.topk_idx[group.rank]),
            "topk_weights": put(case.topk_weights[group.rank]),
            "num_experts": case.num_experts,
            "num_worst_tokens": num_arriving * num_topk,
            "layout": "expert",
        }
        x = np.full((case.num_tokens[group.rank], hidden), group.rank + 1, np.float32)
        # Two rows for each token that may come, its scale factors, ids and weights.
        options: dict[str, Any] = {
            "num_nvl_bytes": 2 * (num_arriving * (4 * hidden + 224 + 12 * num_topk) + 1024)
        }
        bound: dict[str, Any] = {"num_max_tokens_per_rank": num_tokens}
        if for_moe:
            sizes = {"hidden": hidden, "num_experts": case.num_experts, "num_topk": num_topk}
            options["moe"], bound = MoeSizes(num_tokens, **sizes, dtype="float32"), {}
        with cuda_buffer(group, **options) as buffer:
            if not for_moe:
                with pytest.raises(ep_rt.ConfigError, match="num_max_tokens_per_rank= would say"):
                    buffer.dispatch(put(x), **worst)
            for _ in range(3):
                out = buffer.dispatch(put(x), **worst, **bound)
                handle = out.handle
                assert isinstance(handle, CudaDispatchHandle)
                assert handle.num_recv_rows == num_arriving * num_topk
                assert handle.landed.num_landed_rows == num_arriving
                assert not handle.overflow
                back = buffer.combine(out.recv_x, handle)
                assert (fetch(back.combined_x) == num_topk * x).all()
                again = buffer.dispatch(put(2 * x), handle=handle)
                back = buffer.combine(again.recv_x, handle)
                assert (fetch(back.combined_x) == 2 * num_topk * x).all()
            for seed in (2, 4, 8):  # with a bound, that of the case
                check_expert_major(buffer, seed, is_exact=False, case=case)

    run(place, body)


def test_more_tokens_than_the_bound_are_refused(place: str) -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:

            def call(num_tokens: int) -> Any:
                x, ids = np.ones((num_tokens, 16), np.float32), np.zeros((num_tokens, 1), np.int64)
                return buffer.dispatch(
                    put(x),
                    topk_idx=put(ids),
                    num_experts=group.size,
                    num_worst_tokens=100,
                    layout="expert",
                    num_max_tokens_per_rank=6,
                )

            for num_tokens in (4, 6, 5):
                assert call(num_tokens).handle.num_recv_tokens == (
                    num_tokens * group.size if group.rank == 0 else 0
                )
                with pytest.raises(ep_rt.ConfigError, match="x has 7 tokens; num_max_tokens_per_rank=6"):
                    call(7)
            check_expert_major(buffer, 9)

    run(place, body)


def test_misuse_is_refused_before_anything_happens(place: str) -> None:
    def body(group: Group) -> None:
        x = put(np.ones((4, 16), np.float32))
        with cuda_buffer(group) as buffer:
            wide = put(np.zeros((4, 65), np.int64))
            with pytest.raises(ep_rt.ConfigError, match="at most 64"):
                buffer.dispatch(x, topk_idx=wide, num_experts=group.size, layout="expert")
            ids = put(np.zeros((4, 1), np.int64))
            with pytest.raises(ep_rt.ConfigError, match="from 1 to"):
                buffer.dispatch(
                    x, topk_idx=ids, num_experts=group.size, layout="expert", expert_alignment=2**31
                )
            by_rank = buffer.dispatch(x, topk_idx=ids, num_experts=group.size)
            with pytest.raises(ep_rt.HandleError, match="layout='rank'"):
                buffer.dispatch(x, handle=by_rank.handle, layout="expert")
            check_expert_major(buffer, 7)

    run(place, body)

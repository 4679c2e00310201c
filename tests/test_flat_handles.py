"""Handles as arrays of bytes: they stand for the handle, and say what they hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cases import Case, random_bits, same_bits

import ep_rt
from ep_rt import Buffer, Group, arrays
from ep_rt.cuda import flat as cuda_flat
from ep_rt.cuda.handle import RESULT_OFFSET, CudaHandleShape, routing_bytes
from ep_rt.cuda.internode import Internode
from ep_rt.cuda.layout import DISPATCH_RESULT
from ep_rt.handle import DispatchHandle, FlatField, FlatShape, HandleShape


def shape_of(
    handle: DispatchHandle, case: Case, alignment: int, num_worst_tokens: int, num_max_tokens: int | None
) -> FlatShape:
    num_landed_rows = num_worst_tokens or handle.num_recv_tokens
    if num_max_tokens is not None:
        num_landed_rows = min(num_landed_rows, case.num_ranks * num_max_tokens)
    return FlatShape(
        handle=handle.shape,
        num_landed_rows=num_landed_rows,
        num_local_experts=case.num_experts // case.num_ranks,
        expert_alignment=alignment,
        is_exact=num_worst_tokens == 0,
    )


def numbers(parts: list[Any], field: FlatField) -> list[int]:
    held = parts[field.array][field.offset : field.offset + 4 * field.length]
    found: list[int] = held.view("<i4").tolist()
    return found


@pytest.mark.parametrize("num_worst_tokens", [0, 7, 500])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("seed", range(4))
def test_a_flat_handle_stands_for_the_handle(seed: int, layout: str, num_worst_tokens: int) -> None:
    def run(group: Group) -> None:
        case = Case.draw(seed, 4, hidden=16)
        num_max_tokens = max(case.num_tokens) if layout == "expert" and seed % 2 else None
        x = random_bits(np.random.default_rng(group.rank), (case.num_tokens[group.rank], 16), np.uint8)
        with Buffer(group, backend="host") as buffer:
            sent = buffer.dispatch(
                x,
                topk_idx=case.topk_idx[group.rank],
                num_experts=case.num_experts,
                expert_alignment=1 + seed,
                num_worst_tokens=num_worst_tokens,
                layout=layout,
                num_max_tokens_per_rank=num_max_tokens,
            )
            handle = sent.handle
            shape = shape_of(handle, case, 1 + seed, num_worst_tokens, num_max_tokens)
            at = buffer.flat_layout(shape)
            parts = buffer.flatten_handle(handle, shape, "numpy")
            assert [len(part) for part in parts] == list(at.num_bytes)
            assert numbers(parts, at.num_recv_tokens) == [handle.num_recv_tokens]
            assert numbers(parts, at.num_needed_rows) == [handle.num_needed_rows]
            assert numbers(parts, at.expert_counts) == handle.num_recv_tokens_per_expert_list
            if layout == "expert":
                assert numbers(parts, at.psum) == handle.psum_num_tokens_per_expert.tolist()
                rows = [row for row in numbers(parts, at.expert_row) if row >= 0]
                assert len(set(rows)) == len(rows)
                assert all(row < handle.num_recv_rows for row in rows)
            again = buffer.unflatten_handle(shape, parts)
            assert again.num_recv_tokens_per_rank == handle.num_recv_tokens_per_rank
            assert again.overflow == handle.overflow
            for part in parts:
                part[:] = 255  # it has copies
            kept = min(handle.num_recv_tokens, handle.num_recv_rows)
            with_it, with_flat = (
                buffer.dispatch(x, handle=each, zero_padding=layout == "expert") for each in (handle, again)
            )
            if layout == "rank":
                assert same_bits(with_flat.recv_x[:kept], sent.recv_x[:kept])
            else:
                assert same_bits(with_flat.recv_x, with_it.recv_x)
            y = np.ones((handle.num_recv_rows, 4), np.float32)
            sums = [buffer.combine(y, each).combined_x for each in (handle, again)]
            assert same_bits(sums[1], sums[0])

    ep_rt.run_local(run, 4, timeout_s=20)


def of_nodes(num_nodes: int, *, max_tokens: int) -> Internode | None:
    """What is known of them, two ranks each, without a network."""
    if num_nodes == 1:
        return None
    made = object.__new__(Internode)
    made.num_nodes, made.num_ranks, made.max_tokens = num_nodes, 2 * num_nodes, max_tokens
    return made


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_fields_on_gpus_lie_in_the_memory_of_the_handle(layout: str, num_nodes: int) -> None:
    """Its layout is known without a GPU."""
    shape = FlatShape(HandleShape(7, 3, 90, layout), num_landed_rows=50, num_local_experts=5)
    at = cuda_flat.layout(shape, of_nodes(num_nodes, max_tokens=11))
    assert len(at.num_bytes) == 1 + (layout == "expert") + (num_nodes > 1)
    assert at.num_bytes[0] == routing_bytes(7 + 11 * (num_nodes - 1))
    routing = np.zeros(1, DISPATCH_RESULT)
    routing["num_recv_tokens"], routing["expert_counts"][0, :5] = 41, range(5)
    parts = [np.zeros(size, np.uint8) for size in at.num_bytes]
    parts[0][RESULT_OFFSET : RESULT_OFFSET + DISPATCH_RESULT.itemsize] = routing.view(np.uint8)
    assert numbers(parts, at.num_recv_tokens) == [41]
    assert numbers(parts, at.expert_counts) == list(range(5))
    if layout == "rank":
        assert numbers(parts, at.num_needed_rows) == [41]
        assert at.psum.length == at.expert_row.length == 0
    else:
        parts[1][:8] = np.array([90], "<i8").view(np.uint8)
        assert numbers(parts, at.num_needed_rows) == [90]
        assert len(numbers(parts, at.psum)) == 5
        assert len(numbers(parts, at.expert_row)) == 50 * 3


@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_handle_on_gpus_refers_to_the_arrays(layout: str, num_nodes: int) -> None:
    internode = of_nodes(num_nodes, max_tokens=11)
    shape = FlatShape(HandleShape(7, 3, 90, layout), num_landed_rows=50, num_local_experts=5)
    sizes = cuda_flat.layout(shape, internode).num_bytes
    views = [arrays.view(np.zeros(size, np.uint8), name="part") for size in sizes]
    domain: Any = SimpleNamespace(
        heap=SimpleNamespace(num_released=0), group=SimpleNamespace(size=2), read=None
    )
    handle = cuda_flat.unflatten(shape, views, domain, internode, owner=domain)
    assert [block.pointer for block in cuda_flat.memory(handle)] == [view.pointer for view in views]
    assert (handle.shape, handle.owner) == (shape.handle, domain)
    assert handle.landed == CudaHandleShape(
        num_ranks=2 * num_nodes, num_local_experts=5, expert_alignment=1, num_landed_rows=50
    )
    assert (handle.places is not None) == (layout == "expert")
    if num_nodes == 1:
        assert handle.crossing is None
        return
    crossing = handle.crossing
    assert crossing is not None
    assert crossing.num_nodes == num_nodes
    assert crossing.plan == views[-1].pointer
    assert crossing.positions + 4 * 7 * num_nodes <= views[-1].pointer + sizes[-1]


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_program_over_nodes_is_traced_with_the_sizes_of_its_handles(layout: str) -> None:
    jax = pytest.importorskip("jax")
    import ep_rt.jax

    internode = of_nodes(3, max_tokens=11)
    buffer = Buffer(ep_rt.as_group(), backend="host")
    buffer.flat_layout = lambda shape: cuda_flat.layout(shape, internode)  # type: ignore[method-assign]

    def there_and_back(num_tokens: int) -> Any:
        x, ids = np.ones((num_tokens, 8), np.float32), np.zeros((num_tokens, 3), np.int32)

        def program(x: Any, ids: Any) -> Any:
            sent = ep_rt.jax.dispatch(buffer, x, ids, num_experts=5, num_worst_tokens=90, layout=layout)
            return sent.handle, ep_rt.jax.combine(sent.recv_x, sent.handle).combined_x

        return jax.eval_shape(program, x, ids)

    handle, combined = there_and_back(7)
    sizes = cuda_flat.layout(handle.shape, internode).num_bytes
    assert [part.shape for part in handle.parts] == [(size,) for size in sizes]
    assert handle.num_recv_tokens_per_expert.shape == (5,)
    assert combined.shape == (7, 8)
    with pytest.raises(ep_rt.ConfigError, match="12 tokens"):
        there_and_back(12)

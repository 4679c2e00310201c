"""The normal mode over virtual nodes: what only that has. ``EP_RT_RANKS_PER_NODE=1 mpirun -n 2 pytest ...``

With that variable, or ``EP_RT_NVLINK=0``, all tests of test_normal.py and test_expert_major.py go over the
network, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from host_cases import Case, random_values, same_bits
from ranks import IS_UNDER_MPI, RANKS_PER_GPU, RANKS_PER_NODE, device_count, run_ranks

import ep_rt
from ep_rt import Group, reference
from ep_rt.cuda import plan
from ep_rt.cuda.internode import Internode

if device_count():
    import cupy
    from device_arrays import cuda_buffer, fetch, put
    from normal_cases import check_after_reset, check_bytes, check_normal, raised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_UNDER_MPI and RANKS_PER_NODE),
        reason="needs EP_RT_RANKS_PER_NODE or EP_RT_NVLINK=0, and a process for each GPU",
    ),
]

SHORT_S = 2.0
NUM_ROUNDS = 1000 if RANKS_PER_GPU == 1 else 64


def on_ranks(body: Callable[[Group], None]) -> None:
    run_ranks("mpi", body)


def routing_to(rank: int, num_tokens: int, group: Group, *, by_ranks: bool) -> dict[str, Any]:
    """Arguments of a dispatch of all tokens to one rank. Each has an expert."""
    if not by_ranks:
        return {"topk_idx": put(np.full((num_tokens, 1), rank))}
    goes = np.arange(group.size) == rank
    return {
        "is_token_in_rank": put(np.repeat(goes[None], num_tokens, axis=0)),
        "num_tokens_per_expert": put(np.where(goes, num_tokens, 0).astype(np.int32)),
    }


def test_counts_by_node() -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(8):
                case = Case.draw(seed, group.size)
                ids = case.topk_idx[group.rank]
                out = buffer.get_dispatch_layout(put(ids), case.num_experts)
                expected = reference.dispatch_layout(
                    ids,
                    num_experts=case.num_experts,
                    num_ranks=group.size,
                    ranks_per_node=RANKS_PER_NODE,
                )
                assert same_bits(fetch(out.num_tokens_per_rank), expected.num_tokens_per_rank)
                assert expected.num_tokens_per_node is not None
                assert same_bits(fetch(out.num_tokens_per_rdma_rank), expected.num_tokens_per_node)
                assert same_bits(fetch(out.num_tokens_per_expert), expected.num_tokens_per_expert)
                assert same_bits(fetch(out.is_token_in_rank), expected.is_token_in_rank)

    on_ranks(body)


def test_nodes_are_chosen_and_so_are_gpus() -> None:
    """What the variables say holds without ``backend="cuda"``, too."""

    def body(group: Group) -> None:
        with cuda_buffer(group, backend="auto") as buffer:
            assert RANKS_PER_NODE is not None
            assert buffer.backend == "cuda"
            assert buffer.topology.node_sizes == (RANKS_PER_NODE,) * (group.size // RANKS_PER_NODE)
            check_normal(buffer, 5)

    on_ranks(body)


def test_a_thousand_layers() -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group) as buffer:
            for seed in range(NUM_ROUNDS):
                check_normal(buffer, seed % 64, num_sms=(1, 3, 16)[seed % 3])

    on_ranks(body)


def test_rings_of_one_channel_fill_many_times() -> None:
    """Either way: the buffer has just the memory for that channel, and some ranks send far more rows."""

    def body(group: Group) -> None:
        assert RANKS_PER_NODE is not None
        rank, num_nodes = group.rank, group.size // RANKS_PER_NODE
        rng = np.random.default_rng(0)
        hidden, num_experts, counts = 2048, 2 * group.size, [2000 * (r % 2) + 5 for r in range(group.size)]
        x = [rng.integers(0, 1 << 16, (n, hidden), np.uint16).view(np.float16) for n in counts]
        ids = [rng.integers(-1, num_experts, (n, 4)) for n in counts]
        rings = replace(plan.rings(num_nodes, 0, plan.record_bytes(0, 0)), num_channels=1)
        num_bytes = 2 * rings.num_bytes(num_nodes)
        assert plan.rings(num_nodes, num_bytes, plan.record_bytes(0, 0)) == rings
        num_ring_rows = rings.num_slots * (rings.slot_bytes // x[rank][0].nbytes)
        nodes = np.where(ids[rank] < 0, -1, ids[rank] // (2 * RANKS_PER_NODE))
        for node in set(range(num_nodes)) - {rank // RANKS_PER_NODE}:
            num_rows = int((nodes == node).any(axis=1).sum())
            assert rank % 2 == 0 or num_rows > 4 * num_ring_rows
        expected = reference.dispatch(x, ids, num_experts=num_experts)
        y = [random_values(rng, each.recv_x.shape, np.float16) for each in expected]
        combined = reference.combine(y, expected, num_tokens=counts, ranks_per_node=RANKS_PER_NODE)[rank]
        with cuda_buffer(group, num_nvl_bytes=256 << 20, num_rdma_bytes=num_bytes) as buffer:
            assert buffer.topology.num_nodes == num_nodes
            assert buffer.memory_report().symmetric_bytes == Internode.num_bytes(buffer.topology, rings)
            for _ in range(3):
                out = buffer.dispatch(put(x[rank]), topk_idx=put(ids[rank]), num_experts=num_experts)
                assert same_bits(fetch(out.recv_x), expected[rank].recv_x)
                back = buffer.combine(put(y[rank]), out.handle)
                assert same_bits(fetch(back.combined_x), combined.x)

    on_ranks(body)


@pytest.mark.parametrize("counts", [False, True])
def test_bytes_counted_are_those_planned(counts: bool) -> None:
    """Over the network always, over NVLink where the buffer is told to count."""

    def body(group: Group) -> None:
        with cuda_buffer(group, counts_bytes=counts) as buffer:
            assert len(buffer.stats.network_bytes_by_node) == buffer.topology.num_nodes
            assert buffer.stats.nvlink_bytes == (0 if counts else None)
            for seed in range(6):
                check_bytes(buffer, seed, quantizes=bool(seed % 2))
            assert buffer.stats.network_bytes > 0
            check_normal(buffer, 1)

    on_ranks(body)


@pytest.mark.parametrize("by_ranks", [False, True])
def test_a_missing_rank_is_named_by_its_number_among_all_and_reset_helps(by_ranks: bool) -> None:
    def body(group: Group) -> None:
        missing = group.size - 1
        with cuda_buffer(group, timeout_s=SHORT_S) as buffer:
            check_normal(buffer, 1)
            routing = routing_to(missing, 4, group, by_ranks=by_ranks)
            for _ in range(2):
                group.barrier()
                if group.rank != missing:
                    x, start = put(np.ones((4, 16), np.float32)), time.monotonic()
                    error = raised(partial(buffer.dispatch, x, **routing, num_experts=group.size))
                    assert SHORT_S * 0.9 < time.monotonic() - start < SHORT_S * 4
                    assert isinstance(error, ep_rt.PeerTimeoutError)
                    assert missing in error.peers
                    nodes = buffer.topology.node_of_rank
                    assert error.nodes == tuple(nodes[peer] for peer in error.peers)
                    cupy.cuda.runtime.deviceSynchronize()
                check_after_reset(buffer)

    on_ranks(body)


@pytest.mark.parametrize("by_ranks", [False, True])
def test_what_does_not_fit_is_known_to_its_node(by_ranks: bool) -> None:
    """The ranks of other nodes go on, and all stay in step."""

    def body(group: Group) -> None:
        assert RANKS_PER_NODE is not None
        num_tokens, hidden = 512, 1024
        with cuda_buffer(group, num_nvl_bytes=2 << 20) as buffer:
            routing = routing_to(0, num_tokens, group, by_ranks=by_ranks)
            for _ in range(2):
                error = ""
                try:
                    counts = buffer.dispatch(
                        put(np.ones((num_tokens, hidden), np.float32)), **routing, num_experts=group.size
                    ).num_recv_tokens_per_expert_list
                    assert counts == [0]
                except ep_rt.ConfigError as raised:
                    error = str(raised)
                assert ("does not fit" in error) == (group.rank < RANKS_PER_NODE)
                assert ("rank 0 receives" in error) == (group.rank == 0)
                group.barrier()
            check_normal(buffer, 5)

    on_ranks(body)


def test_ids_on_some_ranks_and_none_on_others_is_an_error_on_all() -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group, timeout_s=SHORT_S) as buffer:
            routing = routing_to(0, 4, group, by_ranks=group.rank == group.size - 1)
            x = put(np.ones((4, 16), np.float32))
            error = raised(partial(buffer.dispatch, x, **routing, num_experts=group.size))
            assert isinstance(error, ep_rt.ConfigError)
            assert "ranks differ" in str(error)
            group.barrier()
            buffer.reset()
            check_normal(buffer, 2)

    on_ranks(body)


def test_too_many_tokens_are_refused() -> None:
    def body(group: Group) -> None:
        with cuda_buffer(group, moe=None) as buffer:
            with pytest.raises(ep_rt.ConfigError, match="num_max_tokens_per_rank"):
                buffer.dispatch(
                    put(np.ones((9000, 8), np.float16)),
                    topk_idx=put(np.zeros((9000, 1), np.int64)),
                    num_experts=group.size,
                )
            check_normal(buffer, 3)

    on_ranks(body)

"""Calls over several nodes from end to end, as a buffer makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ep_rt.cuda.layout import MAX_NODES, SLAB_HEADER

from .kernels import Kernels
from .machine import FoundError
from .planting import Mutation, sources_with
from .support import needs_emulator
from .two_level import TwoLevel

pytestmark = needs_emulator


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize("is_virtual", [False, True])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 2), (2, 4), (4, 2)])
def test_layers_equal_the_oracle(
    num_nodes: int, num_local_ranks: int, is_virtual: bool, architecture: int
) -> None:
    for drawing in range(2):
        rng = np.random.default_rng(drawing)
        load = Kernels(architecture=architecture)
        ranks = TwoLevel(num_nodes, num_local_ranks, load, is_virtual=is_virtual)
        for _ in range(2):
            ranks.layer(rng, max_tokens=8)
        ranks.compare_bytes()
        for seed in range(4):
            ranks.machine.run(seed)


def test_a_layer_of_the_most_nodes_equals_the_oracle() -> None:
    ranks = TwoLevel(MAX_NODES, 1, Kernels())
    ranks.layer(np.random.default_rng(0), max_tokens=3)
    ranks.compare_bytes()
    ranks.machine.run(0)


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 2), (4, 1)])
def test_copies_of_the_bytes_of_a_handle_stand_for_it(
    num_nodes: int, num_local_ranks: int, architecture: int
) -> None:
    """A repeated dispatch and a combine, of layers whose handles have other sizes."""
    for drawing in range(2):
        rng = np.random.default_rng(drawing)
        ranks = TwoLevel(num_nodes, num_local_ranks, Kernels(architecture=architecture))
        for payload in ("moved", "scaled"):
            ranks.layer(rng, max_tokens=8, payload=payload, is_flat=True)
        for seed in range(3):
            ranks.machine.run(seed)


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize("is_virtual", [False, True])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 2), (2, 3), (5, 1)])
def test_routing_by_ranks_equals_the_oracle(
    num_nodes: int, num_local_ranks: int, is_virtual: bool, architecture: int
) -> None:
    for drawing in range(2):
        rng = np.random.default_rng(drawing)
        load = Kernels(architecture=architecture, counts=True)
        ranks = TwoLevel(num_nodes, num_local_ranks, load, is_virtual=is_virtual)
        ranks.layer(rng, max_tokens=8, by_ranks=True)
        ranks.layer(rng, max_tokens=8, by_ranks=bool(drawing))
        ranks.layer(rng, max_tokens=8, payload=("scaled", "cast")[drawing], by_ranks=True)
        ranks.compare_bytes()
        for seed in range(3):
            ranks.machine.run(seed)


@pytest.mark.parametrize("by_ranks", [False, True])
@pytest.mark.parametrize("dead_rank", [0, 3])
@pytest.mark.parametrize("architecture", [900, 800])
def test_a_rank_that_stops_ends_the_exchange_and_the_dispatch_beside_it(
    dead_rank: int, architecture: int, by_ranks: bool
) -> None:
    ranks = TwoLevel(2, 2, Kernels(architecture=architecture), is_virtual=True)
    ranks.layer(np.random.default_rng(1), max_tokens=8, by_ranks=by_ranks)
    ranks.machine.checks.clear()
    num_failed = 0
    for seed in range(24):
        # What is enqueued behind a call that is given up may read results that peers still store.
        ranks.machine.run(seed, dead_rank=dead_rank, dead_step=1500 * seed, finds_races=False)
        failed = [
            bool(slab.array(SLAB_HEADER, (1,))["failed"][0])
            for rank, slab in enumerate(ranks.slabs)
            if rank != dead_rank
        ]
        # A rank alone may have completed everything before.
        num_failed += all(failed)
        assert all(failed) or seed >= 8
    assert num_failed > 8


MUTATIONS = (
    Mutation(
        "ids are read before they have come",
        "intranode_dispatch.cu",
        "if (args.waits_for_announced) reason = block.await_announced();",
        "",
        "",
    ),
    Mutation(
        "a row is read before it has landed",
        "intranode_dispatch_block.cuh",
        "if (lane == 0 && await_exchange(",
        "landed = place - index.num_own();\n            if (false && await_exchange(",
        "",
    ),
    Mutation(
        "what another kernel says is not acquired",
        "sync.cuh",
        "&own->failed) != 0) return false;\n    ptx::ld_acquire_gpu(word);\n",
        "&own->failed) != 0) return false;\n",
        "",
    ),
    Mutation(
        "rows of the own segment are taken for others",
        "intranode_dispatch_block.cuh",
        "return index.listed(__shfl_sync(kFullWarp, landed, 0));",
        "return __shfl_sync(kFullWarp, landed, 0);",
        "",
    ),
    Mutation(
        "a row is announced before all threads have stored it",
        "internode_exchange.cu",
        "                __syncthreads();\n                if (!is_back()) announce(at, rows);",
        "                if (!is_back()) announce(at, rows);\n                __syncthreads();",
        "",
    ),
    Mutation(
        "bulk loads of a row may come before its stores",
        "internode_exchange.cu",
        "                if (!is_back()) ptx::fence_proxy_async();\n",
        "",
        "",
    ),
    Mutation(
        "a row is announced by the word alone",
        "internode_exchange.cu",
        "        __threadfence();\n        for (uint64_t i",
        "        for (uint64_t i",
        "",
    ),
    Mutation(
        "counters of the call before are added to",
        "sync.cuh",
        "call.workspace->begun[idle] = call.workspace->announced[idle] = call.workspace->landed[idle] = 0;",
        "",
        "",
    ),
    Mutation(
        "the call ends before the exchange has begun",
        "intranode_dispatch.cu",
        "[&](uint64_t value) { return value >= num_begun; }",
        "[&](uint64_t) { return true; }",
        "",
    ),
    Mutation(
        "a sum is sent back before it is made",
        "internode_exchange.cu",
        "return is_back() ? await_sums(at, rows) : kNothing;",
        "return kNothing;",
        "",
    ),
    Mutation(
        "pieces of the call before are counted",
        "internode_exchange.cu",
        "            ptx::st_relaxed_gpu(counted, 0);\n",
        "",
        "",
    ),
    Mutation(
        "pieces are counted before all lanes have stored them",
        "intranode_combine.cu",
        "        __syncwarp();\n        if (block.lane < num_stored)",
        "        if (block.lane < num_stored)",
        "",
    ),
    Mutation(
        "weights are sent back before they are summed",
        "internode_exchange.cu",
        "value >= static_cast<uint64_t>(workspace.num_weight_warps)",
        "value >= 0",
        "",
    ),
    Mutation(
        "the way back of the combine before",
        "internode_sum.cu",
        "args.workspace->returning = 0;",
        "(void)0;",
        "",
    ),
    Mutation(
        "tokens of longer segments are numbered anew",
        "segments.cuh",
        "from + turn}",
        "turn}",
        "",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bugs_are_found(mutation: Mutation) -> None:
    with sources_with(mutation) as sources, pytest.raises(FoundError):
        _run_all(sources)


def test_masks_that_are_not_awaited_are_found() -> None:
    with sources_with(MUTATIONS[0]) as sources, pytest.raises(FoundError):
        _run_all(sources, by_ranks=True)


def _run_all(sources: Path, *, by_ranks: bool = False) -> None:
    for drawing in range(6):
        rng = np.random.default_rng(drawing)
        ranks = TwoLevel(2 + drawing % 2, 1, Kernels(sources=sources), is_virtual=bool(drawing // 2 % 2))
        for _ in range(2):
            ranks.layer(rng, max_tokens=8, by_ranks=by_ranks)
        for seed in range(8):
            ranks.machine.run(seed)
            if any(slab.array(SLAB_HEADER, (1,))["failed"][0] for slab in ranks.slabs):
                raise FoundError("record", "a rank gave up")

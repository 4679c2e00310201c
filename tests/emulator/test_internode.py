"""The steps of the two-level mode over a simulated network: what arrives, in any order, and who is late."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

from ep_rt.cuda.layout import MAX_NODES, Reason

from .build import KERNELS_CU
from .internode import Exchanges, Layer
from .kernels import Kernels
from .machine import FoundError
from .planting import Mutation, sources_with
from .support import needs_emulator

pytestmark = needs_emulator

NUM_SEEDS: Final = 12


def drawn(
    num_nodes: int,
    num_local_ranks: int,
    seed: int,
    *,
    num_layers: int = 2,
    max_tokens: int = 9,
    vectors: tuple[int, int] = (1, 5),
    slot_bytes: int = 256,
    sources: Path = KERNELS_CU,
    is_virtual: bool = False,
    by_ranks: bool = False,
) -> Exchanges:
    rng = np.random.default_rng(seed)
    load = Kernels(sources=sources)
    exchanges = Exchanges(num_nodes, num_local_ranks, load, slot_bytes=slot_bytes, is_virtual=is_virtual)
    num_ranks = num_nodes * num_local_ranks
    for _ in range(num_layers):
        hidden = 4 * int(rng.integers(*vectors))
        layer = Layer.draw(rng, num_ranks, hidden=hidden, max_tokens=max_tokens, by_ranks=by_ranks)
        exchanges.layer(layer, rng)
    return exchanges


@pytest.mark.parametrize("is_virtual", [False, True])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 1), (4, 1)])
def test_rows_cross_and_come_back(num_nodes: int, num_local_ranks: int, is_virtual: bool) -> None:
    for drawing in range(3):
        exchanges = drawn(num_nodes, num_local_ranks, drawing, is_virtual=is_virtual)
        for seed in range(NUM_SEEDS):
            exchanges.machine.run(seed, orders_queue_pairs=bool(seed % 2))
            assert not exchanges.has_failed


def test_rows_cross_between_the_most_nodes() -> None:
    """The last node has the highest bit of its words, and the last lane of its warps."""
    exchanges = drawn(MAX_NODES, 1, 0, max_tokens=3)
    for seed in range(2):
        exchanges.machine.run(seed, orders_queue_pairs=bool(seed % 2))
        assert not exchanges.has_failed


# Of 33 ranks the bits of a node are in two words.
@pytest.mark.parametrize(
    ("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 2), (5, 1), (2, 8), (11, 3), (MAX_NODES, 1)]
)
def test_routing_by_ranks_crosses_as_masks(num_nodes: int, num_local_ranks: int) -> None:
    is_large = num_nodes * num_local_ranks > 8
    for drawing in range(1 if is_large else 3):
        max_tokens = 3 if is_large else 9
        exchanges = drawn(num_nodes, num_local_ranks, drawing, by_ranks=True, max_tokens=max_tokens)
        for seed in range(6 if not is_large else 2 if num_nodes < MAX_NODES else 1):
            exchanges.machine.run(seed)
            assert not exchanges.has_failed


# Warps copy long rows in stretches of 256 vectors.
@pytest.mark.parametrize("vectors", [(32, 40), (250, 280)])
def test_long_rows_cross_and_come_back(vectors: tuple[int, int]) -> None:
    for drawing in range(3):
        exchanges = drawn(2, 1, drawing, max_tokens=5, vectors=vectors, slot_bytes=10 << 10, is_virtual=True)
        for seed in range(NUM_SEEDS):
            exchanges.machine.run(seed)
            assert not exchanges.has_failed


@pytest.mark.parametrize("lost_node", [0, 2])
def test_a_lost_node_is_named(lost_node: int) -> None:
    exchanges = drawn(3, 1, 1)
    num_failed = 0
    for seed in range(40):
        exchanges.machine.run(seed, lost_node=lost_node, lost_step=700 * seed)
        reports = [
            report
            for rank, report in enumerate(exchanges.reports())
            if report is not None and rank != lost_node
        ]
        if not reports:
            continue
        # A farewell may still be on its way when a host looks, so others may be named besides.
        late = [exchanges.late(report) for report in reports]
        assert all(lost_node in each for each in late)
        assert {lost_node} in late
        assert all(exchanges.headers()[report.rank]["failed"][0] == 1 for report in reports)
        num_failed += 1
    assert num_failed > 20


def test_a_rank_that_stops_holds_nobody_up() -> None:
    exchanges = drawn(2, 2, 2)
    for seed in range(30):
        exchanges.machine.run(seed, dead_rank=3, dead_step=300 * seed)
        reports = exchanges.reports()
        for rank in (0, 2):  # of the other local index: they finish, or give up when their node does
            assert reports[rank] is None or exchanges.headers()[rank]["failed"][0] == 1
        if reports[1] is not None:
            assert set(reports[1].waits) == {1}


def test_nodes_with_other_arguments_say_so() -> None:
    rng = np.random.default_rng(0)
    exchanges = Exchanges(2, 1, Kernels(), slot_bytes=256)
    exchanges.layer(Layer.draw(rng, 2, hidden=8, max_tokens=4), rng, digests=[7, 8])
    for seed in range(10):
        exchanges.machine.run(seed)
        reports = [report for report in exchanges.reports() if report is not None]
        assert reports
        assert {report.reason for report in reports} <= {Reason.DISAGREED, Reason.CONTRADICTED}


MUTATIONS = (
    Mutation(
        "a slot is filled before it is free",
        "internode_exchange.cu",
        "const Ring ring{args.state->sent, args.area->freed, static_cast<uint64_t>(args.num_slots)};",
        "const Ring ring{args.state->sent, args.area->freed, 2ull * args.num_slots};",
        "",
    ),
    Mutation(
        "credit for another chunk",
        "internode_exchange.cu",
        "word_of(at, number), number - ring.slack, at);",
        "word_of(at, number), 1, at);",
        "",
    ),
    Mutation(
        "puts before all threads have gathered",
        "internode_exchange.cu",
        "gather(at, rows, from);\n                __syncthreads();",
        "gather(at, rows, from);",
        "",
    ),
    Mutation(
        "tells a peer that stores reach before all threads have stored",
        "internode_exchange.cu",
        "gather(at, rows, there);\n                    __syncthreads();",
        "gather(at, rows, there);",
        "",
    ),
    Mutation(
        "frees a slot that others still read",
        "internode_exchange.cu",
        "                __syncthreads();\n                if (!is_back()) announce(at, rows);",
        "                if (!is_back()) announce(at, rows);",
        "",
    ),
    Mutation(
        "one word for all slots",
        "internode_exchange.cu",
        "return &ring.words[at][channel][number % args.num_slots];",
        "return &ring.words[at][channel][0];",
        "",
    ),
    Mutation(
        "acquires nothing",
        "internode.cuh",
        "    ptx::ld_acquire_sys(word);\n    network::acquire_signal(word, value);\n",
        "",
        "",
    ),
    Mutation(
        "one set of messages",
        "internode_layout.cu",
        "parity = call & 1;",
        "parity = 0;",
        "",
    ),
    Mutation(
        "tokens of lower warps forgotten",
        "internode_layout.cu",
        "if (w < warp) before += count;",
        "",
        "",
    ),
)


MUTATIONS_BY_RANKS = (
    Mutation(
        "all nodes get the mask of the first",
        "internode_layout.cu",
        "mask |= uint32_t{goes_to(token, first + r)} << r;",
        "mask |= uint32_t{goes_to(token, r)} << r;",
        "",
    ),
    Mutation(
        "masks lie without the bytes between them",
        "internode_layout.cu",
        "int64_t{token} * args.node_masks_bytes + n",
        "int64_t{token} * args.num_nodes + n",
        "",
    ),
    Mutation(
        "tokens of the first ranks alone",
        "internode_layout.cu",
        "ranks(first + r) |= (mask >> r & 1) << (first + r) % 32;",
        "ranks(first + r) |= (mask & 1) << (first + r) % 32;",
        "",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bugs_are_found(mutation: Mutation) -> None:
    with sources_with(mutation) as sources, pytest.raises(FoundError):
        _run_all(sources, mutation.max_seeds)


@pytest.mark.parametrize("mutation", MUTATIONS_BY_RANKS, ids=lambda mutation: mutation.name)
def test_planted_bugs_of_routing_by_ranks_are_found(mutation: Mutation) -> None:
    with sources_with(mutation) as sources, pytest.raises(FoundError):
        _run_by_ranks(sources)


def _run_by_ranks(sources: Path) -> None:
    for drawing in range(4):
        drawn(2, 2, drawing, by_ranks=True, sources=sources).machine.run(0)


def _run_all(sources: Path, num_seeds: int) -> None:
    for drawing in range(8):
        max_tokens = (70, 1)[drawing % 2]
        exchanges = drawn(
            2,
            1,
            drawing,
            num_layers=3,
            max_tokens=max_tokens,
            sources=sources,
            is_virtual=bool(drawing // 2 % 2),
        )
        for seed in range(num_seeds // 4):
            exchanges.machine.run(seed)
            if exchanges.has_failed:
                raise FoundError("record", "a rank gave up")

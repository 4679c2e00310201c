"""Bytes that the kernels counted, beside those that the planner says."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ep_rt import reference
from ep_rt.cuda.layout import WORKSPACE, ReceivedRow
from ep_rt.planner import Routes

from . import normal
from .build import KERNELS_CU
from .cases import repeat
from .kernels import Kernels, host_reads
from .machine import Array, Conditions, FoundError
from .planting import Mutation, sources_with
from .ranks import Ranks
from .support import needs_emulator
from .two_level import TwoLevel

pytestmark = needs_emulator

BF16 = np.dtype(ml_dtypes.bfloat16)
MAX_TOKENS = 8


def row(x: Array, sf: Array | None = None, num_topk: int = 0) -> ReceivedRow:
    """Of arrays [T, ...], with so many ids and weights."""
    return ReceivedRow(
        row_bytes=x.itemsize * x.shape[1],
        sf_bytes=0 if sf is None else sf.itemsize * sf.shape[1],
        idx_bytes=8 * num_topk,
        weights_bytes=4 * num_topk,
    )


def on_one_node(num_ranks: int, drawing: int, *, architecture: int, sources: Path = KERNELS_CU) -> Ranks:
    """A dispatch, a repeated one and a combine; a dispatch that casts. By kernels that count."""
    rng = np.random.default_rng(drawing)
    load = Kernels(architecture=architecture, sources=sources, counts=True)
    specs = load(host_reads()), load.dispatch(), load.dispatch(quantizes=True), load.combine(BF16.name)
    # Counts of ranks that are not there are copied, too.
    ranks = Ranks(num_ranks, load, specs, conditions=Conditions(checks_uninitialised=False))
    num_topk, num_experts = int(rng.integers(1, 4)), num_ranks * int(rng.integers(1, 3))
    counts = [int(count) for count in rng.integers(0, MAX_TOKENS + 1, num_ranks)]
    ids = [rng.integers(-1, num_experts, (count, num_topk)) for count in counts]
    weights = [rng.random(each.shape, np.float32) for each in ids]
    num_scales, places = int(rng.integers(1, 6)), [0] * num_ranks
    x, again = ([rng.integers(0, 256, (count, 80), np.uint8) for count in counts] for _ in range(2))
    sf, sf_again = ([rng.random((count, num_scales), np.float32) for count in counts] for _ in range(2))
    sent = reference.dispatch(x, ids, num_experts=num_experts, topk_weights=weights, sf=sf)
    handle, _ = normal.dispatch(
        ranks, x, sent, ids=ids, weights=weights, sf=sf, num_experts=num_experts, places=places
    )
    repeated = repeat(sent, again, sf_again)
    normal.dispatch(ranks, again, repeated, ids=None, sf=sf_again, handle=handle, places=places)
    y = [rng.standard_normal((len(each.recv_x), 72)).astype(BF16) for each in sent]
    given = [rng.random((len(each), num_topk), np.float32) for each in y]
    normal.combine(ranks, y, handle, weights=given, places=[1] * num_ranks)
    wide = [rng.standard_normal((count, 384)).astype(BF16) for count in counts]
    q, scales = map(list, zip(*map(reference.quantize_fp8, wide), strict=True))
    cast = reference.dispatch(q, ids, num_experts=num_experts, sf=scales)
    normal.dispatch(ranks, wide, cast, ids=ids, num_experts=num_experts, quantizes=True, places=places)

    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=num_ranks)
    ids_alone = ReceivedRow(idx_bytes=8 * num_topk, weights_bytes=0, sf_bytes=0, row_bytes=0)
    out = row(x[0], sf[0], num_topk), row(x[0], sf[0]), row(q[0], scales[0]), ids_alone
    back = row(y[0]), ReceivedRow(idx_bytes=0, weights_bytes=4 * num_topk, sf_bytes=0, row_bytes=0)
    moved = [routes.dispatch(each).nvlink.sent_bytes for each in out]
    moved += [routes.combine(each).nvlink.received_bytes for each in back]
    planned = np.sum(moved, axis=0)

    def check() -> str | None:
        counted = [int(each.array(WORKSPACE, (1,))["peer_bytes"][0]) for each in ranks.workspaces]
        return None if counted == planned.tolist() else f"counted {counted} bytes, not {planned}"

    ranks.check(check)
    return ranks


def on_nodes(
    num_nodes: int,
    num_local_ranks: int,
    drawing: int,
    *,
    architecture: int = 900,
    is_virtual: bool = False,
    sources: Path = KERNELS_CU,
) -> TwoLevel:
    """A layer of each payload, by kernels that count."""
    rng = np.random.default_rng(drawing)
    load = Kernels(architecture=architecture, sources=sources, counts=True)
    ranks = TwoLevel(num_nodes, num_local_ranks, load, is_virtual=is_virtual, element=BF16)
    for payload in ("moved", "scaled", "cast"):
        ranks.layer(rng, max_tokens=MAX_TOKENS, payload=payload)
    ranks.compare_bytes()
    return ranks


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_one_node_counts_what_is_planned(num_ranks: int, architecture: int) -> None:
    for drawing in range(6):
        ranks = on_one_node(num_ranks, drawing, architecture=architecture)
        for seed in range(2):
            ranks.machine.run(seed)


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize("is_virtual", [False, True])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 2), (3, 2), (2, 4)])
def test_nodes_count_what_is_planned(
    num_nodes: int, num_local_ranks: int, is_virtual: bool, architecture: int
) -> None:
    for drawing in range(3):
        ranks = on_nodes(
            num_nodes, num_local_ranks, drawing, architecture=architecture, is_virtual=is_virtual
        )
        assert ranks.network_bytes.sum() > 0 < ranks.nvlink_bytes.sum()
        for seed in range(2):
            ranks.machine.run(seed)


# Nothing else notices these: results stay right.
MUTATIONS = (
    Mutation(
        "one rank gets its metadata twice",
        "intranode_dispatch_metadata.cuh",
        "for (int32_t shift = 1; shift <= args.num_ranks; ++shift) {",
        "for (int32_t shift = 1; shift <= args.num_ranks + 1; ++shift) {",
        "",
    ),
    Mutation(
        "weights are summed twice",
        "intranode_combine.cu",
        "        block.sum_weights();\n",
        "        block.sum_weights();\n        block.sum_weights();\n",
        "",
    ),
    Mutation(
        "rows that one rank stores to another are not counted",
        "intranode_dispatch_rows.cuh",
        "return lane != block.args.num_ranks - 1;",
        "return lane != block.args.num_ranks - 1 && lane != 0;",
        "",
    ),
    Mutation(
        "rows that stay on a rank are counted",
        "intranode_combine.cu",
        "return term < kMaxLocalRanks && term != block.call.rank;",
        "return term < kMaxLocalRanks;",
        "",
    ),
)
NETWORK_MUTATIONS = (
    Mutation(
        "records to a node are counted twice",
        "internode_exchange.cu",
        "atomicAdd(&args.state->sent_bytes[at], num_bytes);",
        "atomicAdd(&args.state->sent_bytes[at], (at == 0 ? 2 : 1) * num_bytes);",
        "",
    ),
    Mutation(
        "records to a node are not counted",
        "internode_exchange.cu",
        "if (threadIdx.x == 0) atomicAdd(&args.state->sent_bytes[at], num_bytes);",
        "if (threadIdx.x == 0 && at != 0) atomicAdd(&args.state->sent_bytes[at], num_bytes);",
        "",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_other_bytes_are_found_on_one_node(mutation: Mutation) -> None:
    with sources_with(mutation) as sources:
        ranks = on_one_node(3, 0, architecture=900, sources=sources)
        with pytest.raises(FoundError, match="counted"):
            ranks.machine.run(0)


@pytest.mark.parametrize("mutation", MUTATIONS + NETWORK_MUTATIONS, ids=lambda mutation: mutation.name)
def test_other_bytes_are_found_on_nodes(mutation: Mutation) -> None:
    with sources_with(mutation) as sources:
        ranks = on_nodes(2, 2, 0, sources=sources)
        with pytest.raises(FoundError, match="counted"):
            ranks.machine.run(0)

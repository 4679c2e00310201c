"""What `ep_rt.planner` says must move, against counting token by token and against the oracle."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from ep_rt import __main__ as program
from ep_rt import reference
from ep_rt.bench.workload import Routing
from ep_rt.cuda.layout import ReceivedRow
from ep_rt.cuda.plan import node_masks_bytes
from ep_rt.errors import ConfigError
from ep_rt.planner import Array, Flow, Plan, Routes, record_bytes

SIZES = [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (2, 4), (5, 3)]
ROW = ReceivedRow(row_bytes=48, sf_bytes=20, idx_bytes=24, weights_bytes=12)


def drawn(seed: int, num_nodes: int, size: int) -> tuple[list[Array], int]:
    """Ids with gaps, and some that do not exist."""
    rng = np.random.default_rng([seed, num_nodes, size])
    num_experts = num_nodes * size * int(rng.integers(1, 4))
    num_topk = int(rng.integers(1, 6))
    counts = rng.integers(0, 30, num_nodes * size)
    return [rng.integers(-3, num_experts + 3, (int(count), num_topk)) for count in counts], num_experts


def counted(ids: list[Array], num_experts: int, size: int) -> tuple[Array, Array]:
    """Rows that cross the network and NVLink, from rank to rank, one after the other."""
    num_ranks = len(ids)
    network, nvlink = (np.zeros((num_ranks, num_ranks), np.int64) for _ in range(2))
    for src, tokens in enumerate(ids):
        for token in tokens.tolist():
            ranks = {expert * num_ranks // num_experts for expert in token if 0 <= expert < num_experts}
            for node in {rank // size for rank in ranks}:
                at = node * size + src % size
                if node != src // size:
                    network[src, at] += 1
                for rank in ranks:
                    if rank // size == node and rank != at:
                        nvlink[at, rank] += 1
    return network, nvlink


@pytest.mark.parametrize(("num_nodes", "size"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_that_counting_gives(num_nodes: int, size: int, seed: int) -> None:
    ids, num_experts = drawn(seed, num_nodes, size)
    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=size)
    network, nvlink = counted(ids, num_experts, size)
    plan, back = routes.dispatch(ROW), routes.combine(ROW)
    assert np.array_equal(plan.network.sent_bytes, network.sum(axis=1) * 128)
    assert np.array_equal(plan.network.received_bytes, network.sum(axis=0) * 128)
    assert np.array_equal(plan.nvlink.rows, nvlink)
    assert np.array_equal(plan.nvlink.sent_bytes, nvlink.sum(axis=1) * 104)
    assert np.array_equal(back.network.rows, network.T)
    assert np.array_equal(back.nvlink.received_bytes, plan.nvlink.sent_bytes)
    assert plan.nvlink.busiest_bytes == max(0, *(nvlink.sum(axis=axis).max() * 104 for axis in (0, 1)))


def test_without_ids_masks_cross() -> None:
    ids, num_experts = drawn(3, 3, 2)
    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=2)
    row = ReceivedRow(row_bytes=48, sf_bytes=20, idx_bytes=0, weights_bytes=0)
    by_ids, by_ranks = routes.dispatch(row), routes.dispatch(row, by_ranks=True)
    assert (by_ids.network.row_bytes, by_ranks.network.row_bytes) == (80, 96)
    assert record_bytes(row, node_masks_bytes(17)) == 112
    assert by_ids.nvlink.row_bytes == by_ranks.nvlink.row_bytes == 68


@pytest.mark.parametrize(("num_nodes", "size"), SIZES)
def test_rows_are_those_that_the_oracle_delivers(num_nodes: int, size: int) -> None:
    ids, num_experts = drawn(7, num_nodes, size)
    ids = [np.where((each < 0) | (each >= num_experts), -1, each) for each in ids]
    x = [np.zeros((len(each), 4), np.float32) for each in ids]
    received = reference.dispatch(x, ids, num_experts=num_experts)
    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=size)
    ranks = range(len(ids))
    from_rank = np.array([np.bincount(each.src_rank, minlength=len(ids)) for each in received])
    assert np.array_equal(routes.to_rank, from_rank.T)
    for rank in ranks:
        # What comes over NVLink is what was received, less what came from ranks of the same local index.
        local = [src for src in ranks if src % size == rank % size]
        assert (
            routes.nvlink_rows[:, rank].sum() == len(received[rank].src_rank) - from_rank[rank, local].sum()
        )
    layouts = [
        reference.dispatch_layout(each, num_experts=num_experts, num_ranks=len(ids), ranks_per_node=size)
        for each in ids
    ]
    per_node = np.array([layout.num_tokens_per_node for layout in layouts])
    assert np.array_equal(routes.to_node, per_node)
    is_own = np.arange(len(ids))[:, None] // size == np.arange(num_nodes)
    assert np.array_equal(routes.network_rows.sum(axis=1), np.where(is_own, 0, per_node).sum(axis=1))


def test_two_levels_send_no_more_than_one() -> None:
    ids, num_experts = drawn(1, 4, 2)
    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=2)
    direct = routes.direct(ROW)
    assert 0 < routes.dispatch(ROW).network.mean_bytes < direct.network.mean_bytes
    # Nothing is lost: each received row was there already, or came over NVLink.
    whole = Routes.of(ids, num_experts=num_experts, ranks_per_node=8)
    for plan in whole.dispatch(ROW), whole.direct(ROW):
        assert plan.network.rows.sum() == 0
        assert plan.nvlink.rows.sum() == direct.network.rows.sum() + direct.nvlink.rows.sum()
    assert direct.network.rows.sum() + direct.nvlink.rows.sum() + np.trace(routes.to_rank) == (
        routes.to_rank.sum()
    )


def test_the_floor_is_that_of_the_busiest_link() -> None:
    rows = np.array([[0, 3], [5, 0]])
    plan = Plan(Flow(rows, 1000), Flow(10 * rows, 100))
    assert np.array_equal(plan.network.sent_bytes_by_node(1), rows * 1000)
    assert np.array_equal(plan.network.sent_bytes_by_node(2), [[3000], [5000]])
    assert plan.network.mean_bytes == 4000
    assert plan.floor_s(network_gbps=1, nvlink_gbps=2) == pytest.approx(5e-6)
    assert plan.floor_s(network_gbps=4, nvlink_gbps=2) == pytest.approx(2.5e-6)


def test_rows_that_are_cast_cross_as_they_were() -> None:
    ids, num_experts = drawn(2, 2, 2)
    routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=2)
    cast = ReceivedRow(row_bytes=128, sf_bytes=4, idx_bytes=8, weights_bytes=0)
    given = ReceivedRow(row_bytes=256, sf_bytes=0, idx_bytes=8, weights_bytes=0)
    plan = routes.dispatch(cast, given=given)
    assert (plan.network.row_bytes, plan.nvlink.row_bytes) == (272, 140)
    assert record_bytes(cast) == 160


def test_sizes_that_do_not_divide() -> None:
    ids = [np.zeros((1, 1), np.int64)] * 3
    with pytest.raises(ConfigError, match="cannot be divided into nodes of 2"):
        Routes.of(ids, num_experts=3, ranks_per_node=2)
    with pytest.raises(ConfigError, match="num_experts"):
        Routes.of(ids, num_experts=4, ranks_per_node=3)


# The command line.


def plan(*arguments: str) -> int:
    return program.main(["plan", "--hidden=512", "--experts=32", "--topk=4", *arguments])


def test_the_table_says_what_the_planner_says(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = "--network-gbps=25", "--nvlink-gbps=100"
    assert plan("--ranks=4", "--ranks-per-node=2", "--tokens", "200", "900", "--dtype=both", *speeds) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 111
    rows = [line.split() for line in lines[-10:]]
    dispatches, combine = ["dispatch", "dispatch-cached"], ["combine"]
    assert [each[:3] for each in rows] == [
        [tokens, dtype, operation]
        for tokens in ("200", "900")
        for dtype, operations in (("bf16", dispatches + combine), ("fp8", dispatches))
        for operation in operations
    ]
    drawn = Routing.draw(num_ranks=4, num_tokens=900, num_experts=32, num_topk=4)
    routes = Routes.of(drawn.topk_idx, num_experts=32, ranks_per_node=2)
    row = ReceivedRow(row_bytes=1024, sf_bytes=0, idx_bytes=32, weights_bytes=16)
    expected = []
    for each in routes.dispatch(row), routes.direct(row):
        for flow in each.network, each.nvlink:
            expected += [f"{flow.mean_bytes / 1e6:.2f}", f"({flow.busiest_bytes / 1e6:.2f})"]
        network, nvlink = each.network.busiest_bytes / 25e3, each.nvlink.busiest_bytes / 100e3
        expected.append(f"{max(network, nvlink):.0f}")
    assert rows[5][3:] == expected


def test_other_seeds_and_routings_give_other_tables(capsys: pytest.CaptureFixture[str]) -> None:
    tables = set()
    for arguments in (), ("--seed=1",), ("--routing=zipf",), ("--routing=zipf", "--zipf-exponent=2"):
        assert plan("--tokens=64", *arguments) == 0
        tables.add(capsys.readouterr().out.splitlines()[-1])
    assert len(tables) == 4


# Groups are nodes of two ranks with 4 experts: a token that picks 2 of them and 6 experts has some of both.
@pytest.mark.parametrize(("num_topk_groups", "num_topk"), [(1, 3), (2, 6), (4, 14)])
@pytest.mark.parametrize("seed", [0, 1])
def test_grouped_routing_crosses_to_as_many_nodes_as_it_picks_groups(
    num_topk_groups: int, num_topk: int, seed: int
) -> None:
    sizes = {"num_ranks": 16, "num_tokens": 500, "num_experts": 32, "num_topk": num_topk, "seed": seed}
    drawn = Routing.draw(**sizes, num_groups=8, num_topk_groups=num_topk_groups)
    num_away = 0
    for rank, ids in enumerate(drawn.topk_idx):
        groups = [set(row) for row in (ids // 4).tolist()]
        assert {len(set(row)) for row in ids.tolist()} == {num_topk}
        assert {len(each) for each in groups} == {num_topk_groups}
        num_away += sum(len(each - {rank // 2}) for each in groups)
    grouped, uniform = (
        Routes.of(each.topk_idx, num_experts=32, ranks_per_node=2).dispatch(ROW).network
        for each in (drawn, Routing.draw(**sizes))
    )
    assert grouped.sent_bytes.sum() == num_away * grouped.row_bytes
    # Each node is picked as often as any other: of 8 nodes 7 are elsewhere.
    assert grouped.mean_bytes == pytest.approx(500 * num_topk_groups * 7 / 8 * grouped.row_bytes, rel=0.02)
    assert grouped.mean_bytes < uniform.mean_bytes
    away = 7 * (1 - comb(28, num_topk) / comb(32, num_topk))
    assert uniform.mean_bytes == pytest.approx(500 * away * uniform.row_bytes, rel=0.02)


def test_the_command_line_picks_half_of_eight_groups(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--ranks=16", "--ranks-per-node=2", "--tokens=64", "--seed=3"
    assert plan(*arguments, "--routing=grouped") == 0
    table = capsys.readouterr().out.splitlines()
    assert "grouped routing, top-4 of 8 groups, seed 3" in table[1]
    drawn = Routing.draw(
        num_ranks=16, num_tokens=64, num_experts=32, num_topk=4, num_groups=8, num_topk_groups=4, seed=3
    )
    routes = Routes.of(drawn.topk_idx, num_experts=32, ranks_per_node=2)
    row = ReceivedRow(row_bytes=1024, sf_bytes=0, idx_bytes=0, weights_bytes=0)
    assert table[-1].split()[3] == f"{routes.combine(row).network.mean_bytes / 1e6:.2f}"
    assert plan(*arguments, "--routing=grouped", "--groups=4", "--topk-groups=1") == 0
    assert capsys.readouterr().out.splitlines()[-1] != table[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks=12",), "num_experts=32 is not a positive multiple of num_ranks=12"),
        (("--ranks=4",), "4 ranks cannot be divided into nodes of 8"),
        (("--topk=33",), "top-33 of 32 experts"),
        (("--routing=grouped", "--groups=5"), "32 experts cannot be divided into 5 groups"),
        (("--routing=grouped", "--topk-groups=9"), "top-9 of 8 groups"),
        (("--routing=grouped", "--topk=9", "--topk-groups=2"), "top-9 of the 8 experts of 2 groups"),
        (("--network-gbps=0",), "0 GB/s is not positive"),
    ],
)
def test_what_cannot_be_planned(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        plan(*arguments)
    assert message in capsys.readouterr().err

"""Ranks to nodes."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from ep_rt.errors import ConfigError, TopologyError
from ep_rt.groups import Group, run_local
from ep_rt.topology import Topology, discover


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_RT_RANKS_PER_NODE", raising=False)


def test_what_a_rank_sees() -> None:
    found = Topology(rank=4, node_of_rank=(0, 1, 0, 2, 1, 1))
    assert (found.num_ranks, found.num_nodes, found.node) == (6, 3, 1)
    assert (found.local_ranks, found.local_rank, found.num_local_ranks) == ((1, 4, 5), 1, 3)
    assert [found.ranks_of(node) for node in range(3)] == [(0, 2), (1, 4, 5), (3,)]
    assert found.node_sizes == (2, 3, 1)
    assert not found.is_uniform


@pytest.mark.parametrize(
    ("rank", "nodes"), [(2, (0, 0)), (-1, (0,)), (0, (1, 0)), (0, (0, 2)), (0, (1,)), (0, ())]
)
def test_impossible_topologies_are_refused(rank: int, nodes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Topology(rank=rank, node_of_rank=nodes)


def test_uniform_nodes_pass_and_ragged_ones_are_listed() -> None:
    Topology(rank=0, node_of_rank=(0, 1, 0, 1)).require_uniform("internode dispatch")
    with pytest.raises(
        TopologyError,
        match=r"internode dispatch needs .* same number .* node 0: 2, node 1: 1.*divisor of 3$",
    ) as caught:
        Topology(rank=0, node_of_rank=(0, 0, 1)).require_uniform("internode dispatch")
    assert caught.value.is_collective


def nodes_of(num_ranks: int, **kwargs: Any) -> tuple[int, ...]:
    found = run_local(lambda group: discover(group, **kwargs), num_ranks)
    assert [its.rank for its in found] == list(range(num_ranks))
    (nodes,) = {its.node_of_rank for its in found}
    return nodes


def test_threads_share_one_node() -> None:
    assert nodes_of(3) == (0, 0, 0)
    assert nodes_of(1) == (0,)


@pytest.mark.parametrize(
    ("num_ranks", "size", "nodes"),
    [(4, 2, (0, 0, 1, 1)), (4, 1, (0, 1, 2, 3)), (5, 2, (0, 0, 1, 1, 2)), (2, 8, (0, 0))],
)
def test_virtual_nodes(
    num_ranks: int, size: int, nodes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes_of(num_ranks, ranks_per_node=size) == nodes
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", str(size))
    assert nodes_of(num_ranks) == nodes
    # The argument wins over the environment, and both over the domain.
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "3")
    assert nodes_of(num_ranks, ranks_per_node=size, domain="one") == nodes


def test_hosts_are_nodes_in_the_order_of_their_first_ranks() -> None:
    hosts = ["b", "a", "b", "c", "a"]

    def fn(group: Group) -> Topology:
        return discover(_HostGroup(group, hosts))

    assert {its.node_of_rank for its in run_local(fn, 5)} == {(0, 1, 0, 2, 1)}


class _HostGroup:
    """Gives every rank a host name of its own, as if the ranks were on several machines."""

    def __init__(self, group: Group, hosts: list[str]) -> None:
        self._group = group
        self._hosts = hosts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def allgather(self, value: Any, **kwargs: Any) -> list[Any]:
        size, domain, host = value
        assert host == socket.gethostname()
        return self._group.allgather((size, domain, self._hosts[self._group.rank]), **kwargs)


def test_a_domain_replaces_the_host() -> None:
    def fn(group: Group) -> Topology:
        return discover(group, domain=("fabric", group.rank % 2))

    assert {its.node_of_rank for its in run_local(fn, 4)} == {(0, 1, 0, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda rank: {"ranks_per_node": 1 + rank},
            "ranks_per_node differs between ranks: rank 0: 1, rank 1: 2",
        ),
        (
            lambda rank: {"ranks_per_node": None if rank else 2},
            "ranks_per_node differs .*rank 0: 2, rank 1: None",
        ),
        (lambda rank: {"ranks_per_node": rank}, "rank 0: ranks_per_node=0 is not a positive integer"),
        (lambda rank: {"ranks_per_node": True}, "rank 0: ranks_per_node=True is not"),
        (lambda rank: {"domain": "a" if rank else None}, "whether a domain is given differs between ranks"),
    ],
)
def test_overrides_that_differ_or_are_wrong_are_an_error_on_every_rank(arguments: Any, message: str) -> None:
    def fn(group: Group) -> int:
        with pytest.raises(ConfigError, match=message) as caught:
            discover(group, **arguments(group.rank))
        assert caught.value.is_collective
        group.barrier()
        return 1

    assert run_local(fn, 3) == [1, 1, 1]


def test_a_wrong_environment_on_one_rank_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "many")

    def fn(group: Group) -> None:
        with pytest.raises(ConfigError, match="rank 0: EP_RT_RANKS_PER_NODE='many'"):
            discover(group, ranks_per_node=2 if group.rank else None)

    run_local(fn, 2)

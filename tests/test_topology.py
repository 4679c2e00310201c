"""Ranks to nodes."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from ep_rt.errors import ConfigError, TopologyError
from ep_rt.groups import Group, run_local
from ep_rt.topology import GpuPlace, Topology, discover, ranks_joined


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EP_RT_RANKS_PER_NODE", "EP_RT_NVLINK"):
        monkeypatch.delenv(name, raising=False)


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
    # The argument wins over the environment, and both over links.
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "3")
    monkeypatch.setenv("EP_RT_NVLINK", "1")
    place = GpuPlace("here", 0, "a")
    assert nodes_of(num_ranks, ranks_per_node=size, place=place) == nodes


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
        *others, host = value
        assert host == socket.gethostname()
        return self._group.allgather((*others, self._hosts[self._group.rank]), **kwargs)


# GPUs and their links.


def gpus(num_gpus: int, *joined: Sequence[int], host: str = "here") -> list[GpuPlace]:
    """A process on each GPU of a host, where NVLink joins any two of each group."""
    together = {pair for group in joined for pair in combinations(sorted(group), 2)}
    return [
        GpuPlace(
            host,
            100 + number,
            str(number),
            without_nvlink=frozenset(
                str(other)
                for other in range(num_gpus)
                if other != number and (min(number, other), max(number, other)) not in together
            ),
        )
        for number in range(num_gpus)
    ]


@pytest.mark.parametrize(
    ("places", "size"),
    [
        (gpus(1), None),
        (gpus(8, range(8)), None),
        (gpus(8), 1),
        (gpus(2), 1),
        (gpus(3), 1),
        # Bridges between pairs, and between others than neighbours.
        (gpus(4, (0, 1), (2, 3)), 2),
        (gpus(4, (0, 2), (1, 3)), 1),
        (gpus(6, (0, 1, 2), (3, 4, 5)), 3),
        (gpus(6, (0, 1), (2, 3), (4, 5)), 2),
        (gpus(8, (0, 1, 2, 3), (4, 5, 6, 7)), 4),
        (gpus(8, (0, 1, 2, 3), (4, 5)), 1),
        (gpus(8, (0, 1, 2, 3), (4, 5), (6, 7)), 2),
        # Hosts.
        (gpus(4, range(4)) + gpus(4, range(4), host="there"), None),
        (gpus(4, range(4)) + gpus(2, range(2), host="there"), None),
        (gpus(4, range(4)) + gpus(4, (0, 1), (2, 3), host="there"), 2),
        (gpus(4, range(4)) + gpus(4, host="there"), 1),
        (gpus(3) + gpus(5, host="there"), 1),
        (gpus(1) + gpus(1, host="there"), None),
    ],
)
def test_nodes_by_links(places: list[GpuPlace], size: int | None) -> None:
    assert ranks_joined(places) == size
    assert ranks_joined(places, nvlink=True) is None
    forced = ranks_joined(places, nvlink=False)
    assert forced == (None if len({place.host for place in places}) == len(places) else 1)


def test_ranks_of_hosts_in_turn_are_nodes_of_one() -> None:
    places = [place for pair in zip(gpus(2), gpus(2, host="there"), strict=True) for place in pair]
    assert ranks_joined(places) == 1
    joined = [place._replace(without_nvlink=frozenset()) for place in places]
    assert ranks_joined(joined) is None  # as hosts, which `Internode.check` then refuses by name


def test_one_side_that_knows_is_enough() -> None:
    one, two = gpus(2)
    for known in (
        [one, two._replace(without_nvlink=frozenset())],
        [one._replace(without_nvlink=frozenset()), two],
    ):
        assert ranks_joined(known) == 1


def test_unknown_gpus_count_as_joined() -> None:
    places = [place._replace(without_nvlink=frozenset({"9"})) for place in gpus(4)]
    assert ranks_joined(places) is None


@pytest.mark.parametrize("nvlink", [None, False])
def test_threads_and_ranks_on_one_gpu_stay_together(nvlink: bool | None) -> None:
    threads = [place._replace(process=1) for place in gpus(4)]
    assert ranks_joined(threads, nvlink=nvlink) is None
    shared = [place._replace(bus_id="0") for place in gpus(4)]
    assert ranks_joined(shared, nvlink=nvlink) is None
    two_processes = [place._replace(process=number // 2) for number, place in enumerate(gpus(4))]
    assert ranks_joined(two_processes, nvlink=nvlink) == 2


def test_no_larger_nodes_would_do() -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_gpus = rng.choice([2, 3, 4, 6, 8])
        pairs = [pair for pair in combinations(range(num_gpus), 2) if rng.random() < 0.8]
        size = ranks_joined(gpus(num_gpus, *pairs))
        fitting = [
            each
            for each in range(1, num_gpus + 1)
            if num_gpus % each == 0
            and all(
                pair in pairs
                for pair in combinations(range(num_gpus), 2)
                if pair[0] // each == pair[1] // each
            )
        ]
        assert (size or num_gpus) == max(fitting)


def found_by(places: Sequence[GpuPlace | None]) -> Topology:
    found = run_local(lambda group: discover(group, place=places[group.rank]), len(places))
    assert len({(its.node_of_rank, its.lacks_nvlink) for its in found}) == 1
    return found[0]


def test_links_decide_over_nodes_and_the_environment_over_links(monkeypatch: pytest.MonkeyPatch) -> None:
    bridged, full = gpus(4, (0, 1), (2, 3)), gpus(4, range(4))
    assert found_by(bridged).node_of_rank == (0, 0, 1, 1)
    assert "EP_RT_NVLINK=1 makes it one node" in found_by(bridged).hint
    assert (found_by(full).num_nodes, found_by(full).hint) == (1, "")
    assert found_by([*bridged[:3], None]).num_nodes == 1
    monkeypatch.setenv("EP_RT_NVLINK", "1")
    assert (found_by(bridged).num_nodes, found_by(bridged).lacks_nvlink) == (1, False)
    monkeypatch.setenv("EP_RT_NVLINK", "0")
    assert (found_by(full).node_of_rank, found_by(full).lacks_nvlink) == ((0, 1, 2, 3), True)
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "2")
    assert (found_by(full).node_of_rank, found_by(full).hint) == ((0, 0, 1, 1), "")


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
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "1")
    monkeypatch.setenv("EP_RT_NVLINK", "yes")

    def nvlink(group: Group) -> None:
        with pytest.raises(ConfigError, match="rank 0: EP_RT_NVLINK='yes' is neither 0 nor 1"):
            discover(group)

    run_local(nvlink, 2)

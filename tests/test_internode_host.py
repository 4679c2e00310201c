"""What the host works out for calls over several nodes: parts of rows, rings, names in errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ep_rt.cuda import nvshmem, plan
from ep_rt.cuda.hang import Names, Report, verdict
from ep_rt.cuda.internode import Internode
from ep_rt.cuda.layout import MAX_CHANNELS, MAX_SLOTS, Operation, Reason, signal_word
from ep_rt.errors import BackendError, ConfigError, PeerTimeoutError, TopologyError, on_all_ranks
from ep_rt.exchange import Group
from ep_rt.groups import run_local, thread_groups
from ep_rt.node_group import NodeGroup
from ep_rt.requests import integer
from ep_rt.topology import Topology


def test_parts_of_a_row() -> None:
    parts = plan.Parts.of((48, 0, 12, 12))
    assert parts.num_bytes == (48, 0, 12, 12)
    assert parts.offsets == (0, 48, 48, 64)
    assert parts.record_bytes == 80
    assert parts.places(10) == (0, 512, 512, 768, 1024)


@pytest.mark.parametrize("num_nodes", [2, 8, 32])
@pytest.mark.parametrize("row_bytes", [0, 4096, 14336, 65536])
def test_rings_fit_into_what_they_are_given(num_nodes: int, row_bytes: int) -> None:
    record_bytes = plan.record_bytes(row_bytes, 8)
    assert record_bytes > row_bytes
    num_bytes = 0
    while True:
        rings = plan.rings(num_nodes, num_bytes, record_bytes)
        assert not num_bytes or 2 * rings.num_bytes(num_nodes) <= num_bytes
        assert rings.slot_bytes >= record_bytes
        assert rings.num_channels <= MAX_CHANNELS
        assert rings.num_slots <= MAX_SLOTS
        if rings.num_channels == 1:
            break
        num_bytes = rings.num_bytes(num_nodes)
    with pytest.raises(ConfigError, match="at least"):
        plan.rings(num_nodes, rings.slot_bytes, record_bytes)


def report(rank: int, phase: int, waits: dict[int, tuple[int, int]]) -> Report:
    return Report(
        rank=rank, reason=Reason.EXPIRED, operation=Operation.DISPATCH, phase=phase, epoch=7, waits=waits
    )


def test_errors_name_ranks_of_all_nodes() -> None:
    names = Names(local=(4, 5, 6, 7), num_ranks=12)
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)
    over_the_network = names.of(report(1, 0, {2: word}))
    assert (over_the_network.rank, set(over_the_network.waits)) == (5, {9})
    within = names.of(report(1, 3, {2: word}))
    assert (within.rank, set(within.waits)) == (5, {6})
    error = verdict([over_the_network, None, within, None], rank=5, timeout_s=1.0, num_ranks=12)
    assert isinstance(error, PeerTimeoutError)
    assert (error.rank, error.peers) == (5, (9,))


def test_those_that_gave_up_are_not_blamed_but_those_that_they_waited_for() -> None:
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)
    waits = {1: word, 2: word}
    # Node 1 waited for nodes 0, which is this one, and 3; node 2 said nothing.
    farewells = [0, 0b1001 << 32 | 1, 0, 0]
    found = report(0, 0, waits).with_farewells(farewells, own=0).waits
    late = {node for node, (_, seen) in found.items() if seen == word[1]}
    assert (late, set(found)) == ({2, 3}, {1, 2, 3})
    elsewhere = {1: (word[0], signal_word(7, Operation.BARRIER))}
    assert report(0, 0, elsewhere).with_farewells(farewells, own=0).waits == elsewhere


def test_nodes_that_are_not_served() -> None:
    Internode.check(Topology(rank=0, node_of_rank=(0, 0, 1, 1)))
    with pytest.raises(TopologyError, match="consecutive"):
        Internode.check(Topology(rank=0, node_of_rank=(0, 1, 0, 1)))
    with pytest.raises(TopologyError, match="same number"):
        Internode.check(Topology(rank=0, node_of_rank=(0, 0, 1)))
    with pytest.raises(TopologyError, match="at most 32 of 8"):
        Internode.check(Topology(rank=0, node_of_rank=tuple(range(33))))


def test_gpus_without_nvlink_hear_what_to_install_and_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise on_all_ranks(BackendError("rank 1: NVSHMEM is not installed; install ep-rt[cuda12]"))

    monkeypatch.setattr(nvshmem, "Network", absent)
    for lacks_nvlink in (True, False):
        topology = Topology(rank=0, node_of_rank=(0, 1), lacks_nvlink=lacks_nvlink)
        with pytest.raises(BackendError, match=r"^rank 1: NVSHMEM is not installed; install") as caught:
            Internode(
                thread_groups(1)[0],
                topology,
                SimpleNamespace(),  # type: ignore[arg-type]
                max_tokens=8,
                num_bytes=0,
                record_bytes=1024,
                timeout_s=1.0,
            )
        assert caught.value.is_collective
        assert ("EP_RT_NVLINK=1 makes it one node" in str(caught.value)) == lacks_nvlink


def test_groups_of_nodes_do_not_wait_for_each_other() -> None:
    def body(group: Group) -> list[int]:
        node = NodeGroup(group, range(group.rank // 2 * 2, group.rank // 2 * 2 + 2))
        assert (node.rank, node.size) == (group.rank % 2, 2)
        values = []
        for number in range(3):
            values = node.allgather(10 * group.rank + number, op="values")
        node.barrier()
        return values

    assert run_local(body, 4) == [[2, 12], [2, 12], [22, 32], [22, 32]]


def test_numpy_integers_are_integers() -> None:
    assert type(integer(np.int64(3), "n")) is int
    with pytest.raises(ConfigError, match=r"n=3\.0 is not an integer"):
        integer(3.0, "n")

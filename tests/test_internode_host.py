"""What the host works out for calls over several nodes: parts of rows, rings, names in errors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_rt import arrays
from ep_rt.arrays import ArrayView
from ep_rt.cuda import kernels, nvshmem, plan
from ep_rt.cuda.hang import Farewell, Names, Report, verdict
from ep_rt.cuda.internode import Bringing, Internode
from ep_rt.cuda.layout import (
    FIRST_COMBINE_ZONE,
    MAX_CHANNELS,
    MAX_NODES,
    MAX_SLOTS,
    OFFSET_UNIT,
    Operation,
    Reason,
    ReceivedRow,
    signal_operation,
    signal_word,
)
from ep_rt.cuda.low_latency_areas import Area, Pending
from ep_rt.cuda.low_latency_places import SymmetricPlaces
from ep_rt.cuda.low_latency_plan import AreaShape
from ep_rt.cuda.nvshmem import SymmetricMemory
from ep_rt.cuda.remote import Remote, RemoteSizes
from ep_rt.cuda.told import HostResult
from ep_rt.errors import (
    BackendError,
    CollectiveMismatchError,
    ConfigError,
    EpError,
    HandleError,
    PeerTimeoutError,
    TopologyError,
    on_all_ranks,
)
from ep_rt.exchange import Group
from ep_rt.groups import run_local, thread_groups
from ep_rt.network_options import NetworkOptions
from ep_rt.node_group import NodeGroup
from ep_rt.requests import integer
from ep_rt.topology import Topology


def test_parts_of_a_row() -> None:
    parts = plan.Parts.of((48, 0, 12, 12))
    assert parts.num_bytes == (48, 0, 12, 12)
    assert parts.offsets == (0, 48, 48, 64)
    assert parts.record_bytes == 80
    assert parts.places(10) == (0, 512, 512, 768, 1024)
    ahead = plan.Parts.of((48, 0, 12, 12), num_ahead=3)
    assert ahead.num_bytes == parts.num_bytes
    assert ahead.offsets == (0, 0, 0, 16)
    assert (ahead.row_bytes, ahead.ahead_bytes) == (48, 32)
    assert (parts.order, parts.num_ahead) == ((0, 2, 3), 0)
    assert (ahead.order, ahead.num_ahead) == ((2, 3, 0), 2)
    assert ahead.record_bytes == parts.record_bytes
    assert ahead.places(10) == parts.places(10)


@pytest.mark.parametrize("num_nodes", [2, 3, 32])
def test_masks_go_ahead_where_there_are_no_ids(num_nodes: int) -> None:
    def bringing(*views: ArrayView | None, is_cached: bool = False) -> Bringing:
        return made.bringing(views, num_experts=2 * num_nodes, is_cached=is_cached)

    made = object.__new__(Internode)
    internode: Any = made
    internode.num_nodes, internode.max_tokens = num_nodes, 8
    internode._rings = plan.rings(num_nodes, 0, plan.record_bytes(96, 1))
    internode._rings_fields = internode._common = {}
    internode._domain = SimpleNamespace(max_blocks=2)
    internode.order = internode.progress = 0
    internode._layout, internode._exchange = (
        SimpleNamespace(spec=spec, bind=lambda args, **_: SimpleNamespace(args=args.view(np.recarray)[0]))
        for spec in (kernels.internode_layout(), kernels.internode_exchange())
    )
    x, sf, ids = (
        arrays.view(np.zeros((5, width), dtype), name="x")
        for width, dtype in ((24, np.float32), (3, np.float32), (2, np.int64))
    )
    by_ranks, by_ids = bringing(x, sf, None, None), bringing(x, sf, ids, None)
    cached = bringing(x, sf, None, None, is_cached=True)
    masks_bytes = plan.node_masks_bytes(num_nodes)
    assert num_nodes <= masks_bytes < num_nodes + 4
    assert by_ranks.parts.num_bytes == (96, 12, 0, 0, masks_bytes)
    assert (by_ranks.parts.order, by_ranks.parts.num_ahead) == ((1, 4, 0), 2)
    layout: Any = by_ranks.layout
    assert layout.args.node_masks_bytes == masks_bytes
    assert (by_ids.parts.order, cached.parts.order) == ((1, 2, 0), (1, 0))
    assert cached.layout is None


def test_hosts_add_what_ranks_of_all_nodes_counted() -> None:
    num_local_experts, dtype = 2, np.int32
    rng = np.random.default_rng(0)
    counted = rng.integers(0, 100, (4, 4 * num_local_experts)).astype(dtype)

    def body(group: Group) -> tuple[int, list[int]] | ConfigError:
        def fetch(_pointer: int, array: NDArray[Any]) -> None:
            array[:] = counted[group.rank]

        node = NodeGroup(group, range(group.rank // 2 * 2, group.rank // 2 * 2 + 2))
        told: Any = object.__new__(HostResult)
        told._group = group
        told._inputs = SimpleNamespace(copy=lambda *_: None)
        told._domain = SimpleNamespace(
            group=node,
            timeout_s=10.0,
            heap=SimpleNamespace(take=lambda _: SimpleNamespace(pointer=0)),
            comm=SimpleNamespace(pointer=0),
            pool=SimpleNamespace(
                num_bytes=1 << 16, largest_free=lambda: 1 << 16, transfer=lambda lease: lease
            ),
            fetch=fetch,
        )
        overfull, num_tokens = (1, 100) if group.rank == 0 else (int(group.rank == 1), 1)
        told._struct = SimpleNamespace(
            fields=SimpleNamespace(overfull_ranks=overfull, num_recv_tokens=num_tokens, expert_counts=[]),
            word=SimpleNamespace(value=3),
        )
        row = ReceivedRow(row_bytes=1024, sf_bytes=0, idx_bytes=0, weights_bytes=0)
        view = arrays.view(counted[group.rank], name="counts")
        answer: tuple[int, list[int]] | ConfigError
        try:
            answer = told.wait(3, row, None, num_local_experts=num_local_experts, counted=view)
        except ConfigError as error:
            answer = error
        group.barrier()  # all are still in step
        return answer

    answers = run_local(body, 4)
    # Rows of rank 0 do not fit. The other node does not hear of it.
    assert "rank 0 receives 100 tokens" in str(answers[0])
    assert "another rank" in str(answers[1])
    assert not any(isinstance(answer, ConfigError) and answer.is_collective for answer in answers)
    total = counted.sum(axis=0).tolist()
    assert answers[2:] == [(1, total[4:6]), (1, total[6:8])]


@pytest.mark.parametrize("row_bytes", [0, 4096, 14336, 65536, 1 << 18])
@pytest.mark.parametrize("num_nodes", range(1, MAX_NODES + 1))
def test_rings_fit_into_what_they_are_given(num_nodes: int, row_bytes: int) -> None:
    record_bytes = plan.record_bytes(row_bytes, 8)
    assert record_bytes > row_bytes
    usual = plan.rings(num_nodes, 0, record_bytes)
    assert (usual.num_channels, usual.num_slots) == (32, 4)
    assert usual.num_channels <= MAX_CHANNELS
    assert usual.num_slots <= MAX_SLOTS
    # A slot is 128 KiB, unless a row takes more: 16 MiB for each node.
    assert usual.slot_bytes == max(128 << 10, record_bytes)
    assert usual.num_bytes(num_nodes) == 128 * num_nodes * usual.slot_bytes
    # In memory for less of them there are half as many channels, in whole steps, and one at least.
    channel_bytes = 2 * num_nodes * usual.num_slots * usual.slot_bytes
    for num_channels in (32, 16, 8, 4, 2, 1):
        least = num_channels * channel_bytes
        for num_bytes in least, least + 1, 2 * least - 1:
            rings = plan.rings(num_nodes, num_bytes, record_bytes)
            assert rings == replace(usual, num_channels=num_channels)
            assert 2 * rings.num_bytes(num_nodes) <= num_bytes
    assert plan.rings(num_nodes, 1 << 40, record_bytes) == usual
    for num_bytes in 1, channel_bytes - 1:
        with pytest.raises(ConfigError, match=f"{num_nodes} nodes take at least {channel_bytes}$"):
            plan.rings(num_nodes, num_bytes, record_bytes)


def report(rank: int, phase: int, waits: dict[int, tuple[int, int]]) -> Report:
    return Report(
        rank=rank, reason=Reason.EXPIRED, operation=Operation.DISPATCH, phase=phase, epoch=7, waits=waits
    )


def farewell(
    missing: int, reason: int = Reason.EXPIRED, *, call: int = 7, operation: int = Operation.DISPATCH
) -> int:
    """As the kernels say it."""
    return missing << 32 | (signal_word(call, operation) << 4 & 0xFFFFFFFF) | reason


def test_errors_name_ranks_of_all_nodes() -> None:
    names = Names(local=(4, 5, 6, 7), num_ranks=12)
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)
    over_the_network = names.of(report(1, 0, {2: word}))
    assert (over_the_network.rank, set(over_the_network.waits)) == (5, {9})
    within = names.of(report(1, 3, {2: word}))
    assert (within.rank, set(within.waits)) == (5, {6})
    reports = [over_the_network, None, within, None]
    error = verdict(reports, rank=5, timeout_s=1.0, num_ranks=12, ranks_per_node=4)
    assert isinstance(error, PeerTimeoutError)
    assert (error.rank, error.peers, error.nodes) == (5, (9,), (2,))
    assert str(error).startswith("rank 5: rank 9 (node 2) did not arrive in ")


def test_those_that_gave_up_are_not_blamed_but_those_that_they_waited_for() -> None:
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)
    waits = {1: word, 2: word}
    # Node 1 waited for nodes 0, which is this one, and 3; node 2 said nothing.
    farewells = [0, farewell(0b1001), 0, 0]
    found = report(0, 0, waits).with_farewells(farewells, own=0).waits
    late = {node for node, (_, seen) in found.items() if seen == word[1]}
    assert (late, set(found)) == ({2, 3}, {1, 2, 3})
    elsewhere = {1: (word[0], signal_word(7, Operation.BARRIER))}
    assert report(0, 0, elsewhere).with_farewells(farewells, own=0).waits == elsewhere


def test_all_say_that_arguments_differ() -> None:
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)
    # Node 1 has other arguments than node 0, which is this one, and node 3.
    found = report(0, 0, {1: word}).with_farewells([0, farewell(0b1001, Reason.DISAGREED), 0, 0], own=0)
    assert (found.reason, set(found.waits)) == (Reason.DISAGREED, {1})
    # Node 1 says so of node 2 alone.
    found = report(0, 0, {1: word}).with_farewells([0, farewell(0b100, Reason.DISAGREED), 0, 0], own=0)
    assert (found.reason, set(found.waits)) == (Reason.DISAGREED, {2})
    error = verdict([found], rank=0, timeout_s=1.0, num_ranks=4)
    assert isinstance(error, ConfigError)
    assert "agree among each other: 0, 1, 3; 2" in str(error)


def test_a_rank_that_gave_up_another_call() -> None:
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)

    def said(**call: int) -> EpError:
        return verdict(
            [report(0, 0, {1: word}).with_farewells([0, farewell(1, **call)], own=0)],
            rank=0,
            timeout_s=1.0,
            num_ranks=2,
        )

    assert isinstance(said(operation=Operation.COMBINE), CollectiveMismatchError)
    # An earlier one.
    assert isinstance(said(operation=Operation.COMBINE, call=6), PeerTimeoutError)
    assert Farewell.of(farewell(5, Reason.DISAGREED, call=0x12345)) == Farewell(
        5, Reason.DISAGREED, Operation.DISPATCH, 0x345
    )


def test_who_is_told_of_whom() -> None:
    names = Names(local=(2, 3), num_ranks=4)
    word = signal_word(7, Operation.DISPATCH), signal_word(6, Operation.NO_OPERATION)

    def given_up(operation: int) -> list[int]:
        word = farewell(0, call=6)
        return [word, 0, 0, 0] if operation == Operation.LOW_LATENCY_DISPATCH else [word, 0]

    def named(found: Report, **changes: Any) -> bool:
        told = names.informed(replace(found, **changes), given_up, rank=1)
        return signal_operation(told.waits[0][1]) == Operation.GAVE_UP

    over_the_network = report(1, 0, {0: word})
    assert named(over_the_network)
    assert not named(over_the_network, phase=3)
    assert not named(over_the_network, rank=0)
    assert named(over_the_network, rank=0, phase=3, operation=Operation.LOW_LATENCY_DISPATCH)
    alone = Names(local=(0, 1), num_ranks=2)
    assert alone.informed(over_the_network, given_up, rank=1) is over_the_network


def test_areas_lie_at_the_same_place_on_all_ranks() -> None:
    memory = SymmetricMemory(1 << 20, 1024)
    domain: Any = SimpleNamespace(group=SimpleNamespace(rank=1))
    network: Any = SimpleNamespace(
        group=SimpleNamespace(rank=3, size=4), pointers=lambda _: (0, 0, 7 << 20, memory.pointer)
    )
    places = SymmetricPlaces(network, memory, domain, with_stores=True)
    assert (places.first_rank, places.is_over_network) == (2, True)
    pieces = [places.take(300), places.take(500)]
    assert [piece.offset % OFFSET_UNIT for piece in pieces] == [0, 0]
    assert pieces[1].offset >= 300
    at = pieces[1].offset
    assert places.pointers([at] * 4) == (0, 0, (7 << 20) + at, memory.pointer + at)
    with pytest.raises(ConfigError, match="300 bytes, and 0 of 1024 are left"):
        places.take(300)
    alone = SymmetricPlaces(network, memory, domain, with_stores=False)
    assert alone.pointers([0] * 4) == (0, 0, 0, memory.pointer)


@pytest.mark.parametrize("first", [0, FIRST_COMBINE_ZONE])
def test_what_was_put_is_received_before_its_zone_is_taken_again(first: int) -> None:
    def area(*, over_network: bool) -> Area:
        made = object.__new__(Area)
        made.shape = AreaShape(
            num_ranks=2, num_max_tokens=1, hidden=8, num_experts=2, num_topk=1, over_network=over_network
        )
        made.reset_pending()
        return made

    def send(area: Area) -> Pending:
        area.check(first=first)
        return area.postpone(area.take_zone(first=first))

    here = area(over_network=False)
    forgotten = send(here)
    send(here)
    send(here)
    assert forgotten.is_taken
    there = area(over_network=True)
    one, two = send(there), send(there)
    for pending in (one, two):
        with pytest.raises(HandleError, match="after the hook of the first"):
            send(there)
        pending.is_received = True
        send(there).is_received = True
    assert one.is_taken
    assert two.is_taken


def test_lists_have_room_for_tokens_of_all_nodes() -> None:
    made = object.__new__(Internode)
    made.num_nodes, made.max_tokens = 3, 11
    assert [made.list_capacity(num_tokens) for num_tokens in (0, 11)] == [22, 33]
    with pytest.raises(ConfigError, match=r"12 tokens; .* at most 11 .* num_max_tokens_per_rank"):
        made.list_capacity(12)


def test_nodes_that_are_not_served() -> None:
    Internode.check(Topology(rank=0, node_of_rank=(0, 0, 1, 1)))
    with pytest.raises(TopologyError, match="consecutive"):
        Internode.check(Topology(rank=0, node_of_rank=(0, 1, 0, 1)))
    with pytest.raises(TopologyError, match="same number"):
        Internode.check(Topology(rank=0, node_of_rank=(0, 0, 1)))
    with pytest.raises(TopologyError, match="at most 32 of 8"):
        Internode.check(Topology(rank=0, node_of_rank=tuple(range(33))))
    many = Topology(rank=0, node_of_rank=tuple(rank // 8 for rank in range(40)))
    Remote.check(many, with_low_latency=False)
    with pytest.raises(TopologyError, match="40 ranks: low-latency calls serve 32"):
        Remote.check(many, with_low_latency=True)


def test_gpus_without_nvlink_hear_what_to_install_and_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = NetworkOptions(service_level=3)

    def absent(*args: object, options: NetworkOptions, **kwargs: object) -> None:
        assert options is given
        raise on_all_ranks(BackendError("rank 1: NVSHMEM is not installed; install ep-rt[cuda12]"))

    monkeypatch.setattr(nvshmem, "Network", absent)
    for lacks_nvlink in (True, False):
        topology = Topology(rank=0, node_of_rank=(0, 1), lacks_nvlink=lacks_nvlink)
        with pytest.raises(BackendError, match=r"^rank 1: NVSHMEM is not installed; install") as caught:
            Remote(
                thread_groups(1)[0],
                topology,
                SimpleNamespace(timeout_s=1.0),  # type: ignore[arg-type]
                SimpleNamespace(),  # type: ignore[arg-type]
                RemoteSizes(max_tokens=8, max_record_bytes=1024),
                given,
                with_low_latency=False,
                with_stores=True,
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

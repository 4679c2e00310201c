"""Groups of threads, and what all groups share: rounds, deadlines, farewells."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ep_rt import errors, groups
from ep_rt.errors import (
    CollectiveMismatchError,
    ConfigError,
    EpError,
    PeerFailedError,
    PeerTimeoutError,
)
from ep_rt.exchange import PeerGroup
from ep_rt.groups import LATE, ByteArray, Group, as_group, run_local, thread_groups


def outcomes(fn: Callable[[Group], object], num_ranks: int, *, timeout_s: float = 0.5) -> list[Any]:
    """What each rank returned or raised. Unlike in `run_local`, no rank's error stops the others."""
    made = thread_groups(num_ranks, timeout_s)
    found: list[Any] = [None] * num_ranks

    def run(group: Group) -> None:
        try:
            found[group.rank] = fn(group)
        except BaseException as error:
            found[group.rank] = error

    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a rank hangs"
    return found


def random_parts(rank: int, num_ranks: int, seed: int) -> tuple[list[ByteArray], list[ByteArray]]:
    """Sizes and bytes that every rank can compute: what `rank` sends, what it must receive."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 3000, (num_ranks, num_ranks)) * rng.integers(0, 2, (num_ranks, num_ranks))
    parts = [
        [
            np.random.default_rng([seed, s, d]).integers(0, 256, sizes[s, d], np.uint8)
            for d in range(num_ranks)
        ]
        for s in range(num_ranks)
    ]
    return parts[rank], [parts[src][rank].copy() for src in range(num_ranks)]


def nothing(num_ranks: int) -> list[ByteArray]:
    return [np.empty(0, np.uint8) for _ in range(num_ranks)]


# Values.


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_allgather_is_in_rank_order(num_ranks: int) -> None:
    def fn(group: Group) -> list[Any]:
        time.sleep(0.02 * ((group.rank * 3) % num_ranks))
        return [group.allgather((group.rank, step)) for step in range(3)]

    expected = [[(rank, step) for rank in range(num_ranks)] for step in range(3)]
    assert run_local(fn, num_ranks) == [expected] * num_ranks


def test_allgather_among_some_ranks() -> None:
    def fn(group: Group) -> list[Any]:
        pair = [0, 2] if group.rank in (0, 2) else [3, 1, 1]
        return [group.allgather(group.rank, ranks=pair), group.allgather(-group.rank)]

    everyone = [0, -1, -2, -3]
    even, odd = [[0, None, 2, None], everyone], [[None, 1, None, 3], everyone]
    assert run_local(fn, 4) == [even, odd, even, odd]


def test_this_rank_always_takes_part() -> None:
    assert run_local(lambda group: group.allgather(7, ranks=[]), 2) == [[7, None], [None, 7]]


@pytest.mark.parametrize("ranks", [[0, 2], [-1]])
def test_ranks_that_do_not_exist_are_refused_and_nothing_is_sent(ranks: list[int]) -> None:
    def fn(group: Group) -> list[Any]:
        if group.rank == 0:
            with pytest.raises(ConfigError, match="ranks="):
                group.allgather(None, ranks=ranks)
        return group.allgather(group.rank)

    assert run_local(fn, 2) == [[0, 1]] * 2


def test_skip_late_gives_late_and_the_late_rank_catches_up() -> None:
    def fn(group: Group) -> list[Any]:
        if group.rank == 1:
            time.sleep(0.6)
        first = group.allgather(("first", group.rank), timeout_s=0.2, skip_late=True)
        if group.rank != 1:
            time.sleep(0.8)
        # The message of the first round, late, must not be taken for one of the second.
        return [first, group.allgather(("second", group.rank), timeout_s=2)]

    second = [("second", rank) for rank in range(3)]
    found = run_local(fn, 3)
    assert found[0] == found[2] == [[("first", 0), LATE, ("first", 2)], second]
    assert found[1] == [[("first", rank) for rank in range(3)], second]
    assert repr(LATE) == "LATE"


def test_skip_late_does_not_wait_for_ranks_that_left() -> None:
    def fn(group: Group) -> list[Any]:
        if group.rank == 1:
            group.abort(ValueError("enough"))
            return []
        time.sleep(0.1)
        began = time.monotonic()
        values = group.allgather(group.rank, timeout_s=5, skip_late=True)
        assert time.monotonic() - began < 1
        return values

    assert outcomes(fn, 3)[0] == [0, LATE, 2]


def test_a_rank_left_behind_is_told_so_at_once() -> None:
    def fn(group: Group) -> list[Any]:
        if group.rank != 1:
            group.allgather("without 1", ranks=[0, 2])
        else:
            time.sleep(0.1)
            began = time.monotonic()
            late = group.allgather("left behind", timeout_s=5, skip_late=True)
            assert late == [LATE, "left behind", LATE]
            assert time.monotonic() - began < 1
        return group.allgather(group.rank, timeout_s=2)

    assert run_local(fn, 3) == [[0, 1, 2]] * 3

    def strict(group: Group) -> None:
        if group.rank == 0:
            group.allgather(None, ranks=[0])
        group.allgather(None, timeout_s=5)

    began = time.monotonic()
    found = outcomes(strict, 2)
    assert time.monotonic() - began < 2
    assert isinstance(found[1], PeerFailedError)
    assert "without this rank" in str(found[1])
    assert isinstance(found[0], PeerFailedError)


def test_messages_of_a_rank_that_is_left_out_do_not_pile_up() -> None:
    group, _, left_out = thread_groups(3)
    for _ in range(50):
        left_out.allgather(None, skip_late=True, timeout_s=0)
        group.allgather(None, skip_late=True, timeout_s=0, ranks=[1])
    assert len(group._inbox[2]) <= 1


def test_old_messages_are_not_taken_for_new_ones() -> None:
    group, peer = thread_groups(2)
    for value in ("old", "new"):
        peer.allgather(value, skip_late=True, timeout_s=0)
    assert group.allgather(None, ranks=[], timeout_s=0) == [None, None]
    group._poll()
    assert group.allgather(None, timeout_s=0) == [None, "new"]


def test_barrier_waits_for_the_last() -> None:
    entered: list[int] = []

    def fn(group: Group) -> int:
        for step in range(10):
            time.sleep(random.uniform(0, 0.01))
            entered.append(step)
            group.barrier()
            assert entered.count(step) == 4
        return 0

    run_local(fn, 4)


# Bytes.


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_alltoallv(num_ranks: int) -> None:
    def fn(group: Group) -> None:
        for seed in range(5):
            send, expected = random_parts(group.rank, num_ranks, seed)
            recv = [np.zeros_like(part) for part in expected]
            group.alltoallv(send, recv)
            send[group.rank][:] = 0
            for got, want in zip(recv, expected, strict=True):
                np.testing.assert_array_equal(got, want)

    run_local(fn, num_ranks)


def test_alltoallv_sizes_that_disagree() -> None:
    def fn(group: Group) -> None:
        size = 5 if group.rank == 2 else 4
        with pytest.raises(ConfigError, match="rank 2 sends 5 bytes to rank 1, which expects 4") as caught:
            group.alltoallv(
                [np.zeros(size if d == 1 else 0, np.uint8) for d in range(3)],
                [np.zeros(4 if group.rank == 1 else 0, np.uint8) for _ in range(3)],
            )
        assert caught.value.is_collective
        group.barrier()

    run_local(fn, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([np.zeros(0, np.uint8)], "has 1 arrays for 2 ranks"),
        ([np.zeros(0, np.uint8), np.zeros(1, np.float32)], r"\[1\] is not a contiguous 1-D uint8"),
        ([np.zeros(0, np.uint8), np.zeros(8, np.uint8)[::2]], r"\[1\] is not a contiguous 1-D uint8"),
        ([np.zeros(0, np.uint8), np.zeros((1, 1), np.uint8)], r"\[1\] is not a contiguous 1-D uint8"),
    ],
)
def test_arrays_that_cannot_travel_are_refused_on_every_rank(bad: list[Any], message: str) -> None:
    def fn(group: Group) -> None:
        arrays = bad if group.rank == 1 else nothing(2)
        for send, recv in ((arrays, nothing(2)), (nothing(2), arrays)):
            with pytest.raises(ConfigError, match="rank 1: (send|recv)" + ".*" + message) as caught:
                group.alltoallv(send, recv)
            assert caught.value.is_collective
        if group.rank == 1:
            with pytest.raises(ConfigError, match=message):
                group.ialltoallv(bad, nothing(2))
        group.barrier()

    run_local(fn, 2)


def test_read_only_arrays_are_sent_but_not_received_into() -> None:
    frozen = np.arange(3, dtype=np.uint8)
    frozen.flags.writeable = False
    (group,) = thread_groups(1)
    recv = np.zeros(3, np.uint8)
    group.alltoallv([frozen], [recv])
    assert recv.tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"recv\[0\] is read-only"):
        group.ialltoallv([recv], [frozen])
    with pytest.raises(ConfigError, match="sends itself 3 bytes and expects 1"):
        group.ialltoallv([recv], [np.zeros(1, np.uint8)])


def test_a_parcel_of_another_size_is_refused() -> None:
    def fn(group: Group) -> None:
        size = 1 if group.rank == 0 else 4
        group.ialltoallv(
            [np.zeros(size if d != group.rank else 0, np.uint8) for d in range(2)],
            [np.zeros(4 if s != group.rank else 0, np.uint8) for s in range(2)],
        ).receive()

    assert "rank 0 sent 1 bytes, not 4" in str(outcomes(fn, 2)[1])


def test_transfers_in_flight() -> None:
    num_ranks = 4

    def fn(group: Group) -> None:
        parts = [random_parts(group.rank, num_ranks, seed) for seed in range(6)]
        recv = [[np.zeros_like(part) for part in expected] for _, expected in parts]
        transfers = []
        for (send, _), into in zip(parts, recv, strict=True):
            transfers.append(group.ialltoallv(send, into))
            assert group.allgather(group.rank) == list(range(num_ranks))
        order = list(range(6))
        random.Random(group.rank).shuffle(order)
        for seed in order:
            assert transfers[seed].receive() == ()
            for got, want in zip(recv[seed], parts[seed][1], strict=True):
                np.testing.assert_array_equal(got, want)
        group.barrier()
        for transfer in transfers:
            assert transfer.finish() == ()
            assert transfer.finished

    run_local(fn, num_ranks)


def test_receive_needs_no_receiving_peer_and_finish_does() -> None:
    def fn(group: Group) -> None:
        send = [np.full(4, group.rank, np.uint8) for _ in range(2)]
        recv = [np.zeros(4, np.uint8) for _ in range(2)]
        transfer = group.ialltoallv(send, recv)
        if group.rank == 1:
            assert transfer.receive() == ()
            assert recv[0].tolist() == [0] * 4
            assert not transfer.finished
            assert transfer.finish(timeout_s=0, skip_late=True) == (0,)
            group.barrier()
        else:
            group.barrier()
            transfer.receive()
        transfer.finish()
        assert transfer.finished

    run_local(fn, 2)


def test_receive_skips_late_sources_and_says_how_long_it_waited() -> None:
    def fn(group: Group) -> tuple[int, ...]:
        send = [np.full(4, 1 + group.rank, np.uint8) for _ in range(3)]
        recv = [np.zeros(4, np.uint8) for _ in range(3)]
        if group.rank == 2:
            time.sleep(0.5)
        transfer = group.ialltoallv(send, recv)
        late = transfer.receive(timeout_s=0.2, skip_late=True)
        if group.rank == 0:
            assert recv[1].tolist() == [2] * 4
            assert recv[2].tolist() == [0] * 4
            assert set(transfer.waited_s) == {1}
        group.barrier()
        transfer.receive()
        assert recv[2].tolist() == [3] * 4
        if group.rank == 0:
            assert set(transfer.waited_s) == {1, 2}
        group.barrier()
        return late

    assert run_local(fn, 3) == [(2,), (2,), ()]


# Mismatched calls.


def test_mismatched_operations_name_every_rank_and_leave_the_group_usable() -> None:
    calls: list[Callable[[Group], object]] = [
        lambda group: group.allgather(None, op="dispatch"),
        lambda group: group.alltoallv(nothing(4), nothing(4)),
        lambda group: group.allgather(None, op="dispatch"),
        lambda group: group.barrier(),
    ]

    def fn(group: Group) -> list[Any]:
        for _ in range(3):
            with pytest.raises(CollectiveMismatchError) as caught:
                calls[group.rank](group)
            assert str(caught.value) == (
                "ranks called different operations: "
                "dispatch on ranks 0, 2; alltoallv on rank 1; barrier on rank 3"
            )
            assert caught.value.operations == ("dispatch", "alltoallv", "dispatch", "barrier")
            assert caught.value.is_collective
        group.alltoallv(nothing(4), nothing(4))
        return group.allgather(group.rank)

    assert run_local(fn, 4) == [[0, 1, 2, 3]] * 4


def test_mismatch_among_some_ranks() -> None:
    def fn(group: Group) -> None:
        if group.rank == 2:
            group.allgather(None, op="other", ranks=[2])
        else:
            with pytest.raises(CollectiveMismatchError, match=r"a on rank 0; b on rank 1$"):
                group.allgather(None, op="ab"[group.rank], ranks=[0, 1])
        group.barrier()

    run_local(fn, 3)


# Late ranks.


@pytest.mark.parametrize(
    ("late", "how"),
    list(itertools.product(range(4), ["allgather", "transfer"])),
)
def test_a_late_rank_is_named_on_every_survivor(late: int, how: str) -> None:
    def fn(group: Group) -> None:
        skew = random.Random(10 * late + group.rank)
        for step in range(6):
            time.sleep(skew.uniform(0, 0.05))
            if group.rank == late and step == 3:
                time.sleep(0.6)
            if how == "allgather":
                group.allgather(step, op=f"step {step}")
            else:
                sizes = [np.zeros(8, np.uint8) for _ in range(4)]
                group.ialltoallv(sizes, [np.zeros(8, np.uint8) for _ in range(4)]).receive()

    found = outcomes(fn, 4, timeout_s=0.2)
    for rank, error in enumerate(found):
        assert isinstance(error, PeerTimeoutError), (rank, error)
        assert error.peers == (late,), (rank, error)
        assert error.peer == late
        assert error.rank == rank
        assert isinstance(error, TimeoutError)
    survivor = found[(late + 1) % 4]
    assert f"rank {late} did not arrive in" in str(survivor)
    assert survivor.timeout_s == 0.2


def test_a_timeout_takes_about_the_timeout() -> None:
    def fn(group: Group) -> float:
        if group.rank == 0:
            return 0
        began = time.monotonic()
        with pytest.raises(PeerTimeoutError, match=r"rank 0 did not arrive in barrier within 0\.3 s"):
            group.barrier(timeout_s=0.3)
        return time.monotonic() - began

    assert 0.3 <= outcomes(fn, 2, timeout_s=50)[1] < 1.0


def test_several_late_ranks_are_all_named() -> None:
    def fn(group: Group) -> None:
        if group.rank in (1, 3):
            time.sleep(1)
        group.barrier()

    for error in outcomes(fn, 4, timeout_s=0.3):
        if isinstance(error, PeerTimeoutError) and error.rank in (0, 2):
            assert error.peers == (1, 3)


# Parting.


def parting(group: Group) -> PeerGroup:
    assert isinstance(group, PeerGroup)
    return group


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ranks_part_from_different_rounds_and_meet_again(num_ranks: int) -> None:
    def fn(group: Group) -> None:
        for turn in range(6):
            # Rank r makes some calls more than the first to part; who has parted is late at once.
            num_calls = (3 * group.rank + turn) % num_ranks
            for call in range(num_calls):
                values = group.allgather((turn, call), timeout_s=20, skip_late=True)
                stays = [(3 * rank + turn) % num_ranks > call for rank in range(num_ranks)]
                assert values == [(turn, call) if here else LATE for here in stays]
            time.sleep(random.uniform(0, 0.01))
            assert parting(group).part(timeout_s=20) == ()
            if turn % 2:
                assert group.allgather((group.rank, turn)) == [(rank, turn) for rank in range(num_ranks)]

    began = time.monotonic()
    run_local(fn, num_ranks)
    assert time.monotonic() - began < 10


def test_who_is_not_waited_for_may_part_later() -> None:
    def fn(group: Group) -> None:
        for turn in range(3):
            lost = turn % 3
            if group.rank == lost:
                time.sleep(1)
                assert parting(group).part(timeout_s=5) == ()
            else:
                others = [rank for rank in range(3) if rank != lost]
                assert group.allgather(turn, ranks=others)[group.rank] == turn
                began = time.monotonic()
                assert parting(group).part(timeout_s=5, ranks=others) == (lost,)
                assert time.monotonic() - began < 0.8
            # An old parting is not taken for one of now, whether it came before or comes later.
            assert group.allgather((turn, group.rank)) == [(turn, rank) for rank in range(3)]

    run_local(fn, 3)


def test_to_part_is_another_operation() -> None:
    def fn(group: Group) -> list[Any]:
        if group.rank == 1:
            with pytest.raises(CollectiveMismatchError, match="close on rank 0"):
                group.allgather(None, op="dispatch")
        assert parting(group).part(op="close", timeout_s=5) == ()
        return group.allgather(group.rank)

    assert run_local(fn, 2) == [[0, 1]] * 2


def test_who_does_not_part_in_time_is_named() -> None:
    def fn(group: Group) -> tuple[int, ...]:
        if group.rank == 2:
            return ()
        return parting(group).part(timeout_s=0.2)

    assert run_local(fn, 3) == [(2,), (2,), ()]


def test_ranks_rejoin_from_different_rounds_and_transfers() -> None:
    """One makes fewer calls of both kinds; what it was sent meanwhile is not taken for what comes."""

    def fn(group: Group) -> None:
        for turn in range(1, 4):
            behind = turn % 3
            if group.rank != behind:
                others = [rank for rank in range(3) if rank != behind]
                for _ in range(turn):
                    assert group.allgather(turn, timeout_s=0.05, skip_late=True)[behind] is LATE
                    sizes = [int(rank in others) for rank in range(3)]
                    recv = [np.zeros(size, np.uint8) for size in sizes]
                    transfer = group.ialltoallv([np.full(size, turn, np.uint8) for size in sizes], recv)
                    assert transfer.receive(timeout_s=5) == ()
            parting(group).rejoin(op="reset", timeout_s=5)
            assert group.allgather((turn, group.rank)) == [(turn, rank) for rank in range(3)]
            recv = [np.zeros(2, np.uint8) for _ in range(3)]
            group.alltoallv([np.full(2, 10 * group.rank + dst, np.uint8) for dst in range(3)], recv)
            assert [each.tolist() for each in recv] == [[10 * src + group.rank] * 2 for src in range(3)]

    run_local(fn, 3, timeout_s=5)


def test_who_does_not_rejoin_is_named_and_may_come_later() -> None:
    """It is ahead; those that were in step with each other still are."""
    met, given_up = threading.Barrier(3), threading.Barrier(2)

    def fn(group: Group) -> None:
        if group.rank == 2:
            for _ in range(3):
                group.allgather(None, timeout_s=0.01, skip_late=True)
        else:
            with pytest.raises(PeerTimeoutError, match="reset") as caught:
                parting(group).rejoin(op="reset", timeout_s=0.2)
            assert 2 in caught.value.peers  # and perhaps the other one, which has given up as well
            given_up.wait(10)
            assert group.allgather("on", ranks=[0, 1], timeout_s=5) == ["on", "on", None]
        met.wait(10)
        parting(group).rejoin(op="reset", timeout_s=5)
        assert group.allgather(group.rank) == [0, 1, 2]

    run_local(fn, 3)


def test_a_rank_that_is_not_waited_for_moves_no_counts() -> None:
    """Some would hear of it in time, and others not."""
    parted = threading.Event()

    def fn(group: Group) -> None:
        if group.rank == 2:
            for _ in range(3):
                group.allgather(None, timeout_s=0.01, skip_late=True)
            parting(group).part(timeout_s=0.01)
            parted.set()
            return
        parted.wait(10)
        assert parting(group).part(timeout_s=5, ranks=[0, 1]) == ()
        assert parting(group)._round == 0
        assert group.allgather(group.rank, ranks=[0, 1], timeout_s=5)[:2] == [0, 1]

    run_local(fn, 3)


def test_what_is_said_after_a_parting_is_no_part_of_this_round() -> None:
    met = threading.Barrier(2)

    def fn(group: Group) -> None:
        if group.rank == 1:
            assert parting(group).part(timeout_s=0.01) == (0,)
            group.allgather("after", op="another", timeout_s=0.01, skip_late=True)
            met.wait(10)
        else:
            met.wait(10)
            assert group.allgather("now", op="one", timeout_s=5, skip_late=True) == ["now", LATE]

    run_local(fn, 2)


def test_partings_for_different_reasons_are_told_apart() -> None:
    """Who would begin anew is told; who ends waits for the other to end, too."""

    def fn(group: Group) -> list[Any]:
        here = parting(group)
        if group.rank == 0:
            with pytest.raises(CollectiveMismatchError, match="reset on rank 0; close on rank 1"):
                here.rejoin(op="reset", timeout_s=5)
        else:
            group.allgather(None, ranks=[1])
        assert here.part(op="close", timeout_s=5) == ()
        return group.allgather(group.rank)

    assert run_local(fn, 2) == [[0, 1]] * 2


def test_rejoin_names_who_has_left() -> None:
    left = threading.Event()

    def fn(group: Group) -> None:
        if group.rank == 2:
            group.abort(ValueError("enough"))
            left.set()
            return
        left.wait(10)
        with pytest.raises(PeerFailedError, match="enough"):
            parting(group).rejoin(op="reset", timeout_s=5)

    run_local(fn, 3)


class _Chained(groups.ThreadGroup):
    """Every rank loses what it would send to the one before it, which then waits for it."""

    def _post(self, peers: Any, message: Any) -> None:
        if message[1] == "chained":
            peers = [peer for peer in peers if peer != self.rank - 1]
        super()._post(peers, message)


def test_in_a_chain_of_waits_only_the_end_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "ThreadGroup", _Chained)

    def fn(group: Group) -> None:
        if group.rank == 3:
            time.sleep(0.8)
            return
        # All give up at almost the same time, in any order.
        time.sleep(random.uniform(0, 0.05))
        group.allgather(None, op="chained", timeout_s=0.3)

    for _ in range(2):
        found = outcomes(fn, 4)
        assert [error.peers for error in found[:3]] == [(3,)] * 3


def test_a_late_rank_hears_that_it_was_late() -> None:
    def fn(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1)
            with contextlib.suppress(PeerTimeoutError):
                group.barrier(timeout_s=50)  # the others' messages of this round are there
            with pytest.raises(PeerTimeoutError) as caught:
                group.barrier(timeout_s=50)
            assert caught.value.peers == (1,)
        else:
            with pytest.raises(PeerTimeoutError):
                group.barrier()

    began = time.monotonic()
    assert outcomes(fn, 3, timeout_s=0.3) == [None] * 3
    assert time.monotonic() - began < 4


def test_who_says_that_it_was_late_itself_is_to_blame() -> None:
    group = thread_groups(5)[0]
    # 1 waited for 2 and 3; 2 came in the meantime and knows of it; 3 waited for 4, of which nothing is known.
    group._left = {1: (2, 3), 2: (2,), 3: (4,)}
    error = group._give_up([1], "barrier", 0.1)
    assert isinstance(error, PeerTimeoutError)
    assert error.peers == (2, 4)


def test_a_broken_group_raises_the_same_error_at_once() -> None:
    def fn(group: Group) -> None:
        if group.rank == 1:
            time.sleep(0.8)
            return
        with pytest.raises(PeerTimeoutError) as first:
            group.barrier()
        arrays = nothing(2)
        began = time.monotonic()
        calls: list[Callable[[], object]] = [
            group.barrier,
            lambda: group.allgather(1),
            lambda: group.allgather(1, skip_late=True),
            lambda: group.alltoallv(arrays, arrays),
            lambda: group.ialltoallv(arrays, arrays),
        ]
        group.abort(RuntimeError("changes nothing any more"))
        for call in calls:
            with pytest.raises(PeerTimeoutError) as again:
                call()
            assert again.value is first.value
        assert time.monotonic() - began < 0.1

    assert outcomes(fn, 2, timeout_s=0.2) == [None, None]


# Ranks that leave.


def test_abort_reaches_the_peers_with_its_reason() -> None:
    def fn(group: Group) -> None:
        if group.rank == 2:
            group.abort(ValueError("no data"))
            with pytest.raises(PeerFailedError):
                group.barrier()
            return
        with pytest.raises(PeerFailedError) as caught:
            group.barrier(timeout_s=20)
        assert (caught.value.rank, caught.value.peer) == (group.rank, 2)
        assert caught.value.reason == "ValueError: no data"
        assert isinstance(caught.value.__cause__, ValueError)

    began = time.monotonic()
    assert outcomes(fn, 3) == [None] * 3
    assert time.monotonic() - began < 1


def test_what_was_sent_before_the_farewell_stays_valid() -> None:
    def fn(group: Group) -> list[Any]:
        values = group.allgather(group.rank)
        if group.rank == 0:
            group.abort(RuntimeError("gone"))
        return values

    for _ in range(20):
        assert outcomes(fn, 3) == [[0, 1, 2]] * 3


def test_a_failure_is_passed_on_to_ranks_that_wait_for_others() -> None:
    def fn(group: Group) -> None:
        # 2 fails; 1 waits for 2; 0 waits for 1 alone, and must neither wait long nor blame 1.
        if group.rank == 2:
            raise_in_group(group)
        elif group.rank == 1:
            group.allgather(None, ranks=[1, 2], timeout_s=20)
        else:
            group.allgather(None, ranks=[0], timeout_s=20)
            group.allgather(None, ranks=[0, 1], timeout_s=20)

    def raise_in_group(group: Group) -> None:
        time.sleep(0.1)
        group.abort(KeyError("lost"))

    began = time.monotonic()
    found = outcomes(fn, 3)
    assert time.monotonic() - began < 2
    for error in found[:2]:
        assert isinstance(error, PeerFailedError)
        assert error.peer == 2
        assert "KeyError" in error.reason
        assert isinstance(error.__cause__, KeyError)


# run_local.


def test_run_local_returns_in_rank_order_and_passes_arguments() -> None:
    def fn(group: Group, base: int, names: list[str]) -> str:
        time.sleep(0.01 * (3 - group.rank))
        return f"{names[group.rank]}{base + group.size}"

    assert run_local(fn, 3, 10, ["a", "b", "c"]) == ["a13", "b13", "c13"]


@pytest.mark.parametrize("blocked_in", ["barrier", "transfer", "finish", "allgather of some"])
def test_an_error_of_one_rank_stops_the_others(blocked_in: str) -> None:
    stopped: list[BaseException] = []
    error = ZeroDivisionError("rank 1 divides")

    def fn(group: Group) -> None:
        arrays = [np.zeros(8 if peer != group.rank else 0, np.uint8) for peer in range(3)]
        if group.rank == 1:
            time.sleep(0.1)
            raise error
        try:
            if blocked_in == "barrier":
                group.barrier()
            elif blocked_in == "transfer":
                group.ialltoallv(arrays, [array.copy() for array in arrays]).receive()
            elif blocked_in == "finish":
                group.ialltoallv(arrays, [array.copy() for array in arrays]).finish()
            else:
                group.allgather(None, ranks=[group.rank, (group.rank + 1) % 3])
        except PeerFailedError as failure:
            stopped.append(failure)
            raise

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError) as caught:
        run_local(fn, 3)
    assert caught.value is error
    assert [failure.__cause__ for failure in stopped] == [error, error]
    assert time.monotonic() - began < 2


def test_the_error_that_stops_the_others_is_seen_before_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_abort(group: groups.ThreadGroup, error: BaseException) -> None:
        abort(group, error)
        time.sleep(0.2)

    abort = groups.ThreadGroup.abort
    monkeypatch.setattr(groups.ThreadGroup, "abort", slow_abort)

    def fn(group: Group) -> None:
        if group.rank == 1:
            raise ZeroDivisionError
        group.barrier()

    with pytest.raises(ZeroDivisionError):
        run_local(fn, 2)


def test_a_collective_error_of_all_ranks_surfaces_as_itself() -> None:
    def fn(group: Group) -> None:
        group.allgather(None, op="dispatch" if group.rank else "combine")

    for _ in range(20):
        with pytest.raises(CollectiveMismatchError):
            run_local(fn, 4)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_exceptions_that_are_not_errors_surface_too(kind: type[BaseException]) -> None:
    def fn(group: Group) -> None:
        if group.rank == 0:
            raise kind
        group.barrier()

    with pytest.raises(kind):
        run_local(fn, 2)


class _InterruptedQueue:
    def put(self, item: object) -> None: ...

    def get(self) -> None:
        time.sleep(0.2)
        raise KeyboardInterrupt


def test_an_interrupt_of_the_caller_stops_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[PeerFailedError] = []

    def fn(group: Group) -> None:
        try:
            while True:
                group.barrier()
        except PeerFailedError as error:
            stopped.append(error)

    monkeypatch.setattr(groups, "SimpleQueue", _InterruptedQueue)
    with pytest.raises(KeyboardInterrupt):
        run_local(fn, 3)
    assert sorted(failure.rank for failure in stopped) == [0, 1, 2]
    assert all("KeyboardInterrupt" in str(failure) for failure in stopped)


def test_run_local_timeout() -> None:
    def fn(group: Group) -> None:
        if group.rank == 1:
            time.sleep(1)
        group.barrier()

    began = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        run_local(fn, 2, timeout_s=0.2)
    assert caught.value.peers == (1,)
    assert time.monotonic() - began < 2


def test_a_rank_that_never_stops_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_GRACE_S", 0.2)
    release = threading.Event()

    def fn(group: Group) -> None:
        if group.rank == 1:
            release.wait(20)
        else:
            raise ValueError("of rank 0")

    began = time.monotonic()
    with pytest.raises(ValueError, match="of rank 0"):
        run_local(fn, 2)
    assert time.monotonic() - began < 1
    release.set()


def test_num_ranks_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="num_ranks=0"):
        run_local(lambda group: None, 0)


# as_group.

_MPI_NAMES = groups._MPI_LAUNCH_VARIABLES


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    for name in _MPI_NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_mpi")
def test_no_group_without_mpi_is_one_rank() -> None:
    group = as_group()
    assert (group.rank, group.size) == (0, 1)
    assert group.allgather("x") == ["x"]
    recv = np.zeros(2, np.uint8)
    group.alltoallv([np.array([1, 2], np.uint8)], [recv])
    assert recv.tolist() == [1, 2]
    assert "mpi4py.MPI" not in sys.modules


@pytest.mark.usefixtures("no_mpi")
def test_no_group_under_torchrun_says_what_to_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert as_group().size == 1
    assert "group=torch.distributed.group.WORLD" in caplog.text


@pytest.mark.usefixtures("no_mpi")
@pytest.mark.parametrize("name", _MPI_NAMES)
def test_started_by_an_mpi_launcher_without_mpi4py(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(errors.BackendError, match=r"ep-rt\[mpi\]"):
        as_group()


class OwnGroup:
    """A user's own implementation, which shares nothing with ours."""

    rank = 0
    size = 1

    def allgather(self, value: object, **kwargs: object) -> list[Any]:
        return [value]

    def barrier(self, *, timeout_s: float | None = None) -> None: ...
    def alltoallv(self, send: Any, recv: Any, **kwargs: object) -> None: ...
    def ialltoallv(self, send: Any, recv: Any) -> Any: ...
    def abort(self, error: BaseException) -> None: ...


def test_a_group_is_taken_as_it_is() -> None:
    own = OwnGroup()
    assert as_group(own) is own
    (group,) = thread_groups(1)
    assert as_group(group) is group
    assert repr(group) == "ThreadGroup(rank=0, size=1)"


@pytest.mark.parametrize("thing", [3, "world", object(), [0, 1], np.zeros(2)])
def test_what_names_no_peers_is_refused(thing: object) -> None:
    with pytest.raises(ConfigError, match=r"names no peers; give an mpi4py communicator"):
        as_group(thing)


# Errors travel.


@pytest.mark.parametrize(
    "error",
    [
        PeerTimeoutError(rank=1, peers=[2, 3], phase="barrier", timeout_s=0.5),
        PeerFailedError(rank=1, peer=2, reason="KeyError"),
        CollectiveMismatchError(["a", "b", None]),
        errors.CompileError("k", source="s", options=["-x"], log="l"),
        errors.on_all_ranks(ConfigError("bad")),
    ],
)
def test_errors_survive_pickling(error: EpError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)

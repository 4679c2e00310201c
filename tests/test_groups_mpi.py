"""Groups over MPI: the same collectives between processes, and what happens when one of them dies."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")

from mpi_launch import Launched, launch

PRELUDE = """
import os, signal, sys, time
import numpy as np
import ep_rt.errors as errors
from ep_rt.errors import *
from ep_rt.groups import LATE, as_group
from mpi4py import MPI

group = as_group()
rank, size = group.rank, group.size
began = time.monotonic()

def arrays(n, value=0):
    return [np.full(n if peer != rank else 0, value, np.uint8) for peer in range(size)]

def caught(kind, fn):
    try:
        fn()
    except kind as error:
        print(f"{type(error).__name__} after {time.monotonic() - began:.2f} s: {error}", flush=True)
        return error
    raise SystemExit(f"no {kind}")

"""


def run(
    folder: Path, script: str, *, num_ranks: int = 4, survive: bool = True, limit_s: float = 15
) -> Launched:
    return launch(num_ranks, PRELUDE + textwrap.dedent(script), folder, survive=survive, timeout_s=limit_s)


def succeed(folder: Path, script: str, *, num_ranks: int = 4) -> None:
    done = run(folder, script, num_ranks=num_ranks, survive=False)
    assert done.code == 0, done
    assert done.codes == [0] * num_ranks, done


def test_values_bytes_and_mismatches(tmp_path: Path) -> None:
    script = """
    import pickle, random
    assert (rank, size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    for step in range(20):
        time.sleep(random.Random(rank + step).uniform(0, 0.003))
        assert group.allgather((rank, step)) == [(peer, step) for peer in range(size)]
    # Larger than any eager limit.
    for peer, value in enumerate(group.allgather(np.full(3_000_000, rank, np.uint8))):
        assert value.shape == (3_000_000,) and (value == peer).all()
    pair = [0, 2] if rank in (0, 2) else [1, 3]
    assert group.allgather(rank, ranks=pair) == [peer if peer in pair else None for peer in range(size)]

    late = group.allgather(rank, skip_late=True, timeout_s=0.2) if rank != 3 else time.sleep(0.5)
    if rank == 3:
        assert group.allgather(rank) == [0, 1, 2, 3]
    else:
        assert late == [0, 1, 2, LATE]
        time.sleep(0.5)
    assert group.allgather(-rank) == [0, -1, -2, -3]

    for seed in range(4):
        sizes = np.random.default_rng(seed).integers(0, 200_000, (size, size))
        sizes[:, seed] = 0
        part = lambda s, d: np.random.default_rng([seed, s, d]).integers(0, 256, sizes[s, d], np.uint8)
        recv = [np.zeros(sizes[src, rank], np.uint8) for src in range(size)]
        group.alltoallv([part(rank, dst) for dst in range(size)], recv)
        for src in range(size):
            assert np.array_equal(recv[src], part(src, rank))

    # Several in flight, other collectives in between, received in any order.
    flying = []
    for number in range(5):
        recv = arrays(500_000)
        flying.append((number, recv, group.ialltoallv(arrays(500_000, 10 * number + rank), recv)))
        group.barrier()
    random.Random(rank).shuffle(flying)
    for number, recv, transfer in flying:
        assert transfer.receive() == ()
        for src in range(size):
            assert (recv[src] == 10 * number + src).all()
    for _, _, transfer in flying:
        transfer.finish()
        assert transfer.finished

    error = caught(ConfigError, lambda: group.alltoallv(arrays(5 if rank == 2 else 4), arrays(4)))
    assert "rank 2 sends 5 bytes to rank 0, which expects 4" in str(error) and error.is_collective
    op = "dispatch" if rank == 1 else "combine"
    error = caught(CollectiveMismatchError, lambda: group.allgather(0, op=op))
    assert str(error) == "ranks called different operations: combine on ranks 0, 2, 3; dispatch on rank 1"
    # What cannot be pickled is refused before anything is sent.
    caught((pickle.PicklingError, AttributeError), lambda: group.allgather(lambda: 0))
    assert group.allgather(rank) == [0, 1, 2, 3]
    """
    succeed(tmp_path, script)


def test_as_group_on_communicators(tmp_path: Path) -> None:
    script = """
    assert as_group() is group and as_group(MPI.COMM_WORLD) is group
    duplicate = MPI.COMM_WORLD.Dup()
    other = as_group(duplicate)
    assert other is not group and other is as_group(duplicate)
    half = MPI.COMM_WORLD.Split(rank % 2, -rank)
    part = as_group(half)
    assert (part.rank, part.size) == (half.rank, half.size)
    assert part.allgather(rank) == ([2, 0] if rank % 2 == 0 else [3, 1])
    assert other.allgather(rank) == group.allgather(rank) == [0, 1, 2, 3]
    # Messages of the caller on its own communicator are left alone.
    request = MPI.COMM_WORLD.isend("mine", dest=(rank + 1) % size, tag=5)
    group.barrier()
    assert MPI.COMM_WORLD.recv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG) == "mine"
    request.wait()
    one = as_group(MPI.COMM_SELF)
    assert (one.rank, one.size, one.allgather("x")) == (0, 1, ["x"])
    for wrong in (MPI.COMM_NULL, MPI.COMM_WORLD.Get_group(), MPI.INFO_NULL, MPI):
        caught(ConfigError, lambda: as_group(wrong))
    half.Free(); duplicate.Free()

    from ep_rt.topology import discover
    assert discover(group).node_of_rank == (0, 0, 0, 0)
    assert discover(group, ranks_per_node=3).node_of_rank == (0, 0, 0, 1)
    """
    succeed(tmp_path, script)


STREAMS = {
    "messages": "group.allgather(step, timeout_s=0.5)",
    "large messages": "group.allgather(np.zeros(2_000_000, np.uint8), timeout_s=0.5)",
    "transfers": "group.alltoallv(arrays(4_000_000), arrays(4_000_000), timeout_s=0.5)",
    "split transfers": "group.ialltoallv(arrays(100_000), arrays(100_000)).receive(timeout_s=0.5)",
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_killed_rank_is_named_by_every_survivor(tmp_path: Path, stream: str) -> None:
    victim = list(STREAMS).index(stream)
    script = f"""
    if rank == {victim}:
        # In the middle of whatever it does then.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    for step in range(10**9):
        try:
            {STREAMS[stream]}
        except PeerTimeoutError as error:
            assert error.peers == ({victim},), error
            caught(PeerTimeoutError, group.barrier)
            raise
    """
    done = run(tmp_path, script)
    assert done.code != 0
    for rank, output in enumerate(done.outputs):
        if rank == victim:
            assert done.codes[rank] == -9
        else:
            assert f"ep_rt.errors.PeerTimeoutError: rank {rank}: rank {victim} did not arrive in" in output, (
                output
            )
            assert done.codes[rank] != 0
            assert float(output.partition(" after ")[2].partition(" s")[0]) < 3


def test_survivors_that_handle_the_error_end_too(tmp_path: Path) -> None:
    script = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    caught(PeerTimeoutError, lambda: group.barrier(timeout_s=0.3))
    sys.exit(0 if rank == 0 else 3)
    """
    done = run(tmp_path, script)
    assert done.code != 0
    assert all("rank 1 did not arrive in barrier" in done.outputs[rank] for rank in (0, 2, 3))
    assert 0 not in done.codes


def test_a_killed_rank_ends_the_program_with_the_default_clean_up(tmp_path: Path) -> None:
    script = """
    if rank == 2:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        group.barrier(timeout_s=0.5)
    """
    assert run(tmp_path, script, survive=False).code != 0


@pytest.mark.parametrize("survive", [True, False])
def test_an_ordinary_exception_reaches_the_peers_at_once(tmp_path: Path, survive: bool) -> None:
    script = """
    group.barrier()
    if rank == 3:
        raise KeyError("no such expert")
    error = caught(PeerFailedError, lambda: group.barrier(timeout_s=10))
    assert (error.rank, error.peer) == (rank, 3) and "no such expert" in error.reason
    raise error
    """
    began = time.monotonic()
    done = run(tmp_path, script, survive=survive)
    assert time.monotonic() - began < 6
    assert done.code != 0
    if survive:
        assert all("rank 3 left: KeyError" in done.outputs[rank] for rank in range(3)), done
        assert 0 not in done.codes


def test_a_rank_that_ends_early_is_reported(tmp_path: Path) -> None:
    script = """
    group.barrier()
    if rank == 0:
        sys.exit(0)
    error = caught(PeerFailedError, lambda: group.barrier(timeout_s=10))
    assert error.peer == 0 and error.reason == "the end of its program"
    """
    done = run(tmp_path, script)
    assert done.codes == [0, 0, 0, 0], done


def test_a_rank_that_never_arrives(tmp_path: Path) -> None:
    script = """
    group.barrier()
    if rank == 1:
        time.sleep(1.5)
        error = caught(PeerTimeoutError, lambda: [group.barrier(timeout_s=10), group.barrier(timeout_s=10)])
    else:
        error = caught(PeerTimeoutError, lambda: group.barrier(timeout_s=0.4))
    assert error.peers == (1,), error
    raise error
    """
    done = run(tmp_path, script)
    assert done.code != 0
    for rank, output in enumerate(done.outputs):
        assert f"rank {rank}: rank 1 did not arrive in barrier" in output, output
        assert "AssertionError" not in output
        assert done.codes[rank] != 0


def test_a_rank_that_is_missing_from_the_start_is_named(tmp_path: Path) -> None:
    script = """
    from ep_rt.groups import MpiGroup
    communicator = MPI.COMM_WORLD.Dup()
    if rank != 2:
        error = caught(PeerTimeoutError, lambda: MpiGroup(communicator, timeout_s=0.4))
        assert error.peers == (2,), error
        assert error.phase == "as_group"
    """
    done = run(tmp_path, script)
    assert all("rank 2 did not arrive in as_group" in done.outputs[rank] for rank in (0, 1, 3)), done
    assert not any("AssertionError" in output for output in done.outputs), done


def test_a_message_that_its_sender_cannot_complete_blocks_no_other(tmp_path: Path) -> None:
    script = """
    if rank == 1:
        # Only the envelope of a large message travels before the receiver answers.
        group._post([0, 2, 3], (0, "allgather", np.zeros(50_000_000, np.uint8)))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    values = group.allgather(rank, timeout_s=0.5, skip_late=True)
    print(values, flush=True)
    assert [values[peer] for peer in (0, 2, 3)] == [0, 2, 3]
    os._exit(7)
    """
    done = run(tmp_path, script)
    assert [done.codes[rank] for rank in (0, 2, 3)] == [7, 7, 7], done


def test_a_call_that_mpi_refuses_counts_as_silence_of_the_peer(tmp_path: Path) -> None:
    script = """
    class Refusing:
        def Isend(self, *args, **kwargs):
            raise MPI.Exception(MPI.ERR_OTHER)
        Irecv = Improbe = Isend

    class RefusedLater:
        def Test(self):
            raise MPI.Exception(MPI.ERR_OTHER)

    from ep_rt.groups import _Request
    request = _Request(RefusedLater)
    assert not request.done() and not request.done()

    recv = arrays(4)
    transfer = group.ialltoallv(arrays(8 if rank == 0 else 4), recv)
    if rank == 0:
        transfer.receive()
    else:
        caught(ConfigError, transfer.receive)
    group.barrier()
    group._comm = Refusing()
    other = 1 - rank
    transfer = group.ialltoallv(arrays(8), arrays(8))
    assert transfer.receive(timeout_s=0.1, skip_late=True) == (other,)
    assert transfer.finish(timeout_s=0.1, skip_late=True) == (other,)
    error = caught(PeerTimeoutError, lambda: group.barrier(timeout_s=0.2))
    assert error.peers == (other,)
    os._exit(0)
    """
    done = run(tmp_path, script, num_ranks=2)
    assert done.codes == [0, 0], done


def test_a_single_rank_waits_for_its_communicator(tmp_path: Path) -> None:
    """Open MPI makes it while it is waited for, and a communicator that was not waited for is none."""
    script = """
    from ep_rt.groups import MpiGroup

    class Slow:
        def __init__(self, communicator):
            self.communicator = communicator
        def __getattr__(self, name):
            return getattr(self.communicator, name)
        def Idup(self):
            self.duplicate, self.request = self.communicator.Idup()
            self.left = 3
            return self, self
        def Test(self):
            self.left -= 1
            return self.left <= 0 and self.request.Test()
        def Set_errhandler(self, handler):
            assert self.left <= 0, "used before it is there"
            self.duplicate.Set_errhandler(handler)

    assert MpiGroup(Slow(MPI.COMM_SELF)).allgather("here") == ["here"]
    """
    succeed(tmp_path, script, num_ranks=1)


def test_ranks_part_from_different_rounds(tmp_path: Path) -> None:
    script = """
    for turn in range(3):
        for call in range((rank + turn) % size):
            values = group.allgather(call, timeout_s=10, skip_late=True)
            gone = [(peer + turn) % size <= call for peer in range(size)]
            assert [value is LATE for value in values] == gone
        assert group.part(timeout_s=10) == ()
        assert group.allgather(rank) == list(range(size))
    assert time.monotonic() - began < 9
    """
    succeed(tmp_path, script)

"""Groups over torch process groups (gloo, on this host)."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from gloo_launch import run_ranks

pytest.importorskip("torch.distributed")

PRELUDE = """
import os, sys, time
from datetime import timedelta
import numpy as np
import torch.distributed as dist
from ep_rt.errors import *
from ep_rt.groups import LATE, as_group

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
group = as_group(dist.group.WORLD)

def arrays(n, value=0):
    return [np.full(n if peer != rank else 0, value, np.uint8) for peer in range(size)]

def caught(kind, fn):
    try:
        fn()
    except kind as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error
    raise SystemExit(f"no {kind}")

"""


def run(folder: Path, script: str, num_ranks: int) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the ranks."""
    (folder / "script.py").write_text(PRELUDE + textwrap.dedent(script))
    return run_ranks([str(folder / "script.py")], num_ranks, timeout_s=40)


def test_values_bytes_mismatches_and_sub_groups(tmp_path: Path) -> None:
    script = """
    import random
    assert (group.rank, group.size) == (rank, size)
    for step in range(5):
        assert group.allgather((rank, step)) == [(peer, step) for peer in range(size)]
    pair = [0, 2] if rank in (0, 2) else [1]
    assert group.allgather(rank, ranks=pair) == [peer if peer in pair else None for peer in range(size)]

    for seed in range(3):
        sizes = np.random.default_rng(seed).integers(0, 200_000, (size, size))
        sizes[:, seed] = 0
        part = lambda s, d: np.random.default_rng([seed, s, d]).integers(0, 256, sizes[s, d], np.uint8)
        send = [part(rank, dst) for dst in range(size)]
        for array in send:
            array.flags.writeable = False
        recv = [np.zeros(sizes[src, rank], np.uint8) for src in range(size)]
        group.alltoallv(send, recv)
        for src in range(size):
            assert np.array_equal(recv[src], part(src, rank))

    flying = []
    for number in range(4):
        recv = arrays(100_000)
        flying.append((number, recv, group.ialltoallv(arrays(100_000, 10 * number + rank), recv)))
        group.barrier()
    random.Random(rank).shuffle(flying)
    for number, recv, transfer in flying:
        assert transfer.receive() == ()
        for src in range(size):
            assert (recv[src] == 10 * number + src).all()
    for _, _, transfer in flying:
        transfer.finish()

    error = caught(ConfigError, lambda: group.alltoallv(arrays(5 if rank == 2 else 4), arrays(4)))
    assert "rank 2 sends 5 bytes to rank 0, which expects 4" in str(error) and error.is_collective
    op = "dispatch" if rank == 1 else "combine"
    error = caught(CollectiveMismatchError, lambda: group.allgather(0, op=op))
    assert str(error) == "ranks called different operations: combine on ranks 0, 2; dispatch on rank 1"

    # Two groups over one process group do not hear each other.
    other = as_group(dist.group.WORLD)
    assert other.allgather("other", op="x") == ["other"] * size
    members = [2, 1]
    part = dist.new_group(members)
    if rank in members:
        sub = as_group(part)
        assert (sub.rank, sub.size) == (dist.get_rank(part), 2)
        world_ranks = sub.allgather(rank)
        assert world_ranks == [dist.get_global_rank(part, peer) for peer in range(2)]
        recv = [np.zeros(3, np.uint8) for _ in range(2)]
        sub.alltoallv([np.full(3, 10 * rank + dst, np.uint8) for dst in range(2)], recv)
        assert [array[0] for array in recv] == [10 * src + sub.rank for src in world_ranks]
    else:
        caught(ConfigError, lambda: as_group(part))
    import torch
    caught(ConfigError, lambda: as_group(torch.zeros(3)))
    assert group.allgather(rank) == [0, 1, 2]
    dist.destroy_process_group()
    """
    codes, outputs = run(tmp_path, script, 3)
    assert codes == [0, 0, 0], outputs


def test_a_late_rank_is_named(tmp_path: Path) -> None:
    script = """
    # One rank does not arrive in a message round, then in a transfer of a second group.
    other = as_group(dist.group.WORLD)
    group.barrier()
    other.barrier()
    late = group.allgather(rank, skip_late=True, timeout_s=0.3) if rank != 1 else time.sleep(0.8)
    if rank == 1:
        late = group.allgather(rank, skip_late=True, timeout_s=0.3)
    assert late == ([0, LATE, 2] if rank != 1 else [0, 1, 2]), late
    if rank != 1:
        time.sleep(0.5)
    group.barrier(timeout_s=5)
    if rank == 1:
        time.sleep(2)
    else:
        error = caught(PeerTimeoutError, lambda: group.barrier(timeout_s=0.4))
        assert error.peers == (1,)
        assert caught(PeerTimeoutError, group.barrier) is error
        recv = arrays(8)
        transfer = other.ialltoallv(arrays(8, rank), recv)
        error = caught(PeerTimeoutError, lambda: transfer.receive(timeout_s=0.4))
        assert error.peers == (1,), error
        assert (recv[2 - rank] == 2 - rank).all()
    if rank == 1:
        caught(PeerTimeoutError, lambda: [group.barrier(), group.barrier()])
    else:
        time.sleep(1.5)
    os._exit(0)
    """
    codes, outputs = run(tmp_path, script, 3)
    assert codes == [0, 0, 0], outputs


def test_ranks_that_die_or_fail(tmp_path: Path) -> None:
    script = """
    other = as_group(dist.group.WORLD)
    group.barrier()
    other.barrier()
    if rank == 1:
        group.abort(KeyError("no such expert"))
        os.kill(os.getpid(), 9)
    error = caught(PeerFailedError, lambda: group.barrier(timeout_s=10))
    assert error.peer == 1 and "no such expert" in error.reason
    error = caught(PeerTimeoutError, lambda: other.ialltoallv(arrays(8), arrays(8)).receive(timeout_s=0.5))
    assert error.peers == (1,), error

    # Rank 0 holds the store through which everybody talks.
    last = as_group(dist.group.WORLD)
    if rank == 0:
        last.allgather(None, ranks=[0, 2])
        os.kill(os.getpid(), 9)
    both = lambda: [last.allgather(None, ranks=[0, 2], timeout_s=10) for _ in range(2)]
    error = caught(PeerFailedError, both)
    assert error.peer == 0 and "key-value store" in error.reason
    os._exit(0)
    """
    codes, outputs = run(tmp_path, script, 3)
    assert codes == [-9, -9, 0], outputs


def test_a_peer_that_gloo_knows_to_be_gone_is_late(tmp_path: Path) -> None:
    script = """
    def refuse(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    other = as_group(dist.group.WORLD)
    group.barrier()
    if rank == 0:  # has the store, so it is the last to leave
        caught(PeerFailedError, lambda: other.barrier(timeout_s=20))
        os._exit(0)
    dist.isend = dist.irecv = refuse
    transfer = group.ialltoallv(arrays(8), arrays(8))
    error = caught(PeerTimeoutError, lambda: transfer.receive(timeout_s=0.3))
    assert error.peers == (0,), error
    error = caught(PeerTimeoutError, lambda: transfer.finish(timeout_s=0.3))
    assert error.peers == (0,), error
    assert not transfer.finished
    other.abort(KeyError("done"))
    os._exit(0)
    """
    codes, outputs = run(tmp_path, script, 2)
    assert codes == [0, 0], outputs
    assert outputs[1].count("PeerTimeoutError: rank 1: rank 0 did not arrive") == 2


def test_an_exception_that_ends_the_program_reaches_the_peers(tmp_path: Path) -> None:
    script = """
    group.barrier()
    if rank == 1:
        raise KeyError("no such expert")
    error = caught(PeerFailedError, lambda: group.barrier(timeout_s=20))
    assert error.peer == 1 and "no such expert" in error.reason
    """
    codes, outputs = run(tmp_path, script, 2)
    assert codes == [0, 1], outputs


def test_buffer_over_a_torch_group_equals_the_oracle(tmp_path: Path) -> None:
    script = f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ep_rt
        from host_cases import check_low_latency, check_normal
        with ep_rt.Buffer(dist.group.WORLD, backend="host", timeout_s=20) as buffer:
            for seed in range(4):
                check_normal(buffer, seed)
                check_low_latency(buffer, seed, hook=seed % 2 == 1)
                time.sleep(0.05 * (buffer.rank == seed % 3))  # peers are still to receive what was sent
        print("equal")
        dist.destroy_process_group()
    """
    codes, outputs = run(tmp_path, script, 3)
    assert codes == [0, 0, 0], outputs
    assert all("equal" in output for output in outputs)

"""The host backend over MPI: the same cases as over threads, misuse, and a rank that is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
from mpi_launch import launch

TESTS = str(Path(__file__).parent)

ORACLE = f"""
import sys
sys.path.insert(0, {TESTS!r})
import ep_rt
from host_cases import check_expert_major, check_low_latency, check_normal, check_worst_case
with ep_rt.Buffer(backend="host", timeout_s=20) as buffer:
    for seed in range(10):
        check_normal(buffer, seed)
        check_worst_case(buffer, seed)
        check_expert_major(buffer, seed, is_exact=seed % 3 != 2)
        check_low_latency(buffer, seed, hook=seed % 2 == 1)
print("all equal on", buffer.num_ranks)
"""

MISUSE = f"""
import sys
sys.path.insert(0, {TESTS!r})
import numpy as np
import ep_rt
from host_cases import check_normal
with ep_rt.Buffer(backend="host", timeout_s=20) as buffer:
    x, ids = np.ones((4, 32), np.float32), np.zeros((4, 1), np.int64)
    out = buffer.dispatch(x, topk_idx=ids, num_experts=4)
    for call in (
        lambda: buffer.dispatch(x, topk_idx=ids + 4 * (buffer.rank == 2), num_experts=4),
        lambda: buffer.dispatch(x[:, : 32 - 8 * (buffer.rank == 1)], topk_idx=ids, num_experts=4),
        lambda: buffer.combine(out.recv_x, out.handle) if buffer.rank else
                buffer.dispatch(x, topk_idx=ids, num_experts=4),
    ):
        try:
            call()
        except ep_rt.EpError as error:
            print(type(error).__name__, str(error).replace(buffer.group.__class__.__name__, ""))
    check_normal(buffer, 1)
"""

KILLED = """
import os, signal, time
import numpy as np
import ep_rt
group = ep_rt.as_group(None)
buffer = ep_rt.Buffer(group, backend="host", timeout_s=2)
x = np.ones((512, 1024), np.float32)
ids = np.random.default_rng(group.rank).integers(0, 16, (512, 4))
began = time.monotonic()
for number in range(10**6):
    if group.rank == 2 and number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        out = buffer.dispatch(x, topk_idx=ids, num_experts=16)
        buffer.combine(out.recv_x, out.handle)
    except ep_rt.PeerTimeoutError as error:
        print("lost", error.peers, number, 1 < time.monotonic() - began < 4)
        raise
"""


def test_equal_to_the_oracle(tmp_path: Path) -> None:
    done = launch(4, ORACLE, tmp_path, survive=False, timeout_s=60)
    assert done.code == 0, done.outputs
    assert [text.strip() for text in done.outputs] == ["all equal on 4"] * 4


def test_misuse_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    done = launch(4, MISUSE, tmp_path, survive=False)
    assert done.code == 0, done.outputs
    assert len(set(done.outputs)) == 1
    first, second, third = done.outputs[0].splitlines()
    assert first.startswith("ArrayError dispatch: rank 2: topk_idx has expert id 4")
    assert second == "ConfigError dispatch: hidden differs between ranks: 32 on rank 0, 2, 3; 24 on rank 1"
    assert third.startswith("CollectiveMismatchError")
    assert "combine of buffer" in third


def test_killed_rank_is_named_by_every_survivor(tmp_path: Path) -> None:
    done = launch(4, KILLED, tmp_path, survive=True, timeout_s=30)
    assert done.code != 0
    assert done.codes[2] == -signal.SIGKILL
    for rank in (0, 1, 3):
        assert "lost (2,) 30 True" in done.outputs[rank], done.outputs[rank]
        assert "PeerTimeoutError: rank" in done.outputs[rank]
        assert done.codes[rank] not in (None, 0)

"""One of three processes that share a buffer; rank 1 is lost among its calls.

``lost_process.py DIRECTORY RANK MODE HOW``. MODE is normal, or low-latency, which goes on with the lost rank
masked; HOW is killed, or left for one that ends without closing its buffer.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cupy
import ml_dtypes
import numpy as np
from device_arrays import fetch, put
from file_group import FileGroup
from host_cases import random_values, same_bits
from low_latency_cases import check_received, same_but_for_nan
from normal_cases import check_normal, context_is_alive

from ep_rt import Buffer, PeerTimeoutError, reference
from ep_rt.groups import thread_groups

NUM_RANKS, LOST = 3, 1
NUM_MADE = 20
"""Calls that all ranks make. The lost one begins one more."""
TIMEOUT_S = 3.0
LONG_S = 100.0  # to compile kernels


def normal(buffer: Buffer, leave: Callable[[], object]) -> None:
    """The others get an error that names the lost rank."""
    rng = np.random.default_rng(0)
    rank, num_experts, capacity = buffer.rank, 2 * NUM_RANKS, 200
    x = [random_values(rng, (40 + src, 64), np.float32) for src in range(NUM_RANKS)]
    ids = [rng.integers(-1, num_experts, (len(each), 3)) for each in x]
    expected = reference.dispatch(x, ids, num_experts=num_experts, num_worst_tokens=capacity)
    rows = [each.recv_x for each in expected]
    combined = reference.combine(rows, expected, num_tokens=[len(each) for each in x])[rank]
    num_rows = expected[rank].num_recv_tokens
    given, topk_idx = put(x[rank]), put(ids[rank])
    stream = cupy.cuda.get_current_stream()
    missed: PeerTimeoutError | None = None
    number = -1
    while missed is None and number < 1000:
        number += 1
        if number <= NUM_MADE + 1:
            began = time.monotonic()
        try:
            out = buffer.dispatch(
                given, topk_idx=topk_idx, num_experts=num_experts, num_worst_tokens=capacity
            )
            back = buffer.combine(out.recv_x, out.handle)
            if rank == LOST and number == NUM_MADE:
                leave()
            stream.synchronize()
        except PeerTimeoutError as error:
            missed = error
        if number < NUM_MADE:
            assert missed is None, missed
            assert same_bits(fetch(out.recv_x)[:num_rows], rows[rank][:num_rows])
            assert same_bits(fetch(back.combined_x), combined.x)
    assert missed is not None
    assert missed.peers == (LOST,), missed
    assert time.monotonic() - began < 3 * TIMEOUT_S


def low_latency(buffer: Buffer, leave: Callable[[], object]) -> None:
    """The others go on with what they have without the lost rank."""
    rng = np.random.default_rng(0)
    rank, num_local_experts, num_max, hidden = buffer.rank, 2, 15, 256
    num_experts, shape = 2 * NUM_RANKS, (num_local_experts, NUM_RANKS * num_max, hidden)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    x = [random_values(rng, (5, hidden), bfloat16) for _ in range(NUM_RANKS)]
    ids = [rng.integers(0, num_experts, (5, 3)) for _ in range(NUM_RANKS)]
    weights = [rng.random((5, 3), np.float32) for _ in range(NUM_RANKS)]
    y = [random_values(rng, shape, bfloat16) for _ in range(NUM_RANKS)]
    without = [
        np.where((each // num_local_experts == LOST) | (src == LOST), -1, each)
        for src, each in enumerate(ids)
    ]
    dispatched = [
        reference.low_latency_dispatch(
            x, some, num_max_dispatch_tokens_per_rank=num_max, num_experts=num_experts
        )
        for some in (ids, without)
    ]
    combined = [
        reference.low_latency_combine(y, each, some, weights, reduce="rank")[rank]
        for each, some in zip(dispatched, (ids, without), strict=True)
    ]
    given = [put(each[rank]) for each in (x, ids, weights, y)]
    for number in range(NUM_MADE + 6):
        began = time.monotonic()
        out = buffer.low_latency_dispatch(given[0], given[1], num_max, num_experts)
        if rank == LOST and number == NUM_MADE:
            leave()
        is_shrunk = number > NUM_MADE
        if number != NUM_MADE:  # of that call all may have come, or nothing
            check_received(out, dispatched[is_shrunk][rank])
        back = buffer.low_latency_combine(given[3], given[1], given[2], out.handle)
        sums = fetch(back.combined_x)
        if number != NUM_MADE:
            assert same_but_for_nan(sums, combined[is_shrunk])
        # Masked, nobody waits for it any more.
        assert time.monotonic() - began < (TIMEOUT_S if is_shrunk else 3 * TIMEOUT_S)
    status = np.zeros(NUM_RANKS, np.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(src == LOST) for src in range(NUM_RANKS)]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end() -> NoReturn:
    sys.exit(0)


def main(directory: Path, rank: int, mode: str, how: str) -> None:
    cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
    group = FileGroup(directory, rank, NUM_RANKS, timeout_s=LONG_S)
    is_low_latency = mode == "low-latency"
    options: dict[str, Any] = {
        "backend": "cuda",
        "num_nvl_bytes": 64 << 20,
        "low_latency_mode": is_low_latency,
        "enable_shrink": is_low_latency,
    }
    with cupy.cuda.Stream(non_blocking=True):
        with Buffer(group, timeout_s=LONG_S, **options):
            pass  # kernels are compiled
        group.barrier()
        buffer = Buffer(group, timeout_s=TIMEOUT_S, **options)
        group.barrier()
        (low_latency if is_low_latency else normal)(buffer, kill if how == "killed" else end)
        began = time.monotonic()
        buffer.close()
        assert time.monotonic() - began < 4 * TIMEOUT_S
        context_is_alive()
        with Buffer(thread_groups(1)[0], backend="cuda", num_nvl_bytes=64 << 20) as alone:
            check_normal(alone, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

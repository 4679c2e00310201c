"""One of two processes that share slabs; rank 1 is killed. ``dead_process.py DIRECTORY RANK``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import cupy
import pytest
from file_group import FileGroup

from ep_rt.cuda.barrier import Barrier
from ep_rt.cuda.hang import HangWatch
from ep_rt.cuda.memory import Slab
from ep_rt.errors import PeerTimeoutError
from ep_rt.groups import thread_groups

TIMEOUT_S = 0.5


def main(directory: Path, rank: int) -> None:
    cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
    group = FileGroup(directory, rank, 2)
    slab = Slab(group, 1 << 20)
    watch = HangWatch(slab, timeout_s=TIMEOUT_S)
    barrier = Barrier(slab, watch, timeout_s=TIMEOUT_S)
    stream = cupy.cuda.Stream(non_blocking=True)
    group.allgather(None)
    for _ in range(5):
        barrier.run(stream)
        stream.synchronize()
    barrier.check()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    barrier.run(stream)
    stream.synchronize()
    with pytest.raises(PeerTimeoutError) as caught:
        barrier.check()
    assert caught.value.peers == (1,)
    slab.close(timeout_s=TIMEOUT_S)
    assert int(cupy.arange(1000).sum()) == 499500, "the context is not usable any more"
    alone = Slab(thread_groups(1)[0], 1 << 20)
    again = Barrier(alone, HangWatch(alone, timeout_s=TIMEOUT_S), timeout_s=TIMEOUT_S)
    again.run(stream)
    stream.synchronize()
    again.check()
    alone.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""One of two processes that share slabs; rank 1 is killed. ``dead_process.py DIRECTORY RANK``."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cupy
import pytest

from ep_rt.cuda.barrier import Barrier
from ep_rt.cuda.hang import HangWatch
from ep_rt.cuda.memory import Slab
from ep_rt.errors import PeerTimeoutError
from ep_rt.exchange import LATE
from ep_rt.groups import thread_groups

TIMEOUT_S = 0.5


class FileGroup:
    """Just enough of a `Group` for `Slab`: values travel as files, and a dead peer is only late."""

    size = 2

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self._round = 0

    def allgather(
        self,
        value: object,
        *,
        op: str = "allgather",
        timeout_s: float | None = None,
        ranks: Sequence[int] | None = None,
        skip_late: bool = False,
    ) -> list[Any]:
        self._round += 1
        temporary = self.directory / f"temporary {self.rank}"
        temporary.write_bytes(pickle.dumps(value))
        temporary.replace(self.directory / f"{self._round} {self.rank}")
        theirs = self.directory / f"{self._round} {1 - self.rank}"
        deadline = time.monotonic() + (60.0 if timeout_s is None else timeout_s)
        while not theirs.exists():
            if time.monotonic() > deadline:
                if not skip_late:
                    raise PeerTimeoutError(rank=self.rank, peers=[1 - self.rank], phase=op)
                return [value, LATE] if self.rank == 0 else [LATE, value]
            time.sleep(0.001)
        other = pickle.loads(theirs.read_bytes())
        return [value, other] if self.rank == 0 else [other, value]


def main(directory: Path, rank: int) -> None:
    cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
    group: Any = FileGroup(directory, rank)
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

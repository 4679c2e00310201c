"""What the links carry at most: a plain copy from every rank to all others at once.

The operations are held against it, because machines differ. Senders push, as dispatch does, or receivers
pull, as combine does. A barrier of the ranks comes before each copy and one after it, so its time is that of
the slowest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Final

import numpy as np

from ..exchange import Group
from .check import agree
from .measure import CudaTimer, Meeting
from .places import CudaPlace
from .workload import Array

_SENT_BYTES: Final = 256 << 20  # by a rank, to all others together
_SHARED_SENT_BYTES: Final = 32 << 20  # where they share a GPU
_UNIT_BYTES: Final = 64 << 10
_SWEEP_SMS: Final = (8, 24, 56)
WAYS: Final = ("push", "pull")

Readings = dict[tuple[str, int], tuple[float, ...]]
"""By way and SM count."""


def sweep(asked: Sequence[int], num_sms: int) -> list[int]:
    """SM counts to try: those that operations will use, some that show the curve, and all."""
    return sorted({count for count in (*asked, *_SWEEP_SMS, num_sms) if count <= num_sms})


def measure_limit(group: Group, place: CudaPlace, timer: CudaTimer, asked_sms: Sequence[int]) -> Readings:
    """GB/s that leave this rank; each copy is compared first.

    Raises:
        CheckError: bytes did not arrive.

    Collective; for two ranks or more.
    """
    sent_bytes = _SHARED_SENT_BYTES if place.setting.is_shared else _SENT_BYTES
    peer_bytes = max(1, sent_bytes // (group.size - 1) // _UNIT_BYTES) * _UNIT_BYTES
    copy = _Copy(group, place, peer_bytes)
    readings = {}
    for way in WAYS:
        for num_sms in sweep(asked_sms, place.num_sms // place.num_sharing):
            copy.check(way, num_sms)
            times_us = timer.between_barriers(partial(copy.enqueue, way, num_sms))
            gbps = tuple((group.size - 1) * peer_bytes / time_us / 1e3 for time_us in times_us)
            readings[way, num_sms] = gbps
    copy.close()
    return readings


def limits(everyone: Sequence[Readings]) -> dict[tuple[str, int], float]:
    """GB/s by way and SM count: the median over ranks of the median over readings."""
    return {case: median(median(rank[case]) for rank in everyone) for case in everyone[0]}


def outbox(src: int, num_ranks: int, peer_bytes: int) -> Array:
    """uint64 [R, words]: what `src` sends to each rank. A word names both ranks and its place."""
    names = (np.uint64(src) << np.uint64(48)) + (np.arange(num_ranks, dtype=np.uint64) << np.uint64(40))
    words: Array = names[:, None] + np.arange(1, 1 + peer_bytes // 8, dtype=np.uint64)
    return words


class _Copy:
    """The kernel, with its memory: what a rank receives, then what it sends, [R, peer_bytes] each."""

    def __init__(self, group: Group, place: CudaPlace, peer_bytes: int) -> None:
        import cupy

        from ..cuda import kernels
        from ..cuda.launch import Kernel, pack
        from ..cuda.layout import PAYLOAD_OFFSET

        self._group, self._place = group, place
        self._peer_bytes = peer_bytes
        self._meeting = Meeting(group, 2 * group.size * peer_bytes)
        pointers = self._meeting.slab.pointers
        self._inbox = pointers[group.rank] + PAYLOAD_OFFSET
        source = self._inbox + group.size * peer_bytes
        self._counters = cupy.cuda.alloc(16)
        place.copy_in(self._counters.ptr, np.zeros(2, np.uint64))
        place.copy_in(source, outbox(group.rank, group.size, peer_bytes))
        spec = kernels.wire_limit()
        self._launch = Kernel(spec).bind(
            pack(
                spec.args,
                counters=self._counters.ptr,
                peer_bytes=peer_bytes,
                rank=group.rank,
                num_ranks=group.size,
                pulls=0,
                slabs=pointers,
            ),
            num_blocks=place.num_sms // place.num_sharing,
        )
        group.barrier()

    def enqueue(self, way: str, num_sms: int) -> None:
        self._launch.args.pulls = way == "pull"
        self._launch(self._place.stream.ptr, num_sms)

    def check(self, way: str, num_sms: int) -> None:
        """Copy once, and compare what arrived."""
        import cupy

        stream, num_ranks = self._place.stream, self._group.size
        num_bytes = num_ranks * self._peer_bytes
        cupy.cuda.runtime.memsetAsync(self._inbox, 0, num_bytes, stream.ptr)
        self._meeting.enqueue(stream)
        self.enqueue(way, num_sms)
        self._meeting.enqueue(stream)
        stream.synchronize()
        self._meeting.check()
        self._group.barrier()
        # A chunk of memory is a row here: whole sources at a time.
        arrived = self._place.chunks_at(self._inbox, num_ranks, self._peer_bytes)
        wrong = [
            first + row
            for first, rows in arrived
            for row in range(len(rows))
            if first + row != self._group.rank
            and not np.array_equal(rows[row].view(np.uint64), self._expected(first + row))
        ]
        problem = f"with {num_sms} SMs the {way} from ranks {wrong} is not what they sent"
        agree(self._group, problem if wrong else None)

    def close(self) -> None:
        self._meeting.close()

    def _expected(self, src: int) -> Array:
        name = (np.uint64(src) << np.uint64(48)) + (np.uint64(self._group.rank) << np.uint64(40))
        words: Array = name + np.arange(1, 1 + self._peer_bytes // 8, dtype=np.uint64)
        return words

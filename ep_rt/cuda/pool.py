"""Places inside a slab: handed out by the host, given back when the last array over them is gone. Pure.

What the device does with a place is ordered elsewhere: calls come one after the other, whatever their
streams, and `Buffer` says which readers must come before them.
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .layout import OFFSET_UNIT, align_up


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """`num_taken`, `num_released` and `num_refused` count since construction; the rest is as of now."""

    num_bytes: int
    used_bytes: int
    most_used_bytes: int
    largest_free_bytes: int
    num_taken: int
    num_released: int
    num_refused: int


class Lease:
    """A place that is given back when nobody holds this object any more. Kept by the arrays over it.

    Attributes:
        offset, num_bytes: within the pool, multiples of `OFFSET_UNIT`; `num_bytes` shrinks with `Pool.trim`.
        kept: what must live as long.
        must_be_left: whether the place is needed for something else soon.
    """

    __slots__ = ("__weakref__", "_pool", "kept", "must_be_left", "num_bytes", "offset")

    def __init__(self, pool: Pool, offset: int, num_bytes: int) -> None:
        self._pool = pool
        self.offset = offset
        self.num_bytes = num_bytes
        self.kept: object = None
        self.must_be_left = False

    def __del__(self) -> None:
        self._pool.give_back(self.offset, self.num_bytes)


class Pool:
    """Hands out places in `num_bytes` bytes: the smallest gap that fits, and there the lowest address.

    Threads may share it. Garbage collection gives places back at any moment, also while this thread is inside
    a method here, so giving back only notes it; the next method accounts for it.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes: Final = num_bytes // OFFSET_UNIT * OFFSET_UNIT
        self._lock = threading.RLock()
        self._gaps: list[tuple[int, int]] = [(0, self.num_bytes)] if self.num_bytes else []  # by address
        self._returned: deque[tuple[int, int]] = deque()
        self._used_bytes = self._most_used_bytes = 0
        self._num_taken = self._num_settled = self._num_refused = 0
        self._when_empty: Callable[[], None] | None = None

    def largest_free(self) -> int:
        """Bytes of the largest gap."""
        with self._lock:
            return self._largest_gap()

    def take(self, num_bytes: int, spare_bytes: int = 0) -> Lease | None:
        """A place of at least `num_bytes`; None when no gap is so large, or none of `spare_bytes` is left."""
        wanted = -(-num_bytes // OFFSET_UNIT) * OFFSET_UNIT
        lock, returned = self._lock, self._returned
        lock.acquire()  # in a `with` this takes as long as the rest of what a loop does
        try:
            if returned:
                if len(returned) == 1 and returned[0][1] == wanted and self._has_gap(spare_bytes):
                    # What a loop does: the place of the last round, as it is.
                    offset, _ = returned.popleft()
                    self._num_settled += 1
                    self._num_taken += 1
                    return Lease(self, offset, wanted)
                self._settle()
            best, best_size, most_left = -1, 0, 0
            for number, (_, size) in enumerate(self._gaps):
                if size >= wanted and (best < 0 or size < best_size):
                    most_left = max(most_left, best_size)
                    best, best_size = number, size
                elif size > most_left:
                    most_left = size
            if wanted and (best < 0 or max(most_left, best_size - wanted) < spare_bytes):
                self._num_refused += 1
                return None
            offset = 0
            if wanted:
                offset = self._gaps[best][0]
                left = [(offset + wanted, best_size - wanted)] if best_size > wanted else []
                self._gaps[best : best + 1] = left
                self._used_bytes += wanted
                if self._used_bytes > self._most_used_bytes:
                    self._most_used_bytes = self._used_bytes
            self._num_taken += 1
            return Lease(self, offset, wanted)
        finally:
            lock.release()

    def take_largest(self) -> Lease:
        """The largest gap, all of it; a place of no bytes where there is none."""
        self._lock.acquire()
        try:
            if self._returned:
                self._settle()
            best, num_bytes, offset = -1, 0, 0
            for number, (_, size) in enumerate(self._gaps):
                if size > num_bytes:
                    best, num_bytes = number, size
            if num_bytes:
                offset, _ = self._gaps.pop(best)
                self._used_bytes += num_bytes
                if self._used_bytes > self._most_used_bytes:
                    self._most_used_bytes = self._used_bytes
            self._num_taken += 1
            return Lease(self, offset, num_bytes)
        finally:
            self._lock.release()

    def _has_gap(self, num_bytes: int) -> bool:
        """Under the lock."""
        for _, size in self._gaps:
            if size >= num_bytes:
                return True
        return num_bytes == 0

    def trim(self, lease: Lease, num_bytes: int) -> int:
        """Give the end of a place back: what lies beyond its first `num_bytes`.

        Returns the bytes of the largest gap then.
        """
        kept = align_up(num_bytes, OFFSET_UNIT)
        self._lock.acquire()
        try:
            freed = lease.num_bytes - kept
            if freed > 0:
                self._insert(lease.offset + kept, freed)
                lease.num_bytes = kept
            return self._largest_gap()
        finally:
            self._lock.release()

    def transfer(self, lease: Lease) -> Lease:
        """The same place in other hands: whoever still holds `lease` holds nothing any more."""
        with self._lock:
            other = Lease(self, lease.offset, lease.num_bytes)
            other.kept, lease.kept, lease.num_bytes = lease.kept, None, 0
            self._num_taken += 1
        return other

    def close(self, when_empty: Callable[[], None]) -> None:
        """Call `when_empty` once every place has been given back: now, or later on any thread."""
        with self._lock:
            self._when_empty = when_empty
            self._settle()

    @property
    def num_released(self) -> int:
        """Places given back so far. Grows before any of them is handed out again."""
        with self._lock:
            self._settle()
            return self._num_settled

    @property
    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                num_bytes=self.num_bytes,
                largest_free_bytes=self.largest_free(),
                used_bytes=self._used_bytes,
                most_used_bytes=self._most_used_bytes,
                num_taken=self._num_taken,
                num_released=self._num_settled,
                num_refused=self._num_refused,
            )

    def give_back(self, offset: int, num_bytes: int) -> None:
        """A place has no holder any more; for `Lease`."""
        self._returned.append((offset, num_bytes))
        if self._when_empty is not None:
            with self._lock:
                self._settle()

    def _largest_gap(self) -> int:
        """Under the lock."""
        if self._returned:
            self._settle()
        largest = 0
        for _, size in self._gaps:
            if size > largest:
                largest = size
        return largest

    def _settle(self) -> None:
        """Account for what was given back. Under the lock."""
        while self._returned:
            offset, num_bytes = self._returned.popleft()
            self._num_settled += 1
            if num_bytes:
                self._insert(offset, num_bytes)
        if self._when_empty is not None and self._num_settled == self._num_taken:
            then, self._when_empty = self._when_empty, None
            then()

    def _insert(self, offset: int, num_bytes: int) -> None:
        """Make a gap, joined with its neighbours."""
        self._used_bytes -= num_bytes
        gaps = self._gaps
        at = bisect(gaps, (offset,))
        end = offset + num_bytes
        joins_before = at > 0 and sum(gaps[at - 1]) == offset
        joins_after = at < len(gaps) and gaps[at][0] == end
        first = gaps[at - 1][0] if joins_before else offset
        last = sum(gaps[at]) if joins_after else end
        gaps[at - joins_before : at + joins_after] = [(first, last - first)]

"""Memory for results and staging that is used again once nobody holds it.

A fresh array costs a page fault for every 4 KiB it is written to, several times the cost of the copy that
fills it. Arrays from a `HostPool` come from blocks that were written before.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays

_SMALL_BYTES = 64 << 10
_MIN_KEPT_BYTES = 64 << 20


class HostPool:
    """Hands out uninitialised arrays; a block returns when the last array over it is garbage collected.

    Free blocks are kept up to the most that was ever in use at once, and 64 MiB in any case.
    """

    def __init__(self) -> None:
        # Garbage collection may give a block back within `_take`, on the thread that holds the lock.
        self._lock = threading.RLock()
        self._free: dict[int, NDArray[np.uint8]] = {}
        self._free_bytes = 0
        self._used_bytes = 0
        self._most_used_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """C-contiguous and 128-byte aligned."""
        kind = np.dtype(dtype)
        num_bytes = prod(shape) * kind.itemsize
        if num_bytes < _SMALL_BYTES:
            return arrays.empty_host(shape, kind)
        lease = _Lease(self, self._take(num_bytes))
        leased: NDArray[np.uint8] = np.asarray(lease)
        result: NDArray[Any] = leased[:num_bytes].view(kind).reshape(shape)
        return result

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        with self._lock:
            # The smallest that fits, unless more than half of it would lie idle.
            fitting = [each for each in list(self._free.values()) if num_bytes <= each.size <= 2 * num_bytes]
            block = min(fitting, key=lambda each: each.size, default=None)
            if block is not None:
                del self._free[id(block)]
                self._free_bytes -= block.size
            else:
                # An eighth more than asked for: the next routing may need a little more.
                block = arrays.empty_host((num_bytes + num_bytes // 8,), np.dtype(np.uint8))
            self._used_bytes += block.size
            self._most_used_bytes = max(self._most_used_bytes, self._used_bytes)
            return block

    def give_back(self, block: NDArray[np.uint8]) -> None:
        with self._lock:
            self._used_bytes -= block.size
            self._free[id(block)] = block
            self._free_bytes += block.size
            while self._free_bytes > max(_MIN_KEPT_BYTES, self._most_used_bytes):
                self._free_bytes -= self._free.pop(next(iter(self._free))).size


class _Lease:
    """The base of the arrays over one block: NumPy keeps it alive for as long as one of them lives."""

    def __init__(self, pool: HostPool, block: NDArray[np.uint8]) -> None:
        self._pool = pool
        self._block = block
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self._pool.give_back(self._block)

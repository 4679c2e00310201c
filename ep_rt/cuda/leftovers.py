"""What garbage collection must not give back to the driver.

The driver frees device memory and pinned memory only once all kernels of the device are done. Kernels of
ranks that are threads on one GPU wait for each other: a thread that is held up in the driver meanwhile never
enqueues what the others wait for. Garbage collection may come at any moment, on any thread, so what such
ranks leave is kept, and freed where a rank waits for its device anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_lock = threading.RLock()  # garbage collection may come while it is held
_left: list[tuple[int, Callable[[], bool]]] = []
_pinned: dict[int, list[Any]] = {}
_all_pinned: list[Any] = []


def leave(device: int, free: Callable[[], bool]) -> None:
    """Have `free` called by `settle`, on this device, until it says that there is nothing left."""
    with _lock:
        _left.append((device, free))


def settle(device: int) -> None:
    """Free what was left on the current device. Waits for the device."""
    with _lock:
        here = [entry for entry in _left if entry[0] == device]
        _left[:] = [entry for entry in _left if entry[0] != device]
    kept = [entry for entry in here if not entry[1]()]
    with _lock:
        _left.extend(kept)


def take_pinned(num_bytes: int, flags: int) -> Any:
    """Pinned memory that stays allocated as long as the process, a `cupy.cuda.PinnedMemory`."""
    import cupy

    with _lock:
        free = _pinned.setdefault(num_bytes, [])
        if free:
            return free.pop()
        memory = cupy.cuda.PinnedMemory(num_bytes, flags)
        _all_pinned.append(memory)
        return memory


def give_pinned_back(num_bytes: int, memory: Any) -> None:
    """Later ones may have it: no kernel writes there any more."""
    with _lock:
        _pinned[num_bytes].append(memory)

"""Device memory that only its own rank touches: results of combine, handles, copies of inputs, workspaces."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import DeviceError
from . import leftovers
from .streams import allocation_in_capture


class Block:
    """Device memory that is given back when nobody holds this object any more.

    Attributes:
        pointer: its address, a multiple of 512.
        kept: what must live as long.
    """

    __slots__ = ("__weakref__", "_heap", "_memory", "kept", "pointer")

    def __init__(self, heap: Heap, memory: Any) -> None:
        self._heap = heap
        self._memory = memory
        self.pointer: int = memory.ptr
        self.kept: object = None

    def __del__(self) -> None:
        # Before the memory, which this object still holds, can be handed out again.
        self._heap.num_released += 1


class Workspace:
    """Control words that the kernels of one rank share, zero before the first of them. The device is current.

    Attributes:
        pointer: their address.
    """

    def __init__(self, num_bytes: int) -> None:
        import cupy

        self._memory = cupy.cuda.alloc(num_bytes)
        self._num_bytes = num_bytes
        self.pointer: int = self._memory.ptr
        self.reset()

    def reset(self) -> None:
        """Forget what calls left that were given up. No kernel is running on this device."""
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.memsetAsync(self.pointer, 0, self._num_bytes, stream.ptr)
        stream.synchronize()


class Heap:
    """Hands out device memory to the calls of one rank.

    A pool of CuPy's, but its own one: what one call gave back the next one may use, whatever their streams,
    because `Turns` keeps them in order.

    Args:
        shared_device: the device, if other ranks of it are threads of this process; see `leftovers`.

    Attributes:
        num_released: blocks given back so far. Grows before any of them is handed out again.
    """

    def __init__(self, *, shared_device: int | None = None) -> None:
        import cupy

        self._shared_device = shared_device
        self._pool = cupy.cuda.MemoryPool()
        self._out_of_memory = cupy.cuda.memory.OutOfMemoryError
        self.num_released = 0

    def reserve(self, num_bytes: int) -> None:
        """Have memory at hand, so that `take` need not ask the driver for it."""
        self.take(num_bytes)

    def __del__(self) -> None:
        if self._shared_device is not None:
            leftovers.leave(self._shared_device, partial(_has_freed_all, self._pool))

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        return int(self._pool.total_bytes())

    @property
    def used_bytes(self) -> int:
        """Of blocks that somebody holds."""
        return int(self._pool.used_bytes())

    def take(self, num_bytes: int, *, is_capturing: bool = False) -> Block:
        """Uninitialised memory on the current device.

        Raises:
            DeviceError: there is not enough.
        """
        try:
            if not is_capturing:
                return Block(self, self._pool.malloc(num_bytes or 1))
            with allocation_in_capture():
                return Block(self, self._pool.malloc(num_bytes or 1))
        except self._out_of_memory as error:
            raise DeviceError(f"allocating {num_bytes} bytes: {error}") from error


def _has_freed_all(pool: Any) -> bool:
    pool.free_all_blocks()
    return bool(pool.total_bytes() == 0)

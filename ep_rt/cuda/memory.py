"""Symmetric memory: one slab per rank, mapped by every rank of the NVLink domain."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    ClosedError,
    ConfigError,
    DeviceError,
    EpError,
    PeerFailedError,
    PeerTimeoutError,
    on_all_ranks,
)
from ..exchange import LATE, Group
from . import leftovers
from .layout import PAYLOAD_OFFSET, align_up

_LOG = logging.getLogger("ep_rt")

# The driver places smaller allocations side by side in pages of this size, and CUDA IPC shares whole pages.
_PAGE_BYTES = 2 << 20
_IPC_LAZY_PEER_ACCESS = 1
_PEER_ACCESS_ALREADY_ENABLED = 704


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """What a rank tells its peers of its slab."""

    host: str
    pid: int
    device: int
    num_bytes: int
    pointer: int
    ipc_handle: bytes  # empty where CUDA IPC does not work
    error: str | None


class Slab:
    """This rank's slab and its peers' as seen from here. Construction and `close` are collective.

    Args:
        group: the ranks of one NVLink domain: processes of one host, threads of one process, or both.
        num_bytes: size of the payload, which begins at `PAYLOAD_OFFSET`; the same on all ranks.
        timeout_s: deadline of the exchange; None for the group's own.

    Attributes:
        device: the current device at construction, where the slab lies.
        has_threads_beside: whether other ranks of it are threads of this process, on this device.
        pointers: [num_ranks] base addresses, valid on `device`. Each slab starts with a `SLAB_HEADER` and
            an `EXCHANGE` of zeros; the payload is not initialised.

    Raises:
        ConfigError: sizes differ between ranks.
        DeviceError: out of memory, or a peer's slab cannot be mapped. Both on every rank.
    """

    def __init__(self, group: Group, num_bytes: int, *, timeout_s: float | None = None) -> None:
        import cupy

        self.group = group
        self.device: int = cupy.cuda.runtime.getDevice()
        self.num_bytes = PAYLOAD_OFFSET + num_bytes
        self.pointers: tuple[int, ...] = ()
        # Copies of headers must not wait for the default stream, which may wait for a peer.
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pointer = 0
        self._opened: dict[int, int] = {}
        self._is_closed = False
        leftovers.settle(self.device)
        offers: list[_Offer] = group.allgather(self._allocate(), op="slab", timeout_s=timeout_s)
        places = [(offer.host, offer.pid, offer.device) for offer in offers]
        self.has_threads_beside = places.count(places[group.rank]) > 1
        error = next(
            (f"rank {rank}: {offer.error}" for rank, offer in enumerate(offers) if offer.error), None
        )
        if error is None and len({offer.num_bytes for offer in offers}) > 1:
            self._release()
            sizes = ", ".join(str(offer.num_bytes) for offer in offers)
            raise on_all_ranks(ConfigError(f"slab sizes differ between ranks: {sizes}"))
        if error is None:
            mapping_errors = group.allgather(self._map(offers), op="slab mapping", timeout_s=timeout_s)
            error = next((f"rank {rank}: {text}" for rank, text in enumerate(mapping_errors) if text), None)
            if error is not None:
                self._unmap()
                group.allgather(None, op="slab unmapping", timeout_s=timeout_s)
        if error is not None:
            self._release()
            raise on_all_ranks(DeviceError(error))

    def read(self, rank: int, offset: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A copy of one struct in a rank's slab. Waits for no stream but its own.

        Raises:
            ClosedError: after `close`.
            DeviceError: the memory is gone.
        """
        if not self.pointers:
            raise ClosedError("the slab is closed")
        return self.read_at(self.pointers[rank] + offset, dtype)

    def read_at(self, pointer: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The same from any address of this device."""
        value = np.zeros(1, dtype)
        self._copy(value.ctypes.data, pointer, value.nbytes)
        return value

    def write(self, offset: int, value: NDArray[Any]) -> None:
        """Store bytes into this rank's own slab, and wait until they are there."""
        contiguous = np.ascontiguousarray(value)
        self._copy(self._pointer + offset, contiguous.ctypes.data, contiguous.nbytes)

    def close(
        self,
        *,
        timeout_s: float | None = None,
        confirm: Callable[[], Sequence[int]] | None = None,
        when_unused: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Unmap the peers' slabs, and free this rank's once no peer maps it. May be called twice.

        Args:
            confirm: tells the peers that this rank has unmapped theirs, and returns those that do not say
                so of this one's; default: a collective of all of them.
            when_unused: calls its argument once nothing on this rank uses the memory any more; default: at
                once.

        Waits for this rank's device first, so no kernel of this rank can touch an unmapped slab. When a peer
        does not confirm in time, or has failed, this rank's memory stays allocated until the process
        ends (a kernel of that peer may still write there), a warning is logged, and nothing is raised.
        """
        if self._is_closed:
            return
        self._is_closed = True
        import cupy

        with cupy.cuda.Device(self.device):
            try:
                cupy.cuda.runtime.deviceSynchronize()
            except cupy.cuda.runtime.CUDARuntimeError as error:
                _LOG.warning("device %d failed before its slab was closed: %s", self.device, error)
            self._unmap()
            leftovers.settle(self.device)
        try:
            if confirm is None:
                confirmed = self.group.allgather(None, op="slab close", timeout_s=timeout_s, skip_late=True)
                missing = [rank for rank, value in enumerate(confirmed) if value is LATE]
            else:
                missing = list(confirm())
        except (PeerTimeoutError, PeerFailedError) as failure:
            _LOG.warning("a slab of %d bytes stays allocated: %s", self.num_bytes, failure)
            return
        if missing:
            _LOG.warning("a slab of %d bytes stays allocated: no word from ranks %s", self.num_bytes, missing)
        elif when_unused is None:
            self._release()
        else:
            when_unused(self._release_late)

    # Steps of the construction. Errors are returned, so that the ranks stay in step.

    def _allocate(self) -> _Offer:
        from cupy.cuda import runtime

        handle = b""
        error = None
        try:
            with device_errors("allocating the slab"):
                self._pointer = runtime.malloc(align_up(self.num_bytes, _PAGE_BYTES))
                runtime.memsetAsync(self._pointer, 0, PAYLOAD_OFFSET, self._stream.ptr)
                self._stream.synchronize()
            with contextlib.suppress(runtime.CUDARuntimeError):  # threads of one process need no handle
                handle = runtime.ipcGetMemHandle(self._pointer)
        except EpError as failure:
            error = str(failure)
        return _Offer(
            host=platform.node(),
            pid=os.getpid(),
            device=self.device,
            num_bytes=self.num_bytes,
            pointer=self._pointer,
            ipc_handle=handle,
            error=error,
        )

    def _map(self, offers: list[_Offer]) -> str | None:
        try:
            self.pointers = tuple(self._map_one(rank, offer, offers) for rank, offer in enumerate(offers))
        except EpError as failure:
            return str(failure)
        return None

    def _map_one(self, rank: int, offer: _Offer, offers: list[_Offer]) -> int:
        from cupy.cuda import runtime

        mine = offers[self.group.rank]
        if offer.host != mine.host:
            raise DeviceError(
                f"rank {rank} is on host {offer.host}, this rank on {mine.host}: no memory is shared"
            )
        with device_errors(f"mapping the slab of rank {rank}"):
            if offer.pid != mine.pid:
                if not offer.ipc_handle:
                    raise DeviceError(f"CUDA IPC is not available to rank {rank}")
                self._opened[rank] = runtime.ipcOpenMemHandle(offer.ipc_handle, _IPC_LAZY_PEER_ACCESS)
                return self._opened[rank]
            if offer.device != mine.device:
                if not runtime.deviceCanAccessPeer(mine.device, offer.device):
                    raise DeviceError(f"device {mine.device} cannot access device {offer.device}")
                try:
                    runtime.deviceEnablePeerAccess(offer.device)
                except runtime.CUDARuntimeError as error:
                    if error.status != _PEER_ACCESS_ALREADY_ENABLED:
                        raise
        return offer.pointer

    def _unmap(self) -> None:
        from cupy.cuda import runtime

        self.pointers = ()
        for rank, pointer in self._opened.items():
            try:
                runtime.ipcCloseMemHandle(pointer)
            except runtime.CUDARuntimeError as error:
                _LOG.warning("unmapping the slab of rank %d: %s", rank, error)
        self._opened.clear()

    def _release(self) -> None:
        from cupy.cuda import runtime

        if self._pointer:
            with device_errors("freeing the slab"):
                runtime.free(self._pointer)
        self._pointer = 0

    def _release_late(self) -> None:
        """For garbage collection, on any thread: raises nothing."""
        if sys.is_finalizing():  # the memory goes with the process, and nothing can be imported any more
            return
        if self.has_threads_beside:
            leftovers.leave(self.device, self._is_released)
            return
        try:
            import cupy

            with cupy.cuda.Device(self.device):
                self._release()
        except Exception as error:
            _LOG.warning("freeing a slab of %d bytes: %s", self.num_bytes, error)

    def _is_released(self) -> bool:
        self._release()
        return True

    def _copy(self, destination: int, source: int, num_bytes: int) -> None:
        import cupy

        with cupy.cuda.Device(self.device), device_errors("copying a slab header"):
            cupy.cuda.runtime.memcpyAsync(
                destination, source, num_bytes, cupy.cuda.runtime.memcpyDefault, self._stream.ptr
            )
            self._stream.synchronize()


def device_errors(doing: str) -> AbstractContextManager[None]:
    """Turn what CuPy raises for a failed CUDA call into `DeviceError`."""
    return _DeviceErrors(doing)


class _DeviceErrors(AbstractContextManager[None]):
    # Not a generator: calls to the device are often, and this is around each of them.
    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            from cupy.cuda import runtime

            if isinstance(error, runtime.CUDARuntimeError):
                raise DeviceError(f"{self._doing}: {error}") from error

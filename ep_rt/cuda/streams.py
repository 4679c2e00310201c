"""The communication stream, and points in it that others wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from .. import arrays
from ..errors import DeviceError
from ..events import EventOverlap
from .launch import make_context_current, stream_pointer
from .memory import device_errors


class CudaEvent:
    """A point in the work of some streams of one device.

    Args:
        framework: whose current stream waits when none is named; None for those of all that are loaded.
    """

    def __init__(self, device: int, streams: Iterable[int], framework: str | None) -> None:
        import cupy

        self._device = device
        self._framework = framework
        self._events = []
        with device_errors("recording an event"):
            for stream in streams:
                event = cupy.cuda.Event(disable_timing=True)
                cupy.cuda.runtime.eventRecord(event.ptr, stream)
                self._events.append(event)

    def wait(self, stream: Any) -> None:
        from cupy.cuda import runtime

        waiting = (
            arrays.current_streams(self._device, self._framework)
            if stream is None
            else (stream_pointer(stream),)
        )
        with device_errors("waiting for an event"):
            for each in waiting:
                for event in self._events:
                    runtime.streamWaitEvent(each, event.ptr)

    def synchronize(self) -> None:
        with device_errors("waiting for an event"):
            for event in self._events:
                event.synchronize()

    def query(self) -> bool:
        return all(event.done for event in self._events)


def capture() -> EventOverlap:
    """A point behind the work enqueued so far on the current streams of the loaded frameworks."""
    device = arrays.current_device()
    if device is None:
        return EventOverlap()
    return EventOverlap(CudaEvent(device, arrays.current_streams(device), None))


class CommStream:
    """A stream of the highest priority that waits for no other by itself.

    Attributes:
        pointer: the ``cudaStream_t``.
        stream: the same as a CuPy stream.
    """

    def __init__(self, device: int) -> None:
        import cupy
        from cuda.bindings import driver

        make_context_current()
        status, _, highest = driver.cuCtxGetStreamPriorityRange()
        if status == driver.CUresult.CUDA_SUCCESS:
            non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            status, stream = driver.cuStreamCreateWithPriority(non_blocking, highest)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"creating the communication stream: {status.name}")
        self.device = device
        self.pointer = int(stream)
        self.stream = _cupy_stream(self.pointer, device)
        self._event = cupy.cuda.Event(disable_timing=True)
        self._runtime = cupy.cuda.runtime

    def wait_for(self, streams: Iterable[int]) -> None:
        """Later work here comes after the work enqueued on `streams` so far."""
        for stream in streams:
            self.order(stream, self.pointer)

    def release(self, streams: Iterable[int]) -> None:
        """Later work on `streams` comes after the work enqueued here so far."""
        for stream in streams:
            self.order(self.pointer, stream)

    def event(self, framework: str) -> CudaEvent:
        """The end of the work enqueued here so far."""
        return CudaEvent(self.device, (self.pointer,), framework)

    def is_capturing(self, streams: Iterable[int]) -> bool:
        """Whether a graph is being captured on one of `streams`."""
        for stream in streams:
            # The legacy stream cannot be captured, nor asked while another one is.
            if stream != arrays.CUDA_STREAM_LEGACY and self._runtime.streamIsCapturing(stream):
                return True
        return False

    def synchronize(self) -> None:
        """Make the host wait for all work enqueued here."""
        with device_errors("the communication stream"):
            self._runtime.streamSynchronize(self.pointer)

    def close(self) -> None:
        """Destroy the stream. Nobody uses it any more."""
        self._runtime.streamDestroy(self.pointer)

    def order(self, first: int, then: int) -> None:
        """Later work on `then` comes after the work enqueued on `first` so far."""
        if first != then:
            with device_errors("ordering streams"):
                self._runtime.eventRecord(self._event.ptr, first)
                self._runtime.streamWaitEvent(then, self._event.ptr)


@contextlib.contextmanager
def foreign_stream(pointer: int, device: int) -> Iterator[None]:
    """Make a stream of somebody else current for CuPy in this thread, and its device."""
    import cupy

    with cupy.cuda.Device(device), _cupy_stream(pointer, device):
        yield


class _Foreign:
    """A stream as the CUDA stream protocol has it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def _cupy_stream(pointer: int, device: int) -> Any:
    """A ``cudaStream_t`` as a CuPy stream; who made it destroys it."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14, which deprecates the other way
        return cupy.cuda.Stream.from_external(_Foreign(pointer))
    return cupy.cuda.ExternalStream(pointer, device)


class Turns:
    """Keeps the calls of one rank in order, on whatever streams they are enqueued."""

    def __init__(self) -> None:
        import cupy

        self._event = cupy.cuda.Event(disable_timing=True)
        self._pointer = self._event.ptr
        self._runtime = cupy.cuda.runtime
        self._last: int | None = None

    def begin(self, stream: int) -> None:
        """Later work on `stream` comes after the calls so far. Not while it is being captured."""
        if self._last is not None and self._last != stream:
            self._runtime.streamWaitEvent(stream, self._pointer)

    def end(self, stream: int) -> None:
        """A call has been enqueued on `stream`, which its owner may destroy at any time from now on."""
        self._runtime.eventRecord(self._pointer, stream)
        self._last = stream

    def are_done(self) -> bool:
        """Whether the device has done all calls so far.

        Raises:
            DeviceError: the device has failed.
        """
        with device_errors("the calls so far"):
            status = self._runtime.eventQuery(self._pointer)
            if status in (0, 600):  # cudaSuccess, cudaErrorNotReady
                return bool(status == 0)
            raise DeviceError(f"a call failed: CUDA error {status}")


@contextlib.contextmanager
def allocation_in_capture() -> Iterator[None]:
    """Let this thread allocate device memory while a graph is being captured; no graph owns it."""
    from cuda.bindings import runtime

    relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    _, previous = runtime.cudaThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(previous)

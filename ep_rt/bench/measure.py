"""The times of an operation, as one rank reads them.

kernel   what the operation's work takes on the device once the ranks have met: a CUDA graph of (barrier of
         the ranks, operation) pairs, less the same barriers alone.
op       everything included: a CUDA graph of operations back to back, or calls back to back on a stream
         where an operation cannot be captured. On the host, one call after a barrier.
call     host time until the Python call returns. The stream is idle before each, so that no call waits for
         room in the launch queue.
row      host time of each of some calls in a row, with nothing between them: nothing wakes up, and caches are
         warm. Where a call takes the device longer, this is what a program pays whose host is ahead of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Protocol

from ..exchange import Group
from .layer import Call
from .places import TIMEOUT_S, CudaPlace, Place

NUM_IN_GRAPH: Final = 20
"""Operations of a CUDA graph."""

_NUM_ON_STREAM: Final = 10
_NUM_CALLS: Final = 20
_NUM_IN_ROW: Final = 50
_NUM_SPLIT: Final = 20
_HELD_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What one rank read, in microseconds. None: this time does not exist here."""

    kernel_us: tuple[float, ...] | None
    op_us: tuple[float, ...]
    call_us: tuple[float, ...] | None
    row_us: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """What one rank read of a call in two phases, in microseconds of the device. Neither phase waits: what is
    received has landed."""

    send_us: tuple[float, ...]
    receive_us: tuple[float, ...]


class Timer(Protocol):
    def measure(self, call: Call) -> Times:
        """Collective: every rank measures the same call."""

    def phases(self, call: Call) -> PhaseTimes | None:
        """Collective. None for a call in one phase, and where none runs by itself."""


class HostTimer:
    """Calls that do their work before they return."""

    def __init__(self, group: Group, repeat: int) -> None:
        self._group = group
        self._repeat = repeat

    def measure(self, call: Call) -> Times:
        readings = []
        call.run()
        for _ in range(self._repeat):
            self._group.barrier()
            start = time.perf_counter()
            call.run()
            readings.append((time.perf_counter() - start) * 1e6)
        return Times(kernel_us=None, op_us=tuple(readings), call_us=None)

    def phases(self, call: Call) -> None:
        return None


class Meeting:
    """Symmetric memory and a barrier over it. Construction and `close` are collective.

    Args:
        num_bytes: payload of the slab.
    """

    def __init__(self, group: Group, num_bytes: int = 0) -> None:
        from ..cuda.barrier import Barrier
        from ..cuda.hang import HangWatch
        from ..cuda.memory import Slab

        self.slab = Slab(group, num_bytes)
        self._barrier = Barrier(self.slab, HangWatch(self.slab, timeout_s=TIMEOUT_S), timeout_s=TIMEOUT_S)
        group.barrier()

    def enqueue(self, stream: Any) -> None:
        """Later work of `stream` comes after all ranks' earlier work.

        Raises:
            PeerTimeoutError: an earlier one gave up.
        """
        self._barrier.run(stream)

    def check(self) -> None:
        """Raise if a barrier gave up; the stream is idle."""
        self._barrier.check()

    def close(self) -> None:
        self.slab.close()


class CudaTimer:
    """Work on the current device.

    Attributes:
        barrier_us: of one barrier among barriers; one rank's readings.
    """

    def __init__(self, group: Group, place: CudaPlace, repeat: int) -> None:
        self._group = group
        self._place = place
        self._repeat = repeat
        self._meeting = Meeting(group)
        self.barrier_us = self._replayed(self._meet)

    def measure(self, call: Call) -> Times:
        kernel_us = row_us = None
        if call.can_be_captured:
            kernel_us = self.between_barriers(call.run)
            op_us = self._replayed(call.run)
            row_us = self._in_row(call.run)
        else:
            op_us = self._on_stream(call.run)
        return Times(kernel_us=kernel_us, op_us=op_us, call_us=self._returned(call.run), row_us=row_us)

    def phases(self, call: Call) -> PhaseTimes | None:
        import cupy

        if call.begin is None:
            return None
        stream = self._place.stream
        self._group.barrier()
        held = cupy.cuda.alloc(_HELD_BYTES)
        num_fills = 1
        sends: list[float] = []
        receives: list[float] = []
        while len(sends) < _NUM_SPLIT:
            begin, ready, sent, landed, received, end = self._events(6)
            self._group.barrier()
            # The device is busy until the host has enqueued all that follows, and waits for it nowhere.
            for _ in range(num_fills):
                held.memset_async(0, _HELD_BYTES, stream)
            begin.record(stream)
            self._meet()
            ready.record(stream)
            out = call.begin()
            sent.record(stream)
            self._meet()
            landed.record(stream)
            out.hook()
            received.record(stream)
            end.record(stream)
            was_ahead = not begin.done
            send_us, _, receive_us, pause_us = self._elapsed_us([ready, sent, landed, received, end], 1)
            if all(self._group.allgather(was_ahead, op="bench phases")):
                sends.append(send_us - pause_us)
                receives.append(receive_us - pause_us)
            else:
                num_fills *= 2
            del out
        return PhaseTimes(send_us=tuple(sends), receive_us=tuple(receives))

    def between_barriers(self, enqueue: Callable[[], Any]) -> tuple[float, ...]:
        """Microseconds of the device for what `enqueue` enqueues, from when all ranks have met until the
        last of them is done."""

        def pair() -> Any:
            self._meet()
            return enqueue()

        barrier_us = median(self.barrier_us)
        return tuple(both_us - barrier_us for both_us in self._replayed(pair))

    def captured(self, enqueue: Callable[[], Any], stream: Any) -> tuple[Any, Any]:
        """A CUDA graph of `NUM_IN_GRAPH` operations, and what its replays need.

        Collective: a rank that launches it next finds the others' kernels. `stream` is the current one.
        """
        stream.begin_capture()
        for _ in range(NUM_IN_GRAPH):
            # Only the last result is kept, so that all of them may take the same memory.
            kept = None
            kept = enqueue()
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        self._group.barrier()
        return graph, kept

    def close(self) -> None:
        """Collective."""
        self._meeting.close()

    def _meet(self) -> None:
        self._meeting.enqueue(self._place.stream)

    def _replayed(self, enqueue: Callable[[], Any]) -> tuple[float, ...]:
        """Microseconds for each of many in a CUDA graph, by replay. One replay before them is not counted."""
        stream = self._place.stream
        graph, kept = self.captured(enqueue, stream)
        events = self._events(self._repeat + 1)
        graph.launch(stream)
        events[0].record(stream)
        for event in events[1:]:
            graph.launch(stream)
            event.record(stream)
        readings = self._elapsed_us(events, NUM_IN_GRAPH)
        # Nobody gives memory or a graph back while a peer still works.
        self._group.barrier()
        del graph, kept
        return readings

    def _on_stream(self, run: Callable[[], Any]) -> tuple[float, ...]:
        events = self._events(self._repeat + 1)
        self._group.barrier()
        run()
        events[0].record(self._place.stream)
        for event in events[1:]:
            for _ in range(_NUM_ON_STREAM):
                run()
            event.record(self._place.stream)
        readings = self._elapsed_us(events, _NUM_ON_STREAM)
        self._group.barrier()
        return readings

    def _returned(self, run: Callable[[], Any]) -> tuple[float, ...]:
        readings = []
        self._group.barrier()
        for _ in range(_NUM_CALLS):
            self._place.synchronize()
            start = time.perf_counter()
            out = run()
            readings.append((time.perf_counter() - start) * 1e6)
            del out
        self._place.synchronize()
        self._group.barrier()
        return tuple(readings)

    def _in_row(self, run: Callable[[], Any]) -> tuple[float, ...]:
        readings = []
        for _ in range(self._repeat):
            self._place.synchronize()
            self._group.barrier()
            start = time.perf_counter()
            for _ in range(_NUM_IN_ROW):
                out = run()
            readings.append((time.perf_counter() - start) * 1e6 / _NUM_IN_ROW)
            del out
        self._place.synchronize()
        self._group.barrier()
        return tuple(readings)

    def _events(self, count: int) -> list[Any]:
        import cupy

        return [cupy.cuda.Event() for _ in range(count)]

    def _elapsed_us(self, events: list[Any], count: int) -> tuple[float, ...]:
        import cupy

        self._place.synchronize()
        self._meeting.check()
        pairs = itertools.pairwise(events)
        return tuple(float(cupy.cuda.get_elapsed_time(first, last)) * 1e3 / count for first, last in pairs)


def open_timer(group: Group, place: Place, repeat: int) -> HostTimer | CudaTimer:
    """Whatever measures at that place. Collective."""
    if isinstance(place, CudaPlace):
        return CudaTimer(group, place, repeat)
    return HostTimer(group, repeat)

"""One rank's part of an NVLink domain: its device, its memory, its streams, and who keeps watch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..cuda_arrays import Column, ResultArrays, current_stream, undisturbed
from ..errors import BackendError, ClosedError, ConfigError, EpError, TopologyError, on_all_ranks
from ..events import CompletedEvent, EventOverlap
from ..exchange import Group
from ..requests import Place, Schedule
from . import plan
from .hang import HangWatch, Names
from .heap import Block, Heap
from .layout import MAX_BLOCKS, MAX_LOCAL_RANKS, OFFSET_UNIT, PAYLOAD_OFFSET, Struct
from .memory import Slab, device_errors
from .pool import Lease, Pool
from .streams import CommStream, Turns

T = TypeVar("T")

_SHARED_DEVICE_RESERVE_BYTES: Final = 256 << 20


def together(group: Group, what: str, step: Callable[[], T], *, timeout_s: float) -> T:
    """Do a local step; if it fails on any rank, raise on all.

    Raises:
        EpError: a rank's own failure; `BackendError` for that of another one.
        PeerTimeoutError, PeerFailedError: ranks did not come.
    """
    error: EpError | None = None
    try:
        result = step()
    except EpError as failure:
        error = failure
    failures = group.allgather(error and str(error), op=what, timeout_s=timeout_s)
    failed = next((rank for rank, text in enumerate(failures) if text is not None), None)
    if failed is None:
        return result
    if error is not None:
        raise on_all_ranks(error)
    raise on_all_ranks(BackendError(f"rank {failed}: {failures[failed]}"))


class Call:
    """One call under way.

    Attributes:
        stream: where its work goes.
        streams: on which its inputs were made, and its results are used.
        frameworks: of its inputs, distinct, the one of the results first.
        producers: on which its inputs were made, too: of arrays that name one, or were exported to one.
        inputs: the arrays it reads.
        temporaries: memory that its work uses and nobody else holds.
    """

    __slots__ = (
        "frameworks",
        "inputs",
        "is_capturing",
        "producers",
        "schedule",
        "stream",
        "streams",
        "temporaries",
    )

    def __init__(
        self,
        stream: int,
        streams: tuple[int, ...],
        frameworks: tuple[str, ...],
        inputs: Sequence[object],
        schedule: Schedule,
        is_capturing: bool,
        producers: tuple[int, ...] = (),
    ) -> None:
        self.stream = stream
        self.streams = streams
        self.frameworks = frameworks
        self.inputs = inputs
        self.schedule = schedule
        self.is_capturing = is_capturing
        self.producers = producers
        self.temporaries: list[Lease | Block] = []

    def keep_with(self, result: Lease | Block, *others: Lease | Block) -> None:
        """In a capture, memory of the call must live as long as its results. Else stream order is enough."""
        if self.is_capturing:
            result.kept = (*self.temporaries, *others)


class Domain:
    """What the operations of one rank share.

    A call without a previous event that is not asynchronous runs on the caller's stream; others, and those
    whose inputs come from several streams, run on the communication stream. `Turns` keeps all of them in
    order, so memory that a call gives back may be handed to the next one.

    Args:
        group: the ranks of one NVLink domain.
        num_bytes: payload of the slab; the same on every rank.
        timeout_s: deadline of every wait for a peer, in kernels and on the host.
        names: of the ranks in errors; default their numbers in `group`.
        spare_bytes: see `spare`, from the beginning.

    Attributes:
        device: the one that is current at construction.
        gpu: host and bus id of the GPU.
        num_sharing: ranks of the group on it.
        num_device_sms: of the GPU.

    Raises:
        TopologyError: more ranks than one NVLink domain may have.
        ConfigError, DeviceError: on every rank.

    Collective.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_bytes: int,
        timeout_s: float,
        names: Names | None = None,
        spare_bytes: int = 0,
    ) -> None:
        import cupy

        if group.size > MAX_LOCAL_RANKS:
            raise on_all_ranks(
                TopologyError(
                    f"{group.size} ranks on one node; the CUDA backend serves {MAX_LOCAL_RANKS}. "
                    "backend='host' takes any number, with CPU arrays"
                )
            )
        self.group = group
        self.timeout_s = timeout_s
        self.runtime = cupy.cuda.runtime
        self.device: int = self.runtime.getDevice()
        bus_id = self.runtime.deviceGetPCIBusId(self.device)
        self.gpu = platform.node(), bus_id
        gpus = group.allgather(self.gpu, op="devices", timeout_s=timeout_s)
        self.num_sharing = gpus.count(self.gpu)
        self.num_device_sms = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.slab = Slab(group, num_bytes, timeout_s=timeout_s)
        self.base = self.slab.pointers[group.rank] + PAYLOAD_OFFSET
        self.watch = HangWatch(self.slab, timeout_s=timeout_s, names=names)
        self.pool = Pool(num_bytes)
        self.heap = Heap(shared_device=self.device if self.slab.has_threads_beside else None)
        if self.slab.has_threads_beside:
            # The driver allocates only once the device's kernels are done, and those of the ranks beside wait
            # for this one.
            self.heap.reserve(_SHARED_DEVICE_RESERVE_BYTES)
        self.comm = CommStream(self.device)
        self.turns = Turns()
        self.place = Place(f"cuda:{self.device}", self.comm.pointer)
        self._spare_bytes = spare_bytes
        self._max_blocks: int | None = None
        self.is_closed = False
        self._done = EventOverlap()
        self._kept_inputs: object = None
        self._ordered_releases = 0

    def close(self, confirm: Callable[[], Sequence[int]] | None = None) -> None:
        """Collective. Arrays that are still held stay valid. For `confirm` see `Slab.close`."""
        self.is_closed = True
        self.slab.close(timeout_s=self.timeout_s, confirm=confirm, when_unused=self.pool.close)
        self.comm.close()
        self.watch.close()

    def on_device(self, call: Callable[..., T], *args: Any) -> T:
        """Run with this rank's device current."""
        before = self.runtime.getDevice()
        if before == self.device:
            return undisturbed(call, *args)
        self.runtime.setDevice(self.device)
        try:
            return undisturbed(call, *args)
        finally:
            self.runtime.setDevice(before)

    def num_blocks(self, num_sms: int) -> int:
        """Blocks of a kernel that waits for its peers, see `plan.num_blocks`."""
        return plan.num_blocks(num_sms, num_device_sms=self.num_device_sms, num_sharing=self.num_sharing)

    @property
    def max_blocks(self) -> int:
        """The most that `num_blocks` can answer."""
        # Not a `cached_property`, which takes the attributes of its object out of their fast places.
        if self._max_blocks is None:
            self._max_blocks = self.num_blocks(min(self.num_device_sms, MAX_BLOCKS))
        return self._max_blocks

    # The steps of every call.

    def check(self) -> None:
        """Raise what keeps a call from starting."""
        if self.is_closed:
            raise ClosedError("the buffer is closed")
        if self.watch.word.value:
            self.watch.check()

    def begin(
        self,
        frameworks: tuple[str, ...],
        inputs: Sequence[object],
        schedule: Schedule,
        producers: tuple[int, ...] = (),
    ) -> Call:
        """Choose the stream of a call. Nothing is enqueued.

        Args:
            frameworks: see `Call`.
            inputs: to be kept until the call is done, where nobody orders what reuses their memory.
            producers: streams that must be waited for before they are read.
        """
        stream = self.comm.pointer
        streams: tuple[int, ...]
        previous, is_asynchronous, _ = schedule
        if len(frameworks) == 1 and frameworks[0] != "jax":
            current = current_stream(frameworks[0], self.device)
            streams = (current,)
            if previous is None and not is_asynchronous:
                stream = current
        else:
            # JAX orders its arrays by the communication stream when they are exported to it.
            streams = tuple([current_stream(each, self.device) for each in frameworks if each != "jax"])
        if self.slab.has_threads_beside and arrays.CUDA_STREAM_LEGACY in streams:
            raise ConfigError(
                "ranks that are threads on one GPU wait for each other, and the default stream is common to "
                "them: give each a non-blocking stream of its own, and make it current"
            )
        is_capturing = self.comm.is_capturing(streams)
        if producers:
            producers = tuple([each for each in producers if each != stream and each not in streams])
        return Call(stream, streams, frameworks, inputs, schedule, is_capturing, producers)

    def order(self, call: Call) -> None:
        """Let the call's stream wait for what comes before the call. All memory of it was taken.

        With a previous event that is all of the caller's it waits for, unless memory was given back since it
        last waited for the caller: that memory may still be read there.
        """
        if not call.is_capturing:
            self.turns.begin(call.stream)
        for stream in call.producers:
            # A graph cannot wait for what is outside of it. Whoever replays it does.
            if not call.is_capturing or self.comm.is_capturing((stream,)):
                self.comm.order(stream, call.stream)
        if call.stream != self.comm.pointer:
            return
        previous = call.schedule.previous_event
        is_pending = previous is not None and not isinstance(previous.event, CompletedEvent)
        if previous is not None and is_pending:
            previous.event.wait(self.comm.pointer)
        releases = self.pool.num_released + self.heap.num_released
        if not is_pending or releases != self._ordered_releases:
            self.comm.wait_for(call.streams)
            self._ordered_releases = releases

    def launched(self, call: Call) -> None:
        """The next call comes after what this one has enqueued so far."""
        if not call.is_capturing:
            self.turns.end(call.stream)

    def finish(self, call: Call) -> EventOverlap:
        """The caller's streams wait for the call, or the event that the caller waits for."""
        self.launched(call)
        if call.frameworks[0] == "jax":
            # JAX does not know who reads its memory: hold it until JAX has waited for the next call.
            self._kept_inputs = call.inputs
        if not call.schedule.async_finish:
            if call.stream == self.comm.pointer:
                self.comm.release(call.streams)
            return self._done
        return EventOverlap(self.comm.event(call.frameworks[0]), extra_tensors=tuple(call.inputs))

    def results(self, columns: Sequence[Column | None], framework: str) -> ResultArrays:
        """What makes results of calls. JAX waits for the communication stream, where its calls run."""
        stream = self.comm.pointer if framework == "jax" else None
        return ResultArrays(columns, device=self.device, framework=framework, stream=stream)

    def let_wait(self, streams: Sequence[int]) -> None:
        """Later work on `streams` comes after the calls so far."""
        with device_errors("ordering streams"):
            for stream in streams:
                self.turns.begin(stream)

    # Memory.

    def spare(self, num_bytes: int) -> int:
        """What the slab is to keep free once it holds a result of so many bytes."""
        if num_bytes > self._spare_bytes:
            self._spare_bytes = num_bytes
        return self._spare_bytes

    def take(self, num_bytes: int, what: str) -> Lease:
        """A place in the slab.

        Raises:
            ConfigError: there is no room.
        """
        lease = self.pool.take(num_bytes)
        if lease is None:
            raise ConfigError(
                f"no room for {what}: num_nvl_bytes is {self.pool.num_bytes} and must be at least "
                f"{self.pool.num_bytes - self.pool.largest_free() + num_bytes}, with the arrays held now"
            )
        return lease

    def address(self, lease: Lease) -> int:
        """Of a place in the slab, as this rank sees it."""
        return self.base + lease.offset

    def offset(self, lease: Lease) -> int:
        """Of a place in the slab, as words tell it to the peers."""
        return (PAYLOAD_OFFSET + lease.offset) // OFFSET_UNIT

    def read(self, pointer: int, struct: Struct) -> NDArray[Any]:
        """The struct [1] at an address, once the calls so far are done."""
        if self.is_closed:
            raise ClosedError("the buffer is closed")
        result = np.zeros(1, struct)
        self.on_device(self.fetch, pointer, result)
        self.watch.check()
        return result

    def fetch(self, pointer: int, array: NDArray[Any]) -> None:
        """Copy device memory to the host, after the calls so far."""
        stream = self.comm.pointer
        with device_errors("reading from the device"):
            self.turns.begin(stream)
            # The copy would wait inside the driver, where ranks of this process would wait for it too.
            self.comm.synchronize()
            self.runtime.memcpyAsync(
                array.ctypes.data, pointer, array.nbytes, self.runtime.memcpyDeviceToHost, stream
            )
            self.comm.synchronize()

"""Normal mode on GPUs of one NVLink domain.

A call checks, takes memory, lets the communication stream wait for the caller's, and enqueues one kernel.
Rows land where the result lies, and what a result leaves is given back when its arrays are gone.

Capture    with `num_worst_tokens` or a handle a dispatch may be captured in a CUDA graph, and every combine.
           A replay uses the memory of the capture: whoever replays keeps the arrays and handles of the
           capture, and what else the graph needs lives as long as those.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..arrays import ArrayView
from ..errors import (
    BackendError,
    ClosedError,
    ConfigError,
    DeviceError,
    EpError,
    TopologyError,
    on_all_ranks,
)
from ..events import CompletedEvent, EventOverlap
from ..exchange import Group
from ..handle import DispatchHandle
from ..requests import CombineRequest, DispatchRequest, LayoutRequest, Place, Schedule, local_experts
from ..results import Combined, Dispatched, DispatchLayout
from ..topology import Topology
from . import plan
from .digest import combine_digest, dispatch_digest
from .handle import (
    CudaDispatchHandle,
    empty_result,
    result_pointer,
    routing_bytes,
    send_plan_pointer,
    send_row_pointer,
)
from .hang import HangWatch, PinnedStruct, timeout_ns
from .heap import Block, Heap
from .inputs import Call, Inputs, itemsize, row_bytes
from .layout import (
    DISPATCH_RESULT,
    MAX_BLOCKS,
    MAX_LOCAL_EXPERTS,
    MAX_LOCAL_RANKS,
    OFFSET_UNIT,
    PAYLOAD_OFFSET,
    ReceivedRow,
)
from .memory import Slab, device_errors
from .operations import Operations
from .pool import Lease, Pool, PoolStats
from .streams import CommStream

T = TypeVar("T")

# A host that polls this often in a tight loop goes on more slowly: what it waits for takes long.
_EAGER_POLLS: Final = 4000
_LAZY_POLL_S: Final = 50e-6
_MAX_ROWS: Final = 2**31 - 1
_SHARED_DEVICE_RESERVE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaStats:
    """What a buffer did so far.

    Attributes:
        slab: its communication memory.
        num_copied_inputs: arrays that were not contiguous, or not aligned.
        num_staged_inputs: inputs of combine that were copied into the slab, because they lay elsewhere.
    """

    slab: PoolStats
    num_dispatches: int
    num_combines: int
    num_copied_inputs: int
    num_staged_inputs: int


class CudaEngine:
    """Dispatch and combine by kernels. A call returns when its work is enqueued.

    Args:
        num_bytes: payload of the slab; the same on every rank.
        timeout_s: deadline of every wait for a peer, in kernels and on the host.

    Attributes:
        place: the device that is current at construction.

    Raises:
        TopologyError: the ranks are not those of one NVLink domain.
        ConfigError, DeviceError, CompileError, BackendError: on every rank.

    Collective.
    """

    def __init__(
        self, group: Group, topology: Topology, *, owner: object, num_bytes: int, timeout_s: float
    ) -> None:
        import cupy

        if topology.num_nodes > 1 or topology.num_ranks > MAX_LOCAL_RANKS:
            raise on_all_ranks(
                TopologyError(
                    f"{topology.num_ranks} ranks on {topology.num_nodes} nodes: the CUDA backend serves up "
                    f"to {MAX_LOCAL_RANKS} ranks of one node, internode is not there yet; "
                    "use backend='host' with CPU arrays"
                )
            )
        self._group = group
        self._owner = owner
        self._timeout_s = timeout_s
        self._runtime = cupy.cuda.runtime
        self.device: int = self._runtime.getDevice()
        bus_id = self._runtime.deviceGetPCIBusId(self.device)
        places = group.allgather((platform.node(), bus_id, os.getpid()), op="devices", timeout_s=timeout_s)
        mine = places[group.rank]
        self._num_sharing = sum(place[:2] == mine[:2] for place in places)
        self._has_threads_beside = places.count(mine) > 1
        self._num_device_sms = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._slab = Slab(group, num_bytes, timeout_s=timeout_s)
        self._watch = HangWatch(self._slab, timeout_s=timeout_s)
        self._pool = Pool(num_bytes)
        self._heap = Heap()
        if self._has_threads_beside:
            # The driver allocates only once the device's kernels are done, and those of the ranks beside wait
            # for this one.
            self._heap.reserve(_SHARED_DEVICE_RESERVE_BYTES)
        self._comm = CommStream(self.device)
        self._result = PinnedStruct(DISPATCH_RESULT)
        self._together("kernels", self._load)
        self.place = Place(f"cuda:{self.device}", self._comm.pointer)
        self._scratch: list[Block] = []
        self._abandoned: list[Lease] = []
        self._scratch_tokens = -1
        self._inputs = Inputs(self._slab, self._comm, self._heap, self._operations, take=self._take)
        self._kept_inputs: object = None
        self._ordered_releases = 0
        self._offered_bytes = 0
        self._num_calls = 0
        self._num_combines = 0
        self._is_closed = False

    # Life time.

    def close(self) -> None:
        """Collective. Arrays that are still held stay valid; handles do not."""
        self._is_closed = True
        self._slab.close(timeout_s=self._timeout_s, when_unused=self._pool.close)
        self._comm.close()

    def reset(self) -> None:
        """Start again after an error of the ranks. Collective; see `HangWatch.reset`."""
        self._on_device(self._runtime.deviceSynchronize)
        self._on_device(self._operations.reset)
        self._watch.reset(timeout_s=self._timeout_s)
        self._abandoned.clear()
        calls = self._group.allgather(self._num_calls, op="reset calls", timeout_s=self._timeout_s)
        self._num_calls = max(calls)

    @property
    def stats(self) -> CudaStats:
        return CudaStats(
            slab=self._pool.stats,
            num_dispatches=self._num_calls,
            num_combines=self._num_combines,
            num_copied_inputs=self._inputs.num_copied,
            num_staged_inputs=self._inputs.num_staged,
        )

    @property
    def comm_stream(self) -> Any:
        """As a CuPy stream, which other frameworks understand by ``__cuda_stream__``."""
        return self._comm.stream

    def empty(self, shape: Sequence[int], dtype: str, framework: str) -> Any:
        """An uninitialised array in the slab, which `combine` reads without a copy."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * arrays.np_dtype(dtype).itemsize
        lease = self._take(num_bytes, "the array")
        # The memory may still be read by work enqueued on the communication stream.
        self._on_device(lambda: self._comm.release(arrays.current_streams(self.device, framework)))
        return self._as_array(self._address(lease), shape, dtype, framework, lease)

    # Calls.

    def get_dispatch_layout(self, build: Callable[[], LayoutRequest], schedule: Schedule) -> DispatchLayout:
        return self._on_device(lambda: self._get_dispatch_layout(build(), schedule))

    def dispatch(self, build: Callable[[], DispatchRequest], schedule: Schedule) -> Dispatched:
        return self._on_device(lambda: self._dispatch(build(), schedule))

    def combine(self, build: Callable[[], CombineRequest], schedule: Schedule) -> Combined:
        return self._on_device(lambda: self._combine(build(), schedule))

    def _get_dispatch_layout(self, request: LayoutRequest, schedule: Schedule) -> DispatchLayout:
        ids, num_ranks = request.topk_idx, self._group.size
        num_tokens = ids.shape[0]
        call = self._begin((ids,), schedule)
        counts_bytes = 4 * (num_ranks + request.num_experts)
        block = self._heap.take(counts_bytes + num_tokens * num_ranks, is_capturing=call.is_capturing)
        self._order(call)
        per_expert = block.pointer + 4 * num_ranks
        in_rank = block.pointer + counts_bytes
        with device_errors("get_dispatch_layout"):
            self._runtime.memsetAsync(block.pointer, 0, counts_bytes, self._comm.pointer)
        self._operations.dispatch_layout(
            self._comm.pointer,
            topk_idx=self._inputs.readable(ids, call),
            num_tokens_per_rank=block.pointer,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            num_tokens=num_tokens,
            num_topk=ids.shape[1],
            num_experts=request.num_experts,
            idx_bytes=itemsize(ids),
        )

        def result(pointer: int, shape: tuple[int, ...], dtype: str) -> Any:
            return self._as_array(pointer, shape, dtype, ids.framework, block)

        call.keep_with(block)
        event = self._finish(call)
        return DispatchLayout(
            num_tokens_per_rank=result(block.pointer, (num_ranks,), "int32"),
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=result(per_expert, (request.num_experts,), "int32"),
            is_token_in_rank=result(in_rank, (num_tokens, num_ranks), "bool"),
            event=event,
        )

    def _dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        x, ids, weights, sf = request.x, request.topk_idx, request.topk_weights, request.sf
        # With expert ids, the destinations are those of the ids.
        in_rank = request.is_token_in_rank if ids is None else None
        handle = self._own_handle(request.handle)
        num_tokens = x.shape[0]
        row = ReceivedRow(
            idx_bytes=row_bytes(ids),
            weights_bytes=row_bytes(weights),
            sf_bytes=row_bytes(sf),
            row_bytes=row_bytes(x),
        )
        self._check_experts(request.num_experts)
        num_blocks = self._num_blocks(schedule)
        call = self._begin((x, sf, ids, weights, in_rank), schedule)
        num_rows = handle.num_recv_rows if handle is not None else request.num_worst_tokens
        is_exact = handle is None and num_rows == 0
        if is_exact and call.is_capturing:
            raise ConfigError(
                "the number of rows of this dispatch is not known to the host, so it cannot be captured in a "
                "CUDA graph: give num_worst_tokens, or a handle"
            )
        lease = (
            self._take_all()
            if is_exact
            else self._take(row.layout(num_rows).end, f"{num_rows} received rows")
        )
        capacity = min(_MAX_ROWS, row.capacity(lease.num_bytes)) if is_exact else num_rows
        if handle is None:
            routing = self._heap.take(routing_bytes(num_tokens), is_capturing=call.is_capturing)
        else:
            routing = handle.routing
        scratch = self._scratch_for(num_tokens, call)
        self._order(call)

        place = row.layout(capacity)
        base = self._address(lease)
        if not is_exact and ids is not None:
            self._fill_absent(base, place.topk_idx, place.topk_weights, row, capacity)
        number = self._num_calls + 1
        self._operations.dispatch(
            self._comm.pointer,
            num_blocks,
            result=self._result.pointer if is_exact else result_pointer(routing),
            x=self._inputs.readable(x, call),
            sf=self._inputs.readable(sf, call),
            topk_idx=self._inputs.readable(ids, call),
            topk_weights=self._inputs.readable(weights, call),
            is_token_in_rank=self._inputs.readable(in_rank, call),
            send_row=send_row_pointer(routing),
            send_plan=send_plan_pointer(routing),
            masks=scratch.pointer + 4 * MAX_LOCAL_RANKS * num_tokens,
            send_token=scratch.pointer,
            call=number,
            digest=dispatch_digest(request, handle_call=0 if handle is None else handle.call),
            recv_offset=(PAYLOAD_OFFSET + lease.offset) // OFFSET_UNIT,
            recv_capacity=capacity,
            num_tokens=num_tokens,
            num_topk=0 if ids is None else ids.shape[1],
            num_experts=request.num_experts,
            row_bytes=row.row_bytes,
            sf_row_bytes=row.sf_bytes,
            idx_bytes=0 if ids is None else itemsize(ids),
            is_cached=handle is not None,
        )
        self._num_calls = number
        call.keep_with(lease, routing)
        event = self._finish(call)

        if is_exact:
            try:
                result = self._await_result(number, row)
            except EpError:
                # Peers may still write there: kept until the ranks reset together, and no longer.
                self._abandoned.append(lease)
                del lease, call
                raise
            num_rows = int(result["num_recv_tokens"][0])
            self._pool.trim(lease, place.x + num_rows * row.row_bytes)
        if handle is None:
            handle = CudaDispatchHandle(
                owner=self._owner,
                num_tokens=num_tokens,
                num_topk=0 if ids is None else ids.shape[1],
                num_recv_rows=num_rows,
                num_recv_tokens_per_expert_list=self._expert_counts(request, result) if is_exact else [],
                call=number,
                routing=routing,
                known_recv_tokens=num_rows if is_exact else None,
                read_result=self._read_result,
            )

        def received(offset: int, like: ArrayView | None) -> Any:
            if like is None:
                return None
            shape = (num_rows, *like.shape[1:])
            return self._as_array(base + offset, shape, like.dtype, like.framework, lease)

        recv_x = received(place.x, x)
        return Dispatched(
            recv_x=recv_x if sf is None else (recv_x, received(place.sf, sf)),
            recv_topk_idx=received(place.topk_idx, ids),
            recv_topk_weights=received(place.topk_weights, weights),
            num_recv_tokens_per_expert_list=handle.num_recv_tokens_per_expert_list,
            handle=handle,
            event=event,
        )

    def _combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        x, weights, biases = request.x, request.topk_weights, request.biases
        handle = self._own_handle(request.handle)
        assert handle is not None
        num_blocks = self._num_blocks(schedule)
        call = self._begin((x, weights, *biases), schedule)
        staged_x, staged_weights = self._inputs.stage(x, "x"), self._inputs.stage(weights, "topk_weights")
        num_topk = 0 if weights is None else weights.shape[1]
        out = self._heap.take(handle.num_tokens * row_bytes(x), is_capturing=call.is_capturing)
        out_weights = None
        if weights is not None:
            out_weights = self._heap.take(handle.num_tokens * num_topk * 4, is_capturing=call.is_capturing)
        self._order(call)

        bias = [self._inputs.readable(each, call) for each in biases]
        self._operations.combine(
            self._comm.pointer,
            num_blocks,
            x.dtype,
            send_row=send_row_pointer(handle.routing),
            send_plan=send_plan_pointer(handle.routing),
            bias=(*bias, 0, 0)[:2],
            out=out.pointer,
            out_weights=0 if out_weights is None else out_weights.pointer,
            digest=combine_digest(request, handle_call=handle.call),
            y_offset=self._inputs.slab_offset(x, staged_x, call),
            weights_offset=self._inputs.slab_offset(weights, staged_weights, call),
            num_tokens=handle.num_tokens,
            row_bytes=row_bytes(x),
            num_topk=num_topk,
        )
        self._num_combines += 1
        for block in (out, out_weights):
            if block is not None:
                call.keep_with(block, handle.routing)
        event = self._finish(call)

        def combined(block: Block, like: ArrayView) -> Any:
            shape = (handle.num_tokens, *like.shape[1:])
            return self._as_array(block.pointer, shape, like.dtype, like.framework, block)

        return Combined(
            combined_x=combined(out, x),
            combined_topk_weights=None
            if out_weights is None or weights is None
            else combined(out_weights, weights),
            event=event,
        )

    # Steps of a call.

    def _begin(self, views: Sequence[ArrayView | None], schedule: Schedule) -> Call:
        """Check that nothing stands in the way, and find the caller's streams. Nothing is enqueued."""
        if self._is_closed:
            raise ClosedError("the buffer is closed")
        self._watch.check()
        present = [view for view in views if view is not None]
        streams = {view.stream for view in present if view.stream is not None}
        # JAX arrays were ordered before the communication stream when they were exported to it.
        streams.discard(self._comm.pointer)
        if self._has_threads_beside and arrays.CUDA_STREAM_LEGACY in streams:
            raise ConfigError(
                "ranks that are threads on one GPU wait for each other, and the default stream is common to "
                "them: give each a non-blocking stream of its own, and make it current"
            )
        return Call(
            inputs=present,
            streams=tuple(streams),
            schedule=schedule,
            is_capturing=self._comm.is_capturing(streams),
        )

    def _order(self, call: Call) -> None:
        """Let the communication stream wait for what comes before the call. All memory of it was taken.

        With a previous event that is all it waits for, unless memory was given back since it last waited for
        the caller: that memory may still be read there.
        """
        previous = call.schedule.previous_event
        is_pending = previous is not None and not isinstance(previous.event, CompletedEvent)
        if previous is not None and is_pending:
            previous.event.wait(self._comm.pointer)
        releases = self._pool.num_released + self._heap.num_released
        if not is_pending or releases != self._ordered_releases:
            self._comm.wait_for(call.streams)
            self._ordered_releases = releases

    def _finish(self, call: Call) -> EventOverlap:
        """The caller's streams wait for the call, or the event that the caller waits for."""
        framework = call.inputs[0].framework
        if framework == "jax":
            # JAX does not know who reads its memory: hold it until JAX has waited for the next call.
            self._kept_inputs = call.inputs
        if not call.schedule.async_finish:
            self._comm.release(call.streams)
            return EventOverlap()
        inputs = tuple(view.owner for view in call.inputs)
        return EventOverlap(self._comm.event(framework), extra_tensors=inputs)

    def _fill_absent(
        self, base: int, idx_offset: int, weights_offset: int, row: ReceivedRow, capacity: int
    ) -> None:
        """Ids -1 and weights 0 in every row, before any peer may write there."""
        with device_errors("dispatch"):
            for offset, value, row_bytes in (
                (idx_offset, 0xFF, row.idx_bytes),
                (weights_offset, 0, row.weights_bytes),
            ):
                if row_bytes:
                    self._runtime.memsetAsync(base + offset, value, capacity * row_bytes, self._comm.pointer)

    def _scratch_for(self, num_tokens: int, call: Call) -> Block:
        """Memory of the kernel alone. Earlier, smaller ones are kept: graphs may hold them."""
        if num_tokens > self._scratch_tokens:
            self._scratch_tokens = max(1024, num_tokens + num_tokens // 4)
            num_bytes = plan.scratch_bytes(self._scratch_tokens)
            self._scratch.append(self._heap.take(num_bytes, is_capturing=call.is_capturing))
        return self._scratch[-1]

    def _await_result(self, number: int, row: ReceivedRow) -> NDArray[Any]:
        """What the kernel of call `number` tells its host once the counts of all ranks are known.

        Raises:
            ConfigError: on every rank, if more goes to one than fits there.
            PeerTimeoutError, CollectiveMismatchError: the kernel gave up.
        """
        word = self._result.word
        # The kernel has a deadline of its own, from its start; what was enqueued before it comes on top.
        deadline = time.monotonic() + 2 * self._timeout_s + 10.0
        polls = 0
        while word.value != number:
            polls += 1
            if polls < _EAGER_POLLS:
                os.sched_yield()
            else:
                time.sleep(_LAZY_POLL_S)
            if polls % 64 == 0:
                self._watch.check()
            if polls % 1024 == 0 and self._comm.is_idle() and word.value != number:
                self._watch.check()
                raise DeviceError("dispatch left without a result")
            if polls % 1024 == 0 and time.monotonic() > deadline:
                raise DeviceError(
                    f"dispatch has no result after {2 * self._timeout_s + 10.0:g} s: the work enqueued "
                    "before it is still running"
                )
        result = self._result.array
        if result["overfull_ranks"][0]:
            self._raise_overfull(int(result["num_recv_tokens"][0]), row)
        return result

    def _raise_overfull(self, num_recv_tokens: int, row: ReceivedRow) -> NoReturn:
        stats = self._pool.stats
        # This rank's own result is not free yet: its place is what it could offer.
        used_bytes = stats.num_bytes - self._offered_bytes
        needed = used_bytes + row.num_bytes(num_recv_tokens)
        answers = self._group.allgather(
            (needed, stats.num_bytes, num_recv_tokens), op="dispatch sizes", timeout_s=self._timeout_s
        )
        listing = "; ".join(
            f"rank {rank} receives {tokens} tokens and needs {needed} bytes"
            for rank, (needed, available, tokens) in enumerate(answers)
            if needed > available
        )
        most = max(needed for needed, _, _ in answers)
        raise on_all_ranks(
            ConfigError(
                f"dispatch does not fit: num_nvl_bytes is {stats.num_bytes} and must be at least {most}, "
                f"with the arrays held now ({listing})"
            )
        )

    def _expert_counts(self, request: DispatchRequest, result: NDArray[Any]) -> list[int]:
        num_local_experts = request.num_experts // self._group.size
        counts = result["expert_counts"][0, :num_local_experts]
        if request.topk_idx is None:
            counts = self._exchanged_expert_counts(request)
        alignment = request.expert_alignment
        if alignment > 1:
            counts = -(-counts // alignment) * alignment
        listed: list[int] = counts.tolist()
        return listed

    def _exchanged_expert_counts(self, request: DispatchRequest) -> NDArray[Any]:
        """Without expert ids the kernel cannot count: the hosts exchange what their callers counted."""
        view = request.num_tokens_per_expert
        assert view is not None  # the request has it, or ids
        copy = self._heap.take(itemsize(view) * view.shape[0])
        self._inputs.copy(view, copy.pointer)
        counts = np.zeros(view.shape, arrays.np_dtype(view.dtype))
        self._fetch(copy.pointer, counts)
        everyone = self._group.allgather(counts, op="dispatch counts", timeout_s=self._timeout_s)
        num_local_experts = request.num_experts // self._group.size
        first = self._group.rank * num_local_experts
        total: NDArray[Any] = np.sum(everyone, axis=0)[first : first + num_local_experts]
        return total

    def _read_result(self, pointer: int) -> NDArray[Any]:
        if self._is_closed:
            raise ClosedError("the buffer is closed")
        result = empty_result()
        self._on_device(lambda: self._fetch(pointer, result))
        self._watch.check()
        return result

    def _fetch(self, pointer: int, array: NDArray[Any]) -> None:
        """Copy device memory to the host, after everything enqueued on the communication stream."""
        # The copy would wait inside the driver, where ranks of this process would wait for it too.
        self._comm.synchronize()
        with device_errors("reading from the device"):
            self._runtime.memcpyAsync(
                array.ctypes.data,
                pointer,
                array.nbytes,
                self._runtime.memcpyDeviceToHost,
                self._comm.pointer,
            )
        self._comm.synchronize()

    # Memory.

    def _take_all(self) -> Lease:
        """The largest free place: how many rows will come is not known yet."""
        self._offered_bytes = self._pool.largest_free()
        return self._take(self._offered_bytes, "a result")

    def _take(self, num_bytes: int, what: str) -> Lease:
        lease = self._pool.take(num_bytes)
        if lease is None:
            stats = self._pool.stats
            needed = stats.num_bytes - stats.largest_free_bytes + num_bytes
            raise ConfigError(
                f"no room for {what}: num_nvl_bytes is {stats.num_bytes} and must be at least {needed}, with "
                "the arrays held now"
            )
        return lease

    def _address(self, lease: Lease) -> int:
        return self._slab.pointers[self._group.rank] + PAYLOAD_OFFSET + lease.offset

    def _as_array(self, pointer: int, shape: Sequence[int], dtype: str, framework: str, owner: object) -> Any:
        # CuPy's and torch's streams wait already; JAX's is known only on import.
        return arrays.cuda_to_framework(
            pointer,
            shape,
            dtype,
            device=self.place.device,
            framework=framework,
            owner=owner,
            stream=self._comm.pointer if framework == "jax" else None,
        )

    # Setting up.

    def _load(self) -> None:
        self._operations = Operations(
            hang=self._watch.record_pointer,
            slabs=self._slab.pointers,
            rank=self._group.rank,
            num_ranks=self._group.size,
            timeout_ns=timeout_ns(self._timeout_s),
            max_blocks=plan.num_blocks(
                min(self._num_device_sms, MAX_BLOCKS),
                num_device_sms=self._num_device_sms,
                num_sharing=self._num_sharing,
            ),
        )

    def _together(self, what: str, step: Callable[[], None]) -> None:
        """Do a local step; if it fails on any rank, close the slab and raise on all."""
        error: EpError | None = None
        try:
            step()
        except EpError as failure:
            error = failure
        failures = self._group.allgather(error and str(error), op=what, timeout_s=self._timeout_s)
        failed = next((rank for rank, text in enumerate(failures) if text is not None), None)
        if failed is not None:
            self._slab.close(timeout_s=self._timeout_s)
            if error is not None:
                raise on_all_ranks(error)
            raise on_all_ranks(BackendError(f"rank {failed}: {failures[failed]}"))

    def _num_blocks(self, schedule: Schedule) -> int:
        return plan.num_blocks(
            schedule.num_sms, num_device_sms=self._num_device_sms, num_sharing=self._num_sharing
        )

    def _check_experts(self, num_experts: int) -> None:
        if num_experts and local_experts(num_experts, self._group.size) > MAX_LOCAL_EXPERTS:
            raise ConfigError(
                f"num_experts={num_experts} on {self._group.size} ranks; at most {MAX_LOCAL_EXPERTS} on each"
            )

    def _own_handle(self, handle: DispatchHandle | None) -> CudaDispatchHandle | None:
        assert handle is None or isinstance(handle, CudaDispatchHandle)  # its owner is this buffer
        return handle

    def _on_device(self, call: Callable[[], T]) -> T:
        """Run with this engine's device current."""
        before = self._runtime.getDevice()
        if before == self.device:
            return call()
        self._runtime.setDevice(self.device)
        try:
            return call()
        finally:
            self._runtime.setDevice(before)

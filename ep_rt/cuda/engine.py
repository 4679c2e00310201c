"""The calls of one rank on GPUs, and how their parts are made.

A call checks, takes memory, and enqueues one kernel behind what it depends on. Rows land where the result
lies, and what a result leaves is given back when its arrays are gone.

Capture    with `num_worst_tokens` or a handle a dispatch may be captured in a CUDA graph, and every combine.
           A replay uses the memory of the capture: whoever replays keeps the arrays and handles of the
           capture, and what else the graph needs lives as long as those. Replays and other calls are kept in
           order by their streams, not by this engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import ArrayView
from ..cuda_arrays import Column, ResultArrays, current_stream
from ..errors import EpError
from ..exchange import Group
from ..handle import DispatchHandle, FlatLayout, FlatShape
from ..network_options import NetworkOptions
from ..node_group import NodeGroup
from ..requests import CombineRequest, DispatchRequest, LayoutRequest, Schedule
from ..results import Combined, Dispatched, DispatchLayout
from ..topology import Topology
from . import flat, jit, kernels
from .combine import Combine
from .dispatch import Dispatch
from .dispatch_layout import DispatchLayouts
from .domain import Domain, together
from .expert_major import ExpertMajor
from .handle import CudaDispatchHandle
from .hang import LOW_LATENCY_OPERATIONS, Names, timeout_ns
from .heap import Block
from .inputs import Inputs
from .launch import current_architecture
from .layout import WORKSPACE, field_offset
from .low_latency import CudaLowLatency
from .low_latency_calls import LowLatencyKernels
from .low_latency_places import Places, SlabPlaces
from .memory import device_errors
from .operations import Operations
from .pool import Lease, PoolStats
from .remote import Remote, RemoteSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaStats:
    """What a buffer did so far.

    Attributes:
        slab: its communication memory.
        num_copied_inputs: arrays that were not contiguous, or not aligned.
        num_staged_inputs: inputs of combine that were copied into the slab, because they lay elsewhere.
        num_copied_results: results of dispatch that were copied out of the slab, to leave room there.
        num_arrays_elsewhere: arrays of `Buffer.empty` that found no room in the slab.
        num_low_latency_dispatches, num_low_latency_combines: calls, however often a graph replays them.
        network_bytes_by_node: over several nodes, what this rank's kernels sent to each since construction or
            `reset`: rows in normal mode with what belongs to them, in records padded as `plan.Parts` says.
        nvlink_bytes: with `counts_bytes`, what dispatches of the normal mode stored to other ranks of the
            node, and combines loaded from them, since then; else None.
    """

    slab: PoolStats
    num_dispatches: int
    num_combines: int
    num_copied_inputs: int
    num_staged_inputs: int
    num_copied_results: int
    num_arrays_elsewhere: int
    num_low_latency_dispatches: int = 0
    num_low_latency_combines: int = 0
    network_bytes_by_node: tuple[int, ...] = ()
    nvlink_bytes: int | None = None

    @property
    def network_bytes(self) -> int:
        """To all nodes."""
        return sum(self.network_bytes_by_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The device memory that a buffer holds, in bytes. As text it is a short table.

    Attributes:
        slab: the payload of the slab: results, and inputs on their way.
        symmetric: of NVSHMEM, for what goes over the network: rings of the normal mode, low-latency calls.
        low_latency: of the slab, or of that, what low-latency calls land in.
        control: words in the slab besides.
        local: what only this rank touches: handles, results of combine, copies. `local_used` of them in use.
    """

    slab: PoolStats
    symmetric_bytes: int
    low_latency_bytes: int
    control_bytes: int
    local_bytes: int
    local_used_bytes: int

    def __str__(self) -> str:
        slab = self.slab
        lines = {
            "slab": slab.num_bytes,
            "  in use": slab.used_bytes,
            "  most in use so far": slab.most_used_bytes,
            "  largest free piece": slab.largest_free_bytes,
            "symmetric memory": self.symmetric_bytes,
            "for low-latency calls, of both": self.low_latency_bytes,
            "control words": self.control_bytes,
            "memory of this rank alone": self.local_bytes,
            "  in use ": self.local_used_bytes,
        }
        return "\n".join(f"{name:<28}{num_bytes / 2**20:>12.1f} MiB" for name, num_bytes in lines.items())


class CudaEngine:
    """Dispatch and combine by kernels. A call returns when its work is enqueued.

    Args: see `Domain`; for `enable_shrink` and `label`, `CudaLowLatency`; for `counts_bytes`, `Operations`.
        remote: sizes for calls over several nodes, and for low-latency calls over the network.
        network: settings for those.
        with_low_latency: load the kernels of the low-latency calls.
        with_nvlink_low_latency: else they go over the network on one node, too, and to all ranks.

    Attributes:
        place: the device that is current at construction.
        low_latency: its low-latency calls; None if they were not asked for.

    Raises:
        TopologyError: nodes that are not served, see `Domain` and `Remote`.
        ConfigError, DeviceError, CompileError, BackendError: on every rank.

    Collective.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        *,
        owner: object,
        num_bytes: int,
        spare_bytes: int,
        timeout_s: float,
        remote: RemoteSizes,
        network: NetworkOptions | None = None,
        with_low_latency: bool = False,
        with_nvlink_low_latency: bool = True,
        enable_shrink: bool = False,
        num_low_latency_sms: int | None = None,
        counts_bytes: bool = False,
        label: str = "",
    ) -> None:
        self._topology = topology
        self._counts_bytes = counts_bytes
        is_internode = topology.num_nodes > 1
        is_low_latency_remote = with_low_latency and (is_internode or not with_nvlink_low_latency)
        if is_internode:
            Remote.check(topology, with_low_latency=with_low_latency)
        domain = Domain(
            NodeGroup(group, topology.local_ranks) if is_internode else group,
            num_bytes=num_bytes,
            spare_bytes=spare_bytes,
            timeout_s=timeout_s,
            names=Names(topology.local_ranks, topology.num_ranks),
        )
        self._group = group
        self._domain = domain
        self._owner = owner
        self.place = domain.place
        self._remote: Remote | None = None
        places: Places = SlabPlaces(domain)
        try:
            self._operations, self._expert_major, low_latency = together(
                group,
                "kernels",
                lambda: self._load(with_low_latency and not is_low_latency_remote, num_low_latency_sms),
                timeout_s=timeout_s,
            )
            if is_internode or is_low_latency_remote:
                self._remote = Remote(
                    group,
                    topology,
                    domain,
                    self._operations,
                    remote,
                    network,
                    with_low_latency=is_low_latency_remote,
                    with_stores=with_nvlink_low_latency,
                )
                low_latency, places = self._remote.low_latency, self._remote.places or places
                domain.watch.farewells = self._farewells
        except EpError as error:
            if error.is_collective:
                domain.close()
            raise
        self._inputs = Inputs(domain, self._operations)
        self._internode = None if self._remote is None else self._remote.internode
        parts = domain, self._operations, self._expert_major, self._inputs
        self._layouts = DispatchLayouts(domain, self._operations, self._inputs, topology)
        self._dispatch = Dispatch(*parts, owner=owner, group=group, internode=self._internode)
        self._combine = Combine(*parts, owner=owner, internode=self._internode)
        self._num_elsewhere = 0
        # JAX does not know who reads its memory: parts are held until JAX has waited for the next call.
        self._kept_parts: deque[Sequence[ArrayView]] = deque(maxlen=2)
        self.low_latency: CudaLowLatency | None = None
        if low_latency is not None:
            self.low_latency = CudaLowLatency(
                domain,
                low_latency,
                self._inputs,
                places,
                owner=owner,
                enable_shrink=enable_shrink,
                num_sms=num_low_latency_sms,
                label=label,
                close=self.close,
            )

    def _load(
        self, with_low_latency: bool, num_low_latency_sms: int | None
    ) -> tuple[Operations, ExpertMajor, LowLatencyKernels | None]:
        domain = self._domain
        if num_low_latency_sms is not None:
            domain.num_blocks(num_low_latency_sms)  # raises if there are fewer
        segmented = self._topology.num_nodes > 1
        specs_of = kernels.two_level_specs if segmented else kernels.normal_mode_specs
        specs = specs_of(counts=self._counts_bytes)
        if with_low_latency:
            specs += kernels.low_latency_specs()
        jit.prepare(specs, current_architecture())
        hang, max_blocks = domain.watch.record_pointer, domain.max_blocks
        deadline_ns = timeout_ns(domain.timeout_s)
        rank, slabs = domain.group.rank, domain.slab.pointers
        operations = Operations(
            hang=hang,
            slabs=slabs,
            rank=rank,
            num_ranks=domain.group.size,
            timeout_ns=deadline_ns,
            max_blocks=max_blocks,
            segmented=segmented,
            counts=self._counts_bytes,
        )
        return (
            operations,
            ExpertMajor(header=slabs[rank], hang=hang, timeout_ns=deadline_ns, max_blocks=max_blocks),
            LowLatencyKernels(operations, max_blocks=max_blocks) if with_low_latency else None,
        )

    # Life time.

    def close(self) -> None:
        """Collective. Arrays that are still held stay valid; handles do not."""
        absent, confirm = ((), None) if self.low_latency is None else self.low_latency.part()
        self._domain.close(confirm)
        self._dispatch.close()
        if self._remote is not None:
            self._remote.close(absent)

    def _farewells(self, operation: int) -> Sequence[int]:
        """See `HangWatch`."""
        part = self.low_latency if operation in LOW_LATENCY_OPERATIONS else self._internode
        return [] if part is None else part.farewells()

    def reset(self) -> None:
        """Start again after an error of the ranks. Collective; see `HangWatch.reset`."""
        domain = self._domain
        domain.on_device(domain.runtime.deviceSynchronize)
        domain.on_device(self._operations.workspace.reset)
        domain.on_device(self._expert_major.workspace.reset)
        also = [part.reset for part in (self.low_latency, self._internode) if part is not None]
        domain.watch.reset(self._group, timeout_s=domain.timeout_s, meanwhile=also)
        calls = self._group.allgather(self._dispatch.num_calls, op="reset calls", timeout_s=domain.timeout_s)
        self._dispatch.reset(max(calls))

    @property
    def stats(self) -> CudaStats:
        low_latency = (0, 0) if self.low_latency is None else self.low_latency.num_calls
        return CudaStats(
            num_low_latency_dispatches=low_latency[0],
            num_low_latency_combines=low_latency[1],
            slab=self._domain.pool.stats,
            num_dispatches=self._dispatch.num_calls,
            num_combines=self._combine.num_calls,
            num_copied_inputs=self._inputs.num_copied,
            num_staged_inputs=self._inputs.num_staged,
            num_copied_results=self._dispatch.num_copied_results,
            num_arrays_elsewhere=self._num_elsewhere,
            network_bytes_by_node=() if self._internode is None else self._internode.sent_bytes(),
            nvlink_bytes=self._nvlink_bytes() if self._counts_bytes else None,
        )

    def _nvlink_bytes(self) -> int:
        at = self._operations.workspace.pointer + field_offset(WORKSPACE, "peer_bytes")
        return int(self._domain.read(at, np.dtype("<u8"))[0])

    def memory_report(self) -> MemoryReport:
        """What memory is held now."""
        domain = self._domain
        return MemoryReport(
            slab=domain.pool.stats,
            symmetric_bytes=0 if self._remote is None else self._remote.num_bytes,
            low_latency_bytes=0 if self.low_latency is None else self.low_latency.num_bytes,
            control_bytes=domain.slab.num_bytes - domain.pool.num_bytes,
            local_bytes=domain.heap.num_bytes,
            local_used_bytes=domain.heap.used_bytes,
        )

    @property
    def comm_stream(self) -> Any:
        """As a CuPy stream, which other frameworks understand by ``__cuda_stream__``."""
        return self._domain.comm.stream

    def empty(self, shape: Sequence[int], dtype: str, framework: str) -> Any:
        """An uninitialised array, in the slab while it has room for that and for the next result."""
        domain = self._domain
        num_bytes = prod(shape) * arrays.np_dtype(dtype).itemsize
        place: Lease | Block | None = domain.pool.take(num_bytes, spare_bytes=domain.spare(0))
        if place is None:
            self._num_elsewhere += 1
            place = domain.on_device(domain.heap.take, num_bytes)
        # The memory may still be used by calls that are under way.
        streams = arrays.current_streams(domain.device, framework)
        domain.on_device(domain.let_wait, streams or (domain.comm.pointer,))
        pointer = domain.address(place) if isinstance(place, Lease) else place.pointer
        column = Column(dtype, tuple(shape[1:]))
        result = ResultArrays([column], device=domain.device, framework=framework)
        return result.over(pointer, num_bytes, place, [(0, shape[0])])[0]

    # Flat handles, see `Buffer`.

    def flat_layout(self, shape: FlatShape) -> FlatLayout:
        return flat.layout(shape, self._internode)

    def flatten_handle(self, handle: DispatchHandle, shape: FlatShape, framework: str) -> list[Any]:
        assert isinstance(handle, CudaDispatchHandle)
        return flat.flatten(handle, self.flat_layout(shape), self._domain, framework)

    def unflatten_handle(self, shape: FlatShape, parts: Sequence[Any]) -> CudaDispatchHandle:
        views = [arrays.view(part, name="handle", stream=self.place.stream) for part in parts]
        self._kept_parts.append(views)
        return flat.unflatten(shape, views, self._domain, self._internode, owner=self._owner)

    def deliver(self, results: Sequence[Any], targets: Sequence[ArrayView]) -> None:
        """Copy CuPy arrays to memory of others, on CuPy's current stream. Later calls come after that."""
        domain = self._domain
        stream = current_stream("cupy", domain.device)
        for result, target in zip(results, targets, strict=True):
            if result.nbytes:
                with device_errors("copying a result"):
                    domain.runtime.memcpyAsync(
                        target.pointer,
                        result.data.ptr,
                        result.nbytes,
                        domain.runtime.memcpyDeviceToDevice,
                        stream,
                    )
        domain.turns.end(stream)

    # Calls.

    def get_dispatch_layout(
        self,
        topk_idx: object,
        num_experts: int,
        build: Callable[[object, int], LayoutRequest],
        schedule: Schedule,
    ) -> DispatchLayout:
        return self._domain.on_device(self._layouts, topk_idx, num_experts, build, schedule)

    def dispatch(
        self,
        given: tuple[Any, ...],
        options: tuple[Any, ...],
        build: Callable[..., DispatchRequest],
        schedule: Schedule,
    ) -> Dispatched:
        return self._domain.on_device(self._dispatch, given, options, build, schedule)

    def combine(
        self, given: tuple[Any, ...], build: Callable[..., CombineRequest], schedule: Schedule
    ) -> Combined:
        return self._domain.on_device(self._combine, given, build, schedule)

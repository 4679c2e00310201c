"""Dispatches of one rank.

A result lies where the peers wrote it, in the slab. Where that would leave the slab without room for another
like it, the result is copied to memory of this rank alone, and its place in the slab is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

from ..errors import ConfigError
from ..exchange import Group
from ..requests import DispatchRequest, Schedule
from ..results import Dispatched, named
from . import plan
from .digest import along
from .dispatch_plans import DispatchPlans, Plan, result_places
from .domain import Call, Domain
from .expansion import Landed
from .expert_major import ExpertMajor
from .handle import (
    NUM_RECV_TOKENS_OFFSET,
    RESULT_OFFSET,
    SEND_PLAN_OFFSET,
    SEND_ROW_OFFSET,
    CudaDispatchHandle,
    LazyCounts,
)
from .heap import Block
from .inputs import ROW_ALIGN_BYTES, Inputs
from .internode import Crossing, Internode
from .layout import MAX_LOCAL_RANKS
from .memory import device_errors
from .operations import Operations
from .pool import Lease
from .told import HostResult

_MAX_ROWS: Final = 2**31 - 1


class Dispatch:
    """The dispatches of one rank.

    Args:
        owner: of the handles.
        group: the ranks of all nodes.
        internode: over several nodes.

    Attributes:
        num_calls: the number of the last one, the same on every rank.
        num_copied_results: results that were copied out of the slab.
    """

    def __init__(
        self,
        domain: Domain,
        operations: Operations,
        expert_major: ExpertMajor,
        inputs: Inputs,
        *,
        owner: object,
        group: Group,
        internode: Internode | None = None,
    ) -> None:
        self._domain = domain
        self._internode = internode
        self._inputs = inputs
        self._owner = owner
        self._plans = DispatchPlans(domain, operations, expert_major, owner=owner, internode=internode)
        self._told = HostResult(domain, inputs, group)
        self._scratch: list[Block] = []
        self._scratch_tokens = -1
        self.num_calls = 0
        self.num_copied_results = 0

    def close(self) -> None:
        """After the domain."""
        self._told.close()

    def reset(self, num_calls: int) -> None:
        """After `HangWatch.reset`; `num_calls` is the same on every rank."""
        self._told.reset()
        self.num_calls = num_calls

    def __call__(
        self,
        given: tuple[Any, ...],
        options: tuple[Hashable, ...],
        build: Callable[..., DispatchRequest],
        schedule: Schedule,
    ) -> Dispatched:
        """One dispatch. The device is current.

        Args:
            given, options: the caller's arguments; `build` makes a checked request of all of them.
        """
        found, pointers, objects, producers = self._plans.find(given, options, build, schedule.num_sms)
        return self._run(found, pointers, objects, producers, given[1], schedule)

    def _run(
        self,
        found: Plan,
        pointers: list[int],
        objects: Sequence[Any],
        producers: tuple[int, ...],
        handle: CudaDispatchHandle | None,
        schedule: Schedule,
    ) -> Dispatched:
        domain, kind = self._domain, found.kind
        domain.check()
        call = domain.begin(kind.frameworks, objects, schedule, producers)
        is_exact, num_rows = kind.is_exact, found.num_rows
        if is_exact and call.is_capturing:
            raise ConfigError(
                "the number of rows of this dispatch is not known to the host, so it cannot be captured in a "
                "CUDA graph: give num_worst_tokens, or a handle"
            )
        # How many rows will come is not known yet.
        lease = domain.pool.take_largest() if is_exact else self._take(found, call)
        capacity = min(_MAX_ROWS, kind.row.capacity(lease.num_bytes)) if is_exact else num_rows
        if handle is None:
            routing = domain.heap.take(found.routing_bytes, is_capturing=call.is_capturing)
        else:
            routing = handle.routing
        scratch = self._scratch_for(found.num_listed, call)
        domain.order(call)

        x, sf, ids, weights, in_rank = pointers
        if not kind.is_readable or (x | sf | ids | weights | in_rank) % ROW_ALIGN_BYTES:
            num_tokens = found.num_tokens
            pointers = [
                self._inputs.readable(None if given is None else given.of_rows(num_tokens), pointer, call)
                for given, pointer in zip(kind.inputs, pointers, strict=True)
            ]
        number = self.num_calls + 1
        digest = kind.digest if handle is None else along(kind.digest, handle.call)
        crossing = None if handle is None else handle.crossing
        base, send_token = routing.pointer, scratch.pointer
        if kind.bringing is not None:
            crossing = self._bring(found, crossing, pointers, call, digest)
        kind.set_pointers(
            self._told.pointer if is_exact else base + RESULT_OFFSET,
            *pointers,
            base + SEND_ROW_OFFSET,
            base + SEND_PLAN_OFFSET,
            send_token + 4 * MAX_LOCAL_RANKS * found.num_listed,
            send_token,
        )
        kind.set_call(number, digest, domain.offset(lease), capacity)
        kind.launch.args.num_tokens = found.num_listed
        kind.launch(call.stream, kind.num_blocks)
        self.num_calls = number
        if crossing is None:
            call.keep_with(lease, routing)
        else:
            call.keep_with(lease, routing, crossing.block)
        counts: Sequence[int] = []
        if is_exact:
            domain.launched(call)
            num_rows, counts = self._told.wait(
                number,
                kind.row,
                lease,
                num_local_experts=kind.num_local_experts,
                counted=kind.counted,
            )
            counts = plan.aligned(counts, kind.expert_alignment)
        if kind.expansion is None:
            results, num_recv_rows = self._as_it_landed(found, call, lease, capacity, num_rows), num_rows
            places = psum = None
        else:
            known = is_exact or (handle is not None and handle.known_recv_tokens is not None)
            landed = Landed(lease, capacity, num_rows, 0 if known else base + NUM_RECV_TOKENS_OFFSET)
            made = kind.expansion.run(call, landed, counts if is_exact else None, handle)
            results, num_recv_rows, places, psum = made
        event = domain.finish(call)
        if handle is None:
            shape, landed_shape = found.shape, found.landed
            if is_exact:
                shape, landed_shape = kind.shapes(found.num_tokens, num_recv_rows, num_rows)
            elif kind.num_topk:
                counts = LazyCounts(domain.read, routing, landed_shape)
            known_tokens = num_rows if is_exact else None
            # By position: names take longer than everything else here.
            handle = CudaDispatchHandle(
                self._owner,
                shape,
                counts,
                psum,
                landed_shape,
                number,
                routing,
                known_tokens,
                domain,
                kind.frameworks[0],
                places,
                crossing,
            )
        recv_x, recv_sf, recv_ids, recv_weights = results
        if recv_sf is not None:
            recv_x = recv_x, recv_sf
        counts = handle.num_recv_tokens_per_expert_list
        return named(Dispatched, (recv_x, recv_ids, recv_weights, counts, handle, event))

    def _bring(
        self, found: Plan, crossing: Crossing | None, pointers: Sequence[int], call: Call, digest: int
    ) -> Crossing:
        """Enqueue what brings tokens over the network, before they are dispatched within the node."""
        internode, kind = self._internode, found.kind
        bringing = kind.bringing
        assert internode is not None
        assert bringing is not None
        brought = internode.bring(
            bringing,
            crossing,
            pointers,
            call,
            num_tokens=found.num_tokens,
            num_sms=kind.num_sms,
            digest=digest,
        )
        kind.set_landed(
            brought.crossing.segments,
            *brought.landed[:4],
            internode.order,
            brought.node_masks,
            brought.landed[4],
            bringing.parts.num_bytes[4],
            internode.node * bringing.num_node_experts,
            bringing.parts.ahead_bytes > 0,
            brought.num_blocks,
        )
        return brought.crossing

    def _as_it_landed(self, found: Plan, call: Call, lease: Lease, capacity: int, num_rows: int) -> list[Any]:
        """The result where the peers wrote it, or a copy where it must leave room for the next."""
        domain, kind = self._domain, found.kind
        base, row = domain.address(lease), kind.row
        if not kind.is_exact and not lease.must_be_left:
            return found.make(base, found.num_bytes, lease)
        here = row.layout(capacity)
        if kind.is_exact:
            num_bytes = here.x + num_rows * row.row_bytes
            largest_free = domain.pool.trim(lease, num_bytes)
            if largest_free >= domain.spare(row.num_bytes(num_rows) * kind.spare_factor):
                return kind.arrays.over(base, num_bytes, lease, result_places(here, num_rows))
        there = row.layout(num_rows)
        block = domain.heap.take(there.end)
        runtime = domain.runtime
        for source, target, each in (
            (here.topk_idx, there.topk_idx, row.idx_bytes),
            (here.topk_weights, there.topk_weights, row.weights_bytes),
            (here.sf, there.sf, row.sf_bytes),
            (here.x, there.x, row.row_bytes),
        ):
            if num_rows * each:
                with device_errors("copying a result"):
                    runtime.memcpyAsync(
                        block.pointer + target,
                        base + source,
                        num_rows * each,
                        runtime.memcpyDeviceToDevice,
                        call.stream,
                    )
        self.num_copied_results += 1
        return kind.arrays.over(block.pointer, there.end, block, result_places(there, num_rows))

    # Memory.

    def _take(self, found: Plan, call: Call) -> Lease:
        domain, num_bytes = self._domain, found.num_bytes
        lease = domain.pool.take(num_bytes, domain.spare(found.spare_bytes))
        if lease is None:
            what, kind = f"{found.num_rows} received rows", found.kind
            if kind.layout == "expert" and kind.num_worst_tokens and kind.num_max_tokens_per_rank is None:
                what += " (num_max_tokens_per_rank= would say how many can come)"
            lease = domain.take(num_bytes, what)
            # A graph's replays write there again, so nobody else can have it.
            lease.must_be_left = not call.is_capturing
        return lease

    def _scratch_for(self, num_tokens: int, call: Call) -> Block:
        """Memory of the kernel alone. Earlier, smaller ones are kept: graphs may hold them."""
        if num_tokens > self._scratch_tokens:
            self._scratch_tokens = max(1024, num_tokens + num_tokens // 4)
            num_bytes = plan.scratch_bytes(self._scratch_tokens)
            self._scratch.append(self._domain.heap.take(num_bytes, is_capturing=call.is_capturing))
        return self._scratch[-1]

"""Dispatch on one rank: what a call needs, worked out once per shape, and the calls themselves.

A result lies where the peers wrote it, in the slab. Where that would leave the slab without room for another
like it, the result is copied to memory of this rank alone, and its place in the slab is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from .. import arrays
from ..arrays import ArrayView
from ..cuda_arrays import Column, Fact, ResultArrays, glance, lasting_facts, without_lengths
from ..errors import ConfigError
from ..exchange import Group
from ..handle import HandleShape
from ..requests import FP8_BLOCK, DispatchRequest, Schedule, local_experts
from ..results import Dispatched, named
from . import plan
from .digest import along, dispatch_digest
from .domain import Call, Domain
from .expansion import Expansion, Landed
from .expert_major import ExpertMajor, check_columns
from .handle import (
    NUM_RECV_TOKENS_OFFSET,
    RESULT_OFFSET,
    SEND_PLAN_OFFSET,
    SEND_ROW_OFFSET,
    CudaDispatchHandle,
    CudaHandleShape,
    LazyCounts,
    routing_bytes,
)
from .heap import Block
from .inputs import ROW_ALIGN_BYTES, Input, Inputs, itemsize
from .internode import Bringing, Crossing, Internode
from .launch import Launch
from .layout import MAX_LOCAL_EXPERTS, MAX_LOCAL_RANKS, ReceivedRow, ReceiveLayout
from .memory import device_errors
from .operations import Operations
from .plans import Plans, seen
from .pool import Lease
from .told import HostResult

_MAX_ROWS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Dispatches that differ in the number of tokens at most: what holds for every call of them.

    Attributes:
        set_pointers, set_call, set_landed: assign to the arguments of the launch.
        inputs: what x, sf, ids, weights and is_token_in_rank are like; None where absent.
        counted: the caller's counts by expert, where there are no ids.
        is_readable: they need no copy where their addresses are aligned.
        frameworks: of the inputs, that of x first.
        row: bytes of a received row on the wire.
        is_exact: only the counts will tell how many rows come.
        num_worst_tokens: 0 with a handle, too.
        spare_factor: how much more than a result may come next: experts' outputs, with wider elements.
        arrays: recv_x, recv_sf, ids and weights.
        expansion: for layout "expert".
        bringing: over several nodes, the way of tokens to other ones.
    """

    launch: Launch
    set_pointers: Callable[..., None]
    set_call: Callable[..., None]
    set_landed: Callable[..., None]
    inputs: tuple[Input | None, ...]
    counted: ArrayView | None
    is_readable: bool
    frameworks: tuple[str, ...]
    num_blocks: int
    num_sms: int
    num_topk: int
    layout: str
    num_ranks: int
    num_local_experts: int
    expert_alignment: int
    row: ReceivedRow
    is_exact: bool
    num_worst_tokens: int
    spare_factor: int
    arrays: ResultArrays
    digest: int
    expansion: Expansion | None
    bringing: Bringing | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A dispatch of certain shapes.

    Attributes:
        num_listed: tokens that the kernel dispatches, at most: those of x, and over several nodes others.
        routing_bytes: of the block that a new dispatch leaves.
        num_rows, num_bytes: of what lands; 0 if only the counts will tell.
        spare_bytes: for what may come after a result of `num_rows`, also if only the counts will tell.
        shape, landed: of the handle, if that many rows come.
        make: makes the arrays of a result of `num_rows`.
    """

    kind: _Kind
    num_tokens: int
    num_listed: int
    routing_bytes: int
    num_rows: int
    num_bytes: int
    spare_bytes: int
    shape: HandleShape
    landed: CudaHandleShape
    make: Callable[[int, int, object], list[Any]]


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
        self._operations = operations
        self._expert_major = expert_major
        self._inputs = inputs
        self._owner = owner
        self._plans: Plans[_Plan] = Plans()
        self._kinds: Plans[_Kind] = Plans()
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
        x, handle, in_rank, per_expert, ids, weights = given
        x, sf = x if type(x) is tuple and len(x) == 2 else (x, None)
        objects: Sequence[Any] = (x, sf, ids, weights, in_rank)
        is_plannable = per_expert is None and (
            handle is None or (type(handle) is CudaDispatchHandle and handle.owner is self._owner)
        )
        # What decides everything but addresses. None where the arguments must be looked at each time.
        key: Hashable = None
        kind_key: Hashable = None
        found = None
        if is_plannable and (glanced := glance(objects)) is not None:
            facts, pointers = glanced
            key = (facts, options, schedule.num_sms, None if handle is None else handle.facts)
            found = self._plans.find(key)
            if found is None and (left := _without_lengths(facts, options, handle)) is not None:
                kind_key = self._kind_key(left, options, schedule, handle)
                kind = self._kinds.find(kind_key)
                if kind is not None:
                    found = self._plans.keep(key, self._sized(kind, x.shape[0], handle))
        if found is None:
            request = build(*given, *options)
            views = request.x, request.sf, request.topk_idx, request.topk_weights, request.is_token_in_rank
            pointers, objects = seen(*views)
            if kind_key is None and is_plannable:
                kind_key = self._kind_key(lasting_facts(views), options, schedule, handle)
            kind = self._kinds.find(kind_key)
            if kind is None:
                kind = self._kinds.keep(kind_key, self._prepare(request, schedule.num_sms))
            found = self._plans.keep(key, self._sized(kind, request.x.shape[0], handle))
        return self._run(found, pointers, objects, handle, schedule)

    def _kind_key(
        self,
        left: Hashable,
        options: tuple[Hashable, ...],
        schedule: Schedule,
        handle: CudaDispatchHandle | None,
    ) -> Hashable:
        return left, options, schedule.num_sms, None if handle is None else handle.lasting_facts

    def _prepare(self, request: DispatchRequest, num_sms: int) -> _Kind:
        domain = self._domain
        x, ids, weights, sf = request.x, request.topk_idx, request.topk_weights, request.sf
        internode = self._internode
        num_nodes = 1 if internode is None else internode.num_nodes
        num_ranks = num_nodes * domain.group.size
        num_local_experts = local_experts(request.num_experts, num_ranks) if request.num_experts else 0
        if num_local_experts > MAX_LOCAL_EXPERTS:
            raise ConfigError(
                f"num_experts={request.num_experts} on {num_ranks} ranks; at most {MAX_LOCAL_EXPERTS} on each"
            )
        hidden = x.shape[1]
        columns = [
            None if view is None else Column(view.dtype, view.shape[1:]) for view in (x, sf, ids, weights)
        ]
        if request.quantize is not None:
            columns[:2] = Column("float8_e4m3fn", (hidden,)), Column("float32", (hidden // FP8_BLOCK,))
        num_bytes = [
            0 if column is None else arrays.np_dtype(column[0]).itemsize * prod(column[1])
            for column in columns
        ]
        row = ReceivedRow(
            row_bytes=num_bytes[0], sf_bytes=num_bytes[1], idx_bytes=num_bytes[2], weights_bytes=num_bytes[3]
        )
        # With expert ids, the destinations are those of the ids.
        views = (x, sf, ids, weights, request.is_token_in_rank if ids is None else None)
        inputs = tuple(None if view is None else Input.of(view) for view in views)
        frameworks = tuple(dict.fromkeys(view.framework for view in views if view is not None))
        num_topk = 0 if ids is None else ids.shape[1]
        handle = request.handle
        assert handle is None or isinstance(handle, CudaDispatchHandle)  # its owner is this buffer
        is_cached = handle is not None
        bringing = None
        if internode is not None:
            bringing = internode.bringing(
                (x, sf, ids, weights), num_experts=request.num_experts, is_cached=is_cached
            )
        num_worst_tokens = 0 if is_cached else request.num_worst_tokens
        results = domain.results(columns, frameworks[0])
        spare_factor = 2 if row.row_bytes == hidden else 1
        launch = self._operations.dispatch(
            quantizes=request.quantize is not None,
            num_topk=num_topk,
            num_experts=request.num_experts // num_nodes,
            row_bytes=row.row_bytes,
            sf_row_bytes=row.sf_bytes,
            idx_bytes=0 if ids is None else itemsize(ids),
            is_cached=is_cached,
            fill_rows=num_worst_tokens,
            max_redundant_tokens=plan.MAX_REDUNDANT_TOKENS,
        )
        return _Kind(
            launch=launch,
            set_pointers=launch.setter(
                "result",
                *("x", "sf", "topk_idx", "topk_weights", "is_token_in_rank"),
                *("send_row", "send_plan"),
                *("masks", "send_token"),
            ),
            set_call=launch.setter("call", "digest", "recv_offset", "recv_capacity"),
            set_landed=launch.setter(
                "segments",
                *("landed_x", "landed_sf", "landed_topk_idx", "landed_topk_weights", "order"),
                *("node_masks", "landed_node_masks", "node_masks_bytes"),
                *("first_expert", "waits_for_announced", "num_exchange_blocks"),
            ),
            inputs=inputs,
            counted=request.num_tokens_per_expert if num_topk == 0 else None,
            is_readable=all(
                given is None or (given.is_contiguous and not given.is_empty) for given in inputs
            ),
            frameworks=frameworks,
            num_blocks=domain.num_blocks(num_sms),
            num_sms=num_sms,
            num_topk=num_topk,
            layout=request.layout,
            num_ranks=num_ranks,
            num_local_experts=num_local_experts,
            expert_alignment=request.expert_alignment,
            row=row,
            is_exact=not is_cached and num_worst_tokens == 0,
            num_worst_tokens=num_worst_tokens,
            spare_factor=spare_factor,
            arrays=results,
            digest=dispatch_digest(request),
            expansion=self._expansion(request, row, columns, num_local_experts, num_sms),
            bringing=bringing,
        )

    def _sized(self, kind: _Kind, num_tokens: int, handle: CudaDispatchHandle | None) -> _Plan:
        """The plan for so many tokens.

        Raises:
            ConfigError: more than any rank may have over several nodes.
        """
        internode, row = self._internode, kind.row
        num_listed = num_tokens if internode is None else internode.list_capacity(num_tokens)
        num_rows = kind.num_worst_tokens if handle is None else handle.landed.num_landed_rows
        at = row.layout(num_rows)
        return _Plan(
            kind,
            num_tokens,
            num_listed,
            routing_bytes(num_listed),
            num_rows,
            at.end if num_rows else 0,
            row.num_bytes(num_rows) * kind.spare_factor,
            HandleShape(num_tokens, kind.num_topk, num_rows, kind.layout),
            CudaHandleShape(kind.num_ranks, kind.num_local_experts, kind.expert_alignment, num_rows),
            kind.arrays.placed(_places(at, num_rows)),
        )

    def _expansion(
        self,
        request: DispatchRequest,
        row: ReceivedRow,
        columns: Sequence[Column | None],
        num_local_experts: int,
        num_sms: int,
    ) -> Expansion | None:
        if request.layout != "expert":
            return None
        x, ids, handle = columns[0], request.topk_idx, request.handle
        assert x is not None
        assert handle is None or isinstance(handle, CudaDispatchHandle)
        num_topk = handle.num_topk if handle is not None else columns[2].shape[0] if columns[2] else 0
        check_columns(num_topk)
        framework = request.x.framework
        return Expansion(
            self._domain,
            self._expert_major,
            row=row,
            x=x,
            sf=columns[1],
            num_topk=num_topk,
            num_local_experts=num_local_experts if handle is None else handle.landed.num_local_experts,
            alignment=request.expert_alignment if handle is None else handle.landed.expert_alignment,
            num_out_rows=request.num_worst_tokens,
            zero_padding=request.zero_padding,
            is_cached=handle is not None,
            idx_bytes=0 if ids is None else itemsize(ids),
            frameworks=(framework, framework if ids is None else ids.framework),
            num_blocks=plan.num_local_blocks(
                self._domain.num_blocks(num_sms), max_blocks=self._domain.max_blocks
            ),
        )

    def _run(
        self,
        found: _Plan,
        pointers: list[int],
        objects: Sequence[Any],
        handle: CudaDispatchHandle | None,
        schedule: Schedule,
    ) -> Dispatched:
        domain, kind = self._domain, found.kind
        domain.check()
        call = domain.begin(kind.frameworks, objects, schedule)
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
            shape, landed_shape, read = found.shape, found.landed, domain.read
            if is_exact:
                shape = HandleShape(found.num_tokens, kind.num_topk, num_recv_rows, kind.layout)
                landed_shape = CudaHandleShape(
                    kind.num_ranks, kind.num_local_experts, kind.expert_alignment, num_rows
                )
            elif kind.num_topk:
                counts = LazyCounts(read, routing, landed_shape)
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
                read,
                places,
                crossing,
            )
        recv_x, recv_sf, recv_ids, recv_weights = results
        if recv_sf is not None:
            recv_x = recv_x, recv_sf
        counts = handle.num_recv_tokens_per_expert_list
        return named(Dispatched, (recv_x, recv_ids, recv_weights, counts, handle, event))

    def _bring(
        self, found: _Plan, crossing: Crossing | None, pointers: Sequence[int], call: Call, digest: int
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

    def _as_it_landed(
        self, found: _Plan, call: Call, lease: Lease, capacity: int, num_rows: int
    ) -> list[Any]:
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
                return kind.arrays.over(base, num_bytes, lease, _places(here, num_rows))
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
        return kind.arrays.over(block.pointer, there.end, block, _places(there, num_rows))

    # Memory.

    def _take(self, found: _Plan, call: Call) -> Lease:
        domain, num_bytes = self._domain, found.num_bytes
        lease = domain.pool.take(num_bytes, domain.spare(found.spare_bytes))
        if lease is None:
            lease = domain.take(num_bytes, f"{found.num_rows} received rows")
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


def _without_lengths(
    facts: Sequence[Fact | None], options: tuple[Hashable, ...], handle: CudaDispatchHandle | None
) -> Hashable:
    """What is left of facts where there may be any number of tokens. None where the numbers of arrays and
    handle do not go together, so that the arguments must be looked at."""
    split = without_lengths(facts)
    if split is None:
        return None
    left, lengths = split
    num_tokens = lengths[0]
    if handle is not None:
        num_tokens, num_worst_tokens = handle.num_tokens, options[1]
        if num_worst_tokens and num_worst_tokens != handle.num_recv_rows:
            return None
    return left if all(length is None or length == num_tokens for length in lengths) else None


def _places(at: ReceiveLayout, num_rows: int) -> tuple[tuple[int, int], ...]:
    """Of x, scale factors, ids and weights."""
    return (at.x, num_rows), (at.sf, num_rows), (at.topk_idx, num_rows), (at.topk_weights, num_rows)

"""Whole dispatches and combines over several nodes, and the oracle of all ranks.

The network's part is enqueued by the product's host side, the part within a node as it would be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from ep_rt import arrays, reference
from ep_rt.arrays import ArrayView
from ep_rt.cuda import flat, kernels, launch
from ep_rt.cuda.handle import (
    RESULT_OFFSET,
    SEND_PLAN_OFFSET,
    SEND_ROW_OFFSET,
    CudaDispatchHandle,
    routing_bytes,
)
from ep_rt.cuda.internode import Crossing, Internode
from ep_rt.cuda.layout import (
    HANG_RECORD,
    MAX_LOCAL_RANKS,
    NETWORK_AREA,
    NETWORK_STATE,
    OFFSET_UNIT,
    PAYLOAD_OFFSET,
    WORKSPACE,
    ReceivedRow,
    align_up,
)
from ep_rt.cuda.plan import Rings, scratch_bytes
from ep_rt.handle import FlatField, FlatShape, HandleShape
from ep_rt.planner import Flow, Routes

from .kernels import Kernels, bound
from .machine import Array, Conditions, EmulatedKernel, Machine, Memory
from .runtime import Kind

MAX_TOKENS = 16
NUM_BLOCKS = 2
PLACE_BYTES = 16 << 10
RINGS = Rings(num_channels=2, num_slots=2, slot_bytes=512)


class _Launch:
    """Stands for `launch.Launch`."""

    def __init__(self, machine: Machine, kernel: EmulatedKernel, args: Array, most: int) -> None:
        self._where = machine, kernel
        self._given, self._most = args, most
        self.args: Any = launch.fields_type(kernel.spec.args).from_address(args.ctypes.data)

    def __call__(self, stream: int, num_blocks: int | None = None) -> None:
        machine, kernel = self._where
        machine.launch(stream, kernel, self._given, min(num_blocks or self._most, self._most))


class _Beside:
    """A launch of the exchange, on a stream of its own: a dispatch, or a combine, runs beside it.

    Attributes:
        done: the event of its end.
    """

    def __init__(self, launch: _Launch, machine: Machine, rank: int, events: Iterator[int]) -> None:
        self._launch, self._machine, self._rank = launch, machine, rank
        self.args, self.ready, self.done = launch.args, next(events), next(events)

    def prepare(self, stream: int) -> None:
        """Before a combine that it runs beside."""
        self._machine.record(stream, self.ready)

    def __call__(self, stream: int, num_blocks: int | None = None) -> None:
        is_back = not self.args.lists
        if not is_back:
            self.prepare(stream)
        beside = len(self._machine.streams) // 2 + self._rank
        self._machine.wait(beside, self.ready)
        self._launch(beside, num_blocks)
        self._machine.record(beside, self.done)
        if is_back:
            self._machine.wait(stream, self.done)


class _Kernel:
    """Stands for `launch.Kernel`."""

    def __init__(self, machine: Machine, rank: int, kernel: EmulatedKernel, events: Iterator[int]) -> None:
        self._where = machine, rank, kernel, events
        self.spec = kernel.spec

    def bind(self, args: Array, *, num_blocks: int, starts_early: bool = False) -> _Launch | _Beside:
        machine, rank, kernel, events = self._where
        launch = _Launch(machine, kernel, args, num_blocks)
        if kernel.spec.function != "internode_exchange":
            return launch
        return _Beside(launch, machine, rank, events)


def _values(rng: np.random.Generator, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    values: Array = rng.standard_normal(shape).astype(dtype)
    return values


@dataclass(frozen=True, slots=True)
class Rows:
    """What all ranks send: as it is given, and as it is received."""

    given: tuple[list[Array], list[Array] | None]
    received: tuple[list[Array], list[Array] | None]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, counts: list[int], payload: str, element: DTypeLike, width: int
    ) -> Rows:
        """Of one of the payloads of `TwoLevel.layer`; `width` elements where they are moved."""
        if payload == "cast":
            x = [_values(rng, (count, 128), ml_dtypes.bfloat16) for count in counts]
            q, sf = zip(*map(reference.quantize_fp8, x), strict=True)
            return cls((x, None), (list(q), list(sf)))
        if payload == "scaled":
            num_scales = int(rng.integers(1, 6))
            x = [rng.integers(0, 256, (count, 16 * (width % 12 + 1)), np.uint8) for count in counts]
            moved = x, [rng.random((count, num_scales), np.float32) for count in counts]
            return cls(moved, moved)
        x = [_values(rng, (count, width), element) for count in counts]
        return cls((x, None), (x, None))

    def of(self, rank: int) -> tuple[Array, Array | None]:
        """What a rank is given."""
        x, sf = self.given
        return x[rank], None if sf is None else sf[rank]


@dataclass(frozen=True, slots=True)
class Given:
    """What a dispatch is given: rows, columns of ids and weights, and whether it is told of ranks instead."""

    rows: Rows
    num_topk: int
    by_ranks: bool


class TwoLevel:
    """Ranks of several nodes, with the memory that a buffer has.

    Args:
        is_virtual: stores reach the ranks of all nodes.
        element: what is summed.
    """

    def __init__(
        self,
        num_nodes: int,
        num_local_ranks: int,
        load: Kernels,
        *,
        is_virtual: bool = False,
        element: DTypeLike = np.float32,
    ) -> None:
        self.num_nodes, self.num_local = num_nodes, num_local_ranks
        self.ranks = range(num_nodes * num_local_ranks)
        self.element, self.counts = np.dtype(element), load.counts
        self.dispatches = [load.dispatch(quantizes=quantizes, segmented=True) for quantizes in (False, True)]
        self.combine = load.combine(self.element.name, segmented=True)
        network = [
            load.small(spec)
            for spec in (
                kernels.internode_layout(),
                kernels.internode_exchange(),
                kernels.internode_sum(self.element.name),
            )
        ]
        most_blocks = 2 * RINGS.num_channels
        domain = len(self.ranks) if is_virtual else num_local_ranks
        self.machine = machine = Machine(
            len(self.ranks),
            [*self.dispatches, self.combine, *network],
            # The second stream of each is for exchanges that run beside a dispatch.
            [(rank, most_blocks) for _ in range(2) for rank in self.ranks],
            ranks_per_node=domain,
            # Counts of ranks that are not there are copied, too.
            conditions=Conditions(checks_uninitialised=False),
        )

        def each(num_bytes: int, name: str, kind: Kind = Kind.OWN) -> list[Memory]:
            return [machine.allocate(rank, num_bytes, name, kind) for rank in self.ranks]

        self.slabs = each(PAYLOAD_OFFSET + 2 * PLACE_BYTES, "slab", Kind.SLAB)
        self.hangs = each(HANG_RECORD.itemsize, "hang record")
        self.workspaces = each(WORKSPACE.itemsize, "workspace")
        areas = each(NETWORK_AREA.itemsize, "network area", Kind.SYMMETRIC)
        outboxes, inboxes = (
            each(RINGS.num_bytes(num_nodes), name, Kind.SYMMETRIC) for name in ("outbox", "inbox")
        )
        self.states = each(NETWORK_STATE.itemsize, "network state")
        self.internodes = []
        events = count()
        for rank in self.ranks:
            made = object.__new__(Internode)
            made._domain = SimpleNamespace(  # type: ignore[assignment]
                heap=SimpleNamespace(
                    take=lambda num_bytes, is_capturing, rank=rank: SimpleNamespace(
                        pointer=machine.allocate(rank, num_bytes, "block of the heap").address
                    )
                ),
                max_blocks=NUM_BLOCKS,
                group=SimpleNamespace(rank=rank % num_local_ranks),
            )
            made.num_nodes, made.node, made.num_ranks = num_nodes, rank // num_local_ranks, len(self.ranks)
            made.max_tokens, made._rings = MAX_TOKENS, RINGS
            made.order, made.progress = (
                machine.allocate(rank, 8 * (num_nodes - 1) * MAX_TOKENS, name).address
                for name in ("order", "progress")
            )
            made._common = {
                **self.common(rank),
                "area": areas[rank].address,
                "state": self.states[rank].address,
                "node": made.node,
                "num_nodes": num_nodes,
            }
            made._rings_fields = {
                "outbox": outboxes[rank].address,
                "inbox": inboxes[rank].address,
                "num_channels": RINGS.num_channels,
                "num_slots": RINGS.num_slots,
                "slot_bytes": RINGS.slot_bytes,
            }
            layout, exchange, total = (_Kernel(machine, rank, kernel, events) for kernel in network)
            made._layout, made._exchange, made._sum = layout, exchange, {self.element.name: total}  # type: ignore[assignment, dict-item]
            self.internodes.append(made)
        self.num_calls = 0
        # What the planner says of the layers so far.
        self.network_bytes = np.zeros((len(self.ranks), num_nodes), np.int64)
        self.nvlink_bytes = np.zeros(len(self.ranks), np.int64)

    def common(self, rank: int) -> dict[str, Any]:
        """Fields of every kernel that knows its node."""
        first = rank // self.num_local * self.num_local
        return {
            "hang": self.hangs[rank].address,
            "workspace": self.workspaces[rank].address,
            "timeout_ns": self.machine.conditions.timeout_ns,
            "rank": rank - first,
            "num_ranks": self.num_local,
            "slabs": [slab.address for slab in self.slabs[first : first + self.num_local]],
        }

    def layer(
        self,
        rng: np.random.Generator,
        *,
        max_tokens: int,
        payload: str = "moved",
        by_ranks: bool = False,
        is_flat: bool = False,
    ) -> None:
        """Enqueue a dispatch, a repeated one, and a combine of rows, weights and biases, on all ranks.

        Args:
            by_ranks: the first dispatch is told to which ranks tokens go, and no ids.
            payload: "moved" rows of the element that is summed, or "scaled" bytes with scale factors; or
                "cast", of bfloat16 that travels within a node as FP8.
            is_flat: the second and the third have the handle of the first by copies of its bytes.
        """
        num_ranks = len(self.ranks)
        num_topk = int(rng.integers(1, 4))
        num_experts = num_ranks * int(rng.integers(1, 3))
        counts = [int(count) for count in rng.integers(0, max_tokens + 1, num_ranks)]
        width = 16 // self.element.itemsize * int(rng.integers(1, 12))
        first, second = (Rows.draw(rng, counts, payload, self.element, width) for _ in range(2))
        ids = [rng.integers(-2, num_experts + 2, (count, num_topk)) for count in counts]
        weights = None if by_ranks else [rng.random(each.shape, np.float32) for each in ids]
        valid = [np.where((each < 0) | (each >= num_experts), -1, each) for each in ids]
        x, sf = first.received
        sent = reference.dispatch(x, valid, num_experts=num_experts, topk_weights=weights, sf=sf)
        x, sf = second.received
        again = [
            replace(each, recv_x=rows, recv_sf=scales)
            for each, (rows, scales) in zip(sent, reference.dispatch_cached(x, sent, sf), strict=True)
        ]
        y = [_values(rng, (len(each.recv_x), width), self.element) for each in sent]
        given = [rng.random((len(each), num_topk), np.float32) for each in y]
        biases = [_values(rng, (count, width), self.element) for count in counts]
        combined = reference.combine(
            y,
            sent,
            num_tokens=counts,
            topk_weights=given,
            bias=biases,
            ranks_per_node=self.num_local,
        )
        self.num_calls += 3
        routes = Routes.of(ids, num_experts=num_experts, ranks_per_node=self.num_local)
        new = Given(first, 0 if by_ranks else num_topk, by_ranks)
        self._plan(routes, [new, Given(second, 0, False)], y, num_topk)
        in_rank = [
            reference.dispatch_layout(
                each, num_experts=num_experts, num_ranks=num_ranks
            ).is_token_in_rank.view(np.uint8)
            for each in valid
        ]
        for rank in self.ranks:
            routing: tuple[Array | None, ...] = None, None, in_rank[rank]
            if weights is not None:
                routing = ids[rank], weights[rank], None
            crossing, routed = self._dispatch(rank, first.of(rank), routing, num_experts, sent[rank], None)
            if is_flat:
                shape = FlatShape(
                    HandleShape(counts[rank], num_topk, len(sent[rank].recv_x), "rank"),
                    num_landed_rows=len(sent[rank].recv_x),
                    num_local_experts=num_experts // num_ranks,
                )
                crossing, routed = self._copied(rank, shape, crossing, routed, sent[rank])
            self._dispatch(rank, second.of(rank), (None, None, None), 0, again[rank], (crossing, routed))
            self._combine(rank, crossing, routed, (y[rank], given[rank], biases[rank]), combined[rank])

    def _copied(
        self,
        rank: int,
        shape: FlatShape,
        crossing: Crossing,
        routed: dict[str, int],
        sent: reference.Dispatched,
    ) -> tuple[Crossing, dict[str, int]]:
        """What later calls need of a dispatch, from copies of what it left, which is overwritten."""
        machine, internode = self.machine, self.internodes[rank]

        def read(address: int, struct: np.dtype[Any]) -> Array:
            raw = (ctypes.c_uint8 * struct.itemsize).from_address(address)
            return np.frombuffer(memoryview(raw), struct)

        domain: Any = SimpleNamespace(heap=SimpleNamespace(num_released=0), read=read)
        landed: Any = None
        routing: Any = SimpleNamespace(pointer=routed["send_plan"] - SEND_PLAN_OFFSET)
        handle = CudaDispatchHandle(
            None, shape.handle, (), None, landed, 0, routing, None, domain, "cupy", None, crossing
        )
        at, copies = flat.layout(shape, internode), []
        for block, num_bytes in zip(flat.memory(handle), at.num_bytes, strict=True):
            copy = machine.allocate(rank, num_bytes, "part of a flat handle")
            machine.copy(rank, copy.address, block.pointer, num_bytes)
            machine.copy(rank, block.pointer, self._put(rank, np.full(num_bytes, 0xA5, np.uint8)), num_bytes)
            copies.append(copy)
        views = [
            ArrayView((copy.num_bytes,), (1,), "uint8", "cuda:0", copy.address, "cupy", copy)
            for copy in copies
        ]
        again = flat.unflatten(shape, views, domain, internode, owner=None)

        def numbers(place: FlatField) -> list[int]:
            held = copies[place.array].array("<i4", (place.length,), offset=place.offset)
            found: list[int] = held.tolist()
            return found

        def check() -> str | None:
            by_rank = np.bincount(sent.src_rank, minlength=len(self.ranks)).tolist()
            is_right = (
                [again.num_recv_tokens] == numbers(at.num_recv_tokens) == [sent.num_recv_tokens]
                and numbers(at.num_needed_rows) == [again.num_needed_rows]
                and numbers(at.expert_counts) == sent.num_recv_tokens_per_expert
                and again.num_recv_tokens_per_expert_list == sent.num_recv_tokens_per_expert
                and again.num_recv_tokens_per_rank == by_rank
                and not again.overflow
            )
            return None if is_right else f"counts in the flat handle of rank {rank} are wrong"

        machine.checks.append(check)
        assert again.crossing is not None
        return again.crossing, {**routed, **_routing_fields(again.routing.pointer)}

    def _plan(self, routes: Routes, dispatches: list[Given], y: list[Array], num_topk: int) -> None:
        """Add what a layer must move to what the counters are compared with."""

        def row(x: Array, sf: Array | None, num_topk: int) -> ReceivedRow:
            return ReceivedRow(
                row_bytes=x.itemsize * x.shape[1],
                sf_bytes=0 if sf is None else sf.itemsize * sf.shape[1],
                idx_bytes=8 * num_topk,
                weights_bytes=4 * num_topk,
            )

        back = replace(row(y[0], None, num_topk), idx_bytes=0)
        for each in dispatches:
            x, sf = each.rows.received
            received = row(x[0], None if sf is None else sf[0], each.num_topk)
            given = row(*each.rows.of(0), each.num_topk)
            plan = routes.dispatch(received, given=given, by_ranks=each.by_ranks)
            self.nvlink_bytes += plan.nvlink.sent_bytes
            self._add_network(plan.network)
        plan = routes.combine(back)
        self.nvlink_bytes += plan.nvlink.received_bytes
        self._add_network(plan.network)

    def _add_network(self, flow: Flow) -> None:
        self.network_bytes += flow.sent_bytes_by_node(self.num_local)

    def compare_bytes(self) -> None:
        """In the end: what the kernels counted is what the planner says."""

        def check() -> str | None:
            for rank in self.ranks:
                sent = self.states[rank].array(NETWORK_STATE, (1,))["sent_bytes"][0, : self.num_nodes]
                if not np.array_equal(sent, self.network_bytes[rank]):
                    return f"rank {rank} counted {sent} bytes, not {self.network_bytes[rank]}"
                moved = self.workspaces[rank].array(WORKSPACE, (1,))["peer_bytes"][0]
                if moved != (self.nvlink_bytes[rank] if self.counts else 0):
                    return f"rank {rank} counted {moved} bytes over NVLink, not {self.nvlink_bytes[rank]}"
            return None

        self.machine.checks.append(check)

    def _combine(
        self,
        rank: int,
        crossing: Crossing,
        routed: dict[str, int],
        back: tuple[Array, Array, Array],
        combined: reference.Combined,
    ) -> None:
        machine, internode, (y, given, bias) = self.machine, self.internodes[rank], back
        call: Any = SimpleNamespace(stream=rank, is_capturing=False, temporaries=[])
        base = self.slabs[rank].address + PAYLOAD_OFFSET
        weights_at = align_up(y.nbytes, OFFSET_UNIT)
        assert weights_at + given.nbytes <= PLACE_BYTES
        for array, offset in ((y, 0), (given, weights_at)):
            if array.nbytes:
                machine.copy(rank, base + PLACE_BYTES + offset, self._put(rank, array), array.nbytes)
        returning = internode.returning(
            arrays.view(y, name="y"), arrays.view(given, name="weights"), element=self.element.name
        )
        places = internode.return_places(returning, len(bias))
        here = machine.allocate(rank, places.here[-1], "sums of this node").address
        y_offset = (PAYLOAD_OFFSET + PLACE_BYTES) // OFFSET_UNIT
        sums = here + places.here[0], here + places.here[1]
        exchange: Any = returning.exchange
        exchange.prepare(rank)
        machine.launch(
            rank,
            self.combine,
            bound(
                self.combine,
                {
                    "progress": internode.progress,
                    "out": sums[0],
                    "out_weights": sums[1],
                    "digest": 8,
                    "y_offset": y_offset,
                    "weights_offset": y_offset + weights_at // OFFSET_UNIT,
                    "num_pullers": NUM_BLOCKS,
                    "segments": crossing.segments,
                    "row_bytes": y.itemsize * y.shape[1],
                    "num_topk": given.shape[1],
                },
                routed,
                self.common(rank),
            ),
            NUM_BLOCKS,
        )
        assert combined.topk_weights is not None
        out = machine.allocate(rank, max(1, bias.nbytes), "combined x").address
        out_weights = machine.allocate(rank, max(1, combined.topk_weights.nbytes), "combined weights").address
        internode.take_back(
            returning,
            places,
            crossing,
            sums,
            machine.allocate(rank, places.returned[-1], "sums of other nodes").address,
            [self._put(rank, bias)],
            (out, out_weights),
            call,
            num_sms=NUM_BLOCKS,
        )
        self._compare("combined_x", rank, out, combined.x)
        self._compare("combined weights", rank, out_weights, combined.topk_weights)

    def _dispatch(
        self,
        rank: int,
        rows: tuple[Array, Array | None],
        routing: tuple[Array | None, ...],
        num_experts: int,
        sent: reference.Dispatched,
        earlier: tuple[Crossing, dict[str, int]] | None,
    ) -> tuple[Crossing, dict[str, int]]:
        """A new dispatch of rows, or one of other rows with the routes of an earlier one.

        Args:
            routing: ids, weights, and is_token_in_rank.

        Returns what later calls need: the tokens that crossed, and fields of the kernels within a node.
        """
        machine, internode = self.machine, self.internodes[rank]
        (x, sf), (ids, weights, in_rank) = rows, routing
        num_topk = 0 if ids is None else ids.shape[1]
        parts = (x, sf, ids, weights)
        views = [None if each is None else arrays.view(each, name="x") for each in parts]
        pointers = [0 if each is None else self._put(rank, each) for each in (*parts, in_rank)]
        call: Any = SimpleNamespace(stream=rank, is_capturing=False, temporaries=[])
        found = internode.bringing(views, num_experts=num_experts, is_cached=earlier is not None)
        if earlier is None:
            listed = internode.list_capacity(len(x))
            place = machine.allocate(rank, routing_bytes(listed), "routing").address
            routed = {**_routing_fields(place), "num_tokens": listed}
        else:
            routed = earlier[1]
        brought = internode.bring(
            found,
            earlier and earlier[0],
            pointers,
            call,
            num_tokens=len(x),
            num_sms=NUM_BLOCKS,
            digest=7,
        )
        crossing = brought.crossing
        scratch = machine.allocate(rank, scratch_bytes(routed["num_tokens"]), "scratch").address
        row = ReceivedRow(
            idx_bytes=8 * num_topk,
            weights_bytes=4 * num_topk,
            sf_bytes=0 if sent.recv_sf is None else sent.recv_sf.itemsize * sent.recv_sf.shape[1],
            row_bytes=sent.recv_x.itemsize * sent.recv_x.shape[1],
        )
        room = row.capacity(PLACE_BYTES)
        kernel = self.dispatches[sent.recv_x.dtype != x.dtype]
        machine.launch(
            rank,
            kernel,
            bound(
                kernel,
                {
                    **dict(zip(_OWN, (*pointers[:4], brought.node_masks), strict=True)),
                    **{f"landed_{name}": at for name, at in zip(_OWN, brought.landed, strict=True)},
                    "node_masks_bytes": found.parts.num_bytes[-1],
                    "segments": crossing.segments,
                    "order": internode.order,
                    "first_expert": internode.node * found.num_node_experts,
                    "waits_for_announced": found.parts.ahead_bytes > 0,
                    "num_exchange_blocks": brought.num_blocks,
                    "masks": scratch + 4 * MAX_LOCAL_RANKS * routed["num_tokens"],
                    "send_token": scratch,
                    "call": self.num_calls,
                    "digest": 7,
                    "recv_offset": PAYLOAD_OFFSET // OFFSET_UNIT,
                    "recv_capacity": room,
                    "num_topk": num_topk,
                    "num_experts": found.num_node_experts,
                    "idx_bytes": 8 if num_topk else 0,
                    "is_cached": earlier is not None,
                    "max_redundant_tokens": 512,
                    "expert_alignment": 1,
                    "row_bytes": row.row_bytes,
                    "sf_row_bytes": row.sf_bytes,
                },
                routed,
                self.common(rank),
            ),
            NUM_BLOCKS,
        )
        exchange: Any = found.exchange
        machine.wait(rank, exchange.done)
        at, base = row.layout(room), self.slabs[rank].address + PAYLOAD_OFFSET
        self._compare("recv_x", rank, base + at.x, sent.recv_x)
        if sent.recv_sf is not None:
            self._compare("recv_sf", rank, base + at.sf, sent.recv_sf)
        if ids is not None:
            assert sent.recv_topk_weights is not None
            self._compare("recv_topk_idx", rank, base + at.topk_idx, sent.recv_topk_idx.astype(np.int64))
            self._compare("recv_topk_weights", rank, base + at.topk_weights, sent.recv_topk_weights)
        return crossing, routed

    def _put(self, rank: int, array: Array) -> int:
        """Of an array without elements nothing is read, but its address is not 0."""
        if array.nbytes == 0:
            return self.slabs[rank].address + PAYLOAD_OFFSET
        return self.machine.put(rank, array, "input")

    def _compare(self, name: str, rank: int, address: int, expected: Array) -> None:
        if expected.nbytes == 0:
            return
        memory = self.machine.allocate(rank, expected.nbytes, f"copy of {name}")
        self.machine.copy(rank, memory.address, address, expected.nbytes)
        wanted = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
        got = memory.array(np.uint8, (wanted.nbytes,))

        def check() -> str | None:
            if self.hangs[rank].array(HANG_RECORD, (1,))["reason"][0]:
                return f"rank {rank} gave up"
            return None if np.array_equal(got, wanted) else f"{name} of rank {rank} is wrong"

        self.machine.checks.append(check)


def _routing_fields(place: int) -> dict[str, int]:
    """Of kernels, for a routing at an address."""
    return {
        "send_row": place + SEND_ROW_OFFSET,
        "send_plan": place + SEND_PLAN_OFFSET,
        "result": place + RESULT_OFFSET,
    }


_OWN = ("x", "sf", "topk_idx", "topk_weights", "node_masks")

"""Whole dispatches and combines over several nodes, and the oracle of all ranks.

The network's part is enqueued by the product's host side, the part within a node as it would be.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ep_rt import arrays, reference
from ep_rt.cuda import kernels, launch
from ep_rt.cuda.handle import SEND_PLAN_OFFSET, SEND_ROW_OFFSET, routing_bytes
from ep_rt.cuda.internode import Crossing, Internode
from ep_rt.cuda.layout import (
    DISPATCH_RESULT,
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

from .kernels import Kernels, bound
from .machine import Array, Conditions, EmulatedKernel, Machine, Memory
from .runtime import Kind

ELEMENT = "float32"
MAX_TOKENS = 16
NUM_BLOCKS = 2
PLACE_BYTES = 16 << 10
RINGS = Rings(num_channels=2, num_slots=2, slot_bytes=512)


class _Launch:
    """Stands for `launch.Launch`."""

    def __init__(self, machine: Machine, rank: int, kernel: EmulatedKernel, args: Array, most: int) -> None:
        self._where = machine, rank, kernel
        self._given, self._most = args, most
        self.args: Any = launch.fields_type(kernel.spec.args).from_address(args.ctypes.data)

    def __call__(self, stream: int, num_blocks: int | None = None) -> None:
        machine, rank, kernel = self._where
        machine.launch(rank, kernel, self._given, min(num_blocks or self._most, self._most))


class _Kernel:
    """Stands for `launch.Kernel`."""

    def __init__(self, machine: Machine, rank: int, kernel: EmulatedKernel) -> None:
        self._where = machine, rank, kernel
        self.spec = kernel.spec

    def bind(self, args: Array, *, num_blocks: int) -> _Launch:
        return _Launch(*self._where, args, num_blocks)


class TwoLevel:
    """Ranks of several nodes, with the memory that a buffer has."""

    def __init__(
        self, num_nodes: int, num_local_ranks: int, load: Kernels, *, is_virtual: bool = False
    ) -> None:
        self.num_nodes, self.num_local = num_nodes, num_local_ranks
        self.ranks = range(num_nodes * num_local_ranks)
        self.dispatch = load.dispatch(segmented=True)
        self.combine = load.combine(ELEMENT, segmented=True)
        network = [
            load.small(spec)
            for spec in (
                kernels.internode_layout(),
                kernels.internode_exchange(),
                kernels.internode_sum(ELEMENT),
            )
        ]
        most_blocks = 2 * RINGS.num_channels
        domain = len(self.ranks) if is_virtual else num_local_ranks
        self.machine = machine = Machine(
            len(self.ranks),
            [self.dispatch, self.combine, *network],
            [(rank, most_blocks) for rank in self.ranks],
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
        states = each(NETWORK_STATE.itemsize, "network state")
        self.internodes = []
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
            made._common = {
                **self.common(rank),
                "area": areas[rank].address,
                "state": states[rank].address,
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
            layout, exchange, total = (_Kernel(machine, rank, kernel) for kernel in network)
            made._layout, made._exchange, made._sum = layout, exchange, {ELEMENT: total}  # type: ignore[assignment, dict-item]
            self.internodes.append(made)
        self.num_calls = 0

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

    def layer(self, rng: np.random.Generator, *, max_tokens: int) -> None:
        """Enqueue a dispatch, a repeated one, and a combine of rows, weights and biases, on all ranks."""
        num_ranks = len(self.ranks)
        num_topk, hidden = int(rng.integers(1, 4)), 4 * int(rng.integers(1, 12))
        num_experts = num_ranks * int(rng.integers(1, 3))
        counts = rng.integers(0, max_tokens + 1, num_ranks)
        x = [rng.standard_normal((int(n), hidden)).astype(np.float32) for n in counts]
        ids = [rng.integers(-2, num_experts + 2, (int(n), num_topk)) for n in counts]
        weights = [rng.random(each.shape, np.float32) for each in ids]
        valid = [np.where((each < 0) | (each >= num_experts), -1, each) for each in ids]
        sent = reference.dispatch(x, valid, num_experts=num_experts, topk_weights=weights)
        y = [rng.standard_normal(each.recv_x.shape).astype(np.float32) for each in sent]
        given = [rng.random((len(each), num_topk), np.float32) for each in y]
        biases = [rng.standard_normal(each.shape).astype(np.float32) for each in x]
        combined = reference.combine(
            y,
            sent,
            num_tokens=[len(each) for each in x],
            topk_weights=given,
            bias=biases,
            ranks_per_node=self.num_local,
        )
        self.num_calls += 3
        for rank in self.ranks:
            self._one(
                rank,
                (x[rank], ids[rank], weights[rank]),
                num_experts,
                sent[rank],
                (y[rank], given[rank], biases[rank]),
                combined[rank],
            )

    def _one(
        self,
        rank: int,
        tokens: tuple[Array, Array, Array],
        num_experts: int,
        sent: reference.Dispatched,
        back: tuple[Array, Array, Array],
        combined: reference.Combined,
    ) -> None:
        machine, internode, (x, ids, weights) = self.machine, self.internodes[rank], tokens
        num_tokens, num_topk = ids.shape
        call: Any = SimpleNamespace(stream=0, is_capturing=False, temporaries=[])
        listed = internode.list_capacity(num_tokens)
        routing = machine.allocate(rank, routing_bytes(listed), "routing").address
        routed = {
            "send_row": routing + SEND_ROW_OFFSET,
            "send_plan": routing + SEND_PLAN_OFFSET,
            "num_tokens": listed,
            "row_bytes": 4 * x.shape[1],
        }
        crossing = self._dispatch(rank, (x, ids, weights), num_experts, sent, routed, None)
        self._dispatch(rank, (-x, None, None), 0, replace(sent, recv_x=-sent.recv_x), routed, crossing)
        routed["segments"] = crossing.segments
        routed["num_topk"] = num_topk

        base = self.slabs[rank].address + PAYLOAD_OFFSET
        y, given, bias = back
        weights_at = align_up(y.nbytes, OFFSET_UNIT)
        assert weights_at + given.nbytes <= PLACE_BYTES
        for array, offset in ((y, 0), (given, weights_at)):
            if array.nbytes:
                machine.copy(rank, base + PLACE_BYTES + offset, self._put(rank, array), array.nbytes)
        returning = internode.returning(
            arrays.view(y, name="y"),
            arrays.view(given, name="weights"),
            num_tokens=num_tokens,
            element=ELEMENT,
        )
        places = returning.here_places
        here = machine.allocate(rank, places[-1], "sums of this node").address
        y_offset = (PAYLOAD_OFFSET + PLACE_BYTES) // OFFSET_UNIT
        sums = here + places[0], here + places[1]
        machine.launch(
            rank,
            self.combine,
            bound(
                self.combine,
                {
                    "out": sums[0],
                    "out_weights": sums[1],
                    "digest": 8,
                    "y_offset": y_offset,
                    "weights_offset": y_offset + weights_at // OFFSET_UNIT,
                    "num_pullers": NUM_BLOCKS,
                },
                routed,
                self.common(rank),
            ),
            NUM_BLOCKS,
        )
        out = machine.allocate(rank, max(1, x.nbytes), "combined x").address
        out_weights = machine.allocate(rank, max(1, weights.nbytes), "combined weights").address
        internode.take_back(
            returning,
            crossing,
            sums,
            [self._put(rank, bias)],
            (out, out_weights),
            call,
            num_sms=NUM_BLOCKS,
        )
        assert combined.topk_weights is not None
        self._compare("combined_x", rank, out, combined.x)
        self._compare("combined weights", rank, out_weights, combined.topk_weights)

    def _dispatch(
        self,
        rank: int,
        tokens: tuple[Array | None, ...],
        num_experts: int,
        sent: reference.Dispatched,
        routed: dict[str, int],
        crossing: Crossing | None,
    ) -> Crossing:
        """A new dispatch of rows, ids and weights, or one of other rows with the routes of an earlier one."""
        machine, internode = self.machine, self.internodes[rank]
        x, ids, weights = tokens
        is_cached = crossing is not None
        num_topk = 0 if ids is None else ids.shape[1]
        parts = (x, None, ids, weights)
        views = [None if each is None else arrays.view(each, name="x") for each in parts]
        pointers = [0 if each is None else self._put(rank, each) for each in parts]
        call: Any = SimpleNamespace(stream=0, is_capturing=False, temporaries=[])
        assert x is not None
        found = internode.bringing(views, num_tokens=len(x), num_experts=num_experts, is_cached=is_cached)
        crossing, landed = internode.bring(found, crossing, pointers, call, num_sms=NUM_BLOCKS, digest=7)
        scratch = machine.allocate(rank, scratch_bytes(routed["num_tokens"]), "scratch").address
        told = machine.allocate(rank, DISPATCH_RESULT.itemsize, "result")
        row = ReceivedRow(
            idx_bytes=8 * num_topk, weights_bytes=4 * num_topk, sf_bytes=0, row_bytes=routed["row_bytes"]
        )
        room = row.capacity(PLACE_BYTES)
        machine.launch(
            rank,
            self.dispatch,
            bound(
                self.dispatch,
                {
                    **dict(zip(_OWN, pointers, strict=True)),
                    **{f"landed_{name}": at for name, at in zip(_OWN, landed, strict=True)},
                    "segments": crossing.segments,
                    "first_expert": internode.node * found.num_node_experts,
                    "result": told.address,
                    "masks": scratch + 4 * MAX_LOCAL_RANKS * routed["num_tokens"],
                    "send_token": scratch,
                    "call": self.num_calls,
                    "digest": 7,
                    "recv_offset": PAYLOAD_OFFSET // OFFSET_UNIT,
                    "recv_capacity": room,
                    "num_topk": num_topk,
                    "num_experts": found.num_node_experts,
                    "idx_bytes": 8 if num_topk else 0,
                    "is_cached": is_cached,
                    "max_redundant_tokens": 512,
                },
                routed,
                self.common(rank),
            ),
            NUM_BLOCKS,
        )
        at, base = row.layout(room), self.slabs[rank].address + PAYLOAD_OFFSET
        self._compare("recv_x", rank, base + at.x, sent.recv_x)
        if not is_cached:
            assert sent.recv_topk_weights is not None
            self._compare("recv_topk_idx", rank, base + at.topk_idx, sent.recv_topk_idx.astype(np.int64))
            self._compare("recv_topk_weights", rank, base + at.topk_weights, sent.recv_topk_weights)
        return crossing

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


_OWN = ("x", "sf", "topk_idx", "topk_weights")

"""Tokens of random layers over the emulated network and back, as the two-level mode sends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ep_rt import reference
from ep_rt.cuda import kernels
from ep_rt.cuda.hang import Report
from ep_rt.cuda.layout import (
    HANG_RECORD,
    NETWORK_AREA,
    NETWORK_PLAN,
    NETWORK_STATE,
    PAYLOAD_OFFSET,
    SLAB_HEADER,
    WORKSPACE,
    Operation,
    align_up,
    field_offset,
    signal_operation,
)

from .kernels import Kernels, bound
from .machine import Array, EmulatedKernel, Machine, Memory
from .runtime import Kind
from .segments import node_masks

NUM_CHANNELS = 3
NUM_SLOTS = 2
MAX_LANDED = 64
ELEMENT = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What all ranks send. Rows are float32, so that what is moved can be summed as well.

    Attributes:
        by_ranks: the kernels are told to which ranks tokens go, and no ids.
    """

    x: Sequence[Array]
    topk_idx: Sequence[Array]
    num_experts: int
    by_ranks: bool = False

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        num_ranks: int,
        *,
        hidden: int,
        max_tokens: int,
        by_ranks: bool = False,
    ) -> Layer:
        num_topk, num_experts = int(rng.integers(1, 4)), num_ranks * int(rng.integers(1, 3))
        counts = rng.integers(0, max_tokens + 1, num_ranks)
        return cls(
            x=[rng.standard_normal((int(n), hidden)).astype(np.float32) for n in counts],
            topk_idx=[rng.integers(-1, num_experts + 1, (int(n), num_topk)) for n in counts],
            num_experts=num_experts,
            by_ranks=by_ranks,
        )

    def ranks(self, rank: int) -> Array:
        """bool [T, R]: where the tokens of a rank go."""
        ids = self.topk_idx[rank]
        ids = np.where(ids < self.num_experts, ids, -1)
        layout = reference.dispatch_layout(ids, num_experts=self.num_experts, num_ranks=len(self.x))
        return layout.is_token_in_rank

    def nodes(self, rank: int, num_nodes: int) -> Array:
        """bool [T, N]: the same by node."""
        in_rank = self.ranks(rank)
        return np.asarray(in_rank.reshape(len(in_rank), num_nodes, len(self.x) // num_nodes).any(axis=2))


class Exchanges:
    """Ranks of several nodes, and what is enqueued on them.

    Args:
        is_virtual: stores reach the ranks of all nodes.
    """

    def __init__(
        self,
        num_nodes: int,
        num_local_ranks: int,
        load: Kernels,
        *,
        slot_bytes: int,
        is_virtual: bool = False,
    ) -> None:
        self.num_nodes, self.num_local_ranks, self.load = num_nodes, num_local_ranks, load
        self.slot_bytes = slot_bytes
        num_ranks = num_nodes * num_local_ranks
        self.ranks = range(num_ranks)
        specs = [self._layout(), self._exchange(), self._sum()]
        streams = [(rank, 2 * NUM_CHANNELS) for rank in self.ranks]
        self.machine = machine = Machine(
            num_ranks, specs, streams, ranks_per_node=num_ranks if is_virtual else num_local_ranks
        )

        def each(num_bytes: int, name: str, kind: Kind = Kind.OWN) -> list[Memory]:
            return [machine.allocate(rank, num_bytes, name, kind) for rank in self.ranks]

        ring_bytes = num_nodes * NUM_CHANNELS * NUM_SLOTS * slot_bytes
        self.slabs = each(PAYLOAD_OFFSET, "slab", Kind.SLAB)
        self.areas = each(NETWORK_AREA.itemsize, "network area", Kind.SYMMETRIC)
        self.outboxes = each(ring_bytes, "outbox", Kind.SYMMETRIC)
        self.inboxes = each(ring_bytes, "inbox", Kind.SYMMETRIC)
        self.states = each(NETWORK_STATE.itemsize, "network state")
        self.workspaces = each(WORKSPACE.itemsize, "workspace")
        self.orders = each(8 * MAX_LANDED, "order")
        self.progress = each(8 * MAX_LANDED, "progress")
        self.hangs = each(HANG_RECORD.itemsize, "hang record")
        self.epoch = 0

    def _layout(self) -> EmulatedKernel:
        return self.load.small(kernels.internode_layout())

    def _exchange(self) -> EmulatedKernel:
        return self.load.small(kernels.internode_exchange())

    def _sum(self) -> EmulatedKernel:
        return self.load.small(kernels.internode_sum(ELEMENT))

    def local_ranks(self, node: int) -> range:
        return range(node * self.num_local_ranks, (node + 1) * self.num_local_ranks)

    def common(self, rank: int) -> dict[str, Any]:
        node = rank // self.num_local_ranks
        return {
            "hang": self.hangs[rank].address,
            "workspace": self.workspaces[rank].address,
            "progress": self.progress[rank].address,
            "area": self.areas[rank].address,
            "state": self.states[rank].address,
            "timeout_ns": self.machine.conditions.timeout_ns,
            "rank": rank % self.num_local_ranks,
            "num_ranks": self.num_local_ranks,
            "node": node,
            "num_nodes": self.num_nodes,
            "slabs": [self.slabs[peer].address for peer in self.local_ranks(node)],
        }

    def layer(self, layer: Layer, rng: np.random.Generator, *, digests: Sequence[int] | None = None) -> None:
        """Enqueue the way out and the way back of one layer, and the sum, on all ranks."""
        goes = [layer.nodes(rank, self.num_nodes) for rank in self.ranks]
        plans = [self.machine.allocate(rank, NETWORK_PLAN.itemsize, "plan").address for rank in self.ranks]
        # By rank, of the concatenated list: what its node makes of each token.
        made: list[list[Array]] = []
        for rank in self.ranks:
            parts = []
            for node in range(self.num_nodes):
                src = node * self.num_local_ranks + rank % self.num_local_ranks
                here = rank // self.num_local_ranks
                num = len(layer.x[src]) if src == rank else int(goes[src][:, here].sum())
                parts.append(rng.standard_normal((num, layer.x[src].shape[1])).astype(np.float32))
            made.append(parts)
        for rank in self.ranks:
            digest = 7 if digests is None else digests[rank]
            self._one(rank, layer, goes, made, plans[rank], digest)
        self.epoch += 2

    def _one(
        self, rank: int, layer: Layer, goes: list[Array], made: list[list[Array]], plan: int, digest: int
    ) -> None:
        machine, num_nodes, size = self.machine, self.num_nodes, self.num_local_ranks
        x, ids = layer.x[rank], layer.topk_idx[rank]
        (num_tokens, hidden), num_topk = x.shape, ids.shape[1]
        node, local = rank // size, rank % size
        others = [other for other in range(num_nodes) if other != node]
        sources = [other * size + local for other in others]
        common = self.common(rank) | {"plan": plan, "num_tokens": num_tokens}
        lists = machine.allocate(rank, 4 * num_nodes * num_tokens, "lists").address
        positions = machine.allocate(rank, 4 * num_nodes * num_tokens, "positions").address
        x_at = machine.put(rank, x, "x")
        # What says where tokens go: ids, or masks that the layout makes.
        told = layer.topk_idx
        if layer.by_ranks:
            told = [node_masks(layer.ranks(src), num_nodes) for src in self.ranks]
            told_at = machine.allocate(rank, told[rank].nbytes, "node masks").address
            routing = {
                "is_token_in_rank": machine.put(rank, layer.ranks(rank).view(np.uint8), "in_rank"),
                "node_masks": told_at,
                "node_masks_bytes": told[rank].shape[1],
            }
        else:
            told_at = machine.put(rank, ids, "ids")
            routing = {"topk_idx": told_at or positions, "num_topk": num_topk, "idx_bytes": 8}
        machine.launch(
            rank,
            self._layout(),
            bound(
                self._layout(),
                {
                    "lists": lists,
                    "positions": positions,
                    "digest": digest,
                    "num_experts": layer.num_experts,
                },
                routing,
                common,
            ),
            1,
        )
        coming = [goes[src][:, node] for src in sources]
        landed_x = np.concatenate([layer.x[src][mask] for src, mask in zip(sources, coming, strict=True)])
        landed_told = np.concatenate([told[src][mask] for src, mask in zip(sources, coming, strict=True)])
        row_bytes, told_bytes = 4 * hidden, told[rank].itemsize * told[rank].shape[1]
        self._send(
            rank,
            common | {"lists": lists, "order": self.orders[rank].address},
            [(told_at, landed_told, told_bytes), (x_at, landed_x, row_bytes)],
            "landed",
            num_ahead=1,
        )
        self._expect_announced(rank, len(landed_x))
        # What the dispatch and the combine within the node do to the epoch.
        epoch = machine.put(rank, np.array([self.epoch + 2], np.uint64), "epoch")
        machine.copy(rank, self.slabs[rank].address + field_offset(SLAB_HEADER, "epoch"), epoch, 8)
        workspace = np.zeros(1, WORKSPACE)
        workspace["returning"], workspace["pieces_per_row"] = (self.epoch + 2) << 1, 3
        left = machine.put(rank, workspace, "workspace as a combine leaves it")
        machine.copy(rank, self.workspaces[rank].address, left, WORKSPACE.itemsize)
        counted = machine.put(rank, np.full(MAX_LANDED, 3, np.uint64), "counted pieces")
        machine.copy(rank, self.progress[rank].address, counted, 8 * len(landed_x))
        here = np.concatenate(made[rank])
        back = np.concatenate(
            [made[other * size + local][node][: int(goes[rank][:, other].sum())] for other in others]
        )
        here_at = machine.put(rank, here, "here")
        weights = self.machine.put(rank, here[:, :num_topk], "weights")
        returned = self._send(
            rank,
            common,
            [(here_at, back, row_bytes), (weights, back[:, :num_topk], 4 * num_topk)],
            "returned",
        )
        out = machine.allocate(rank, x.nbytes, "out")
        out_weights = machine.allocate(rank, 4 * num_tokens * num_topk, "out weights")
        bias = x[::-1] if num_tokens % 2 else None
        machine.launch(
            rank,
            self._sum(),
            bound(
                self._sum(),
                {
                    "header": self.slabs[rank].address,
                    "positions": positions,
                    "here": here_at,
                    "returned": returned[0],
                    "here_weights": weights,
                    "returned_weights": returned[1],
                    "bias": [0 if bias is None else machine.put(rank, bias, "bias"), 0],
                    "out": out.address,
                    "out_weights": out_weights.address,
                    "row_bytes": row_bytes,
                    "num_topk": num_topk,
                },
                common,
            ),
            2,
        )
        terms = []
        for other in range(num_nodes):
            term = np.full(x.shape, -0.0, np.float32)
            rows = made[other * size + local][node]
            where = goes[rank][:, other]
            term[where] = rows[where] if other == node else rows
            terms.append(term)
        total = sum(terms[1:], terms[0])
        has_term: Any = goes[rank].any(axis=1, keepdims=True)
        if bias is not None:
            self._expect(out, total + bias)
        else:
            self._expect(out, np.where(has_term, total, np.float32(0)))
        self._expect(out_weights, np.where(has_term, total, np.float32(0))[:, :num_topk])

    def _send(
        self,
        rank: int,
        fields: dict[str, Any],
        parts: list[tuple[int, Array, int]],
        name: str,
        *,
        num_ahead: int = 0,
    ) -> list[int]:
        """One step over the network. `parts`: where from, what must land here, bytes of a row."""
        machine, targets, sections, offset, ahead_bytes = self.machine, [], [], 0, 0
        for number, (source, expected, num_bytes) in enumerate(parts):
            if num_ahead and number == num_ahead:
                ahead_bytes, offset = offset, 0
            memory = machine.allocate(rank, max(1, expected.nbytes), name)
            self._expect(memory, expected)
            targets.append(memory.address)
            sections.append((source or memory.address, memory.address, num_bytes, offset))
            offset += align_up(num_bytes, 16)
        assert offset <= self.slot_bytes
        kernel = self._exchange()
        args = bound(
            kernel,
            {
                "outbox": self.outboxes[rank].address,
                "inbox": self.inboxes[rank].address,
                "num_channels": NUM_CHANNELS,
                "num_slots": NUM_SLOTS,
                "slot_bytes": self.slot_bytes,
                "num_ahead": num_ahead,
                "num_sections": len(sections),
                "ahead_bytes": ahead_bytes,
                "row_bytes": offset,
                "sections": sections,
            },
            fields,
        )
        machine.launch(rank, kernel, args, 2 * NUM_CHANNELS)
        return targets

    def _expect_announced(self, rank: int, num_landed: int) -> None:
        """Enqueue a look at what the dispatch within the node would be told."""
        order = self.machine.allocate(rank, 8 * MAX_LANDED, "order as it was")
        self.machine.copy(rank, order.address, self.orders[rank].address, 8 * MAX_LANDED)
        epoch = self.epoch + 1

        def check() -> str | None:
            words = order.array(np.uint64)[:num_landed]
            if self.has_failed or sorted(words.tolist()) == [epoch << 32 | row for row in range(num_landed)]:
                return None
            return f"rank {rank} was told {words} of {num_landed} tokens"

        self.machine.checks.append(check)

    def _expect(self, memory: Memory, expected: Array) -> None:
        raw = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
        got = memory.array(np.uint8, (raw.nbytes,))

        def check() -> str | None:
            if self.has_failed or np.array_equal(got, raw):
                return None
            return f"{memory.name} of rank {memory.rank} is wrong"

        self.machine.checks.append(check)

    @property
    def has_failed(self) -> bool:
        return any(report is not None for report in self.reports())

    def reports(self) -> list[Report | None]:
        return [Report.of(rank, memory.array(HANG_RECORD)) for rank, memory in enumerate(self.hangs)]

    def late(self, report: Report) -> set[int]:
        """The nodes that a report blames, as its host finds them."""
        farewells = self.areas[report.rank].array(NETWORK_AREA, (1,))["farewells"][0].tolist()
        waits = report.with_farewells(farewells, own=report.rank // self.num_local_ranks).waits
        return {node for node, (_, seen) in waits.items() if signal_operation(seen) != Operation.GAVE_UP}

    def headers(self) -> list[Array]:
        return [slab.array(SLAB_HEADER, (1,)) for slab in self.slabs]

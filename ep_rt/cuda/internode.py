"""The network's part of the two-level mode on one rank: what crosses, memory for it, and launches.

A dispatch over several nodes is that of one node over a longer list of tokens: a rank's own ones, and those
that came from the ranks of the same local index on the other nodes. `Internode` brings them, while that
dispatch already sends on what has come, and on the way back takes each node's sum of a token to where it came
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ..arrays import ArrayView
from ..errors import ConfigError, TopologyError, on_all_ranks
from ..results import named
from ..topology import Topology
from . import kernels, plan
from .domain import Call, Domain
from .heap import Block, Workspace
from .inputs import itemsize, row_bytes
from .kernels import ELEMENTS
from .launch import Kernel, Launch, bind
from .layout import (
    MAX_LOCAL_RANKS,
    MAX_NODES,
    MAX_SECTIONS,
    NETWORK_AREA,
    NETWORK_PLAN,
    NETWORK_STATE,
    OFFSET_UNIT,
    align_up,
    field_offset,
)
from .plan import Parts

if TYPE_CHECKING:
    from .nvshmem import Network, SymmetricMemory  # which programs of one node never load

_AREA_BYTES: Final = align_up(NETWORK_AREA.itemsize, OFFSET_UNIT)
_PLAN_BYTES: Final = align_up(NETWORK_PLAN.itemsize, OFFSET_UNIT)

# For handles, of which several are held while their calls are on their way. The driver allocates only once
# the device's kernels are done, so a call behind slow work would wait for it.
_RESERVED_BYTES: Final = 32 << 20

_Sections = tuple[tuple[Any, int], ...]


class Crossing(NamedTuple):
    """Which tokens of a dispatch cross the network, on the device; kept by its handle.

    Attributes:
        block: a `NETWORK_PLAN`, then the tokens for each node, then the number of each token there.
        plan, lists, positions: addresses of these.
    """

    block: Block
    num_nodes: int
    plan: int
    lists: int
    positions: int

    @classmethod
    def over(cls, block: Block, lists_bytes: int, num_nodes: int) -> Crossing:
        """Over the memory of a block."""
        lists = block.pointer + _PLAN_BYTES
        return named(cls, (block, num_nodes, block.pointer, lists, lists + lists_bytes))

    @property
    def segments(self) -> int:
        """The `SEGMENTS`, with which the plan begins."""
        return self.plan


def lists_bytes(num_tokens: int, num_nodes: int) -> int:
    """Of the tokens for all nodes; of their numbers there."""
    return align_up(4 * num_tokens * num_nodes, OFFSET_UNIT)


def crossing_bytes(lists_bytes: int) -> int:
    """Of the block of a `Crossing`."""
    return _PLAN_BYTES + 2 * lists_bytes


@dataclass(frozen=True, slots=True)
class Bringing:
    """The way out for dispatches of a kind.

    Attributes:
        layout: None with a handle.
        parts: x, scale factors, ids, weights, and node masks where there are no ids to say where tokens go.
        sections: of the exchange, see `_sections`.
        places: of the parts in memory for all tokens that may come, and its end.
        num_node_experts: of one node; 0 with a handle.
    """

    layout: Launch | None
    exchange: Launch
    sections: _Sections
    parts: Parts
    places: tuple[int, ...]
    num_node_experts: int


class Brought(NamedTuple):
    """Tokens of other nodes that come, or have come, for a dispatch within this node.

    Attributes:
        node_masks: those of this rank's own tokens, made without expert ids.
        landed: where the parts of the others lie, in the order of `Bringing.parts`.
        num_blocks: of the exchange that brings them.
    """

    crossing: Crossing
    node_masks: int
    landed: tuple[int, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Returning:
    """The way back for combines of a kind, of rows and their weights.

    Attributes:
        sections: of the exchange, see `_sections`.
    """

    exchange: Launch
    total: Launch
    sections: _Sections
    parts: Parts


class ReturnPlaces(NamedTuple):
    """Memory for the way back of so many tokens.

    Attributes:
        capacity: tokens of the list.
        here: where this node's sums of rows and weights lie in memory for all of them; its end.
        returned: the same of what comes from the others. Both may lie in one allocation.
    """

    num_tokens: int
    capacity: int
    here: tuple[int, ...]
    returned: tuple[int, ...]


class Internode:
    """What a rank has for normal calls over several nodes. `reset` is collective.

    Args:
        network: over all nodes.
        memory: `num_bytes` of it.
        domain: of this node's ranks.
        common: fields of every collective kernel of the domain.
        rings: see `plan.rings`.
        max_tokens: of any rank in one call.

    Attributes:
        order: which tokens of other nodes have landed, as they do; words, stamped with the call.
        progress: what a combine within this node has summed of each of them.
        num_nodes, node: of all, and this one.
        num_ranks: of all nodes.

    Raises:
        CompileError, BackendError: a kernel does not compile, or link.
    """

    def __init__(
        self,
        network: Network,
        memory: SymmetricMemory,
        topology: Topology,
        domain: Domain,
        common: Mapping[str, Any],
        rings: plan.Rings,
        *,
        max_tokens: int,
    ) -> None:
        self._domain = domain
        self.num_nodes, self.node, self.num_ranks = topology.num_nodes, topology.node, topology.num_ranks
        self.max_tokens = max_tokens
        self._rings = rings
        rings_bytes = rings.num_bytes(self.num_nodes)
        self._network = network
        self._memory = memory
        self._area = self._memory.pointer
        self._state = Workspace(NETWORK_STATE.itemsize)
        self._order = Workspace(8 * (self.num_nodes - 1) * max_tokens)
        self._progress = Workspace(8 * (self.num_nodes - 1) * max_tokens)
        self.order, self.progress = self._order.pointer, self._progress.pointer
        self._common = {
            **common,
            "area": self._area,
            "state": self._state.pointer,
            "node": self.node,
            "num_nodes": self.num_nodes,
        }
        self._rings_fields = {
            "outbox": self._area + _AREA_BYTES,
            "inbox": self._area + _AREA_BYTES + rings_bytes,
            "num_channels": self._rings.num_channels,
            "num_slots": self._rings.num_slots,
            "slot_bytes": self._rings.slot_bytes,
        }
        self._layout = Kernel(kernels.internode_layout(), network=network)
        self._exchange = Kernel(kernels.internode_exchange(), network=network)
        self._sum = {element: Kernel(kernels.internode_sum(element)) for element in ELEMENTS}
        domain.heap.reserve(_RESERVED_BYTES)

    @staticmethod
    def num_bytes(topology: Topology, rings: plan.Rings) -> int:
        """Of symmetric memory."""
        return _AREA_BYTES + 2 * rings.num_bytes(topology.num_nodes)

    @staticmethod
    def check(topology: Topology) -> None:
        """Raise `TopologyError` on every rank for nodes that are not served."""
        topology.require_uniform("the two-level mode")
        num_local = topology.num_local_ranks
        wanted = tuple(rank // num_local for rank in range(topology.num_ranks))
        if topology.node_of_rank != wanted:
            raise on_all_ranks(
                TopologyError(
                    f"ranks are on nodes {topology.node_of_rank}; those of a node must be consecutive: start "
                    "them node by node (mpirun --map-by ppr:N:node, srun --distribution=block)"
                )
            )
        if topology.num_nodes > MAX_NODES or num_local > MAX_LOCAL_RANKS:
            raise on_all_ranks(
                TopologyError(
                    f"{topology.num_nodes} nodes of {num_local} ranks; at most {MAX_NODES} of "
                    f"{MAX_LOCAL_RANKS} are served"
                )
            )

    def farewells(self) -> list[int]:
        """A word for each node: not 0 once the rank there has given a call up. Waits for no call."""
        at = self._area + field_offset(NETWORK_AREA, "farewells")
        words: list[int] = self._domain.slab.read_at(at, np.dtype(("<u8", (MAX_NODES,))))[0].tolist()
        return words

    def sent_bytes(self) -> tuple[int, ...]:
        """Of records, to each node so far. Waits for this rank's calls."""
        at = self._state.pointer + field_offset(NETWORK_STATE, "sent_bytes")
        words = self._domain.read(at, np.dtype(("<u8", (MAX_NODES,))))[0]
        return tuple(words[: self.num_nodes].tolist())

    def reset(self) -> None:
        """Forget what was under way, while no rank has any work; see `HangWatch.reset`."""
        self._network.settle()
        self._state.reset()
        self._order.reset()
        self._progress.reset()
        self._network.clear(self._memory, _AREA_BYTES)

    def list_capacity(self, num_tokens: int) -> int:
        """Most tokens that this rank dispatches within its node, its own ones included.

        Raises:
            ConfigError: more tokens than any rank may have.
        """
        if num_tokens > self.max_tokens:
            raise ConfigError(
                f"{num_tokens} tokens; across nodes a rank dispatches at most {self.max_tokens} in a call: "
                "give num_max_tokens_per_rank to Buffer.for_moe"
            )
        return num_tokens + (self.num_nodes - 1) * self.max_tokens

    # The way out.

    def bringing(
        self,
        views: Sequence[ArrayView | None],
        *,
        num_experts: int,
        is_cached: bool,
    ) -> Bringing:
        """Of x, scale factors, ids and weights. Without ids and handle routing is given by ranks.

        Raises:
            ConfigError: rows that do not fit into a slot.
        """
        ids = views[2]
        by_ranks = ids is None and not is_cached
        masks_bytes = plan.node_masks_bytes(self.num_nodes) if by_ranks else 0
        parts = Parts.of([*map(row_bytes, views), masks_bytes], num_ahead=4)
        layout = None
        if not is_cached:
            layout = bind(
                self._layout,
                1,
                {
                    "num_topk": 0 if ids is None else ids.shape[1],
                    "num_experts": num_experts,
                    "idx_bytes": 0 if ids is None else itemsize(ids),
                    "node_masks_bytes": masks_bytes,
                },
                self._common,
            )
        num_node_experts = num_experts // self.num_nodes
        exchange = self._bind_exchange(parts, is_back=False)
        return Bringing(
            layout,
            exchange,
            _sections(exchange, parts),
            parts,
            parts.places((self.num_nodes - 1) * self.max_tokens),
            num_node_experts,
        )

    def bring(
        self,
        found: Bringing,
        crossing: Crossing | None,
        pointers: Sequence[int],
        call: Call,
        *,
        num_tokens: int,
        num_sms: int,
        digest: int,
    ) -> Brought:
        """Enqueue the way out. The dispatch within the node must be enqueued next.

        Args:
            crossing: of the handle; None for a new one.
            pointers: of x, scale factors, ids, weights and is_token_in_rank here.
        """
        *sources, in_rank = pointers
        x_at, sf_at, ids_at, weights_at, masks_at, num_bytes = found.places
        masks_bytes = found.parts.num_bytes[-1] * num_tokens  # of this rank's own tokens
        landed = self._domain.heap.take(num_bytes + masks_bytes, is_capturing=call.is_capturing)
        call.temporaries.append(landed)
        base = landed.pointer
        masks = base + num_bytes
        targets = base + x_at, base + sf_at, base + ids_at, base + weights_at, base + masks_at
        if crossing is None:
            crossing = self._lay_out(
                found, sources[2], in_rank, masks, call, num_tokens=num_tokens, digest=digest
            )
        found.exchange.args.lists = crossing.lists  # never set on the way back
        found.exchange.args.num_tokens = num_tokens
        num_blocks = self._launch_exchange(
            found.exchange, found.sections, crossing, (*sources, masks), targets, call.stream, num_sms
        )
        return named(Brought, (crossing, masks, targets, num_blocks))

    def _lay_out(
        self,
        found: Bringing,
        ids: int,
        in_rank: int,
        masks: int,
        call: Call,
        *,
        num_tokens: int,
        digest: int,
    ) -> Crossing:
        num_bytes = lists_bytes(num_tokens, self.num_nodes)
        block = self._domain.heap.take(crossing_bytes(num_bytes), is_capturing=call.is_capturing)
        crossing = Crossing.over(block, num_bytes, self.num_nodes)
        assert found.layout is not None
        args = found.layout.args
        args.topk_idx, args.is_token_in_rank, args.node_masks = ids, in_rank, masks
        args.plan = crossing.plan
        args.lists, args.positions = crossing.lists, crossing.positions
        args.num_tokens, args.digest = num_tokens, digest
        found.layout(call.stream)
        return crossing

    # The way back.

    def returning(self, x: ArrayView, weights: ArrayView | None, *, element: str) -> Returning:
        """Of rows like those of x and, where they are summed too, of weights."""
        parts = Parts.of((row_bytes(x), row_bytes(weights)))
        num_topk = 0 if weights is None else weights.shape[1]
        total = bind(
            self._sum[element],
            plan.SUM_BLOCKS_PER_SM * self._domain.max_blocks,
            {
                "header": self._common["slabs"][self._domain.group.rank],
                "row_bytes": row_bytes(x),
                "num_topk": num_topk,
            },
            self._common,
        )
        exchange = self._bind_exchange(parts, is_back=True)
        return Returning(exchange, total, _sections(exchange, parts), parts)

    def return_places(self, found: Returning, num_tokens: int) -> ReturnPlaces:
        """Where things lie when so many tokens come back."""
        capacity, places = self.list_capacity(num_tokens), found.parts.places
        return ReturnPlaces(num_tokens, capacity, places(capacity), places((self.num_nodes - 1) * num_tokens))

    def take_back(
        self,
        found: Returning,
        places: ReturnPlaces,
        crossing: Crossing,
        here: tuple[int, int],
        returned: int,
        biases: Sequence[int],
        out: tuple[int, int],
        call: Call,
        *,
        num_sms: int,
    ) -> None:
        """Enqueue the way back, and the sum of what comes. The combine within the node was enqueued last.

        Args:
            here: this node's sums of all tokens of the list, and of their weights.
            returned: memory for those that come.
            out: where the results go, and their weights.
        """
        rows_at, weights_at, _ = places.returned
        targets = returned + rows_at, returned + weights_at
        args, total = found.exchange.args, found.total.args
        args.num_tokens = total.num_tokens = places.num_tokens
        self._launch_exchange(found.exchange, found.sections, crossing, here, targets, call.stream, num_sms)
        total.plan, total.positions = crossing.plan, crossing.positions
        total.here, total.here_weights = here
        total.returned, total.returned_weights = targets
        for number, bias in enumerate(biases):
            total.bias[number] = bias
        total.out, total.out_weights = out
        max_blocks = plan.SUM_BLOCKS_PER_SM * self._domain.max_blocks
        found.total(call.stream, plan.num_local_blocks(2 * num_sms, max_blocks=max_blocks))

    # Both.

    def _bind_exchange(self, parts: Parts, *, is_back: bool) -> Launch:
        if parts.record_bytes > self._rings.slot_bytes:
            raise ConfigError(
                f"a row takes {parts.record_bytes} bytes on the network, a slot has "
                f"{self._rings.slot_bytes}, which follows from the sizes given to Buffer.for_moe"
            )
        assert len(parts.order) <= MAX_SECTIONS
        return bind(
            self._exchange,
            plan.EXCHANGE_BLOCKS_PER_SM * self._domain.max_blocks,
            {
                "num_ahead": parts.num_ahead,
                "num_sections": len(parts.order),
                # Where they lie is set by each call.
                "sections": [
                    (0, 0, parts.num_bytes[number], parts.offsets[number]) for number in parts.order
                ],
                "ahead_bytes": parts.ahead_bytes,
                "row_bytes": parts.row_bytes,
                "order": self.order,
                "progress": self.progress,
            },
            self._rings_fields,
            self._common,
            starts_early=is_back,  # beside the combine within the node
        )

    def _launch_exchange(
        self,
        launch: Launch,
        sections: _Sections,
        crossing: Crossing,
        sources: Sequence[int],
        targets: Sequence[int],
        stream: int,
        num_sms: int,
    ) -> int:
        """Returns the number of its blocks."""
        launch.args.plan = crossing.plan
        for section, number in sections:
            section.source, section.target = sources[number], targets[number]
        most = min(num_sms, self._domain.max_blocks) * plan.EXCHANGE_BLOCKS_PER_SM // 2
        num_blocks = 2 * min(self._rings.num_channels, most)
        launch(stream, num_blocks)
        return num_blocks


def _sections(exchange: Launch, parts: Parts) -> _Sections:
    """The sections among the arguments of an exchange, each with the number of its part."""
    return tuple(zip(exchange.args.sections, parts.order, strict=False))

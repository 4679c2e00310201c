"""Bytes that dispatch and combine move, by rank and by kind of link, from the expert ids of all ranks. Pure.

Counted are rows with what belongs to them, as the kernels' own counters have them (`Buffer.stats`): no
control words, no copies within a rank, and every row is taken to fit.

Network    a token crosses once for each other node that it goes to, to the rank of the same local index
           there, in a record padded as `Parts` says. A combine sends as many back.
NVLink     a rank stores its own tokens, and those that came to it from other nodes, once to each other rank
           of its node that they go to. A combine loads as many from there. On one node that is all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cuda.layout import ReceivedRow
from .cuda.plan import Parts, node_masks_bytes
from .errors import ConfigError
from .requests import local_experts

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Flow:
    """Rows over one kind of link.

    Attributes:
        rows: int64 [R, R], from rank to rank.
        row_bytes: of one of them.
    """

    rows: Array
    row_bytes: int

    @property
    def sent_bytes(self) -> Array:
        """int64 [R]: that leave each rank."""
        sent: Array = self.rows.sum(axis=1) * self.row_bytes
        return sent

    @property
    def received_bytes(self) -> Array:
        """int64 [R]: that come to each rank."""
        received: Array = self.rows.sum(axis=0) * self.row_bytes
        return received

    def sent_bytes_by_node(self, ranks_per_node: int) -> Array:
        """int64 [R, N]: that leave each rank for each node."""
        num_ranks = len(self.rows)
        by_node = self.rows.reshape(num_ranks, num_ranks // ranks_per_node, ranks_per_node).sum(axis=2)
        sent: Array = by_node * self.row_bytes
        return sent

    @property
    def mean_bytes(self) -> float:
        """That leave a rank. As many come."""
        return float(self.sent_bytes.mean())

    @property
    def busiest_bytes(self) -> int:
        """Over the link of the busiest rank in its busier direction."""
        return int(max(self.sent_bytes.max(), self.received_bytes.max()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one operation moves."""

    network: Flow
    nvlink: Flow

    def floor_s(self, *, network_gbps: float, nvlink_gbps: float) -> float:
        """Time of the busiest link, if those of each rank carry so much each way. All else may overlap."""
        return max(
            self.network.busiest_bytes / network_gbps / 1e9, self.nvlink.busiest_bytes / nvlink_gbps / 1e9
        )


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens of all ranks go.

    Attributes:
        to_rank: int64 [R, R], tokens of each rank that go to each rank.
        to_node: int64 [R, N], tokens of each rank that go to each node.
        ranks_per_node: consecutive ranks that share NVLink.
    """

    to_rank: Array
    to_node: Array
    ranks_per_node: int

    @classmethod
    def of(cls, topk_idx: Sequence[Array], *, num_experts: int, ranks_per_node: int) -> Routes:
        """From the ids [T, K] of every rank. Ids that do not exist are none, as for the kernels.

        Raises:
            ConfigError: experts do not divide by ranks, or ranks by `ranks_per_node`.
        """
        num_ranks = len(topk_idx)
        num_local_experts = local_experts(num_experts, num_ranks)
        num_nodes = num_nodes_of(num_ranks, ranks_per_node)
        to_rank = np.zeros((num_ranks, num_ranks), np.int64)
        to_node = np.zeros((num_ranks, num_nodes), np.int64)
        for rank, ids in enumerate(topk_idx):
            token, k = np.nonzero((ids >= 0) & (ids < num_experts))
            goes = np.zeros((len(ids), num_ranks), np.bool_)
            goes[token, ids[token, k] // num_local_experts] = True
            to_rank[rank] = goes.sum(axis=0)
            to_node[rank] = goes.reshape(len(ids), num_nodes, ranks_per_node).any(axis=2).sum(axis=0)
        return cls(to_rank, to_node, ranks_per_node)

    @property
    def network_rows(self) -> Array:
        """int64 [R, R]: that a dispatch sends from rank to rank over the network."""
        num_ranks, size = len(self.to_rank), self.ranks_per_node
        rank = np.arange(num_ranks)
        rows = np.zeros((num_ranks, num_ranks), np.int64)
        for node in range(num_ranks // size):
            others = rank[rank // size != node]
            rows[others, node * size + others % size] = self.to_node[others, node]
        return rows

    @property
    def nvlink_rows(self) -> Array:
        """int64 [R, R]: that a dispatch stores from rank to rank over NVLink."""
        num_ranks, size = len(self.to_rank), self.ranks_per_node
        rows = np.zeros((num_ranks, num_ranks), np.int64)
        for rank in range(num_ranks):
            first = rank // size * size
            here = slice(first, first + size)
            # Its own tokens, and those of its local index on other nodes.
            rows[rank, here] = self.to_rank[rank % size :: size, here].sum(axis=0)
        np.fill_diagonal(rows, 0)
        return rows

    def plan(self, operation: str, row: ReceivedRow) -> Plan:
        """Of an operation of bench: a dispatch or a combine, whichever its name begins with."""
        return self.combine(row) if operation.startswith("combine") else self.dispatch(row)

    def dispatch(self, row: ReceivedRow, *, given: ReceivedRow | None = None, by_ranks: bool = False) -> Plan:
        """Of rows as they are received.

        Args:
            given: of rows as they are given, where they are cast on their way: the network carries those.
            by_ranks: routing is given by ranks, without expert ids. The network carries masks of ranks.
        """
        masks_bytes = node_masks_bytes(self.to_node.shape[1]) if by_ranks else 0
        return Plan(
            Flow(self.network_rows, record_bytes(given or row, masks_bytes)),
            Flow(self.nvlink_rows, row.total_bytes),
        )

    def combine(self, row: ReceivedRow) -> Plan:
        """Of rows, and of their weights where those are summed."""
        return Plan(Flow(self.network_rows.T, record_bytes(row)), Flow(self.nvlink_rows.T, row.total_bytes))

    def direct(self, row: ReceivedRow) -> Plan:
        """A dispatch of one level, for comparison: a token goes to each of its ranks by itself."""
        node = np.arange(len(self.to_rank)) // self.ranks_per_node
        is_here = node[:, None] == node
        nvlink_rows = np.where(is_here, self.to_rank, 0)
        np.fill_diagonal(nvlink_rows, 0)
        return Plan(
            Flow(np.where(is_here, 0, self.to_rank), record_bytes(row)), Flow(nvlink_rows, row.total_bytes)
        )


def num_nodes_of(num_ranks: int, ranks_per_node: int) -> int:
    """Of so many ranks.

    Raises:
        ConfigError: they would not all have as many ranks.
    """
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise ConfigError(f"{num_ranks} ranks cannot be divided into nodes of {ranks_per_node}")
    return num_ranks // ranks_per_node


def record_bytes(row: ReceivedRow, masks_bytes: int = 0) -> int:
    """Of a row on the network."""
    parts = row.row_bytes, row.sf_bytes, row.idx_bytes, row.weights_bytes, masks_bytes
    return Parts.of(parts).record_bytes

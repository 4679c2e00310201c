"""Lists of tokens that the ranks of one of several nodes dispatch among themselves, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ep_rt import reference
from ep_rt.cuda.layout import SEGMENTS
from ep_rt.cuda.plan import node_masks_bytes

from .machine import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentList:
    """Of one rank.

    Attributes:
        tokens: of each segment, which of the tokens of its rank.
        node: of this rank, so the number of its own segment.
        counts: [segments, ranks of the node], as in `SEGMENTS`.
        max_tokens: what the arguments say.
    """

    tokens: list[Array]
    node: int
    counts: Array
    max_tokens: int

    @property
    def first(self) -> list[int]:
        """The token at which each segment begins, and the end."""
        return [0, *(int(end) for end in np.cumsum([len(part) for part in self.tokens]))]

    @property
    def struct(self) -> Array:
        """`SEGMENTS` with garbage in what nobody may read."""
        segments = np.frombuffer(b"\x7b" * SEGMENTS.itemsize, SEGMENTS).copy()
        num, num_ranks = self.counts.shape
        segments["num_tokens"], segments["num"], segments["own"] = self.first[-1], num, self.node
        segments["first"][0, : num + 1] = self.first
        segments["counts"][0, :num, :num_ranks] = self.counts
        return segments

    def gather(self, arrays: Sequence[Array]) -> Array:
        """The list's part of arrays by segment."""
        return np.concatenate([array[part] for array, part in zip(arrays, self.tokens, strict=True)])

    def own(self, array: Array) -> Array:
        """Of an array over the list."""
        return array[self.first[self.node] : self.first[self.node + 1]]

    def landed(self, array: Array) -> Array:
        """What `own` leaves."""
        return np.concatenate([array[: self.first[self.node]], array[self.first[self.node + 1] :]])


def segment_lists(
    is_token_in_rank: Sequence[Array], *, node: int, num_local_ranks: int, slack: int
) -> list[SegmentList]:
    """Of the ranks of one node. `is_token_in_rank` is that of all ranks of all nodes.

    Args:
        slack: by which `max_tokens` exceeds the longest list.
    """
    here = slice(node * num_local_ranks, (node + 1) * num_local_ranks)
    num_nodes = len(is_token_in_rank) // num_local_ranks
    lists = []
    for local_rank in range(num_local_ranks):
        goes = [is_token_in_rank[n * num_local_ranks + local_rank][:, here] for n in range(num_nodes)]
        tokens = [
            np.arange(len(part)) if n == node else np.flatnonzero(part.any(axis=1))
            for n, part in enumerate(goes)
        ]
        counts = np.array([part.sum(axis=0) for part in goes], np.int32)
        lists.append(SegmentList(tokens=tokens, node=node, counts=counts, max_tokens=0))
    longest = max(each.first[-1] for each in lists)
    return [replace(each, max_tokens=longest + slack) for each in lists]


def node_masks(is_token_in_rank: Array, num_nodes: int, *, padding: int = 0) -> Array:
    """uint8 [T, N and padding]: bool [T, R] of all ranks, with a bit for each rank of a node."""
    num_tokens, num_ranks = is_token_in_rank.shape
    by_node = is_token_in_rank.reshape(num_tokens, num_nodes, num_ranks // num_nodes)
    masks = np.full((num_tokens, node_masks_bytes(num_nodes)), padding, np.uint8)
    masks[:, :num_nodes] = np.packbits(by_node, axis=2, bitorder="little")[:, :, 0]
    return masks


def over_lists(
    dispatched: Sequence[reference.Dispatched], lists: Sequence[SegmentList]
) -> list[reference.Dispatched]:
    """What the ranks of a node received, as if their lists were all the tokens there are.

    Rows stay where they are; sources are local ranks and tokens of their lists.
    """
    num_local_ranks, node = len(lists), lists[0].node
    received = []
    for each in dispatched[node * num_local_ranks : (node + 1) * num_local_ranks]:
        src_rank, src_token = each.src_rank.copy(), each.src_token.copy()
        for row in np.flatnonzero(each.src_rank >= 0):
            segment, local_rank = divmod(int(each.src_rank[row]), num_local_ranks)
            tokens = lists[local_rank]
            at = np.searchsorted(tokens.tokens[segment], each.src_token[row])
            src_rank[row], src_token[row] = local_rank, tokens.first[segment] + at
        received.append(replace(each, src_rank=src_rank, src_token=src_token))
    return received

"""Kernels that work on one rank alone: the expert-major layout, counts of a routing, copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ep_rt import reference
from ep_rt.cuda import kernels
from ep_rt.cuda.expert_major import PlacesLayout, expert_row_bytes
from ep_rt.cuda.handle import NUM_RECV_TOKENS_OFFSET
from ep_rt.cuda.layout import LOCAL_WORKSPACE

from . import normal
from .kernels import bound
from .machine import Array
from .normal import Handle, Landed
from .ranks import Ranks

_BLOCKS = 2


class ExpertMajor:
    """Of all ranks: results of layout "expert" behind dispatches, and their sums before combines."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        allocate = ranks.machine.allocate
        self.workspaces = [
            allocate(rank, LOCAL_WORKSPACE.itemsize, "local workspace") for rank in range(ranks.num_ranks)
        ]
        for workspace in self.workspaces:  # these kernels count their calls as collective ones do
            words = workspace.array(LOCAL_WORKSPACE, (1,))
            words["calls"] = ranks.epoch
            words["counts"] = (ranks.epoch << 32 | 7) & 0xFFFFFFFFFFFFFFFF

    def _common(self, rank: int) -> dict[str, int]:
        return {
            "header": self.ranks.slabs[rank].address,
            "hang": self.ranks.hangs[rank].address,
            "workspace": self.workspaces[rank].address,
            "timeout_ns": self.ranks.timeout_ns,
        }

    def expand(
        self,
        handle: Handle,
        landed: Sequence[Landed],
        expanded: Sequence[reference.Expanded],
        *,
        idx_bytes: int,
        alignment: int,
        num_local_experts: int,
        zero_padding: bool,
        is_exact: bool,
        places: Sequence[int] | None = None,
    ) -> list[int]:
        """From what landed to what `expanded` says.

        Args:
            places: of an earlier call, for a repeated dispatch.

        Returns:
            The block of each rank in which the places of its rows are kept.
        """
        ranks, made = self.ranks, []
        kernel = ranks.load.expand()
        for rank, (here, wanted) in enumerate(zip(landed, expanded, strict=True)):
            num_rows = len(handle.expected[rank].recv_x)
            num_topk = handle.num_topk
            at = PlacesLayout.of(
                row_capacity=num_rows, num_topk=num_topk, num_local_experts=num_local_experts
            )
            block = places[rank] if places else ranks.machine.allocate(rank, at.end, "places").address
            made.append(block)
            row, out_row = here.row, expert_row_bytes(here.row)
            out_at = out_row.layout(len(wanted.row))
            out = ranks.machine.allocate(rank, out_at.end, "expanded").address
            come = 0 if is_exact else handle.routing[rank].address + NUM_RECV_TOKENS_OFFSET
            from_at = row.layout(here.capacity)
            fields = {
                "num_recv_tokens": come,
                "x": here.base + from_at.x,
                "out_x": out + out_at.x,
                "sf": here.base + from_at.sf if row.sf_bytes else 0,
                "out_sf": out + out_at.sf if row.sf_bytes else 0,
                "topk_weights": here.base + from_at.topk_weights if row.weights_bytes else 0,
                "out_weights": out + out_at.topk_weights if row.weights_bytes else 0,
                "expert_row": block + at.expert_row,
                "psum": block + at.psum,
                "topk_idx": 0 if places else here.base + from_at.topk_idx,
                "num_needed_rows": 0 if places else block + at.num_needed_rows,
                "row_capacity": num_rows,
                "num_out_rows": len(wanted.row),
                "num_topk": num_topk,
                "num_local_experts": num_local_experts,
                "alignment": alignment,
                "row_bytes": row.row_bytes,
                "sf_row_bytes": row.sf_bytes,
                "idx_bytes": idx_bytes,
                "zero_padding": zero_padding,
                "is_cached": places is not None,
            }
            ranks.machine.launch(rank, kernel, bound(kernel, fields, self._common(rank)), _BLOCKS)
            is_there = np.full(len(wanted.row), True) if zero_padding else wanted.row >= 0
            ranks.compare("expanded x", rank, out + out_at.x, wanted.x, where=is_there)
            ranks.compare("expanded sf", rank, out + out_at.sf, wanted.sf, where=is_there)
            if places is None:
                ranks.compare("expanded weights", rank, out + out_at.topk_weights, wanted.weights)
                ranks.compare("psum", rank, block + at.psum, wanted.psum_num_tokens_per_expert)
                needed = np.array([wanted.num_needed_rows], np.int64)
                ranks.compare("num_needed_rows", rank, block + at.num_needed_rows, needed)
        return made

    def combine(
        self,
        y: Sequence[Array],
        handle: Handle,
        expanded: Sequence[reference.Expanded],
        blocks: Sequence[int],
        *,
        num_local_experts: int,
        is_weighted: bool,
        is_exact: bool,
        places: Sequence[int],
    ) -> None:
        """Sum the expert-major rows `y` of every received token, in the slab, and combine the sums."""
        ranks = self.ranks
        kernel = ranks.load.collapse(y[0].dtype.name)
        collapsed = []
        for rank, wanted in enumerate(expanded):
            num_rows = len(handle.expected[rank].recv_x)
            collapsed.append(reference.collapse(y[rank], wanted, num_rows, weighted=is_weighted))
            at = PlacesLayout.of(
                row_capacity=num_rows, num_topk=handle.num_topk, num_local_experts=num_local_experts
            )
            weights = wanted.weights if is_weighted else None
            come = 0 if is_exact else handle.routing[rank].address + NUM_RECV_TOKENS_OFFSET
            fields = {
                "num_recv_tokens": come,
                "expert_row": blocks[rank] + at.expert_row,
                "y": ranks.machine.put(rank, y[rank], "expert-major y"),
                "weights": ranks.machine.put(rank, weights, "weights"),
                "out": ranks.place(rank, places[rank])[0],
                "row_capacity": num_rows,
                "num_topk": handle.num_topk,
                "row_bytes": y[rank].itemsize * y[rank].shape[1],
            }
            ranks.machine.launch(rank, kernel, bound(kernel, fields, self._common(rank)), _BLOCKS)
        normal.combine(ranks, collapsed, handle, places=places, is_there=True)


def dispatch_layout(ranks: Ranks, rank: int, ids: Array, *, num_experts: int) -> None:
    """Counts of one rank's routing."""
    kernel = ranks.load.small(kernels.dispatch_layout())
    allocate = ranks.machine.allocate
    per_node = 2 if ranks.num_ranks % 2 == 0 else ranks.num_ranks
    wanted = reference.dispatch_layout(
        ids, num_experts=num_experts, num_ranks=ranks.num_ranks, ranks_per_node=per_node
    )
    assert wanted.num_tokens_per_node is not None
    outputs = {
        "num_tokens_per_rank": wanted.num_tokens_per_rank,
        "num_tokens_per_node": wanted.num_tokens_per_node,
        "num_tokens_per_expert": wanted.num_tokens_per_expert,
        "is_token_in_rank": wanted.is_token_in_rank.view(np.uint8),
    }
    addresses = {name: allocate(rank, array.nbytes, name).address for name, array in outputs.items()}
    fields = {
        "topk_idx": ranks.machine.put(rank, ids, "topk_idx"),
        "num_ranks": ranks.num_ranks,
        "ranks_per_node": per_node,
        "num_tokens": len(ids),
        "num_topk": ids.shape[1],
        "num_experts": num_experts,
        "idx_bytes": ids.itemsize,
    }
    ranks.machine.launch(rank, kernel, bound(kernel, {**fields, **addresses}), _BLOCKS)
    for name, array in outputs.items():
        ranks.compare(name, rank, addresses[name], array)


def contiguous(ranks: Ranks, rank: int, array: Array, view: Array) -> None:
    """A contiguous copy of `view`, a matrix of positive strides that begins where `array` does."""
    kernel = ranks.load.small(kernels.contiguous())
    destination = ranks.machine.allocate(rank, view.nbytes, "contiguous").address
    fields = {
        "source": ranks.machine.put(rank, array, "strided"),
        "destination": destination,
        "num_rows": view.shape[0],
        "num_columns": view.shape[1],
        "row_stride_bytes": view.strides[0],
        "column_stride_bytes": view.strides[1],
        "element_bytes": view.itemsize,
    }
    ranks.machine.launch(rank, kernel, bound(kernel, fields), _BLOCKS)
    ranks.compare("contiguous", rank, destination, np.ascontiguousarray(view))


def wire_limit(ranks: Ranks, sources: Sequence[Array], *, pulls: bool) -> None:
    """Every rank's [num_ranks, peer_bytes] to its peers, with a barrier before and one behind."""
    kernel = ranks.load.small(kernels.wire_limit())
    for rank, source in enumerate(sources):
        base, _ = ranks.place(rank, 0)
        put = ranks.machine.put(rank, source, "source")
        ranks.machine.copy(rank, base + source.nbytes, put, source.nbytes)
    ranks.barrier()
    for rank in range(ranks.num_ranks):
        fields = {
            "counters": ranks.machine.allocate(rank, 16, "counters").address,
            "peer_bytes": sources[rank].shape[1],
            "pulls": int(pulls),
        }
        ranks.machine.launch(rank, kernel, bound(kernel, fields, ranks.common(rank)), ranks.num_blocks)
    ranks.barrier()
    for rank in range(ranks.num_ranks):
        base, _ = ranks.place(rank, 0)
        for peer in range(ranks.num_ranks):
            if peer != rank:
                wanted = sources[peer][rank]
                ranks.compare("what came", rank, base + peer * wanted.nbytes, wanted)

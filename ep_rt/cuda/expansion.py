"""From what a dispatch delivered to the result of layout "expert"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..cuda_arrays import Column
from .domain import Call, Domain
from .expert_major import ExpertMajor, PlacesLayout, expert_row_bytes, num_expert_rows
from .handle import CudaDispatchHandle
from .heap import Block
from .layout import ReceivedRow
from .pool import Lease


class Landed(NamedTuple):
    """Where received rows lie.

    Attributes:
        capacity: that the place is laid out for.
        num_rows: that are there; the most that can be where `num_recv_tokens`, an address, is not 0.
    """

    lease: Lease
    capacity: int
    num_rows: int
    num_recv_tokens: int


class Made(NamedTuple):
    """A result: x, scale factors, ids and weights; with layout "expert" also what its handle keeps."""

    arrays: list[Any]
    num_rows: int
    places: Block | None = None
    psum: Any = None


class Expansion:
    """Makes the results of dispatches of certain shapes.

    Args:
        row: bytes of what is received, x and sf their columns.
        num_out_rows: of the result; 0 where lengths or a handle tell.
        frameworks: of x, and of the ids.
        num_blocks: that the kernel may use.
    """

    def __init__(
        self,
        domain: Domain,
        expert_major: ExpertMajor,
        *,
        row: ReceivedRow,
        x: Column,
        sf: Column | None,
        num_topk: int,
        num_local_experts: int,
        alignment: int,
        num_out_rows: int,
        zero_padding: bool,
        is_cached: bool,
        idx_bytes: int,
        frameworks: tuple[str, str],
        num_blocks: int,
    ) -> None:
        self._domain = domain
        self._row, self._out_row = row, expert_row_bytes(row)
        self._num_topk, self._num_local_experts = num_topk, num_local_experts
        self._alignment = alignment
        self._num_out_rows = num_out_rows
        self._is_cached = is_cached
        self._num_blocks = num_blocks
        self._launch = expert_major.expand(
            num_topk=num_topk,
            num_local_experts=num_local_experts,
            alignment=alignment,
            row_bytes=row.row_bytes,
            sf_row_bytes=row.sf_bytes,
            idx_bytes=idx_bytes,
            zero_padding=zero_padding,
            is_cached=is_cached,
        )
        weights = Column("float32", ()) if row.weights_bytes else None
        self._arrays = domain.results([x, sf, None, weights], frameworks[0])
        self._psum = domain.results([Column("int32", ())], frameworks[1])

    def run(
        self, call: Call, landed: Landed, lengths: Sequence[int] | None, handle: CudaDispatchHandle | None
    ) -> Made:
        """Enqueue the making of one result.

        Args:
            lengths: of the padded segments of all experts, where they say how many rows it has.
            handle: of the dispatch that is repeated.
        """
        domain, row = self._domain, self._row
        is_exact = lengths is not None
        if lengths is not None:
            num_rows = num_expert_rows(lengths, self._alignment)
        else:
            num_rows = self._num_out_rows if handle is None else handle.num_recv_rows
        at = PlacesLayout.of(
            row_capacity=landed.num_rows,
            num_topk=self._num_topk,
            num_local_experts=self._num_local_experts,
        )
        places = handle.places if handle is not None else None
        if places is None:
            places = domain.heap.take(at.end, is_capturing=call.is_capturing)
        out_at = self._out_row.layout(num_rows)
        out = domain.heap.take(out_at.end, is_capturing=call.is_capturing)
        base, here = domain.address(landed.lease), row.layout(landed.capacity)
        args = self._launch.args
        args.num_recv_tokens = 0 if is_exact else landed.num_recv_tokens
        args.row_capacity, args.num_out_rows = landed.num_rows, num_rows
        args.x, args.out_x = base + here.x, out.pointer + out_at.x
        if row.sf_bytes:
            args.sf, args.out_sf = base + here.sf, out.pointer + out_at.sf
        if row.weights_bytes:
            args.topk_weights = base + here.topk_weights
            args.out_weights = out.pointer + out_at.topk_weights
        args.expert_row = places.pointer + at.expert_row
        args.psum = places.pointer + at.psum
        if not self._is_cached:
            args.topk_idx = base + here.topk_idx
            args.num_needed_rows = places.pointer + at.num_needed_rows
        self._launch(call.stream, self._num_blocks)
        call.keep_with(out, landed.lease, places)
        arrays = self._arrays.over(
            out.pointer,
            out_at.end,
            out,
            ((out_at.x, num_rows), (out_at.sf, num_rows), (0, 0), (out_at.topk_weights, num_rows)),
        )
        if handle is not None:
            return Made(arrays, num_rows)
        psum = self._psum.over(places.pointer, at.end, places, [(at.psum, self._num_local_experts)])[0]
        return Made(arrays, num_rows, places, psum)

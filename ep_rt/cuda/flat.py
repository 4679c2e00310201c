"""A handle of the CUDA backend as arrays of bytes, which are the memory that it keeps, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .. import arrays
from ..arrays import ArrayView
from ..handle import FlatField, FlatLayout, FlatShape
from .domain import Domain
from .expert_major import PlacesLayout
from .handle import (
    EXPERT_COUNTS_OFFSET,
    NUM_RECV_TOKENS_OFFSET,
    CudaDispatchHandle,
    CudaHandleShape,
    LazyCounts,
    routing_bytes,
)
from .heap import Block


class _Part(NamedTuple):
    """Memory of somebody else, as a `Block` holds it."""

    ptr: int
    view: ArrayView


def layout(shape: FlatShape) -> FlatLayout:
    """The routing, and with layout "expert" the places."""
    num_recv_tokens = FlatField(0, NUM_RECV_TOKENS_OFFSET, 1)
    counts = FlatField(0, EXPERT_COUNTS_OFFSET, shape.num_local_experts)
    routing, nothing = routing_bytes(shape.handle.num_tokens), FlatField(0, 0, 0)
    if shape.handle.layout == "rank":
        return FlatLayout((routing,), num_recv_tokens, num_recv_tokens, counts, nothing, nothing)
    at = _places(shape)
    return FlatLayout(
        (routing, at.end),
        num_recv_tokens,
        FlatField(1, at.num_needed_rows, 1),  # the low half of an int64
        counts,
        FlatField(1, at.psum, shape.num_local_experts),
        FlatField(1, at.expert_row, shape.num_landed_rows * shape.handle.num_topk),
    )


def flatten(handle: CudaDispatchHandle, at: FlatLayout, domain: Domain, framework: str) -> list[Any]:
    """Arrays over the memory of the handle, which they keep.

    JAX waits for the communication stream, where calls with its arrays run.
    """
    blocks = [handle.routing] if handle.places is None else [handle.routing, handle.places]
    return [
        arrays.cuda_to_framework(
            block.pointer,
            (num_bytes,),
            "uint8",
            device=f"cuda:{domain.device}",
            framework=framework,
            owner=block,
            stream=domain.comm.pointer if framework == "jax" else None,
        )
        for block, num_bytes in zip(blocks, at.num_bytes, strict=True)
    ]


def unflatten(
    shape: FlatShape, flat: Sequence[ArrayView], domain: Domain, owner: object
) -> CudaDispatchHandle:
    """A handle over the memory of `flat`. Ranks do not compare which dispatch it is of."""
    routing, *places = [Block(domain.heap, _Part(view.pointer, view)) for view in flat]
    landed = CudaHandleShape(
        num_ranks=domain.group.size,
        num_local_experts=shape.num_local_experts,
        expert_alignment=shape.expert_alignment,
        num_landed_rows=shape.num_landed_rows,
    )
    return CudaDispatchHandle(
        owner=owner,
        shape=shape.handle,
        num_recv_tokens_per_expert_list=LazyCounts(domain.read, routing, landed),
        psum_num_tokens_per_expert=None,
        landed=landed,
        call=0,
        routing=routing,
        known_recv_tokens=shape.num_landed_rows if shape.is_exact else None,
        read=domain.read,
        places=places[0] if places else None,
        crossing=None,
    )


def _places(shape: FlatShape) -> PlacesLayout:
    return PlacesLayout.of(
        row_capacity=shape.num_landed_rows,
        num_topk=shape.handle.num_topk,
        num_local_experts=shape.num_local_experts,
    )

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
from .internode import Crossing, Internode, crossing_bytes, lists_bytes


class _Part(NamedTuple):
    """Memory of somebody else, as a `Block` holds it."""

    ptr: int
    view: ArrayView


def layout(shape: FlatShape, internode: Internode | None) -> FlatLayout:
    """The routing, with layout "expert" the places, and over several nodes what crosses the network.

    Raises:
        ConfigError: more tokens than any rank may have over several nodes.
    """
    num_tokens, num_topk = shape.handle.num_tokens, shape.handle.num_topk
    num_recv_tokens = num_needed_rows = FlatField(0, NUM_RECV_TOKENS_OFFSET, 1)
    counts = FlatField(0, EXPERT_COUNTS_OFFSET, shape.num_local_experts)
    psum = expert_row = FlatField(0, 0, 0)
    num_bytes = [routing_bytes(num_tokens if internode is None else internode.list_capacity(num_tokens))]
    if shape.handle.layout == "expert":
        at = _places(shape)
        num_bytes.append(at.end)
        num_needed_rows = FlatField(1, at.num_needed_rows, 1)  # the low half of an int64
        psum = FlatField(1, at.psum, shape.num_local_experts)
        expert_row = FlatField(1, at.expert_row, shape.num_landed_rows * num_topk)
    if internode is not None:
        num_bytes.append(crossing_bytes(lists_bytes(num_tokens, internode.num_nodes)))
    return FlatLayout(tuple(num_bytes), num_recv_tokens, num_needed_rows, counts, psum, expert_row)


def memory(handle: CudaDispatchHandle) -> list[Block]:
    """What a handle keeps, in the order of `layout`."""
    crossing = None if handle.crossing is None else handle.crossing.block
    return [block for block in (handle.routing, handle.places, crossing) if block is not None]


def flatten(handle: CudaDispatchHandle, at: FlatLayout, domain: Domain, framework: str) -> list[Any]:
    """Arrays over the memory of the handle, which they keep.

    JAX waits for the communication stream, where calls with its arrays run.
    """
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
        for block, num_bytes in zip(memory(handle), at.num_bytes, strict=True)
    ]


def unflatten(
    shape: FlatShape,
    flat: Sequence[ArrayView],
    domain: Domain,
    internode: Internode | None,
    *,
    owner: object,
) -> CudaDispatchHandle:
    """A handle over the memory of `flat`. Ranks do not compare which dispatch it is of."""
    blocks = iter([Block(domain.heap, _Part(view.pointer, view)) for view in flat])
    routing = next(blocks)
    places = next(blocks) if shape.handle.layout == "expert" else None
    crossing = None
    if internode is not None:
        num_nodes = internode.num_nodes
        crossing = Crossing.over(next(blocks), lists_bytes(shape.handle.num_tokens, num_nodes), num_nodes)
    landed = CudaHandleShape(
        num_ranks=domain.group.size if internode is None else internode.num_ranks,
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
        domain=domain,
        framework=flat[0].framework,
        places=places,
        crossing=crossing,
    )


def _places(shape: FlatShape) -> PlacesLayout:
    return PlacesLayout.of(
        row_capacity=shape.num_landed_rows,
        num_topk=shape.handle.num_topk,
        num_local_experts=shape.num_local_experts,
    )

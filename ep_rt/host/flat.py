"""A handle of the host backend as one array of bytes, and back."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..handle import ExpertRows, FlatField, FlatLayout, FlatShape, HostDispatchHandle

_WORD = np.dtype("<i4")


def layout(shape: FlatShape, num_ranks: int) -> FlatLayout:
    """Words first, then a byte for each (token, rank): whether the token goes there."""
    *fields, _, _ = _fields(shape, num_ranks)
    num_bytes = _num_words(shape, num_ranks) * _WORD.itemsize + shape.handle.num_tokens * num_ranks
    return FlatLayout((num_bytes,), *fields)


def flatten(handle: HostDispatchHandle, shape: FlatShape) -> NDArray[np.uint8]:
    rows = handle.expert_rows
    num_ranks = len(handle.recv_counts)
    psum, expert_row = np.empty(0, _WORD), np.empty(0, _WORD)
    if rows is not None:
        psum = arrays.host(handle.psum_num_tokens_per_expert)
        expert_row = np.full((shape.num_landed_rows, shape.handle.num_topk), -1, _WORD)
        is_there = np.flatnonzero(rows.received_row >= 0)
        expert_row[rows.received_row[is_there], rows.topk[is_there]] = is_there
    words = (
        (handle.num_recv_tokens, handle.num_needed_rows),
        handle.num_recv_tokens_per_expert_list,
        psum,
        expert_row.reshape(-1),
        handle.recv_counts,
        (0 if rows is None else rows.num_received_rows,),
    )
    in_rank = handle.is_token_in_rank.reshape(-1)
    out = arrays.empty_host(layout(shape, num_ranks).num_bytes, "uint8")
    end = len(out) - len(in_rank)
    out[:end].view(_WORD)[:] = np.concatenate([np.asarray(each, _WORD) for each in words])
    out[end:] = in_rank
    return out


def unflatten(
    shape: FlatShape, flat: NDArray[np.uint8], local_ranks: tuple[int, ...], owner: object
) -> HostDispatchHandle:
    """The handle again. It has copies of all that `flat` holds."""
    num_ranks = len(local_ranks)
    end = _num_words(shape, num_ranks) * _WORD.itemsize
    ends = [field.offset // _WORD.itemsize for field in _fields(shape, num_ranks)][1:]
    _, needed_rows, counts, psum, expert_row, recv_counts, received_rows = np.split(
        flat[:end].view(_WORD).copy(), ends
    )
    in_rank = flat[end:].view(np.bool_).reshape(shape.handle.num_tokens, num_ranks).copy()
    expert_rows = None
    if shape.handle.layout == "expert":
        rows = expert_row.reshape(shape.num_landed_rows, shape.handle.num_topk)
        received_row, topk = np.full((2, shape.handle.num_recv_rows), -1, np.int64)
        pairs = np.nonzero(rows >= 0)
        received_row[rows[pairs]], topk[rows[pairs]] = pairs
        expert_rows = ExpertRows(
            received_row=received_row,
            topk=topk,
            num_received_rows=int(received_rows[0]),
            num_needed_rows=int(needed_rows[0]),
        )
    return HostDispatchHandle(
        owner=owner,
        shape=shape.handle,
        num_recv_tokens_per_expert_list=counts.tolist(),
        psum_num_tokens_per_expert=psum if shape.handle.layout == "expert" else None,
        is_token_in_rank=in_rank,
        send_tokens=tuple(np.flatnonzero(column) for column in in_rank.T),
        recv_counts=tuple(recv_counts.tolist()),
        local_ranks=local_ranks,
        expert_rows=expert_rows,
    )


def _fields(shape: FlatShape, num_ranks: int) -> list[FlatField]:
    """Those of `FlatLayout`, then tokens from each rank, and those that are kept."""
    counts = _counts(shape, num_ranks)
    begins = accumulate(counts, initial=0)
    return [FlatField(0, begin * _WORD.itemsize, count) for begin, count in zip(begins, counts, strict=False)]


def _num_words(shape: FlatShape, num_ranks: int) -> int:
    return sum(_counts(shape, num_ranks))


def _counts(shape: FlatShape, num_ranks: int) -> tuple[int, ...]:
    num_psum, num_places = 0, 0
    if shape.handle.layout == "expert":
        num_psum, num_places = shape.num_local_experts, shape.num_landed_rows * shape.handle.num_topk
    return 1, 1, shape.num_local_experts, num_psum, num_places, num_ranks, 1

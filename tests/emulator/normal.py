"""Dispatch and combine of the normal mode: one call of all ranks, and what the oracle says of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ep_rt import reference
from ep_rt.cuda.digest import along
from ep_rt.cuda.handle import RESULT_OFFSET, SEND_PLAN_OFFSET, SEND_ROW_OFFSET, routing_bytes
from ep_rt.cuda.layout import (
    DISPATCH_RESULT,
    MAX_LOCAL_RANKS,
    OFFSET_UNIT,
    PAYLOAD_OFFSET,
    SEND_PLAN,
    ReceivedRow,
)
from ep_rt.cuda.plan import scratch_bytes

from .kernels import bound, host_reads
from .machine import Array, Memory
from .ranks import Ranks, stamped
from .segments import SegmentList


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """What a dispatch leaves for a combine or a repeated dispatch, of all ranks."""

    call: int
    num_tokens: list[int]
    num_topk: int
    num_rows: list[int]
    routing: list[Memory]
    expected: list[reference.Dispatched]
    segments: list[int]


@dataclass(frozen=True, slots=True)
class Landed:
    """Where a rank's received rows lie."""

    base: int
    capacity: int
    row: ReceivedRow


def dispatch(
    ranks: Ranks,
    x: Sequence[Array],
    expected: list[reference.Dispatched],
    *,
    ids: Sequence[Array] | None,
    weights: Sequence[Array] | None = None,
    sf: Sequence[Array] | None = None,
    num_experts: int = 0,
    num_worst_tokens: int = 0,
    quantizes: bool = False,
    handle: Handle | None = None,
    in_rank: Sequence[Array] | None = None,
    masks: Sequence[Array] | None = None,
    places: Sequence[int],
    max_redundant_tokens: int = 512,
    expert_alignment: int = 8,
    only: Collection[int] | None = None,
    digests: Sequence[int] | None = None,
    lists: Sequence[SegmentList] | None = None,
) -> tuple[Handle, list[Landed]]:
    """One dispatch; `expected` is what the oracle says of it.

    Args:
        lists: of several nodes: the tokens of all arrays are those of these lists.
        places: of the slab, by rank.
        in_rank, masks: for a dispatch without ids, on one node and of several.
        only: ranks that take part, if not all: a mistake of the program.
        digests: of the ranks' arguments, where they differ.
    """
    kernel = ranks.load.dispatch(quantizes=quantizes, segmented=lists is not None)
    ranks.num_calls += 1
    ranks.epoch += 1
    rows, landed = [], []
    segments: list[int] = handle.segments if handle is not None else []
    results: list[tuple[Memory, int]] = []  # what the host is told, or the handle keeps
    routing = handle.routing if handle is not None else []
    for rank in range(ranks.num_ranks):
        wanted = expected[rank]
        num_tokens = len(x[rank]) if lists is None else lists[rank].max_tokens
        num_topk = 0 if ids is None else ids[rank].shape[1]
        row = ReceivedRow(
            idx_bytes=0 if ids is None else num_topk * ids[rank].itemsize,
            weights_bytes=0 if weights is None else 4 * num_topk,
            sf_bytes=0 if wanted.recv_sf is None else wanted.recv_sf.itemsize * wanted.recv_sf.shape[1],
            row_bytes=wanted.recv_x.itemsize * wanted.recv_x.shape[1],
        )
        is_exact = handle is None and num_worst_tokens == 0
        room = row.capacity(ranks.place_bytes) if is_exact else len(wanted.recv_x)
        num_bytes = row.layout(room).end
        assert num_bytes <= ranks.place_bytes, "the case does not fit into a place of the slab"
        if handle is None:
            routing.append(ranks.machine.allocate(rank, routing_bytes(num_tokens), "routing"))
            if lists is not None:
                segments.append(ranks.machine.put(rank, lists[rank].struct, "segments"))
        scratch = ranks.machine.allocate(rank, scratch_bytes(num_tokens), "scratch")
        told = ranks.machine.allocate(rank, DISPATCH_RESULT.itemsize, "result") if is_exact else None
        # At the end of the place, so that a row too many lies beyond it.
        base, offset = ranks.place(rank, places[rank], before_end=num_bytes)
        if num_worst_tokens and handle is None:
            rows.append(num_worst_tokens)
        else:
            rows.append(len(wanted.recv_x))
        args = bound(
            kernel,
            {
                **_token_inputs(
                    ranks,
                    rank,
                    {"x": x, "sf": sf, "topk_idx": ids, "topk_weights": weights, "node_masks": masks},
                    None if lists is None else lists[rank],
                ),
                "segments": segments[rank] if segments else 0,
                "order": 0 if lists is None else _order(ranks, rank, lists[rank]),
                "first_expert": 0 if lists is None else lists[rank].node * num_experts,
                "node_masks_bytes": 0 if masks is None else masks[rank].shape[1],
                "is_token_in_rank": _input(
                    ranks, rank, None if in_rank is None else in_rank[rank], "in_rank"
                ),
                "result": told.address if told else routing[rank].address + RESULT_OFFSET,
                "send_row": routing[rank].address + SEND_ROW_OFFSET,
                "send_plan": routing[rank].address + SEND_PLAN_OFFSET,
                "masks": scratch.address + 4 * MAX_LOCAL_RANKS * num_tokens,
                "send_token": scratch.address,
                "call": ranks.num_calls,
                "digest": along(digests[rank] if digests else 77, 0 if handle is None else handle.call),
                "recv_offset": offset,
                "recv_capacity": room,
                "num_tokens": num_tokens,
                "num_topk": num_topk,
                "num_experts": num_experts,
                "row_bytes": row.row_bytes,
                "sf_row_bytes": row.sf_bytes,
                "idx_bytes": 0 if ids is None else ids[rank].itemsize,
                "is_cached": handle is not None,
                "fill_rows": num_worst_tokens if handle is None else 0,
                "max_redundant_tokens": max_redundant_tokens,
                "expert_alignment": expert_alignment,
            },
            ranks.common(rank),
        )
        if only is None or rank in only:
            ranks.machine.launch(rank, kernel, args, ranks.num_blocks)
        landed.append(Landed(base, room, row))
        _compare_received(ranks, rank, landed[-1], wanted, ids=ids, weights=weights)
        if told is not None:
            results.append((_read_by_host(ranks, rank, told), 0))
        elif handle is None:
            results.append((routing[rank], RESULT_OFFSET))
    for rank, (memory, at) in enumerate(results):
        _compare_told(ranks, rank, memory, at, expected, ids, [each.capacity for each in landed])
    if handle is not None:
        return handle, landed
    for rank, memory in enumerate(routing):
        _compare_counts(ranks, rank, memory, expected[rank], lists, None if ids is None else expert_alignment)
    made = Handle(
        call=ranks.num_calls,
        num_tokens=[len(each) for each in x],
        num_topk=0 if ids is None else ids[0].shape[1],
        num_rows=rows,
        routing=routing,
        expected=expected,
        segments=segments,
    )
    return made, landed


def _order(ranks: Ranks, rank: int, tokens: SegmentList) -> int:
    """What an exchange has left behind: all tokens of other nodes have landed, the last one first."""
    num_landed = tokens.first[-1] - len(tokens.tokens[tokens.node])
    words = [stamped(ranks.epoch, token) for token in reversed(range(num_landed))]
    return ranks.machine.put(rank, np.array(words, np.uint64), "order")


def _input(ranks: Ranks, rank: int, array: Array | None, name: str) -> int:
    """Of an input without elements nothing is read, but its address is not 0."""
    if array is not None and array.nbytes == 0:
        return ranks.slabs[rank].address + PAYLOAD_OFFSET
    return ranks.machine.put(rank, array, name)


def _token_inputs(
    ranks: Ranks, rank: int, given: dict[str, Sequence[Array] | None], tokens: SegmentList | None
) -> dict[str, int]:
    """The arguments that point to arrays of tokens, by name."""
    inputs = {}
    for name, arrays in given.items():
        array = None if arrays is None else arrays[rank]
        landed = None
        if tokens is not None and array is not None:
            array, landed = tokens.own(array), tokens.landed(array)
        inputs[name] = _input(ranks, rank, array, name)
        if tokens is not None:
            inputs[f"landed_{name}"] = _input(ranks, rank, landed, f"landed {name}")
    return inputs


def _compare_received(
    ranks: Ranks,
    rank: int,
    landed: Landed,
    expected: reference.Dispatched,
    *,
    ids: Sequence[Array] | None,
    weights: Sequence[Array] | None,
) -> None:
    at = landed.row.layout(landed.capacity)
    kept = min(expected.num_recv_tokens, len(expected.recv_x), landed.capacity)
    ranks.compare("recv_x", rank, landed.base + at.x, expected.recv_x[:kept])
    if expected.recv_sf is not None:
        ranks.compare("recv_sf", rank, landed.base + at.sf, expected.recv_sf[:kept])
    if ids is not None:
        # A worst-case result is filled up behind what came.
        got = expected.recv_topk_idx[: landed.capacity].astype(ids[rank].dtype)
        ranks.compare("recv_topk_idx", rank, landed.base, got)
    if weights is not None and expected.recv_topk_weights is not None:
        got = expected.recv_topk_weights[: landed.capacity]
        ranks.compare("recv_topk_weights", rank, landed.base + at.topk_weights, got)


def _read_by_host(ranks: Ranks, rank: int, told: Memory) -> Memory:
    """A copy by the rank's host, made as soon as it may, while kernels run."""
    kernel = ranks.load(host_reads())
    copy = ranks.machine.allocate(rank, DISPATCH_RESULT.itemsize, "result as the host read it")
    fields = {
        "result": told.address,
        "copy": copy.address,
        "call": ranks.num_calls,
        "timeout_ns": ranks.timeout_ns,
    }
    ranks.machine.launch(ranks.num_ranks + rank, kernel, bound(kernel, fields), 1)
    return copy


def _compare_told(
    ranks: Ranks,
    rank: int,
    memory: Memory,
    offset: int,
    expected: list[reference.Dispatched],
    ids: Sequence[Array] | None,
    capacities: Sequence[int],
) -> None:
    """What the host, or the handle, is told."""
    told = memory.array(DISPATCH_RESULT, (1,), offset=offset)
    wanted = expected[rank]
    number = ranks.num_calls
    overfull = sum(
        1 << each for each, capacity in enumerate(capacities) if expected[each].num_recv_tokens > capacity
    )

    def check() -> str | None:
        seen = told[0]
        experts = wanted.num_recv_tokens_per_expert
        facts: dict[str, tuple[object, object]] = {
            "num_recv_tokens": (int(seen["num_recv_tokens"]), wanted.num_recv_tokens),
            "overfull_ranks": (int(seen["overfull_ranks"]), overfull),
        }
        if offset == 0:  # a repeated dispatch stores its own number with the handle's result
            facts["call"] = int(seen["call"]), number
        if ids is not None:
            facts["expert_counts"] = (seen["expert_counts"][: len(experts)].tolist(), experts)
        for name, (got, right) in facts.items():
            if got != right:
                return f"{name} of rank {rank} is {got}, expected {right}"
        return None

    ranks.check(check)


def _compare_counts(
    ranks: Ranks,
    rank: int,
    routing: Memory,
    expected: reference.Dispatched,
    lists: Sequence[SegmentList] | None,
    expert_alignment: int | None,
) -> None:
    """What the handle is told of where tokens came from, the dropped ones included, and of experts if any."""
    plan = routing.array(SEND_PLAN, (1,), offset=SEND_PLAN_OFFSET)[0]
    counts = plan["recv_counts"][: ranks.num_ranks]

    def check() -> str | None:
        ends = plan["recv_ends"]
        facts = {
            "recv_ends": (ends[: ranks.num_ranks], np.cumsum(counts)),
            "the last of recv_ends": (ends[-1:], np.array([expected.num_recv_tokens])),
        }
        if lists is not None:
            segments = np.stack([each.counts[:, rank] for each in lists], axis=1)
            facts["segment_counts"] = plan["segment_counts"][: len(segments), : ranks.num_ranks], segments
            facts["recv_counts"] = counts, segments.sum(axis=0)
        elif not expected.overflow:  # the oracle has only those of rows that are kept
            kept = expected.src_rank[expected.src_rank >= 0]
            facts["recv_counts"] = counts, np.bincount(kept, minlength=ranks.num_ranks)
        if expert_alignment is not None:
            counted = np.array(expected.num_recv_tokens_per_expert)
            of_experts = -(-counted // expert_alignment) * expert_alignment
            facts["expert_ends"] = plan["expert_ends"][: len(of_experts)], np.cumsum(of_experts)
        for name, (seen, right) in facts.items():
            if not np.array_equal(seen, right):
                return f"{name} of rank {rank} is {seen.tolist()}, expected {right.tolist()}"
        return None

    ranks.check(check)


def combine(
    ranks: Ranks,
    y: Sequence[Array],
    handle: Handle,
    *,
    weights: Sequence[Array] | None = None,
    biases: Sequence[Sequence[Array]] = (),
    places: Sequence[int],
    num_stagers: int = 0,
    is_in_slab: bool = True,
    is_there: bool = False,
) -> None:
    """One combine of the rows of a dispatch, which must lie in the slab if it was of several nodes.

    Args:
        biases: at most two for each rank, in the order of addition.
        num_stagers: blocks that copy `y` into the slab, if it lies outside; they come on top. 0: some of
            those that sum.
        is_there: an earlier kernel has made `y` at its place in the slab.
    """
    element = y[0].dtype.name
    kernel = ranks.load.combine(element, segmented=bool(handle.segments))
    ranks.num_calls += 1
    ranks.epoch += 1
    expected = reference.combine(
        list(y),
        handle.expected,
        num_tokens=handle.num_tokens,
        topk_weights=None if weights is None else list(weights),
        bias=None if not biases else [tuple(each) for each in biases],  # type: ignore[misc]
    )
    for rank in range(ranks.num_ranks):
        base, offset = ranks.place(rank, places[rank])
        num_tokens = handle.num_tokens[rank]
        row_bytes = y[rank].itemsize * y[rank].shape[1]
        weights_at = -(-y[rank].nbytes // OFFSET_UNIT) * OFFSET_UNIT
        given = ranks.machine.put(rank, y[rank], "y") if y[rank].nbytes and not is_there else 0
        stages = not is_in_slab and given != 0
        if not stages and given and not ranks.is_failing:
            ranks.machine.copy(rank, base, given, y[rank].nbytes)
        if weights is not None and weights[rank].nbytes and not ranks.is_failing:
            values = ranks.machine.put(rank, weights[rank], "weights")
            ranks.machine.copy(rank, base + weights_at, values, weights[rank].nbytes)
        num_topk = 0 if weights is None else weights[rank].shape[1]
        out = ranks.machine.allocate(rank, num_tokens * row_bytes, "combined x")
        out_weights = ranks.machine.allocate(rank, 4 * num_tokens * num_topk, "combined weights")
        args = bound(
            kernel,
            {
                "send_row": handle.routing[rank].address + SEND_ROW_OFFSET,
                "send_plan": handle.routing[rank].address + SEND_PLAN_OFFSET,
                "y": given if stages else 0,
                "bias": [_input(ranks, rank, each, "bias") for each in biases[rank]] if biases else [],
                "out": out.address,
                "out_weights": out_weights.address,
                "digest": along(78, handle.call),
                "y_offset": offset,
                "weights_offset": offset + weights_at // OFFSET_UNIT,
                "segments": handle.segments[rank] if handle.segments else 0,
                "progress": ranks.machine.allocate(rank, 8 * num_tokens, "progress").address,
                "num_tokens": num_tokens,
                "num_rows": len(y[rank]),
                "row_bytes": row_bytes,
                "num_topk": num_topk,
                "num_pullers": ranks.num_blocks,
                "num_stagers": (num_stagers or max(1, ranks.num_blocks // 2)) if stages else 0,
            },
            ranks.common(rank),
        )
        ranks.machine.launch(rank, kernel, args, ranks.num_blocks + (num_stagers if stages else 0))
        ranks.expect("combined x", rank, out, expected[rank].x)
        if weights is not None:
            summed = expected[rank].topk_weights
            assert summed is not None
            ranks.expect("combined weights", rank, out_weights, summed)

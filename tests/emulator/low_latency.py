"""Calls of the low-latency mode, and random programs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ep_rt import reference
from ep_rt.cuda import kernels
from ep_rt.cuda import low_latency_plan as plan
from ep_rt.cuda.layout import (
    LOW_LATENCY_AREA,
    LOW_LATENCY_RECORD,
    LOW_LATENCY_STATE,
    MAX_LOW_LATENCY_RANKS,
    ROUTE,
)
from ep_rt.cuda.low_latency_plan import AreaLayout, AreaShape

from .kernels import bound
from .machine import Array, Memory
from .ranks import Ranks
from .runtime import Kind

SENDS, RECEIVES = 1, 2
BF16 = np.dtype(ml_dtypes.bfloat16)
DIGEST = 79


@dataclass(slots=True, kw_only=True)
class Dispatched:
    """A dispatch of all ranks, and what its combine needs."""

    ids: list[Array]
    weights: list[Array] | None
    zone: int
    is_in_zone: bool
    records: list[Memory]
    sent_ids: list[Memory]
    routes: list[Memory]
    expected: list[reference.LowLatencyDispatched]
    receive: Callable[[int], None]  # enqueue the receive phase of a rank
    compare: Callable[[int], None]  # copy what it made, to be compared


class LowLatency:
    """The calls of one area.

    Args:
        with_masks: late ranks are masked.
        reached: of an area over the network, for each pair of ranks whether stores of the first reach the
            second.
        num_blocks: that send rows, and that copy or add, at most.
    """

    def __init__(
        self,
        ranks: Ranks,
        shape: AreaShape,
        *,
        with_masks: bool,
        num_blocks: int,
        masks: list[Memory] | None = None,
        reached: Array | None = None,
    ) -> None:
        self.reached = reached
        self.ranks, self.shape, self.num_blocks = ranks, shape, num_blocks
        self.few_blocks = (num_blocks + 1) // 2  # of those of a combine that send
        self.layout = AreaLayout.of(shape)
        self.with_masks = with_masks
        allocate = ranks.machine.allocate
        every = range(ranks.num_ranks)
        kind = Kind.SYMMETRIC if shape.over_network else Kind.SLAB
        self.areas = [allocate(r, self.layout.num_bytes, "area", kind) for r in every]
        self.states = [allocate(r, LOW_LATENCY_STATE.itemsize, "state") for r in every]
        self.masks = masks or [allocate(r, 8 * MAX_LOW_LATENCY_RANKS, "masks") for r in every]
        self.num_calls = [0, 0]
        self.not_compared: frozenset[int] = frozenset()
        self.digests = [DIGEST] * ranks.num_ranks
        self.elsewhere: frozenset[int] = frozenset()  # ranks that do not make the next calls
        if shape.over_network:
            ranks.farewells = self._farewells
        for area, state in zip(self.areas, self.states, strict=True):
            self._leave_words(area, state)
            for zone in self.layout.combine:
                area.array(np.uint8)[zone.rows : zone.end] = plan.POISON
        self.others = self
        if shape.is_main and not with_masks and not shape.over_network:
            others = replace(shape, is_main=False, has_columns=True)
            self.others = LowLatency(ranks, others, with_masks=False, num_blocks=num_blocks, masks=self.masks)

    def _leave_words(self, area: Memory, state: Memory) -> None:
        """Words of the call before, which those of the first call must not be taken for."""
        old = (self.ranks.epoch << 32 | 7) & 0xFFFFFFFFFFFFFFFF
        head = area.array(LOW_LATENCY_AREA, (1,))
        for name in ("digests", "num_tokens", "flags", "told_ids", "told_weights"):
            head[name] = old
        words = area.array(np.uint64)
        for zone in self.layout.dispatch:
            words[zone.ids // 8 : zone.rows // 8] = old
        for back in self.layout.combine:
            words[back.weights // 8 : back.landed // 8] = (self.ranks.epoch << 33 | 7) & 0xFFFFFFFFFFFFFFFF
            words[back.landed // 8 : back.rows // 8] = old
        for name in ("decisions", "cleared", "listed"):
            state.array(LOW_LATENCY_STATE, (1,))[name] = old

    def _farewells(self, rank: int) -> list[int]:
        head = self.areas[rank].array(LOW_LATENCY_AREA, (1,))
        return [int(word) for word in head["farewells"][0]]

    def _common(self, rank: int) -> dict[str, Any]:
        shape = self.shape
        areas = [area.address for area in self.areas]
        if self.reached is not None:
            areas = [at if there else 0 for at, there in zip(areas, self.reached[rank], strict=True)]
        return {
            **self.ranks.low_latency_common(rank),
            "state": self.states[rank].address,
            "masks": self.masks[rank].address if self.with_masks else 0,
            "areas": areas,
            "digest": self.digests[rank],
            "num_max_tokens": shape.num_max_tokens,
            "num_topk": shape.num_topk,
            "num_experts": shape.num_experts,
            "hidden": shape.hidden,
            "max_send_blocks": self.num_blocks,
            "few_send_blocks": self.few_blocks,
        }

    def _zone(self, kind: int, *, is_fixed: bool) -> int:
        self.num_calls[kind] += not is_fixed
        return 2 * kind + self.num_calls[kind] % 2

    def _buffer(self, rank: int, num_bytes: int, name: str, *, fill: int = 0xA5) -> Memory:
        memory = self.ranks.machine.allocate(rank, num_bytes, name)
        memory.array(np.uint8)[:] = fill
        return memory

    def dispatch(
        self,
        x: Sequence[Array],
        ids: list[Array],
        *,
        weights: list[Array] | None = None,
        scales: int | None = None,
        layout: str = "expert",
        is_split: bool = False,
        is_fixed: bool = False,
        num_clear_blocks: int = 1,
        num_list_blocks: int = 1,
        num_copy_blocks: int = 1,
        repeats: Sequence[tuple[Sequence[Array], list[Array]]] = (),
        absent: Sequence[int] = (),
        overfull: int | None = None,
    ) -> Dispatched:
        """Enqueue a dispatch, or its send phase alone.

        Args:
            scales: None for bfloat16 rows, else a ScaleMode.
            is_fixed: in the zone of the last one, as a graph that is replayed does.
            repeats: rows and ids with which the same kernel runs again.
            absent: ranks that are masked: their tokens do not come.
            overfull: a rank whose ids are all 0 in truth.
        """
        ranks, shape = self.ranks, self.shape
        options: dict[str, Any] = {
            "num_max_dispatch_tokens_per_rank": shape.num_max_tokens,
            "num_experts": shape.num_experts,
            "use_fp8": scales is not None,
            "round_scale": scales in (1, 2),
            "use_ue8m0": scales == 2,
            "layout": layout,
        }
        every = range(ranks.num_ranks)

        def expect(x: Sequence[Array], ids: list[Array]) -> list[reference.LowLatencyDispatched]:
            there = [np.full_like(each, -1) if rank in absent else each for rank, each in enumerate(ids)]
            return reference.low_latency_dispatch(list(x), there, **options)

        expected = expect(x, ids)
        zone = self._zone(0, is_fixed=is_fixed)
        at = self.layout.dispatch[zone]
        kernel = ranks.load.small(
            kernels.low_latency_dispatch(quantizes=scales is not None, over_network=shape.over_network)
        )
        num_local, rows = shape.num_experts // shape.num_ranks, shape.num_ranks * shape.num_max_tokens
        scale_words = 0 if scales is None else shape.scale_words(packed=scales == 2)
        row_bytes = shape.hidden * (2 if scales is None else 1)
        is_packed = layout == "expert"
        arguments, outputs, given = [], [], []
        made = Dispatched(
            ids=ids, weights=weights, zone=zone, is_in_zone=not is_packed, records=[], sent_ids=[], routes=[],
            expected=expected, receive=lambda rank: None, compare=lambda rank: None,
        )  # fmt: skip
        for rank in every:
            made.records.append(self._buffer(rank, LOW_LATENCY_RECORD.itemsize, "record"))
            made.sent_ids.append(self._buffer(rank, 4 * ids[rank].size, "sent ids"))
            made.routes.append(self._buffer(rank, ROUTE.itemsize * rows * shape.num_topk, "routes"))
            out = {
                "recv_x": self._buffer(rank, num_local * rows * row_bytes, "recv_x") if is_packed else None,
                "recv_sf": self._buffer(rank, 4 * num_local * rows * scale_words, "recv_sf")
                if is_packed
                else None,
                "recv_count": self._buffer(rank, 4 * num_local, "recv_count"),
                "src_info": self._buffer(rank, 4 * num_local * rows, "src_info"),
                "expert_rows": None if is_packed else self._buffer(rank, 4 * num_local * rows, "expert_rows"),
                "layout_range": self._buffer(rank, 8 * num_local * shape.num_ranks, "layout_range"),
                "recv_stats": self._buffer(rank, 4 * num_local, "recv_stats", fill=0),
                "wait_stats": self._buffer(rank, 8 * shape.num_ranks, "wait_stats", fill=0),
            }
            outputs.append(out)
            machine = ranks.machine
            sent = np.zeros_like(ids[rank]) if rank == overfull else ids[rank]
            given.append((machine.put(rank, x[rank], "x"), machine.put(rank, sent, "ids")))
            arguments.append(
                {
                    **{name: 0 if each is None else each.address for name, each in out.items()},
                    "record": made.records[rank].address,
                    "sent_ids": made.sent_ids[rank].address,
                    "routes": made.routes[rank].address,
                    "x": given[rank][0],
                    "topk_idx": given[rank][1],
                    "topk_weights": 0 if weights is None else machine.put(rank, weights[rank], "weights"),
                    "has_weights": weights is not None,
                    "ids_offset": at.ids,
                    "weights_offset": at.weights,
                    "places_offset": at.places,
                    "rows_offset": at.rows,
                    "sf_offset": at.sf(shape),
                    "landed_offset": at.landed,
                    "out_ids_offset": at.out_ids,
                    "out_weights_offset": at.out_weights,
                    "out_rows_offset": at.out_rows,
                    "out_sf_offset": at.out_sf(shape),
                    "num_tokens": len(ids[rank]),
                    "idx_bytes": ids[rank].itemsize,
                    "scale_mode": scales or 0,
                    "zone": zone,
                    "num_clear_blocks": num_clear_blocks,
                    "num_list_blocks": num_list_blocks,
                    "num_copy_blocks": num_copy_blocks if is_packed else 0,
                }
            )
        sums = [np.zeros(num_local, np.int32) for _ in every]

        def launch(rank: int, phases: int) -> None:
            num_blocks = plan.dispatch_blocks(
                shape,
                len(ids[rank]),
                self.num_blocks,
                num_clear_blocks,
                num_list_blocks,
                num_copy_blocks if is_packed else 0,
            )
            args = bound(kernel, {**arguments[rank], "phases": phases}, self._common(rank))
            if rank not in self.elsewhere:
                ranks.machine.launch(rank, kernel, args, num_blocks[phases - 1])

        def compare(rank: int, wanted: list[reference.LowLatencyDispatched]) -> None:
            mine, out = wanted[rank], outputs[rank]
            sums[rank] = sums[rank] + mine.recv_count
            same = self._same
            same("recv_count", rank, out["recv_count"], mine.recv_count)
            same("layout_range", rank, out["layout_range"], mine.layout_range)
            same("src_info", rank, out["src_info"], mine.src_info)
            same("recv_stats", rank, out["recv_stats"], sums[rank])
            if is_packed:
                counts = mine.recv_count[:, None] > np.arange(rows)
                same("recv_x", rank, out["recv_x"], mine.recv_x, counts)
                if mine.sf is not None:
                    by_column = np.ascontiguousarray(mine.sf.transpose(0, 2, 1))
                    there = np.broadcast_to(counts[:, None], by_column.shape)
                    same("recv_sf", rank, out["recv_sf"], by_column, there)
            else:
                assert mine.expert_rows is not None
                same("expert_rows", rank, out["expert_rows"], mine.expert_rows)
                there = np.zeros(rows, bool)
                there[mine.expert_rows[mine.expert_rows >= 0]] = True
                there = there.reshape(shape.num_ranks, -1)
                area = self.areas[rank].address
                self._same_at("recv_x", rank, area + at.rows, mine.recv_x, there)
                if mine.sf is not None:
                    self._same_at("recv_sf", rank, area + at.sf(shape), mine.sf, there)

        for rank in every:
            launch(rank, SENDS if is_split else SENDS | RECEIVES)
        ranks.epoch += 1
        made.compare = lambda rank: compare(rank, made.expected)
        made.receive = lambda rank: launch(rank, RECEIVES)
        for again_x, again_ids in repeats:
            for rank in every:
                compare(rank, made.expected)
            made.expected, made.ids = expect(again_x, again_ids), again_ids
            for rank in every:
                for place, array in zip(given[rank], (again_x[rank], again_ids[rank]), strict=True):
                    if array.nbytes:
                        copy = ranks.machine.put(rank, array, "replayed")
                        ranks.machine.copy(rank, place, copy, array.nbytes)
                launch(rank, SENDS | RECEIVES)
            ranks.epoch += 1
        return made

    def combine(
        self,
        y: Sequence[Array],
        handle: Dispatched,
        ids: list[Array],
        weights: list[Array],
        *,
        reduce: str = "rank",
        wire: str = "bfloat16",
        is_split: bool = False,
        is_fixed: bool = False,
        num_sum_blocks: int = 1,
        dispatched_here: bool = True,
        missing: Sequence[Array] | None = None,
    ) -> Callable[[int], None]:
        """Enqueue a combine, or its send phase; the function that enqueues the receive phase of a rank."""
        ranks, shape = self.ranks, self.shape
        at_source = reduce == "source"
        if self.others is not self and (at_source or wire != "bfloat16"):
            return self.others.combine(
                y, handle, ids, weights, reduce=reduce, wire=wire, is_split=is_split, is_fixed=is_fixed,
                num_sum_blocks=num_sum_blocks, dispatched_here=False, missing=missing,
            )  # fmt: skip
        sends_weights = not at_source and handle.weights is None
        in_routes = not at_source and not sends_weights
        used = handle.ids if in_routes else ids
        if missing is not None:
            used = [np.where(gone, -1, each) for gone, each in zip(missing, used, strict=True)]
        given = handle.weights if in_routes and handle.weights else weights
        is_whole = all(np.array_equal(a, b) for a, b in zip(used, handle.ids, strict=True))
        if is_whole and not self.not_compared:
            expected = reference.low_latency_combine(
                list(y),
                handle.expected,
                handle.ids,
                given,
                use_logfmt=wire == "logfmt",
                use_fp8=wire == "fp8",
                reduce=reduce,
            )
        else:
            expected = combine_without(list(y), handle, used, given, wire=wire, reduce=reduce)
        zone = self._zone(1, is_fixed=is_fixed)
        at = self.layout.combine[zone - 2]
        polls = self.others is not self
        kernel = ranks.load.small(kernels.low_latency_combine(wire, over_network=shape.over_network))
        arguments = []
        for rank in range(ranks.num_ranks):
            out = self._buffer(rank, 2 * len(ids[rank]) * shape.hidden, "combined_x")
            put = ranks.machine.put
            arguments.append(
                (
                    out,
                    {
                        "record": self._buffer(rank, LOW_LATENCY_RECORD.itemsize, "record").address,
                        "dispatch_record": handle.records[rank].address,
                        "routes": handle.routes[rank].address,
                        "sent_ids": handle.sent_ids[rank].address,
                        "y": put(rank, y[rank], "y"),
                        "topk_idx": put(rank, ids[rank], "ids"),
                        "topk_weights": 0 if in_routes else put(rank, weights[rank], "weights") or 8,
                        "out": out.address,
                        "wait_stats": self._buffer(rank, 8 * shape.num_ranks, "wait_stats").address,
                        "weights_offset": at.weights,
                        "rows_offset": at.rows,
                        "landed_offset": at.landed,
                        "out_weights_offset": at.out_weights,
                        "out_rows_offset": at.out_rows,
                        "num_tokens": len(ids[rank]),
                        "idx_bytes": ids[rank].itemsize,
                        "sends_weights": sends_weights,
                        "sums_at_source": at_source,
                        "polls_data": polls,
                        "num_slots": shape.num_slots,
                        "zone": zone,
                        "dispatch_zone": handle.zone if dispatched_here else -1,
                        "num_sum_blocks": num_sum_blocks,
                    },
                )
            )

        def launch(rank: int, phases: int) -> None:
            num_blocks = plan.combine_blocks(
                shape, self.num_blocks, num_sum_blocks, sends_weights=bool(sends_weights)
            )
            args = bound(kernel, {**arguments[rank][1], "phases": phases}, self._common(rank))
            if rank not in self.elsewhere:
                ranks.machine.launch(rank, kernel, args, num_blocks[phases - 1])

        def receive(rank: int) -> None:
            launch(rank, RECEIVES)
            self._same("combined_x", rank, arguments[rank][0], expected[rank])

        for rank in range(ranks.num_ranks):
            launch(rank, SENDS if is_split else SENDS | RECEIVES)
            if not is_split:
                self._same("combined_x", rank, arguments[rank][0], expected[rank])
        ranks.epoch += 1
        return receive

    def _same(
        self, name: str, rank: int, memory: Memory | None, expected: Array, where: Array | None = None
    ) -> None:
        assert memory is not None
        self._same_at(name, rank, memory.address, expected, where)

    def _same_at(
        self, name: str, rank: int, address: int, expected: Array, where: Array | None = None
    ) -> None:
        """Copy an array away behind what is enqueued, and compare it in the end; `where`: what counts.

        A NaN that was made is like any other.
        """
        if expected.nbytes == 0 or self.ranks.is_failing or rank in self.not_compared:
            return
        wanted = np.ascontiguousarray(expected)
        copy = self.ranks.machine.allocate(rank, wanted.nbytes, f"copy of {name}")
        self.ranks.machine.copy(rank, copy.address, address, wanted.nbytes)
        here = copy.array(np.uint8, (wanted.nbytes,))
        raw = wanted.reshape(-1).view(np.uint8)

        def check() -> str | None:
            differs = (here != raw).reshape(*wanted.shape, wanted.itemsize).any(axis=-1)
            if name == "combined_x":
                differs &= ~(np.isnan(here.view(BF16).reshape(wanted.shape)) & np.isnan(wanted))
            if where is not None:
                differs &= where if where.ndim == differs.ndim else where[..., None]
            found = np.argwhere(differs)
            if not len(found):
                return None
            at = tuple(int(i) for i in found[0])
            got = here.view(wanted.dtype).reshape(wanted.shape)
            return f"{name} of rank {rank}: {at} is {got[at]!r}, expected {wanted[at]!r}"

        self.ranks.check(check)


def combine_without(
    y: list[Array], handle: Dispatched, used: list[Array], weights: list[Array], *, wire: str, reduce: str
) -> list[Array]:
    """The oracle's combine when some ids have been set to -1 since: each is dropped from the sums."""
    num_local = len(handle.expected[0].recv_count)
    num_ranks = len(y)

    def travelled(rows: Array) -> Array:
        if wire == "fp8":
            return reference.dequantize_fp8(*reference.quantize_fp8(rows))
        if wire == "logfmt":
            return reference.logfmt10_decode(reference.logfmt10_encode(rows))
        return rows.astype(np.float32)

    results = []
    for rank, ids in enumerate(handle.ids):
        row_of = reference_rows(ids, handle.expected, rank)
        out = np.zeros((len(ids), y[0].shape[2]), BF16)
        for token in range(len(ids)):
            total: Array | None = None

            def add(sum_: Array | None, term: Array) -> Array:
                return term if sum_ is None else sum_ + term

            with np.errstate(over="ignore", invalid="ignore"):
                for owner in range(num_ranks):
                    partial: Array | None = None
                    for k in range(ids.shape[1]):
                        expert = int(used[rank][token, k])
                        if expert < 0 or expert // num_local != owner or reduce == "source":
                            continue
                        row = y[owner][expert % num_local, row_of[token, k]].astype(np.float32)
                        partial = add(partial, weights[rank][token, k] * row)
                    if partial is not None:
                        total = add(total, travelled(partial.astype(BF16)[None])[0].astype(np.float32))
                if reduce == "source":
                    for k in range(ids.shape[1]):
                        expert = int(used[rank][token, k])
                        if expert < 0:
                            continue
                        row = y[expert // num_local][expert % num_local, row_of[token, k]]
                        term = travelled(row[None])[0].astype(np.float32)
                        total = add(total, weights[rank][token, k] * term)
                if total is not None:
                    out[token] = total.astype(BF16)
        results.append(out)
    return results


def reference_rows(ids: Array, dispatched: list[reference.LowLatencyDispatched], rank: int) -> Array:
    """[T, K]: the row, within its expert, of every pair of a rank."""
    num_local = len(dispatched[0].recv_count)
    row = np.full(ids.shape, -1, np.int64)
    for expert in range(num_local * len(dispatched)):
        begin = int(dispatched[expert // num_local].layout_range[expert % num_local, rank]) >> 32
        token, k = np.nonzero(ids == expert)
        row[token, k] = begin + np.arange(len(token))
    return row

"""One rank's arrays and calls of the low-latency mode, and what their results must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from .. import reference
from ..buffer import Buffer
from ..exchange import Group
from .layer import Call
from .options import SUMMED_AT_SOURCE, Options
from .places import TIMEOUT_S, Place, fetch
from .workload import BF16, FP8, Array, Element, Payload, Routing

# What experts return is so much smaller than the payload that LogFMT casts all sums.
_Y_SCALE: Final = np.float32(2.0**-9)

_PAIRS: Final = ("ll-pair", "ll-pair-packed")
"""A dispatch and its combine."""

_PACKED: Final = ("ll-dispatch-packed", "ll-pair-packed")
"""With layout "expert"."""

_COMBINES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ll-combine": {},
        "ll-combine-split": {},
        "ll-combine-fp8": {"use_fp8": True},
        "ll-combine-logfmt": {"use_logfmt": True},
        SUMMED_AT_SOURCE: {"reduce": "source"},
    }
)


class LowLatencyLayer:
    """Arrays that live as long as the measurements of one (element, number of tokens).

    Rows are bfloat16 and, for FP8, cast on their way. What the expert with number e returns for a row has
    salt + e; weights are one, so that float32 holds every sum exactly, and bfloat16 those of eight columns.
    """

    def __init__(
        self, group: Group, buffer: Buffer, place: Place, element: Element, routing: Routing, options: Options
    ) -> None:
        self.group, self.buffer, self.place = group, buffer, place
        self.element, self.routing = element, routing
        self.payload = Payload(BF16, options.hidden)
        self.salt = 0
        ids = routing.topk_idx[group.rank]
        self.tokens = np.arange(len(ids))
        self._names = options.low_latency_of(element.name)
        self._sources = [self._received(expert) for expert in range(routing.num_local_experts)]
        # Lists do not depend on the rows, so short ones do.
        self._lists = reference.low_latency_dispatch(
            [np.zeros((len(each), 1), np.uint8) for each in routing.topk_idx],
            routing.topk_idx,
            num_max_dispatch_tokens_per_rank=len(ids),
            num_experts=routing.num_experts,
            use_fp8=False,
            layout="rank",
        )[group.rank]
        shape = (routing.num_local_experts, group.size * len(ids), options.hidden)
        group.barrier()
        self._x = place.put(self.payload.rows(group.rank, self.tokens, self.salt))
        self._ids = place.put(ids)
        self._weights = place.put(np.ones(ids.shape, np.float32))
        self._y_there = np.zeros(shape, BF16.dtype)
        self._y = place.put(self._y_there)
        self._stats, self._waits, self._sum_waits = (
            place.put(np.zeros(num, dtype)) if options.with_stats else None
            for num, dtype in ((shape[0], np.int32), (group.size, np.int64), (group.size, np.int64))
        )
        self._counted = np.zeros(routing.num_local_experts, np.int32)
        group.barrier()
        # The first call of a shape sets up memory; the first of each kind are not to be captured.
        self.handle = self.dispatch("rank").handle
        self.combine()
        place.synchronize()
        group.barrier()

    def _received(self, local_expert: int) -> tuple[Array, Array]:
        """Source rank and token of the rows of an expert, in order."""
        expert = self.group.rank * self.routing.num_local_experts + local_expert
        tokens = [np.nonzero(ids == expert)[0] for ids in self.routing.topk_idx]
        return np.repeat(np.arange(len(tokens)), [len(each) for each in tokens]), np.concatenate(tokens)

    def calls(self) -> list[Call]:
        """The operations that were asked for."""
        runs: dict[str, Callable[[], Any]] = {
            "ll-dispatch": lambda: self.dispatch("rank"),
            "ll-dispatch-packed": lambda: self.dispatch("expert"),
            "ll-pair": lambda: self.pair("rank"),
            "ll-pair-packed": lambda: self.pair("expert"),
        }
        runs |= {name: partial(self.combine, **how) for name, how in _COMBINES.items()}
        begins: dict[str, Callable[[], Any]] = {
            "ll-dispatch-split": partial(self.dispatch, "rank", return_recv_hook=True),
            "ll-combine-split": partial(self.combine, return_recv_hook=True),
        }
        runs |= {name: partial(_both_phases, begin) for name, begin in begins.items()}
        return [
            Call(name=name, run=runs[name], can_be_captured=True, begin=begins.get(name))
            for name in self._names
        ]

    # Operations.

    def dispatch(self, layout: str, **options: Any) -> Any:
        return self.buffer.low_latency_dispatch(
            self._x,
            self._ids,
            len(self.tokens),
            self.routing.num_experts,
            use_fp8=self.element is FP8,
            topk_weights=self._weights,
            layout=layout,
            cumulative_local_expert_recv_stats=self._stats,
            dispatch_wait_recv_cost_stats=self._waits,
            **options,
        )

    def combine(self, handle: Any = None, **how: Any) -> Any:
        return self.buffer.low_latency_combine(
            self._y,
            self._ids,
            self._weights,
            handle or self.handle,
            combine_wait_recv_cost_stats=self._sum_waits,
            **how,
        )

    def pair(self, layout: str) -> Any:
        out = self.dispatch(layout)
        return out, self.combine(out.handle)

    # Contents.

    def renew(self) -> None:
        """Other rows, so that what an earlier call left is not taken for what this one did."""
        self.salt += self.routing.num_experts
        self.place.write(self._x, self.payload.rows(self.group.rank, self.tokens, self.salt))
        first = self.group.rank * self.routing.num_local_experts
        for number, (src_rank, src_token) in enumerate(self._sources):
            rows = self.payload.rows(src_rank, src_token, self.salt + first + number)
            self._y_there[number, : len(rows)] = rows * _Y_SCALE
        self.place.write(self._y, self._y_there)
        if self._stats is not None:
            self._counted = fetch(self.place, self._stats, np.int32)

    def problem(self, call: Call, out: Any) -> str | None:
        """What is wrong with a result; None if nothing is."""
        if call.name in _COMBINES:
            return self._combined(out, call.name)
        dispatched, combined = out if call.name in _PAIRS else (out, None)
        found = self._dispatched(dispatched, is_packed=call.name in _PACKED)
        return found if found or combined is None else self._combined(combined, "ll-combine")

    def _dispatched(self, out: Any, *, is_packed: bool) -> str | None:
        recv_x, recv_sf = out.recv_x if self.element is FP8 else (out.recv_x, None)
        counts = fetch(self.place, out.recv_count, np.int32)
        expected = [len(tokens) for _, tokens in self._sources]
        if counts.tolist() != expected:
            return f"rows of the experts are {counts.tolist()}, expected {expected}"
        if self._stats is not None:
            added = (fetch(self.place, self._stats, np.int32) - self._counted).tolist()
            if added != expected:
                return f"{added} rows of the experts were added to their count, expected {expected}"
        found = self._different_list(out.handle, is_packed=is_packed)
        if found is not None:
            return f"{found} of the handle is not that of ep_rt.reference"
        rows = np.concatenate([part.copy() for _, part in self.place.chunks(recv_x)])
        rows = rows.reshape(-1, self.payload.hidden * self.element.dtype.itemsize)
        scales = None
        if recv_sf is not None:
            scales = self._scales(recv_sf, is_packed=is_packed)
        num_rows = self.group.size * len(self.tokens)
        for number, (src_rank, src_token) in enumerate(self._sources):
            at = number * num_rows + np.arange(len(src_token))
            if not is_packed:
                at = src_rank * len(self.tokens) + src_token
            wanted = self.payload.rows(src_rank, src_token, self.salt)
            parts = {"row": (rows, wanted)}
            if scales is not None:
                wanted, wanted_scales = reference.quantize_fp8(wanted)
                parts = {"row": (rows, wanted), "the scale factors of row": (scales, wanted_scales)}
            for name, (got, sent) in parts.items():
                different = np.flatnonzero((got[at] != sent.view(got.dtype)).any(axis=1))
                if len(different):
                    row = int(different[0])
                    origin = f"token {src_token[row]} of rank {src_rank[row]}"
                    return f"{name} {row} of local expert {number}, {origin}: not what was sent"
        return None

    def _scales(self, recv_sf: Any, *, is_packed: bool) -> Array:
        """uint32 [rows, S]: the bits. Packed, they lie in columns."""
        there = recv_sf.swapaxes(1, 2) if is_packed else recv_sf
        bits = fetch(self.place, there, np.uint32)
        bits = bits.swapaxes(1, 2) if is_packed else bits
        return bits.reshape(-1, bits.shape[-1])

    def _different_list(self, handle: Any, *, is_packed: bool) -> str | None:
        """The name of one that is not the oracle's; None if all are."""
        lists = self._lists
        wanted = {
            "src_info": lists.src_info,
            "layout_range": lists.layout_range,
            "expert_rows": None if is_packed else lists.expert_rows,
        }
        for name, expected in wanted.items():
            there = getattr(handle, name)
            if expected is None or there is None:
                is_same = expected is there
            else:
                is_same = there.shape == expected.shape and np.array_equal(
                    fetch(self.place, there, expected.dtype), expected
                )
            if not is_same:
                return name
        return None

    def _combined(self, out: Any, name: str) -> str | None:
        ids = self.routing.topk_idx[self.group.rank]
        wanted = np.zeros((len(self.tokens), self.payload.hidden), np.float32)
        for rank in range(self.group.size):
            partial_sums = np.zeros_like(wanted)
            is_here = ids // self.routing.num_local_experts == rank
            for expert in np.unique(ids[is_here]):
                token, _ = np.nonzero(ids == expert)
                rows = self.payload.rows(self.group.rank, self.tokens[token], self.salt + int(expert))
                np.add.at(partial_sums, token, rows.astype(np.float32) * _Y_SCALE)
            wanted += _arrived(partial_sums, name)
        got = fetch(self.place, out.combined_x, BF16.dtype).astype(np.float32)
        different = np.flatnonzero((got != wanted.astype(BF16.dtype).astype(np.float32)).any(axis=1))
        return f"the sum of token {different[0]} differs" if len(different) else None


def _both_phases(begin: Callable[[], Any]) -> Any:
    """The send phase of a call, and at once its receive phase."""
    out = begin()
    out.hook()
    return out


def _arrived(sums: Array, name: str) -> Array:
    """float32: what the sums of a rank add to the total."""
    if name == SUMMED_AT_SOURCE:
        return sums
    rows = sums.astype(BF16.dtype)
    if name == "ll-combine-fp8":
        return reference.dequantize_fp8(*reference.quantize_fp8(rows))
    if name == "ll-combine-logfmt":
        rows = reference.logfmt10_decode(reference.logfmt10_encode(rows))
    arrived: Array = rows.astype(np.float32)
    return arrived


def open_low_latency_buffer(group: Group, place: Place, routing: Routing, options: Options) -> Buffer:
    """A buffer with room for the calls of `LowLatencyLayer`."""
    num_tokens = len(routing.topk_idx[0])
    num_bytes = Buffer.get_low_latency_rdma_size_hint(
        num_tokens,
        options.hidden,
        group.size,
        options.num_experts,
        num_topk=options.num_topk,
        # Casts, and rows for each column, have landing zones of their own, and so has everything with masks.
        with_columns=options.with_masks or any(_COMBINES.get(name) for name in options.operations),
    )
    return Buffer(
        group,
        num_rdma_bytes=2 * num_bytes if place.setting.backend == "cuda" else 0,
        low_latency_mode=True,
        allow_nvlink_for_low_latency_mode=not options.with_puts,
        enable_shrink=options.with_masks,
        num_low_latency_sms=options.num_low_latency_sms,
        backend=place.setting.backend,
        timeout_s=TIMEOUT_S,
    )

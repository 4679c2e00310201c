"""Normal mode on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays, reference
from ..arrays import ArrayView
from ..errors import ArrayError, ConfigError, EpError
from ..events import EventOverlap
from ..handle import DispatchHandle, ExpertRows, FlatLayout, FlatShape, HandleShape, HostDispatchHandle
from ..requests import CombineRequest, DispatchRequest, LayoutRequest, Place, Schedule, local_experts
from ..results import Combined, Dispatched, DispatchLayout
from ..topology import Topology
from . import expert_major, flat
from .peers import Announcement, Peers, attempt
from .rows import Array, Term, as_bytes, sum_terms


class HostEngine:
    """Dispatch and combine in NumPy. Every operation is complete when its call returns."""

    place = Place("cpu")

    def __init__(self, peers: Peers, topology: Topology, *, owner: object) -> None:
        self._peers = peers
        self._owner = owner
        self._rank = peers.group.rank
        self._num_ranks = peers.group.size
        self._topology = topology
        self._local_ranks = topology.local_rank_of_rank

    def reset(self) -> None:
        self._peers.agree("reset", Announcement())

    # Flat handles, see `Buffer`.

    def flat_layout(self, shape: FlatShape) -> FlatLayout:
        return flat.layout(shape, self._num_ranks)

    def flatten_handle(self, handle: DispatchHandle, shape: FlatShape, framework: str) -> list[Any]:
        assert isinstance(handle, HostDispatchHandle)
        return [arrays.to_framework(flat.flatten(handle, shape), framework)]

    def unflatten_handle(self, shape: FlatShape, parts: Sequence[Any]) -> HostDispatchHandle:
        [part] = parts
        return flat.unflatten(shape, arrays.host(part, name="handle"), self._local_ranks, self._owner)

    # Calls.

    def get_dispatch_layout(
        self,
        topk_idx: object,
        num_experts: int,
        build: Callable[[object, int], LayoutRequest],
        schedule: Schedule,
    ) -> DispatchLayout:
        _wait_for(schedule)
        request = build(topk_idx, num_experts)
        ids = read_topk_idx(request.topk_idx, request.num_experts)
        is_token_in_rank = token_in_rank(ids, request.num_experts, self._num_ranks)
        per_node = None
        if self._topology.num_nodes > 1:
            nodes = [self._topology.ranks_of(node) for node in range(self._topology.num_nodes)]
            per_node = np.array([is_token_in_rank[:, ranks].any(axis=1).sum() for ranks in nodes], np.int32)
        framework = request.topk_idx.framework
        return DispatchLayout(
            num_tokens_per_rank=arrays.to_framework(is_token_in_rank.sum(axis=0, dtype=np.int32), framework),
            num_tokens_per_rdma_rank=None if per_node is None else arrays.to_framework(per_node, framework),
            num_tokens_per_expert=arrays.to_framework(count_experts(ids, request.num_experts), framework),
            is_token_in_rank=arrays.to_framework(is_token_in_rank, framework),
            event=EventOverlap(),
        )

    def dispatch(
        self,
        given: tuple[Any, ...],
        options: tuple[Any, ...],
        build: Callable[..., DispatchRequest],
        schedule: Schedule,
    ) -> Dispatched:
        _wait_for(schedule)
        plan = attempt(lambda: self._plan_dispatch(build(*given, *options)))
        payloads = self._peers.agree("dispatch", plan if isinstance(plan, EpError) else plan.announcement())
        assert not isinstance(plan, EpError)  # agree raised it
        request = plan.request
        recv_counts = [int(num_tokens_per_rank[self._rank]) for num_tokens_per_rank, _ in payloads]
        num_recv_tokens = sum(recv_counts)
        num_rows = request.handle.num_recv_rows if request.handle else request.num_worst_tokens
        num_rows = num_rows or num_recv_tokens

        moved = [
            self._move(array, plan.send_tokens, recv_counts, num_rows if request.layout == "rank" else 0)
            for array in (plan.x, plan.sf, plan.topk_idx, plan.topk_weights)
        ]
        for _, transfer in moved:
            if transfer is not None:
                transfer.receive(timeout_s=self._peers.timeout_s)
        recv_x, recv_sf, recv_idx, recv_weights = (array for array, _ in moved)

        num_local_experts = request.num_experts // self._num_ranks
        if recv_idx is not None:
            recv_idx[num_recv_tokens:] = -1
            recv_idx -= self._rank * num_local_experts
            elsewhere = (recv_idx < 0) | (recv_idx >= num_local_experts)
            recv_idx[elsewhere] = -1
            if recv_weights is not None:
                recv_weights[num_recv_tokens:] = 0
                recv_weights[elsewhere] = 0

        first_expert = self._rank * num_local_experts
        everywhere = np.sum([counts for _, counts in payloads], axis=0)
        per_expert = _aligned(
            everywhere[first_expert : first_expert + num_local_experts], request.expert_alignment
        )
        if request.layout == "expert":
            handle = self._expert_major_handle(plan, recv_idx, recv_counts, per_expert)
            num_rows = handle.num_recv_rows
            assert handle.expert_rows is not None
            rows = handle.expert_rows
            recv_x, recv_sf = (
                None
                if array is None
                else expert_major.expand(
                    array, rows, zero_padding=request.zero_padding, pool=self._peers.pool
                )
                for array in (recv_x, recv_sf)
            )
            recv_idx = None
            if recv_weights is not None:
                recv_weights = expert_major.expand_weights(recv_weights, rows)
        elif request.handle is not None:
            handle = _host_handle(request)
        else:
            handle = self._new_handle(
                plan, recv_counts, num_recv_rows=num_rows, num_recv_tokens_per_expert_list=per_expert
            )

        def result(array: Array | None) -> Any:
            return None if array is None else arrays.to_framework(array[:num_rows], request.x.framework)

        out_x = result(recv_x)
        return Dispatched(
            recv_x=out_x if recv_sf is None else (out_x, result(recv_sf)),
            recv_topk_idx=result(recv_idx),
            recv_topk_weights=result(recv_weights),
            num_recv_tokens_per_expert_list=handle.num_recv_tokens_per_expert_list,
            handle=handle,
            event=EventOverlap(),
        )

    def combine(
        self, given: tuple[Any, ...], build: Callable[..., CombineRequest], schedule: Schedule
    ) -> Combined:
        _wait_for(schedule)
        request = attempt(lambda: build(*given))
        announced: Announcement | EpError
        if isinstance(request, EpError):
            announced = request
        else:
            # Rows that did not fit into num_worst_tokens cannot come back: say how many of each source can.
            handle = _host_handle(request)
            experts = handle.expert_rows
            num_rows = handle.num_recv_rows if experts is None else experts.num_received_rows
            ends = np.minimum(np.cumsum(handle.recv_counts), num_rows)
            weights = request.topk_weights
            announced = Announcement(
                facts={
                    "dtype of x": request.x.dtype,
                    "hidden": request.x.shape[1],
                    "columns of topk_weights": None if weights is None else weights.shape[1:],
                },
                payload=np.diff(ends, prepend=0).tolist(),
            )
        payloads = self._peers.agree("combine", announced)
        assert not isinstance(request, EpError)  # agree raised it
        counts = [delivered[self._rank] for delivered in payloads]
        y, weights = request.x.numpy(), request.topk_weights
        if experts is not None:
            factors = None if weights is None else weights.numpy()
            y, weights = expert_major.collapse(y, experts, factors, pool=self._peers.pool), None
        x = self._sum_rows(y, request, payloads[self._rank], counts, request.biases)
        weights_back = None
        if weights is not None:
            summed = self._sum_rows(weights.numpy(), request, payloads[self._rank], counts, ())
            weights_back = arrays.to_framework(summed, request.x.framework)
        return Combined(
            combined_x=arrays.to_framework(x, request.x.framework),
            combined_topk_weights=weights_back,
            event=EventOverlap(),
        )

    def _new_handle(
        self,
        plan: _DispatchPlan,
        recv_counts: Sequence[int],
        *,
        num_recv_rows: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_tokens_per_expert: Any = None,
        expert_rows: ExpertRows | None = None,
    ) -> HostDispatchHandle:
        return HostDispatchHandle(
            owner=self._owner,
            shape=HandleShape(
                num_tokens=len(plan.x),
                num_topk=0 if plan.topk_idx is None else plan.topk_idx.shape[1],
                num_recv_rows=num_recv_rows,
                layout=plan.request.layout,
            ),
            num_recv_tokens_per_expert_list=num_recv_tokens_per_expert_list,
            psum_num_tokens_per_expert=psum_num_tokens_per_expert,
            is_token_in_rank=plan.is_token_in_rank,
            send_tokens=plan.send_tokens,
            recv_counts=tuple(recv_counts),
            local_ranks=self._local_ranks,
            give=partial(arrays.to_framework, framework=plan.request.x.framework),
            expert_rows=expert_rows,
        )

    def _expert_major_handle(
        self,
        plan: _DispatchPlan,
        recv_idx: Array | None,
        recv_counts: Sequence[int],
        num_recv_tokens_per_expert_list: list[int],
    ) -> HostDispatchHandle:
        request = plan.request
        if request.handle is not None:
            return _host_handle(request)
        assert recv_idx is not None  # the layout needs ids
        assert request.topk_idx is not None
        num_recv_tokens = sum(recv_counts)
        num_kept = min(num_recv_tokens, request.num_worst_tokens or num_recv_tokens)
        layout = expert_major.lay_out(
            recv_idx[:num_kept],
            num_local_experts=request.num_experts // self._num_ranks,
            alignment=request.expert_alignment,
            num_recv_tokens=num_recv_tokens,
            num_worst_tokens=request.num_worst_tokens,
        )
        return self._new_handle(
            plan,
            recv_counts,
            num_recv_rows=len(layout.rows.received_row),
            num_recv_tokens_per_expert_list=num_recv_tokens_per_expert_list,
            psum_num_tokens_per_expert=arrays.to_framework(
                layout.psum_num_tokens, request.topk_idx.framework
            ),
            expert_rows=layout.rows,
        )

    def _plan_dispatch(self, request: DispatchRequest) -> _DispatchPlan:
        x, sf = request.x.numpy(), None if request.sf is None else request.sf.numpy()
        if request.quantize is not None:
            x, sf = reference.quantize_fp8(x)
        if request.handle is not None:
            handle = _host_handle(request)
            return _DispatchPlan(
                request=request,
                x=x,
                sf=sf,
                topk_idx=None,
                is_token_in_rank=handle.is_token_in_rank,
                send_tokens=handle.send_tokens,
                num_tokens_per_expert=np.zeros(0, np.int32),
            )
        topk_idx = in_rank = per_expert = None
        if request.topk_idx is not None:
            topk_idx = read_topk_idx(request.topk_idx, request.num_experts)
            in_rank = token_in_rank(topk_idx, request.num_experts, self._num_ranks)
            per_expert = count_experts(topk_idx, request.num_experts)
        in_rank = _given_or_computed("is_token_in_rank", request.is_token_in_rank, in_rank)
        per_expert = _given_or_computed("num_tokens_per_expert", request.num_tokens_per_expert, per_expert)
        return _DispatchPlan(
            request=request,
            x=x,
            sf=sf,
            topk_idx=topk_idx,
            is_token_in_rank=in_rank,
            send_tokens=tuple(np.flatnonzero(column) for column in in_rank.T),
            num_tokens_per_expert=per_expert,
        )

    def _move(
        self,
        array: Array | None,
        send_tokens: Sequence[NDArray[np.intp]],
        recv_counts: Sequence[int],
        num_rows: int,
    ) -> tuple[Array | None, Any]:
        """Start sending rows of `array`; the array they will arrive in, of at least `num_rows` rows."""
        if array is None:
            return None, None
        num_recv_tokens = sum(recv_counts)
        recv = self._peers.pool.empty((max(num_rows, num_recv_tokens), *array.shape[1:]), array.dtype)
        out = as_bytes(recv)[:num_recv_tokens]
        return recv, self._peers.send_rows(as_bytes(array), send_tokens, out, recv_counts)

    def _sum_rows(
        self,
        rows: Array,
        request: CombineRequest,
        send_counts: Sequence[int],
        counts: Sequence[int],
        biases: Sequence[ArrayView],
    ) -> Array:
        rows = np.ascontiguousarray(rows)
        row_shape = rows.shape[1:]
        arrived = self._peers.pool.empty((sum(counts), *row_shape), rows.dtype)
        transfer = self._peers.send_slices(as_bytes(rows), send_counts, as_bytes(arrived), counts)
        transfer.receive(timeout_s=self._peers.timeout_s)
        terms = []
        for dst, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
            mine = dst == self._rank
            first = sum(send_counts[: self._rank]) if mine else end - count
            source = rows if mine else arrived
            tokens = _host_handle(request).send_tokens[dst][:count]
            terms.append(Term(rows=source[first : first + count], tokens=tokens))
        total = self._peers.pool.empty((request.handle.num_tokens, *row_shape), rows.dtype)
        sum_terms(terms, [bias.numpy() for bias in biases], total)
        # The caller may overwrite its rows once this returns.
        transfer.finish(timeout_s=self._peers.timeout_s)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _DispatchPlan:
    request: DispatchRequest
    x: Array
    sf: Array | None
    topk_idx: Array | None
    is_token_in_rank: NDArray[np.bool_]
    send_tokens: tuple[NDArray[np.intp], ...]
    num_tokens_per_expert: Array

    @property
    def topk_weights(self) -> Array | None:
        weights = self.request.topk_weights
        return None if weights is None else weights.numpy()

    def announcement(self) -> Announcement:
        request = self.request
        sf = request.sf
        return Announcement(
            facts={
                "handle": "given" if request.handle is not None else None,
                "dtype of x": request.x.dtype,
                "hidden": request.x.shape[1],
                "sf": None if sf is None else (sf.dtype, sf.shape[1:]),
                "columns of topk_idx": None if request.topk_idx is None else request.topk_idx.shape[1],
                "dtype of topk_idx": None if request.topk_idx is None else request.topk_idx.dtype,
                "topk_weights": None if request.topk_weights is None else "given",
                "num_experts": request.num_experts,
                "expert_alignment": request.expert_alignment,
                "layout": request.layout,
                "quantize": request.quantize,
                "num_max_tokens_per_rank": request.num_max_tokens_per_rank,
            },
            payload=([len(tokens) for tokens in self.send_tokens], self.num_tokens_per_expert),
        )


def _wait_for(schedule: Schedule) -> None:
    if schedule.previous_event is not None:
        schedule.previous_event.synchronize()


def _host_handle(request: DispatchRequest | CombineRequest) -> HostDispatchHandle:
    assert isinstance(request.handle, HostDispatchHandle)  # its owner is this buffer
    return request.handle


def read_topk_idx(view: ArrayView, num_experts: int) -> Array:
    """The expert ids, checked."""
    topk_idx = view.numpy()
    if topk_idx.size and (topk_idx.min() < -1 or topk_idx.max() >= num_experts):
        bad = topk_idx[(topk_idx < -1) | (topk_idx >= num_experts)]
        raise ArrayError(
            f"topk_idx has expert id {bad.flat[0]}; ids go from 0 to {num_experts - 1}, -1 for none"
        )
    return topk_idx


def token_in_rank(topk_idx: Array, num_experts: int, num_ranks: int) -> NDArray[np.bool_]:
    """bool [T, R]: whether a token has an expert on a rank."""
    num_local_experts = local_experts(num_experts, num_ranks)
    rank = topk_idx // num_local_experts  # -1 // n is -1: the last column, cut off below
    in_rank = np.zeros((len(topk_idx), num_ranks + 1), np.bool_)
    in_rank[np.arange(len(topk_idx))[:, None], rank] = True
    return in_rank[:, :num_ranks]


def count_experts(topk_idx: Array, num_experts: int) -> NDArray[np.int32]:
    """int32 [E]: (token, k) pairs of each expert."""
    return np.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).astype(np.int32)


def _given_or_computed(name: str, given: ArrayView | None, computed: Array | None) -> Array:
    if given is None:
        assert computed is not None  # the request has one or the other
        return computed
    array = given.numpy()
    if computed is not None and not np.array_equal(array, computed):
        raise ConfigError(f"{name} is not that of topk_idx")
    return array


def _aligned(counts: NDArray[np.int32], alignment: int) -> list[int]:
    return [int(-(-count // alignment) * alignment) for count in counts]

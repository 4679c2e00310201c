"""Low-latency mode on the host: fixed capacity, expert-major results, receive hooks, masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays, reference
from ..arrays import ArrayView
from ..errors import ArrayError, ConfigError, EpError, HandleError
from ..events import EventOverlap
from ..exchange import LATE, PeerGroup, Transfer
from ..handle import HostLowLatencyHandle, LowLatencyHandle, LowLatencyHandleShape
from ..requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, Schedule
from ..results import LowLatencyCombined, LowLatencyDispatched
from .engine import count_experts, read_topk_idx, token_in_rank
from .peers import Announcement, Peers, attempt
from .rows import Array, Term, as_bytes, sum_terms

BFLOAT16 = arrays.np_dtype("bfloat16")


class HostLowLatency:
    """Each call sends before it returns; receiving is the hook's part, or the call's own without a hook.

    With `enable_shrink` a late rank is masked, and the call completes without its tokens and experts.
    """

    def __init__(self, peers: Peers, *, owner: object, enable_shrink: bool) -> None:
        self._peers = peers
        self._owner = owner
        self._rank = peers.group.rank
        self._num_ranks = peers.group.size
        self._enable_shrink = enable_shrink
        self._masked = np.zeros(self._num_ranks, np.bool_)
        self._combine_buffer: Array | None = None

    def close(self) -> None:
        """The last operation of the buffer, in either mode: peers have all they were sent when it returns."""
        group = self._peers.group
        if self._enable_shrink and isinstance(group, PeerGroup):
            # Ranks that others have lost come too, from whichever call was their last, and wait for these.
            late = group.part(
                op=f"close{self._peers.label}",
                timeout_s=self._peers.timeout_s,
                ranks=np.flatnonzero(~self._masked).tolist(),
            )
            self._masked[list(late)] = True
        else:
            self._agree("close", Announcement())
        if not self._masked.any():  # a lost rank takes nothing any more
            self._peers.finish_all()

    def dispatch(
        self,
        given: tuple[Any, ...],
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyDispatchRequest],
        *,
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyDispatched:
        plan = attempt(lambda: self._plan_dispatch(build(*given, *options), with_hook))
        counts = self._agree(
            "low_latency_dispatch", plan if isinstance(plan, EpError) else plan.announcement()
        )
        assert not isinstance(plan, EpError)  # agree raised it
        request = plan.request
        num_local_experts = request.num_experts // self._num_ranks
        num_rows = self._num_ranks * request.num_max_tokens_per_rank

        recv_counts = [0 if self._masked[src] else counts[src][self._rank] for src in range(self._num_ranks)]
        send_tokens = [
            tokens[:0] if self._masked[dst] else tokens for dst, tokens in enumerate(plan.send_tokens)
        ]
        sent = [array for array in (plan.x, plan.ids_and_token, plan.sf) if array is not None]
        staged = [self._peers.pool.empty((sum(recv_counts), *array.shape[1:]), array.dtype) for array in sent]
        transfers = [
            self._peers.send_rows(as_bytes(array), send_tokens, as_bytes(stage), recv_counts)
            for array, stage in zip(sent, staged, strict=True)
        ]

        is_by_rank = request.layout == "rank"
        shape = (num_local_experts, num_rows)
        if is_by_rank:
            shape = (self._num_ranks, request.num_max_tokens_per_rank)
        recv_x = self._peers.pool.empty((*shape, plan.x.shape[1]), plan.x.dtype)
        recv_sf = None
        if plan.sf is not None and is_by_rank:
            recv_sf = self._peers.pool.empty((*shape, plan.sf.shape[1]), plan.sf.dtype)
        elif plan.sf is not None:
            # Column-major within an expert, as a grouped GEMM wants to read it.
            by_column = self._peers.pool.empty((num_local_experts, plan.sf.shape[1], num_rows), plan.sf.dtype)
            recv_sf = by_column.transpose(0, 2, 1)
        recv_count = self._peers.pool.empty((num_local_experts,), np.int32)
        handle = HostLowLatencyHandle(
            owner=self._owner,
            lists=(
                self._peers.pool.empty((num_local_experts, num_rows), np.int32),
                self._peers.pool.empty((num_local_experts, self._num_ranks), np.int64),
                self._peers.pool.empty((num_local_experts, num_rows), np.int32) if is_by_rank else None,
            ),
            shape=LowLatencyHandleShape(
                num_tokens=plan.topk_idx.shape[0],
                num_topk=plan.topk_idx.shape[1],
                num_max_tokens_per_rank=request.num_max_tokens_per_rank,
                hidden=request.x.shape[1],
                num_experts=request.num_experts,
                framework=request.x.framework,
                layout=request.layout,
                has_weights=plan.topk_weights is not None,
            ),
            topk_idx=plan.topk_idx,
            topk_weights=plan.topk_weights,
        )

        def deliver() -> None:
            late = self._receive(transfers, request.wait_stats)
            x, ids_and_token = staged[:2]
            src = np.repeat(np.arange(self._num_ranks), recv_counts)
            local = ids_and_token[:, :-1] - self._rank * num_local_experts
            local[np.isin(src, late)] = -1
            row, k = np.nonzero((local >= 0) & (local < num_local_experts))
            expert = local[row, k]
            order = np.argsort(expert, kind="stable")  # by expert, then received row, then k
            row, expert = row[order], expert[order]
            from_src = np.bincount(
                expert * self._num_ranks + src[row], minlength=handle.layout_range.size
            ).reshape(handle.layout_range.shape)
            handle.layout_range[...] = ((np.cumsum(from_src, axis=1) - from_src) << 32) | from_src
            handle.src_info[...] = -1
            if is_by_rank:
                handle.expert_rows[...] = -1
                place = src * request.num_max_tokens_per_rank + ids_and_token[:, -1]
                recv_x.reshape(num_rows, -1)[place] = x
                if recv_sf is not None:
                    recv_sf.reshape(num_rows, -1)[place] = staged[2]
            recv_count[...] = from_src.sum(axis=1)
            ends = np.cumsum(recv_count)
            for number, (end, count) in enumerate(zip(ends, recv_count, strict=True)):
                rows = row[end - count : end]
                if is_by_rank:
                    handle.expert_rows[number, :count] = place[rows]
                else:
                    np.take(x, rows, axis=0, out=recv_x[number, :count], mode="clip")
                    if recv_sf is not None:
                        recv_sf[number, :count] = staged[2][rows]
                handle.src_info[number, :count] = ids_and_token[rows, -1]
            if request.recv_stats is not None:
                request.recv_stats.numpy()[...] += recv_count

        if not with_hook:
            deliver()
        framework = request.x.framework
        out_x = arrays.to_framework(recv_x, framework)
        return LowLatencyDispatched(
            recv_x=out_x if recv_sf is None else (out_x, arrays.to_framework(recv_sf, framework)),
            recv_count=arrays.to_framework(recv_count, framework),
            handle=handle,
            event=EventOverlap(),
            hook=_once(deliver) if with_hook else None,
        )

    def combine(
        self,
        given: tuple[Any, ...],
        handle: Any,
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyCombineRequest],
        *,
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyCombined:
        plan = attempt(lambda: self._plan_combine(build(*given, handle, *options), with_hook))
        payloads = self._agree(
            "low_latency_combine", plan if isinstance(plan, EpError) else plan.announcement()
        )
        assert not isinstance(plan, EpError)  # agree raised it
        request = plan.request
        combined = (
            self._peers.pool.empty((plan.handle.num_tokens, plan.handle.hidden), BFLOAT16)
            if plan.out is None
            else plan.out
        )
        start = self._return_rows if request.reduce == "source" else self._return_sums
        deliver = start(plan, payloads, combined)
        if not with_hook:
            deliver()
        return LowLatencyCombined(
            combined_x=arrays.to_framework(combined, request.x.framework)
            if request.out is None
            else request.out_array,
            event=EventOverlap(),
            hook=_once(deliver) if with_hook else None,
        )

    def _return_rows(
        self, plan: _CombinePlan, payloads: Sequence[Any], combined: Array
    ) -> Callable[[], None]:
        """Send every row to its token's rank; the function that receives and sums."""
        request, handle = plan.request, plan.handle
        num_tokens, num_topk = handle.topk_idx.shape
        num_local_experts = handle.num_experts // self._num_ranks

        # The rows of one source come back in the order it can compute itself: by expert, token, k.
        dst = handle.topk_idx // num_local_experts
        expected = np.flatnonzero((handle.topk_idx >= 0) & ~self._masked[dst])
        expected = expected[np.argsort(handle.topk_idx.flat[expected], kind="stable")]
        recv_counts = np.bincount(dst.flat[expected], minlength=self._num_ranks).tolist()
        row_of = np.full((num_tokens, num_topk), -1, np.intp)
        row_of.flat[expected] = np.arange(len(expected))

        rows, send_rows = plan.rows_to_send(self._masked)
        arrived = self._peers.pool.empty((len(expected), handle.hidden), rows.dtype)
        transfer = self._peers.send_rows(as_bytes(rows), send_rows, as_bytes(arrived), recv_counts)

        def deliver() -> None:
            late = self._receive([transfer], request.wait_stats)
            here = (row_of >= 0) & (plan.topk_idx >= 0) & ~np.isin(dst, late)
            terms = []
            for k in range(num_topk):
                tokens = np.flatnonzero(here[:, k])
                terms.append(
                    Term(arrived, tokens, index=row_of[tokens, k], weights=plan.topk_weights[tokens, k])
                )
            sum_terms(terms, (), combined)

        return deliver

    def _return_sums(
        self, plan: _CombinePlan, payloads: Sequence[Any], combined: Array
    ) -> Callable[[], None]:
        """Send a row for each token of a rank that has experts here; the function that receives and sums."""
        num_local_experts = plan.handle.num_experts // self._num_ranks
        sums: list[Array] = []
        send_rows: list[NDArray[np.intp]] = []
        first = 0
        for src in range(self._num_ranks):
            rows = np.empty((0, plan.handle.hidden), BFLOAT16)
            if not self._masked[src]:
                rows = self._sums_for(plan, src, *payloads[src])
            sums.append(rows)
            send_rows.append(np.arange(first, first + len(rows)))
            first += len(rows)
        travelling = plan.as_it_travels(np.concatenate(sums))
        owner = np.where(plan.topk_idx >= 0, plan.topk_idx // num_local_experts, -1)
        tokens = [
            np.flatnonzero((owner == rank).any(axis=1) & ~self._masked[rank])
            for rank in range(self._num_ranks)
        ]
        recv_counts = [len(each) for each in tokens]
        arrived = self._peers.pool.empty((sum(recv_counts), plan.handle.hidden), travelling.dtype)
        transfer = self._peers.send_rows(as_bytes(travelling), send_rows, as_bytes(arrived), recv_counts)

        def deliver() -> None:
            late = self._receive([transfer], plan.request.wait_stats)
            ends = np.cumsum(recv_counts)
            terms = [
                Term(arrived[ends[rank] - len(each) : ends[rank]], each)
                for rank, each in enumerate(tokens)
                if rank not in late
            ]
            sum_terms(terms, (), combined)

        return deliver

    def _sums_for(self, plan: _CombinePlan, src: int, ids: Array, used: Array, weights: Array) -> Array:
        """The weighted sums over this rank's experts of the tokens of `src` that have any, in their order.

        Args:
            ids, used: what `src` dispatched, and what of it still takes part.
        """
        handle = plan.handle
        num_local_experts, num_rows, hidden = plan.x.shape
        first_expert = self._rank * num_local_experts
        row_of = np.zeros(ids.shape, np.intp)
        for local in range(num_local_experts):
            token, column = np.nonzero(ids == first_expert + local)
            begin = int(handle.layout_range[local, src]) >> 32
            row_of[token, column] = local * num_rows + begin + np.arange(len(token))
        here = (used >= first_expert) & (used < first_expert + num_local_experts)
        tokens = np.flatnonzero(here.any(axis=1))
        place = np.searchsorted(tokens, np.arange(len(ids)))
        flat = np.ascontiguousarray(plan.x).reshape(num_local_experts * num_rows, hidden)
        terms = []
        for k in range(ids.shape[1]):
            with_k = np.flatnonzero(here[:, k])
            terms.append(Term(flat, place[with_k], index=row_of[with_k, k], weights=weights[with_k, k]))
        sums: Array = np.empty((len(tokens), hidden), BFLOAT16)
        sum_terms(terms, (), sums)
        return sums

    def next_combine_buffer(self, handle: LowLatencyHandle) -> Any:
        """bfloat16 [El, R*M, H] that the next combine with ``zero_copy`` reads, in the caller's framework."""
        if handle.framework == "jax":
            raise ConfigError("zero_copy writes into an array, and JAX arrays are immutable")
        shape = (*handle.src_info.shape, handle.hidden)
        if self._combine_buffer is None or self._combine_buffer.shape != shape:
            self._combine_buffer = self._peers.pool.empty(shape, BFLOAT16)
        return arrays.to_framework(self._combine_buffer, handle.framework)

    def update_mask(self, rank: int, masked: bool) -> None:
        self._check_shrink()
        if not 0 <= rank < self._num_ranks or rank == self._rank:
            raise ConfigError(f"rank_to_mask={rank} is not a peer of rank {self._rank} of {self._num_ranks}")
        self._masked[rank] = masked

    def query_mask(self, status: object) -> None:
        """Fill int32 [num_ranks]."""
        self._check_shrink()
        arrays.host(status, name="mask_status", writable=True)[...] = self._masked.astype(np.int32)

    def clean_mask(self) -> None:
        self._check_shrink()
        self._masked[:] = False

    def _check_shrink(self) -> None:
        if not self._enable_shrink:
            raise ConfigError("masks need a buffer made with enable_shrink=True")

    def _agree(self, operation: str, mine: Announcement | EpError) -> list[Any]:
        """`Peers.agree` among the ranks that are not masked; masks those that are late."""
        payloads = self._peers.agree(
            operation, mine, ranks=np.flatnonzero(~self._masked).tolist(), skip_late=self._enable_shrink
        )
        self._masked[[rank for rank, payload in enumerate(payloads) if payload is LATE]] = True
        return payloads

    def _receive(self, transfers: Sequence[Transfer], wait_stats: ArrayView | None) -> list[int]:
        """Wait for the rows; the ranks whose rows are not all there."""
        late: set[int] = set()
        for transfer in transfers:
            late.update(transfer.receive(timeout_s=self._peers.timeout_s, skip_late=self._enable_shrink))
            if wait_stats is not None:
                stats = wait_stats.numpy()
                for src, waited_s in transfer.waited_s.items():
                    stats[src] += int(waited_s * 1e6)
        self._masked[sorted(late)] = True
        return sorted(late)

    def _plan_dispatch(self, request: LowLatencyDispatchRequest, with_hook: bool) -> _DispatchPlan:
        _check_writable(request.recv_stats, "cumulative_local_expert_recv_stats")
        _check_writable(request.wait_stats, "dispatch_wait_recv_cost_stats")
        _check_hook(request.x.framework, with_hook)
        topk_idx = read_topk_idx(request.topk_idx, request.num_experts).astype(np.int32)
        per_expert = count_experts(topk_idx, request.num_experts)
        if per_expert.max() > request.num_max_tokens_per_rank:
            raise ArrayError(
                f"topk_idx sends {per_expert.max()} rows to expert {per_expert.argmax()}; "
                f"num_max_dispatch_tokens_per_rank={request.num_max_tokens_per_rank}"
            )
        x, sf = request.x.numpy(), None
        if request.use_fp8:
            x, sf = reference.quantize_fp8(x, round_scale=request.round_scale, use_ue8m0=request.use_ue8m0)
        in_rank = token_in_rank(topk_idx, request.num_experts, self._num_ranks)
        numbers = np.arange(len(topk_idx), dtype=np.int32)[:, None]
        return _DispatchPlan(
            request=request,
            x=x,
            sf=sf,
            topk_idx=topk_idx,
            topk_weights=None if request.topk_weights is None else request.topk_weights.numpy().copy(),
            ids_and_token=np.concatenate([topk_idx, numbers], axis=1),
            send_tokens=tuple(np.flatnonzero(column) for column in in_rank.T),
        )

    def _plan_combine(self, request: LowLatencyCombineRequest, with_hook: bool) -> _CombinePlan:
        _check_writable(request.wait_stats, "combine_wait_recv_cost_stats")
        _check_writable(request.out, "out")
        if request.out is None:
            _check_hook(request.x.framework, with_hook)
        handle = request.handle
        assert isinstance(handle, HostLowLatencyHandle)  # its owner is this buffer
        if request.topk_weights is None:  # of the dispatch, and so are the ids
            assert handle.topk_weights is not None
            topk_idx, weights = handle.topk_idx, handle.topk_weights
        else:
            topk_idx = read_topk_idx(request.topk_idx, handle.num_experts).astype(np.int32)
            weights = request.topk_weights.numpy()
        if not np.all((topk_idx == handle.topk_idx) | (topk_idx == -1)):
            raise HandleError("topk_idx is not the one that was dispatched")
        x = request.x.numpy()
        if request.zero_copy:
            if self._combine_buffer is None or self._combine_buffer.shape != x.shape:
                raise ConfigError("zero_copy needs get_next_low_latency_combine_buffer(handle) first")
            x = self._combine_buffer
        return _CombinePlan(
            request=request,
            handle=handle,
            x=x,
            topk_idx=topk_idx,
            topk_weights=weights,
            out=None if request.out is None else request.out.numpy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DispatchPlan:
    request: LowLatencyDispatchRequest
    x: Array
    sf: Array | None
    topk_idx: NDArray[np.int32]
    topk_weights: NDArray[np.float32] | None
    ids_and_token: NDArray[np.int32]
    send_tokens: tuple[NDArray[np.intp], ...]

    def announcement(self) -> Announcement:
        request = self.request
        return Announcement(
            facts={
                "hidden": request.x.shape[1],
                "columns of topk_idx": request.topk_idx.shape[1],
                "num_experts": request.num_experts,
                "num_max_dispatch_tokens_per_rank": request.num_max_tokens_per_rank,
                "use_fp8": request.use_fp8,
                "round_scale": request.round_scale,
                "use_ue8m0": request.use_ue8m0,
                "topk_weights": self.topk_weights is not None,
                "layout": request.layout,
            },
            payload=[len(tokens) for tokens in self.send_tokens],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _CombinePlan:
    request: LowLatencyCombineRequest
    handle: HostLowLatencyHandle
    x: Array
    topk_idx: Array
    topk_weights: Array
    out: Array | None

    def announcement(self) -> Announcement:
        request = self.request
        return Announcement(
            facts={
                "hidden": self.handle.hidden,
                "use_logfmt": request.use_logfmt,
                "use_fp8": request.use_fp8,
                "reduce": request.reduce,
            },
            # Where the sums are made, the weights are needed.
            payload=(self.handle.topk_idx, self.topk_idx, self.topk_weights.copy())
            if request.reduce == "rank"
            else None,
        )

    def as_it_travels(self, rows: Array) -> Array:
        """What rows are when they arrive."""
        if self.request.use_fp8:
            return reference.dequantize_fp8(*reference.quantize_fp8(rows))
        if self.request.use_logfmt:
            return reference.logfmt10_decode(reference.logfmt10_encode(rows))
        return rows

    def rows_to_send(self, masked: NDArray[np.bool_]) -> tuple[Array, list[NDArray[np.intp]]]:
        """Expert rows, and which of them go to each rank, by expert and then in received order."""
        num_local_experts, num_rows, hidden = self.x.shape
        rows = np.ascontiguousarray(self.x).reshape(num_local_experts * num_rows, hidden)
        begin = (self.handle.layout_range >> 32) + np.arange(num_local_experts)[:, None] * num_rows
        count = np.where(masked, 0, self.handle.layout_range & 0xFFFFFFFF)
        indices = [_ranges(begin[:, src], count[:, src]) for src in range(count.shape[1])]
        if self.request.use_logfmt or self.request.use_fp8:
            used = np.concatenate(indices)
            rows = self.as_it_travels(rows[used])
            ends = np.cumsum([len(index) for index in indices])
            indices = np.split(np.arange(len(used)), ends[:-1])
        return rows, indices


def _ranges(begin: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.intp]:
    """The concatenation of ``arange(begin[i], begin[i] + count[i])``."""
    ends = np.cumsum(count)
    return np.repeat(begin - (ends - count), count) + np.arange(ends[-1])


def _check_writable(view: ArrayView | None, name: str) -> None:
    if view is not None and view.readonly:
        raise ArrayError(f"{name} is read-only; it is written to, so pass a writable array")


def _once(deliver: Callable[[], None]) -> Callable[[], None]:
    """What delivers when it is called first."""
    is_done = False

    def hook() -> None:
        nonlocal is_done
        if not is_done:
            deliver()
            is_done = True

    return hook


def _check_hook(framework: str, with_hook: bool) -> None:
    if with_hook and framework == "jax":
        raise ConfigError("return_recv_hook fills the result later, and JAX arrays are immutable")

"""DeepEP's `ElasticBuffer`, by calls of `ep_rt.Buffer`: its dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import buffer
from ..config import Config
from ..errors import ConfigError, HandleError
from ..events import EventOverlap
from ..results import Dispatched
from .ep_handle import EPHandle, unaligned
from .events import EventHandle

ALIGN_BYTES = 2 << 20
"""Sizes of buffers are multiples of it."""

_MIN_BYTES = 1 << 30


class ElasticBuffer:
    """Dispatch and combine with the arguments and results of DeepEP's elastic buffer.

    There are construction, `dispatch`, `combine`, `barrier` and the sizes; Engram, pipeline transfers and
    all-gather are not there. What differs besides: see `Buffer`, and

    - results are always in the order of source tokens, as with ``deterministic``;
    - repeated dispatches return the `recv_topk_idx` of the first one, the same tensor;
    - in an expanded `combine` the `topk_weights` take one more small combine, and the `recv_src_metadata` of
      the handle, which a CUDA graph cannot be the first to look at.

    Args:
        group: a torch process group, an mpi4py communicator or any `ep_rt.Group`.
        num_bytes: memory for results; by default from the sizes of the model, at least 1 GiB.
        num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch: see `get_buffer_size_hint`.
        prefer_overlap_with_compute: use fewer streaming multiprocessors.
        num_gpu_timeout_secs: how long to wait for a peer.
        num_cpu_bytes, deterministic, allow_hybrid_mode, allow_multiple_reduction, sl_idx, num_allocated_qps,
            num_cpu_timeout_secs, explicitly_destroy: accepted.
        options: keywords of `ep_rt.Buffer`: ``backend``, ``ranks_per_node``, ``timeout_s``.

    Attributes:
        group, num_bytes, num_max_tokens_per_rank, num_allocated_qps: as given, or as chosen.
        rank_idx, num_ranks: this rank, and how many there are.
        num_scaleout_ranks, num_scaleup_ranks: nodes, and ranks of one; `num_rdma_ranks` and
            `num_nvlink_ranks` are the same.

    Collective.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        **options: Any,
    ) -> None:
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        self._buffer = buffer.Buffer(
            group, max(num_bytes, _MIN_BYTES), **{"timeout_s": num_gpu_timeout_secs, **options}
        )
        self.group = group
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps or 17
        self.explicitly_destroy = explicitly_destroy
        self.rank_idx = self._buffer.rank
        self.num_ranks = self._buffer.num_ranks
        topology = self._buffer.topology
        self.num_scaleout_ranks = self.num_rdma_ranks = topology.num_nodes
        self.num_scaleup_ranks = self.num_nvlink_ranks = topology.num_local_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = topology.node, topology.local_rank

    def destroy(self) -> None:
        """Give everything back. Collective; calling it again does nothing."""
        self._buffer.close()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes for two results in bfloat16 of all tokens of all ranks, which each rank receives once.

        Expanded results lie in other memory of the device: of these bytes they take what is received for
        one while it is made, and their combine a row for each received token.
        """
        num_ranks: int = group.size() if callable(group.size) else group.size
        row_bytes = 2 * hidden + hidden // 16 + 12 * (num_topk or 16)
        num_bytes = 2 * num_ranks * num_max_tokens_per_rank * row_bytes
        return max(1, -(-num_bytes // ALIGN_BYTES)) * ALIGN_BYTES

    @staticmethod
    def capture() -> EventHandle:
        """A point behind the work enqueued on the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The communication stream, as a torch stream.

        Raises:
            BackendError: the host backend has none.
        """
        import torch

        return torch.cuda.ExternalStream(self._buffer.get_comm_stream().ptr)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of one."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of one."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """What is enough for the links here: `ep_rt.Buffer.num_sms`, half as many more without overlap."""
        num_sms = buffer.Buffer.num_sms
        return num_sms if self.prefer_overlap_with_compute else num_sms * 3 // 2

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """At most `num_allocated_qps`; the number means nothing here."""
        return min(num_sms, self.num_allocated_qps)

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Meet all ranks once this rank's device is done; the host waits whatever the arguments."""
        import torch

        if self._buffer.backend == "cuda":
            torch.cuda.synchronize()
        self._buffer.group.barrier()

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        cumulative_local_expert_recv_stats: Any = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool | None = None,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Any, Any, EPHandle, EventOverlap]:
        """Send every token once to each rank that owns at least one of its experts.

        Args:
            x: bfloat16 [num_tokens, hidden], or a tuple with scale factors, see `ep_rt.Buffer.dispatch`.
            cumulative_local_expert_recv_stats: int32 [num_local_experts]; true counts are added to it.
            num_max_tokens_per_rank: the same on every rank; default: that of the buffer.
            previous_event, previous_event_before_epilogue: work to wait for first.
            async_with_compute_stream: the current stream does not wait; statistics and column-major scale
                factors then are there after the first wait for the event.
            handle: repeat the routing of an earlier dispatch; with `topk_weights`, these travel too.
            do_cpu_sync: exact shapes, for which the host waits; else as many rows as could arrive.
            do_expand: a row for each expert of a token, the rows of an expert together. Default: False; with
                `handle` as its dispatch had it.
            do_zero_padding: of expanded rows.
            use_tma_aligned_col_major_sf: received scale factors column-major, columns at multiples of 16
                bytes.

        Returns:
            recv_x, recv_topk_idx (None if expanded), recv_topk_weights (None where none were given), handle,
            event.
        """
        previous_event = _before(previous_event, previous_event_before_epilogue)
        options: dict[str, Any] = {
            "previous_event": previous_event,
            "async_finish": async_with_compute_stream,
            "allocate_on_comm_stream": allocate_on_comm_stream,
        }
        if handle is not None:
            self._check_repeated(handle, topk_idx, do_cpu_sync, do_expand)
            do_expand = handle.do_expand
            options["config"] = Config(num_sms or handle.num_sms)
            options["zero_padding"] = do_zero_padding
            if topk_weights is None:
                out = self._buffer.dispatch(x, handle.handle, **options)
            else:
                out = self._buffer.dispatch(
                    x,
                    topk_idx=handle.topk_idx,
                    topk_weights=topk_weights,
                    expert_alignment=handle.expert_alignment,
                    # 0 would ask for exact shapes, on this rank alone.
                    num_worst_tokens=max(1, handle.handle.num_recv_rows),
                    num_experts=handle.num_experts,
                    layout=handle.handle.layout,
                    num_max_tokens_per_rank=handle.num_max_tokens_per_rank,
                    **options,
                )
                if handle.handle.num_recv_rows == 0:
                    out = _without_rows(out)
        else:
            if topk_idx is None or num_experts is None:
                raise ConfigError("dispatch needs topk_idx and num_experts, or a handle")
            if num_max_tokens_per_rank is None:
                num_max_tokens_per_rank = self.num_max_tokens_per_rank
            do_expand = bool(do_expand)
            expert_alignment = 1 if expert_alignment is None else expert_alignment
            do_cpu_sync = True if do_cpu_sync is None else bool(do_cpu_sync)
            num_sms = num_sms or self.get_theoretical_num_sms(num_experts, topk_idx.shape[1])
            num_worst_tokens = 0
            if not do_cpu_sync:
                num_worst_tokens = self.num_ranks * num_max_tokens_per_rank
                if do_expand:
                    num_local_experts = num_experts // self.num_ranks
                    num_worst_tokens *= min(topk_idx.shape[1], num_local_experts)
                    num_worst_tokens += num_local_experts * (expert_alignment - 1)
            kept_idx = topk_idx.clone() if do_handle_copy else topk_idx
            out = self._buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                num_experts=num_experts,
                layout="expert" if do_expand else "rank",
                zero_padding=do_zero_padding,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                config=Config(num_sms),
                **options,
            )
            handle = EPHandle(
                out.handle,
                self._buffer,
                topk_idx=kept_idx,
                recv_topk_idx=out.recv_topk_idx,
                num_experts=num_experts,
                expert_alignment=expert_alignment,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                num_sms=num_sms,
                do_cpu_sync=do_cpu_sync,
                event=out.event.event if async_with_compute_stream else None,
            )
        recv_x, later = out.recv_x, []
        if use_tma_aligned_col_major_sf and isinstance(recv_x, tuple):
            by_column, fill = _column_major(recv_x[1])
            recv_x = recv_x[0], by_column
            later.append(fill)
        if cumulative_local_expert_recv_stats is not None:
            later.append(_count(handle, cumulative_local_expert_recv_stats))
        _after(out.event, later, is_async=async_with_compute_stream)
        return recv_x, handle.recv_topk_idx, out.recv_topk_weights, handle, out.event

    def combine(
        self,
        x: Any,
        handle: EPHandle,
        topk_weights: Any = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, EventOverlap]:
        """Return every token's rows to its source rank and sum them, not weighted.

        Args:
            x: [rows of recv_x, hidden], as the dispatch delivered them.
            topk_weights: float32, as `recv_topk_weights`; summed the same way, to [num_tokens, num_topk].
            bias: see `ep_rt.Buffer.combine`.

        Returns:
            combined_x, combined_topk_weights (None without `topk_weights`), event.
        """
        if not isinstance(handle, EPHandle):
            raise HandleError(f"handle is a {type(handle).__name__}; expected an EPHandle")
        previous_event = _before(previous_event, previous_event_before_epilogue)
        options: dict[str, Any] = {
            "config": Config(num_sms or handle.num_sms),
            "async_finish": async_with_compute_stream,
            "allocate_on_comm_stream": allocate_on_comm_stream,
        }
        weights_back = None
        if handle.do_expand and topk_weights is not None:
            if previous_event is not None:
                previous_event.current_stream_wait()
            rows = _by_column(topk_weights, handle)
            options["previous_event"] = self._buffer.capture() if previous_event is not None else None
            weights_back = self._buffer.combine(rows, handle.handle, **options).combined_x
            weights_back = weights_back[:, : handle.topk_idx.shape[1]]
            topk_weights = None
        else:
            options["previous_event"] = previous_event
        out = self._buffer.combine(x, handle.handle, topk_weights, bias, **options)
        return out.combined_x, out.combined_topk_weights if weights_back is None else weights_back, out.event

    def _check_repeated(
        self, handle: EPHandle, topk_idx: Any, do_cpu_sync: bool | None, do_expand: bool | None
    ) -> None:
        if not isinstance(handle, EPHandle):
            raise HandleError(f"handle is a {type(handle).__name__}; expected an EPHandle")
        if topk_idx is not None or do_cpu_sync:
            raise ConfigError("with handle= the routing and the shapes are those of the handle")
        if do_expand is not None and bool(do_expand) != handle.do_expand:
            raise HandleError(f"do_expand={do_expand}; the handle's dispatch had {handle.do_expand}")


def _before(*events: Any) -> EventOverlap | None:
    """One event for work that comes after all of these, which may be `EventHandle` or None."""
    given = [
        each if isinstance(each, EventOverlap) else EventOverlap(each) for each in events if each is not None
    ]
    if len(given) < 2:
        return given[0] if given else None
    for each in given:
        each.current_stream_wait()
    return buffer.Buffer.capture()


def _without_rows(out: Dispatched) -> Dispatched:
    """The same with no received row, instead of a row of nothing."""
    recv_x = tuple(part[:0] for part in out.recv_x) if isinstance(out.recv_x, tuple) else out.recv_x[:0]
    ids, weights = (None if each is None else each[:0] for each in (out.recv_topk_idx, out.recv_topk_weights))
    return out._replace(recv_x=recv_x, recv_topk_idx=ids, recv_topk_weights=weights)


def _after(event: EventOverlap, steps: list[Callable[[], None]], *, is_async: bool) -> None:
    """Do what follows a call on the stream that waits for it."""

    def run() -> None:
        for step in steps:
            step()

    if is_async and steps:
        event.register_hook_after_wait(run)
    else:
        run()


def _column_major(sf: Any) -> tuple[Any, Callable[[], None]]:
    """[rows, columns] for the values of `sf`, each column contiguous; and what fills it."""
    import torch

    num_rows, num_columns = sf.shape
    step = -(-num_rows // (16 // sf.element_size())) * (16 // sf.element_size())
    by_column = torch.empty((num_columns, step), dtype=sf.dtype, device=sf.device).T[:num_rows]
    return by_column, lambda: by_column.copy_(sf)


def _count(handle: EPHandle, stats: Any) -> Callable[[], None]:
    """What adds the true counts of the local experts to `stats`."""
    import torch

    def count() -> None:
        if handle.do_expand:
            stats.add_(unaligned(handle.psum_num_recv_tokens_per_expert, handle.expert_alignment))
        else:
            ids = handle.recv_topk_idx.flatten().long()
            stats.scatter_add_(0, ids.clamp(min=0), (ids >= 0).to(torch.int32))

    return count


def _by_column(topk_weights: Any, handle: EPHandle) -> Any:
    """float32 [rows, num_topk or more]: the weight of each expanded row, in its column."""
    import torch

    slots = handle.recv_src_metadata[:, 2:]
    num_topk = slots.shape[1]
    token, column = torch.nonzero(slots >= 0, as_tuple=True)
    row = slots[token, column].long()
    rows = topk_weights.new_zeros((len(topk_weights), -(-num_topk // 4) * 4))
    rows[row, column] = topk_weights[row]
    return rows

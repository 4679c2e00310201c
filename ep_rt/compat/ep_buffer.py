"""DeepEP's `EPBuffer`, which takes the place of `ElasticBuffer` from its version 2.5 on."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..events import EventOverlap
from .elastic import ElasticBuffer
from .ep_handle import EPHandle


class EPBuffer(ElasticBuffer):
    """`ElasticBuffer` with the arguments that `EPBuffer` has, and results that an event delivers.

    With ``defer_epilogue`` a call returns its event alone, whose first wait returns the results. Here nothing
    is left to be done then: rows are written where the results lie, and a dispatch with ``do_cpu_sync`` has
    waited for the counts before it returned. Weights and gradients of redundant experts, and the buffers
    that stand beside `EPBuffer`, are not there.

    Args:
        lb_allocation_plan_or_num_bytes: 0.
        sl_idx: accepted.
        others: see `ElasticBuffer`.

    Raises:
        ConfigError: memory for redundant experts is asked for.

    Collective.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        **options: Any,
    ) -> None:
        if lb_allocation_plan_or_num_bytes != 0:
            raise ConfigError("lb_allocation_plan_or_num_bytes: there are no redundant experts here")
        super().__init__(
            group,
            num_bytes,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            use_fp8_dispatch=use_fp8_dispatch,
            deterministic=deterministic,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
            prefer_overlap_with_compute=prefer_overlap_with_compute,
            num_allocated_qps=num_allocated_qps,
            num_cpu_timeout_secs=num_cpu_timeout_secs,
            num_gpu_timeout_secs=num_gpu_timeout_secs,
            explicitly_destroy=explicitly_destroy,
            **options,
        )

    def barrier(
        self,
        wait_comm_stream: bool = True,
        with_cpu_sync: bool = False,
        sequential: bool = True,
        context_idx: int | None = None,
    ) -> None:
        """See `ElasticBuffer.barrier`."""
        super().barrier(wait_comm_stream, with_cpu_sync, sequential)

    def dispatch(  # type: ignore[override]
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
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        """See `ElasticBuffer.dispatch`.

        Args:
            do_handle_copy: False: the handle keeps `topk_idx` itself.
            do_expand: with `handle` as its dispatch had it, if this is False.
            defer_epilogue: with `async_with_compute_stream`.

        Returns:
            What `ElasticBuffer.dispatch` returns; with `defer_epilogue` the event alone, whose wait returns
            recv_x, recv_topk_idx, recv_topk_weights, handle.

        Raises:
            ConfigError: `do_handle_copy`, or `defer_epilogue` without `async_with_compute_stream`.
        """
        if do_handle_copy:
            raise ConfigError("do_handle_copy=True; the handle of an EPBuffer keeps topk_idx itself")
        _check_deferred(defer_epilogue, async_with_compute_stream)
        *results, event = super().dispatch(
            x,
            topk_idx,
            topk_weights,
            cumulative_local_expert_recv_stats,
            num_experts,
            num_max_tokens_per_rank,
            expert_alignment,
            num_sms,
            num_qps,
            previous_event,
            async_with_compute_stream=async_with_compute_stream,
            allocate_on_comm_stream=allocate_on_comm_stream,
            handle=handle,
            do_handle_copy=False,
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand or None,
            do_zero_padding=do_zero_padding,
            use_tma_aligned_col_major_sf=use_tma_aligned_col_major_sf,
        )
        return _delivering(event, tuple(results)) if defer_epilogue else (*results, event)

    def combine(  # type: ignore[override]
        self,
        x: Any,
        handle: EPHandle,
        topk_weights: Any = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        """See `ElasticBuffer.combine`.

        Args:
            defer_epilogue: with `async_with_compute_stream`.

        Returns:
            What `ElasticBuffer.combine` returns; with `defer_epilogue` the event alone, whose wait returns
            combined_x, combined_topk_weights.

        Raises:
            ConfigError: `defer_epilogue` without `async_with_compute_stream`.
        """
        _check_deferred(defer_epilogue, async_with_compute_stream)
        *results, event = super().combine(
            x,
            handle,
            topk_weights,
            bias,
            num_sms,
            num_qps,
            previous_event,
            async_with_compute_stream=async_with_compute_stream,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        return _delivering(event, tuple(results)) if defer_epilogue else (*results, event)


def _check_deferred(is_deferred: bool, is_async: bool) -> None:
    if is_deferred and not is_async:
        raise ConfigError("defer_epilogue=True needs async_with_compute_stream=True")


def _delivering(event: EventOverlap, results: tuple[Any, ...]) -> EventOverlap:
    """The event of a call, whose first wait returns its results behind what else there is to do."""
    first, event.hook_after_wait = event.hook_after_wait, None

    def deliver() -> tuple[Any, ...]:
        if first is not None:
            first()
        return results

    event.register_hook_after_wait(deliver)
    return event

"""DeepEP's `Buffer`, by calls of `ep_rt.Buffer`."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar

from .. import buffer
from ..errors import ConfigError
from ..events import EventOverlap
from ..results import Combined, DispatchLayout, LowLatencyCombined
from .config import Config
from .handles import ExpertHandle, NormalHandle, unwrapped
from .runtime import Runtime

_MIN_NVL_BYTES = 1 << 30
_MEETING_HIDDEN = 128


class Buffer:
    """Dispatch and combine with DeepEP's arguments and results.

    Results are tuples of DeepEP's length and order. Beyond DeepEP: any hidden whose rows are a multiple of 16
    bytes, any number of ranks, experts and columns, CPU tensors where there is no GPU, and errors before
    anything moves in place of assertions and traps, see `ep_rt.Buffer`.

    What differs:

    - Results lie in the memory of `num_nvl_bytes`, which in DeepEP holds rings. Less than 1 GiB is taken as
      1 GiB, and the hints of `Config` have room for usual sizes; where it is not enough, the error says how
      much is. That of `num_rdma_bytes` holds the landing zones of low-latency calls of one shape.
    - `NormalHandle` says which elements of a handle there are to look at.
    - Construction, `destroy` and the first low-latency call of a shape are collective, and nothing
      collective happens when a buffer is garbage: its memory on a GPU stays until `destroy`, which may
      always be called. With `enable_shrink` a rank that stays away may call it while others go on: it
      waits for them as long as for a peer, and they lose it at once.
    - With `topk_idx`, tokens go where the ids say; `is_token_in_rank` and the counts are not looked at.
    - Received rows of a source rank, and of an expert, are in the order of their tokens, in every run.
    - ``*_wait_recv_cost_stats`` count microseconds.
    - Low-latency results do not lie in landing zones, so any number of them may be held.

    Args:
        group: a torch process group or, beyond DeepEP, any `ep_rt.Group`.
        comm: an mpi4py communicator, in place of `group`.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, enable_shrink: see `ep_rt.Buffer`.
        allow_nvlink_for_low_latency_mode: see `ep_rt.Buffer`.
        num_qps_per_rank: what NVSHMEM is told, as in DeepEP; 4.0, of a division, is 4.
        allow_mnnvl, use_fabric, explicitly_destroy: accepted; every value means the same.
        options: keywords of `ep_rt.Buffer` that DeepEP does not have: ``backend``, ``timeout_s``,
            ``ranks_per_node``, ``network``.

    Attributes:
        num_sms: what calls without a `Config` use.
        group, group_size, rank: the peers, as given.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, enable_shrink: as given.
        runtime: see `Runtime`; None once destroyed.

    Collective.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: float = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        **options: Any,
    ) -> None:
        if group is None and comm is None:
            raise ConfigError("give group=, a torch process group, or comm=, an mpi4py communicator")
        self.group = comm if group is None else group
        self._buffer = buffer.Buffer(
            self.group,
            max(num_nvl_bytes, _MIN_NVL_BYTES) if num_nvl_bytes > 0 else num_nvl_bytes,
            num_rdma_bytes,
            low_latency_mode=low_latency_mode,
            num_qps_per_rank=_whole(num_qps_per_rank),
            allow_nvlink_for_low_latency_mode=allow_nvlink_for_low_latency_mode,
            allow_mnnvl=allow_mnnvl,
            explicitly_destroy=explicitly_destroy,
            enable_shrink=enable_shrink,
            **options,
        )
        self.rank = self._buffer.rank
        self.group_size = self._buffer.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Runtime | None = Runtime(self._buffer.topology)
        self._device = "cpu" if self._buffer.backend == "host" else "cuda"
        self._raw: dict[bool, Any] = {}
        crosses = self._buffer.topology.num_nodes > 1 or not allow_nvlink_for_low_latency_mode
        self._reduce = "rank" if crosses and self._buffer.backend == "cuda" else "source"

    def destroy(self) -> None:
        """Give everything back. Collective; calling it again does nothing."""
        self._raw.clear()
        self.runtime = None
        self._buffer.close()

    # Tuning and streams.

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: kernels are compiled at first use, for the GPU that is there."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Let the kernels of the normal mode use this many streaming multiprocessors, odd numbers too."""
        if new_num_sms < 1:
            raise ConfigError(f"new_num_sms={new_num_sms} must be at least 1")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The recommended `Config` for a number of ranks; any number will do."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to pass as ``num_rdma_bytes``, for calls of one shape with up to 32 columns of ids."""
        hint = buffer.Buffer.get_low_latency_rdma_size_hint
        meeting_bytes = hint(1, _MEETING_HIDDEN, num_ranks, num_ranks, with_columns=True)
        return meeting_bytes + hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, with_columns=True
        )

    @staticmethod
    def capture() -> EventOverlap:
        """An event behind the work enqueued on the current stream."""
        return buffer.Buffer.capture()

    def get_comm_stream(self) -> Any:
        """The communication stream, as a torch stream.

        Raises:
            BackendError: the host backend has none.
        """
        import torch

        return torch.cuda.ExternalStream(self._buffer.get_comm_stream().ptr)

    def get_local_buffer_tensor(
        self, dtype: Any, size: Any = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Any:
        """Memory of as many bytes as the buffer was made with, the same in every call; local.

        It is not what calls use, so writing to it harms nothing.

        Args:
            size: shape of the part that is wanted; by default all of it, flat.
            offset: bytes before it.

        Raises:
            ConfigError: more is wanted than there is.
        """
        import torch

        if use_rdma_buffer not in self._raw:
            num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            self._raw[use_rdma_buffer] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        rest = self._raw[use_rdma_buffer][offset:]
        flat = rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        if prod(size) > flat.numel():
            raise ConfigError(f"size={tuple(size)} of {dtype}; {flat.numel()} elements are there")
        return flat[: prod(size)].view(size)

    # Normal mode.

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchLayout:
        """See `ep_rt.Buffer.get_dispatch_layout`."""
        return self._buffer.get_dispatch_layout(
            topk_idx, num_experts, previous_event, async_finish, allocate_on_comm_stream
        )

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, Any, list[int] | None, NormalHandle | None, EventOverlap]:
        """See `ep_rt.Buffer.dispatch`.

        Returns:
            As there: recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle,
            event. The list is empty with `num_worst_tokens`; with `handle` all but recv_x and event are None.
        """
        num_experts = None if num_tokens_per_expert is None else len(num_tokens_per_expert)
        # A handle or ids say where tokens go, and what else is given is not even to be checked each time.
        needs_layout = handle is None and topk_idx is None
        out = self._buffer.dispatch(
            x,
            unwrapped(handle),
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank if needs_layout else None,
            num_tokens_per_expert if needs_layout else None,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            self.get_dispatch_config(self.group_size) if config is None else config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
            num_experts=num_experts,
        )
        if handle is not None:
            return out.recv_x, None, None, None, None, out.event
        new_handle = NormalHandle(
            out.handle,
            rank=self.rank,
            is_token_in_rank=is_token_in_rank,
            device=(out.recv_x[0] if isinstance(out.recv_x, tuple) else out.recv_x).device,
            is_internode=self._buffer.topology.num_nodes > 1,
        )
        counts = [] if num_worst_tokens else list(out.num_recv_tokens_per_expert_list)
        return out.recv_x, out.recv_topk_idx, out.recv_topk_weights, counts, new_handle, out.event

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Combined:
        """See `ep_rt.Buffer.combine`: the sum is not weighted."""
        return self._buffer.combine(
            x,
            unwrapped(handle),
            topk_weights,
            bias,
            self.get_combine_config(self.group_size) if config is None else config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    internode_dispatch = dispatch
    internode_combine = combine

    # Low-latency mode.

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Any, ExpertHandle, EventOverlap, Callable[[], None] | None]:
        """See `ep_rt.Buffer.low_latency_dispatch`: recv_x, recv_count, handle, event, hook."""
        out = self._buffer.low_latency_dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            use_fp8,
            round_scale,
            use_ue8m0,
            async_finish,
            return_recv_hook,
        )
        return out.recv_x, out.recv_count, ExpertHandle(out.handle), out.event, out.hook

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
        *,
        reduce: str | None = None,
    ) -> LowLatencyCombined:
        """See `ep_rt.Buffer.low_latency_combine`.

        Args:
            reduce: "source", every row travels and is weighted at its token's rank, as in DeepEP; or, beyond
                it, "rank", which moves less and rounds once more. Default: "source"; on GPUs of several
                nodes, which have that alone, "rank".
        """
        return self._buffer.low_latency_combine(
            x,
            topk_idx,
            topk_weights,
            unwrapped(handle),
            use_logfmt,
            zero_copy,
            async_finish,
            return_recv_hook,
            out,
            combine_wait_recv_cost_stats,
            reduce=reduce or self._reduce,
        )

    def get_next_low_latency_combine_buffer(self, handle: Any) -> Any:
        """The bfloat16 [El, R*M, hidden] tensor that the next combine with ``zero_copy`` reads. Local."""
        return self._buffer.get_next_low_latency_combine_buffer(unwrapped(handle))

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing needs cleaning between modes. Local; with `enable_shrink` ranks meet, as in DeepEP.

        A rank that does not call is masked then.
        """
        self._buffer.clean_low_latency_buffer(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        if self.enable_shrink:
            import torch

            self._buffer.low_latency_dispatch(
                torch.empty((0, _MEETING_HIDDEN), dtype=torch.bfloat16, device=self._device),
                torch.empty((0, 1), dtype=torch.int64, device=self._device),
                1,
                self.group_size,
                use_fp8=False,
            )

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a peer out of this rank's low-latency calls, or not. Local; needs `enable_shrink`."""
        self._buffer.low_latency_update_mask_buffer(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fill int32 [num_ranks] with 1 for masked ranks, 0 for others. Local; needs `enable_shrink`."""
        self._buffer.low_latency_query_mask_buffer(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask every rank. Local; needs `enable_shrink`."""
        self._buffer.low_latency_clean_mask_buffer()


def _whole(number: float) -> Any:
    """An integer in place of a float that is one; the check of anything else is left to `ep_rt.Buffer`."""
    return int(number) if isinstance(number, float) and number.is_integer() else number

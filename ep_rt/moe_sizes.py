"""The model a buffer was made for: what calls are checked against, and the memory that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from . import arrays
from .cuda import plan
from .cuda.low_latency_plan import area_bytes_hint
from .cuda.remote import RemoteSizes
from .errors import ConfigError
from .requests import DispatchRequest, local_experts

_LOW_LATENCY_BYTES: Final = 256 << 20  # over the network, where nothing is said


@dataclass(frozen=True, slots=True)
class MoeSizes:
    """The model a buffer was made for. The same on every rank."""

    num_max_tokens_per_rank: int
    hidden: int
    num_experts: int
    num_topk: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.hidden * arrays.np_dtype(self.dtype).itemsize

    @property
    def answer_bytes(self) -> int:
        """Of a row of the experts' output, at most: they may answer FP8 rows with bfloat16 ones."""
        return max(2 * self.hidden, self.row_bytes)

    def check(self, num_ranks: int) -> None:
        """Raise `ConfigError` or `ArrayError` unless `num_ranks` ranks can have such a model."""
        arrays.np_dtype(self.dtype)
        if min(self.num_max_tokens_per_rank, self.hidden, self.num_topk) < 1:
            raise ConfigError(f"{self} has sizes below 1")
        local_experts(self.num_experts, num_ranks)

    def check_dispatch(self, request: DispatchRequest) -> None:
        """Raise `ConfigError` if a dispatch of the normal mode is larger than the model."""
        hidden = request.x.shape[1]
        itemsize = 1 if request.quantize else arrays.np_dtype(request.x.dtype).itemsize
        if hidden * itemsize > self.row_bytes:
            raise ConfigError(
                f"x has rows of {hidden} x {request.x.dtype}; the buffer was made for "
                f"hidden={self.hidden} x {self.dtype}"
            )
        num_max_tokens = request.num_max_tokens_per_rank
        if num_max_tokens is not None and num_max_tokens > self.num_max_tokens_per_rank:
            raise ConfigError(
                f"num_max_tokens_per_rank={num_max_tokens}; the buffer was made for "
                f"{self.num_max_tokens_per_rank}"
            )

    def slab_bytes(self, num_ranks: int) -> plan.ModelBytes:
        """Of the results and the like in the slab of a node of so many ranks."""
        num_rows = num_ranks * self.num_max_tokens_per_rank
        return plan.ModelBytes.of(self.row_bytes, self.answer_bytes, self.num_topk, num_rows)

    def area_bytes(self, num_ranks: int, *, over_network: bool) -> int:
        """Of the landing zones of low-latency calls, of every kind that there is."""
        return area_bytes_hint(
            self.num_max_tokens_per_rank,
            self.hidden,
            num_ranks,
            self.num_experts,
            self.num_topk,
            with_columns=not over_network,
            over_network=over_network,
        )


def slab_bytes(
    moe: MoeSizes | None, num_ranks: int, num_nvl_bytes: int, num_rdma_bytes: int, *, low_latency_mode: bool
) -> int:
    """Bytes of the slab of a buffer that was given these sizes; `low_latency_mode`: whose zones lie in it."""
    num_nvl_bytes, zones_bytes = int(num_nvl_bytes), int(num_rdma_bytes)
    if moe is None:
        # As DeepEP's users write it: all memory is for the low-latency calls.
        if low_latency_mode and zones_bytes and not num_nvl_bytes:
            return plan.slab_bytes(zones_bytes)
        return plan.slab_bytes(num_nvl_bytes) + plan.rounded(zones_bytes)
    if low_latency_mode and not zones_bytes:
        zones_bytes = moe.area_bytes(num_ranks, over_network=False)
    num_bytes = plan.slab_bytes(num_nvl_bytes) if num_nvl_bytes else moe.slab_bytes(num_ranks).slab
    return plan.rounded(zones_bytes) + num_bytes


def spare_bytes(moe: MoeSizes | None, num_ranks: int, num_nvl_bytes: int) -> int:
    """What such a slab keeps free from the beginning: room for any call of a model that it was made for."""
    return 0 if moe is None or num_nvl_bytes else moe.slab_bytes(num_ranks).largest


def remote_sizes(
    moe: MoeSizes | None, num_ranks: int, num_rdma_bytes: int, *, low_latency_mode: bool
) -> RemoteSizes:
    """What a buffer that was given these sizes holds to reach other nodes."""
    num_rdma_bytes = int(num_rdma_bytes)
    # The hint is of what lands; about as much goes out.
    low_latency_bytes = 2 * num_rdma_bytes or _LOW_LATENCY_BYTES
    max_tokens, max_record_bytes = plan.DEFAULT_NETWORK_TOKENS, plan.record_bytes(0, 0)
    if moe is not None:
        max_tokens = moe.num_max_tokens_per_rank
        max_record_bytes = plan.record_bytes(moe.answer_bytes, moe.num_topk)
        if not num_rdma_bytes:
            low_latency_bytes = moe.area_bytes(num_ranks, over_network=True)
    return RemoteSizes(
        max_tokens=max_tokens,
        max_record_bytes=max_record_bytes,
        rings_bytes=0 if low_latency_mode else num_rdma_bytes,
        low_latency_bytes=low_latency_bytes,
    )

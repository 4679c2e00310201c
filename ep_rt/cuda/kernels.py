"""Per `.cu` file: what its arguments are, and which instances there are.

An argument struct is described once, as a NumPy dtype with C alignment: the host packs by it and the rendered
source asserts it, so both sides agree or the kernel does not compile.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..errors import TopologyError
from . import plan
from .kernel_spec import (
    BarrierCfg,
    CollapseCfg,
    ContiguousCfg,
    DispatchLayoutCfg,
    ExpandCfg,
    InternodeExchangeCfg,
    InternodeLayoutCfg,
    InternodeSumCfg,
    IntranodeCombineCfg,
    IntranodeDispatchCfg,
    KernelSpec,
    LowLatencyCombineCfg,
    LowLatencyDispatchCfg,
    NvshmemPingCfg,
    WireLimitCfg,
)
from .layout import (
    MAX_LOCAL_EXPERTS,
    MAX_LOCAL_RANKS,
    MAX_LOW_LATENCY_RANKS,
    MAX_RANKS,
    MAX_SECTIONS,
    SECTION,
    align_up,
)

ELEMENTS: Final = ("float32", "float16", "bfloat16")
"""What `combine` sums, in the order of `IntranodeCombineCfg.element`."""


WIRES: Final = ("bfloat16", "fp8", "logfmt")
"""How rows of the low-latency combine travel, in the order of `LowLatencyCombineCfg.wire`."""


SCOPES: Final = ("thread", "warp", "block")
"""Who does a put together, in the order of `NvshmemPingCfg.scope`."""


def barrier(num_ranks: int) -> KernelSpec:
    """The barrier's instance for `num_ranks`.

    Raises:
        TopologyError: more ranks than one NVLink domain has.
    """
    if num_ranks > MAX_RANKS:
        raise TopologyError(f"{num_ranks} ranks in one NVLink domain; at most {MAX_RANKS} are supported")
    # Up to 8 ranks the arguments stay within two cache lines and one warp does all.
    max_ranks = 8 if num_ranks <= 8 else MAX_RANKS
    return KernelSpec(
        source="barrier.cu",
        function="barrier",
        cfg=BarrierCfg(max_ranks=max_ranks, num_threads=align_up(max_ranks, 32)),
        args=np.dtype(
            [
                ("hang", "<u8"),
                ("timeout_ns", "<u8"),
                ("rank", "<i4"),
                ("num_ranks", "<i4"),
                ("operation", "<u8"),
                ("slabs", "<u8", (max_ranks,)),
            ],
            align=True,
        ),
    )


def intranode_dispatch(
    *, quantizes: bool = False, segmented: bool = False, counts: bool = False
) -> KernelSpec:
    """Dispatch within one NVLink domain, for every shape.

    Args:
        quantizes: rows are bfloat16 and are received as float8_e4m3fn with scale factors; else any dtype is
            moved as it is.
        segmented: the second level of a dispatch over several nodes. Tokens are those of a list that the
            device knows, `SEGMENTS`, and `num_tokens` is the most that it can have.
        counts: adds up the bytes that it stores to other ranks, for tests and benchmarks.
    """
    stages = plan.QUANTIZING_STAGES if quantizes else plan.DISPATCH_STAGES
    return KernelSpec(
        source="intranode_dispatch.cu",
        function="intranode_dispatch",
        cfg=IntranodeDispatchCfg(
            num_threads=stages.num_threads,
            num_data_warps=stages.num_data_warps,
            num_stages=stages.num_stages,
            stage_bytes=stages.stage_bytes,
            scale_bytes=stages.scale_bytes,
            quantizes=int(quantizes),
            segmented=int(segmented),
            counts=int(counts),
        ),
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "result", "x", "sf", "topk_idx", "topk_weights"),
                *_pointers("is_token_in_rank", "send_row", "send_plan", "masks", "send_token"),
                ("timeout_ns", "<u8"),
                ("call", "<u8"),
                ("digest", "<u4"),
                ("recv_offset", "<u4"),
                ("recv_capacity", "<u4"),
                *_ints("rank", "num_ranks", "num_tokens", "num_topk", "num_experts"),
                *_ints("row_bytes", "sf_row_bytes", "idx_bytes", "is_cached"),
                *_ints("fill_rows", "max_redundant_tokens", "expert_alignment"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
                *_pointers("segments", "landed_x", "landed_sf", "landed_topk_idx", "landed_topk_weights"),
                *_pointers("order", "node_masks", "landed_node_masks"),
                *_ints("node_masks_bytes", "first_expert", "waits_for_announced", "num_exchange_blocks"),
            ],
            align=True,
        ),
        shared_bytes=stages.shared_bytes,
    )


def intranode_combine(element: str, *, segmented: bool = False, counts: bool = False) -> KernelSpec:
    """Combine within one NVLink domain, for rows of one of `ELEMENTS`.

    Args:
        segmented: the first level of a combine over several nodes. Tokens are those of the list of the
            dispatch; rows lie in the slab, and there are no biases.
        counts: adds up the bytes that it loads from other ranks, for tests and benchmarks.
    """
    stages = plan.COMBINE_STAGES
    return KernelSpec(
        source="intranode_combine.cu",
        function="intranode_combine",
        cfg=IntranodeCombineCfg(
            num_threads=stages.num_threads,
            num_stages=stages.num_stages,
            stage_bytes=stages.stage_bytes,
            element=ELEMENTS.index(element),
            segmented=int(segmented),
            counts=int(counts),
        ),
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "send_row", "send_plan", "y"),
                ("bias", "<u8", (2,)),
                *_pointers("out", "out_weights"),
                ("timeout_ns", "<u8"),
                ("digest", "<u4"),
                ("y_offset", "<u4"),
                ("weights_offset", "<u4"),
                *_ints("rank", "num_ranks", "num_tokens", "num_rows", "row_bytes", "num_topk"),
                *_ints("num_pullers", "num_stagers"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
                *_pointers("segments", "progress"),
            ],
            align=True,
        ),
        shared_bytes=stages.shared_bytes,
    )


def expand() -> KernelSpec:
    """Received rows to the expert-major layout, for every dtype and shape."""
    stages = plan.EXPAND_STAGES
    # The same memory holds counters of each warp, and of the block, for each expert first.
    counters_bytes = 4 * (stages.num_threads // 32 + 2) * MAX_LOCAL_EXPERTS
    return KernelSpec(
        source="expand.cu",
        function="expand",
        cfg=ExpandCfg(
            num_threads=stages.num_threads,
            num_data_warps=stages.num_data_warps,
            num_stages=stages.num_stages,
            stage_bytes=stages.stage_bytes,
            scale_bytes=stages.scale_bytes,
        ),
        args=np.dtype(
            [
                *_pointers("hang", "header", "workspace", "num_recv_tokens"),
                *_pointers("topk_idx", "topk_weights", "sf", "x"),
                *_pointers("expert_row", "psum", "num_needed_rows", "out_weights", "out_sf", "out_x"),
                ("timeout_ns", "<u8"),
                *_ints("row_capacity", "num_out_rows", "num_topk", "num_local_experts", "alignment"),
                *_ints("row_bytes", "sf_row_bytes", "idx_bytes", "zero_padding", "is_cached"),
            ],
            align=True,
        ),
        shared_bytes=max(stages.shared_bytes, counters_bytes),
        shared_bytes_sm80=counters_bytes,
    )


def collapse(element: str) -> KernelSpec:
    """Expert-major rows of one of `ELEMENTS` to sums for each received token."""
    stages = plan.COLLAPSE_STAGES
    return KernelSpec(
        source="collapse.cu",
        function="collapse",
        cfg=CollapseCfg(
            num_threads=stages.num_threads,
            num_stages=stages.num_stages,
            stage_bytes=stages.stage_bytes,
            element=ELEMENTS.index(element),
        ),
        args=np.dtype(
            [
                *_pointers("header", "workspace", "num_recv_tokens", "expert_row", "y", "weights", "out"),
                *_ints("row_capacity", "num_topk", "row_bytes"),
            ],
            align=True,
        ),
        shared_bytes=stages.shared_bytes,
    )


def low_latency_dispatch(*, quantizes: bool, over_network: bool = False) -> KernelSpec:
    """Dispatch of the low-latency mode, for every shape.

    Args:
        quantizes: rows travel as float8_e4m3fn with scale factors; else as bfloat16.
        over_network: to ranks that stores may not reach; else within one NVLink domain.
    """
    return KernelSpec(
        source="low_latency_dispatch.cu",
        function="low_latency_dispatch",
        cfg=LowLatencyDispatchCfg(
            num_threads=plan.LOW_LATENCY_THREADS,
            quantizes=int(quantizes),
            over_network=int(over_network),
        ),
        blocks_per_sm=plan.LOW_LATENCY_BLOCKS_PER_SM,
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "state", "record", "masks"),
                *_pointers("x", "topk_idx", "topk_weights", "sent_ids"),
                *_pointers("recv_x", "recv_sf", "recv_count", "src_info", "expert_rows", "layout_range"),
                *_pointers("routes", "recv_stats", "wait_stats"),
                ("timeout_ns", "<u8"),
                *_offsets("ids_offset", "weights_offset", "places_offset", "rows_offset", "sf_offset"),
                ("digest", "<u4"),
                *_ints("rank", "num_ranks", "num_tokens", "num_topk", "num_experts"),
                *_ints("num_max_tokens", "hidden", "idx_bytes"),
                *_ints("scale_mode", "has_weights", "zone", "phases"),
                *_ints("max_send_blocks", "num_clear_blocks", "num_list_blocks", "num_copy_blocks"),
                *_ints("first_rank", "num_local_ranks"),
                *_offsets("landed_offset", "out_ids_offset", "out_weights_offset", "out_rows_offset"),
                *_offsets("out_sf_offset"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
                ("areas", "<u8", (MAX_LOW_LATENCY_RANKS if over_network else MAX_LOCAL_RANKS,)),
            ],
            align=True,
        ),
        uses_network=over_network,
    )


def low_latency_combine(wire: str, *, over_network: bool = False) -> KernelSpec:
    """Combine of the low-latency mode, for every shape; rows travel as one of `WIRES`.

    Args:
        over_network: see `low_latency_dispatch`.
    """
    return KernelSpec(
        source="low_latency_combine.cu",
        function="low_latency_combine",
        cfg=LowLatencyCombineCfg(
            num_threads=plan.LOW_LATENCY_THREADS,
            wire=WIRES.index(wire),
            over_network=int(over_network),
        ),
        blocks_per_sm=plan.LOW_LATENCY_BLOCKS_PER_SM,
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "state", "record", "dispatch_record", "masks"),
                *_pointers("y", "routes", "topk_idx", "topk_weights", "sent_ids", "out", "wait_stats"),
                ("timeout_ns", "<u8"),
                *_offsets("weights_offset", "rows_offset"),
                ("digest", "<u4"),
                *_ints("rank", "num_ranks", "num_tokens", "num_topk", "num_experts"),
                *_ints("num_max_tokens", "hidden", "idx_bytes"),
                *_ints("sends_weights", "sums_at_source", "polls_data", "num_slots"),
                *_ints(
                    "zone", "dispatch_zone", "phases", "num_sum_blocks", "few_send_blocks", "max_send_blocks"
                ),
                *_ints("first_rank", "num_local_ranks"),
                *_offsets("landed_offset", "out_weights_offset", "out_rows_offset"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
                ("areas", "<u8", (MAX_LOW_LATENCY_RANKS if over_network else MAX_LOCAL_RANKS,)),
            ],
            align=True,
        ),
        uses_network=over_network,
    )


def dispatch_layout() -> KernelSpec:
    """Counts and destinations of one rank's tokens."""
    return KernelSpec(
        source="layout.cu",
        function="dispatch_layout",
        cfg=DispatchLayoutCfg(num_threads=256),
        args=np.dtype(
            [
                *_pointers("topk_idx", "num_tokens_per_rank", "num_tokens_per_expert", "num_tokens_per_node"),
                *_pointers("is_token_in_rank"),
                *_ints("num_ranks", "ranks_per_node", "num_tokens", "num_topk", "num_experts", "idx_bytes"),
            ],
            align=True,
        ),
    )


def contiguous() -> KernelSpec:
    """A contiguous copy of a matrix of any strides."""
    return KernelSpec(
        source="contiguous.cu",
        function="contiguous",
        cfg=ContiguousCfg(num_threads=256),
        args=np.dtype(
            [
                *_pointers("source", "destination"),
                ("num_rows", "<i8"),
                ("num_columns", "<i8"),
                ("row_stride_bytes", "<i8"),
                ("column_stride_bytes", "<i8"),
                ("element_bytes", "<i4"),
            ],
            align=True,
        ),
    )


def wire_limit() -> KernelSpec:
    """A plain copy from every rank to all its peers, which benchmarks hold operations against."""
    return KernelSpec(
        source="wire_limit.cu",
        function="wire_limit",
        cfg=WireLimitCfg(
            num_threads=_WIRE_STAGES.num_threads,
            num_stages=_WIRE_STAGES.num_stages,
            stage_bytes=_WIRE_STAGES.stage_bytes,
        ),
        args=np.dtype(
            [
                *_pointers("counters"),
                ("peer_bytes", "<i8"),
                *_ints("rank", "num_ranks", "pulls"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
            ],
            align=True,
        ),
        shared_bytes=_WIRE_STAGES.shared_bytes,
    )


def nvshmem_ping(scope: str) -> KernelSpec:
    """A block of bytes from every rank to every rank through NVSHMEM, put by one of `SCOPES`."""
    return KernelSpec(
        source="nvshmem_ping.cu",
        function="nvshmem_ping",
        cfg=NvshmemPingCfg(scope=SCOPES.index(scope), num_threads=MAX_RANKS),
        args=np.dtype(
            [
                *_pointers("hang", "outbox", "inbox", "signals", "epoch", "failed", "num_wrong"),
                ("timeout_ns", "<u8"),
                *_ints("rank", "num_ranks", "block_bytes"),
            ],
            align=True,
        ),
        uses_network=True,
    )


def internode_layout() -> KernelSpec:
    """Which tokens of a two-level dispatch go to which node, and how many come."""
    return KernelSpec(
        source="internode_layout.cu",
        function="internode_layout",
        cfg=InternodeLayoutCfg(num_threads=1024),
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "area", "state", "plan", "topk_idx", "is_token_in_rank"),
                *_pointers("node_masks", "lists", "positions"),
                ("timeout_ns", "<u8"),
                ("digest", "<u4"),
                *_ints("rank", "num_ranks", "node", "num_nodes", "num_tokens", "num_topk", "num_experts"),
                *_ints("idx_bytes", "node_masks_bytes"),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
            ],
            align=True,
        ),
        uses_network=True,
    )


def internode_exchange() -> KernelSpec:
    """Rows to and from the other nodes."""
    return KernelSpec(
        source="internode_exchange.cu",
        function="internode_exchange",
        cfg=InternodeExchangeCfg(num_threads=256),
        args=np.dtype(
            [
                *_pointers("hang", "workspace", "area", "state", "plan", "lists", "order", "progress"),
                *_pointers("outbox", "inbox"),
                ("timeout_ns", "<u8"),
                *_ints("rank", "num_ranks", "node", "num_nodes", "num_tokens"),
                *_ints("num_channels", "num_slots", "slot_bytes"),
                *_ints("num_ahead", "num_sections", "ahead_bytes", "row_bytes"),
                ("sections", SECTION, (MAX_SECTIONS,)),
                ("slabs", "<u8", (MAX_LOCAL_RANKS,)),
            ],
            align=True,
        ),
        blocks_per_sm=plan.EXCHANGE_BLOCKS_PER_SM,
        uses_network=True,
    )


def internode_sum(element: str) -> KernelSpec:
    """The end of a two-level combine of rows of one of `ELEMENTS`: what the nodes sent back, added."""
    return KernelSpec(
        source="internode_sum.cu",
        function="internode_sum",
        cfg=InternodeSumCfg(num_threads=256, element=ELEMENTS.index(element)),
        args=np.dtype(
            [
                *_pointers("header", "workspace", "plan", "positions", "here", "returned"),
                *_pointers("here_weights", "returned_weights"),
                ("bias", "<u8", (2,)),
                *_pointers("out", "out_weights"),
                *_ints("node", "num_nodes", "num_tokens", "row_bytes", "num_topk"),
            ],
            align=True,
        ),
        blocks_per_sm=plan.SUM_BLOCKS_PER_SM,
    )


def normal_mode_specs(*, counts: bool = False) -> list[KernelSpec]:
    """What one engine of the normal mode loads."""
    return [*_within_a_node(segmented=False, counts=counts), *_beside()]


def two_level_specs(*, counts: bool = False) -> list[KernelSpec]:
    """What one engine of the normal mode over several nodes loads, besides `two_level_network_specs`."""
    sums = [internode_sum(element) for element in ELEMENTS]
    return [*_within_a_node(segmented=True, counts=counts), *sums, *_beside()]


def _within_a_node(*, segmented: bool, counts: bool) -> list[KernelSpec]:
    flags = {"segmented": segmented, "counts": counts}
    dispatches = [intranode_dispatch(quantizes=quantizes, **flags) for quantizes in (False, True)]
    return [*dispatches, *(intranode_combine(element, **flags) for element in ELEMENTS)]


def _beside() -> list[KernelSpec]:
    """Of the normal mode, over one node or several."""
    return [expand(), *(collapse(element) for element in ELEMENTS), dispatch_layout(), contiguous()]


def low_latency_specs(*, over_network: bool = False) -> list[KernelSpec]:
    """What an engine of the low-latency mode loads besides, for one NVLink domain or for more."""
    dispatches = [
        low_latency_dispatch(quantizes=quantizes, over_network=over_network) for quantizes in (False, True)
    ]
    return [*dispatches, *(low_latency_combine(wire, over_network=over_network) for wire in WIRES)]


def two_level_network_specs() -> list[KernelSpec]:
    """What the normal mode over several nodes loads besides `two_level_specs`: it uses NVSHMEM."""
    return [internode_layout(), internode_exchange()]


def network_specs() -> list[KernelSpec]:
    """Every instance that uses NVSHMEM."""
    pings = [nvshmem_ping(scope) for scope in SCOPES]
    return [*pings, *two_level_network_specs(), *low_latency_specs(over_network=True)]


def all_specs() -> list[KernelSpec]:
    """Every other instance that can be asked for."""
    normal_mode = dict.fromkeys(
        spec
        for counts in (False, True)
        for spec in (*normal_mode_specs(counts=counts), *two_level_specs(counts=counts))
    )
    return [barrier(8), barrier(MAX_RANKS), *normal_mode, *low_latency_specs(), wire_limit()]


# The best shape of the prototype, which had no tickets: on H200 325 GB/s with 8 SMs, 342 with all.
_WIRE_STAGES: Final = plan.Stages(num_data_warps=24, num_other_warps=0, num_stages=4, stage_bytes=2048)


def _pointers(*names: str) -> list[tuple[str, str]]:
    return [(name, "<u8") for name in names]


def _offsets(*names: str) -> list[tuple[str, str]]:
    return [(name, "<i8") for name in names]


def _ints(*names: str) -> list[tuple[str, str]]:
    return [(name, "<i4") for name in names]

"""Bugs in what dispatch and combine do with segments."""

from __future__ import annotations

from typing import Final

from .planting import Mutation

SEGMENTED: Final = (
    Mutation(
        "segments: rows begin without those of the segment before",
        "intranode_dispatch.cu",
        "lower < segment; ++lower) base += shared.segments.others",
        "lower + 1 < segment; ++lower) base += shared.segments.others",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: rows begin without those of lower ranks",
        "intranode_dispatch.cu",
        "        if (src < args.rank) atomicAdd(&shared.segments.base[n][d], count);\n",
        "",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: this rank's rows of lower segments count twice",
        "intranode_dispatch.cu",
        "if (src != args.rank) atomicAdd(&shared.segments.others[n][d], count);",
        "atomicAdd(&shared.segments.others[n][d], count);",
        "segmented-r1-sm90",
    ),
    Mutation(
        "segments: counts of the other parity",
        "intranode_dispatch_block.cuh",
        "return call.exchange(args.rank)->segment_counts[call.parity];",
        "return call.exchange(args.rank)->segment_counts[call.parity ^ 1];",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: counts are taken without their stamp",
        "intranode_dispatch.cu",
        "is_stamped(value, call.epoch); });\n        if (reason != kNothing) return reason;",
        "value != 0; });\n        if (reason != kNothing) return reason;",
        "segmented-r2-sm90",
        64,
    ),
    Mutation(
        "segments: counts for the handle are read by others than those that have waited for them",
        "intranode_dispatch.cu",
        "        args.send_plan->segment_base[n][r] = shared.segments.base[n][r];\n",
        "        args.send_plan->segment_base[n][r] = shared.segments.base[n][r];\n"
        "        if (r < args.num_ranks)\n"
        "            args.send_plan->segment_counts[n][r] =\n"
        "                static_cast<uint32_t>(ptx::ld_relaxed_sys(&segment_counts()[r][n][args.rank]));\n",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: counts are added to before they are cleared",
        "intranode_dispatch.cu",
        "#endif\n    __syncthreads();\n\n    Reason reason",
        "#endif\n\n    Reason reason",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: bases are added up while counts still come",
        "intranode_dispatch.cu",
        "    reason = sync::agree(reason);\n    if (reason == kNothing && threadIdx.x",
        "    if (reason == kNothing && threadIdx.x",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: a repeated dispatch begins at the first row",
        "intranode_dispatch.cu",
        "            base = args.send_plan->segment_base[segment][d];",
        "            base = 0;",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: what has landed is looked up with the own tokens in between",
        "intranode_dispatch_block.cuh",
        "token < begin ? token : token - (end - begin)",
        "token",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: own tokens are looked up in the list",
        "intranode_dispatch_block.cuh",
        "            token -= begin;\n",
        "",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: ids are taken for this node's",
        "intranode_dispatch_block.cuh",
        "const int64_t first = kCfg.segmented ? args.first_expert : 0;",
        "const int64_t first = 0;",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: masks are taken for the first node's",
        "intranode_dispatch_layout.cuh",
        "return masks[at * args.node_masks_bytes + args.segments->own];",
        "return masks[at * args.node_masks_bytes];",
        "segmented-by-ranks-r2-sm90",
    ),
    Mutation(
        "segments: masks of own tokens are looked up in the list",
        "intranode_dispatch_layout.cuh",
        "landed < 0 ? token - index.own_begin : landed;",
        "landed < 0 ? token : landed;",
        "segmented-by-ranks-r2-sm90",
    ),
    Mutation(
        "segments: masks of what has landed are looked up with the own tokens in between",
        "intranode_dispatch_layout.cuh",
        "landed < 0 ? token - index.own_begin : landed;",
        "landed < 0 ? token - index.own_begin : token;",
        "segmented-by-ranks-r2-sm90",
    ),
    Mutation(
        "segments: rows that do not fit are sent",
        "intranode_dispatch_block.cuh",
        "return row < shared.plan.limit[destination] ? row : -1;",
        "return row;",
        "segmented-r2-sm90",
        64,
    ),
    Mutation(
        "segments: metadata of rows that do not fit are sent",
        "intranode_dispatch_metadata.cuh",
        "                if (row < 0) continue;\n",
        "",
        "segmented-r2-sm90",
        64,
    ),
    Mutation(
        "segments: rows of the longest list there can be",
        "intranode_dispatch_rows.cuh",
        "static_cast<uint32_t>(block.num_tokens())",
        "static_cast<uint32_t>(block.args.num_tokens)",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: a segment's first token belongs to the one before",
        "segments.cuh",
        "if (token >= first[n + step]) n += step;",
        "if (token > first[n + step]) n += step;",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: combine reads rows of the first segment",
        "intranode_combine_block.cuh",
        "base[shared.segments.index.of(token)][src]",
        "base[0][src]",
        "segmented-r2-sm90",
    ),
    Mutation(
        "segments: combine sums weights of the first segment",
        "intranode_combine.cu",
        "            if constexpr (kCfg.segmented) row[src] = row_of(token, row[src], src);",
        "            if constexpr (kCfg.segmented) row[src] = row_of(0, row[src], src);",
        "segmented-r2-sm90",
        64,
    ),
)

// The send phase of the low-latency dispatch: what goes where, and the rows.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// What a word tells of two pairs.
template <LowLatencyDispatchCfg kCfg>
__device__ typename LowLatencyDispatchBlock<kCfg>::IdWord LowLatencyDispatchBlock<kCfg>::load_ids(
    int32_t at) const {
    IdWord word{0, {0.0f, 0.0f}};
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
        const int32_t pair = 2 * at + half;
        const bool is_pair = pair < args.num_tokens * args.num_topk;
        const int32_t e = is_pair ? expert(pair) : -1;
        word.ids |= (e < 0 ? kNoExpert : static_cast<uint32_t>(e)) << (16 * half);
        if (is_pair && args.topk_weights != nullptr) word.weights[half] = args.topk_weights[pair];
    }
    return word;
}

// What rank `dst` lists our rows from: all our ids, and the weights of the pairs that it gets. Nothing is
// counted first, so that these words leave before the rows crowd the links.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_metadata(int32_t dst, IdWord next) const {
    const int32_t num_words = num_id_words(args.num_tokens);
    const Reason reason = low_latency::await_zone(session, shared.found);
    if (reason != kNothing || !(shared.found.ranks >> dst & 1)) return reason;

    const uint64_t epoch = session.call.epoch;
    LowLatencyArea* area = session.area(dst);
    if (threadIdx.x == 0)
        ptx::st_relaxed_sys(&area->num_tokens[args.zone][args.rank], stamped(epoch, args.num_tokens));
    if (threadIdx.x == kWarpSize)
        ptx::st_relaxed_sys(&area->digests[args.zone][args.rank], stamped(epoch, args.digest));
    uint64_t *to_ids = ids(dst, args.rank), *to_weights = weights(dst, args.rank);
#pragma unroll 1
    for (int32_t at = threadIdx.x; at < num_words; at += blockDim.x) {
        const IdWord word = next;
        next = load_ids(at + static_cast<int32_t>(blockDim.x));
        ptx::st_relaxed_sys(&to_ids[at], stamped(epoch, word.ids));
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
            const int32_t e = expert_in(word.ids, half);
            if (args.topk_weights != nullptr && e >= 0 && e / num_local_experts == dst)
                ptx::st_relaxed_sys(&to_weights[2 * at + half],
                                    stamped(epoch, __float_as_uint(word.weights[half])));
        }
    }
    // A receiver that may go on without us wants to know first that all of this is there.
    if (args.masks != nullptr) {
        __syncthreads();
        if (threadIdx.x == 0)
            ptx::st_release_sys(&area->flags[args.zone][args.rank][num_send_blocks(args.num_tokens)],
                                stamped(epoch, 1));
    }
    return kNothing;
}

// Which vector of a row a lane has as the v-th one of a piece: two neighbours where they become one of FP8.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ int32_t LowLatencyDispatchBlock<kCfg>::vector_of(int32_t piece, int32_t v) const {
    return piece * low_latency::kPieceVectors + (kQuantizes ? 2 * lane + v : v * kWarpSize + lane);
}

// A lane's part of a piece of a row of ours, and of its ids; zeros and -1 past the last turn.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ typename LowLatencyDispatchBlock<kCfg>::Piece
LowLatencyDispatchBlock<kCfg>::load_piece(int32_t turn) const {
    Piece piece{{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}, {-1, -1}};
    if (turn >= args.num_tokens * num_pieces) return piece;
    const int32_t token = turn / num_pieces;
    const auto* row = reinterpret_cast<const uint4*>(args.x + int64_t{token} * args.hidden * 2);
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t vector = vector_of(turn % num_pieces, v), k = v * kWarpSize + lane;
        if (vector < num_vectors) piece.vectors[v] = ptx::ld_stream(&row[vector]);
        if (k < args.num_topk) piece.experts[v] = expert(int64_t{token} * args.num_topk + k);
    }
    return piece;
}

// Our rows, once to each rank that owns an expert of them: warps take pieces in turn.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_rows(int32_t block, int32_t num_blocks,
                                                           Piece next) const {
    const int32_t num_turns = args.num_tokens * num_pieces, step = num_blocks * kNumWarps;
    const Reason reason = low_latency::await_zone(session, shared.found);
    if (reason != kNothing) return reason;
    const uint32_t reachable = shared.found.ranks;
#pragma unroll 1
    for (int32_t turn = block + num_blocks * warp; turn < num_turns; turn += step) {
        const Piece current = next;
        next = load_piece(turn + step);
        const int32_t token = turn / num_pieces, piece = turn % num_pieces;
        uint32_t mine = 0;
#pragma unroll
        for (int32_t v = 0; v < 2; ++v) {
            const int32_t k = v * kWarpSize + lane, e = current.experts[v];
            if (e >= 0) mine |= 1u << (e / num_local_experts);
            if (piece == 0 && k < args.num_topk) args.sent_ids[int64_t{token} * args.num_topk + k] = e;
        }
        const uint32_t wanted = __reduce_or_sync(kFullWarp, mine) & reachable;
        const int32_t vector = vector_of(piece, 0);
        uint4 cast = make_uint4(0, 0, 0, 0);
        uint32_t scale = 0;
        if constexpr (kQuantizes) {
            float factor;
            cast = fp8::cast_pair(current.vectors, args.scale_mode != kFloatScales, factor);
            scale = __float_as_uint(factor);
            if (args.scale_mode == kPackedScales) {
                // A piece has four scale factors, in lanes 0, 8, 16 and 24; 0 past the end of the row.
                const uint32_t exponent = vector < num_vectors ? scale >> 23 : 0;
                scale = exponent;
#pragma unroll
                for (int32_t i = 1; i < 4; ++i)
                    scale |= __shfl_sync(kFullWarp, exponent, i * fp8::kLanesPerPair) << (8 * i);
            }
        }
#pragma unroll
        for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
            if (d >= args.num_ranks) break;
            const int32_t dst =
                args.rank + d < args.num_ranks ? args.rank + d : args.rank + d - args.num_ranks;
            if (!(wanted >> dst & 1)) continue;
            auto* to = reinterpret_cast<uint4*>(row(dst, args.rank, token));
            if constexpr (kQuantizes) {
                if (vector < num_vectors) to[vector / 2] = cast;
                uint32_t* to_scales = scales(dst, args.rank, token);
                if (args.scale_mode == kPackedScales) {
                    if (lane == 0) to_scales[piece] = scale;
                } else if (lane % fp8::kLanesPerPair == 0 && vector < num_vectors) {
                    to_scales[vector / (2 * fp8::kLanesPerPair)] = scale;
                }
            } else {
#pragma unroll
                for (int32_t v = 0; v < 2; ++v)
                    if (vector_of(piece, v) < num_vectors) to[vector_of(piece, v)] = current.vectors[v];
            }
        }
    }
    low_latency::post_flags(session, shared.found, block);
    return kNothing;
}

}  // namespace ep

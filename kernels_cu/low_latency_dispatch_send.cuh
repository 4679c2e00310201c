// The send phase of the low-latency dispatch: what goes where, and the rows.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Puts the next ids into shared memory, as local experts of rank `dst`. How many. Two barriers.
template <LowLatencyDispatchCfg kCfg>
__device__ int32_t LowLatencyDispatchBlock<kCfg>::load_experts(int32_t first, int32_t num_ids,
                                                               int32_t dst) const {
    constexpr int32_t kRoom = sizeof(shared.send.experts) / sizeof(int32_t);
    const int32_t num = min(num_ids - first, kRoom), first_expert = dst * num_local_experts;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num; i += blockDim.x) {
        const int32_t local = expert(first + i) - first_expert;
        shared.send.experts[i] = local >= 0 && local < num_local_experts ? local : -1;
    }
    __syncthreads();
    return num;
}

// Calls `each(i)` for every loaded id of a segment that is expert `e`, in order. How many there are.
template <LowLatencyDispatchCfg kCfg>
template <class Each>
__device__ int32_t LowLatencyDispatchBlock<kCfg>::of_segment(int32_t num_loaded, int32_t e, int32_t segment,
                                                             int32_t num_segments, Each each) const {
    const int32_t length = (num_loaded + num_segments - 1) / num_segments;
    const int32_t end = min(num_loaded, (segment + 1) * length);
    int32_t count = 0;
#pragma unroll 4
    for (int32_t i = segment * length; i < end; ++i) {
        if (shared.send.experts[i] != e) continue;
        each(i, count);
        ++count;
    }
    return count;
}

// To rank `dst`: how many pairs each of its experts gets from here, and which ones, sorted by expert, then by
// token and column. A thread counts one expert in a segment of the ids, so lanes read the same id at a time.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_metadata(int32_t dst) const {
    auto& send = shared.send;
    const int32_t num_ids = args.num_tokens * args.num_topk, num_threads = blockDim.x;
    const int32_t width = min(num_local_experts, num_threads), num_segments = num_threads / width;
    const int32_t segment = threadIdx.x / width, first_expert = threadIdx.x % width;
    const bool is_counting = segment < num_segments;
    const uint64_t epoch = session.call.epoch;
    if (threadIdx.x == 0) shared.is_overfull = false;
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < num_local_experts; e += num_threads) send.totals[e] = 0;

    int32_t num_loaded = 0;
    for (int32_t first = 0; first < num_ids; first += num_loaded) {
        num_loaded = load_experts(first, num_ids, dst);
#pragma unroll 1
        for (int32_t e = first_expert; is_counting && e < num_local_experts; e += width) {
            const int32_t count = of_segment(num_loaded, e, segment, num_segments, [](int32_t, int32_t) {});
            send.parts[segment * num_local_experts + e] = count;
            if (count > 0) atomicAdd(&send.totals[e], count);
        }
    }
    const bool is_loaded = num_loaded == num_ids;
    __syncthreads();
    LowLatencyArea* area = session.area(dst);
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < num_local_experts; e += num_threads) {
        if (send.totals[e] > args.num_max_tokens) shared.is_overfull = true;
        ptx::st_relaxed_sys(&area->counts[args.zone][args.rank][e], stamped(epoch, send.totals[e]));
    }
    if (threadIdx.x == 0) {
        ptx::st_relaxed_sys(&area->num_tokens[args.zone][args.rank], stamped(epoch, args.num_tokens));
        ptx::st_relaxed_sys(&area->digests[args.zone][args.rank], stamped(epoch, args.digest));
    }
    if (warp == 0)
        low_latency::scan(
            num_local_experts, lane, [&](int32_t e) { return send.totals[e]; },
            [&](int32_t e, int32_t before) { send.base[e] = before; });
    __syncthreads();
    if (shared.is_overfull) return kOverfull;

    uint64_t* entries = words(args.entries_offset, dst, args.rank);
    uint64_t* weights = words(args.weights_offset, dst, args.rank);
    for (int32_t first = 0; first < num_ids; first += num_loaded) {
        if (!is_loaded) {
            num_loaded = load_experts(first, num_ids, dst);
#pragma unroll 1
            for (int32_t e = first_expert; is_counting && e < num_local_experts; e += width)
                send.parts[segment * num_local_experts + e] =
                    of_segment(num_loaded, e, segment, num_segments, [](int32_t, int32_t) {});
            __syncthreads();
        }
#pragma unroll 1
        for (int32_t e = first_expert; is_counting && e < num_local_experts; e += width) {
            int32_t at = send.base[e];
#pragma unroll 1
            for (int32_t before = 0; before < segment; ++before)
                at += send.parts[before * num_local_experts + e];
            of_segment(num_loaded, e, segment, num_segments, [&](int32_t i, int32_t number) {
                ptx::st_relaxed_sys(&entries[at + number], stamped(epoch, first + i));
                if (args.topk_weights != nullptr)
                    ptx::st_relaxed_sys(&weights[at + number],
                                        stamped(epoch, __float_as_uint(args.topk_weights[first + i])));
            });
        }
        if (is_loaded) break;
        __syncthreads();
#pragma unroll 1
        for (int32_t e = threadIdx.x; e < num_local_experts; e += num_threads)
#pragma unroll 1
            for (int32_t each = 0; each < num_segments; ++each)
                send.base[e] += send.parts[each * num_local_experts + e];
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

// Our rows, once to each rank that owns an expert of them: warps take pieces in turn.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_rows(int32_t block, int32_t num_blocks) const {
    struct Piece {
        uint4 vectors[2];
        int32_t experts[2];  // columns `lane` and `lane` + 32
    };
    const int32_t num_turns = args.num_tokens * num_pieces, step = num_blocks * kNumWarps;
    // A lane has two neighbouring vectors where they become one of FP8.
    const auto vector_of = [&](int32_t piece, int32_t v) {
        return piece * low_latency::kPieceVectors + (kQuantizes ? 2 * lane + v : v * kWarpSize + lane);
    };
    const auto load = [&](int32_t turn) {
        Piece piece{{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}, {-1, -1}};
        if (turn >= num_turns) return piece;
        const int32_t token = turn / num_pieces;
        const auto* row = reinterpret_cast<const uint4*>(args.x + int64_t{token} * args.hidden * 2);
#pragma unroll
        for (int32_t v = 0; v < 2; ++v) {
            const int32_t vector = vector_of(turn % num_pieces, v), k = v * kWarpSize + lane;
            if (vector < num_vectors) piece.vectors[v] = ptx::ld_stream(&row[vector]);
            if (k < args.num_topk) piece.experts[v] = expert(int64_t{token} * args.num_topk + k);
        }
        return piece;
    };
    int32_t turn = block + num_blocks * warp;
    Piece next = load(turn);
    const Reason reason = low_latency::await_zone(session, shared.found);
    if (reason != kNothing) return reason;
    const uint32_t reachable = shared.found.ranks;
#pragma unroll 1
    for (; turn < num_turns; turn += step) {
        const Piece current = next;
        next = load(turn + step);
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
                // A piece has four scale factors, in lanes 0, 8, 16 and 24; past the end of the row they are
                // 0.
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

// The lists of the low-latency dispatch: where the rows that come for each expert belong.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Puts the next ids of a source rank into shared memory, as our experts. Other threads have seen these words,
// which does not mean that this one does. Two barriers.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::load_experts(int32_t src, int32_t first, int32_t num) const {
    Reason reason = kNothing;
    __syncthreads();
    for (int32_t i = 2 * threadIdx.x; i < num && reason == kNothing; i += 2 * blockDim.x) {
        uint64_t word = 0;
        reason = low_latency::await_stamped(session, ids(args.rank, src) + (first + i) / 2, src, word);
        blame(reason, src);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half)
            shared.experts[i + half] = static_cast<int16_t>(local_expert(expert_in(word, half)));
    }
    __syncthreads();
    return reason;
}

// Calls `each(i, e, number)` for the loaded ids that this warp looks at: the i-th one is our expert e, and of
// the warp's ids the number-th one that is; `numbers` holds how many there were of each expert so far.
template <LowLatencyDispatchCfg kCfg>
template <class Each>
__device__ void LowLatencyDispatchBlock<kCfg>::of_warp(int32_t num_loaded, uint16_t* numbers,
                                                       Each each) const {
    const int32_t num_chunks = (num_loaded + kWarpSize - 1) / kWarpSize;
    const int32_t per_warp = (num_chunks + kNumWarps - 1) / kNumWarps;
    const int32_t end = min(num_chunks, (warp + 1) * per_warp);
#pragma unroll 1
    for (int32_t chunk = warp * per_warp; chunk < end; ++chunk) {
        const int32_t i = chunk * kWarpSize + lane, e = i < num_loaded ? shared.experts[i] : -1;
        const uint32_t alike = __match_any_sync(kFullWarp, e);
        const uint32_t before = alike & ((1u << lane) - 1);
        const int32_t number = e < 0 ? 0 : numbers[e];
        __syncwarp();
        if (e >= 0 && before == 0) numbers[e] = static_cast<uint16_t>(number + __popc(alike));
        __syncwarp();
        if (e >= 0) each(i, e, number + __popc(before));
    }
}

// A pair is the row `number` of our expert e.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ void LowLatencyDispatchBlock<kCfg>::place_pair(int32_t src, int32_t pair,
                                                                          int32_t e, int32_t number) const {
    const int32_t token = pair / args.num_topk;
    const int64_t at = e * rows_per_expert() + number;
    args.src_info[at] = token;
    if (args.expert_rows != nullptr) args.expert_rows[at] = src * args.num_max_tokens + token;
    routes(src)[pair].row = static_cast<int32_t>(at);
    if (args.num_copy_blocks != 0)
        ptx::st_relaxed_gpu(&places(src)[pair], stamped(session.call.epoch, static_cast<uint32_t>(at)));
}

// As list_pairs, for so few that one warp does it, and asks for nothing but what they need. It goes on with
// the counts of those before the share.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list_few(const Share& share) const {
    const int32_t src = share.src, end = min(share.end, shared.tokens[src] * args.num_topk);
    Reason reason = kNothing;
    if (warp == 0) {
#pragma unroll 1
        for (int32_t first = share.first; first < end; first += kWarpSize) {
            const int32_t pair = first + lane, e = pair < end ? shared.experts[pair - share.first] : -1;
            const uint64_t* weight = &weights(args.rank, src)[pair];
            const bool has_weight = e >= 0 && args.has_weights && reason == kNothing;
            uint64_t seen = has_weight ? ptx::ld_relaxed_sys(weight) : 0;
            const uint32_t alike = __match_any_sync(kFullWarp, e);
            const int32_t num_before = __popc(alike & ((1u << lane) - 1));
            int32_t number = num_before;
            for (int32_t before = 0; before <= src && e >= 0; ++before)
                number += shared.counts[before * num_local_experts + e];
            __syncwarp();
            if (e >= 0 && num_before == 0) shared.counts[src * num_local_experts + e] += __popc(alike);
            __syncwarp();
            if (e >= 0) place_pair(src, pair, e, number);
            if (!has_weight) continue;
            if (!is_stamped(seen, session.call.epoch))
                reason = low_latency::await_stamped(session, weight, src, seen);
            routes(src)[pair].weight = __uint_as_float(static_cast<uint32_t>(seen));
        }
    }
    blame(reason, src);
    return sync::agree(reason);
}

// Where the pairs of a share belong, sorted by expert, then by token and column, behind those of lower
// sources and of shares before it. Warps take stretches of the ids in order: first they count, then they know
// where theirs begin.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list_pairs(const Share& share) const {
    auto& lists = shared.lists;
    const int32_t src = share.src, num_pairs = min(share.end, shared.tokens[src] * args.num_topk);
    const uint64_t* weights = this->weights(args.rank, src);
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x) {
        int32_t rows = 0;
#pragma unroll 1
        for (int32_t before = 0; before <= src; ++before)
            rows += shared.counts[before * num_local_experts + e];
        lists.base[e] = rows;
    }
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t first = share.first; first < num_pairs; first += Shared::kStretch) {
        const int32_t num_loaded = min(num_pairs - first, Shared::kStretch);
        if (first > share.first) {
            const Reason loaded = load_experts(src, first, num_loaded);
            if (loaded != kNothing) reason = loaded;
        }
        const auto number_of = [](int32_t v) {
            return static_cast<int32_t>(threadIdx.x) + v * kCfg.num_threads;
        };
        // On their way while pairs are counted.
        uint64_t seen[Shared::kPairsEach];
        bool is_ours[Shared::kPairsEach];
#pragma unroll
        for (int32_t v = 0; v < Shared::kPairsEach; ++v) {
            const int32_t i = number_of(v);
            is_ours[v] = args.has_weights && i < num_loaded && shared.experts[i] >= 0;
            seen[v] = is_ours[v] ? ptx::ld_relaxed_sys(&weights[first + i]) : 0;
        }
        for (int32_t e = lane; e < num_local_experts; e += kWarpSize) lists.numbers[warp][e] = 0;
        __syncwarp();
        of_warp(num_loaded, lists.numbers[warp], [](int32_t, int32_t, int32_t) {});
        __syncthreads();
#pragma unroll 1
        for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x) {
            uint32_t before = 0;
#pragma unroll
            for (int32_t each = 0; each < kNumWarps; ++each) {
                const uint32_t count = lists.numbers[each][e];
                lists.numbers[each][e] = static_cast<uint16_t>(before);
                before += count;
            }
        }
        __syncthreads();
        of_warp(num_loaded, lists.numbers[warp], [&](int32_t i, int32_t e, int32_t number) {
            place_pair(src, first + i, e, lists.base[e] + number);
        });
#pragma unroll
        for (int32_t v = 0; v < Shared::kPairsEach; ++v) {
            if (!is_ours[v] || reason != kNothing) continue;
            const int32_t pair = first + number_of(v);
            if (!is_stamped(seen[v], session.call.epoch))
                reason = low_latency::await_stamped(session, &weights[pair], src, seen[v]);
            routes(src)[pair].weight = __uint_as_float(static_cast<uint32_t>(seen[v]));
        }
        if (first + num_loaded == num_pairs) break;
        __syncthreads();
        for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x)
            lists.base[e] += lists.numbers[kNumWarps - 1][e];
    }
    blame(reason, src);
    return sync::agree(reason);
}

// The lists of what came from a source rank, as far as this block makes them.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list(const Share& share) const {
    const int32_t src = share.src;
    bool is_overfull = false;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        is_overfull |= shared.listed[e] > args.num_max_tokens;
    if (__syncthreads_or(is_overfull)) {
        if (threadIdx.x == 0) atomicOr(&shared.found.missing, 1u << src);
        return kOverfull;
    }
    const int32_t num_pairs = min(share.end, shared.tokens[src] * args.num_topk) - share.first;
    const Reason reason = num_pairs <= Shared::kFewPairs ? list_few(share) : list_pairs(share);
    if (reason != kNothing) return reason;
    // Those who copy know by this who takes part.
    if (threadIdx.x == 0 && share.first == 0 && args.num_copy_blocks != 0 && args.masks != nullptr)
        ptx::st_relaxed_gpu(&session.state->listed[args.zone][src],
                            stamped(session.call.epoch, shared.tokens[src]));
    return kNothing;
}

}  // namespace ep

// The receive phase of the low-latency dispatch: which rows came, where they belong, and their copies.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Waits for what the source ranks [first_src, last_src) say of themselves. A barrier.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_tokens(int32_t first_src, int32_t last_src) const {
    const int32_t src = first_src + static_cast<int32_t>(threadIdx.x) / 2;
    Reason reason = kNothing;
    if (src < last_src) {
        const bool is_digest = threadIdx.x % 2 == 1;
        const LowLatencyArea* own = session.own();
        uint64_t seen = 0;
        reason = low_latency::await_stamped(
            session, is_digest ? &own->digests[args.zone][src] : &own->num_tokens[args.zone][src], src, seen);
        const auto value = static_cast<uint32_t>(seen);
        if (reason == kNothing && is_digest && value != args.digest) reason = kDisagreed;
        if (reason == kNothing && !is_digest) shared.tokens[src] = static_cast<int32_t>(value);
        blame(reason, src);
    }
    return sync::agree(reason);
}

// A barrier.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::clear_counts(int32_t first_src, int32_t last_src,
                                                            int32_t listed_src) const {
    for (int32_t i = threadIdx.x; i < (last_src - first_src) * num_local_experts; i += blockDim.x)
        shared.counts[first_src * num_local_experts + i] = 0;
    if (first_src <= listed_src && listed_src < last_src)
        for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) shared.listed[e] = 0;
    __syncthreads();
}

// Waits for the ids of the source ranks [first_src, last_src), whose tokens are known, and counts those of
// our experts, and of `listed_src` those of all. Barriers.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_ids(int32_t first_src, int32_t last_src,
                                                          int32_t listed_src) const {
    constexpr int32_t kDepth = 8;
    clear_counts(first_src, last_src, listed_src);
    int32_t total = 0;
    for (int32_t src = first_src; src < last_src; ++src) total += num_id_words(shared.tokens[src]);
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t first = threadIdx.x; first < total && reason == kNothing; first += kDepth * blockDim.x) {
        const uint64_t* words[kDepth];
        uint64_t seen[kDepth];
        int32_t sources[kDepth];
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) {
            int32_t at = first + i * static_cast<int32_t>(blockDim.x);
            seen[i] = 0;
            sources[i] = last_src;
            if (at >= total) continue;
            for (sources[i] = first_src; at >= num_id_words(shared.tokens[sources[i]]); ++sources[i])
                at -= num_id_words(shared.tokens[sources[i]]);
            words[i] = ids(args.rank, sources[i]) + at;
            seen[i] = ptx::ld_relaxed_sys(words[i]);
        }
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) {
            const int32_t src = sources[i];
            if (src == last_src || reason != kNothing) continue;
            if (!is_stamped(seen[i], session.call.epoch))
                reason = low_latency::await_stamped(session, words[i], src, seen[i]);
            blame(reason, src);
            if (reason != kNothing) continue;
#pragma unroll
            for (int32_t half = 0; half < 2; ++half) {
                const int32_t e = expert_in(seen[i], half), local = e - args.rank * num_local_experts;
                if (e < 0) continue;
                if (src == listed_src) atomicAdd(&shared.listed[e], 1);
                if (local >= 0 && local < num_local_experts)
                    atomicAdd(&shared.counts[src * num_local_experts + local], 1);
            }
        }
    }
    return sync::agree(reason);
}

// Learns who takes part, and how many rows come for each expert from where. A barrier. With masks a source
// takes part if all of its rows are there, so that nobody has to change their mind later.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_sources(int32_t listed_src) const {
    const int32_t step = args.masks == nullptr ? args.num_ranks : 1;
    bool is_decided = false;  // by another block, while this one saw less: the source is there all the same
#pragma unroll 1
    for (int32_t src = 0; src < args.num_ranks;) {
        Reason reason = kExpired;
        if (is_decided || !__syncthreads_or(session.is_masked(src))) {
            reason = read_tokens(src, src + step);
            if (reason == kNothing) reason = read_ids(src, src + step, listed_src);
        }
        if (args.masks != nullptr && !is_decided) {
            if (reason == kNothing)
                reason = low_latency::await_flags(session, shared.found, src,
                                                  num_send_blocks(shared.tokens[src]) + 1);
            if (reason != kNothing && reason != kExpired) return reason;
            if (threadIdx.x == 0 && !low_latency::decide(session, src, reason == kNothing)) {
                shared.found.ranks &= ~(1u << src);
                shared.tokens[src] = 0;
                ptx::st_relaxed_gpu(&args.masks[src], 1);
            }
            __syncthreads();
            is_decided = (shared.found.ranks >> src & 1) != 0 && reason != kNothing;
            if (is_decided) continue;
            if (!(shared.found.ranks >> src & 1)) clear_counts(src, src + 1, listed_src);
            reason = kNothing;
        }
        if (reason != kNothing) return reason;
        is_decided = false;
        src += step;
    }
    return kNothing;
}

// What callers are told of each expert, and clean ends: every R-th expert is of block `part`.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::tell(int32_t part) const {
    const auto& counts = shared.counts;
#pragma unroll 1
    for (int32_t e = part + args.num_ranks * threadIdx.x; e < num_local_experts;
         e += args.num_ranks * kCfg.num_threads) {
        int32_t total = 0;
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) {
            const int32_t count = counts[src * num_local_experts + e];
            args.layout_range[int64_t{e} * args.num_ranks + src] = int64_t{total} << 32 | count;
            total += count;
        }
        args.recv_count[e] = total;
        if (args.recv_stats != nullptr) args.recv_stats[e] += total;
    }
#pragma unroll 1
    for (int32_t e = part + args.num_ranks * warp; e < num_local_experts; e += args.num_ranks * kNumWarps) {
        const int32_t count = lane < args.num_ranks ? counts[lane * num_local_experts + e] : 0;
        const int32_t total = __reduce_add_sync(kFullWarp, count);
        const int64_t first = e * rows_per_expert(), end = first + rows_per_expert();
#pragma unroll 4
        for (int64_t at = first + total + lane; at < end; at += kWarpSize) {
            args.src_info[at] = -1;
            if (args.expert_rows != nullptr) args.expert_rows[at] = -1;
        }
    }
    if (part == 0 && threadIdx.x == 0) {
        int32_t most = 0;
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) most = max(most, shared.tokens[src]);
        args.record->max_tokens = most;
    }
}

// Puts the next ids of a source rank into shared memory, as our experts. How many. Two barriers. Other
// threads have seen these words, which does not mean that this one does.
template <LowLatencyDispatchCfg kCfg>
__device__ int32_t LowLatencyDispatchBlock<kCfg>::load_experts(int32_t src, int32_t first, int32_t num_pairs,
                                                               Reason& reason) const {
    constexpr int32_t kRoom = sizeof(shared.lists.experts) / sizeof(int32_t);
    static_assert(kRoom % 2 == 0);
    const int32_t num = min(num_pairs - first, kRoom), first_expert = args.rank * num_local_experts;
    __syncthreads();
    for (int32_t i = 2 * threadIdx.x; i < num; i += 2 * blockDim.x) {
        uint64_t word = 0;
        if (reason == kNothing)
            reason = low_latency::await_stamped(session, ids(args.rank, src) + (first + i) / 2, src, word);
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
            const int32_t local = expert_in(word, half) - first_expert;
            shared.lists.experts[i + half] = local >= 0 && local < num_local_experts ? local : -1;
        }
    }
    __syncthreads();
    return num;
}

// Calls `each(i, number)` for every loaded id of a segment that is expert `e`, in order. How many there are.
template <LowLatencyDispatchCfg kCfg>
template <class Each>
__device__ int32_t LowLatencyDispatchBlock<kCfg>::of_segment(int32_t num_loaded, int32_t e, int32_t segment,
                                                             int32_t num_segments, Each each) const {
    constexpr int32_t kTogether = 4;
    const int32_t length = (num_loaded + num_segments - 1) / num_segments;
    const int32_t end = min(num_loaded, (segment + 1) * length);
    int32_t count = 0;
#pragma unroll 1
    for (int32_t first = segment * length; first < end; first += kTogether) {
        uint32_t hits = 0;
#pragma unroll
        for (int32_t i = 0; i < kTogether; ++i)
            if (first + i < end && shared.lists.experts[first + i] == e) hits |= 1u << i;
#pragma unroll 1
        for (; hits != 0; hits &= hits - 1) each(first + __ffs(static_cast<int32_t>(hits)) - 1, count++);
    }
    return count;
}

// Where the pairs of a source rank belong, sorted by expert, then by token and column, behind those of lower
// sources. A thread takes one expert in a segment of the ids, so lanes read the same id at a time.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list_pairs(int32_t src) const {
    auto& lists = shared.lists;
    const int32_t num_pairs = shared.tokens[src] * args.num_topk, num_threads = blockDim.x;
    const int32_t width = min(num_local_experts, num_threads), num_segments = num_threads / width;
    const int32_t segment = threadIdx.x / width, first_expert = threadIdx.x % width;
    const bool is_counting = segment < num_segments;
    const uint64_t* weights = this->weights(args.rank, src);
    Route* routes = args.routes + int64_t{src} * args.num_max_tokens * args.num_topk;
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < num_local_experts; e += num_threads) {
        int32_t rows = 0;
#pragma unroll 1
        for (int32_t before = 0; before < src; ++before)
            rows += shared.counts[before * num_local_experts + e];
        lists.base[e] = rows;
    }
    Reason reason = kNothing;
    int32_t num_loaded = 0;
#pragma unroll 1
    for (int32_t first = 0; first < num_pairs; first += num_loaded) {
        num_loaded = load_experts(src, first, num_pairs, reason);
#pragma unroll 1
        for (int32_t e = first_expert; is_counting && e < num_local_experts; e += width)
            lists.parts[segment * num_local_experts + e] =
                of_segment(num_loaded, e, segment, num_segments, [](int32_t, int32_t) {});
        __syncthreads();
#pragma unroll 1
        for (int32_t e = first_expert; is_counting && e < num_local_experts; e += width) {
            int64_t row = e * rows_per_expert() + lists.base[e];
#pragma unroll 1
            for (int32_t before = 0; before < segment; ++before)
                row += lists.parts[before * num_local_experts + e];
            of_segment(num_loaded, e, segment, num_segments, [&](int32_t i, int32_t number) {
                const int32_t pair = first + i, token = pair / args.num_topk;
                const int64_t at = row + number;
                uint64_t weight = 0;
                if (args.has_weights && reason == kNothing)
                    reason = low_latency::await_stamped(session, &weights[pair], src, weight);
                args.src_info[at] = token;
                if (args.expert_rows != nullptr) args.expert_rows[at] = src * args.num_max_tokens + token;
                routes[pair] = {static_cast<int32_t>(at), __uint_as_float(static_cast<uint32_t>(weight))};
            });
        }
        __syncthreads();
#pragma unroll 1
        for (int32_t e = threadIdx.x; e < num_local_experts; e += num_threads)
#pragma unroll 1
            for (int32_t each = 0; each < num_segments; ++each)
                lists.base[e] += lists.parts[each * num_local_experts + e];
    }
    blame(reason, src);
    return sync::agree(reason);
}

// One block for each source rank: the lists of what came from there.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list(int32_t src) const {
    const uint64_t began_ns = ptx::globaltimer_ns();
    const int32_t num_routes = args.num_max_tokens * args.num_topk;
    Route* routes = args.routes + int64_t{src} * num_routes;
    for (int32_t i = threadIdx.x; i < num_routes; i += blockDim.x) routes[i] = {-1, 0.0f};
    Reason reason = read_sources(src);  // the routes are cleared behind its barriers
    if (reason != kNothing) return reason;
    bool is_overfull = false;
    for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        is_overfull |= shared.listed[e] > args.num_max_tokens;
    if (__syncthreads_or(is_overfull)) return kOverfull;
    reason = list_pairs(src);
    if (reason != kNothing) return reason;
    // Those who copy read the routes: a barrier lies behind them.
    if (threadIdx.x == 0)
        ptx::st_release_gpu(&session.state->listed[args.zone][src],
                            stamped(session.call.epoch, shared.tokens[src]));
    tell(src);  // while rows are on their way
    if (!(shared.found.ranks >> src & 1)) return kNothing;
    reason = low_latency::await_flags(session, shared.found, src, num_send_blocks(shared.tokens[src]));
    if (args.wait_stats != nullptr && threadIdx.x == 0)
        args.wait_stats[src] += static_cast<int64_t>((ptx::globaltimer_ns() - began_ns) / 1000);
    return reason;
}

// The rows of the landing zone to all their experts, in parts of a row for each turn of a warp.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_rows(int32_t block, int32_t num_blocks) const {
    const int32_t each = threadIdx.x;
    Reason reason = kNothing;
    if (each < args.num_ranks) {
        const uint64_t* word = &session.state->listed[args.zone][each];
        uint64_t seen = 0;
        // The block that lists waits for a peer, with a deadline of its own.
        while (reason == kNothing && !is_stamped(seen = ptx::ld_acquire_gpu(word), session.call.epoch))
            if (session.call.has_failed()) reason = kLeft;
        shared.tokens[each] = static_cast<int32_t>(static_cast<uint32_t>(seen));
    }
    reason = sync::agree(reason);
    if (reason != kNothing) return reason;
    int32_t num_tokens = 0;
    for (int32_t src = 0; src < args.num_ranks; ++src) num_tokens += shared.tokens[src];
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t num_parts = (num_row_vectors + kPartVectors - 1) / kPartVectors;
#pragma unroll 1
    for (int32_t turn = block + num_blocks * warp; turn < num_tokens * num_parts && reason == kNothing;
         turn += num_blocks * kNumWarps) {
        int32_t src = 0, token = turn / num_parts;
        while (token >= shared.tokens[src]) token -= shared.tokens[src++];
        reason = copy_row(src, token, turn % num_parts);
    }
    return reason;
}

// Part of a row to all its experts, as a warp; with the first part its scale factors. The same reason in all
// lanes.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_row(int32_t src, int32_t token, int32_t part) const {
    constexpr int32_t kDepth = kPartVectors / kWarpSize;
    // Vectors of a row in a piece of it.
    constexpr int32_t kPieceVectors = low_latency::kPieceVectors / (kQuantizes ? 2 : 1);
    const bool with_scales = kQuantizes && part == 0;
    const Route* routes = args.routes + (int64_t{src} * args.num_max_tokens + token) * args.num_topk;
    int32_t to_rows[2];
    uint32_t listed[2];
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t k = v * kWarpSize + lane;
        to_rows[v] = k < args.num_topk ? routes[k].row : -1;
        listed[v] = __ballot_sync(kFullWarp, to_rows[v] >= 0);
    }
    if ((listed[0] | listed[1]) == 0) return kNothing;

    // The pieces that this part lies in; each came from some block of the source.
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t first_vector = part * kPartVectors;
    const int32_t end_vector = min(num_row_vectors, first_vector + kPartVectors);
    const int32_t first_piece = with_scales ? 0 : first_vector / kPieceVectors;
    const int32_t end_piece = with_scales ? num_pieces : (end_vector + kPieceVectors - 1) / kPieceVectors;
    const int32_t num_blocks = num_send_blocks(shared.tokens[src]);
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t piece = first_piece + lane; piece < end_piece && reason == kNothing; piece += kWarpSize) {
        const uint64_t* flag =
            &session.own()->flags[args.zone][src][(token * num_pieces + piece) % num_blocks];
        uint64_t seen;
        reason = low_latency::await_stamped<low_latency::kAcquires>(session, flag, src, seen);
    }
    blame(reason, src);
    const uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    __syncwarp();  // what one lane acquired, all lanes may read
    if (worst != kNothing) return static_cast<Reason>(worst);

    const auto* from = reinterpret_cast<const uint4*>(row(args.rank, src, token));
    uint4 vectors[kDepth];
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        const int32_t vector = first_vector + i * kWarpSize + lane;
        if (vector < end_vector) vectors[i] = from[vector];
    }
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        for (uint32_t left = listed[v]; left != 0; left &= left - 1) {
            const int64_t to_row = __shfl_sync(kFullWarp, to_rows[v], __ffs(static_cast<int32_t>(left)) - 1);
            auto* to = reinterpret_cast<uint4*>(args.recv_x + to_row * row_bytes());
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                const int32_t vector = first_vector + i * kWarpSize + lane;
                if (vector < end_vector) to[vector] = vectors[i];
            }
            if (!with_scales) continue;
            const uint32_t* from_scales = scales(args.rank, src, token);
            const int32_t num_words = scale_words();
            const int64_t e = to_row / rows_per_expert(), at = to_row % rows_per_expert();
#pragma unroll 1
            for (int32_t i = lane; i < num_words; i += kWarpSize)
                args.recv_sf[(e * num_words + i) * rows_per_expert() + at] = from_scales[i];
        }
    }
    return kNothing;
}

}  // namespace ep

// The receive phase of the low-latency dispatch: which rows came, where they belong, and their copies.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Before the counts of [first_src, last_src) are made.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::clear_counts(int32_t first_src, int32_t last_src,
                                                            const Share& share) const {
    for (int32_t i = threadIdx.x; i < (last_src - first_src) * num_local_experts; i += blockDim.x)
        shared.counts[first_src * num_local_experts + i] = 0;
    if (first_src <= share.src && share.src < last_src)
        for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) shared.listed[e] = 0;
}

// Counts what a word with two ids says. Of the source whose pairs this block lists, for all experts, and of
// ours those before its share, whose first ones are kept.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::count(uint64_t word, int32_t src, int32_t at,
                                                     const Share& share) const {
    const bool is_listed = src == share.src;
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
        const int32_t e = expert_in(word, half), local = local_expert(e), i = 2 * at + half - share.first;
        if (is_listed && i >= 0 && i < Shared::kStretch) shared.experts[i] = static_cast<int16_t>(local);
        if (is_listed && e >= 0) atomicAdd(&shared.listed[e], 1);
        if (local >= 0 && (!is_listed || i < 0))
            atomicAdd(&shared.counts[src * num_local_experts + local], 1);
    }
}

// What a thread does of read_ids: it looks at every `step`-th word of a source from word `first` on. What a
// source says of itself and its ids arrive together, so this asks for all of them at a time: a trip to memory
// for one after the other takes as long as the words travel.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_words(int32_t src, int32_t first, int32_t step,
                                                            const Share& share) const {
    constexpr int32_t kDepth = 4;
    enum : uint32_t { kTokens = 1, kDigest = 2 };
    LowLatencyArea* own = session.own();
    const uint64_t* tokens = &own->num_tokens[args.zone][src];
    const uint64_t* digest = &own->digests[args.zone][src];
    const uint64_t* words = ids(args.rank, src);
    const bool is_first = first == 0;
    Reason reason = kNothing;
    if (!session.reaches(src)) {
        reason = low_latency::await_put(session, &own->told_ids[args.zone][src], src);
        if (is_first && args.has_weights && reason == kNothing)
            reason = low_latency::await_put(session, &own->told_weights[args.zone][src], src);
    }
    uint32_t untold = is_first ? kTokens | kDigest : kTokens;
    int32_t end = num_id_words(args.num_max_tokens);  // at most, till it is known
#pragma unroll 1
    for (int32_t at = first; at < end && reason == kNothing; at += kDepth * step) {
        uint64_t seen[kDepth], told_tokens = 0, told_digest = 0;
        uint32_t missing = (1u << kDepth) - 1;
#pragma unroll 1
        for (uint32_t polls = 1;; ++polls) {
            if (untold & kTokens) told_tokens = ptx::ld_relaxed_sys(tokens);
            if (untold & kDigest) told_digest = ptx::ld_relaxed_sys(digest);
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v)
                if (missing >> v & 1 && at + v * step < end)
                    seen[v] = ptx::ld_relaxed_sys(&words[at + v * step]);
            if (untold & kTokens && is_stamped(told_tokens, session.call.epoch)) {
                untold &= ~kTokens;
                const auto num_tokens = static_cast<int32_t>(static_cast<uint32_t>(told_tokens));
                end = num_id_words(num_tokens);
                if (is_first) {
                    shared.tokens[src] = num_tokens;
                    shared.arrived_ns[src] = ptx::globaltimer_ns();
                }
            }
            if (untold & kDigest && is_stamped(told_digest, session.call.epoch)) {
                untold &= ~kDigest;
                if (static_cast<uint32_t>(told_digest) != args.digest) return kDisagreed;
            }
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v)
                if (missing >> v & 1 && (at + v * step >= end || is_stamped(seen[v], session.call.epoch)))
                    missing &= ~(1u << v);
            if ((missing | untold) == 0) break;
            if (polls % 64 != 0) continue;
            const uint64_t* word = untold & kTokens ? tokens : digest;
            if (untold == 0) word = &words[at + (__ffs(static_cast<int32_t>(missing)) - 1) * step];
            uint64_t there;
            reason = low_latency::await_stamped(session, word, src, there);
            if (reason != kNothing) return reason;
        }
#pragma unroll
        for (int32_t v = 0; v < kDepth; ++v)
            if (at + v * step < end) count(seen[v], src, at + v * step, share);
    }
    return reason;
}

// Waits for what the source ranks [first_src, last_src) say of themselves, for the lists that they put here,
// and for their ids, and counts those of our experts. Each thread looks at one source. A barrier.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_ids(int32_t first_src, int32_t last_src,
                                                          const Share& share) const {
    clear_counts(first_src, last_src, share);
    __syncthreads();
    const int32_t num_sources = last_src - first_src, step = kCfg.num_threads / num_sources;
    const int32_t number = static_cast<int32_t>(threadIdx.x);
    const int32_t src = first_src + number % num_sources, first = number / num_sources;
    Reason reason = kNothing;
    if (first < step) reason = read_words(src, first, step, share);
    blame(reason, src);
    return sync::agree(reason);
}

// Learns who takes part, and how many rows come for each expert from where. A barrier. With masks a source
// takes part if all of its rows are there, so that nobody has to change their mind later.
// `share`: whose routes are cleared, to be listed then.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_sources(const Share& share) const {
    for (int32_t i = share.first + threadIdx.x; i < share.end; i += blockDim.x)
        routes(share.src)[i] = {-1, 0.0f};
    __syncthreads();  // a block that has sent knew to whom
    if (threadIdx.x == 0) shared.found.ranks = low_latency::bits_of(args.num_ranks);
    const int32_t step = args.masks == nullptr ? args.num_ranks : 1;
    bool is_decided = false;  // by another block, while this one saw less: the source is there all the same
#pragma unroll 1
    for (int32_t src = 0; src < args.num_ranks;) {
        Reason reason = kExpired;
        if (is_decided || !__syncthreads_or(session.is_masked(src)))
            reason = read_ids(src, src + step, share);
        if (args.masks != nullptr && !is_decided) {
            if (reason == kNothing) reason = await_rows(src, num_send_blocks(shared.tokens[src]) + 1);
            if (reason != kNothing && reason != kExpired) return reason;
            if (threadIdx.x == 0 && !low_latency::decide(session, src, reason == kNothing)) {
                shared.found.ranks &= ~(1u << src);
                shared.tokens[src] = 0;
                ptx::st_relaxed_gpu(&args.masks[src], 1);
            }
            __syncthreads();
            is_decided = (shared.found.ranks >> src & 1) != 0 && reason != kNothing;
            if (is_decided) continue;
            if (!(shared.found.ranks >> src & 1)) {
                clear_counts(src, src + 1, share);
                __syncthreads();
            }
            reason = kNothing;
        }
        if (reason != kNothing) return reason;
        is_decided = false;
        src += step;
    }
    return kNothing;
}

// Waits, as one block, until what a source rank sent here has landed: for the flags of its first `num_flags`
// blocks, or for each of the rows that it puts. A barrier.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_rows(int32_t src, int32_t num_flags) const {
    if (session.reaches(src)) return low_latency::await_flags(session, shared.found, src, num_flags);
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t token = threadIdx.x; token < shared.tokens[src] && reason == kNothing; token += blockDim.x) {
        bool is_ours = false;
        for (int32_t i = token * args.num_topk; i < (token + 1) * args.num_topk; ++i) {
            // They are there, and were acquired: their word was awaited.
            const uint64_t word = ptx::ld_relaxed_sys(ids(args.rank, src) + i / 2);
            is_ours |= local_expert(expert_in(word, i % 2)) >= 0;
        }
        if (!is_ours) continue;
        reason = low_latency::await_put(session, landed(kRow, src, token), src);
        if (kQuantizes && reason == kNothing)
            reason = low_latency::await_put(session, landed(kScales, src, token), src);
    }
    if (reason != kNothing && args.masks == nullptr) atomicOr(&shared.found.missing, 1u << src);
    return sync::agree(reason);
}

// What callers are told of each expert: every R-th expert is of block `part`. Then waits until all rows of
// source rank `part` have landed; `began_ns`: when this block began to receive.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::tell(int32_t part, uint64_t began_ns) const {
    const auto& counts = shared.counts;
    // The last warps count while the first ones begin to wait.
    const int32_t last = kCfg.num_threads - 1 - static_cast<int32_t>(threadIdx.x);
#pragma unroll 1
    for (int32_t e = part + args.num_ranks * last; e < num_local_experts;
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
    if (part == 0 && last == 0) {
        int32_t most = 0;
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) most = max(most, shared.tokens[src]);
        args.record->max_tokens = most;
    }
    if (!(shared.found.ranks >> part & 1)) return kNothing;
    const uint64_t told_ns = ptx::globaltimer_ns();
    const Reason landed = await_rows(part, num_send_blocks(shared.tokens[part]));
    if (args.wait_stats != nullptr && threadIdx.x == 0) {
        // For its first word, and for its rows; not for other ranks in between.
        const uint64_t waited_ns = shared.arrived_ns[part] - began_ns + ptx::globaltimer_ns() - told_ns;
        args.wait_stats[part] += static_cast<int64_t>(waited_ns / 1000);
    }
    return landed;
}

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

// Waits, as one block, until the tokens of each source rank are known to it. With masks those who list have
// decided who takes part.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_tokens() const {
    const auto note = [&](int32_t src, uint32_t tokens) {
        shared.tokens[src] = static_cast<int32_t>(tokens);
    };
    if (args.masks != nullptr)
        return low_latency::await_blocks(session, session.state->listed[args.zone], args.num_ranks, note);
    const auto src = static_cast<int32_t>(threadIdx.x);
    Reason reason = kNothing;
    if (src < args.num_ranks) {
        uint64_t seen = 0;
        reason = low_latency::await_stamped(session, &session.own()->num_tokens[args.zone][src], src, seen);
        blame(reason, src);
        note(src, static_cast<uint32_t>(seen));
    }
    return sync::agree(reason);
}

// The rows of the landing zone to all their experts, in parts of a row for each turn of a warp: in the order
// in which sources send them, all sources at a time.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_rows(int32_t block, int32_t num_blocks) const {
    Reason reason = await_tokens();
    if (reason != kNothing) return reason;
    int32_t most_tokens = 0;
    for (int32_t src = 0; src < args.num_ranks; ++src) most_tokens = max(most_tokens, shared.tokens[src]);
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t num_parts = (num_row_vectors + kPartVectors - 1) / kPartVectors;
    const int32_t num_turns = most_tokens * args.num_ranks * num_parts;
#pragma unroll 1
    for (int32_t turn = block + num_blocks * warp; turn < num_turns && reason == kNothing;
         turn += num_blocks * kNumWarps) {
        const int32_t number = turn / num_parts, src = number % args.num_ranks,
                      token = number / args.num_ranks;
        if (token < shared.tokens[src]) reason = copy_row(src, token, turn % num_parts);
    }
    return reason;
}

// Whether a column of a token is an expert of ours, as one thread, once its ids are there.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_id(int32_t src, int32_t pair, bool& is_ours) const {
    Reason reason = kNothing;
    if (!session.reaches(src)) {
        reason = low_latency::await_put(session, &session.own()->told_ids[args.zone][src], src);
        if (reason != kNothing) return reason;
    }
    uint64_t word = 0;
    reason = low_latency::await_stamped(session, ids(args.rank, src) + pair / 2, src, word);
    is_ours = local_expert(expert_in(word, pair % 2)) >= 0;
    return reason;
}

// Part of a row to all its experts, as a warp; with the first part its scale factors. The same reason in all
// lanes. The row is on its way to registers while the pairs are listed.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_row(int32_t src, int32_t token, int32_t part) const {
    constexpr int32_t kDepth = kPartVectors / kWarpSize;
    // Vectors of a row in a piece of it.
    constexpr int32_t kPieceVectors = low_latency::kPieceVectors / (kQuantizes ? 2 : 1);
    const bool with_scales = kQuantizes && part == 0;
    const int32_t first_pair = token * args.num_topk;
    uint32_t ours[2];
    Reason reason = kNothing;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t k = v * kWarpSize + lane;
        bool is_ours = false;
        if (k < args.num_topk && reason == kNothing) reason = await_id(src, first_pair + k, is_ours);
        ours[v] = __ballot_sync(kFullWarp, is_ours);
    }
    blame(reason, src);
    uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    if (worst != kNothing || (ours[0] | ours[1]) == 0) return static_cast<Reason>(worst);

    // The pieces that this part lies in; each came from some block of the source.
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t first_vector = part * kPartVectors;
    const int32_t end_vector = min(num_row_vectors, first_vector + kPartVectors);
    const int32_t first_piece = with_scales ? 0 : first_vector / kPieceVectors;
    const int32_t end_piece = with_scales ? num_pieces : (end_vector + kPieceVectors - 1) / kPieceVectors;
    const int32_t num_blocks = num_send_blocks(shared.tokens[src]);
    const Waves waves = this->waves(shared.tokens[src] * num_pieces, num_blocks);
    if (!session.reaches(src)) {
        const auto what = static_cast<Landing>(lane);
        if (lane == kRow || (lane == kScales && with_scales))
            reason = low_latency::await_put(session, landed(what, src, token), src);
    } else {
#pragma unroll 1
        for (int32_t piece = first_piece + lane; piece < end_piece && reason == kNothing;
             piece += kWarpSize) {
            const int32_t turn = token * num_pieces + piece;
            const uint64_t* flag =
                &session.own()->flags[args.zone][src][waves.flag_of(turn)][turn % num_blocks];
            uint64_t seen;
            reason = low_latency::await_stamped<low_latency::kAcquires>(session, flag, src, seen);
        }
    }
    blame(reason, src);
    worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    __syncwarp();  // what one lane acquired, all lanes may read
    if (worst != kNothing) return static_cast<Reason>(worst);

    const auto* from = reinterpret_cast<const uint4*>(row(args.rank, src, token));
    uint4 vectors[kDepth];
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        const int32_t vector = first_vector + i * kWarpSize + lane;
        if (vector < end_vector) vectors[i] = from[vector];
    }
    const uint32_t* from_scales = scales(args.rank, src, token);
    const int32_t num_words = with_scales ? scale_words() : 0;
    uint32_t words[kScaleDepth];
    const auto load_words = [&](int32_t first) {
#pragma unroll
        for (int32_t i = 0; i < kScaleDepth; ++i) {
            const int32_t word = first + i * kWarpSize + lane;
            if (word < num_words) words[i] = from_scales[word];
        }
    };
    load_words(0);
    int32_t to_rows[2];
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (!(ours[v] >> lane & 1) || reason != kNothing) continue;
        reason = await_place(src, first_pair + v * kWarpSize + lane, to_rows[v]);
    }
    if (__any_sync(kFullWarp, reason != kNothing)) return kLeft;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        for (uint32_t left = ours[v]; left != 0; left &= left - 1) {
            const int32_t from_lane = __ffs(static_cast<int32_t>(left)) - 1;
            const int64_t to_row = __shfl_sync(kFullWarp, to_rows[v], from_lane);
            auto* to = reinterpret_cast<uint4*>(args.recv_x + to_row * row_bytes());
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                const int32_t vector = first_vector + i * kWarpSize + lane;
                if (vector < end_vector) to[vector] = vectors[i];
            }
            if constexpr (kQuantizes) {
                const auto num_rows = static_cast<uint32_t>(rows_per_expert());
                const uint32_t e = static_cast<uint32_t>(to_row) / num_rows;
                uint32_t* to_words = args.recv_sf + int64_t{e} * (scale_words() - 1) * num_rows + to_row;
#pragma unroll 1
                for (int32_t first = 0; first < num_words; first += kScaleDepth * kWarpSize) {
                    if (num_words > kScaleDepth * kWarpSize) load_words(first);
#pragma unroll
                    for (int32_t i = 0; i < kScaleDepth; ++i) {
                        const int32_t word = first + i * kWarpSize + lane;
                        if (word < num_words) to_words[int64_t{word} * num_rows] = words[i];
                    }
                }
            }
        }
    }
    return kNothing;
}

// Where a pair of ours belongs, as one thread, once it is listed.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_place(int32_t src, int32_t pair, int32_t& row) const {
    const uint64_t* place = places(src) + pair;
    uint64_t seen;
    const Reason reason = low_latency::await_block(session, seen, [&] { return ptx::ld_relaxed_gpu(place); });
    row = static_cast<int32_t>(static_cast<uint32_t>(seen));
    return reason;
}

}  // namespace ep

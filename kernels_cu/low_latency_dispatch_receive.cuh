// What the receive phase of the low-latency dispatch learns: who takes part, and which rows came.
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
    const uint64_t began_ns = ptx::globaltimer_ns();
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
                    if (args.masks == nullptr) shared.waited_ns[src] = ptx::globaltimer_ns() - began_ns;
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
    uint64_t began_ns = 0;
#pragma unroll 1
    for (int32_t src = 0; src < args.num_ranks;) {
        Reason reason = kExpired;
        if (!is_decided) began_ns = ptx::globaltimer_ns();
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
            if (threadIdx.x == 0) shared.waited_ns[src] = ptx::globaltimer_ns() - began_ns;
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
// source rank `part` have landed.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::tell(int32_t part) const {
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
    // For its first word, and for its rows; not for other ranks in between.
    if (threadIdx.x == 0)
        low_latency::add_wait(args.wait_stats, part,
                              shared.waited_ns[part] + ptx::globaltimer_ns() - told_ns);
    return landed;
}

}  // namespace ep

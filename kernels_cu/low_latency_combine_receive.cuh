// The receive phase of the low-latency combine: the sums of what came back.
#pragma once
#include "low_latency_combine_block.cuh"

namespace ep {

// Waits, as one block, until all that a rank sends back has landed: for the flags of its blocks, or for its
// first word and each of the rows that it puts. A barrier.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::await_rows(int32_t src) const {
    if (session.reaches(src)) return low_latency::await_flags(session, shared.found, src, num_row_blocks);
    Reason reason = kNothing;
    uint64_t seen;
    // It may have no row for us.
    if (threadIdx.x == 0)
        reason = low_latency::await_stamped(session, &session.own()->digests[args.zone][src], src, seen);
#pragma unroll 1
    for (int32_t token = threadIdx.x; token < args.num_tokens && reason == kNothing; token += blockDim.x) {
        bool is_theirs = false;
        for (int32_t i = token * args.num_topk; i < (token + 1) * args.num_topk; ++i)
            is_theirs |= low_latency::is_of_rank(expert(i), src, num_local_experts);
        if (is_theirs) reason = low_latency::await_put(session, landed(src, token), src);
    }
    return sync::agree(reason);
}

// Waits until it is known who takes part: with masks, those of whom everything has landed. `is_first`: for
// the arguments of all ranks, too. A barrier.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::await_ranks(bool is_first) const {
    Reason reason = kNothing;
    if (args.masks != nullptr) {
        for (int32_t src = 0; src < args.num_ranks; ++src) {
            reason = kExpired;
            const uint64_t began_ns = ptx::globaltimer_ns();
            if (!__syncthreads_or(session.is_masked(src))) reason = await_rows(src);
            if (is_first && threadIdx.x == 0)
                low_latency::add_wait(args.wait_stats, src, ptx::globaltimer_ns() - began_ns);
            if (reason != kNothing && reason != kExpired) return reason;
            if (threadIdx.x == 0 && !low_latency::decide(session, src, reason == kNothing)) {
                shared.found.ranks &= ~(1u << src);
                ptx::st_relaxed_gpu(&args.masks[src], 1);
            }
            __syncthreads();
        }
    }
    reason = kNothing;
    if (is_first && threadIdx.x < args.num_ranks && (shared.found.ranks >> threadIdx.x & 1)) {
        const int32_t peer = threadIdx.x;
        const uint64_t began_ns = ptx::globaltimer_ns();
        const uint64_t* word = &session.own()->digests[args.zone][peer];
        uint64_t seen = 0;
        reason = low_latency::await_stamped(session, word, peer, seen);
        if (reason == kNothing && static_cast<uint32_t>(seen) != args.digest) reason = kDisagreed;
        if (reason != kNothing) atomicOr(&shared.found.missing, 1u << peer);
        low_latency::add_wait(args.wait_stats, peer, ptx::globaltimer_ns() - began_ns);
    }
    return sync::agree(reason);
}

// A lane's parts of some slots, once all of them are there; then the zone is as it was. All words that are
// still missing are on their way together.
template <LowLatencyCombineCfg kCfg>
template <int32_t kDepth>
__device__ Reason LowLatencyCombineBlock<kCfg>::poll_slots(int32_t token, int32_t piece,
                                                           const int32_t (&numbers)[kDepth],
                                                           wire::Parcel (&parcels)[kDepth]) const {
    uint4* at[2 * kDepth];
    uint32_t missing = 0;
#pragma unroll
    for (int32_t i = 0; i < 2 * kDepth; ++i) {
        const int32_t number = numbers[i / 2], vector = wire::vector_of<kWire>(piece, lane, i % 2);
        parcels[i / 2].vectors[i % 2] = make_uint4(0, 0, 0, 0);
        at[i] = number < 0 ? nullptr : reinterpret_cast<uint4*>(slot(args.rank, token, number)) + vector;
        if (number >= 0 && vector < num_vectors) missing |= 1u << i;
    }
    const uint32_t expected = missing;
    for (uint32_t polls = 1; missing != 0; ++polls) {
#pragma unroll
        for (int32_t i = 0; i < 2 * kDepth; ++i)
            if (missing >> i & 1) parcels[i / 2].vectors[i % 2] = ptx::ld_relaxed_sys(at[i]);
#pragma unroll
        for (int32_t i = 0; i < 2 * kDepth; ++i) {
            const uint4& seen = parcels[i / 2].vectors[i % 2];
            // Every word by itself: 16 bytes need not arrive together.
            if (seen.x != kPoison && seen.y != kPoison && seen.z != kPoison && seen.w != kPoison)
                missing &= ~(1u << i);
        }
        if (missing == 0 || polls % 64 != 0) continue;
        int32_t src = 0;  // not by an index: what has one lies in memory
#pragma unroll
        for (int32_t i = 0; i < 2 * kDepth; ++i)
            if (missing >> i & 1) src = numbers[i / 2];
        const Reason reason = low_latency::trouble_in(session, src, session.call.deadline_ns);
        if (reason == kNothing) continue;
        atomicOr(&shared.found.missing, 1u << src);
        return reason;
    }
    // By the lane that has read it, and not again before the peers know that the zone is free. As strong as
    // the store that it replaces, which was seen but not acquired.
    constexpr uint4 kRest{kPoison, kPoison, kPoison, kPoison};
#pragma unroll
    for (int32_t i = 0; i < 2 * kDepth; ++i)
        if (expected >> i & 1) ptx::st_relaxed_sys(at[i], kRest);
    return kNothing;
}

// One piece of a token, as a warp. The same reason in all lanes.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::sum_piece(int32_t token, int32_t piece) const {
    constexpr int32_t kDepth = 4;
    int32_t owners[2] = {-1, -1};
    float weight[2] = {0.0f, 0.0f};
    uint32_t mine = 0;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (v * kWarpSize >= args.num_topk) break;
        const int32_t k = v * kWarpSize + lane;
        const int64_t pair = int64_t{token} * args.num_topk + k;
        const int32_t e = k < args.num_topk ? expert(pair) : -1;
        owners[v] = e < 0 ? -1 : e / num_local_experts;
        if (owners[v] >= 0 && !(shared.found.ranks >> owners[v] & 1)) owners[v] = -1;
        if (owners[v] >= 0) mine |= 1u << owners[v];
        if (args.sums_at_source && owners[v] >= 0) weight[v] = args.topk_weights[pair];
    }
    const uint32_t ranks = __reduce_or_sync(kFullWarp, mine);
    if (!args.polls_data) {
        int32_t block = -1;
        bool is_put = false;
        if (lane < args.num_ranks && (ranks >> lane & 1)) {
            is_put = !session.reaches(lane);
            block = turn_of(token, number_of(lane, args.rank) / sources_per_turn, piece) % num_row_blocks;
        }
        Reason reason = low_latency::await_flags_as_warp(session, shared.found, lane, is_put ? -1 : block);
        if constexpr (kOverNetwork) {
            if (is_put && reason == kNothing) {
                reason = low_latency::await_put(session, landed(lane, token), lane);
                if (reason != kNothing) atomicOr(&shared.found.missing, 1u << lane);
            }
            __syncwarp();
        }
        const uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
        if (worst != kNothing) return static_cast<Reason>(worst);
    }
    // What is added, in order: a slot for each rank, or for each column.
    uint64_t terms = ranks;
    if (args.sums_at_source) {
        const uint32_t low = __ballot_sync(kFullWarp, owners[0] >= 0);
        const uint32_t high = __ballot_sync(kFullWarp, owners[1] >= 0);
        terms = low | static_cast<uint64_t>(high) << 32;
    }
    wire::Channels sums[2];
#pragma unroll
    for (int32_t i = 0; i < 2 * wire::kNumChannels; ++i)
        sums[i / wire::kNumChannels][i % wire::kNumChannels] = terms == 0 ? 0.0f : rows::kNoTerm;
    Reason reason = kNothing;
    while (terms != 0) {
        wire::Parcel parcels[kDepth];
        int32_t numbers[kDepth];
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) {
            numbers[i] = -1;
            if (terms == 0) continue;
            const auto low = static_cast<int32_t>(terms);
            numbers[i] = low != 0 ? __ffs(low) - 1 : 31 + __ffs(static_cast<int32_t>(terms >> 32));
            terms &= terms - 1;
        }
        if (kWire == wire::kBfloat16 && args.polls_data) {
            reason = poll_slots(token, piece, numbers, parcels);
        } else {
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i)
                if (numbers[i] >= 0)
                    parcels[i] =
                        wire::load<kWire>(slot(args.rank, token, numbers[i]), args.hidden, piece, lane);
        }
        if (__reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason)) != kNothing) break;
        // Once in code, as instructions are fetched anew for each call: the one at hand is the first of those
        // that are left.
#pragma unroll 1
        for (int32_t number = numbers[0]; number >= 0; number = numbers[0]) {
            float factor = 1.0f;
            if (args.sums_at_source)
                factor =
                    __shfl_sync(kFullWarp, number < kWarpSize ? weight[0] : weight[1], number % kWarpSize);
            wire::Channels channels[2];
            wire::decode<kWire>(parcels[0], channels);
#pragma unroll
            for (int32_t i = 1; i < kDepth; ++i) {
                numbers[i - 1] = numbers[i];
                parcels[i - 1] = parcels[i];
            }
            numbers[kDepth - 1] = -1;
#pragma unroll
            for (int32_t c = 0; c < 2 * wire::kNumChannels; ++c) {
                const float term = channels[c / wire::kNumChannels][c % wire::kNumChannels];
                float& sum = sums[c / wire::kNumChannels][c % wire::kNumChannels];
                sum = __fadd_rn(sum, __fmul_rn(factor, term));
            }
        }
    }
    const uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    if (worst != kNothing) return static_cast<Reason>(worst);
    auto* to = reinterpret_cast<uint4*>(args.out + int64_t{token} * args.hidden * 2);
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t vector = wire::vector_of<kWire>(piece, lane, v);
        if (vector < num_vectors) to[vector] = rows::rounded<rows::kBfloat16>(sums[v]);
    }
    return kNothing;
}

// The tokens of this rank: warps take pieces in turn.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::sum_tokens(int32_t block, int32_t num_blocks) const {
    Reason reason = await_ranks(block == 0);
    if (reason != kNothing) return reason;
    const int32_t num_turns = args.num_tokens * num_pieces;
    for (int32_t turn = block + num_blocks * warp; turn < num_turns && reason == kNothing;
         turn += num_blocks * kNumWarps)
        reason = sum_piece(turn / num_pieces, turn % num_pieces);
    return reason;
}

}  // namespace ep

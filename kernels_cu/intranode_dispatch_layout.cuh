// The layout of the normal-mode dispatch: the position of every token at each of its destinations, counted
// from this rank's first row there, and how many pairs every expert gets.
//
// Alone      with at most a token per thread every block works out all of it, in registers and shared memory:
//            reading all ids again costs less than hearing from another block. Block 0 offers the counts,
//            another one those of the experts.
// Together   every block counts its slice of the tokens; all add up the blocks before them and know their
//            positions. Positions are complete when all blocks have arrived; the last one offers the counts
//            of the experts.
// Memory     positions of a block's own slice go to send_row, for the handle, and to send_token, which the
//            same block reads again after a barrier. Those of other slices are read after an acquire of
//            `arrived`, or from this block's shared memory.
#pragma once
#include "intranode_dispatch_block.cuh"

namespace ep {

// As destinations, of several nodes and without expert ids.
template <IntranodeDispatchCfg kCfg>
__device__ uint32_t DispatchBlock<kCfg>::told_destinations(int32_t token) const {
    const SegmentIndex& index = shared.segments.index;
    const int32_t landed = index.landed(token);
    const uint8_t* masks = landed < 0 ? args.node_masks : args.landed_node_masks;
    const int64_t at = landed < 0 ? token - index.own_begin : landed;
    return masks[at * args.node_masks_bytes + args.segments->own];
}

// Bit d: the token goes to rank d, where it has an expert.
template <IntranodeDispatchCfg kCfg>
__device__ uint32_t DispatchBlock<kCfg>::destinations(int32_t token) const {
    if constexpr (kCfg.segmented)
        if (args.topk_idx == nullptr) return told_destinations(token);
    uint32_t mask = 0;
    if (kCfg.segmented || args.topk_idx != nullptr) {
#pragma unroll 8
        for (int32_t k = 0; k < args.num_topk; ++k) {
            const int32_t id = expert(token, k);
            if (id >= 0) mask |= 1u << (id / num_local_experts);
        }
    } else {
        for (int32_t d = 0; d < args.num_ranks; ++d)
            mask |= uint32_t{args.is_token_in_rank[static_cast<int64_t>(token) * args.num_ranks + d] != 0}
                    << d;
    }
    return mask;
}

// Places one token per thread, in order: `mask` says where it goes, and `position` is the first that is free
// there. `running`, in the lanes of destination lane % kMaxLocalRanks of every warp: tokens placed so far.
// A barrier stands between two calls.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::place(uint32_t mask, int32_t& running,
                                           int32_t (&position)[kMaxLocalRanks]) {
    uint32_t takers[kMaxLocalRanks];
#pragma unroll
    for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
        takers[d] = __ballot_sync(kFullWarp, mask >> d & 1);
        if (lane == 0) shared.warp_tokens[warp][d] = __popc(takers[d]);
    }
    __syncthreads();
    int32_t before = 0, total = 0;
    for (int32_t w = lane / kMaxLocalRanks; w < kNumWarps; w += kWarpSize / kMaxLocalRanks) {
        const int32_t count = shared.warp_tokens[w][lane % kMaxLocalRanks];
        total += count;
        if (w < warp) before += count;
    }
#pragma unroll
    for (int32_t shift = kMaxLocalRanks; shift < kWarpSize; shift *= 2) {
        total += __shfl_xor_sync(kFullWarp, total, shift);
        before += __shfl_xor_sync(kFullWarp, before, shift);
    }
    before += running;
    running += total;
#pragma unroll
    for (int32_t d = 0; d < kMaxLocalRanks; ++d)
        position[d] = __shfl_sync(kFullWarp, before, d) + __popc(takers[d] & ((1u << lane) - 1));
}

// Writes the positions of a token of this block's slice.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::keep(int32_t token, uint32_t mask,
                                          const int32_t (&position)[kMaxLocalRanks]) const {
    int32_t row[kMaxLocalRanks];
#pragma unroll
    for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
        const bool goes = mask >> d & 1;
        row[d] = goes ? position[d] : -1;
        if (goes) args.send_token[static_cast<int64_t>(d) * args.num_tokens + position[d]] = token;
    }
    auto* at = reinterpret_cast<int4*>(args.send_row + static_cast<int64_t>(token) * kMaxLocalRanks);
    at[0] = make_int4(row[0], row[1], row[2], row[3]);
    at[1] = make_int4(row[4], row[5], row[6], row[7]);
}

template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::lay_out_alone() {
    const int32_t token = threadIdx.x;
    const uint32_t mask = token < num_tokens() ? destinations(token) : 0;
    int32_t running = 0, position[kMaxLocalRanks];
    place(mask, running, position);
    if (!kCfg.segmented && blockIdx.x == 0) offer_counts(running);
#pragma unroll
    for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
        const bool goes = mask >> d & 1;
        shared.positions[token][d] = static_cast<short>(goes ? position[d] : -1);
        if (token >= first_token && token < last_token) {
            if (token == first_token) shared.tokens_before[d] = position[d];
            if (token == last_token - 1) shared.tokens_until[d] = position[d] + goes;
        }
    }
    if (token >= first_token && token < last_token) keep(token, mask, position);
    if (blockIdx.x == min(1, gridDim.x - 1) && args.topk_idx != nullptr) {
        count_experts(0, num_tokens());
        offer_experts([&](int32_t e) { return shared.histogram[e]; });
    }
}

template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::lay_out_together() {
    count_tokens();
    const Reason reason = add_up_blocks();
    if (reason != kNothing) return reason;
    if (!kCfg.segmented && blockIdx.x == 0) offer_counts(shared.tokens_total[lane % kMaxLocalRanks]);
    int32_t running = shared.tokens_before[lane % kMaxLocalRanks];
    for (int32_t begin = first_token; begin < last_token; begin += kCfg.num_threads) {
        const int32_t token = begin + threadIdx.x;
        const uint32_t mask = token < last_token ? args.masks[token] : 0;
        int32_t position[kMaxLocalRanks];
        place(mask, running, position);
        if (token < last_token) keep(token, mask, position);
        __syncthreads();
    }
    if (threadIdx.x < kMaxLocalRanks) shared.tokens_until[threadIdx.x] = running;
    return publish_experts();
}

template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::count_tokens() {
    for (int32_t begin = first_token; begin < last_token; begin += kCfg.num_threads) {
        const int32_t token = begin + threadIdx.x;
        uint32_t mask = 0;
        if (token < last_token) args.masks[token] = mask = destinations(token);
#pragma unroll
        for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
            const uint32_t takers = __ballot_sync(kFullWarp, mask >> d & 1);
            if (lane == d && takers) atomicAdd(&shared.tokens_here[d], __popc(takers));
        }
    }
    __syncthreads();
    if (threadIdx.x < kMaxLocalRanks)
        ptx::st_relaxed_gpu(&call.workspace->block_counts[blockIdx.x][threadIdx.x],
                            stamped(call.epoch, shared.tokens_here[threadIdx.x]));
}

// The tokens of all blocks, and of the lower ones, by destination.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::add_up_blocks() {
    const uint64_t* counts = &call.workspace->block_counts[0][0];
    Reason reason = kNothing;
    for (int32_t i = threadIdx.x; i < gridDim.x * kMaxLocalRanks && reason == kNothing; i += blockDim.x) {
        uint64_t word = 0;
        reason = sync::poll(call, counts + i, -1, word,
                            [&](uint64_t seen) { return is_stamped(seen, call.epoch); });
        const int32_t count = static_cast<int32_t>(word), d = i % kMaxLocalRanks;
        if (count) atomicAdd(&shared.tokens_total[d], count);
        if (count && i / kMaxLocalRanks < blockIdx.x) atomicAdd(&shared.tokens_before[d], count);
    }
    return sync::agree(reason);
}

// Of tokens [begin, end), by expert.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::count_experts(int32_t begin, int32_t end) {
    for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) shared.histogram[e] = 0;
    __syncthreads();
    for (int32_t token = begin + threadIdx.x; token < end; token += blockDim.x) {
#pragma unroll 8
        for (int32_t k = 0; k < args.num_topk; ++k) {
            const int32_t id = expert(token, k);
            if (id >= 0) atomicAdd(&shared.histogram[id], 1);
        }
    }
    __syncthreads();
}

// Ends the layout of all blocks: the last one tells the experts' ranks; all wait for all positions.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::publish_experts() {
    uint32_t* rank_counts = call.workspace->expert_counts[call.set];
    if (args.topk_idx != nullptr) {
        count_experts(first_token, last_token);
        for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
            if (shared.histogram[e]) atomicAdd(&rank_counts[e], shared.histogram[e]);
    }
    uint64_t* arrived = &call.workspace->arrived[call.set];
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = ptx::atom_add_acq_rel_gpu(arrived, 1) + 1 == gridDim.x;
    __syncthreads();
    if (shared.is_last && args.topk_idx != nullptr)
        offer_experts([&](int32_t e) { return __ldcg(&rank_counts[e]); });
    const int32_t num_blocks = gridDim.x;
    return sync::wait_for_words<sync::kAcquiring>(
        call, 1, [&](int32_t) { return arrived; }, [](int32_t) { return -1; },
        [&](uint64_t word) { return word >= num_blocks; });
}

}  // namespace ep

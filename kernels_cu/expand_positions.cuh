// Which row each received (row, column) pair gets among the expert-major rows: a stable counting sort by
// expert, as all blocks.
//
// Protocol   pairs are numbered row by row, and every warp of the grid has a run of them. A warp counts its
//            pairs by expert, a block adds its warps up and publishes its counts. From those of all blocks
//            every block knows where each expert's segment begins, and how many of the expert's pairs come
//            before its own; then every warp walks its run again and hands out places in order.
// Order      counts are words stamped with the call: who sees the stamp has the count, and nothing is
// cleared.
#pragma once
#include "local.cuh"

namespace ep {

template <int kNumWarps>
struct Positions {
    static constexpr int kBatch = 8;  // loads of a thread in flight

    const local::Call& call;
    const uint8_t* topk_idx;  // local expert ids; others are none
    int64_t num_pairs;
    int32_t idx_bytes, num_local_experts, alignment, num_out_rows;
    uint32_t* counters;  // shared, [kNumWarps + 2][num_local_experts]
    int32_t* ends;       // shared, [num_local_experts]: where an expert's true rows end

    __device__ static int32_t lane() { return threadIdx.x % kWarpSize; }
    __device__ static int32_t warp() { return threadIdx.x / kWarpSize; }
    __device__ uint32_t* row_of_counters(int32_t which) const { return counters + which * num_local_experts; }
    __device__ uint32_t* of_this_warp() const { return row_of_counters(warp()); }
    __device__ uint32_t* of_all_blocks() const { return row_of_counters(kNumWarps); }
    __device__ uint32_t* of_lower_blocks() const { return row_of_counters(kNumWarps + 1); }

    // Of this warp: pairs [first_pair(), last_pair()).
    __device__ int64_t run() const {
        const int64_t num_runs = static_cast<int64_t>(gridDim.x) * kNumWarps;
        return align_up<int64_t>((num_pairs + num_runs - 1) / num_runs, kWarpSize);
    }
    __device__ int64_t first_pair() const {
        return min(num_pairs, (static_cast<int64_t>(blockIdx.x) * kNumWarps + warp()) * run());
    }
    __device__ int64_t last_pair() const { return min(num_pairs, first_pair() + run()); }

    template <class Id>
    __device__ int32_t expert(int64_t pair) const {
        const Id id = reinterpret_cast<const Id*>(topk_idx)[pair];
        return id >= 0 && id < num_local_experts ? static_cast<int32_t>(id) : -1;
    }

    template <class Id>
    __device__ void count_run() const;
    template <class Id>
    __device__ void place_run(int32_t* expert_row, const float* weights, float* out_weights) const;

    __device__ void count() const;
    __device__ Reason add_up(uint64_t deadline_ns) const;
    __device__ int64_t lay_out() const;
    __device__ void place(int32_t* expert_row, const float* weights, float* out_weights) const;
};

template <int kNumWarps>
template <class Id>
__device__ void Positions<kNumWarps>::count_run() const {
    uint32_t* counts = of_this_warp();
    const int64_t last = last_pair();
    for (int64_t begin = first_pair(); begin < last; begin += kBatch * kWarpSize) {
        int32_t id[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int64_t pair = begin + i * kWarpSize + lane();
            id[i] = pair < last ? expert<Id>(pair) : -1;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (id[i] >= 0) atomicAdd(&counts[id[i]], 1);
    }
}

// This block's pairs of every expert, told to all blocks.
template <int kNumWarps>
__device__ void Positions<kNumWarps>::count() const {
    for (int32_t i = threadIdx.x; i < (kNumWarps + 2) * num_local_experts; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    idx_bytes == 8 ? count_run<int64_t>() : count_run<int32_t>();
    __syncthreads();
    uint64_t* published = call.workspace->counts + static_cast<int64_t>(blockIdx.x) * num_local_experts;
    for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x) {
        uint32_t count = 0;
#pragma unroll
        for (int32_t w = 0; w < kNumWarps; ++w) count += row_of_counters(w)[e];
        ptx::st_relaxed_gpu(&published[e], stamped(call.number, count));
    }
}

// The pairs of every expert, of all blocks and of the lower ones.
template <int kNumWarps>
__device__ Reason Positions<kNumWarps>::add_up(uint64_t deadline_ns) const {
    const uint64_t* counts = call.workspace->counts;
    const int32_t num_words = gridDim.x * num_local_experts;
    Reason reason = kNothing;
    for (int32_t begin = threadIdx.x; begin < num_words && reason == kNothing; begin += kBatch * blockDim.x) {
        uint64_t word[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int32_t at = begin + i * blockDim.x;
            word[i] = at < num_words ? ptx::ld_relaxed_gpu(counts + at) : stamped(call.number, 0);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int32_t at = begin + i * blockDim.x;
            const auto is_there = [&](uint64_t seen) { return is_stamped(seen, call.number); };
            if (!is_there(word[i]) && reason == kNothing)
                reason = local::poll(call, counts + at, deadline_ns, word[i], is_there);
            const uint32_t count = static_cast<uint32_t>(word[i]);
            const int32_t block = at / num_local_experts, e = at - block * num_local_experts;
            if (count == 0) continue;
            atomicAdd(&of_all_blocks()[e], count);
            if (block < blockIdx.x) atomicAdd(&of_lower_blocks()[e], count);
        }
    }
    return sync::agree(reason);
}

// Where every warp's pairs of every expert begin. Returns the padded segments' sum, to the first warp.
template <int kNumWarps>
__device__ int64_t Positions<kNumWarps>::lay_out() const {
    uint32_t* begins = of_all_blocks();
    int64_t num_rows = 0;
    if (warp() == 0) {
        for (int32_t first = 0; first < num_local_experts; first += kWarpSize) {
            const int32_t e = first + lane();
            const int64_t count = e < num_local_experts ? begins[e] : 0;
            const int64_t padded = align_up<int64_t>(count, alignment);
            const int64_t sum = sum_up_to(padded, lane());
            const int64_t begin = num_rows + sum - padded;
            if (e < num_local_experts) {
                begins[e] = static_cast<uint32_t>(min(begin, static_cast<int64_t>(num_out_rows)));
                ends[e] = static_cast<int32_t>(min(begin + count, static_cast<int64_t>(num_out_rows)));
            }
            num_rows += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
        }
    }
    __syncthreads();
    for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x) {
        uint32_t next = begins[e] + of_lower_blocks()[e];
#pragma unroll
        for (int32_t w = 0; w < kNumWarps; ++w) {
            const uint32_t count = row_of_counters(w)[e];
            row_of_counters(w)[e] = next;
            next += count;
        }
    }
    __syncthreads();
    return num_rows;
}

template <int kNumWarps>
template <class Id>
__device__ void Positions<kNumWarps>::place_run(int32_t* expert_row, const float* weights,
                                                float* out_weights) const {
    uint32_t* next = of_this_warp();
    const int64_t last = last_pair();
    for (int64_t begin = first_pair(); begin < last; begin += kBatch * kWarpSize) {
        int32_t id[kBatch];
        float weight[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int64_t pair = begin + i * kWarpSize + lane();
            id[i] = pair < last ? expert<Id>(pair) : -1;
            weight[i] = weights != nullptr && pair < last ? weights[pair] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (begin + i * kWarpSize >= last) break;
            const int64_t pair = begin + i * kWarpSize + lane();
            const uint32_t alike = __match_any_sync(kFullWarp, id[i]);
            const uint32_t lower = __popc(alike & ((1u << lane()) - 1));
            const uint32_t at = id[i] >= 0 ? next[id[i]] + lower : 0xffffffffu;
            __syncwarp();
            if (id[i] >= 0 && lower == 0) next[id[i]] = at + __popc(alike);
            __syncwarp();
            const bool fits = at < static_cast<uint32_t>(num_out_rows);
            if (pair < last) expert_row[pair] = fits ? static_cast<int32_t>(at) : -1;
            if (fits && out_weights != nullptr) out_weights[at] = weight[i];
        }
    }
}

// Rows of the pairs, -1 for none or beyond num_out_rows; and the weight of each.
template <int kNumWarps>
__device__ void Positions<kNumWarps>::place(int32_t* expert_row, const float* weights,
                                            float* out_weights) const {
    idx_bytes == 8 ? place_run<int64_t>(expert_row, weights, out_weights)
                   : place_run<int32_t>(expert_row, weights, out_weights);
}

}  // namespace ep

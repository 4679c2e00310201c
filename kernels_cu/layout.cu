// Where one rank's tokens go: counts per rank and per expert, and a flag for each (token, rank).
//
// Bad ids    an expert id outside 0 .. num_experts - 1 is treated as -1: none.
// Launch     any grid; the counts are zero before.
#include "layout.cuh"

namespace ep {

struct DispatchLayoutCfg {
    int num_threads;
};

template <DispatchLayoutCfg kCfg>
struct DispatchLayoutArgs {
    const uint8_t* topk_idx;         // [num_tokens, num_topk]
    int32_t* num_tokens_per_rank;    // [num_ranks]
    int32_t* num_tokens_per_expert;  // [num_experts]
    uint8_t* is_token_in_rank;       // [num_tokens, num_ranks]
    int32_t num_ranks, num_tokens, num_topk, num_experts, idx_bytes;
};

template <DispatchLayoutCfg kCfg>
__device__ void dispatch_layout(const DispatchLayoutArgs<kCfg>& args) {
    const int32_t num_local_experts = args.num_experts / args.num_ranks;
    const int32_t lane = threadIdx.x % kWarpSize;
    const int64_t first_of_warp = static_cast<int64_t>(blockIdx.x) * kCfg.num_threads + threadIdx.x - lane;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kCfg.num_threads;
    for (int64_t begin = first_of_warp; begin < args.num_tokens; begin += step) {
        const int64_t token = begin + lane;
        uint32_t mask = 0;
        for (int32_t k = 0; k < args.num_topk && token < args.num_tokens; ++k) {
            const int64_t at = token * args.num_topk + k;
            const int64_t id = args.idx_bytes == 8 ? reinterpret_cast<const int64_t*>(args.topk_idx)[at]
                                                   : reinterpret_cast<const int32_t*>(args.topk_idx)[at];
            if (id < 0 || id >= args.num_experts) continue;
            atomicAdd(&args.num_tokens_per_expert[id], 1);
            mask |= 1u << (id / num_local_experts);
        }
        for (int32_t rank = 0; rank < args.num_ranks; ++rank) {
            const bool is_there = mask >> rank & 1;
            if (token < args.num_tokens) args.is_token_in_rank[token * args.num_ranks + rank] = is_there;
            const uint32_t takers = __ballot_sync(kFullWarp, is_there);
            if (lane == 0 && takers) atomicAdd(&args.num_tokens_per_rank[rank], __popc(takers));
        }
    }
}

}  // namespace ep

// Where one rank's tokens go: counts per rank, node and expert, and a flag for each (token, rank).
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
    int32_t* num_tokens_per_node;    // [num_ranks / ranks_per_node]
    uint8_t* is_token_in_rank;       // [num_tokens, num_ranks]
    int32_t num_ranks, ranks_per_node, num_tokens, num_topk, num_experts, idx_bytes;
};

template <DispatchLayoutCfg kCfg>
__device__ void dispatch_layout(const DispatchLayoutArgs<kCfg>& args) {
    const int32_t num_local_experts = args.num_experts / args.num_ranks;
    const int32_t lane = threadIdx.x % kWarpSize;
    const int64_t first_of_warp = static_cast<int64_t>(blockIdx.x) * kCfg.num_threads + threadIdx.x - lane;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kCfg.num_threads;
    for (int64_t begin = first_of_warp; begin < args.num_tokens; begin += step) {
        const int64_t token = begin + lane;
        const bool is_token = token < args.num_tokens;
        const auto expert = [&](int32_t k) {
            const int64_t at = token * args.num_topk + k;
            const int64_t id = args.idx_bytes == 8 ? reinterpret_cast<const int64_t*>(args.topk_idx)[at]
                                                   : reinterpret_cast<const int32_t*>(args.topk_idx)[at];
            return id >= 0 && id < args.num_experts ? static_cast<int32_t>(id) : -1;
        };
        for (int32_t k = 0; k < args.num_topk && is_token; ++k)
            if (expert(k) >= 0) atomicAdd(&args.num_tokens_per_expert[expert(k)], 1);
        bool is_in_node = false;
        for (int32_t first = 0; first < args.num_ranks; first += kWarpSize) {
            uint32_t mask = 0;  // of ranks from `first` on
            for (int32_t k = 0; k < args.num_topk && is_token; ++k) {
                const int32_t e = expert(k), rank = e / num_local_experts;
                if (e >= 0 && rank >= first && rank < first + kWarpSize) mask |= 1u << (rank - first);
            }
            for (int32_t rank = first; rank < min(args.num_ranks, first + kWarpSize); ++rank) {
                const bool is_there = mask >> (rank - first) & 1;
                if (is_token) args.is_token_in_rank[token * args.num_ranks + rank] = is_there;
                const uint32_t takers = __ballot_sync(kFullWarp, is_there);
                if (lane == 0 && takers) atomicAdd(&args.num_tokens_per_rank[rank], __popc(takers));
                is_in_node |= is_there;
                if ((rank + 1) % args.ranks_per_node != 0) continue;
                const uint32_t visitors = __ballot_sync(kFullWarp, is_in_node);
                if (lane == 0 && visitors)
                    atomicAdd(&args.num_tokens_per_node[rank / args.ranks_per_node], __popc(visitors));
                is_in_node = false;
            }
        }
    }
}

}  // namespace ep

// The lists of tokens that the ranks of one node dispatch among themselves when there are several nodes; see
// `Segments`. What a kernel with kCfg.segmented knows of its rank's list.
#pragma once
#include "layout.cuh"

namespace ep {

// Of the list: `num_tokens` of the arguments is then only the most there can be.
template <bool kSegmented, class Args>
__device__ __forceinline__ int32_t num_tokens_of(const Args& args) {
    if constexpr (kSegmented)
        return args.segments->num_tokens;
    else
        return args.num_tokens;
}

// What every token asks for, in shared memory.
struct SegmentIndex {
    int32_t own_begin, own_end;
    int32_t first[kMaxNodes];  // behind the last segment: above every token

    // By the whole block, which meets before anyone reads.
    __device__ void load(const Segments& segments) {
        const int32_t n = threadIdx.x;
        if (n < kMaxNodes) first[n] = n < segments.num ? segments.first[n] : 0x7fffffff;
        if (n == 0) {
            own_begin = segments.first[segments.own];
            own_end = segments.first[segments.own + 1];
        }
    }

    // The segment of a token: the last one that begins at or before it, so never an empty one.
    __device__ __forceinline__ int32_t of(int32_t token) const {
        int32_t n = 0;
#pragma unroll
        for (int32_t step = kMaxNodes / 2; step > 0; step /= 2)
            if (token >= first[n + step]) n += step;
        return n;
    }
};

}  // namespace ep

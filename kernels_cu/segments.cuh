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

    __device__ __forceinline__ int32_t num_own() const { return own_end - own_begin; }
    // Of a token of another node: its number among all of those; -1 of a token of this rank's own.
    __device__ __forceinline__ int32_t landed(int32_t token) const {
        if (token < own_begin) return token;
        return token < own_end ? -1 : token - num_own();
    }
    // The token of such a number; -1 stays.
    __device__ __forceinline__ int32_t listed(int32_t landed) const {
        return landed < own_begin ? landed : landed + num_own();
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

// The tokens of other nodes in the order in which their rows go back: the first of each node, then the second
// of each, until all are done. In shared memory. Nodes are sorted by how many they have.
struct Rotation {
    int32_t num;  // nodes
    int32_t segment[kMaxNodes];
    int32_t length[kMaxNodes];  // tokens
    int32_t end[kMaxNodes];     // places of tokens with numbers below `length`, of all nodes

    // By the first warp of a block, which meets before anyone reads.
    __device__ void load(const Segments& segments) {
        if (threadIdx.x >= kWarpSize) return;
        const int32_t n = threadIdx.x;
        const bool is_other = n < segments.num && n != segments.own;
        const int32_t mine = is_other ? segments.first[n + 1] - segments.first[n] : 0;
        int32_t place = 0, places = 0;
        for (int32_t m = 0; m < segments.num; ++m) {
            const int32_t theirs = __shfl_sync(kFullWarp, mine, m);
            if (m == segments.own) continue;
            places += min(theirs, mine);
            if (theirs < mine || (theirs == mine && m < n)) ++place;
        }
        if (n == 0) num = segments.num - 1;
        if (!is_other) return;
        segment[place] = n;
        length[place] = mine;
        end[place] = places;
    }

    // Of the token at a place: its segment, and its number there.
    __device__ __forceinline__ int2 at(int32_t place) const {
        int32_t i = 0;
        while (place >= end[i]) ++i;
        const int32_t first = i == 0 ? 0 : end[i - 1], from = i == 0 ? 0 : length[i - 1];
        const int32_t turn = (place - first) / (num - i);
        return {segment[i + place - first - turn * (num - i)], from + turn};
    }
};

}  // namespace ep

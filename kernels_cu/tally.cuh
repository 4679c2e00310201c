// Bytes that an operation within one NVLink domain moves between this rank and others, counted where they are
// moved, by instances with kCfg.counts alone: tests and benchmarks hold them against what must move.
//
// Counted    rows and what belongs to them, as they are stored to another rank, or loaded from it; not the
//            words by which ranks tell each other where and when, and nothing that stays on this rank.
#pragma once
#include "layout.cuh"

namespace ep {

// Of one thread.
template <bool kCounts>
struct Tally {
    __device__ __forceinline__ void add(bool, int64_t) {}
    __device__ __forceinline__ void keep(Workspace*) const {}
};
template <>
struct Tally<true> {
    uint64_t num_bytes = 0;

    __device__ void add(bool is_elsewhere, int64_t moved) {
        if (is_elsewhere) num_bytes += moved;
    }
    // To be called once, when the thread has moved all it moves.
    __device__ void keep(Workspace* workspace) const {
        if (num_bytes != 0) atomicAdd(&workspace->peer_bytes, num_bytes);
    }
};

}  // namespace ep

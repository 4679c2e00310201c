// Collectives and atomics of the shim, one result of each for every thread. test_collectives.py says which.
#include "layout.cuh"
#include "ptx.cuh"

namespace ep {

struct CollectivesCfg {
    int num_threads;
};

template <CollectivesCfg kCfg>
struct CollectivesArgs {
    const int32_t* values;  // by thread
    int64_t* results;       // [test][thread]
    uint32_t* words;        // [num_words], for atomics; zero
};

template <CollectivesCfg kCfg>
__device__ void collectives(const CollectivesArgs<kCfg>& args) {
    const int32_t t = threadIdx.x, lane = t % kWarpSize;
    const int32_t value = args.values[t];
    const uint32_t bits = static_cast<uint32_t>(value);
    int64_t* result = args.results + t;
    const auto put = [&](int64_t number) {
        *result = number;
        result += kCfg.num_threads;
    };
    put(__shfl_sync(kFullWarp, value, 3));
    put(__shfl_sync(kFullWarp, value, lane + 1, 8));
    put(__shfl_up_sync(kFullWarp, value, 2));
    put(__shfl_up_sync(kFullWarp, value, 2, 8));
    put(__shfl_down_sync(kFullWarp, value, 5, 16));
    put(__shfl_xor_sync(kFullWarp, value, 9));
    put(__ballot_sync(kFullWarp, value > 0));
    put(__any_sync(kFullWarp, value == args.values[0]));
    put(__all_sync(kFullWarp, value < 100));
    put(__match_any_sync(kFullWarp, value % 3));
    put(__reduce_add_sync(kFullWarp, value));
    put(__reduce_min_sync(kFullWarp, value));
    put(__reduce_max_sync(kFullWarp, value));
    put(__reduce_max_sync(kFullWarp, bits));
    put(__reduce_and_sync(kFullWarp, bits));
    put(__reduce_or_sync(kFullWarp, bits));
    put(__reduce_xor_sync(kFullWarp, bits));
    put(__syncthreads_count(value > 0));
    put(__syncthreads_and(value < 100));
    put(__syncthreads_or(value == 100));
    // A part of the lanes may meet by itself.
    const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    put(lane < 16 ? __reduce_add_sync(half, value) : __reduce_max_sync(half, value));
    put(__clz(value) + 100 * __ffs(value) + 10000 * __popc(bits));

    atomicAdd(&args.words[0], bits);
    atomicMax(&args.words[1], bits);
    atomicOr(&args.words[2], 1u << lane);
    if (t == 0) atomicExch(&args.words[3], 5u);
    uint32_t seen = ptx::atom_inc_relaxed_gpu(&args.words[4]);
    while (atomicCAS(&args.words[5], seen, seen + 1) != seen) __nanosleep(20);
    atomicMin(&args.words[6], 0u);
    atomicAnd(&args.words[7], 0u);
}

}  // namespace ep

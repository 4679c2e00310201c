// Every kind of ordinary store to a peer's memory, then a release; the peer compares. Stores are delayed
// without their code knowing of it.
#include "layout.cuh"
#include "ptx.cuh"

namespace ep {

struct StoresCfg {
    int num_threads;
};

struct Wide {
    uint64_t parts[5];
};

template <StoresCfg kCfg>
struct StoredKinds {
    uint8_t bytes[kCfg.num_threads];
    unsigned short halves[kCfg.num_threads];
    uint32_t words[kCfg.num_threads];
    uint64_t longs[kCfg.num_threads];
    uint4 vectors[kCfg.num_threads];
    Wide structs[kCfg.num_threads];
    float sums[kCfg.num_threads];
};

template <StoresCfg kCfg>
struct StoresArgs {
    uint64_t* flags[2];  // by rank
    StoredKinds<kCfg>* stored[2];
    uint64_t* num_wrong;  // by thread
    Wide* source;         // by thread
    int32_t rank;
};

template <StoresCfg kCfg>
__device__ void tell_and_wait(const StoresArgs<kCfg>& args, uint64_t number) {
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::st_release_sys(args.flags[1 - args.rank], number);
        while (ptx::ld_acquire_sys(args.flags[args.rank]) < number) {
        }
    }
    __syncthreads();
}

template <StoresCfg kCfg>
__device__ void stores(const StoresArgs<kCfg>& args) {
    const uint32_t t = threadIdx.x, other = (t + 5) % kCfg.num_threads;
    auto* peer = args.stored[1 - args.rank];
    const auto* mine = args.stored[args.rank];
    for (uint32_t round = 1; round <= 2; ++round) {
        Wide wide;
        for (uint32_t i = 0; i < 5; ++i) wide.parts[i] = round * 1000 + t * 10 + i;
        args.source[t] = wide;
        peer->bytes[t] = round + t;
        peer->halves[t] = round * 100 + t;
        peer->words[t] = round * 1000 + t;
        peer->longs[t] = round * 10000 + t;
        peer->vectors[t] = make_uint4(round, t, t + 1, t + 2);
        peer->structs[t] = args.source[t];
        peer->sums[t] = 1.5f;
        peer->sums[t] += t;  // reads a store of its own that is on its way
        tell_and_wait(args, 2 * round - 1);
        uint64_t num_wrong = 0;
        num_wrong += mine->bytes[other] != static_cast<uint8_t>(round + other);
        num_wrong += mine->halves[other] != round * 100 + other;
        num_wrong += mine->words[other] != round * 1000 + other;
        num_wrong += mine->longs[other] != round * 10000 + other;
        const uint4 v = mine->vectors[other];
        num_wrong += v.x != round || v.y != other || v.z != other + 1 || v.w != other + 2;
        for (uint32_t i = 0; i < 5; ++i)
            num_wrong += mine->structs[other].parts[i] != round * 1000 + other * 10 + i;
        num_wrong += mine->sums[other] != 1.5f + other;
        args.num_wrong[t] += num_wrong;
        tell_and_wait(args, 2 * round);
    }
}

}  // namespace ep

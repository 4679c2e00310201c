// A ring over the network: every processing element puts a row into the next one's memory, which waits for it
// and adds it up. The variants put in different ways, some of them wrong.
#include "layout.cuh"
#include "nvshmem.h"
#include "ptx.cuh"

namespace ep {

struct NetworkCfg {
    int num_threads;
};

template <NetworkCfg kCfg>
struct NetworkArgs {
    uint8_t* landing;  // symmetric, row_bytes for each round
    uint8_t* row;      // row_bytes of this rank, changed between rounds
    uint64_t* signal;  // symmetric
    uint64_t* sums;    // of each round
    uint64_t timeout_ns;
    int32_t variant, num_rounds, row_bytes;
};

enum Variant {
    kPutSignal,     // data and signal in one
    kFence,         // two puts, a fence, a signal
    kNoFence,       // the same without the fence: wrong
    kOneQueuePair,  // the same on one queue pair: right only where the network keeps its order
    kSourceReused,  // the row is changed before quiet: wrong
    kNotAcquired,   // the receiver looks at the signal without acquiring: wrong
};

template <NetworkCfg kCfg>
__device__ void put_row(const NetworkArgs<kCfg>& args, uint8_t* to, int32_t next) {
    constexpr int kQueuePair = 3;
    const int32_t half = args.row_bytes / 2;
    if (args.variant == kFence || args.variant == kNoFence) {
        nvshmem_putmem_nbi(to, args.row, half, next);
        nvshmem_putmem_nbi(to + half, args.row + half, args.row_bytes - half, next);
        if (args.variant == kFence) nvshmem_fence();
        nvshmemx_signal_op(args.signal, 1, NVSHMEM_SIGNAL_ADD, next);
    } else if (args.variant == kOneQueuePair) {
        nvshmemx_qp_char_put_nbi(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(args.row),
                                 args.row_bytes, next, kQueuePair);
        nvshmemx_qp_signal_op(args.signal, 1, NVSHMEM_SIGNAL_ADD, next, kQueuePair);
    } else {
        nvshmem_putmem_signal_nbi(to, args.row, args.row_bytes, args.signal, 1, NVSHMEM_SIGNAL_ADD, next);
    }
    if (args.variant != kSourceReused) nvshmem_quiet();
}

template <NetworkCfg kCfg>
__device__ void network(const NetworkArgs<kCfg>& args) {
    const uint64_t deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    const int32_t me = nvshmem_my_pe(), num_pes = nvshmem_n_pes(), next = (me + 1) % num_pes;
    const int32_t lane = threadIdx.x;
    for (int32_t round = 0; round < args.num_rounds; ++round) {
        uint8_t* landing = args.landing + round * args.row_bytes;
        for (int32_t i = lane; i < args.row_bytes; i += kCfg.num_threads) args.row[i] = me + 10 * round + i;
        __syncwarp();
        bool is_late = false;
        if (lane == 0) {
            put_row(args, landing, next);
            const uint64_t needed = round + 1;
            while (!is_late) {
                const uint64_t seen = args.variant == kNotAcquired ? ptx::ld_relaxed_sys(args.signal)
                                                                   : nvshmem_signal_fetch(args.signal);
                if (seen >= needed) break;
                is_late = ptx::globaltimer_ns() > deadline_ns;
            }
        }
        if (__any_sync(kFullWarp, is_late)) return;
        __syncwarp();
        uint64_t sum = 0;
        for (int32_t i = lane; i < args.row_bytes; i += kCfg.num_threads) sum += landing[i];
        const unsigned total = __reduce_add_sync(kFullWarp, static_cast<unsigned>(sum));
        if (lane == 0) args.sums[round] = total;
    }
}

}  // namespace ep

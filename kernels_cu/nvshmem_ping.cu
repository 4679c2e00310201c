// Every rank puts a block of bytes to every rank, itself included, and checks those that it gets: what shows
// that NVSHMEM works between all pairs, whatever carries it.
//
// Protocol   in symmetric memory every rank has an outbox [2][num_ranks] and an inbox [2][num_ranks] of
//            blocks, and signals [3][kMaxRanks], zero at first. In epoch e, rank r puts outbox[e & 1][p]
//            into inbox[e & 1][r] of each rank p, with the word (e, ping) for signals[e & 1][r] behind it,
//            and waits until all words of its own signals[e & 1] are there. Nothing is ever cleared.
// Reuse      a rank is in epoch e + 1 only after it has heard from all ranks in e, and says so by its
//            signals of e + 1; who has heard those, and enters e + 2, knows that all ranks have checked
//            their inboxes of e and that everything it put in e has arrived. So two sets of blocks and
//            signals are enough, without quiet, and no two signals to one word are ever under way.
// Order      data before its signal by the put; relaxed polls, then an acquire for either way that it came.
// Failure    deadline passed, or a peer gave up: record, tell the peers by signals[2], which nothing else
//            writes, and leave. Calls that follow leave at once.
// Launch     one block of num_ranks threads or more.
#include "network.cuh"
#include "sync.cuh"

namespace ep {

struct NvshmemPingCfg {
    int scope, num_threads;  // scope: who puts a block, see below
};

template <NvshmemPingCfg kCfg>
struct NvshmemPingArgs {
    HangRecord* hang;          // pinned host memory of this rank
    uint8_t *outbox, *inbox;   // symmetric
    uint64_t* signals;         // symmetric
    uint64_t *epoch, *failed;  // this rank's own, zero at first: calls completed; 1 when one was not
    uint64_t* num_wrong;       // this rank's own: threads that found wrong bytes, of all calls
    uint64_t timeout_ns;
    int32_t rank, num_ranks;
    int32_t block_bytes;  // a multiple of 8, and below 128 MiB
};

namespace ping {

enum Scope { kThread, kWarp, kBlock };

// A word of a block names the call, both ranks, and its place.
__device__ inline uint64_t content(uint64_t epoch, int32_t src, int32_t dst, int32_t i) {
    return (epoch << 40) + (static_cast<uint64_t>(src) << 32) + (static_cast<uint64_t>(dst) << 24) + i;
}

template <NvshmemPingCfg kCfg>
__device__ int64_t block_offset(const NvshmemPingArgs<kCfg>& args, uint64_t epoch, int32_t peer) {
    return static_cast<int64_t>((epoch & 1) * args.num_ranks + peer) * args.block_bytes;
}

// The word behind the block that `src` puts in `epoch`.
template <NvshmemPingCfg kCfg>
__device__ uint64_t* signal_of(const NvshmemPingArgs<kCfg>& args, uint64_t epoch, int32_t src) {
    return args.signals + (epoch & 1) * kMaxRanks + src;
}

// What this rank puts to all peers.
template <NvshmemPingCfg kCfg>
__device__ void fill_outbox(const NvshmemPingArgs<kCfg>& args, uint64_t epoch) {
    for (int32_t dst = 0; dst < args.num_ranks; ++dst) {
        auto* words = reinterpret_cast<uint64_t*>(args.outbox + block_offset(args, epoch, dst));
        for (int32_t i = threadIdx.x; i < args.block_bytes / 8; i += kCfg.num_threads)
            words[i] = content(epoch, args.rank, dst, i);
    }
}

// Whether this thread found something else than the peers' blocks.
template <NvshmemPingCfg kCfg>
__device__ bool finds_wrong(const NvshmemPingArgs<kCfg>& args, uint64_t epoch) {
    bool is_wrong = false;
    for (int32_t src = 0; src < args.num_ranks; ++src) {
        const auto* words = reinterpret_cast<const uint64_t*>(args.inbox + block_offset(args, epoch, src));
        for (int32_t i = threadIdx.x; i < args.block_bytes / 8; i += kCfg.num_threads)
            is_wrong |= words[i] != content(epoch, src, args.rank, i);
    }
    return is_wrong;
}

// Puts all blocks, as one block of threads. Starts with the next rank, so that not all go to the same one.
template <NvshmemPingCfg kCfg>
__device__ void put_all(const NvshmemPingArgs<kCfg>& args, uint64_t epoch, uint64_t word) {
    const int32_t thread = threadIdx.x;
    const int32_t first = kCfg.scope == kThread ? thread : kCfg.scope == kWarp ? thread / kWarpSize : 0;
    const int32_t step = kCfg.scope == kThread ? kCfg.num_threads
                         : kCfg.scope == kWarp ? kCfg.num_threads / kWarpSize
                                               : 1;
    uint8_t* inbox = args.inbox + block_offset(args, epoch, args.rank);
    uint64_t* signal = signal_of(args, epoch, args.rank);
    for (int32_t i = first; i < args.num_ranks; i += step) {
        const int32_t peer = (args.rank + 1 + i) % args.num_ranks;
        const uint8_t* block = args.outbox + block_offset(args, epoch, peer);
        if constexpr (kCfg.scope == kThread) {
            network::put_signal_thread(inbox, block, args.block_bytes, signal, word, peer);
        } else if constexpr (kCfg.scope == kWarp) {
            network::put_signal_warp(inbox, block, args.block_bytes, signal, word, peer);
        } else {
            network::put_signal_block(inbox, block, args.block_bytes, signal, word, peer);
        }
    }
}

// Waits, as one block, until the blocks of all peers are there; thread p looks after peer p. `seen` is this
// thread's last look. Acquires what came.
template <NvshmemPingCfg kCfg>
__device__ Reason wait_for_all(const NvshmemPingArgs<kCfg>& args, uint64_t* signal, const uint64_t* farewell,
                               uint64_t word, uint64_t deadline_ns, uint64_t& seen) {
    seen = word;
    while (true) {
        if (signal != nullptr) {
            // A peer that gave up this call or an earlier one will not send what is waited for.
            const uint64_t gave_up = ptx::ld_relaxed_sys(farewell);
            seen = gave_up != 0 ? gave_up : ptx::ld_relaxed_sys(signal);
        }
        if (__syncthreads_and(seen == word)) break;
        const bool has_left = signal_operation(seen) == kGaveUp;
        if (__syncthreads_or(has_left || ptx::globaltimer_ns() > deadline_ns))
            return __syncthreads_or(has_left) ? kContradicted : kExpired;
    }
    if (signal != nullptr) {
        ptx::ld_acquire_sys(signal);
        network::acquire_signal(signal, word);
    }
    __syncthreads();
    return kNothing;
}

}  // namespace ping

template <NvshmemPingCfg kCfg>
__device__ void nvshmem_ping(const NvshmemPingArgs<kCfg>& args) {
    static_assert(kCfg.num_threads % kWarpSize == 0);
    constexpr uint64_t kPhase = 1;
    const uint64_t deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    if (*args.failed) return;
    const uint64_t epoch = *args.epoch + 1;
    const uint64_t word = signal_word(epoch, kPing);
    ping::fill_outbox(args, epoch);
    __syncthreads();
    ping::put_all(args, epoch, word);

    const int32_t peer = threadIdx.x;
    const bool has_peer = peer < args.num_ranks;
    uint64_t* signal = has_peer ? ping::signal_of(args, epoch, peer) : nullptr;
    uint64_t* farewells = args.signals + 2 * kMaxRanks;
    uint64_t seen;
    const Reason reason = ping::wait_for_all(args, signal, farewells + peer, word, deadline_ns, seen);
    if (reason != kNothing) {
        if (has_peer) sync::fill_hang(args.hang, kPhase, word, seen, seen == word);
        __syncthreads();
        if (peer == 0) {
            *args.failed = 1;
            ptx::st_release_sys(&args.hang->reason, reason);
        }
        if (has_peer) network::set_signal(farewells + args.rank, signal_word(epoch, kGaveUp), peer);
        return;
    }
    const int32_t num_wrong = __syncthreads_count(ping::finds_wrong(args, epoch));
    if (peer == 0) {
        *args.num_wrong += num_wrong;
        *args.epoch = epoch;
    }
}

}  // namespace ep

// Barrier over the ranks of one NVLink domain.
//
// Protocol   every slab starts with signals[num_ranks], zero at first. In epoch e, rank r stores the word of
//            (e, operation) into signals[r] of every slab, its own included, and waits until every word of
//            its own slab is at epoch e or later. Then it advances its epoch. No signal is ever cleared.
// Order      release.sys store, acquire.sys load: writes before the barrier on any rank, also by earlier
//            kernels of its stream, are visible after it on every rank.
// Failure    deadline passed, or a peer gave up or is in another operation: record, tell the peers, leave.
// Launch     one block of at least num_ranks threads.
#include "sync.cuh"

namespace ep {

struct BarrierCfg {
    int max_ranks, num_threads;
};

template <BarrierCfg kCfg>
struct BarrierArgs {
    HangRecord* hang;  // pinned host memory of this rank
    uint64_t timeout_ns;
    int32_t rank, num_ranks;
    uint64_t operation;
    uint8_t* slabs[kCfg.max_ranks];
};

template <BarrierCfg kCfg>
__device__ void barrier(const BarrierArgs<kCfg>& args) {
    static_assert(kCfg.max_ranks <= kCfg.num_threads && kCfg.max_ranks <= kMaxRanks);
    constexpr uint64_t kPhase = 1;
    const uint64_t deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    auto* own = reinterpret_cast<SlabHeader*>(args.slabs[args.rank]);
    if (own->failed) return;
    const uint64_t epoch = own->epoch + 1;
    const uint64_t word = signal_word(epoch, args.operation);

    const int32_t peer = threadIdx.x;
    const uint64_t* awaited = nullptr;
    uint64_t* peer_signal = nullptr;
    if (peer < args.num_ranks) {
        awaited = &own->signals[peer];
        peer_signal = &reinterpret_cast<SlabHeader*>(args.slabs[peer])->signals[args.rank];
        ptx::st_release_sys(peer_signal, word);
    }
    uint64_t seen;
    sync::Arrival arrival;
    const Reason reason = sync::wait_for_signals(awaited, word, deadline_ns, seen, arrival);
    if (reason != kNothing) {
        sync::give_up(own, args.hang, peer_signal, reason, kPhase, word, seen,
                      arrival == sync::Arrival::kArrived);
    } else {
        sync::advance_epoch(own, epoch);
    }
}

}  // namespace ep

// Waits on words that only grow, with a deadline, and what happens when it passes.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

namespace ep::sync {

enum class Arrival { kPending, kArrived, kContradicted };

// What `seen` says of a peer that is awaited with `expected`. A later epoch is an arrival whatever its
// operation: its sender left this epoch only after seeing that all ranks agreed.
__device__ inline Arrival arrival_of(uint64_t seen, uint64_t expected) {
    if (seen == expected || signal_epoch(seen) > signal_epoch(expected)) return Arrival::kArrived;
    if (signal_epoch(seen) == signal_epoch(expected)) return Arrival::kContradicted;
    return signal_operation(seen) == kGaveUp ? Arrival::kContradicted : Arrival::kPending;
}

// Waits, as one block, until the word of every thread has arrived; a thread with none passes nullptr.
// Polls in step, so that all threads leave together and with the same answer: kNothing when all arrived.
// `seen` and `arrival` are this thread's last look. Acquires what the senders released.
__device__ inline Reason wait_for_signals(const uint64_t* word, uint64_t expected, uint64_t deadline_ns,
                                          uint64_t& seen, Arrival& arrival) {
    seen = expected;
    arrival = word == nullptr ? Arrival::kArrived : Arrival::kPending;
    while (true) {
        if (word != nullptr) {  // also when it has arrived: its sender may still give up
            seen = ptx::ld_acquire_sys(word);
            arrival = arrival_of(seen, expected);
        }
        if (__syncthreads_and(arrival == Arrival::kArrived)) return kNothing;
        const bool is_contradicted = arrival == Arrival::kContradicted;
        if (__syncthreads_or(is_contradicted || ptx::globaltimer_ns() > deadline_ns)) {
            return __syncthreads_or(is_contradicted) ? kContradicted : kExpired;
        }
    }
}

// One block, when no other one of the kernel reads the epoch any more.
__device__ inline void advance_epoch(SlabHeader* own, uint64_t epoch) {
    if (threadIdx.x == 0) own->epoch = epoch;
    for (int32_t i = threadIdx.x; i < kMaxGridBlocks; i += blockDim.x) own->block_epochs[i] = epoch;
}

// Stores everything of a record but its reason. One thread per peer; thread 0 is among them.
__device__ inline void fill_hang(HangRecord* hang, uint64_t phase, uint64_t expected, uint64_t seen,
                                 bool has_arrived) {
    if (!has_arrived) {
        ptx::st_relaxed_sys(&hang->waits[threadIdx.x].expected, expected);
        ptx::st_relaxed_sys(&hang->waits[threadIdx.x].seen, seen);
    }
    if (threadIdx.x == 0) {
        ptx::st_relaxed_sys(&hang->operation, signal_operation(expected));
        ptx::st_relaxed_sys(&hang->phase, phase);
        ptx::st_relaxed_sys(&hang->epoch, signal_epoch(expected));
    }
}

// How long those wait who wait for the same as others that know better who is late.
__host__ __device__ constexpr uint64_t with_grace(uint64_t timeout_ns) { return timeout_ns + timeout_ns / 4; }

// Whether this is the first block to leave a call; the same answer for all its threads. A barrier.
__device__ inline bool is_first_to_leave(uint64_t* leaving) {
    __shared__ bool is_first;
    if (threadIdx.x == 0) is_first = ptx::atom_add_acq_rel_gpu(leaving, 1) == 0;
    __syncthreads();
    return is_first;
}

// Completes both records, as one thread: whoever finds the reason there can read all of them.
__device__ inline void release_hang(SlabHeader* own, HangRecord* host_hang, Reason reason) {
    ptx::st_relaxed_sys(&own->failed, 1);
    ptx::st_release_sys(&own->hang.reason, reason);
    ptx::st_release_sys(&host_hang->reason, reason);
}

// Records, as one block, why it leaves a call that cannot be completed. Threads that have a peer say what
// they waited for, as to fill_hang. The record goes to this rank's host and to its slab, where the peers'
// hosts find it; only behind this may the peers be told, so whoever hears of it can read why. The epoch
// stays, and `failed` keeps kernels already queued, and graph replays, from reusing it. A barrier.
__device__ inline void record_hang(SlabHeader* own, HangRecord* host_hang, Reason reason, uint64_t phase,
                                   uint64_t expected, bool has_peer, uint64_t seen, bool has_arrived) {
    if (has_peer) {
        fill_hang(&own->hang, phase, expected, seen, has_arrived);
        fill_hang(host_hang, phase, expected, seen, has_arrived);
    }
    __syncthreads();
    if (threadIdx.x == 0) release_hang(own, host_hang, reason);
    __syncthreads();
}

// Leaves such a call where all peers are in this NVLink domain. `peer_signal`: nullptr for threads with none.
__device__ inline void give_up(SlabHeader* own, HangRecord* host_hang, uint64_t* peer_signal, Reason reason,
                               uint64_t phase, uint64_t expected, uint64_t seen, bool has_arrived) {
    record_hang(own, host_hang, reason, phase, expected, peer_signal != nullptr, seen, has_arrived);
    if (peer_signal != nullptr)
        ptx::st_release_sys(peer_signal, signal_word(signal_epoch(expected), kGaveUp));
}

// One collective call as a block of it sees it. Many blocks, any of which may find that it cannot go on.
struct Call {
    uint8_t* const* slabs;
    Workspace* workspace;
    HangRecord* host_hang;
    uint64_t epoch, word, deadline_ns;
    int32_t rank, num_ranks;
    int32_t parity;  // of the epoch: which set of stamped words
    int32_t set;     // of the workspace's counters

    __device__ SlabHeader* header(int32_t peer) const { return reinterpret_cast<SlabHeader*>(slabs[peer]); }
    __device__ Exchange* exchange(int32_t peer) const {
        return reinterpret_cast<Exchange*>(slabs[peer] + kExchangeOffset);
    }
    __device__ bool has_failed() const { return ptx::ld_relaxed_gpu(&header(rank)->failed) != 0; }
};

// Begins a call: every thread of every block. False when an earlier one was given up, or another block gives
// this one up already: the same answer for all threads of a block, which meet again later.
// Block 0 tells the peers which call this is, and clears the counters of the next one.
__device__ inline bool enter(Call& call, uint64_t operation, uint64_t timeout_ns) {
    const bool has_failed = call.has_failed();
    call.deadline_ns = ptx::globaltimer_ns() + timeout_ns;
    call.epoch = call.header(call.rank)->epoch + 1;
    call.word = signal_word(call.epoch, operation);
    call.parity = call.epoch & 1;
    call.set = call.workspace->calls & 1;
    if (__syncthreads_or(has_failed)) return false;
    if (blockIdx.x == 0) {
        const int32_t peer = threadIdx.x;
        // Orders nothing: it only says where this rank is.
        if (peer < call.num_ranks) ptx::st_relaxed_sys(&call.header(peer)->signals[call.rank], call.word);
        const int32_t idle = call.set ^ 1;
        if (threadIdx.x == 0) {
            call.workspace->tickets[idle] = 0;
            call.workspace->arrived[idle] = 0;
            call.workspace->finished[idle] = 0;
            call.workspace->begun[idle] = call.workspace->announced[idle] = call.workspace->landed[idle] = 0;
        }
        for (int32_t i = threadIdx.x; i < kMaxLocalRanks * kMaxLocalExperts; i += blockDim.x)
            call.workspace->expert_counts[idle][i] = 0;
        for (int32_t i = threadIdx.x; i < kMaxChunks; i += blockDim.x) call.workspace->staged[idle][i] = 0;
    }
    return true;
}

// kContradicted if a peer says that it gave this call up, or that it is in another one.
__device__ inline Reason contradiction(const Call& call, int32_t peer) {
    const uint64_t seen = ptx::ld_acquire_sys(&call.header(call.rank)->signals[peer]);
    return arrival_of(seen, call.word) == Arrival::kContradicted ? kContradicted : kNothing;
}

// Why a thread that has polled for a while should stop: kNothing to go on. kLeft: another block gave up.
__device__ inline Reason trouble(const Call& call, int32_t peer) {
    if (call.has_failed()) return kLeft;
    if (peer >= 0 && contradiction(call, peer) != kNothing) return kContradicted;
    return ptx::globaltimer_ns() > call.deadline_ns ? kExpired : kNothing;
}

// What all threads of a block do about what each of them found: the gravest, the same answer for all.
__device__ inline Reason agree(Reason mine) {
    if (__syncthreads_or(mine != kNothing) == 0) return kNothing;
    if (__syncthreads_or(mine == kLeft)) return kLeft;
    if (__syncthreads_or(mine == kDisagreed)) return kDisagreed;
    return __syncthreads_or(mine == kContradicted) ? kContradicted : kExpired;
}

// Waits, as one thread, until `is_there(*word)`. Acquires nothing.
template <class IsThere>
__device__ inline Reason poll(const Call& call, const uint64_t* word, int32_t peer, uint64_t& seen,
                              IsThere is_there) {
    for (uint32_t polls = 1; !is_there(seen = ptx::ld_relaxed_sys(word)); ++polls) {
        const Reason reason = polls % 64 == 0 ? trouble(call, peer) : kNothing;
        if (reason != kNothing) return reason;
    }
    return kNothing;
}

// Waits, as one thread, for a word of another kernel of this rank that runs beside this one, and acquires it.
// False when the call is given up, as it is in time if that kernel waits in vain.
template <class IsThere>
__device__ inline bool await_beside(const SlabHeader* own, const uint64_t* word, uint64_t& seen,
                                    IsThere is_there) {
    for (uint32_t polls = 1; !is_there(seen = ptx::ld_relaxed_gpu(word)); ++polls)
        if (polls % 64 == 0 && ptx::ld_relaxed_gpu(&own->failed) != 0) return false;
    ptx::ld_acquire_gpu(word);
    return true;
}

constexpr bool kAcquiring = true, kStamped = false;  // kStamped: the words say all there is to know

// Waits, as one block, until each of `num_words` words satisfies `is_there(word)`. Acquires what was released
// with them, if `kAcquires`. `word_at(i)` is word i; `peer_of(i)` the rank that stores it, -1 for a block of
// this rank. `note(i, seen)` gets the value that was waited for: what it says is acquired, while the word may
// say more by now.
template <bool kAcquires, class WordAt, class PeerOf, class IsThere, class Note>
__device__ inline Reason wait_for_words(const Call& call, int32_t num_words, WordAt word_at, PeerOf peer_of,
                                        IsThere is_there, Note note) {
    Reason reason = kNothing;
    for (int32_t i = threadIdx.x; i < num_words && reason == kNothing; i += blockDim.x) {
        uint64_t seen;
        reason = poll(call, word_at(i), peer_of(i), seen, is_there);
        // An acquire load is dear: only of the word that is known to be there.
        if (kAcquires) ptx::ld_acquire_sys(word_at(i));
        note(i, seen);
    }
    return agree(reason);
}
template <bool kAcquires, class WordAt, class PeerOf, class IsThere>
__device__ inline Reason wait_for_words(const Call& call, int32_t num_words, WordAt word_at, PeerOf peer_of,
                                        IsThere is_there) {
    return wait_for_words<kAcquires>(call, num_words, word_at, peer_of, is_there, [](int32_t, uint64_t) {});
}

// Gives the call up, as one block; of several blocks that come here, one writes the record.
// `has_arrived(peer)` says whether this block heard what it waited for from a peer.
template <class HasArrived>
__device__ inline void leave(const Call& call, Reason reason, uint64_t phase, HasArrived has_arrived) {
    if (reason == kLeft || !is_first_to_leave(&call.workspace->leaving)) return;
    const int32_t peer = threadIdx.x;
    uint64_t* signal = nullptr;
    uint64_t seen = call.word;
    bool is_there = true;
    if (peer < call.num_ranks) {
        signal = &call.header(peer)->signals[call.rank];
        is_there = has_arrived(peer);
        const uint64_t entered = ptx::ld_relaxed_sys(&call.header(call.rank)->signals[peer]);
        // A peer that entered this call, but got no further, has completed the one before.
        seen = is_there || entered != call.word ? entered : signal_word(call.epoch - 1, kNoOperation);
    }
    give_up(call.header(call.rank), call.host_hang, signal, reason, phase, call.word, seen, is_there);
}

// Ends the call, as one block, once everything the block stored for peers has landed. The last block of the
// rank tells the peers, waits until they all say the same, and advances the epoch.
__device__ inline void finish(const Call& call, uint64_t phase) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = ptx::atom_add_acq_rel_gpu(&call.workspace->finished[call.set], 1) + 1 == gridDim.x;
    __syncthreads();
    if (!is_last || call.has_failed()) return;
    const int32_t peer = threadIdx.x;
    // Cumulative: what the other blocks released to this one goes before.
    if (peer < call.num_ranks) ptx::st_release_sys(&call.exchange(peer)->arrivals[call.rank], call.word);
    const Exchange* own = call.exchange(call.rank);
    const Reason reason = wait_for_words<kAcquiring>(
        call, call.num_ranks, [&](int32_t src) { return &own->arrivals[src]; },
        [](int32_t src) { return src; }, [&](uint64_t seen) { return signal_epoch(seen) >= call.epoch; });
    if (reason != kNothing) {
        leave(call, reason, phase, [&](int32_t src) {
            return signal_epoch(ptx::ld_relaxed_sys(&own->arrivals[src])) >= call.epoch;
        });
    } else {
        advance_epoch(call.header(call.rank), call.epoch);
        if (threadIdx.x == 0) call.workspace->calls += 1;
    }
}

// The number of the next piece of work, in lane 0 of a warp; nothing in the others. Fetch it one piece ahead.
__device__ __forceinline__ uint32_t take_ticket(const Call& call, int32_t lane) {
    // The low word of the counter: little endian.
    auto* tickets = reinterpret_cast<uint32_t*>(&call.workspace->tickets[call.set]);
    return lane == 0 ? ptx::atom_inc_relaxed_gpu(tickets) : 0;
}

}  // namespace ep::sync

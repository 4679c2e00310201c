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

// Leaves a call that cannot be completed, as one block with one thread per peer. The record goes to this
// rank's host and to its slab, where the peers' hosts find it; only then are the peers told, so whoever hears
// of it can read why. The epoch stays, and `failed` keeps kernels already queued, and graph replays, from
// reusing it.
__device__ inline void give_up(SlabHeader* own, HangRecord* host_hang, uint64_t* peer_signal, Reason reason,
                               uint64_t phase, uint64_t expected, uint64_t seen, bool has_arrived) {
    if (peer_signal != nullptr) {
        fill_hang(&own->hang, phase, expected, seen, has_arrived);
        fill_hang(host_hang, phase, expected, seen, has_arrived);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        own->failed = 1;
        ptx::st_release_sys(&own->hang.reason, reason);
        ptx::st_release_sys(&host_hang->reason, reason);
    }
    __syncthreads();
    if (peer_signal != nullptr)
        ptx::st_release_sys(peer_signal, signal_word(signal_epoch(expected), kGaveUp));
}

}  // namespace ep::sync

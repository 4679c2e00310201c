// The control words at the start of every slab, and what a signal word means. Twin of ep_rt/cuda/layout.py.
#pragma once
#include "base.cuh"

namespace ep {

constexpr int kMaxRanks = 128;  // of one NVLink domain

// The call that a signal belongs to. Ranks that are in different calls find out from each other's signals.
enum Operation : uint64_t {
    kNoOperation = 0,  // start and reset
    kBarrier = 1,
    kGaveUp = 0xffff,  // the sender left the call; above every call, so that the word still grows
};

// Signals are words that only grow: the epoch counts the collective calls of a slab, the operation says which
// call the sender is in.
constexpr int kOperationBits = 16;
__host__ __device__ constexpr uint64_t signal_word(uint64_t epoch, uint64_t operation) {
    return epoch << kOperationBits | operation;
}
__host__ __device__ constexpr uint64_t signal_epoch(uint64_t word) { return word >> kOperationBits; }
__host__ __device__ constexpr uint64_t signal_operation(uint64_t word) {
    return word & ((uint64_t{1} << kOperationBits) - 1);
}

// Why a kernel left before its work was done.
enum Reason : uint64_t {
    kNothing = 0,
    kExpired = 1,      // the deadline passed
    kContradicted = 2  // a peer's signal says that it gave up, or that it is in another call
};

// What a rank saw of one peer when it gave up. expected 0: it was not waiting for this peer.
struct PeerWait {
    uint64_t expected, seen;
};

// What a rank saw of all its peers: a rank that gave up is late for others, so one peer's name is not enough
// to blame it. `reason` is stored last. Written once, until the ranks reset together.
struct HangRecord {
    uint64_t reason, operation, phase, epoch;
    PeerWait waits[kMaxRanks];
};

struct SlabHeader {
    uint64_t signals[kMaxRanks];  // [src_rank]: stored by that rank; only grows

    // This rank's own; peers only look at them, from their hosts.
    uint64_t epoch;   // calls completed; advanced by the kernels, so that a graph can be replayed
    uint64_t failed;  // 1: a call was given up, and kernels that start leave at once; cleared by reset alone
    HangRecord hang;
};

}  // namespace ep

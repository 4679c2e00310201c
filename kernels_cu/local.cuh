// Kernels that wait for no other rank: tickets, and one barrier of the grid. Their calls follow each other on
// one stream, each with its number, which lives in device memory, so that a graph can be replayed.
#pragma once
#include "sync.cuh"

namespace ep::local {

// One call as a block of it sees it.
struct Call {
    SlabHeader* header;  // of this rank's slab
    LocalWorkspace* workspace;

    uint64_t number;
    int32_t set;  // of the counters
    int32_t num_recv_tokens;
};

// Begins a call: every thread of every block. False when an earlier one was given up, so that its results are
// not there. Block 0 clears the counters of the next call, which nobody uses before this one has ended.
// `num_recv_tokens` may be the host's memory: one thread of a block reads it. nullptr: all of `row_capacity`.
__device__ inline bool enter(Call& call, const int32_t* num_recv_tokens, int32_t row_capacity) {
    __shared__ int32_t num_tokens;
    if (threadIdx.x == 0) num_tokens = num_recv_tokens == nullptr ? row_capacity : *num_recv_tokens;
    if (__syncthreads_or(ptx::ld_relaxed_gpu(&call.header->failed) != 0)) return false;
    call.num_recv_tokens = num_tokens;
    call.number = call.workspace->calls + 1;
    call.set = call.number & 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        const int32_t idle = call.set ^ 1;
        call.workspace->arrived[idle] = 0;
        call.workspace->finished[idle] = 0;
        call.workspace->tickets[idle] = 0;
    }
    return true;
}

// Waits, as one thread, until `is_there(*word)`. Acquires nothing.
template <class IsThere>
__device__ inline Reason poll(const Call& call, const uint64_t* word, uint64_t deadline_ns, uint64_t& seen,
                              IsThere is_there) {
    for (uint32_t polls = 1; !is_there(seen = ptx::ld_relaxed_gpu(word)); ++polls) {
        if (polls % 64 != 0) continue;
        if (ptx::ld_relaxed_gpu(&call.header->failed) != 0) return kLeft;
        if (ptx::globaltimer_ns() > deadline_ns) return kExpired;
    }
    return kNothing;
}

// Waits, as one block, for all blocks: what any thread stored before is visible to every thread after it.
// Once in a call.
__device__ inline Reason wait_for_grid(const Call& call, uint64_t deadline_ns) {
    uint64_t* arrived = &call.workspace->arrived[call.set];
    Reason reason = kNothing;
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::atom_add_acq_rel_gpu(arrived, 1);
        uint64_t seen;
        reason = poll(call, arrived, deadline_ns, seen, [](uint64_t blocks) { return blocks >= gridDim.x; });
        ptx::ld_acquire_gpu(arrived);
    }
    return sync::agree(reason);
}

// Gives the call up, as one block: its blocks did not run at the same time. `failed` keeps later kernels from
// using what is not there; peers are not waiting for this call, and find this rank late in the next.
__device__ inline void leave(const Call& call, HangRecord* host_hang, Reason reason, uint64_t operation,
                             uint64_t phase) {
    if (reason == kLeft || threadIdx.x != 0) return;
    const uint64_t word = signal_word(call.header->epoch + 1, operation);
    constexpr bool kAwaitedNobody = true;
    sync::fill_hang(&call.header->hang, phase, word, word, kAwaitedNobody);
    sync::fill_hang(host_hang, phase, word, word, kAwaitedNobody);
    sync::release_hang(call.header, host_hang, reason);
}

// Ends the call, as one block. The last block advances the count of calls.
__device__ inline void finish(const Call& call) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    const uint64_t before = ptx::atom_add_acq_rel_gpu(&call.workspace->finished[call.set], 1);
    if (before + 1 == gridDim.x) call.workspace->calls = call.number;
}

// The number of the next piece of work, in lane 0 of a warp; nothing in the others. Fetch it one piece ahead.
__device__ __forceinline__ uint32_t take_ticket(const Call& call, int32_t lane) {
    return lane == 0 ? ptx::atom_inc_relaxed_gpu(&call.workspace->tickets[call.set]) : 0;
}

}  // namespace ep::local

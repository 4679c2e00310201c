// What the kernels that cross the network share: control words in symmetric memory, waits, and giving up.
//
// Ranks      a rank talks to those of the same local index on the other nodes. A call of the two-level mode
//            is one of its node's NVLink domain with steps over the network beside it; their words carry the
//            same epoch and operation, which are equal on all nodes, so errors of both are told alike.
// Words      all only grow. A word has one writer, and no two stores to it are ever under way: nothing in a
//            network orders two signals. `doing` and `farewells` only explain why somebody waits in vain.
// Order      data before its signal by the put that carries both; relaxed polls, then one acquire for either
//            way that it may have come (see network.cuh), then a barrier for the threads of the block.
#pragma once
#include "network.cuh"
#include "sync.cuh"

namespace ep {

namespace internode {

// Which tokens the layout sends where: that of a call and of the network are the same struct everywhere.
struct Place {
    int32_t node, num_nodes;        // of this rank, of all
    int32_t rank, num_local_ranks;  // within the node
    // The rank of this local index on another node, as NVSHMEM counts.
    __device__ int32_t peer(int32_t at) const { return at * num_local_ranks + rank; }
};

// A step over the network as a block of it sees it.
struct Session {
    Place place;
    uint8_t* const* slabs;  // of the node
    HangRecord* host_hang;
    Workspace* workspace;
    NetworkArea* area;
    NetworkState* state;
    uint64_t epoch, word, deadline_ns;

    __device__ SlabHeader* header(int32_t rank) const { return reinterpret_cast<SlabHeader*>(slabs[rank]); }
    __device__ SlabHeader* own() const { return header(place.rank); }
};

// Begins: every thread of every block. `epoch` of the slab's calls. False when an earlier call was given up:
// the same answer for all threads of a block. A barrier.
__device__ inline bool begin(Session& session, uint64_t epoch, uint64_t operation, uint64_t timeout_ns) {
    const bool has_failed = ptx::ld_relaxed_gpu(&session.own()->failed) != 0;
    session.epoch = epoch;
    session.word = signal_word(epoch, operation);
    session.deadline_ns = ptx::globaltimer_ns() + timeout_ns;
    if (__syncthreads_or(has_failed)) return false;
    const int32_t at = threadIdx.x;
    if (blockIdx.x == 0 && at < session.place.num_nodes && at != session.place.node)
        network::set_signal(&session.area->doing[session.place.node], session.word, session.place.peer(at));
    return true;
}

// Why a thread that waits for another node should stop: kNothing to go on.
__device__ __noinline__ static Reason trouble(const Session& session, int32_t at) {
    if (ptx::ld_relaxed_gpu(&session.own()->failed) != 0) return kLeft;
    const uint64_t doing = ptx::ld_relaxed_sys(&session.area->doing[at]);
    if (sync::arrival_of(doing, session.word) == sync::Arrival::kContradicted) return kContradicted;
    if (ptx::ld_relaxed_sys(&session.area->farewells[at]) != 0) return kContradicted;
    return ptx::globaltimer_ns() > session.deadline_ns ? kExpired : kNothing;
}

// Waits, as one thread, until the word of another node has come to `value`, and acquires what came with it.
__device__ inline Reason await_signal(const Session& session, uint64_t* word, uint64_t value, int32_t at) {
    for (uint32_t polls = 1; ptx::ld_relaxed_sys(word) < value; ++polls) {
        const Reason reason = polls % 64 == 0 ? trouble(session, at) : kNothing;
        if (reason != kNothing) return reason;
    }
    ptx::ld_acquire_sys(word);
    network::acquire_signal(word, value);
    return kNothing;
}

// Stores a word of ours at another node, as one thread. Over NVLink it goes behind all that came before in
// this thread's causality order; over the network only what a put carries does.
__device__ inline void tell(const Session& session, uint64_t* word, uint64_t value, int32_t at) {
    const int32_t peer = session.place.peer(at);
    void* there = network::peer_pointer(word, peer);
    if (there != nullptr)
        ptx::st_release_sys(static_cast<uint64_t*>(there), value);
    else
        network::set_signal(word, value, peer);
}

// Gives the call up, as one block, over what did not come from the nodes whose bits are in `missing`; of
// several blocks one does. The record names nodes. Ranks of this node hear of it as from any call that is
// given up, those of other nodes by a word that nothing else writes.
__device__ inline void leave(const Session& session, Reason reason, uint64_t phase, uint32_t missing) {
    if (reason == kLeft || !sync::is_first_to_leave(&session.workspace->leaving)) return;
    const Place& place = session.place;
    const int32_t at = threadIdx.x;
    const bool is_node = at < place.num_nodes, has_arrived = is_node && (missing >> at & 1) == 0;
    uint64_t seen = session.word;
    if (is_node) {
        const uint64_t farewell = ptx::ld_relaxed_sys(&session.area->farewells[at]);
        const uint64_t doing = ptx::ld_relaxed_sys(&session.area->doing[at]);
        seen = doing;
        if (sync::arrival_of(doing, session.word) != sync::Arrival::kContradicted) {
            // A rank that entered this call, but got no further, has completed the one before.
            if (doing == session.word) seen = signal_word(session.epoch - 1, kNoOperation);
            if (farewell != 0) seen = signal_word(session.epoch, kGaveUp);
        }
    }
    sync::record_hang(session.own(), session.host_hang, reason, phase, session.word, is_node, seen,
                      has_arrived);
    if (at < place.num_local_ranks)
        ptx::st_release_sys(&session.header(at)->signals[place.rank], signal_word(session.epoch, kGaveUp));
    if (is_node && at != place.node)
        network::set_signal(&session.area->farewells[place.node],
                            farewell_word(missing, reason, session.word), place.peer(at));
}

}  // namespace internode
}  // namespace ep

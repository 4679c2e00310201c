// What dispatch and combine of the low-latency mode share: the phases of a call, landing zones and when they
// are free again, and ranks that are left out.
//
// Zones      A call uses one landing zone; the host alternates between the two of its kind. Uses of a zone
//            are counted in device memory, so that a graph can be replayed. A rank that needs a use no longer
//            says so to every peer (`freed`) when a later kernel of its own starts; a sender waits for that
//            of the use before. With two zones in turn the word has always come long ago. A result of a
//            dispatch that lies in its zone is needed until the next dispatch receives, or until it is
//            combined.
// Phases     Sending and receiving may be two kernels, with anything between them. The first one leaves the
//            epoch and the use in the record of the call, where the second one finds them.
// Left out   With `masks` a rank that does not arrive in time is masked and the call goes on. The blocks of a
//            receive phase must agree on who is there: the first one to decide decides for all. A rank that
//            was masked while it still stores, late and not lost, may store over rows of others of a later
//            call: where rows differ in size from call to call, and where combine sums at the source, whose
//            slots are those of columns and not of ranks.
// Words      All stamped with the epoch of the call, in a zone that is free, so none is cleared.
// Nodes      Over several nodes areas lie in symmetric memory. Where loads and stores reach a peer, all is as
//            above. To others words go as signals, and what is more than a word by puts from an outbox: with
//            a word of its own behind each row and each list. An outbox is free again when the zones that it
//            went to are. No two stores to a word are under way: of words of a zone because the zone was
//            freed, of `freed` because its next value follows a use that its last one allowed. `doing`,
//            `beats` and `farewells` only explain why somebody waits.
#pragma once
#include "low_latency_waits.cuh"

namespace ep::low_latency {

// Whether this block tells the peers where this rank is. The first one does, and nothing else: peers wait for
// its words, so it must not wait for a place, and what it releases would hold others up.
__device__ inline bool speaks() { return blockIdx.x == 0; }
__device__ inline int32_t block_number() { return static_cast<int32_t>(blockIdx.x) - 1; }

// Begins: every thread of every block. False when an earlier call was given up. A barrier.
template <bool kOverNetwork, class Args>
__device__ inline bool begin(Session<kOverNetwork>& session, Found& found, const Args& args,
                             uint64_t operation) {
    sync::Call& call = session.call;
    call.slabs = args.slabs;
    call.workspace = args.workspace;
    call.host_hang = args.hang;
    call.rank = kOverNetwork ? args.rank - args.first_rank : args.rank;
    call.num_ranks = kOverNetwork ? args.num_local_ranks : args.num_ranks;
    if constexpr (kOverNetwork) session.all = {args.first_rank, args.num_ranks};
    session.state = args.state;
    session.masks = args.masks;
    session.areas = args.areas;
    session.timeout_ns = args.timeout_ns;
    session.zone = args.zone;
    session.phases = args.phases;
    if (threadIdx.x == 0) {
        found.missing = 0;
        found.ranks = bits_of(args.num_ranks);
    }
    const bool sends = (args.phases & kSends) != 0;
    const SlabHeader* own = call.header(call.rank);
    const int32_t peer = min(static_cast<int32_t>(threadIdx.x), args.num_ranks - 1);
    const uint64_t* epoch = sends ? &own->block_epochs[blockIdx.x] : &args.record->epoch;
    const uint64_t* use = sends ? &args.state->uses[args.zone][blockIdx.x] : &args.record->use;
    // All on their way at a time: nothing is done with any before the last one has been asked for.
    const uint64_t has_failed = ptx::ld_relaxed_gpu(&own->failed);
    call.epoch = ptx::ld_relaxed_gpu(epoch) + sends;
    session.use = ptx::ld_relaxed_gpu(use) + sends;
    session.freed = ptx::ld_acquire_sys(&session.area(args.rank)->freed[args.zone][peer]);
    const bool awaits_zone = sends && (args.masks != nullptr || session.freed + 1 < session.use);
    call.deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    call.word = signal_word(call.epoch, operation);
    session.is_zone_free = __syncthreads_or(has_failed != 0 || awaits_zone) == 0;
    if (!session.is_zone_free && __syncthreads_or(has_failed != 0)) return false;
    if (speaks() && sends) {
        // Orders nothing: it only says where this rank is.
        if (threadIdx.x < args.num_ranks && !session.is_masked(peer)) {
            if (session.is_beside(peer))
                ptx::st_relaxed_sys(&call.header(session.local(peer))->signals[call.rank], call.word);
            else
                session.tell(
                    peer, [&](LowLatencyArea* area) { return &area->doing[session.rank()]; }, call.word);
        }
        if (threadIdx.x == 0) {
            args.record->epoch = call.epoch;
            args.record->use = session.use;
        }
    }
    return true;
}

// Tells the peers which uses of this rank's zones it no longer needs: the second warp of the block that
// speaks. `released_zone` is the dispatch zone whose last result is not needed any more, -1 for none. Words
// only grow, so a use that is still to be received, and all before it, are left to the send phase that takes
// its zone.
template <bool kOverNetwork>
__device__ inline void post_freed(const Session<kOverNetwork>& session, int32_t released_zone) {
    constexpr int32_t kPeers = kMaxPeers<kOverNetwork>;
    static_assert(kLowLatencyZones * kPeers % kWarpSize == 0);
    const int32_t lane = static_cast<int32_t>(threadIdx.x) - kWarpSize;
    if (lane < 0 || lane >= kWarpSize) return;
#pragma unroll 1
    for (int32_t i = lane; i < kLowLatencyZones * kPeers; i += kWarpSize) {
        const int32_t zone = i / kPeers, peer = i % kPeers;
        if (peer >= session.num_ranks() || session.is_masked(peer)) continue;
        uint64_t use = session.use - 1;
        if (zone == session.zone) {
            if (!(session.phases & kSends)) continue;
        } else {
            use = session.state->uses[zone][0];
            if (zone < kFirstCombineZone && zone != released_zone) continue;
            if (session.state->received[zone] != use) continue;
        }
        // Earlier kernels of this rank have read the zone: the release puts that before what the peer stores.
        if (session.reaches(peer)) {
            ptx::st_release_sys(&session.area(peer)->freed[zone][session.rank()], use);
        } else if constexpr (kOverNetwork) {
            uint64_t* posted = &session.state->posted[zone][peer];
            if (*posted == use) continue;
            *posted = use;
            network::set_signal(&session.own()->freed[zone][session.rank()], use, peer);
        }
    }
}

// Waits until the zone of every peer is free for this use. Then `found.ranks` are those to send to, for all
// threads.
template <bool kOverNetwork>
__device__ inline Reason await_zone(const Session<kOverNetwork>& session, Found& found) {
    if (session.is_zone_free) return kNothing;
    const int32_t peer = threadIdx.x;
    Reason reason = kNothing;
    bool is_free = false;
    if (peer < session.num_ranks() && !session.is_masked(peer)) {
        const uint64_t* word = &session.own()->freed[session.zone][peer];
        if (session.freed + 1 < session.use) {
            for (uint32_t polls = 1; ptx::ld_relaxed_sys(word) + 1 < session.use && reason == kNothing;
                 ++polls)
                if (polls % 64 == 0) reason = trouble_in(session, peer, session.call.deadline_ns);
            if (reason == kNothing) ptx::ld_acquire_sys(word);
        }
        is_free = reason == kNothing;
        reason = settle(session, found, reason, peer);
    }
    const uint32_t free = __ballot_sync(kFullWarp, is_free);
    if (threadIdx.x == 0) found.ranks = free;
    return sync::agree(reason);
}

// Whether a source rank takes part in what is received, after this block saw that it does, or does not. One
// thread, behind a barrier and before one: what others of the block have acquired goes along.
template <bool kOverNetwork>
__device__ inline bool decide(const Session<kOverNetwork>& session, int32_t src, bool is_there) {
    uint64_t* word = &session.state->decisions[session.zone][src];
    const uint64_t epoch = session.call.epoch;
    const uint64_t vote = stamped(epoch, is_there ? kPresent : kAbsent);
    uint64_t seen = ptx::ld_acquire_gpu(word);
    while (!is_stamped(seen, epoch)) {
        const uint64_t before = ptx::atom_cas_acq_rel_gpu(word, seen, vote);
        if (before == seen) return is_there;
        seen = before;
    }
    return static_cast<uint32_t>(seen) == kPresent;
}

// Says to every rank that got something that all of this block's stores so far have landed. The last warp
// waits for that, which has the fewest turns; the others go on.
template <bool kOverNetwork>
__device__ inline void post_flags(const Session<kOverNetwork>& session, const Found& found, int32_t block,
                                  int32_t which = 0) {
    __syncthreads();
    const auto peer = static_cast<int32_t>(threadIdx.x + kWarpSize - blockDim.x);
    if (peer < 0 || peer >= session.num_ranks() || !(found.ranks >> peer & 1) || !session.reaches(peer))
        return;
    // Cumulative: what the other threads stored goes before.
    ptx::st_release_sys(&session.area(peer)->flags[session.zone][session.rank()][which][block],
                        stamped(session.call.epoch, 1));
}

// Gives the call up, as one block, over the ranks whose bits are in `missing`; of several blocks one does.
template <bool kOverNetwork>
__device__ inline void leave(const Session<kOverNetwork>& session, Reason reason, uint64_t phase,
                             uint32_t missing) {
    const sync::Call& call = session.call;
    if constexpr (!kOverNetwork) {
        sync::leave(call, reason, phase, [&](int32_t peer) { return !(missing >> peer & 1); });
    } else {
        if (reason == kLeft || !sync::is_first_to_leave(&call.workspace->leaving)) return;
        const int32_t peer = threadIdx.x;
        const bool is_peer = peer < session.num_ranks(), has_arrived = is_peer && (missing >> peer & 1) == 0;
        uint64_t seen = call.word;
        if (is_peer) {
            const uint64_t entered = ptx::ld_relaxed_sys(session.signal(peer));
            seen = entered;
            if (sync::arrival_of(entered, call.word) != sync::Arrival::kContradicted) {
                // A rank that entered this call, but got no further, has completed the one before.
                if (entered == call.word) seen = signal_word(call.epoch - 1, kNoOperation);
                if (!session.is_beside(peer) && ptx::ld_relaxed_sys(&session.own()->farewells[peer]) != 0)
                    seen = signal_word(call.epoch, kGaveUp);
            }
        }
        sync::record_hang(call.header(call.rank), call.host_hang, reason, phase, call.word, is_peer, seen,
                          has_arrived);
        if (!is_peer) return;
        if (session.is_beside(peer))
            ptx::st_release_sys(&call.header(session.local(peer))->signals[call.rank],
                                signal_word(call.epoch, kGaveUp));
        else
            session.tell(
                peer, [&](LowLatencyArea* area) { return &area->farewells[session.rank()]; },
                farewell_word(missing, reason, call.word));
    }
}

// Ends what a block does in this kernel: by all its threads, with the same answer for all.
template <bool kOverNetwork>
__device__ inline void end(const Session<kOverNetwork>& session, const Found& found, Reason reason,
                           uint64_t phase) {
    const sync::Call& call = session.call;
    if (__syncthreads_or(reason != kNothing)) {
        const bool is_overfull = __syncthreads_or(reason == kOverfull) != 0;
        return leave(session, is_overfull ? kOverfull : sync::agree(reason), phase, found.missing);
    }
    SlabHeader* own = call.header(call.rank);
    if (session.phases & kSends) {
        // Each block its share: no other one reads these words, and all threads of this one have.
#pragma unroll 1
        for (int32_t i = blockIdx.x + gridDim.x * threadIdx.x; i < kMaxGridBlocks;
             i += gridDim.x * blockDim.x) {
            own->block_epochs[i] = call.epoch;
            session.state->uses[session.zone][i] = session.use;
        }
        if (blockIdx.x == 0 && threadIdx.x == 0) own->epoch = call.epoch;
    }
    // For later kernels, which start when all blocks have ended.
    if (session.phases & kReceives && blockIdx.x + 1 == gridDim.x && threadIdx.x == 0)
        session.state->received[session.zone] = session.use;
}

}  // namespace ep::low_latency

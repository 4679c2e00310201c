// What blocks of the low-latency mode wait for: words, flags and puts of peers, always with a deadline, and
// words of blocks beside them.
#pragma once
#include "low_latency_session.cuh"

namespace ep::low_latency {

// Of a block, in shared memory.
struct Found {
    uint32_t missing;  // bits of ranks that were waited for in vain
    uint32_t ranks;    // bits of those that take part
};

// As those of sync.cuh, but the rare part is not repeated wherever something is polled: these kernels run for
// microseconds, and their instructions are fetched anew each time.
template <class IsContradicted>
__device__ __forceinline__ Reason trouble_unless(const SlabHeader* own, uint64_t deadline_ns,
                                                 IsContradicted is_contradicted) {
    if (ptx::ld_relaxed_gpu(&own->failed) != 0) return kLeft;
    if (is_contradicted()) return kContradicted;
    return ptx::globaltimer_ns() > deadline_ns ? kExpired : kNothing;
}
__device__ __noinline__ static Reason trouble_with(const SlabHeader* own, int32_t peer, uint64_t word,
                                                   uint64_t deadline_ns) {
    return trouble_unless(own, deadline_ns, [&] {
        return sync::arrival_of(ptx::ld_acquire_sys(&own->signals[peer]), word) ==
               sync::Arrival::kContradicted;
    });
}
// The same of a rank of another node.
__device__ __noinline__ static Reason trouble_elsewhere(const SlabHeader* own, const LowLatencyArea* area,
                                                        int32_t peer, uint64_t word, uint64_t deadline_ns) {
    return trouble_unless(own, deadline_ns, [&] {
        const uint64_t seen = ptx::ld_relaxed_sys(&area->doing[peer]);
        return sync::arrival_of(seen, word) == sync::Arrival::kContradicted ||
               ptx::ld_relaxed_sys(&area->farewells[peer]) != 0;
    });
}
template <bool kOverNetwork>
__device__ inline Reason trouble_in(const Session<kOverNetwork>& session, int32_t peer,
                                    uint64_t deadline_ns) {
    const sync::Call& call = session.call;
    const SlabHeader* own = call.header(call.rank);
    if constexpr (kOverNetwork)
        if (!session.is_beside(peer))
            return trouble_elsewhere(own, session.own(), peer, call.word, deadline_ns);
    return trouble_with(own, session.local(peer), call.word, deadline_ns);
}

// How long a thread waits for a peer where late ranks are masked. A rank that waits for a third one is late
// for its peers, but it is not lost: while it waits it beats, and who hears that begins to wait anew.
struct Patience {
    uint64_t deadline_ns, next_beat_ns, beat;
    bool is_over;  // the deadline has passed once
};
// Its arguments are values: a session of which a function takes the address would not stay in registers.
template <bool kOverNetwork>
__device__ __noinline__ static Reason trouble_beside(uint8_t* const* slabs, uint64_t* masks,
                                                     uint8_t* const* areas, AllRanks<kOverNetwork> all,
                                                     int32_t rank, int32_t num_ranks, int32_t peer,
                                                     uint64_t word, uint64_t timeout_ns, Patience& patience) {
    constexpr uint64_t kBeats = 8;  // while a peer waits
    Session<kOverNetwork> session{};
    session.call.slabs = slabs;
    session.call.rank = rank;
    session.call.num_ranks = num_ranks;
    session.call.word = word;
    session.masks = masks;
    session.areas = areas;
    session.all = all;
    const Reason reason = trouble_in(session, peer, patience.deadline_ns);
    const uint64_t now_ns = ptx::globaltimer_ns();
    if (now_ns >= patience.next_beat_ns) {
        patience.next_beat_ns = now_ns + timeout_ns / kBeats;
        const auto beat = [&](LowLatencyArea* area) { return &area->beats[session.rank()]; };
        for (int32_t dst = 0; dst < session.num_ranks(); ++dst)
            if (!session.is_masked(dst)) session.tell(dst, beat, now_ns);
    }
    const uint64_t beat = ptx::ld_relaxed_sys(&session.own()->beats[peer]);
    const bool is_waiting = beat != patience.beat;
    patience.beat = beat;
    if (is_waiting) {
        patience.is_over = false;
        patience.deadline_ns = now_ns + timeout_ns;
    }
    if (reason != kExpired || is_waiting) return reason == kExpired ? kNothing : reason;
    // The peer may be about to beat for the first time, as this thread was.
    if (patience.is_over) return kExpired;
    patience.is_over = true;
    patience.deadline_ns = now_ns + timeout_ns / kBeats;
    return kNothing;
}

// Waits, as one thread, until `is_there(*word)`, and acquires it if asked to.
enum Acquiring : bool { kRelaxed = false, kAcquires = true };
template <Acquiring kAcquiring>
__device__ __forceinline__ uint64_t load(const uint64_t* word) {
    return kAcquiring ? ptx::ld_acquire_sys(word) : ptx::ld_relaxed_sys(word);
}
template <Acquiring kAcquiring = kRelaxed, bool kOverNetwork, class IsThere>
__device__ inline Reason await_word(const Session<kOverNetwork>& session, const uint64_t* word, int32_t peer,
                                    uint64_t& seen, IsThere is_there) {
    if (is_there(seen = load<kAcquiring>(word))) return kNothing;
    Patience patience{session.call.deadline_ns, 0, 0, false};
    if (session.masks != nullptr) {
        patience.next_beat_ns = session.call.deadline_ns - session.timeout_ns / 2;
        patience.beat = ptx::ld_relaxed_sys(&session.own()->beats[peer]);
    }
#pragma unroll 1
    for (uint32_t polls = 1; !is_there(seen = load<kAcquiring>(word)); ++polls) {
        if (polls % 64 != 0) continue;
        const sync::Call& call = session.call;
        const Reason reason =
            session.masks == nullptr
                ? trouble_in(session, peer, call.deadline_ns)
                : trouble_beside(call.slabs, session.masks, session.areas, session.all, call.rank,
                                 call.num_ranks, peer, call.word, session.timeout_ns, patience);
        if (reason != kNothing) return reason;
    }
    return kNothing;
}

// As await_word, for a word stamped with the epoch of the call. The rare part is not repeated either.
struct Awaited {
    uint64_t word;
    Reason reason;
};
template <Acquiring kAcquiring, bool kOverNetwork>
__device__ __noinline__ Awaited await_slowly(Session<kOverNetwork> session, const uint64_t* word,
                                             int32_t peer) {
    Awaited awaited{};
    awaited.reason = await_word<kAcquiring>(session, word, peer, awaited.word, [&](uint64_t seen) {
        return is_stamped(seen, session.call.epoch);
    });
    return awaited;
}
template <Acquiring kAcquiring = kRelaxed, bool kOverNetwork>
__device__ inline Reason await_stamped(const Session<kOverNetwork>& session, const uint64_t* word,
                                       int32_t peer, uint64_t& seen) {
    seen = load<kAcquiring>(word);
    if (is_stamped(seen, session.call.epoch)) return kNothing;
    const Awaited awaited = await_slowly<kAcquiring>(session, word, peer);
    seen = awaited.word;
    return awaited.reason;
}

// Puts, as one warp or as the whole block, and stores the word behind what it puts.
template <bool kOverNetwork>
__device__ inline void put(const Session<kOverNetwork>& session, void* to, const void* from,
                           int64_t num_bytes, uint64_t* word, int32_t dst, bool is_of_block) {
    const uint64_t value = stamped(session.call.epoch, 1);
    if (is_of_block)
        network::put_signal_block(to, from, num_bytes, word, value, dst);
    else
        network::put_signal_warp(to, from, num_bytes, word, value, dst);
}

// Waits, as one thread, for the word behind what a peer has put here, and acquires what came with it.
template <bool kOverNetwork>
__device__ inline Reason await_put(const Session<kOverNetwork>& session, uint64_t* word, int32_t peer) {
    uint64_t seen;
    const Reason reason = await_stamped<kAcquires>(session, word, peer, seen);
    if constexpr (kOverNetwork)
        if (reason == kNothing) network::acquire_signal(word, seen);
    return reason;
}

// Adds to what callers are told of waits for a rank, in microseconds, if they ask: one thread.
__device__ inline void add_wait(int64_t* stats, int32_t peer, uint64_t waited_ns) {
    if (stats != nullptr) stats[peer] += static_cast<int64_t>(waited_ns / 1000);
}

// What is left of a reason to give up over a peer: a late one is masked, if that is allowed.
template <bool kOverNetwork>
__device__ inline Reason settle(const Session<kOverNetwork>& session, Found& found, Reason reason,
                                int32_t peer) {
    if (reason == kNothing) return kNothing;
    if (reason == kExpired && session.masks != nullptr) {
        ptx::st_relaxed_gpu(&session.masks[peer], 1);
        return kNothing;
    }
    atomicOr(&found.missing, 1u << peer);
    return reason;
}

// Waits, as one block, for the flags of the first `num_flags` blocks of a source rank, which say that what
// they sent has landed. A barrier.
template <bool kOverNetwork>
__device__ inline Reason await_flags(const Session<kOverNetwork>& session, Found& found, int32_t src,
                                     int32_t num_flags) {
    const uint64_t* flags = session.own()->flags[session.zone][src][0];
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < num_flags && reason == kNothing; i += blockDim.x) {
        uint64_t seen;
        reason = await_stamped<kAcquires>(session, &flags[i], src, seen);
    }
    if (reason != kNothing && session.masks == nullptr) atomicOr(&found.missing, 1u << src);
    return sync::agree(reason);
}

// The same as one warp, for one flag of each source rank: lane `src` gives the number of the block, -1 for
// none.
template <bool kOverNetwork>
__device__ inline Reason await_flags_as_warp(const Session<kOverNetwork>& session, Found& found, int32_t lane,
                                             int32_t block) {
    Reason reason = kNothing;
    if (block >= 0) {
        const uint64_t* flag = &session.own()->flags[session.zone][lane][0][block];
        uint64_t seen;
        reason = await_stamped<kAcquires>(session, flag, lane, seen);
        if (reason != kNothing) atomicOr(&found.missing, 1u << lane);
    }
    __syncwarp();  // what one lane acquired, all lanes may read
    return reason;
}

// Waits, as one thread, for a word of another block of this kernel, as `load()` finds it. That one comes
// before this one, so it has a place, and waits for peers with deadlines of its own.
template <bool kOverNetwork, class Load>
__device__ __forceinline__ Reason await_block(const Session<kOverNetwork>& session, uint64_t& seen,
                                              Load load) {
    while (!is_stamped(seen = load(), session.call.epoch))
        if (session.call.has_failed()) return kLeft;
    return kNothing;
}

// Waits, as one block, for a word of each of `num_words` other blocks, and acquires it. `note(i, value)` gets
// what word i says. A barrier.
template <bool kOverNetwork, class Note>
__device__ inline Reason await_blocks(const Session<kOverNetwork>& session, const uint64_t* words,
                                      int32_t num_words, Note note) {
    Reason reason = kNothing;
    if (static_cast<int32_t>(threadIdx.x) < num_words) {
        uint64_t seen;
        reason = await_block(session, seen, [&] { return ptx::ld_acquire_gpu(&words[threadIdx.x]); });
        note(threadIdx.x, static_cast<uint32_t>(seen));
    }
    return sync::agree(reason);
}

}  // namespace ep::low_latency

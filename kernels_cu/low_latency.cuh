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
#include "network.cuh"
#include "sync.cuh"

namespace ep::low_latency {

enum Phase : int32_t { kSends = 1, kReceives = 2 };
enum Presence : uint32_t { kPresent = 1, kAbsent = 2 };
enum WaitPhase : uint64_t { kFreeing = 1, kCounting = 2, kLanding = 3 };  // of the hang record

// Rows travel in pieces of so many bfloat16 channels, one for each turn of a warp: two vectors in every lane.
constexpr int kVectorChannels = 8;
constexpr int kPieceVectors = 2 * kWarpSize;
constexpr int kPieceChannels = kPieceVectors * kVectorChannels;
// Blocks are added until each has this many turns, for all its warps together; then turns.
constexpr int kTurnsPerBlock = 4;
// So many puts of a block are made by all its warps, one after the other; more of them by a warp each. Where
// NVSHMEM copies by itself, a warp alone takes several times as long.
constexpr int kMaxBlockPuts = 2;

// Blocks that send in so many turns. Turn u is that of block u % num_blocks, so receivers know whose flag
// says that a piece has landed.
__host__ __device__ constexpr int32_t num_send_blocks(int64_t num_turns, int32_t max_blocks) {
    const int64_t wanted = (num_turns + kTurnsPerBlock - 1) / kTurnsPerBlock;
    return static_cast<int32_t>(wanted < max_blocks ? wanted : max_blocks);
}

// Blocks of a combine that send in so many turns. Their warps wait for what they load, so more than
// `few_blocks` pay once those would have to take turns twice; till then others have the room.
__host__ __device__ constexpr int32_t num_combine_blocks(int64_t num_turns, int32_t num_warps,
                                                         int32_t few_blocks, int32_t max_blocks) {
    const int64_t filled = (num_turns + num_warps - 1) / num_warps;
    if (filled <= few_blocks) return num_send_blocks(num_turns, few_blocks);
    return static_cast<int32_t>(filled < max_blocks ? filled : max_blocks);
}

// The most ranks of a call: of one NVLink domain, or of several nodes.
template <bool kOverNetwork>
constexpr int kMaxPeers = kOverNetwork ? kMaxLowLatencyRanks : kMaxLocalRanks;

// The ranks of this node among those of all.
template <bool kOverNetwork>
struct AllRanks {
    int32_t first_rank, num_all_ranks;
};
template <>
struct AllRanks<false> {};

// One phase of a call, or both, as a block of it sees it.
template <bool kOverNetwork>
struct Session {
    sync::Call call;  // of the ranks of this node
    LowLatencyState* state;
    uint64_t* masks;        // [rank]: 1 to leave it out; nullptr: late ranks fail the call
    uint8_t* const* areas;  // [rank]; nullptr where stores do not reach
    uint64_t use, timeout_ns;
    uint64_t freed;  // thread `peer`: uses of the zone that this peer no longer needed at the start; acquired
    int32_t zone, phases;
    bool is_zone_free;  // of every peer, none of which may be left out: seen at the start
    AllRanks<kOverNetwork> all;

    __device__ int32_t rank() const {
        if constexpr (kOverNetwork) return all.first_rank + call.rank;
        return call.rank;
    }
    __device__ int32_t num_ranks() const {
        if constexpr (kOverNetwork) return all.num_all_ranks;
        return call.num_ranks;
    }
    __device__ LowLatencyArea* area(int32_t rank) const {
        return reinterpret_cast<LowLatencyArea*>(areas[rank]);
    }
    __device__ LowLatencyArea* own() const { return area(rank()); }
    __device__ bool is_masked(int32_t rank) const {
        return masks != nullptr && ptx::ld_relaxed_gpu(&masks[rank]) != 0;
    }
    // Whether stores reach a rank, and whether it is of this node.
    __device__ bool reaches(int32_t rank) const { return !kOverNetwork || areas[rank] != nullptr; }
    __device__ bool is_beside(int32_t rank) const {
        return !kOverNetwork || (local(rank) >= 0 && local(rank) < call.num_ranks);
    }
    __device__ int32_t local(int32_t rank) const {
        if constexpr (kOverNetwork) return rank - all.first_rank;
        return rank;
    }
    // Where a rank says which call it is in.
    __device__ const uint64_t* signal(int32_t rank) const {
        return is_beside(rank) ? &call.header(call.rank)->signals[local(rank)] : &own()->doing[rank];
    }
    // Stores a word at a place of a peer's area. Orders nothing.
    template <class Place>
    __device__ void tell(int32_t peer, Place place, uint64_t value) const {
        if (reaches(peer)) {
            ptx::st_relaxed_sys(place(area(peer)), value);
        } else if constexpr (kOverNetwork) {
            network::set_signal(place(own()), value, peer);
        }
    }
};

// Bits of the first ranks, one at least; of those that stores reach, as a warp.
__device__ inline uint32_t bits_of(int32_t num_ranks) { return 0xffffffffu >> (32 - num_ranks); }
template <bool kOverNetwork>
__device__ inline uint32_t reached(const Session<kOverNetwork>& session) {
    const int32_t peer = threadIdx.x % kWarpSize;
    return __ballot_sync(kFullWarp, peer < session.num_ranks() && session.reaches(peer));
}

// Of the ranks whose bits are set, number `which` behind `rank`.
__device__ inline int32_t rank_behind(int32_t rank, uint32_t ranks, int32_t which) {
    const uint32_t behind = rank + 1 < kWarpSize ? ranks >> (rank + 1) << (rank + 1) : 0;
    const int32_t num_behind = __popc(behind);
    uint32_t left = which < num_behind ? behind : ranks ^ behind;
    for (int32_t skipped = which < num_behind ? which : which - num_behind; skipped > 0; --skipped)
        left &= left - 1;
    return __ffs(static_cast<int32_t>(left)) - 1;
}

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

// An expert id of 4 or 8 bytes as it lies in memory: till somebody looks at it, nobody waits for it.
struct RawId {
    uint32_t low, high;
};
constexpr RawId kNoId{0xffffffff, 0xffffffff};
__device__ inline RawId load_id(const void* ids, int32_t idx_bytes, int64_t i) {
    if (idx_bytes == 4) return {static_cast<const uint32_t*>(ids)[i], 0};
    const uint2 id = static_cast<const uint2*>(ids)[i];
    return {id.x, id.y};
}
// -1 if it is none.
__device__ inline int32_t expert_of(RawId id, int32_t num_experts) {
    return id.high == 0 && id.low < static_cast<uint32_t>(num_experts) ? static_cast<int32_t>(id.low) : -1;
}
// Whether a rank has it, which no rank does of -1. No division: by a number that is not known when this is
// compiled it takes 20 instructions.
__device__ inline bool is_of_rank(int32_t expert, int32_t rank, int32_t num_local_experts) {
    return static_cast<uint32_t>(expert - rank * num_local_experts) <
           static_cast<uint32_t>(num_local_experts);
}

}  // namespace ep::low_latency

// What a block of the low-latency mode knows of its call: phases, ranks and their areas, how work is cut into
// turns, and ids of experts.
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

// What the links carry at most: every rank copies to all its peers at once, or from all of them, and no more.
//
// Protocol   none: no counts, no metadata, no wait for a peer. Whoever launches it has a barrier of the ranks
//            before it (the peers are ready) and one after it (everything has arrived).
// Work       pieces of stage_bytes; neighbouring pieces go to different peers. Warps take tickets, because
//            SMs reach the links at very different speed.
// Order      all stores of a thread have landed when it ends; the barrier behind the kernel releases them.
// Cleared    `counters`, by the last block, for the next launch on the stream.
// Launch     any grid; at least two ranks.
#include "layout.cuh"
#include "ptx.cuh"

namespace ep {

struct WireLimitCfg {
    int num_threads, num_stages, stage_bytes;
};

template <WireLimitCfg kCfg>
struct WireLimitArgs {
    uint64_t* counters;  // {tickets taken, blocks done}, zero between launches
    int64_t peer_bytes;  // a multiple of stage_bytes
    int32_t rank, num_ranks;
    int32_t pulls;  // not 0: the receiver copies, else the sender
    // The payload of each: [num_ranks][peer_bytes] that came from each rank, then as much that goes to each;
    // the own parts stay.
    uint8_t* slabs[kMaxLocalRanks];
};

namespace wire {

constexpr uint32_t kPiecesPerTicket = 4;  // so that the small pieces do not crowd the counter

template <WireLimitCfg kCfg>
__device__ uint32_t num_pieces(const WireLimitArgs<kCfg>& args) {
    return static_cast<uint32_t>(args.peer_bytes / kCfg.stage_bytes) * (args.num_ranks - 1);
}

// The first piece of the next ticket.
template <WireLimitCfg kCfg>
__device__ uint32_t take_ticket(const WireLimitArgs<kCfg>& args) {
    // The low word of the counter: little endian.
    return ptx::atom_inc_relaxed_gpu(reinterpret_cast<uint32_t*>(args.counters)) * kPiecesPerTicket;
}

struct Place {
    const uint8_t* from;
    uint8_t* to;
};

template <WireLimitCfg kCfg>
__device__ Place place_of(const WireLimitArgs<kCfg>& args, uint32_t piece) {
    const uint32_t num_peers = args.num_ranks - 1;
    const int64_t offset = int64_t{piece / num_peers} * kCfg.stage_bytes;
    const int32_t peer = (args.rank + 1 + piece % num_peers) % args.num_ranks;
    const int32_t source = args.pulls ? peer : args.rank, target = args.pulls ? args.rank : peer;
    return {args.slabs[source] + kPayloadOffset + (args.num_ranks + target) * args.peer_bytes + offset,
            args.slabs[target] + kPayloadOffset + source * args.peer_bytes + offset};
}

#ifdef EP_HAS_TMA
// By one thread of a warp: of its ring one slot is stored from, and all others are being loaded.
template <WireLimitCfg kCfg>
__device__ void stream(const WireLimitArgs<kCfg>& args, uint8_t* ring, uint64_t* loaded) {
    constexpr int kStages = kCfg.num_stages, kAhead = kStages - 1;
    const uint32_t end = num_pieces(args);
    uint32_t piece = take_ticket(args), ticket = take_ticket(args), phases = 0;
    uint8_t* to[kStages];  // nullptr: no more pieces
    const auto fetch = [&](int slot) {
        to[slot] = nullptr;
        if (piece >= end) return;
        const Place place = place_of(args, piece);
        to[slot] = place.to;
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive_expect(&loaded[slot], kCfg.stage_bytes);
        ptx::bulk_load(ring + slot * kCfg.stage_bytes, place.from, kCfg.stage_bytes, &loaded[slot]);
        if (++piece % kPiecesPerTicket == 0) {
            piece = ticket;
            if (ticket < end) ticket = take_ticket(args);
        }
    };
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot);
    for (bool is_more = true; is_more;) {
#pragma unroll
        for (int slot = 0; slot < kStages; ++slot) {
            if (to[slot] == nullptr) {
                is_more = false;
                break;
            }
            fetch((slot + kAhead) % kStages);
            while (!ptx::mbarrier_try_wait(&loaded[slot], phases >> slot & 1)) {
            }
            phases ^= 1u << slot;
            ptx::bulk_store(to[slot], ring + slot * kCfg.stage_bytes, kCfg.stage_bytes);
            ptx::bulk_commit();
        }
    }
    ptx::bulk_wait_landed();
}

template <WireLimitCfg kCfg>
__device__ void stream_block(const WireLimitArgs<kCfg>& args) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kCfg.num_threads / kWarpSize][kCfg.num_stages];
    if (threadIdx.x % kWarpSize != 0) return;
    const int32_t warp = threadIdx.x / kWarpSize;
    for (int slot = 0; slot < kCfg.num_stages; ++slot) ptx::mbarrier_init(&loaded[warp][slot]);
    ptx::fence_mbarrier_init();
    stream(args, stages + warp * kCfg.num_stages * kCfg.stage_bytes, loaded[warp]);
}
#else
// A piece passes through the registers of a warp.
template <WireLimitCfg kCfg>
__device__ void stream_block(const WireLimitArgs<kCfg>& args) {
    constexpr int kVectors = kCfg.stage_bytes / (16 * kWarpSize);  // of 16 bytes, for each lane
    static_assert(kVectors * 16 * kWarpSize == kCfg.stage_bytes);
    const int32_t lane = threadIdx.x % kWarpSize;
    const uint32_t end = num_pieces(args);
    uint32_t ticket = lane == 0 ? take_ticket(args) : 0;
    while (true) {
        const uint32_t first = __shfl_sync(kFullWarp, ticket, 0);
        if (first >= end) return;
        if (lane == 0) ticket = take_ticket(args);
        for (uint32_t piece = first; piece < min(first + kPiecesPerTicket, end); ++piece) {
            const Place place = place_of(args, piece);
            uint4 values[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                values[v] = ptx::ld_stream(reinterpret_cast<const uint4*>(place.from) + v * kWarpSize + lane);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                ptx::st_stream(reinterpret_cast<uint4*>(place.to) + v * kWarpSize + lane, values[v]);
        }
    }
}
#endif

}  // namespace wire

template <WireLimitCfg kCfg>
__device__ void wire_limit(const WireLimitArgs<kCfg>& args) {
    wire::stream_block(args);
    __syncthreads();
    // Acquires the tickets that other blocks took: the counters are cleared behind all of them.
    if (threadIdx.x == 0 && ptx::atom_add_acq_rel_gpu(&args.counters[1], 1) + 1 == gridDim.x) {
        args.counters[0] = 0;
        args.counters[1] = 0;
    }
}

}  // namespace ep

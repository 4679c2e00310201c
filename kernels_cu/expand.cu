// From what a dispatch delivered (one row for each received token) to the expert-major layout (one row for
// each of a token's local experts, those of an expert together). On one rank alone.
//
// Protocol   the pairs (received row, column) get their places by a stable counting sort with one exchange of
//            counts between the blocks (expand_positions.cuh). A barrier of the grid, and every place is
//            known to every block; then rows are moved, each loaded once and stored to all its places.
// Padding    follows the true rows of every expert, and lies behind the last segment: weight 0; x and scale
//            factors zero if asked for. Rows at num_out_rows or beyond are dropped.
// Order      places pass between blocks by the acq_rel barrier, and are read past the first cache. Received
//            rows were written by earlier kernels, in another proxy: one fence.proxy.async by every thread
//            goes before its first bulk load, and puts what the counters' memory held before the bulk loads
//            there. Rows only pass through shared memory from bulk load to bulk store, both of the async
//            proxy, so a slot needs no proxy fence.
// Work       rows are cut into pieces that warps take by ticket. Other warps fill the padding and move scale
//            factors that bulk copies cannot carry.
// Cached     places come from an earlier call: no exchange, no barrier, no weights.
// Bad ids    an expert id outside 0 .. num_local_experts - 1 is none.
// Launch     up to kMaxBlocks blocks, all resident. Dynamic shared memory for the stages, and at least
//            (num_threads / 32 + 2) * num_local_experts words.
#include "expand_positions.cuh"

namespace ep {

struct ExpandCfg {
    int num_threads, num_data_warps, num_stages, stage_bytes;
    int scale_bytes;  // of a slot, for the scale factors of a row
};

template <ExpandCfg kCfg>
struct ExpandArgs {
    HangRecord* hang;
    SlabHeader* header;
    LocalWorkspace* workspace;
    const int32_t* num_recv_tokens;  // nullptr: row_capacity
    const uint8_t* topk_idx;         // [row_capacity, num_topk]
    const float* topk_weights;       // [row_capacity, num_topk], or nullptr
    const uint8_t* sf;               // [row_capacity] rows
    const uint8_t* x;                // [row_capacity] rows
    int32_t* expert_row;             // [row_capacity, num_topk]: the place of each pair, -1 for none
    int32_t* psum;                   // [num_local_experts]: where an expert's true rows end
    int64_t* num_needed_rows;
    float* out_weights;  // [num_out_rows], or nullptr
    uint8_t* out_sf;
    uint8_t* out_x;
    uint64_t timeout_ns;
    int32_t row_capacity, num_out_rows, num_topk, num_local_experts, alignment;
    int32_t row_bytes, sf_row_bytes, idx_bytes, zero_padding, is_cached;
};

template <ExpandCfg kCfg>
struct ExpandShared {
    uint64_t loaded[kCfg.num_data_warps][kCfg.num_stages];
    int32_t ends[kMaxLocalExperts];  // where the true rows of an expert end
};

// The places of a row, one or two in each lane: -1 for none.
struct Places {
    static constexpr int kPerLane = kMaxExpandTopk / kWarpSize;
    int32_t at[kPerLane];

    // Calls `visit(place)` for each, as the whole warp.
    template <class Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            uint32_t pending = __ballot_sync(kFullWarp, at[i] >= 0);
            for (; pending != 0; pending &= pending - 1)
                visit(__shfl_sync(kFullWarp, at[i], __ffs(pending) - 1));
        }
    }
};

template <ExpandCfg kCfg>
struct ExpandBlock {
    const ExpandArgs<kCfg>& args;
    const local::Call& call;
    ExpandShared<kCfg>& shared;
    uint8_t* stages;
    int32_t num_rows, warp, lane;

    static constexpr int kNumWarps = kCfg.num_threads / kWarpSize;
    static constexpr int kOtherWarps = kNumWarps - kCfg.num_data_warps;

    // Among the other warps of all blocks.
    __device__ int32_t other_warp() const { return blockIdx.x * kOtherWarps + warp - kCfg.num_data_warps; }
    __device__ int32_t num_other_warps() const { return gridDim.x * kOtherWarps; }

    __device__ __forceinline__ Places places_of(int32_t row) const {
        Places places;
#pragma unroll
        for (int i = 0; i < Places::kPerLane; ++i) {
            const int32_t k = i * kWarpSize + lane;
            places.at[i] =
                k < args.num_topk ? __ldcg(args.expert_row + int64_t{row} * args.num_topk + k) : -1;
        }
        return places;
    }

    __device__ Reason find_places(uint64_t deadline_ns) const;
    __device__ bool scales_ride() const;
    __device__ void move_rows() const;
    __device__ void move_scales() const;
    __device__ void fill_padding() const;
};

template <ExpandCfg kCfg>
__device__ Reason ExpandBlock<kCfg>::find_places(uint64_t deadline_ns) const {
    const Positions<kNumWarps> positions{.call = call,
                                         .topk_idx = args.topk_idx,
                                         .num_pairs = int64_t{num_rows} * args.num_topk,
                                         .idx_bytes = args.idx_bytes,
                                         .num_local_experts = args.num_local_experts,
                                         .alignment = args.alignment,
                                         .num_out_rows = args.num_out_rows,
                                         .counters = reinterpret_cast<uint32_t*>(stages),
                                         .ends = shared.ends};
    positions.count();
    const Reason reason = positions.add_up(deadline_ns);
    if (reason != kNothing) return reason;
    const int64_t num_padded = positions.lay_out();
    if (blockIdx.x == 0) {
        for (int32_t e = threadIdx.x; e < args.num_local_experts; e += blockDim.x)
            args.psum[e] = shared.ends[e];
        // Every token has an expert here, so rows that are not here are missing in the sum.
        if (threadIdx.x == 0)
            *args.num_needed_rows = max(num_padded, static_cast<int64_t>(call.num_recv_tokens));
    }
    positions.place(args.expert_row, args.topk_weights, args.out_weights);
    return local::wait_for_grid(call, deadline_ns);
}

#ifdef EP_HAS_TMA
// Scale factors travel with the first piece of their row where bulk copies can carry them.
template <ExpandCfg kCfg>
__device__ bool ExpandBlock<kCfg>::scales_ride() const {
    return args.sf_row_bytes % 16 == 0 && args.sf_row_bytes <= kCfg.scale_bytes;
}

// A piece is loaded once into a slot of the warp's ring and stored from there to every place, by one lane
// each. kAhead loads are in flight; the stores of a slot have been read out before it is loaded again.
template <ExpandCfg kCfg>
__device__ void ExpandBlock<kCfg>::move_rows() const {
    constexpr int kStages = kCfg.num_stages, kAhead = kStages / 2;
    constexpr int kSlotBytes = kCfg.stage_bytes + kCfg.scale_bytes;
    const int32_t pieces_per_row = (args.row_bytes + kCfg.stage_bytes - 1) / kCfg.stage_bytes;
    const uint32_t num_pieces = static_cast<uint32_t>(num_rows) * pieces_per_row;
    const int32_t scale_bytes = scales_ride() ? args.sf_row_bytes : 0;
    uint8_t* ring = stages + static_cast<int64_t>(warp) * kStages * kSlotBytes;
    int32_t offset[kStages];  // in the row; -1: no more pieces
    Places places[kStages];
    uint32_t ticket = local::take_ticket(call, lane);
    uint32_t phases = 0;

    const auto bytes_at = [&](int32_t at) { return min(kCfg.stage_bytes, args.row_bytes - at); };
    const auto fetch = [&](int slot) {
        const uint32_t piece = __shfl_sync(kFullWarp, ticket, 0);
        offset[slot] = -1;
        if (piece >= num_pieces) return;
        ticket = local::take_ticket(call, lane);
        const int32_t row = piece / pieces_per_row;
        offset[slot] = static_cast<int32_t>(piece - row * pieces_per_row) * kCfg.stage_bytes;
        ptx::bulk_wait_read<kStages - 1 - kAhead>();
        __syncwarp();
        if (lane == 0) {
            uint64_t* loaded = &shared.loaded[warp][slot];
            uint8_t* data = ring + slot * kSlotBytes;
            const int32_t num_bytes = bytes_at(offset[slot]);
            const bool with_scales = offset[slot] == 0 && scale_bytes > 0;
            ptx::mbarrier_arrive_expect(loaded, num_bytes + (with_scales ? scale_bytes : 0));
            ptx::bulk_load(data, args.x + int64_t{row} * args.row_bytes + offset[slot], num_bytes, loaded);
            if (with_scales)
                ptx::bulk_load(data + kCfg.stage_bytes, args.sf + int64_t{row} * scale_bytes, scale_bytes,
                               loaded);
        }
        places[slot] = places_of(row);
    };

#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot);
    for (bool is_more = true; is_more;) {
#pragma unroll
        for (int slot = 0; slot < kStages; ++slot) {
            if (offset[slot] < 0) {
                is_more = false;
                break;
            }
            fetch((slot + kAhead) % kStages);
            while (!ptx::mbarrier_try_wait(&shared.loaded[warp][slot], phases >> slot & 1)) {
            }
            phases ^= 1u << slot;
            const uint8_t* data = ring + slot * kSlotBytes;
#pragma unroll
            for (const int32_t at : places[slot].at) {
                if (at < 0) continue;
                ptx::bulk_store(args.out_x + int64_t{at} * args.row_bytes + offset[slot], data,
                                bytes_at(offset[slot]));
                if (offset[slot] == 0 && scale_bytes > 0)
                    ptx::bulk_store(args.out_sf + int64_t{at} * scale_bytes, data + kCfg.stage_bytes,
                                    scale_bytes);
            }
            ptx::bulk_commit();
        }
    }
    ptx::bulk_wait_landed();
}
#else
template <ExpandCfg kCfg>
__device__ bool ExpandBlock<kCfg>::scales_ride() const {
    return false;
}

// A piece is loaded once into registers and stored from there to every place.
template <ExpandCfg kCfg>
__device__ void ExpandBlock<kCfg>::move_rows() const {
    constexpr int kVectors = 4;  // of 16 bytes, for each lane
    constexpr int32_t kPieceBytes = kVectors * kWarpSize * 16;
    const int32_t pieces_per_row = (args.row_bytes + kPieceBytes - 1) / kPieceBytes;
    const uint32_t num_pieces = static_cast<uint32_t>(num_rows) * pieces_per_row;
    for (uint32_t ticket = local::take_ticket(call, lane);;) {
        const uint32_t piece = __shfl_sync(kFullWarp, ticket, 0);
        if (piece >= num_pieces) return;
        ticket = local::take_ticket(call, lane);
        const int32_t row = piece / pieces_per_row;
        const int32_t offset = static_cast<int32_t>(piece - row * pieces_per_row) * kPieceBytes;
        const int32_t num_vectors = min(kPieceBytes, args.row_bytes - offset) / 16;
        const auto* from = reinterpret_cast<const uint4*>(args.x + int64_t{row} * args.row_bytes + offset);
        uint4 values[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            if (v * kWarpSize + lane < num_vectors) values[v] = ptx::ld_stream(from + v * kWarpSize + lane);
        places_of(row).for_each([&](int32_t at) {
            auto* to = reinterpret_cast<uint4*>(args.out_x + int64_t{at} * args.row_bytes + offset);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                if (v * kWarpSize + lane < num_vectors) ptx::st_stream(to + v * kWarpSize + lane, values[v]);
        });
    }
}
#endif

// Scale factors of whole rows, a word to a lane; those of several rows are in flight.
template <ExpandCfg kCfg>
__device__ void ExpandBlock<kCfg>::move_scales() const {
    constexpr int kRows = 4;
    const int32_t num_words = args.sf_row_bytes / 4;
    const auto* from = reinterpret_cast<const uint32_t*>(args.sf);
    auto* to = reinterpret_cast<uint32_t*>(args.out_sf);
    for (int32_t first = other_warp() * kRows; first < num_rows; first += num_other_warps() * kRows) {
        Places places[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) places[i] = places_of(min(first + i, num_rows - 1));
        for (int32_t word = lane; word - lane < num_words; word += kWarpSize) {
            uint32_t value[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                value[i] =
                    word < num_words ? from[int64_t{min(first + i, num_rows - 1)} * num_words + word] : 0;
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                places[i].for_each([&](int32_t at) {
                    if (word < num_words) to[int64_t{at} * num_words + word] = value[i];
                });
        }
    }
}

template <ExpandCfg kCfg>
__device__ void ExpandBlock<kCfg>::fill_padding() const {
    const int32_t num_vectors = args.row_bytes / 16, num_words = args.sf_row_bytes / 4;
    float* weights = args.is_cached ? nullptr : args.out_weights;
    if (weights == nullptr && !args.zero_padding) return;
    for (int32_t e = 0; e < args.num_local_experts; ++e) {
        const int32_t begin = shared.ends[e];
        // Unsigned: up to twice the most that a segment has.
        const uint32_t next = align_up<uint32_t>(begin, args.alignment);
        const bool is_last = e + 1 == args.num_local_experts;
        const int32_t end = is_last ? args.num_out_rows : min(next, static_cast<uint32_t>(args.num_out_rows));
        if (weights != nullptr)
            for (int64_t row = begin + int64_t{other_warp()} * kWarpSize + lane; row < end;
                 row += int64_t{num_other_warps()} * kWarpSize)
                weights[row] = 0.0f;
        if (!args.zero_padding) continue;
        for (int64_t row = begin + int64_t{other_warp()}; row < end; row += num_other_warps()) {
            auto* x = reinterpret_cast<uint4*>(args.out_x + row * args.row_bytes);
            for (int32_t i = lane; i < num_vectors; i += kWarpSize)
                ptx::st_stream(x + i, make_uint4(0, 0, 0, 0));
            auto* sf = reinterpret_cast<uint32_t*>(args.out_sf) + row * num_words;
            for (int32_t i = lane; i < num_words; i += kWarpSize) sf[i] = 0;
        }
    }
}

template <ExpandCfg kCfg>
__device__ void expand(const ExpandArgs<kCfg>& args) {
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_data_warps * kWarpSize < kCfg.num_threads);
    static_assert(kCfg.stage_bytes % 16 == 0 && kCfg.scale_bytes % 16 == 0);
    constexpr uint64_t kPositions = 1;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ ExpandShared<kCfg> shared;
    const uint64_t deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    local::Call call{.header = args.header, .workspace = args.workspace};
    if (!local::enter(call, args.num_recv_tokens, args.row_capacity)) return;

    const ExpandBlock<kCfg> block{.args = args,
                                  .call = call,
                                  .shared = shared,
                                  .stages = stages,
                                  .num_rows = min(call.num_recv_tokens, args.row_capacity),
                                  .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                                  .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
#ifdef EP_HAS_TMA
    if (block.lane == 0 && block.warp < kCfg.num_data_warps)
        for (int slot = 0; slot < kCfg.num_stages; ++slot)
            ptx::mbarrier_init(&shared.loaded[block.warp][slot]);
    ptx::fence_mbarrier_init();
#endif
    if (args.is_cached) {
        for (int32_t e = threadIdx.x; e < args.num_local_experts; e += blockDim.x)
            shared.ends[e] = args.psum[e];
    } else {
        const Reason reason = block.find_places(deadline_ns);
        if (reason != kNothing) return local::leave(call, args.hang, reason, kExpand, kPositions);
    }
#ifdef EP_HAS_TMA
    ptx::fence_proxy_async();
#endif
    __syncthreads();
    if (block.warp < kCfg.num_data_warps) {
        block.move_rows();
    } else {
        if (args.sf_row_bytes > 0 && !block.scales_ride()) block.move_scales();
        block.fill_padding();
    }
    local::finish(call);
}

}  // namespace ep

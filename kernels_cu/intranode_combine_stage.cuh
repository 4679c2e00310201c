// Copying rows to where peers read them, while they already read the first of them.
#pragma once
#include "intranode_combine_block.cuh"

namespace ep {

// The rows of one chunk, one source after another. Lane r holds what concerns source r.
struct Chunk {
    int32_t first_row;  // in the array of all rows
    int32_t before;     // rows of the chunk from lower sources
    int32_t num_rows;   // of all sources

    // Of the i-th row of the chunk: where it lies among all rows. The whole warp; i may differ between lanes.
    __device__ int32_t row(int32_t i, int32_t num_ranks) const {
        int32_t row = 0;
        for (int32_t src = 0; src < num_ranks; ++src) {
            const int32_t from = __shfl_sync(kFullWarp, before, src);
            const int32_t first = __shfl_sync(kFullWarp, first_row, src);
            if (i >= from) row = first + i - from;
        }
        return row;
    }
};

// Of the lower lanes.
__device__ inline int32_t sum_before(int32_t value, int32_t lane) {
    return sum_up_to<kMaxLocalRanks>(value, lane) - value;
}

// All warps of the blocks that stage. Every warp counts itself done with each chunk in turn, so chunks are
// complete in order, and the warp that completes one tells the peers before it counts itself done with the
// next.
template <IntranodeCombineCfg kCfg>
__device__ void CombineBlock<kCfg>::stage_rows(uint8_t* ring, uint64_t* loaded) const {
    const int32_t num_warps = args.num_stagers * kNumWarps;
    const int32_t number = stager() * kNumWarps + warp;
    uint8_t* to = args.slabs[call.rank] + static_cast<int64_t>(args.y_offset) * kOffsetUnit;
    int32_t count = lane < call.num_ranks ? args.send_plan->recv_counts[lane] : 0;
    const int32_t begin = sum_before(count, lane);
    count = min(count, max(0, args.num_rows - begin));
    const int32_t most = __reduce_max_sync(kFullWarp, count);
    const int32_t num_chunks = most == 0 ? 0 : chunk_of(most - 1) + 1;
    const auto tell = [&](uint32_t value) {
        if (lane < call.num_ranks)
            ptx::st_release_sys(&call.exchange(lane)->combine[call.parity][call.rank].staged,
                                stamped(call.epoch, value));
    };
    if (num_chunks == 0 && number == 0) tell(kAllStaged);
#ifdef EP_HAS_TMA
    ptx::fence_proxy_async();  // rows were written by ordinary stores
#endif
    uint32_t parity = 0;
    for (int32_t c = 0; c < num_chunks; ++c) {
        const bool is_last = c == num_chunks - 1;
        const int32_t first = c * kChunkRows;
        const int32_t here = max(0, (is_last ? count : min(count, first + kChunkRows)) - first);
        Chunk chunk{.first_row = begin + first, .before = sum_before(here, lane)};
        chunk.num_rows = __shfl_sync(kFullWarp, chunk.before + here, kMaxLocalRanks - 1);
        copy(chunk, number, num_warps, to, ring, loaded, parity);
        __syncwarp();
        uint64_t* counter = &call.workspace->staged[call.set][c];
        bool completes = false;
        if (lane == 0) completes = ptx::atom_add_acq_rel_gpu(counter, 1) + 1 == num_warps;
        completes = __shfl_sync(kFullWarp, completes, 0);
        __syncwarp();  // what lane 0 has acquired goes before the releases of the others
        if (completes) tell(is_last ? kAllStaged : c + 1);
    }
}

#ifdef EP_HAS_TMA
// Every lane with a stage moves pieces through it, one at a time: loads and stores of all lanes overlap.
template <IntranodeCombineCfg kCfg>
__device__ void CombineBlock<kCfg>::copy(const Chunk& chunk, int32_t number, int32_t num_warps, uint8_t* to,
                                         uint8_t* ring, uint64_t* loaded, uint32_t& parity) const {
    const int32_t num_pieces = chunk.num_rows * pieces_per_row();
    for (int32_t begin = number * kCfg.num_stages; begin < num_pieces; begin += num_warps * kCfg.num_stages) {
        const int32_t piece = begin + lane;
        const int32_t i = piece / pieces_per_row();
        const int64_t row = chunk.row(i, call.num_ranks);
        if (lane < kCfg.num_stages && piece < num_pieces) {
            const int32_t offset = (piece - i * pieces_per_row()) * kCfg.stage_bytes;
            const int32_t num_bytes = min(kCfg.stage_bytes, args.row_bytes - offset);
            const int64_t at = row * args.row_bytes + offset;
            uint8_t* stage = ring + lane * kCfg.stage_bytes;
            ptx::bulk_wait_read<0>();
            ptx::mbarrier_arrive_expect(&loaded[lane], num_bytes);
            ptx::bulk_load(stage, args.y + at, num_bytes, &loaded[lane]);
            while (!ptx::mbarrier_try_wait(&loaded[lane], parity)) {
            }
            parity ^= 1;
            ptx::bulk_store(to + at, stage, num_bytes);
            ptx::bulk_commit();
        }
        __syncwarp();
    }
    ptx::bulk_wait_landed();
}
#else
template <IntranodeCombineCfg kCfg>
__device__ void CombineBlock<kCfg>::copy(const Chunk& chunk, int32_t number, int32_t num_warps, uint8_t* to,
                                         uint8_t*, uint64_t*, uint32_t&) const {
    for (int32_t i = number; i < chunk.num_rows; i += num_warps) {
        const int64_t at = static_cast<int64_t>(chunk.row(i, call.num_ranks)) * args.row_bytes;
        for (int32_t offset = lane * rows::kVectorBytes; offset < args.row_bytes;
             offset += kWarpSize * rows::kVectorBytes)
            ptx::st_stream(reinterpret_cast<uint4*>(to + at + offset),
                           ptx::ld_stream(reinterpret_cast<const uint4*>(args.y + at + offset)));
    }
}
#endif

}  // namespace ep

// The rows of the normal-mode dispatch: loaded once, cast to FP8 where the kernel quantises, stored to every
// destination.
//
// Work       rows are cut into pieces that warps take by ticket: SMs reach the links at very different speed.
//            The first pieces of every warp are dealt out, so that their loads are on their way while the
//            ranks still exchange their offers: loads need no positions.
// Ring       a piece passes through a slot of its warp's ring. One lane per destination stores it. kAhead
//            loads are in flight; the stores of a slot have been read out before it is loaded again.
// Order      what is only moved stays in the async proxy, from bulk load to bulk store, and a slot needs no
//            proxy fence. What is cast is read and written in place by ordinary accesses in between: the
//            completion of the load, seen by every lane, goes before their reads; __syncwarp separates reads
//            from writes over other lanes' inputs; fence.proxy.async.shared::cta by every lane, then
//            __syncwarp, puts both before the bulk stores, and before the load that refills the slot later.
//            The warp leaves when its stores have landed, each waited for by the thread that issued it.
#pragma once
#include "fp8.cuh"
#include "intranode_dispatch_block.cuh"

namespace ep {

template <IntranodeDispatchCfg kCfg>
struct RowSender {
    static constexpr int kVectors = 4;  // that a lane holds in registers at a time
    static constexpr int kStepBytes = kVectors * kWarpSize * rows::kVectorBytes;
#ifdef EP_HAS_TMA
    static constexpr int kPieceBytes = kCfg.stage_bytes;  // of x
#else
    static constexpr int kPieceBytes = kStepBytes;
#endif
    static constexpr int kNarrowing = kCfg.quantizes ? 2 : 1;          // bytes of x for one that is sent
    static constexpr int kBytesPerScale = 2 * fp8::kChannelsPerScale;  // of bfloat16
    static constexpr int kPieceScales = kPieceBytes / kBytesPerScale;
    static_assert(!kCfg.quantizes || (kPieceBytes % kStepBytes == 0 && kPieceScales <= kWarpSize &&
                                      kPieceScales * fp8::kScaleBytes <= kCfg.scale_bytes));

    using Block = DispatchBlock<kCfg>;
    const Block& block;
    int32_t x_row_bytes, pieces_per_row, destination;
    uint32_t num_pieces, ticket;
    typename Block::Sections to;  // known once the offers are
    bool has_left = false;        // the call was given up while a row was awaited
    Tally<kCfg.counts != 0> tally;

    __device__ explicit RowSender(const Block& block) : block(block) {
        x_row_bytes = block.args.row_bytes * kNarrowing;
        pieces_per_row = (x_row_bytes + kPieceBytes - 1) / kPieceBytes;
        num_pieces = static_cast<uint32_t>(block.num_tokens()) * pieces_per_row;
        destination = block.destination_of_lane();
    }

    __device__ void start();    // before the offers are known: begins to load
    __device__ void abandon();  // instead of `send`: nothing is in flight after it
    __device__ void send();

    __device__ int32_t bytes_at(int32_t at) const { return min(kPieceBytes, x_row_bytes - at); }
    __device__ int32_t num_scales(int32_t at) const { return bytes_at(at) / kBytesPerScale; }
    __device__ __forceinline__ const uint8_t* x(int32_t token, int32_t at) const {
        const typename Block::Origin from = block.origin(token);
        return from.x + static_cast<int64_t>(from.token) * x_row_bytes + at;
    }
    // Where a piece of a row, and its scale factors, lie at this lane's destination.
    __device__ uint8_t* sent_x(int32_t row, int32_t at) const {
        return to.x + static_cast<int64_t>(row) * block.args.row_bytes + at / kNarrowing;
    }
    __device__ uint8_t* sent_scales(int32_t row, int32_t at) const {
        return to.sf + static_cast<int64_t>(row) * block.args.sf_row_bytes +
               at / kBytesPerScale * fp8::kScaleBytes;
    }

    // Whether a lane's destination is another rank.
    __device__ bool is_elsewhere(int32_t lane) const { return lane != block.args.num_ranks - 1; }

    // The scale factors of a piece to every destination. Each lane has one of them: number `which`.
    __device__ void store_scales(float scale, int32_t which, int32_t row, int32_t at) {
        const auto address = row < 0 ? 0 : reinterpret_cast<uint64_t>(sent_scales(row, at));
        for (int32_t i = 0; i < block.args.num_ranks; ++i) {
            auto* scales = reinterpret_cast<float*>(__shfl_sync(kFullWarp, address, i));
            if (scales == nullptr || which >= num_scales(at)) continue;
            scales[which] = scale;
            tally.add(is_elsewhere(i), fp8::kScaleBytes);
        }
    }

#ifdef EP_HAS_TMA
    static constexpr int kStages = kCfg.num_stages, kAhead = kStages / 2;
    static constexpr int kSlotBytes = kCfg.stage_bytes + kCfg.scale_bytes;
    // By slot of the ring: the piece's token, its place in the row (-1: no more pieces), the lane's row.
    int32_t token[kStages], offset[kStages], row[kStages];

    __device__ void load(int slot, uint32_t piece);
    __device__ void fetch(int slot);
    __device__ void cast(uint8_t* data, float* scales, int32_t num_bytes) const;
    __device__ void store(int slot);
    __device__ uint8_t* data_of(int slot) const {
        return block.stages + (block.warp * kStages + slot) * kSlotBytes;
    }
    // Scale factors that were loaded, or made of the piece.
    __device__ uint8_t* scales_of(int slot) const { return data_of(slot) + kCfg.stage_bytes; }
    __device__ __forceinline__ void bulk_store(uint8_t* address, const uint8_t* data, int32_t num_bytes) {
        ptx::bulk_store(address, data, num_bytes);
        tally.add(is_elsewhere(block.lane), num_bytes);
    }
    __device__ void await(int slot, uint32_t parity) const {
        while (!ptx::mbarrier_try_wait(&block.shared.loaded[block.warp][slot], parity)) {
        }
    }
#else
    template <class Vector>
    __device__ void store(const Vector (&values)[kVectors], int32_t num_vectors, int32_t row, int32_t at);
#endif
};

#ifdef EP_HAS_TMA
// Begins to load a piece; `offset` is -1 if there is none of that number.
template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::load(int slot, uint32_t piece) {
    offset[slot] = -1;
    if (piece >= num_pieces || has_left) return;
    const auto place = static_cast<int32_t>(piece / pieces_per_row);
    token[slot] = block.token_at(place);
    if constexpr (kCfg.segmented) {
        has_left = token[slot] < 0;
        if (has_left) return;
    }
    offset[slot] = static_cast<int32_t>(piece - place * pieces_per_row) * kPieceBytes;
    if (block.lane != 0) return;
    uint64_t* loaded = &block.shared.loaded[block.warp][slot];
    const int32_t num_bytes = bytes_at(offset[slot]), sf_row_bytes = block.args.sf_row_bytes;
    const bool with_scales = !kCfg.quantizes && offset[slot] == 0 && sf_row_bytes > 0 && block.scales_ride();
    ptx::mbarrier_arrive_expect(loaded, num_bytes + (with_scales ? sf_row_bytes : 0));
    ptx::bulk_load(data_of(slot), x(token[slot], offset[slot]), num_bytes, loaded);
    if (with_scales) {
        const typename Block::Origin from = block.origin(token[slot]);
        ptx::bulk_load(scales_of(slot), from.sf + static_cast<int64_t>(from.token) * sf_row_bytes,
                       sf_row_bytes, loaded);
    }
}

// The next piece by ticket. Lanes meet here after their stores of the slot have been read out.
template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::fetch(int slot) {
    const uint32_t num_dealt = kAhead * gridDim.x * kCfg.num_data_warps;
    const uint32_t piece = num_dealt + __shfl_sync(kFullWarp, ticket, 0);
    if (piece < num_pieces) {
        ticket = sync::take_ticket(block.call, block.lane);
        ptx::bulk_wait_read<kStages - 1 - kAhead>();
        __syncwarp();
    }
    load(slot, piece);
    row[slot] = offset[slot] < 0 ? -1 : block.row_of(token[slot], destination);
}

template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::start() {
    ticket = sync::take_ticket(block.call, block.lane);
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot)
        // Neighbours in a row go to different blocks.
        load(slot, (slot * kCfg.num_data_warps + block.warp) * gridDim.x + blockIdx.x);
}

template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::abandon() {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot)
        if (offset[slot] >= 0) await(slot, 0);
}

// Turns the bfloat16 of a slot into FP8 in place, in steps that fit into registers: a step writes over inputs
// of its own and of earlier steps. Past the end of a short piece lies what an earlier one left: cast, never
// sent.
template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::cast(uint8_t* data, float* scales, int32_t num_bytes) const {
    const int32_t which = fp8::scale_of_lane(block.lane);
#pragma unroll 1
    for (int32_t step = 0; step * kStepBytes < num_bytes; ++step) {
        const int32_t first = step * kVectors * kWarpSize + block.lane;
        uint4 values[kVectors];
        uint2 narrow[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            values[v] = reinterpret_cast<const uint4*>(data)[first + v * kWarpSize];
        __syncwarp();
        const float scale = fp8::cast(values, narrow, block.lane);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint2*>(data)[first + v * kWarpSize] = narrow[v];
        constexpr int kScales = kVectors * fp8::kScalesPerWarp;
        if (which < kScales) scales[step * kScales + which] = scale;
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
}

template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::store(int slot) {
    const int32_t at = offset[slot], sf_row_bytes = block.args.sf_row_bytes;
    uint8_t* data = data_of(slot);
    uint8_t* scales = scales_of(slot);
    if constexpr (kCfg.quantizes) cast(data, reinterpret_cast<float*>(scales), bytes_at(at));
    if (row[slot] >= 0) bulk_store(sent_x(row[slot], at), data, bytes_at(at) / kNarrowing);
    if constexpr (kCfg.quantizes) {
        // Bulk copies carry them where those of every piece are a multiple of 16 bytes.
        constexpr bool kIsAligned = kPieceScales * fp8::kScaleBytes % 16 == 0;
        if (!kIsAligned || sf_row_bytes % 16 != 0)
            store_scales(reinterpret_cast<const float*>(scales)[block.lane % kPieceScales], block.lane,
                         row[slot], at);
        else if (row[slot] >= 0)
            bulk_store(sent_scales(row[slot], at), scales, num_scales(at) * fp8::kScaleBytes);
    } else if (row[slot] >= 0 && at == 0 && sf_row_bytes > 0 && block.scales_ride()) {
        bulk_store(sent_scales(row[slot], at), scales, sf_row_bytes);
    }
    ptx::bulk_commit();
}

template <IntranodeDispatchCfg kCfg>
__device__ __forceinline__ void RowSender<kCfg>::send() {
    if (destination < block.args.num_ranks) to = block.sections(destination);
    ptx::fence_proxy_async();  // our stores come after the peers' reads that the offers' acquire ordered
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot)
        row[slot] = offset[slot] < 0 ? -1 : block.row_of(token[slot], destination);
    uint32_t phases = 0;
    for (bool is_more = true; is_more;) {
#pragma unroll
        for (int slot = 0; slot < kStages; ++slot) {
            if (offset[slot] < 0) {
                is_more = false;
                break;
            }
            fetch((slot + kAhead) % kStages);
            await(slot, phases >> slot & 1);
            phases ^= 1u << slot;
            store(slot);
        }
    }
    ptx::bulk_wait_landed();
    tally.keep(block.args.workspace);
}
#else
// A piece passes through registers.
template <IntranodeDispatchCfg kCfg>
__device__ void RowSender<kCfg>::start() {
    ticket = sync::take_ticket(block.call, block.lane);
}

template <IntranodeDispatchCfg kCfg>
__device__ void RowSender<kCfg>::abandon() {}

template <IntranodeDispatchCfg kCfg>
template <class Vector>
__device__ void RowSender<kCfg>::store(const Vector (&values)[kVectors], int32_t num_vectors, int32_t row,
                                       int32_t at) {
    const auto address = row < 0 ? 0 : reinterpret_cast<uint64_t>(sent_x(row, at));
    for (int32_t i = 0; i < block.args.num_ranks; ++i) {
        auto* out = reinterpret_cast<Vector*>(__shfl_sync(kFullWarp, address, i)) + block.lane;
        if (__shfl_sync(kFullWarp, row, i) < 0) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            if (v * kWarpSize + block.lane < num_vectors) {
                ptx::st_stream(out + v * kWarpSize, values[v]);
                tally.add(is_elsewhere(i), sizeof(Vector));
            }
    }
}

template <IntranodeDispatchCfg kCfg>
__device__ void RowSender<kCfg>::send() {
    if (destination < block.args.num_ranks) to = block.sections(destination);
    while (true) {
        const uint32_t piece = __shfl_sync(kFullWarp, ticket, 0);
        if (piece >= num_pieces) break;
        ticket = sync::take_ticket(block.call, block.lane);
        const auto place = static_cast<int32_t>(piece / pieces_per_row);
        const int32_t token = block.token_at(place);
        if constexpr (kCfg.segmented) {
            has_left = token < 0;
            if (has_left) break;
        }
        const int32_t at = static_cast<int32_t>(piece - place * pieces_per_row) * kPieceBytes;
        const int32_t num_vectors = bytes_at(at) / rows::kVectorBytes;
        const auto* from = reinterpret_cast<const uint4*>(x(token, at)) + block.lane;
        uint4 values[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            values[v] = v * kWarpSize + block.lane < num_vectors ? ptx::ld_stream(from + v * kWarpSize)
                                                                 : make_uint4(0, 0, 0, 0);
        const int32_t row = block.row_of(token, destination);
        if constexpr (kCfg.quantizes) {
            uint2 narrow[kVectors];
            store_scales(fp8::cast(values, narrow, block.lane), fp8::scale_of_lane(block.lane), row, at);
            store(narrow, num_vectors, row, at);
        } else {
            store(values, num_vectors, row, at);
        }
    }
    tally.keep(block.args.workspace);
}
#endif

}  // namespace ep

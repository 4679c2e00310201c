// From the expert-major rows back to one row for each received token: the sum of its experts' rows, which a
// combine pulls. On one rank alone.
//
// Sum        float32, columns ascending, each row multiplied by its weight if there are weights; products and
//            sums are rounded on their own, and the result once. It starts from its first term, so that a
//            -0.0 stays; a token without any term is +0.0.
// Order      terms were written by earlier kernels, possibly in another proxy: one fence.proxy.async by every
//            thread, before its first bulk load.
// Refill     as in intranode_combine.cu: every reader of a stage fences, then __syncwarp, then one lane
// refills. Work       sums are cut into pieces of stage_bytes that warps take by ticket. Each warp has its
// own ring of
//            stages and is its producer and its consumer.
// Launch     up to kMaxBlocks blocks. From sm_90 on num_threads / 32 * num_stages * stage_bytes of dynamic
//            shared memory; before, where terms are read straight into registers, none.
#include "local.cuh"
#include "rows.cuh"

namespace ep {

struct CollapseCfg {
    int num_threads, num_stages, stage_bytes, element;
};

template <CollapseCfg kCfg>
struct CollapseArgs {
    SlabHeader* header;
    LocalWorkspace* workspace;
    const int32_t* num_recv_tokens;  // nullptr: row_capacity
    const int32_t* expert_row;       // [row_capacity, num_topk]: the row of each pair, -1 for none
    const uint8_t* y;                // expert-major rows
    const float* weights;            // of them, or nullptr
    uint8_t* out;                    // [row_capacity] rows
    int32_t row_capacity, num_topk, row_bytes;
};

template <CollapseCfg kCfg>
struct CollapseWarp {
    static constexpr int kVectors = kCfg.stage_bytes / (kWarpSize * rows::kVectorBytes);  // of a lane
    static constexpr int kPerLane = kMaxExpandTopk / kWarpSize;                           // columns
    using Sum = float[kVectors][rows::kVectorElements<kCfg.element>];

    const CollapseArgs<kCfg>& args;
    const local::Call& call;
    int32_t num_rows, lane;

    __device__ void sum_rows(uint8_t* ring, uint64_t* loaded) const;
    __device__ void store(int32_t piece, const Sum& sum) const;

    __device__ int32_t pieces_per_row() const {
        return (args.row_bytes + kCfg.stage_bytes - 1) / kCfg.stage_bytes;
    }
    __device__ int32_t row_of(int32_t piece) const { return piece / pieces_per_row(); }
    __device__ int32_t offset_of(int32_t piece) const {
        return (piece - row_of(piece) * pieces_per_row()) * kCfg.stage_bytes;
    }
    __device__ int32_t bytes_at(int32_t offset) const {
        return min(kCfg.stage_bytes, args.row_bytes - offset);
    }
    static __device__ void start(Sum& sum, float value = rows::kNoTerm) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            for (float& element : sum[v]) element = value;
    }
    __device__ __forceinline__ void add(Sum& sum, int v, float weight, const uint4& vector) const {
        if (args.weights == nullptr)
            rows::add<kCfg.element>(sum[v], vector);
        else
            rows::add_product<kCfg.element>(sum[v], weight, vector);
    }
};

template <CollapseCfg kCfg>
__device__ __forceinline__ void CollapseWarp<kCfg>::store(int32_t piece, const Sum& sum) const {
    const int32_t offset = offset_of(piece);
    const int32_t num_vectors = bytes_at(offset) / rows::kVectorBytes;
    auto* out = reinterpret_cast<uint4*>(args.out + int64_t{row_of(piece)} * args.row_bytes + offset);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int32_t i = v * kWarpSize + lane;
        if (i < num_vectors) ptx::st_stream(out + i, rows::rounded<kCfg.element>(sum[v]));
    }
}

// The pieces that a warp takes, one after another. Ahead of the current piece, the terms' rows of the next
// one and the ticket after that are on their way.
template <CollapseCfg kCfg>
struct SumPieces {
    static constexpr int kPerLane = CollapseWarp<kCfg>::kPerLane;
    const CollapseWarp<kCfg>& warp;
    int32_t num_pieces;

    int32_t piece;  // num_pieces or more: there are no more
    int32_t offset;
    int32_t terms[kPerLane];     // this lane's columns: the expert-major row, -1 for none
    uint32_t pending[kPerLane];  // lanes with a term that has not been taken

    int32_t next_piece, next_terms[kPerLane];
    uint32_t ticket;

    __device__ explicit SumPieces(const CollapseWarp<kCfg>& warp) : warp(warp) {
        num_pieces = warp.num_rows * warp.pieces_per_row();
        ticket = local::take_ticket(warp.call, warp.lane);
        for (uint32_t& lanes : pending) lanes = 0;
        look_ahead();
    }

    __device__ __forceinline__ void look_ahead() {
        next_piece = __shfl_sync(kFullWarp, ticket, 0);
        if (next_piece >= num_pieces) return;
        ticket = local::take_ticket(warp.call, warp.lane);
        const int64_t first = int64_t{warp.row_of(next_piece)} * warp.args.num_topk;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int32_t k = i * kWarpSize + warp.lane;
            next_terms[i] = k < warp.args.num_topk ? warp.args.expert_row[first + k] : -1;
        }
    }

    // The whole warp. False when there are no more.
    __device__ __forceinline__ bool advance() {
        piece = next_piece;
        if (piece >= num_pieces) return false;
        offset = warp.offset_of(piece);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            terms[i] = next_terms[i];
            pending[i] = __ballot_sync(kFullWarp, terms[i] >= 0);
        }
        look_ahead();
        return true;
    }

    __device__ __forceinline__ bool has_terms() const {
        uint32_t lanes = 0;
        for (const uint32_t some : pending) lanes |= some;
        return lanes != 0;
    }

    // The expert-major row of the next term; there is one.
    __device__ __forceinline__ int32_t take_term() {
        int32_t row = -1;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (row >= 0 || pending[i] == 0) continue;
            row = __shfl_sync(kFullWarp, terms[i], __ffs(pending[i]) - 1);
            pending[i] &= pending[i] - 1;
        }
        return row;
    }

    __device__ __forceinline__ const uint8_t* source(int32_t row) const {
        return warp.args.y + int64_t{row} * warp.args.row_bytes + offset;
    }
};

#ifdef EP_HAS_TMA
// What a stage holds: an expert-major row's part, and the piece that it completes, or one of these.
constexpr int32_t kMoreTerms = -1, kNoMore = -2;
struct Term {
    int32_t completes, row;
};

// Starts the load of the next term into a stage.
template <CollapseCfg kCfg>
__device__ __forceinline__ Term load_next(SumPieces<kCfg>& pieces, uint8_t* stage, uint64_t* loaded) {
    while (!pieces.has_terms()) {
        if (!pieces.advance()) return {kNoMore, 0};
        if (!pieces.has_terms()) {
            typename CollapseWarp<kCfg>::Sum zero;
            CollapseWarp<kCfg>::start(zero, 0.0f);
            pieces.warp.store(pieces.piece, zero);
        }
    }
    const int32_t row = pieces.take_term();
    if (pieces.warp.lane == 0) {
        const int32_t num_bytes = pieces.warp.bytes_at(pieces.offset);
        ptx::mbarrier_arrive_expect(loaded, num_bytes);
        ptx::bulk_load(stage, pieces.source(row), num_bytes, loaded);
    }
    return {pieces.has_terms() ? kMoreTerms : pieces.piece, row};
}

// Terms flow through the ring in the order of addition, those of several pieces at a time. Every stage is
// filled and read once a round, so one parity serves them all.
template <CollapseCfg kCfg>
__device__ void CollapseWarp<kCfg>::sum_rows(uint8_t* ring, uint64_t* loaded) const {
    SumPieces<kCfg> pieces(*this);
    int32_t completes = kNoMore;  // lane s: of the term in stage s
    float weight = 1.0f;          // the same
    const auto note = [&](int32_t s, const Term& term) {
        if (lane != s) return;
        completes = term.completes;
        // Not awaited before the term is added.
        if (args.weights != nullptr && completes != kNoMore) weight = args.weights[term.row];
    };
#pragma unroll 1
    for (int32_t s = 0; s < kCfg.num_stages; ++s)
        note(s, load_next(pieces, ring + s * kCfg.stage_bytes, &loaded[s]));
    Sum sum;
    start(sum);
    uint32_t parity = 0;
#pragma unroll 1
    for (int32_t s = 0;;) {
        const int32_t completed = __shfl_sync(kFullWarp, completes, s);
        if (completed == kNoMore) return;
        const float factor = __shfl_sync(kFullWarp, weight, s);
        uint8_t* stage = ring + s * kCfg.stage_bytes;
        while (!ptx::mbarrier_try_wait(&loaded[s], parity)) {
        }
        // Past the end of a short piece lies what an earlier one left: summed, never stored.
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            add(sum, v, factor, reinterpret_cast<const uint4*>(stage)[v * kWarpSize + lane]);
        ptx::fence_proxy_async_shared();
        __syncwarp();
        note(s, load_next(pieces, stage, &loaded[s]));
        if (completed >= 0) {
            store(completed, sum);
            start(sum);
        }
        if (++s == kCfg.num_stages) {
            s = 0;
            parity ^= 1;
        }
    }
}
#else
// The loads of one term are in flight together.
template <CollapseCfg kCfg>
__device__ void CollapseWarp<kCfg>::sum_rows(uint8_t*, uint64_t*) const {
    for (SumPieces<kCfg> pieces(*this); pieces.advance();) {
        const int32_t num_vectors = bytes_at(pieces.offset) / rows::kVectorBytes;
        Sum sum;
        start(sum, pieces.has_terms() ? rows::kNoTerm : 0.0f);
        while (pieces.has_terms()) {
            const int32_t row = pieces.take_term();
            const float weight = args.weights == nullptr ? 1.0f : args.weights[row];
            const auto* from = reinterpret_cast<const uint4*>(pieces.source(row));
            uint4 vectors[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                if (v * kWarpSize + lane < num_vectors)
                    vectors[v] = ptx::ld_stream(from + v * kWarpSize + lane);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                if (v * kWarpSize + lane < num_vectors) add(sum, v, weight, vectors[v]);
        }
        store(pieces.piece, sum);
    }
}
#endif

template <CollapseCfg kCfg>
__device__ void collapse(const CollapseArgs<kCfg>& args) {
    constexpr int kNumWarps = kCfg.num_threads / kWarpSize;
    static_assert(kCfg.num_threads % kWarpSize == 0);
    static_assert(kCfg.stage_bytes % (kWarpSize * rows::kVectorBytes) == 0);
    static_assert(kCfg.num_stages >= 1 && kCfg.num_stages <= kWarpSize);
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kNumWarps][kCfg.num_stages];
    local::Call call{.header = args.header, .workspace = args.workspace};
    if (!local::enter(call, args.num_recv_tokens, args.row_capacity)) return;

    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    const CollapseWarp<kCfg> mine{.args = args,
                                  .call = call,
                                  .num_rows = min(call.num_recv_tokens, args.row_capacity),
                                  .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
#ifdef EP_HAS_TMA
    if (mine.lane == 0)
        for (int s = 0; s < kCfg.num_stages; ++s) ptx::mbarrier_init(&loaded[warp][s]);
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async();
    __syncwarp();
#endif
    mine.sum_rows(stages + warp * kCfg.num_stages * kCfg.stage_bytes, loaded[warp]);
    local::finish(call);
}

}  // namespace ep

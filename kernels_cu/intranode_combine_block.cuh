// What the parts of combine share: arguments, what a block knows, and pieces of rows.
#pragma once
#include "rows.cuh"
#include "segments.cuh"
#include "sync.cuh"
#include "tally.cuh"

namespace ep {

struct IntranodeCombineCfg {
    int num_threads, num_stages, stage_bytes, element;
    int segmented;  // 1: tokens are those of args.segments
    int counts;     // 1: adds up what it loads from other ranks
};

template <IntranodeCombineCfg kCfg>
struct IntranodeCombineArgs {
    HangRecord* hang;
    Workspace* workspace;
    const int32_t* send_row;  // [num_tokens, kMaxLocalRanks]
    const SendPlan* send_plan;
    const uint8_t* y;        // [num_rows] rows that are not in the slab yet; nullptr: they are
    const uint8_t* bias[2];  // [num_tokens] rows, or nullptr
    uint8_t* out;            // [num_tokens] rows
    float* out_weights;      // [num_tokens, num_topk]
    uint64_t timeout_ns;
    uint32_t digest, y_offset, weights_offset;
    int32_t rank, num_ranks, num_tokens, num_rows, row_bytes, num_topk;  // num_topk 0: no weights
    int32_t num_pullers, num_stagers;                                    // blocks; num_stagers 0 without y
    uint8_t* slabs[kMaxLocalRanks];
    // With kCfg.segmented alone: those of the dispatch, and for each token of another node the pieces of its
    // row that are summed.
    const Segments* segments;
    uint64_t* progress;
};

// Terms of a sum by number, in the order of addition: ranks, then biases. Lane i looks after term i.
constexpr int kMaxTerms = kMaxLocalRanks + 2;

// Of a piece: bytes [offset, offset + num_bytes) of its token's row.
struct Place {
    int32_t token, offset, num_bytes;
};

struct Chunk;

template <bool kSegmented>
struct CombineSegments {};
template <>
struct CombineSegments<true> {
    SegmentIndex index;
    Rotation others;
    int32_t base[kMaxNodes][kMaxLocalRanks];  // as in SendPlan
};

template <IntranodeCombineCfg kCfg>
struct CombineShared {
    const uint8_t* terms[kMaxTerms];  // row 0 of this rank's part of each term
    int32_t limits[kMaxTerms];        // rows from here on were dropped
    const float* weights[kMaxLocalRanks];
    uint32_t staged[kMaxLocalRanks];  // chunks of each peer's rows that its offer was acquired with
    CombineSegments<kCfg.segmented != 0> segments;
};

template <IntranodeCombineCfg kCfg>
struct CombineBlock {
    static constexpr int kVectors =
        kCfg.stage_bytes / (kWarpSize * rows::kVectorBytes);  // of a lane, in a piece
    static constexpr int kNumWarps = kCfg.num_threads / kWarpSize;
    static constexpr int kWeightWarps = kNumWarps > 4 ? kNumWarps / 4 : 1;
    using Sum = float[kVectors][rows::kVectorElements<kCfg.element>];

    const IntranodeCombineArgs<kCfg>& args;
    const sync::Call& call;
    CombineShared<kCfg>& shared;
    int32_t warp, lane;

    __device__ void offer() const;
    __device__ Reason read_offers() const;
    __device__ bool has_offer(int32_t peer) const;
    __device__ bool has_staged(int32_t peer) const;
    __device__ void sum_weights() const;
    __device__ void stage_rows(uint8_t* ring, uint64_t* loaded) const;
    __device__ void copy(const Chunk& chunk, int32_t number, int32_t num_warps, uint8_t* to, uint8_t* ring,
                         uint64_t* loaded, uint32_t& parity) const;
    __device__ Reason sum_rows(int32_t ticket, uint8_t* ring, uint64_t* loaded) const;
    __device__ void store(int32_t piece, const Sum& sum) const;

    // The first blocks sum, the last ones stage. Who does both stages first.
    __device__ bool is_puller() const { return blockIdx.x < args.num_pullers; }
    __device__ int32_t stager() const {
        return static_cast<int32_t>(blockIdx.x) - static_cast<int32_t>(gridDim.x - args.num_stagers);
    }
    __device__ const CombineOffer& offer_of(int32_t peer) const {
        return call.exchange(call.rank)->combine[call.parity][peer];
    }
    __device__ int32_t pieces_per_row() const {
        return (args.row_bytes + kCfg.stage_bytes - 1) / kCfg.stage_bytes;
    }
    __device__ __forceinline__ int32_t take_ticket() const { return sync::take_ticket(call, lane); }
    __device__ int32_t num_tokens() const { return num_tokens_of<kCfg.segmented != 0>(args); }
    __device__ int32_t num_pieces() const { return num_tokens() * pieces_per_row(); }
    __device__ Place place_of(int32_t piece) const {
        const int32_t number = piece / pieces_per_row();
        const int32_t offset = (piece - number * pieces_per_row()) * kCfg.stage_bytes;
        return {token_at(number), offset, min(kCfg.stage_bytes, args.row_bytes - offset)};
    }
    // In which order tokens are summed: those of other nodes first, whose sums must travel.
    __device__ __forceinline__ int32_t token_at(int32_t number) const {
        if constexpr (kCfg.segmented) {
            const SegmentIndex& index = shared.segments.index;
            const int32_t num_others = num_tokens() - index.num_own();
            if (number >= num_others) return index.own_begin + number - num_others;
            const int2 found = shared.segments.others.at(number);
            return index.first[found.x] + found.y;
        }
        return number;
    }
    __device__ uint8_t* out_of(const Place& place) const {
        return args.out + static_cast<int64_t>(place.token) * args.row_bytes + place.offset;
    }
    // The row that `terms` and `weights` of a rank are counted by; -1: none.
    __device__ __forceinline__ int32_t row_of(int32_t token, int32_t position, int32_t src) const {
        if constexpr (kCfg.segmented)
            if (position >= 0) position += shared.segments.base[shared.segments.index.of(token)][src];
        return position;
    }
    static __device__ void start(Sum& sum, float value = rows::kNoTerm) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            for (float& element : sum[v]) element = value;
    }
};

}  // namespace ep

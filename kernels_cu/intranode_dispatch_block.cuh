// One block of the normal-mode dispatch: what it is told, what its warps share, and what all phases look up.
// The phases are in files of their own: layout, offers (with the kernel, intranode_dispatch.cu), rows,
// metadata.
#pragma once
#include "segments.cuh"
#include "sync.cuh"
#include "tally.cuh"

namespace ep {

struct IntranodeDispatchCfg {
    int num_threads, num_data_warps, num_stages, stage_bytes;
    int scale_bytes;  // of a slot, for scale factors: of a row that is moved, of a piece that is cast
    int quantizes;    // 1: x is bfloat16, and leaves as float8_e4m3fn with scale factors made here
    int segmented;    // 1: tokens are those of args.segments
    int counts;       // 1: adds up what it stores to other ranks
};

template <IntranodeDispatchCfg kCfg>
struct IntranodeDispatchArgs {
    HangRecord* hang;
    Workspace* workspace;
    DispatchResult* result;
    const uint8_t* x;
    const uint8_t* sf;  // not with kCfg.quantizes
    const uint8_t* topk_idx;
    const float* topk_weights;
    const uint8_t* is_token_in_rank;  // read where there are no expert ids, on one node
    int32_t* send_row;                // [num_tokens, kMaxLocalRanks]
    SendPlan* send_plan;
    uint8_t* masks;       // [num_tokens], scratch
    int32_t* send_token;  // [kMaxLocalRanks, num_tokens], scratch: the tokens for each destination, in order
    uint64_t timeout_ns, call;
    uint32_t digest, recv_offset, recv_capacity;
    int32_t rank, num_ranks, num_tokens, num_topk, num_experts;
    int32_t row_bytes, sf_row_bytes;  // of a row as it is received
    int32_t idx_bytes, is_cached;
    int32_t fill_rows;             // received rows from num_recv_tokens to here are filled: id -1, weight 0
    int32_t max_redundant_tokens;  // of a layout that every block makes for itself
    int32_t expert_alignment;      // that counts by expert are rounded up to, for callers
    uint8_t* slabs[kMaxLocalRanks];

    // With kCfg.segmented alone. num_tokens is then the most that the list can have. Tokens of the own
    // segment lie in x, sf, topk_idx and topk_weights, the others in these, one segment behind the other.
    const Segments* segments;
    const uint8_t* landed_x;
    const uint8_t* landed_sf;
    const uint8_t* landed_topk_idx;
    const float* landed_topk_weights;
    const uint64_t* order;  // stamped: the tokens of other segments, as they land
    // [tokens, node_masks_bytes], without expert ids: a byte for each node, with a bit for each of its ranks
    // that the token goes to.
    const uint8_t *node_masks, *landed_node_masks;
    int32_t node_masks_bytes;
    int32_t first_expert;         // of this node: ids count from the first expert of all nodes
    int32_t waits_for_announced;  // all but the rows of those tokens may be on its way
    int32_t num_exchange_blocks;  // of the exchange that brings them; 0: it has ended
};

template <bool kSegmented>
struct DispatchSegments {};
template <>
struct DispatchSegments<true> {
    SegmentIndex index;
    int32_t base[kMaxNodes][kMaxLocalRanks];    // as in SendPlan
    int32_t others[kMaxNodes][kMaxLocalRanks];  // tokens of the other ranks, by segment and destination
    int32_t total[kMaxLocalRanks];              // of all ranks and segments, by destination
};

template <IntranodeDispatchCfg kCfg>
struct DispatchShared {
    static constexpr int kNumWarps = kCfg.num_threads / kWarpSize;

    uint64_t loaded[kCfg.num_data_warps][kCfg.num_stages];
    // By destination, tokens of this rank: in this block's slice, in the lower ones, up to the slice's end.
    int32_t tokens_here[kMaxLocalRanks], tokens_before[kMaxLocalRanks], tokens_until[kMaxLocalRanks];
    int32_t tokens_total[kMaxLocalRanks];
    int32_t warp_tokens[kNumWarps][kMaxLocalRanks];
    short positions[kCfg.num_threads][kMaxLocalRanks];  // as send_row, of a redundant layout
    uint32_t histogram[kMaxLocalRanks * kMaxLocalExperts];

    DispatchOffer offers[kMaxLocalRanks];  // as they came
    int32_t recv_counts[kMaxLocalRanks];
    int64_t capacity[kMaxLocalRanks];
    uint8_t* place[kMaxLocalRanks];  // where the rows of each destination land
    struct {
        int32_t base[kMaxLocalRanks], limit[kMaxLocalRanks];
    } plan;  // as in SendPlan
    uint32_t overfull_ranks;
    bool is_last;
    DispatchSegments<kCfg.segmented != 0> segments;
};

template <IntranodeDispatchCfg kCfg>
struct DispatchBlock {
    static constexpr int kNumWarps = kCfg.num_threads / kWarpSize;
    static constexpr int kOtherWarps = kNumWarps - kCfg.num_data_warps;

    const IntranodeDispatchArgs<kCfg>& args;
    const sync::Call& call;
    DispatchShared<kCfg>& shared;
    uint8_t* stages;
    int32_t first_token, last_token;  // the block's slice
    int32_t num_local_experts, warp, lane;
    bool is_redundant;  // this block knows all positions by itself

    // Layout.
    __device__ void lay_out_alone();
    __device__ Reason lay_out_together();
    __device__ uint32_t destinations(int32_t token) const;
    __device__ uint32_t told_destinations(int32_t token) const;
    __device__ void count_tokens();
    __device__ Reason add_up_blocks();
    __device__ void place(uint32_t mask, int32_t& running, int32_t (&position)[kMaxLocalRanks]);
    __device__ void keep(int32_t token, uint32_t mask, const int32_t (&position)[kMaxLocalRanks]) const;
    __device__ void count_experts(int32_t begin, int32_t end);
    __device__ Reason publish_experts();

    // Offers.
    __device__ void offer_place() const;
    __device__ void offer_counts(int32_t total) const;
    template <class CountOf>
    __device__ void offer_experts(CountOf count_of) const;
    __device__ void offer_segments() const;
    // What the ranks of this node have told: [src_rank][segment][dst_rank], stamped.
    using SegmentCounts = uint64_t[kMaxLocalRanks][kMaxNodes][kMaxLocalRanks];
    __device__ const SegmentCounts& segment_counts() const {
        return call.exchange(args.rank)->segment_counts[call.parity];
    }
    __device__ Reason read_offers();
    __device__ Reason read_segments();
    __device__ void plan_rows(int32_t peer);
    __device__ void plan_segments();
    __device__ void report_segments() const;
    __device__ int32_t recv_end(int32_t last) const;
    __device__ int32_t num_recv_tokens() const { return recv_end(args.num_ranks - 1); }
    __device__ bool has_offer(int32_t peer) const;
    __device__ bool has_experts(int32_t peer) const;
    __device__ Reason sum_expert(int32_t e, uint32_t& count) const;
    __device__ Reason sum_experts() const;
    __device__ Reason report() const;

    // Metadata.
    __device__ void send_metadata() const;
    __device__ void send_scales() const;
    __device__ void fill(uint8_t* section, int64_t begin, int64_t end, uint32_t word) const;
    __device__ void fill_absent() const;

    // Warps that move no rows share the rest; the last one of block 0 reports.
    __device__ bool is_reporter() const { return blockIdx.x == 0 && warp == kNumWarps - 1; }
    __device__ int32_t helper() const { return warp - kCfg.num_data_warps; }
    __device__ int32_t num_helpers() const { return kOtherWarps - (blockIdx.x == 0 ? 1 : 0); }

    __device__ int32_t num_tokens() const { return num_tokens_of<kCfg.segmented != 0>(args); }

    // The arrays that hold a token, and which of theirs it is.
    struct Origin {
        const uint8_t *x, *sf, *topk_idx;
        const float* topk_weights;
        int32_t token;
    };
    __device__ __forceinline__ Origin origin(int32_t token) const {
        if constexpr (kCfg.segmented) {
            const int32_t begin = shared.segments.index.own_begin, end = shared.segments.index.own_end;
            if (token < begin || token >= end)
                return {args.landed_x, args.landed_sf, args.landed_topk_idx, args.landed_topk_weights,
                        token < begin ? token : token - (end - begin)};
            token -= begin;
        }
        return {args.x, args.sf, args.topk_idx, args.topk_weights, token};
    }

    // Over several nodes, as one thread: for a word of the exchange.
    template <class IsThere>
    __device__ bool await_exchange(const uint64_t* word, uint64_t& seen, IsThere is_there) const {
        return sync::await_beside(call.header(call.rank), word, seen, is_there);
    }
    // As one block, for all but the rows. A barrier.
    __device__ Reason await_announced() const {
        const auto num_landed = static_cast<uint64_t>(num_tokens() - shared.segments.index.num_own());
        uint64_t seen;
        const bool is_there =
            threadIdx.x > 0 || await_exchange(&call.workspace->announced[call.set], seen,
                                              [&](uint64_t value) { return value >= num_landed; });
        return sync::agree(is_there ? kNothing : kLeft);
    }

    // In which order rows are sent: this rank's own first, then others as they land. As one warp; -1 when the
    // call is given up.
    __device__ __forceinline__ int32_t token_at(int32_t place) const {
        if constexpr (kCfg.segmented) {
            const SegmentIndex& index = shared.segments.index;
            if (place < index.num_own()) return index.own_begin + place;
            int32_t landed = -1;
            uint64_t seen;
            if (lane == 0 && await_exchange(&args.order[place - index.num_own()], seen,
                                            [&](uint64_t word) { return is_stamped(word, call.epoch); }))
                landed = static_cast<int32_t>(static_cast<uint32_t>(seen));
            __syncwarp();  // what one lane acquired, all lanes may read
            return index.listed(__shfl_sync(kFullWarp, landed, 0));
        }
        return place;
    }

    // Of this node. -1: none, also for an id that does not exist, or belongs to another node.
    __device__ int32_t expert(int32_t token, int32_t k) const {
        const Origin from = origin(token);
        const int64_t at = static_cast<int64_t>(from.token) * args.num_topk + k;
        const int64_t id = args.idx_bytes == 8 ? reinterpret_cast<const int64_t*>(from.topk_idx)[at]
                                               : reinterpret_cast<const int32_t*>(from.topk_idx)[at];
        const int64_t first = kCfg.segmented ? args.first_expert : 0;
        return id >= first && id < first + args.num_experts ? static_cast<int32_t>(id - first) : -1;
    }

    __device__ float weight(int32_t token, int32_t k) const {
        const Origin from = origin(token);
        return from.topk_weights[static_cast<int64_t>(from.token) * args.num_topk + k];
    }

    // The row of a token at a destination; -1 where it does not go, or does not fit.
    __device__ int32_t row_of(int32_t token, int32_t destination) const {
        if (destination >= args.num_ranks) return -1;
        const int32_t position =
            is_redundant ? shared.positions[token][destination]
                         : __ldcg(args.send_row + static_cast<int64_t>(token) * kMaxLocalRanks + destination);
        if constexpr (kCfg.segmented) return position < 0 ? -1 : segment_row(token, position, destination);
        const bool is_kept = position >= 0 && position < shared.plan.limit[destination];
        return is_kept ? shared.plan.base[destination] + position : -1;
    }

    // As row_of, for a token that goes there.
    __device__ int32_t segment_row(int32_t token, int32_t position, int32_t destination) const {
        const int32_t row = shared.segments.base[shared.segments.index.of(token)][destination] + position;
        return row < shared.plan.limit[destination] ? row : -1;
    }

    // Peers in another order on every rank, so that not all send to one at a time. Lanes beyond have none.
    __device__ int32_t destination_of_lane() const {
        return lane < args.num_ranks ? (args.rank + 1 + lane) % args.num_ranks : kMaxLocalRanks;
    }

    struct Sections {
        uint8_t *topk_idx, *topk_weights, *sf, *x;
    };
    __device__ Sections sections(int32_t destination) const {
        const bool with_weights = args.topk_weights != nullptr;
        const ReceiveLayout at = receive_layout(
            shared.capacity[destination], args.topk_idx == nullptr ? 0 : args.num_topk * args.idx_bytes,
            with_weights ? args.num_topk * 4 : 0, args.sf_row_bytes, args.row_bytes);
        uint8_t* place = shared.place[destination];
        return {place + at.topk_idx, place + at.topk_weights, place + at.sf, place + at.x};
    }

    // Scale factors that are moved travel with the first piece of their row where bulk copies can carry them.
    __device__ bool scales_ride() const {
#ifdef EP_HAS_TMA
        return args.sf_row_bytes % 16 == 0 && args.sf_row_bytes <= kCfg.scale_bytes;
#else
        return false;
#endif
    }
};

}  // namespace ep

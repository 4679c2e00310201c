// What a block of the low-latency combine knows: its arguments, what it holds in shared memory, its parts.
#pragma once
#include "wire.cuh"

namespace ep {

struct LowLatencyCombineCfg {
    int num_threads, wire, over_network;
};

template <LowLatencyCombineCfg kCfg>
struct LowLatencyCombineArgs {
    HangRecord* hang;
    Workspace* workspace;
    LowLatencyState* state;
    LowLatencyRecord* record;                 // of this call
    const LowLatencyRecord* dispatch_record;  // of the dispatch whose rows come back
    uint64_t* masks;
    // Of the send phase.
    const uint8_t* y;     // bfloat16 [El, R*M, hidden]
    const Route* routes;  // [R, M, K]
    // Of both.
    const void* topk_idx;  // [T, K]
    const float*
        topk_weights;         // [T, K]; nullptr: the routes have them, and the ids are those of the dispatch
    const int32_t* sent_ids;  // [T, K]
    // Of the receive phase.
    uint8_t* out;         // bfloat16 [T, hidden]
    int64_t* wait_stats;  // [R], microseconds, added to; or nullptr
    uint64_t timeout_ns;
    // Within the area of every rank, of this zone.
    int64_t weights_offset;  // uint64 [R, M*K]
    int64_t rows_offset;     // slots [M, num_slots]
    uint32_t digest;
    int32_t rank, num_ranks, num_tokens, num_topk, num_experts, num_max_tokens, hidden, idx_bytes;
    int32_t sends_weights, sums_at_source, polls_data, num_slots;
    int32_t zone, dispatch_zone;  // -1 where the rows that were dispatched lie in another area
    int32_t phases, num_sum_blocks;
    int32_t few_send_blocks, max_send_blocks;  // while there are few turns, and at most
    // Over several nodes: which ranks are of this one, and within the area what comes and goes by puts. Then
    // rows are summed on the experts' ranks, and nothing is polled.
    int32_t first_rank, num_local_ranks;
    int64_t landed_offset;       // uint64 [R, M], stamped
    int64_t out_weights_offset;  // uint64 [R, M*K]
    int64_t out_rows_offset;     // slots [R, M]
    uint8_t* slabs[kMaxLocalRanks];
    uint8_t* areas[low_latency::kMaxPeers<kCfg.over_network != 0>];  // nullptr where stores do not reach
};

// One row that a token of some rank has here.
struct CombineEntry {
    int32_t row;
    float weight;
    uint32_t what;  // bit 31: the last of its token; bits 8-: column; bits 0-7: source rank
};
constexpr uint32_t kLastEntry = 1u << 31;
constexpr int kMaxEntries = 64;  // that a warp looks at together

template <LowLatencyCombineCfg kCfg>
struct LowLatencyCombineShared {
    low_latency::Found found;
    CombineEntry entries[kCfg.num_threads / kWarpSize][kMaxEntries];
    int32_t num_entries[kCfg.over_network != 0 ? kCfg.num_threads / kWarpSize : 1];  // of rows that are put
};

template <LowLatencyCombineCfg kCfg>
struct LowLatencyCombineBlock {
    static constexpr int32_t kNumWarps = kCfg.num_threads / kWarpSize;
    static constexpr int kWire = kCfg.wire;
    static constexpr bool kOverNetwork = kCfg.over_network != 0;
    // A word of data that nobody stores: sums are converted, and a NaN becomes 0x7fff.
    static constexpr uint32_t kPoison = 0xffffffffu;

    const LowLatencyCombineArgs<kCfg>& args;
    const low_latency::Session<kOverNetwork>& session;
    LowLatencyCombineShared<kCfg>& shared;
    int32_t num_local_experts, num_vectors, num_pieces, warp, lane;
    int64_t slot_bytes;
    int32_t max_tokens;        // of any rank
    int32_t sources_per_turn;  // of a sender
    int32_t num_groups;        // of sources
    int32_t num_row_blocks;    // that send rows

    __device__ uint8_t* slot(int32_t rank, int32_t token, int32_t number) const {
        return args.areas[rank] + args.rows_offset + (int64_t{token} * args.num_slots + number) * slot_bytes;
    }
    __device__ uint64_t* weights(int32_t rank, int32_t src) const {
        return reinterpret_cast<uint64_t*>(args.areas[rank] + args.weights_offset) +
               int64_t{src} * args.num_max_tokens * args.num_topk;
    }
    // The same in the outbox, for rank `dst`, and here: the word behind a row that `src` has put.
    __device__ uint8_t* out_slot(int32_t dst, int32_t token) const {
        return args.areas[args.rank] + args.out_rows_offset +
               (int64_t{dst} * args.num_max_tokens + token) * slot_bytes;
    }
    __device__ uint64_t* out_weights(int32_t dst) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.out_weights_offset) +
               int64_t{dst} * args.num_max_tokens * args.num_topk;
    }
    __device__ uint64_t* landed(int32_t src, int32_t token) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.landed_offset) +
               int64_t{src} * args.num_max_tokens + token;
    }
    // The expert of a pair that takes part: where it was sent, unless the caller has taken it out since.
    __device__ int32_t expert(int64_t pair) const {
        const int32_t sent = args.sent_ids[pair];
        if (args.topk_weights == nullptr) return sent;
        const int32_t now = low_latency::expert_of(low_latency::load_id(args.topk_idx, args.idx_bytes, pair),
                                                   args.num_experts);
        return now == sent ? sent : -1;
    }
    // A sender begins behind itself, so that not all of them send to one rank at a time.
    __device__ int32_t source(int32_t sender, int32_t number) const {
        const int32_t src = sender + 1 + number;
        return src < args.num_ranks ? src : src - args.num_ranks;
    }
    __device__ int32_t number_of(int32_t sender, int32_t src) const {
        return src > sender ? src - sender - 1 : src - sender - 1 + args.num_ranks;
    }
    __device__ int32_t turn_of(int32_t token, int32_t group, int32_t piece) const {
        return (token * num_groups + group) * num_pieces + piece;
    }

    // Send phase.
    __device__ void send_weights(int32_t dst) const;
    __device__ Reason send_rows(int32_t block) const;
    __device__ Reason send_turn(int32_t turn) const;
    __device__ void put_row(int32_t token, int32_t dst, bool is_of_block) const;
    __device__ Reason put_rows(int32_t block) const;
    __device__ Reason gather(int32_t token, int32_t first, int32_t num_sources, uint32_t ranks,
                             int32_t& num_entries) const;
    __device__ void send_entries(int32_t token, int32_t piece, int32_t lister, int32_t num_entries) const;
    __device__ void push(int32_t dst, int32_t token, int32_t number, int32_t piece,
                         const uint4 (&vectors)[2]) const;

    // Receive phase.
    __device__ Reason await_ranks(bool is_first) const;
    __device__ Reason await_rows(int32_t src) const;
    __device__ Reason sum_tokens(int32_t block, int32_t num_blocks) const;
    __device__ Reason sum_piece(int32_t token, int32_t piece) const;
    template <int32_t kDepth>
    __device__ Reason poll_slots(int32_t token, int32_t piece, const int32_t (&numbers)[kDepth],
                                 wire::Parcel (&parcels)[kDepth]) const;
};

}  // namespace ep

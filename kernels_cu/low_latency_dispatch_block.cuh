// What a block of the low-latency dispatch knows: its arguments, what it holds in shared memory, its parts.
#pragma once
#include "fp8.cuh"
#include "low_latency.cuh"

namespace ep {

struct LowLatencyDispatchCfg {
    int num_threads, quantizes, over_network;
};

enum ScaleMode : int32_t { kFloatScales = 0, kRoundedScales = 1, kPackedScales = 2 };

template <LowLatencyDispatchCfg kCfg>
struct LowLatencyDispatchArgs {
    HangRecord* hang;
    Workspace* workspace;
    LowLatencyState* state;
    LowLatencyRecord* record;
    uint64_t* masks;
    // Of the send phase. [T, K]; no weights: nullptr.
    const uint8_t* x;
    const void* topk_idx;
    const float* topk_weights;
    int32_t* sent_ids;  // of the handle, [T, K], -1 for none
    // Of the receive phase. El local experts, M tokens at most, R ranks.
    uint8_t* recv_x;        // [El, R*M, hidden]; nullptr: rows stay in the landing zone
    uint32_t* recv_sf;      // the same, [El, scale words, R*M]
    int32_t* recv_count;    // [El]
    int32_t* src_info;      // [El, R*M], -1 past the last row
    int32_t* expert_rows;   // [El, R*M]: of the landing zone, -1 past the last one; nullptr: not wanted
    int64_t* layout_range;  // [El, R]: (first row << 32) | rows
    Route* routes;          // [R, M, K]
    int32_t* recv_stats;    // [El], added to; or nullptr
    int64_t* wait_stats;    // [R], microseconds, added to; or nullptr
    uint64_t timeout_ns;
    // Within the area of every rank, of this zone.
    int64_t ids_offset;              // uint64 [R, words], stamped: two ids each
    int64_t weights_offset;          // uint64 [R, M*K], stamped
    int64_t places_offset;           // uint64 [R, M*K], stamped: the row of recv_x for a pair
    int64_t rows_offset, sf_offset;  // [R, M] rows
    uint32_t digest;
    int32_t rank, num_ranks, num_tokens, num_topk, num_experts, num_max_tokens, hidden, idx_bytes;
    int32_t scale_mode, has_weights, zone, phases, max_send_blocks, num_clear_blocks;
    int32_t num_list_blocks;  // for each source rank
    int32_t num_copy_blocks;
    // Over several nodes: which ranks are of this one, and within the area what comes and goes by puts.
    int32_t first_rank, num_local_ranks;
    int64_t landed_offset;                       // uint64 [2, R, M], stamped: of rows, of scale factors
    int64_t out_ids_offset, out_weights_offset;  // [R], as above, for each rank
    int64_t out_rows_offset, out_sf_offset;      // [M] rows
    uint8_t* slabs[kMaxLocalRanks];
    uint8_t* areas[low_latency::kMaxPeers<kCfg.over_network != 0>];  // nullptr where stores do not reach
};

// An expert in half a word, -1 for none, and the word of two.
constexpr uint32_t kNoExpert = 0xffff;
__device__ inline int32_t expert_in(uint64_t word, int32_t half) {
    const uint32_t e = static_cast<uint32_t>(word) >> (16 * half) & 0xffff;
    return e == kNoExpert ? -1 : static_cast<int32_t>(e);
}
__device__ inline uint32_t word_of(const int32_t (&experts)[2]) {
    return (static_cast<uint32_t>(experts[0]) & kNoExpert) | static_cast<uint32_t>(experts[1]) << 16;
}

template <LowLatencyDispatchCfg kCfg>
struct LowLatencyDispatchShared {
    // Ids that are looked at together, and so few that one warp looks at all of them.
    static constexpr int32_t kPairsEach = 4, kStretch = kPairsEach * kCfg.num_threads;
    static constexpr int32_t kFewPairs = 2 * kWarpSize;

    static constexpr int32_t kPeers = low_latency::kMaxPeers<kCfg.over_network != 0>;

    low_latency::Found found;
    int32_t tokens[kPeers];                             // of each source rank
    uint64_t waited_ns[kPeers];                         // for that; with masks for their rows, too
    int32_t counts[kMaxLocalRanks * kMaxLocalExperts];  // [src][expert]: pairs for our experts
    int16_t experts[kStretch];                          // of one source: of ours, -1 for others
    uint32_t
        wanted[kCfg.over_network != 0 ? kCfg.num_threads / kWarpSize : 1];  // ranks, of a row that is put
    union {
        int32_t listed[kMaxLocalRanks * kMaxLocalExperts];  // pairs of one source for all experts
        struct {
            int32_t base[kMaxLocalExperts];  // rows of the expert before the stretch
            uint16_t numbers[kCfg.num_threads / kWarpSize][kMaxLocalExperts];  // [warp]: rows in the stretch
        } lists;
    };
};

template <LowLatencyDispatchCfg kCfg>
struct LowLatencyDispatchBlock {
    static constexpr int32_t kNumWarps = kCfg.num_threads / kWarpSize;
    static constexpr bool kQuantizes = kCfg.quantizes != 0, kOverNetwork = kCfg.over_network != 0;
    static constexpr int32_t kPartVectors = 8 * kWarpSize;  // of a row, that a warp copies in one turn
    // Rounds, times ranks that they go to, from which on flags in between pay: two H200 took 45 us instead of
    // 51 at 14, and 13.1 instead of 12.4 at 4.
    static constexpr int32_t kLongRounds = 8;
    static constexpr int32_t kScaleDepth = 4;  // words of scale factors that a lane has on their way

    using Shared = LowLatencyDispatchShared<kCfg>;

    const LowLatencyDispatchArgs<kCfg>& args;
    const low_latency::Session<kOverNetwork>& session;
    Shared& shared;
    int32_t num_local_experts, num_vectors, num_pieces, warp, lane;

    __device__ int64_t row_bytes() const { return int64_t{args.hidden} * (kQuantizes ? 1 : 2); }
    __device__ int32_t scale_words() const {
        const int32_t num_scales = args.hidden / fp8::kChannelsPerScale;
        return args.scale_mode == kPackedScales ? (num_scales + 3) / 4 : num_scales;
    }
    // Rows of all source ranks that an expert has room for.
    __device__ int64_t rows_per_expert() const { return int64_t{args.num_ranks} * args.num_max_tokens; }
    __device__ uint8_t* row(int32_t rank, int32_t src, int32_t token) const {
        return args.areas[rank] + args.rows_offset +
               (int64_t{src} * args.num_max_tokens + token) * row_bytes();
    }
    __device__ uint32_t* scales(int32_t rank, int32_t src, int32_t token) const {
        return reinterpret_cast<uint32_t*>(args.areas[rank] + args.sf_offset) +
               (int64_t{src} * args.num_max_tokens + token) * scale_words();
    }
    // What `src` tells `rank` of its pairs of (token, column).
    __device__ uint64_t* ids(int32_t rank, int32_t src) const {
        return reinterpret_cast<uint64_t*>(args.areas[rank] + args.ids_offset) +
               int64_t{src} * num_id_words(args.num_max_tokens);
    }
    __device__ uint64_t* weights(int32_t rank, int32_t src) const {
        return reinterpret_cast<uint64_t*>(args.areas[rank] + args.weights_offset) +
               int64_t{src} * args.num_max_tokens * args.num_topk;
    }
    __device__ Route* routes(int32_t src) const {
        return args.routes + int64_t{src} * args.num_max_tokens * args.num_topk;
    }
    // What those who list tell those who copy of the pairs of `src`.
    __device__ uint64_t* places(int32_t src) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.places_offset) +
               int64_t{src} * args.num_max_tokens * args.num_topk;
    }
    // Ids, weights, rows with their scale factors as they lie in the outbox; what is for whom.
    __device__ uint64_t* out_ids(int32_t dst) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.out_ids_offset) +
               int64_t{dst} * num_id_words(args.num_max_tokens);
    }
    __device__ uint64_t* out_weights(int32_t dst) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.out_weights_offset) +
               int64_t{dst} * args.num_max_tokens * args.num_topk;
    }
    __device__ uint8_t* out_row(int32_t token) const {
        return args.areas[args.rank] + args.out_rows_offset + token * row_bytes();
    }
    __device__ uint32_t* out_scales(int32_t token) const {
        return reinterpret_cast<uint32_t*>(args.areas[args.rank] + args.out_sf_offset) +
               int64_t{token} * scale_words();
    }
    // Here: the word behind a row that `src` has put, or behind its scale factors.
    enum Landing : int32_t { kRow = 0, kScales = 1 };
    __device__ uint64_t* landed(Landing what, int32_t src, int32_t token) const {
        return reinterpret_cast<uint64_t*>(args.areas[args.rank] + args.landed_offset) +
               (int64_t{what} * args.num_ranks + src) * args.num_max_tokens + token;
    }
    __device__ int32_t num_id_words(int32_t num_tokens) const { return (num_tokens * args.num_topk + 1) / 2; }
    __device__ low_latency::RawId load_id(int64_t i) const {
        return low_latency::load_id(args.topk_idx, args.idx_bytes, i);
    }
    __device__ int32_t expert(low_latency::RawId id) const {
        return low_latency::expert_of(id, args.num_experts);
    }
    __device__ int32_t num_send_blocks(int32_t num_tokens) const {
        return low_latency::num_send_blocks(int64_t{num_tokens} * num_pieces, args.max_send_blocks);
    }

    // When a block has sent what: its warps take turns in rounds, turn u in round u / (blocks * warps). Where
    // rows are copied to their experts, and what is sent takes long, it posts a flag behind each wave of
    // rounds, so that copies need not wait for all of it.
    struct Waves {
        int32_t turns_per_wave, num;

        // Which of a block's flags says that a wave has landed, or a turn. The last one says it of all.
        __device__ int32_t flag_behind(int32_t wave) const { return wave + 1 == num ? 0 : wave + 1; }
        __device__ int32_t flag_of(int32_t turn) const { return flag_behind(turn / turns_per_wave); }
    };
    __device__ Waves waves(int32_t num_turns, int32_t num_blocks) const {
        const int32_t turns_per_round = max(1, num_blocks * kNumWarps);
        const int32_t num_rounds = max(1, (num_turns + turns_per_round - 1) / turns_per_round);
        const bool takes_long = num_rounds * args.num_ranks >= kLongRounds;
        const int32_t most = args.num_copy_blocks != 0 && takes_long ? kMaxWaves : 1;
        const int32_t turns_per_wave = (num_rounds + most - 1) / most * turns_per_round;
        return {turns_per_wave, max(1, (num_turns + turns_per_wave - 1) / turns_per_wave)};
    }

    // Notes that a peer was waited for in vain. With masks one that is late is not to blame.
    __device__ void blame(Reason reason, int32_t peer) const {
        if (reason != kNothing && (reason != kExpired || args.masks == nullptr))
            atomicOr(&shared.found.missing, 1u << peer);
    }

    // Of an expert of all, which of ours it is; -1 for others and none.
    __device__ int32_t local_expert(int32_t e) const {
        return low_latency::is_of_rank(e, args.rank, num_local_experts) ? e - args.rank * num_local_experts
                                                                        : -1;
    }

    // Send phase. What it begins with is loaded before the block begins.
    struct Pairs {  // two of them, for a word
        low_latency::RawId ids[2];
        float weights[2];
    };
    // Of words that a thread loads together: these have to leave before the rows crowd the links.
    static constexpr int32_t kPairsDepth = 2;
    struct PairsBatch {
        Pairs words[kPairsDepth];
    };
    struct Piece {
        uint4 vectors[2];
        low_latency::RawId ids[2];  // columns `lane` and `lane` + 32
    };
    __device__ PairsBatch load_pairs(int32_t first) const;
    __device__ Reason send_metadata(int32_t dst, PairsBatch batch) const;
    __device__ void clear_lists(int32_t block) const;
    __device__ int32_t vector_of(int32_t piece, int32_t v) const;
    __device__ Piece load_piece(int32_t turn) const;
    struct Cast {
        uint4 vectors[2];  // of FP8 the first one alone
        uint32_t scale;
    };
    __device__ uint32_t destinations(const Piece& piece) const;
    __device__ Cast cast(const Piece& current, int32_t piece) const;
    __device__ void store(const Cast& from, int32_t piece, uint8_t* row, uint32_t* scales) const;
    __device__ void send_piece(int32_t turn, const Piece& current, uint32_t reachable) const;
    __device__ Reason send_rows(int32_t block, int32_t num_blocks, Piece next) const;
    __device__ void put_row(int32_t token, int32_t dst, bool is_of_block) const;
    __device__ void put_rows(int32_t block, int32_t num_blocks, uint32_t ranks) const;

    // Receive phase. The pairs of a source rank that a block lists; of none in blocks that make no lists.
    struct Share {
        int32_t src, first, end;
    };
    static constexpr Share kNoShare{-1, 0, 0};
    // `list_block` of those that make lists.
    __device__ Share share_of(int32_t list_block) const {
        const int32_t num_pairs = args.num_max_tokens * args.num_topk;
        // An even number, as words have two.
        const int32_t each = align_up((num_pairs + args.num_list_blocks - 1) / args.num_list_blocks, 2);
        const int32_t first = min(num_pairs, list_block / args.num_ranks * each);
        return {list_block % args.num_ranks, first, min(num_pairs, first + each)};
    }
    __device__ void clear_counts(int32_t first_src, int32_t last_src, const Share& share) const;
    __device__ void count(uint64_t word, int32_t src, int32_t at, const Share& share) const;
    __device__ Reason read_words(int32_t src, int32_t first, int32_t step, const Share& share) const;
    __device__ Reason read_ids(int32_t first_src, int32_t last_src, const Share& share) const;
    __device__ Reason read_sources(const Share& share) const;
    __device__ Reason load_experts(int32_t src, int32_t first, int32_t num) const;
    template <class Each>
    __device__ void of_warp(int32_t num_loaded, uint16_t* numbers, Each each) const;
    __device__ void place_pair(int32_t src, int32_t pair, int32_t e, int32_t number) const;
    __device__ Reason list_few(const Share& share) const;
    __device__ Reason list_pairs(const Share& share) const;
    __device__ Reason tell(int32_t part) const;
    __device__ Reason list(const Share& share) const;
    __device__ Reason copy_rows(int32_t block, int32_t num_blocks) const;
    __device__ Reason await_tokens() const;
    __device__ Reason await_id(int32_t src, int32_t pair, bool& is_ours) const;
    __device__ Reason await_place(int32_t src, int32_t pair, int32_t& row) const;
    __device__ Reason copy_row(int32_t src, int32_t token, int32_t part) const;
    __device__ Reason await_rows(int32_t src, int32_t num_flags) const;
};

}  // namespace ep

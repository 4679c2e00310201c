// The send phase of the low-latency dispatch: what goes where, and the rows.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// What a thread tells next: word `first`, and others a block further on each; nothing past the last pair.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ typename LowLatencyDispatchBlock<kCfg>::PairsBatch
LowLatencyDispatchBlock<kCfg>::load_pairs(int32_t first) const {
    PairsBatch batch;
#pragma unroll
    for (int32_t v = 0; v < kPairsDepth; ++v) {
        batch.words[v] = {{low_latency::kNoId, low_latency::kNoId}, {0.0f, 0.0f}};
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
            const int32_t pair = 2 * (first + v * kCfg.num_threads) + half;
            if (pair >= args.num_tokens * args.num_topk) continue;
            batch.words[v].ids[half] = load_id(pair);
            if (args.topk_weights != nullptr) batch.words[v].weights[half] = args.topk_weights[pair];
        }
    }
    return batch;
}

// What rank `dst` lists our rows from: all our ids, and the weights of the pairs that it gets. Nothing is
// counted first, so that these words leave before the rows crowd the links.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_metadata(int32_t dst, PairsBatch batch) const {
    const int32_t num_words = num_id_words(args.num_tokens);
    const Reason reason = low_latency::await_zone(session, shared.found);
    if (reason != kNothing || !(shared.found.ranks >> dst & 1)) return reason;

    const uint64_t epoch = session.call.epoch;
    if (threadIdx.x == 0)
        session.tell(
            dst, [&](LowLatencyArea* at) { return &at->num_tokens[args.zone][args.rank]; },
            stamped(epoch, args.num_tokens));
    if (threadIdx.x == kWarpSize)
        session.tell(
            dst, [&](LowLatencyArea* at) { return &at->digests[args.zone][args.rank]; },
            stamped(epoch, args.digest));
    const bool is_reached = session.reaches(dst);
    uint64_t* to_ids = is_reached ? ids(dst, args.rank) : out_ids(dst);
    uint64_t* to_weights = is_reached ? weights(dst, args.rank) : out_weights(dst);
    // A put carries something, and all of a list.
    const int32_t num_pairs = args.num_tokens * args.num_topk;
    const int32_t num_stored = is_reached ? num_words : max(1, num_words);
    const int32_t num_weights = args.topk_weights == nullptr ? 0 : max(1, num_pairs);
#pragma unroll 1
    for (int32_t first = threadIdx.x;;) {
#pragma unroll
        for (int32_t v = 0; v < kPairsDepth; ++v) {
            const Pairs pairs = batch.words[v];
            const int32_t at = first + v * kCfg.num_threads;
            if (at >= num_stored) break;
            const int32_t experts[2] = {expert(pairs.ids[0]), expert(pairs.ids[1])};
            ptx::st_relaxed_sys(&to_ids[at], stamped(epoch, word_of(experts)));
#pragma unroll
            for (int32_t half = 0; half < 2; ++half) {
                const bool is_wanted = low_latency::is_of_rank(experts[half], dst, num_local_experts);
                if (is_reached ? is_wanted && num_weights != 0 : 2 * at + half < num_weights)
                    ptx::st_relaxed_sys(&to_weights[2 * at + half],
                                        stamped(epoch, __float_as_uint(pairs.weights[half])));
            }
        }
        first += kPairsDepth * kCfg.num_threads;
        if (first >= num_stored) break;
        batch = load_pairs(first);
    }
    if constexpr (kOverNetwork) {
        if (!is_reached) {
            __syncthreads();
            LowLatencyArea* own = session.own();
            const uint64_t word = stamped(epoch, 1);
            if (warp == 0)
                network::put_signal_warp(ids(args.rank, args.rank), to_ids, int64_t{8} * num_stored,
                                         &own->told_ids[args.zone][args.rank], word, dst);
            if (warp == 1 && num_weights != 0)
                network::put_signal_warp(weights(args.rank, args.rank), to_weights, int64_t{8} * num_weights,
                                         &own->told_weights[args.zone][args.rank], word, dst);
            return kNothing;
        }
    }
    // A receiver that may go on without us wants to know first that all of this is there.
    if (args.masks != nullptr) {
        __syncthreads();
        if (threadIdx.x == 0)
            ptx::st_release_sys(
                &session.area(dst)->flags[args.zone][args.rank][0][num_send_blocks(args.num_tokens)],
                stamped(epoch, 1));
    }
    return kNothing;
}

// All lists end everywhere, till those who list fill them.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::clear_lists(int32_t block) const {
    constexpr int32_t kEach = sizeof(int4) / sizeof(int32_t);
    const int64_t num = num_local_experts * rows_per_expert();
    const int32_t first = block * blockDim.x + threadIdx.x, step = args.num_clear_blocks * blockDim.x;
    const auto clear = [&](int32_t* list) {
#pragma unroll 1
        for (int64_t i = first; i < num / kEach; i += step)
            reinterpret_cast<int4*>(list)[i] = make_int4(-1, -1, -1, -1);
        if (first < num % kEach) list[num - 1 - first] = -1;
    };
    clear(args.src_info);
    if (args.expert_rows != nullptr) clear(args.expert_rows);
    if (!(args.phases & low_latency::kReceives)) return;
    __syncthreads();
    if (threadIdx.x == 0)
        ptx::st_release_gpu(&session.state->cleared[args.zone][block], stamped(session.call.epoch, 1));
}

// Which vector of a row a lane has as the v-th one of a piece: two neighbours where they become one of FP8.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ int32_t LowLatencyDispatchBlock<kCfg>::vector_of(int32_t piece, int32_t v) const {
    return piece * low_latency::kPieceVectors + (kQuantizes ? 2 * lane + v : v * kWarpSize + lane);
}

// A lane's part of a piece of a row of ours, and of its ids; zeros and none past the last turn.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ typename LowLatencyDispatchBlock<kCfg>::Piece
LowLatencyDispatchBlock<kCfg>::load_piece(int32_t turn) const {
    Piece piece{{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}, {low_latency::kNoId, low_latency::kNoId}};
    if (turn >= args.num_tokens * num_pieces) return piece;
    const int32_t token = turn / num_pieces;
    const auto* row = reinterpret_cast<const uint4*>(args.x + int64_t{token} * args.hidden * 2);
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t vector = vector_of(turn % num_pieces, v), k = v * kWarpSize + lane;
        if (vector < num_vectors) piece.vectors[v] = ptx::ld_stream(&row[vector]);
        if (k < args.num_topk) piece.ids[v] = load_id(int64_t{token} * args.num_topk + k);
    }
    return piece;
}

// Bits of the ranks that own an expert of a token; the same in all lanes of a warp.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ uint32_t LowLatencyDispatchBlock<kCfg>::destinations(const Piece& piece) const {
    uint32_t mine = 0;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t e = expert(piece.ids[v]);
        if (e >= 0) mine |= 1u << (e / num_local_experts);
    }
    return __reduce_or_sync(kFullWarp, mine);
}

// A lane's part of a piece as it travels.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ typename LowLatencyDispatchBlock<kCfg>::Cast LowLatencyDispatchBlock<kCfg>::cast(
    const Piece& current, int32_t piece) const {
    if constexpr (!kQuantizes) {
        return {{current.vectors[0], current.vectors[1]}, 0};
    } else {
        float factor;
        const uint4 cast = fp8::cast_pair(current.vectors, args.scale_mode != kFloatScales, factor);
        uint32_t scale = __float_as_uint(factor);
        if (args.scale_mode == kPackedScales) {
            // A piece has four scale factors, in lanes 0, 8, 16 and 24; 0 past the end of the row.
            const uint32_t exponent = vector_of(piece, 0) < num_vectors ? scale >> 23 : 0;
            scale = exponent;
#pragma unroll
            for (int32_t i = 1; i < 4; ++i)
                scale |= __shfl_sync(kFullWarp, exponent, i * fp8::kLanesPerPair) << (8 * i);
        }
        return {{cast, cast}, scale};
    }
}

// Stores a piece into a row, and its scale factors.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ void LowLatencyDispatchBlock<kCfg>::store(const Cast& from, int32_t piece,
                                                                     uint8_t* row, uint32_t* scales) const {
    auto* to = reinterpret_cast<uint4*>(row);
    const int32_t vector = vector_of(piece, 0);
    if constexpr (kQuantizes) {
        if (vector < num_vectors) to[vector / 2] = from.vectors[0];
        if (args.scale_mode == kPackedScales) {
            if (lane == 0) scales[piece] = from.scale;
        } else if (lane % fp8::kLanesPerPair == 0 && vector < num_vectors) {
            scales[vector / (2 * fp8::kLanesPerPair)] = from.scale;
        }
    } else {
#pragma unroll
        for (int32_t v = 0; v < 2; ++v)
            if (vector_of(piece, v) < num_vectors) to[vector_of(piece, v)] = from.vectors[v];
    }
}

// A piece to all of `reachable` that want it; with the first one of a row where the row went.
template <LowLatencyDispatchCfg kCfg>
__device__ __forceinline__ void LowLatencyDispatchBlock<kCfg>::send_piece(int32_t turn, const Piece& current,
                                                                          uint32_t reachable) const {
    constexpr int32_t kPeers = low_latency::kMaxPeers<kOverNetwork>, kUnrolled = kOverNetwork ? 1 : kPeers;
    const int32_t token = turn / num_pieces, piece = turn % num_pieces;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t k = v * kWarpSize + lane;
        if (piece == 0 && k < args.num_topk)
            args.sent_ids[int64_t{token} * args.num_topk + k] = expert(current.ids[v]);
    }
    const uint32_t wanted = destinations(current) & reachable;
    const Cast travels = cast(current, piece);
#pragma unroll kUnrolled
    for (int32_t d = 0; d < kPeers; ++d) {
        if (d >= args.num_ranks) break;
        const int32_t dst = args.rank + d < args.num_ranks ? args.rank + d : args.rank + d - args.num_ranks;
        if (!(wanted >> dst & 1)) continue;
        store(travels, piece, row(dst, args.rank, token), scales(dst, args.rank, token));
    }
}

// Our rows, once to each rank that owns an expert of them: warps take pieces in turn.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::send_rows(int32_t block, int32_t num_blocks,
                                                           Piece next) const {
    const int32_t num_turns = args.num_tokens * num_pieces, step = num_blocks * kNumWarps;
    const Reason reason = low_latency::await_zone(session, shared.found);
    if (reason != kNothing) return reason;
    uint32_t reachable = shared.found.ranks;
    if constexpr (kOverNetwork) {
        const uint32_t reached = low_latency::reached(session);
        // What takes longest first.
        put_rows(block, num_blocks, reachable & ~reached);
        reachable &= reached;
    }
    const Waves waves = this->waves(num_turns, num_blocks);
    int32_t turn = block + num_blocks * warp;
#pragma unroll 1
    for (int32_t wave = 0; wave < waves.num; ++wave) {
        const int32_t end = min(num_turns, (wave + 1) * waves.turns_per_wave);
#pragma unroll 1
        for (; turn < end; turn += step) {
            const Piece current = next;
            next = load_piece(turn + step);
            send_piece(turn, current, reachable);
        }
        low_latency::post_flags(session, shared.found, block, waves.flag_behind(wave));
    }
    return kNothing;
}

// A row of the outbox, and its scale factors, as one warp or as the whole block.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::put_row(int32_t token, int32_t dst, bool is_of_block) const {
    low_latency::put(session, row(args.rank, args.rank, token), out_row(token), row_bytes(),
                     landed(kRow, args.rank, token), dst, is_of_block);
    if constexpr (kQuantizes)
        low_latency::put(session, scales(args.rank, args.rank, token), out_scales(token),
                         int64_t{4} * scale_words(), landed(kScales, args.rank, token), dst, is_of_block);
}

// Rows to those of `ranks`, which stores do not reach, by way of the outbox, as one block: each warp looks at
// a token, all of them make the pieces of what was found, and share the puts; a few are made by the whole
// block.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::put_rows(int32_t block, int32_t num_blocks,
                                                        uint32_t ranks) const {
    if (ranks == 0) return;
#pragma unroll 1
    for (int32_t first = block; first < args.num_tokens; first += num_blocks * kNumWarps) {
        const auto token_of_warp = [&](int32_t w) { return first + num_blocks * w; };
        const uint32_t wanted = destinations(load_piece(token_of_warp(warp) * num_pieces)) & ranks;
        if (lane == 0) shared.wanted[warp] = wanted;
        __syncthreads();
        int32_t num_rows = 0, num_puts = 0;
#pragma unroll 1
        for (int32_t w = 0; w < kNumWarps; ++w) {
            if (shared.wanted[w] == 0) continue;
            const int32_t token = token_of_warp(w);
#pragma unroll 1
            for (int32_t piece = 0; piece < num_pieces; ++piece)
                if ((num_rows * num_pieces + piece) % kNumWarps == warp)
                    store(cast(load_piece(token * num_pieces + piece), piece), piece, out_row(token),
                          out_scales(token));
            ++num_rows;
            num_puts += __popc(shared.wanted[w]);
        }
        __syncthreads();
        const bool is_of_block = num_puts <= low_latency::kMaxBlockPuts;
        int32_t number = 0;
#pragma unroll 1
        for (int32_t w = 0; w < kNumWarps; ++w) {
            const int32_t num_dsts = __popc(shared.wanted[w]);
#pragma unroll 1
            for (int32_t which = 0; which < num_dsts; ++which, ++number)
                if (is_of_block || number % kNumWarps == warp)
                    put_row(token_of_warp(w), low_latency::rank_behind(args.rank, shared.wanted[w], which),
                            is_of_block);
        }
        __syncthreads();  // all have read what is wanted
    }
}

}  // namespace ep

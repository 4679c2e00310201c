// The send phase of the low-latency combine: weights to the experts' ranks, and rows back to the ranks of
// the tokens.
#pragma once
#include "low_latency_combine_block.cuh"

namespace ep {

// A weight, and whether its pair takes part, stamped with the epoch.
__host__ __device__ constexpr uint64_t weight_word(uint64_t epoch, bool takes_part, uint32_t bits) {
    return stamped(2 * epoch + takes_part, bits);
}

// To rank `dst`: the weights of the pairs that its experts got.
template <LowLatencyCombineCfg kCfg>
__device__ void LowLatencyCombineBlock<kCfg>::send_weights(int32_t dst) const {
    const bool is_reached = session.reaches(dst);
    const int32_t num_pairs = args.num_tokens * args.num_topk;
    uint64_t* to = is_reached ? weights(dst, args.rank) : out_weights(dst);
    bool has_pair = false;
    for (int32_t i = threadIdx.x; i < num_pairs; i += blockDim.x) {
        const int32_t sent = args.sent_ids[i];
        const bool is_wanted = low_latency::is_of_rank(sent, dst, num_local_experts);
        has_pair |= is_wanted;
        if (is_reached && !is_wanted) continue;
        ptx::st_relaxed_sys(
            &to[i], weight_word(session.call.epoch, expert(i) >= 0, __float_as_uint(args.topk_weights[i])));
    }
    if constexpr (kOverNetwork) {
        // Who has no pair of ours waits for no weights, and may free the zone before they come.
        const bool is_awaited = __syncthreads_or(has_pair) != 0;
        if (!is_reached && is_awaited)
            low_latency::put(session, weights(args.rank, args.rank), to, int64_t{8} * num_pairs,
                             &session.own()->told_weights[args.zone][args.rank], dst, true);
    }
}

// Lists the rows of a token of the sources number [first, first + num_sources), those of `ranks` alone, in
// the order of source and column, as a warp. At most kMaxEntries pairs are looked at.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::gather(int32_t token, int32_t first, int32_t num_sources,
                                                       uint32_t ranks, int32_t& num_entries) const {
    const int32_t num_pairs = num_sources * args.num_topk;
    Route routes[2];
    int32_t sources[2];
    bool takes_part[2] = {false, false};
    Reason reason = kNothing;
    const auto has = [&](int32_t v) { return v * kWarpSize < num_pairs; };
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (!has(v)) continue;
        const int32_t pair = v * kWarpSize + lane, k = pair % args.num_topk;
        sources[v] = source(args.rank, first + pair / args.num_topk);
        const int64_t at = (int64_t{sources[v]} * args.num_max_tokens + token) * args.num_topk + k;
        routes[v] = {-1, 0.0f};
        if (pair < num_pairs && (ranks >> sources[v] & 1)) routes[v] = args.routes[at];
    }
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (!has(v)) continue;
        const int32_t k = (v * kWarpSize + lane) % args.num_topk;
        takes_part[v] = routes[v].row >= 0;
        if (!takes_part[v] || !args.sends_weights || reason != kNothing) continue;
        uint64_t seen;
        if (!session.reaches(sources[v])) {
            uint64_t* told = &session.own()->told_weights[args.zone][sources[v]];
            reason = low_latency::await_put(session, told, sources[v]);
        }
        const auto stamp = [](uint64_t word) { return static_cast<uint32_t>(word >> 32); };
        if (reason == kNothing)
            reason = low_latency::await_word(
                session, &weights(args.rank, sources[v])[token * args.num_topk + k], sources[v], seen,
                [&](uint64_t word) {
                    return stamp(word) >> 1 == static_cast<uint32_t>(session.call.epoch) << 1 >> 1;
                });
        takes_part[v] = reason == kNothing && (stamp(seen) & 1) != 0;
        routes[v].weight = __uint_as_float(static_cast<uint32_t>(seen));
        reason = low_latency::settle(session, shared.found, reason, sources[v]);
    }
    const uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    if (worst != kNothing) return static_cast<Reason>(worst);
    const uint32_t low = __ballot_sync(kFullWarp, takes_part[0]),
                   high = __ballot_sync(kFullWarp, takes_part[1]);
    const uint64_t listed = low | static_cast<uint64_t>(high) << 32;
    __syncwarp();  // the entries of the last turn have been read
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (!takes_part[v]) continue;
        const int32_t pair = v * kWarpSize + lane, number = pair / args.num_topk;
        const uint64_t before = listed & ((uint64_t{1} << pair) - 1);
        const uint32_t at =
            __popc(static_cast<uint32_t>(before)) + __popc(static_cast<uint32_t>(before >> 32));
        // Pairs of the same source behind this one.
        const int32_t end = (number + 1) * args.num_topk;
        const uint64_t until = end >= 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
        const bool is_last = (listed & until) >> pair == 1;
        shared.entries[warp][at] = {
            routes[v].row, routes[v].weight,
            static_cast<uint32_t>(sources[v] | pair % args.num_topk << 8) | (is_last ? kLastEntry : 0)};
    }
    num_entries = __popc(low) + __popc(high);
    __syncwarp();
    return kNothing;
}

// Stores a piece of a row into a slot of its token's rank.
template <LowLatencyCombineCfg kCfg>
__device__ void LowLatencyCombineBlock<kCfg>::push(int32_t dst, int32_t token, int32_t number, int32_t piece,
                                                   const uint4 (&vectors)[2]) const {
    uint8_t* to = session.reaches(dst) ? slot(dst, token, number) : out_slot(dst, token);
    if constexpr (kWire != wire::kBfloat16) {
        wire::store<kWire>(to, args.hidden, piece, lane, vectors);
    } else {
#pragma unroll
        for (int32_t v = 0; v < 2; ++v) {
            const int32_t vector = wire::vector_of<kWire>(piece, lane, v);
            if (vector >= num_vectors) continue;
            uint4* at = reinterpret_cast<uint4*>(to) + vector;
            if (args.polls_data)
                ptx::st_relaxed_sys(at, vectors[v]);
            else
                *at = vectors[v];
        }
    }
}

// A piece of the rows that warp `lister` has listed, summed for each source, or each as it is.
template <LowLatencyCombineCfg kCfg>
__device__ void LowLatencyCombineBlock<kCfg>::send_entries(int32_t token, int32_t piece, int32_t lister,
                                                           int32_t num_entries) const {
    constexpr int32_t kDepth = 4;
    constexpr auto kElement = rows::kBfloat16;
    float sums[2][rows::kVectorElements<kElement>];
    bool is_first = true;
    for (int32_t first = 0; first < num_entries; first += kDepth) {
        uint4 vectors[kDepth][2];
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) {
            if (first + i >= num_entries) break;
            const int64_t row = shared.entries[lister][first + i].row;
            const auto* from = reinterpret_cast<const uint4*>(args.y + row * args.hidden * 2);
#pragma unroll
            for (int32_t v = 0; v < 2; ++v) {
                const int32_t vector = wire::vector_of<kWire>(piece, lane, v);
                vectors[i][v] = vector < num_vectors ? ptx::ld_stream(&from[vector]) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) {
            if (first + i >= num_entries) break;
            const CombineEntry entry = shared.entries[lister][first + i];
            const int32_t src = entry.what & 0xff;
            if (args.sums_at_source) {
                push(src, token, (entry.what & ~kLastEntry) >> 8, piece, vectors[i]);
                continue;
            }
            uint4 rounded[2];
#pragma unroll
            for (int32_t v = 0; v < 2; ++v) {
#pragma unroll
                for (float& sum : sums[v])
                    if (is_first) sum = rows::kNoTerm;
                rows::add_product<kElement>(sums[v], entry.weight, vectors[i][v]);
                rounded[v] = rows::rounded<kElement>(sums[v]);
            }
            is_first = (entry.what & kLastEntry) != 0;
            if (is_first) push(src, token, args.rank, piece, rounded);
        }
    }
}

// One token, some sources, one piece.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::send_turn(int32_t turn) const {
    const int32_t piece = turn % num_pieces, group = turn / num_pieces % num_groups;
    const int32_t token = turn / num_pieces / num_groups;
    const int32_t end = min(args.num_ranks, (group + 1) * sources_per_turn);
    const int32_t together = min(sources_per_turn, kMaxEntries / args.num_topk);
    uint32_t ranks = shared.found.ranks;
    if constexpr (kOverNetwork) ranks &= low_latency::reached(session);
    for (int32_t first = group * sources_per_turn; first < end; first += together) {
        int32_t num_entries = 0;
        const Reason reason = gather(token, first, min(together, end - first), ranks, num_entries);
        if (reason != kNothing) return reason;
        send_entries(token, piece, warp, num_entries);
    }
    return kNothing;
}

// A row of the outbox, as one warp or as the whole block.
template <LowLatencyCombineCfg kCfg>
__device__ void LowLatencyCombineBlock<kCfg>::put_row(int32_t token, int32_t dst, bool is_of_block) const {
    low_latency::put(session, slot(args.rank, token, args.rank), out_slot(dst, token),
                     wire::row_bytes<kWire>(args.hidden), landed(args.rank, token), dst, is_of_block);
}

// Rows to ranks that stores do not reach, by way of the outbox, as one block: each warp looks for a row, all
// of them make the pieces of what was found, and share the puts; a few are made by the whole block.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::put_rows(int32_t block) const {
    const uint32_t ranks = shared.found.ranks & ~low_latency::reached(session);
    if (ranks == 0) return kNothing;
    const int32_t num_dsts = __popc(ranks), num_turns = max_tokens * num_dsts;
    const auto token_of = [&](int32_t turn) { return turn / num_dsts; };
    const auto dst_of = [&](int32_t turn) {
        return low_latency::rank_behind(args.rank, ranks, turn % num_dsts);
    };
#pragma unroll 1
    for (int32_t first = block; first < num_turns; first += num_row_blocks * kNumWarps) {
        const auto turn_of_warp = [&](int32_t w) { return first + num_row_blocks * w; };
        const int32_t turn = turn_of_warp(warp);
        int32_t num_entries = 0;
        Reason reason = kNothing;
        if (turn < num_turns) {
            const int32_t number = number_of(args.rank, dst_of(turn));
            reason = gather(token_of(turn), number, 1, ranks, num_entries);
        }
        if (lane == 0) shared.num_entries[warp] = num_entries;
        reason = sync::agree(reason);
        if (reason != kNothing) return reason;
        int32_t num_rows = 0;
#pragma unroll 1
        for (int32_t w = 0; w < kNumWarps; ++w) {
            if (shared.num_entries[w] == 0) continue;
#pragma unroll 1
            for (int32_t piece = 0; piece < num_pieces; ++piece)
                if ((num_rows * num_pieces + piece) % kNumWarps == warp)
                    send_entries(token_of(turn_of_warp(w)), piece, w, shared.num_entries[w]);
            ++num_rows;
        }
        __syncthreads();
        const bool is_of_block = num_rows <= low_latency::kMaxBlockPuts;
#pragma unroll 1
        for (int32_t w = 0; w < kNumWarps; ++w)
            if (shared.num_entries[w] != 0 && (is_of_block || w == warp))
                put_row(token_of(turn_of_warp(w)), dst_of(turn_of_warp(w)), is_of_block);
        __syncthreads();  // all have read what there is
    }
    return kNothing;
}

// What block `block` of those that send rows sends.
template <LowLatencyCombineCfg kCfg>
__device__ Reason LowLatencyCombineBlock<kCfg>::send_rows(int32_t block) const {
    const int32_t num_turns = max_tokens * num_groups * num_pieces;
    Reason reason = kNothing;
    // What takes longest first.
    if constexpr (kOverNetwork) reason = put_rows(block);
    for (int32_t turn = block + num_row_blocks * warp; turn < num_turns && reason == kNothing;
         turn += num_row_blocks * kNumWarps)
        reason = send_turn(turn);
    reason = sync::agree(reason);
    if (reason == kNothing && !args.polls_data) low_latency::post_flags(session, shared.found, block);
    return reason;
}

}  // namespace ep

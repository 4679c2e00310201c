// Rows of the low-latency dispatch from where they land to their experts.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Waits, as one block, until the tokens of each source rank are known to it. With masks those who list have
// decided who takes part.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_tokens() const {
    const auto note = [&](int32_t src, uint32_t tokens) {
        shared.tokens[src] = static_cast<int32_t>(tokens);
    };
    if (args.masks != nullptr)
        return low_latency::await_blocks(session, session.state->listed[args.zone], args.num_ranks, note);
    const auto src = static_cast<int32_t>(threadIdx.x);
    Reason reason = kNothing;
    if (src < args.num_ranks) {
        uint64_t seen = 0;
        reason = low_latency::await_stamped(session, &session.own()->num_tokens[args.zone][src], src, seen);
        blame(reason, src);
        note(src, static_cast<uint32_t>(seen));
    }
    return sync::agree(reason);
}

// The rows of the landing zone to all their experts, in parts of a row for each turn of a warp: in the order
// in which sources send them, all sources at a time.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_rows(int32_t block, int32_t num_blocks) const {
    Reason reason = await_tokens();
    if (reason != kNothing) return reason;
    int32_t most_tokens = 0;
    for (int32_t src = 0; src < args.num_ranks; ++src) most_tokens = max(most_tokens, shared.tokens[src]);
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t num_parts = (num_row_vectors + kPartVectors - 1) / kPartVectors;
    const int32_t num_turns = most_tokens * args.num_ranks * num_parts;
#pragma unroll 1
    for (int32_t turn = block + num_blocks * warp; turn < num_turns && reason == kNothing;
         turn += num_blocks * kNumWarps) {
        const int32_t number = turn / num_parts, src = number % args.num_ranks,
                      token = number / args.num_ranks;
        if (token < shared.tokens[src]) reason = copy_row(src, token, turn % num_parts);
    }
    return reason;
}

// Whether a column of a token is an expert of ours, as one thread, once its ids are there.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_id(int32_t src, int32_t pair, bool& is_ours) const {
    Reason reason = kNothing;
    if (!session.reaches(src)) {
        reason = low_latency::await_put(session, &session.own()->told_ids[args.zone][src], src);
        if (reason != kNothing) return reason;
    }
    uint64_t word = 0;
    reason = low_latency::await_stamped(session, ids(args.rank, src) + pair / 2, src, word);
    is_ours = local_expert(expert_in(word, pair % 2)) >= 0;
    return reason;
}

// Part of a row to all its experts, as a warp; with the first part its scale factors. The same reason in all
// lanes. The row is on its way to registers while the pairs are listed.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_row(int32_t src, int32_t token, int32_t part) const {
    constexpr int32_t kDepth = kPartVectors / kWarpSize;
    // Vectors of a row in a piece of it.
    constexpr int32_t kPieceVectors = low_latency::kPieceVectors / (kQuantizes ? 2 : 1);
    const bool with_scales = kQuantizes && part == 0;
    const int32_t first_pair = token * args.num_topk;
    uint32_t ours[2];
    Reason reason = kNothing;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        const int32_t k = v * kWarpSize + lane;
        bool is_ours = false;
        if (k < args.num_topk && reason == kNothing) reason = await_id(src, first_pair + k, is_ours);
        ours[v] = __ballot_sync(kFullWarp, is_ours);
    }
    blame(reason, src);
    uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    if (worst != kNothing || (ours[0] | ours[1]) == 0) return static_cast<Reason>(worst);

    // The pieces that this part lies in; each came from some block of the source.
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t first_vector = part * kPartVectors;
    const int32_t end_vector = min(num_row_vectors, first_vector + kPartVectors);
    const int32_t first_piece = with_scales ? 0 : first_vector / kPieceVectors;
    const int32_t end_piece = with_scales ? num_pieces : (end_vector + kPieceVectors - 1) / kPieceVectors;
    const int32_t num_blocks = num_send_blocks(shared.tokens[src]);
    const Waves waves = this->waves(shared.tokens[src] * num_pieces, num_blocks);
    if (!session.reaches(src)) {
        const auto what = static_cast<Landing>(lane);
        if (lane == kRow || (lane == kScales && with_scales))
            reason = low_latency::await_put(session, landed(what, src, token), src);
    } else {
#pragma unroll 1
        for (int32_t piece = first_piece + lane; piece < end_piece && reason == kNothing;
             piece += kWarpSize) {
            const int32_t turn = token * num_pieces + piece;
            const uint64_t* flag =
                &session.own()->flags[args.zone][src][waves.flag_of(turn)][turn % num_blocks];
            uint64_t seen;
            reason = low_latency::await_stamped<low_latency::kAcquires>(session, flag, src, seen);
        }
    }
    blame(reason, src);
    worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    __syncwarp();  // what one lane acquired, all lanes may read
    if (worst != kNothing) return static_cast<Reason>(worst);

    const auto* from = reinterpret_cast<const uint4*>(row(args.rank, src, token));
    uint4 vectors[kDepth];
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        const int32_t vector = first_vector + i * kWarpSize + lane;
        if (vector < end_vector) vectors[i] = from[vector];
    }
    const uint32_t* from_scales = scales(args.rank, src, token);
    const int32_t num_words = with_scales ? scale_words() : 0;
    uint32_t words[kScaleDepth];
    const auto load_words = [&](int32_t first) {
#pragma unroll
        for (int32_t i = 0; i < kScaleDepth; ++i) {
            const int32_t word = first + i * kWarpSize + lane;
            if (word < num_words) words[i] = from_scales[word];
        }
    };
    load_words(0);
    int32_t to_rows[2];
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        if (!(ours[v] >> lane & 1) || reason != kNothing) continue;
        reason = await_place(src, first_pair + v * kWarpSize + lane, to_rows[v]);
    }
    if (__any_sync(kFullWarp, reason != kNothing)) return kLeft;
#pragma unroll
    for (int32_t v = 0; v < 2; ++v) {
        for (uint32_t left = ours[v]; left != 0; left &= left - 1) {
            const int32_t from_lane = __ffs(static_cast<int32_t>(left)) - 1;
            const int64_t to_row = __shfl_sync(kFullWarp, to_rows[v], from_lane);
            auto* to = reinterpret_cast<uint4*>(args.recv_x + to_row * row_bytes());
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                const int32_t vector = first_vector + i * kWarpSize + lane;
                if (vector < end_vector) to[vector] = vectors[i];
            }
            if constexpr (kQuantizes) {
                const auto num_rows = static_cast<uint32_t>(rows_per_expert());
                const uint32_t e = static_cast<uint32_t>(to_row) / num_rows;
                uint32_t* to_words = args.recv_sf + int64_t{e} * (scale_words() - 1) * num_rows + to_row;
#pragma unroll 1
                for (int32_t first = 0; first < num_words; first += kScaleDepth * kWarpSize) {
                    if (num_words > kScaleDepth * kWarpSize) load_words(first);
#pragma unroll
                    for (int32_t i = 0; i < kScaleDepth; ++i) {
                        const int32_t word = first + i * kWarpSize + lane;
                        if (word < num_words) to_words[int64_t{word} * num_rows] = words[i];
                    }
                }
            }
        }
    }
    return kNothing;
}

// Where a pair of ours belongs, as one thread, once it is listed.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::await_place(int32_t src, int32_t pair, int32_t& row) const {
    const uint64_t* place = places(src) + pair;
    uint64_t seen;
    const Reason reason = low_latency::await_block(session, seen, [&] { return ptx::ld_relaxed_gpu(place); });
    row = static_cast<int32_t>(static_cast<uint32_t>(seen));
    return reason;
}

}  // namespace ep

// The receive phase of the low-latency dispatch: which rows came, where they belong, and their copies.
#pragma once
#include "low_latency_dispatch_block.cuh"

namespace ep {

// Waits for what the source ranks [first_src, last_src) say of themselves, and keeps it. A barrier.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_counts(int32_t first_src, int32_t last_src) const {
    const int32_t num_words = num_local_experts + 2;
    const LowLatencyArea* own = session.own();
    Reason reason = kNothing;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < (last_src - first_src) * num_words && reason == kNothing;
         i += blockDim.x) {
        const int32_t src = first_src + i / num_words, which = i % num_words - 2;
        const uint64_t* word = which >= 0    ? &own->counts[args.zone][src][which]
                               : which == -1 ? &own->num_tokens[args.zone][src]
                                             : &own->digests[args.zone][src];
        uint64_t seen = 0;
        reason = low_latency::await_word(
            session, word, src, seen, [&](uint64_t value) { return is_stamped(value, session.call.epoch); });
        const auto value = static_cast<uint32_t>(seen);
        if (reason == kNothing && which == -2 && value != args.digest) reason = kDisagreed;
        if (reason != kNothing) {
            if (reason != kExpired || args.masks == nullptr) atomicOr(&shared.found.missing, 1u << src);
        } else if (which >= 0) {
            shared.receive.counts[src * num_local_experts + which] = static_cast<int32_t>(value);
        } else if (which == -1) {
            shared.tokens[src] = static_cast<int32_t>(value);
        }
    }
    return sync::agree(reason);
}

// Learns who takes part, and how many rows come for each expert from where. A barrier. With masks a source
// takes part if all of its rows are there, so that nobody has to change their mind later.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::read_sources() const {
    if (args.masks == nullptr) {
        const Reason reason = read_counts(0, args.num_ranks);
        if (reason != kNothing) return reason;
    } else {
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) {
            Reason reason = kExpired;
            if (!__syncthreads_or(session.is_masked(src))) {
                reason = read_counts(src, src + 1);
                if (reason == kNothing)
                    reason = low_latency::await_flags(session, shared.found, src,
                                                      num_send_blocks(shared.tokens[src]) + 1);
            }
            if (reason != kNothing && reason != kExpired) return reason;
            if (threadIdx.x == 0 && !low_latency::decide(session, src, reason == kNothing)) {
                shared.found.ranks &= ~(1u << src);
                ptx::st_relaxed_gpu(&args.masks[src], 1);
            }
            __syncthreads();
            if (shared.found.ranks >> src & 1) {
                // Decided by another block while this one saw less: it is there all the same.
                reason = read_counts(src, src + 1);
                if (reason != kNothing) return reason;
            } else {
                for (int32_t e = threadIdx.x; e < num_local_experts; e += blockDim.x)
                    shared.receive.counts[src * num_local_experts + e] = 0;
                if (threadIdx.x == 0) shared.tokens[src] = 0;
            }
        }
    }
    __syncthreads();
    auto& receive = shared.receive;
#pragma unroll 1
    for (int32_t src = warp; src < args.num_ranks; src += kNumWarps) {
        const int32_t first = src * num_local_experts;
        low_latency::scan(
            num_local_experts, lane, [&](int32_t e) { return receive.counts[first + e]; },
            [&](int32_t e, int32_t before) { receive.entries[first + e] = before; });
    }
    if (warp == kNumWarps - 1) {
        const int32_t num_rows = low_latency::scan(
            num_local_experts, lane,
            [&](int32_t e) {
                int32_t count = 0;
#pragma unroll 1
                for (int32_t src = 0; src < args.num_ranks; ++src)
                    count += receive.counts[src * num_local_experts + e];
                return count;
            },
            [&](int32_t e, int32_t before) { receive.rows[e] = before; });
        if (lane == 0) shared.num_rows = num_rows;
    }
    __syncthreads();
    return kNothing;
}

// What callers are told of each expert, and clean ends: every R-th expert is of block `part`.
template <LowLatencyDispatchCfg kCfg>
__device__ void LowLatencyDispatchBlock<kCfg>::tell(int32_t part) const {
    const auto& counts = shared.receive.counts;
#pragma unroll 1
    for (int32_t e = part + args.num_ranks * threadIdx.x; e < num_local_experts;
         e += args.num_ranks * kCfg.num_threads) {
        int32_t total = 0;
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) {
            const int32_t count = counts[src * num_local_experts + e];
            args.layout_range[int64_t{e} * args.num_ranks + src] = int64_t{total} << 32 | count;
            total += count;
        }
        args.recv_count[e] = total;
        if (args.recv_stats != nullptr) args.recv_stats[e] += total;
    }
#pragma unroll 1
    for (int32_t e = part + args.num_ranks * warp; e < num_local_experts; e += args.num_ranks * kNumWarps) {
        const int32_t count = lane < args.num_ranks ? counts[lane * num_local_experts + e] : 0;
        const int32_t total = __reduce_add_sync(kFullWarp, count);
        const int64_t first = e * rows_per_expert(), end = first + rows_per_expert();
#pragma unroll 4
        for (int64_t at = first + total + lane; at < end; at += kWarpSize) {
            args.src_info[at] = -1;
            if (args.expert_rows != nullptr) args.expert_rows[at] = -1;
        }
    }
    if (part == 0 && threadIdx.x == 0) {
        int32_t most = 0;
#pragma unroll 1
        for (int32_t src = 0; src < args.num_ranks; ++src) most = max(most, shared.tokens[src]);
        args.record->max_tokens = most;
    }
}

// One block for each source rank: the lists of what came from there.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::list(int32_t src) const {
    const uint64_t began_ns = ptx::globaltimer_ns();
    const int32_t num_routes = args.num_max_tokens * args.num_topk;
    Route* routes = args.routes + int64_t{src} * num_routes;
    for (int32_t i = threadIdx.x; i < num_routes; i += blockDim.x) routes[i] = {-1, 0.0f};
    Reason reason = read_sources();  // the routes are cleared behind its barriers
    if (reason != kNothing) return reason;
    const auto& receive = shared.receive;
    const int32_t* first_entry = &receive.entries[src * num_local_experts];
    const int32_t last = num_local_experts - 1;
    const int32_t num_entries = first_entry[last] + receive.counts[src * num_local_experts + last];
    const uint64_t* entries = words(args.entries_offset, args.rank, src);
    const uint64_t* weights = words(args.weights_offset, args.rank, src);
    const auto is_there = [&](uint64_t word) { return is_stamped(word, session.call.epoch); };
#pragma unroll 1
    for (int32_t j = threadIdx.x; j < num_entries && reason == kNothing; j += blockDim.x) {
        uint64_t entry, weight = 0;
        reason = low_latency::await_word(session, &entries[j], src, entry, is_there);
        if (reason == kNothing && args.has_weights)
            reason = low_latency::await_word(session, &weights[j], src, weight, is_there);
        if (reason != kNothing) break;
        const int32_t e = low_latency::find(first_entry, num_local_experts, j);
        int32_t row = j - first_entry[e];
#pragma unroll 1
        for (int32_t before = 0; before < src; ++before)
            row += receive.counts[before * num_local_experts + e];
        const auto pair = static_cast<int32_t>(static_cast<uint32_t>(entry));
        const int32_t token = pair / args.num_topk;
        const int64_t at = e * rows_per_expert() + row;
        args.src_info[at] = token;
        if (args.expert_rows != nullptr) args.expert_rows[at] = src * args.num_max_tokens + token;
        routes[pair] = {static_cast<int32_t>(at), __uint_as_float(static_cast<uint32_t>(weight))};
    }
    if (reason != kNothing) atomicOr(&shared.found.missing, 1u << src);
    tell(src);  // while rows are on their way
    reason = sync::agree(reason);
    if (reason != kNothing || !(shared.found.ranks >> src & 1)) return reason;
    reason = low_latency::await_flags(session, shared.found, src, num_send_blocks(shared.tokens[src]));
    if (args.wait_stats != nullptr && threadIdx.x == 0)
        args.wait_stats[src] += static_cast<int64_t>((ptx::globaltimer_ns() - began_ns) / 1000);
    return reason;
}

// The rows of the landing zone to all their experts, in parts of a row for each turn of a warp.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_rows(int32_t block, int32_t num_blocks) const {
    Reason reason = read_sources();
    if (reason != kNothing) return reason;
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    constexpr int32_t kPartVectors = 8 * kWarpSize;
    const int32_t num_parts = (num_row_vectors + kPartVectors - 1) / kPartVectors;
    const int32_t num_turns = shared.num_rows * num_parts;
#pragma unroll 1
    for (int32_t turn = block + num_blocks * warp; turn < num_turns && reason == kNothing;
         turn += num_blocks * kNumWarps)
        reason = copy_row(turn / num_parts, turn % num_parts, turn % num_parts == 0);
    return reason;
}

// Part of the row number `number` of all experts' rows in order, as a warp. The same reason in all lanes.
template <LowLatencyDispatchCfg kCfg>
__device__ Reason LowLatencyDispatchBlock<kCfg>::copy_row(int32_t number, int32_t part,
                                                          bool with_scales) const {
    constexpr int32_t kDepth = 8, kPartVectors = kDepth * kWarpSize;
    // Vectors of a row in a piece of it.
    constexpr int32_t kPieceVectors = low_latency::kPieceVectors / (kQuantizes ? 2 : 1);
    const auto& receive = shared.receive;
    const int32_t e = low_latency::find(receive.rows, num_local_experts, number);
    const int32_t at = number - receive.rows[e];
    int32_t src = 0, within = at;
    while (within >= receive.counts[src * num_local_experts + e])
        within -= receive.counts[src++ * num_local_experts + e];

    uint64_t entry = 0;
    Reason reason = kNothing;
    if (lane == 0) {
        const uint64_t* word = words(args.entries_offset, args.rank, src) +
                               receive.entries[src * num_local_experts + e] + within;
        reason = low_latency::await_word(
            session, word, src, entry, [&](uint64_t value) { return is_stamped(value, session.call.epoch); });
        if (reason != kNothing) atomicOr(&shared.found.missing, 1u << src);
    }
    reason = static_cast<Reason>(__shfl_sync(kFullWarp, static_cast<uint32_t>(reason), 0));
    if (reason != kNothing) return reason;
    const int32_t token = __shfl_sync(kFullWarp, static_cast<uint32_t>(entry), 0) / args.num_topk;

    // The pieces that this part lies in; each came from some block of the source.
    const auto num_row_vectors = static_cast<int32_t>(row_bytes() / rows::kVectorBytes);
    const int32_t first_vector = part * kPartVectors;
    const int32_t end_vector = min(num_row_vectors, first_vector + kPartVectors);
    const int32_t first_piece = with_scales && kQuantizes ? 0 : first_vector / kPieceVectors;
    const int32_t end_piece =
        with_scales && kQuantizes ? num_pieces : (end_vector + kPieceVectors - 1) / kPieceVectors;
    const int32_t num_blocks = num_send_blocks(shared.tokens[src]);
#pragma unroll 1
    for (int32_t piece = first_piece + lane; piece < end_piece && reason == kNothing; piece += kWarpSize) {
        const uint64_t* flag =
            &session.own()->flags[args.zone][src][(token * num_pieces + piece) % num_blocks];
        uint64_t seen;
        reason = low_latency::await_word(session, flag, src, seen,
                                         [&](uint64_t word) { return is_stamped(word, session.call.epoch); });
        if (reason == kNothing) ptx::ld_acquire_sys(flag);
    }
    if (reason != kNothing) atomicOr(&shared.found.missing, 1u << src);
    const uint32_t worst = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(reason));
    __syncwarp();  // what one lane acquired, all lanes may read
    if (worst != kNothing) return static_cast<Reason>(worst);

    const auto* from = reinterpret_cast<const uint4*>(row(args.rank, src, token));
    const int64_t to_row = e * rows_per_expert() + at;
    auto* to = reinterpret_cast<uint4*>(args.recv_x + to_row * row_bytes());
    uint4 vectors[kDepth];
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        const int32_t vector = first_vector + i * kWarpSize + lane;
        if (vector < end_vector) vectors[i] = from[vector];
    }
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        const int32_t vector = first_vector + i * kWarpSize + lane;
        if (vector < end_vector) to[vector] = vectors[i];
    }
    if (kQuantizes && with_scales) {
        const uint32_t* from_scales = scales(args.rank, src, token);
        const int32_t num_words = scale_words();
#pragma unroll 1
        for (int32_t i = lane; i < num_words; i += kWarpSize)
            args.recv_sf[(int64_t{e} * num_words + i) * rows_per_expert() + at] = from_scales[i];
    }
    return kNothing;
}

}  // namespace ep

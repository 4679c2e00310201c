// What the normal-mode dispatch sends beside the rows: expert ids, weights, and scale factors that the rows'
// bulk copies cannot carry. Warps that move no rows do it, each block for its own slice of the tokens.
//
// Absent     received rows without a token are filled here too. Peers write only below num_recv_tokens, which
//            this rank has read from their offers, and nobody else above: no order is needed but the kernel's
//            end.
#pragma once
#include "intranode_dispatch_block.cuh"

namespace ep {

// Expert ids (local, or -1) and weights (0 where the id is -1) of the slice's tokens, in the order of rows:
// runs that are contiguous there, with segments as far as a segment.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_metadata() const {
    const int32_t thread = helper() * kWarpSize + lane, num_threads = num_helpers() * kWarpSize;
    const int32_t num_topk = args.topk_idx == nullptr ? 0 : args.num_topk;
    Tally<kCfg.counts != 0> tally;
    for (int32_t shift = 1; shift <= args.num_ranks; ++shift) {
        const int32_t d = (args.rank + shift) % args.num_ranks;
        const int32_t first = shared.tokens_before[d];
        const int32_t last =
            kCfg.segmented ? shared.tokens_until[d] : min(shared.tokens_until[d], shared.plan.limit[d]);
        const int32_t count = last - first;
        const int64_t base = static_cast<int64_t>(shared.plan.base[d]) + first;
        const int32_t* tokens = args.send_token + static_cast<int64_t>(d) * args.num_tokens + first;
        const Sections to = sections(d);
#pragma unroll 4
        for (int32_t i = thread; i < count * num_topk; i += num_threads) {
            const int32_t row = i / num_topk, k = i - row * num_topk;
            const int32_t token = tokens[row];
            const int32_t id = expert(token, k);
            const bool is_there = id >= 0 && id / num_local_experts == d;
            const int32_t local = is_there ? id - d * num_local_experts : -1;
            int64_t at = base * num_topk + i;
            if constexpr (kCfg.segmented) {
                const int32_t row = segment_row(token, first + i / num_topk, d);
                if (row < 0) continue;
                at = static_cast<int64_t>(row) * num_topk + k;
            }
            if (args.idx_bytes == 8)
                reinterpret_cast<int64_t*>(to.topk_idx)[at] = local;
            else
                reinterpret_cast<int32_t*>(to.topk_idx)[at] = local;
            tally.add(d != args.rank, args.idx_bytes);
            if (args.topk_weights != nullptr) {
                reinterpret_cast<float*>(to.topk_weights)[at] = is_there ? weight(token, k) : 0.0f;
                tally.add(d != args.rank, sizeof(float));
            }
        }
    }
    tally.keep(args.workspace);
}

// A warp loads the scale factors of a token once and stores them to every destination.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_scales() const {
    const int32_t num_words = args.sf_row_bytes / 4;
    const int32_t destination = destination_of_lane();
    Tally<kCfg.counts != 0> tally;
    for (int32_t token = first_token + helper(); token < last_token; token += num_helpers()) {
        const Origin given = origin(token);
        const auto* from =
            reinterpret_cast<const uint32_t*>(given.sf) + static_cast<int64_t>(given.token) * num_words;
        const int32_t row = row_of(token, destination);
        auto* mine = row < 0
                         ? nullptr
                         : reinterpret_cast<uint32_t*>(sections(destination).sf) + int64_t{row} * num_words;
        const auto address = reinterpret_cast<uint64_t>(mine);
        for (int32_t begin = 0; begin < num_words; begin += kWarpSize) {
            const int32_t word = begin + lane;
            const uint32_t value = word < num_words ? from[word] : 0;
            for (int32_t d = 0; d < args.num_ranks; ++d) {
                auto* to = reinterpret_cast<uint32_t*>(__shfl_sync(kFullWarp, address, d));
                if (to == nullptr || word >= num_words) continue;
                to[word] = value;
                tally.add(d != args.num_ranks - 1, sizeof(value));  // lanes' destinations end with this rank
            }
        }
    }
    tally.keep(args.workspace);
}

// This block's share of the words in bytes [begin, end) of a section.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::fill(uint8_t* section, int64_t begin, int64_t end, uint32_t word) const {
    constexpr int64_t kBytes = sizeof(uint4);
    const int64_t first = begin / kBytes, last = (end + kBytes - 1) / kBytes;
    const int64_t share = (last - first + gridDim.x - 1) / gridDim.x;
    const int64_t mine = first + blockIdx.x * share;
    for (int64_t v = mine + helper() * kWarpSize + lane; v < min(last, mine + share);
         v += num_helpers() * kWarpSize) {
        const int64_t at = v * kBytes;
        if (at >= begin && at + kBytes <= end) {
            *reinterpret_cast<uint4*>(section + at) = make_uint4(word, word, word, word);
        } else {
            for (int64_t i = max(at, begin); i < min(at + kBytes, end); i += sizeof(word))
                *reinterpret_cast<uint32_t*>(section + i) = word;
        }
    }
}

// Id -1, of either width, and weight 0.0 in the rows of this rank that no token comes to.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::fill_absent() const {
    const int64_t first = num_recv_tokens();
    if (first >= args.fill_rows || args.topk_idx == nullptr) return;
    const Sections own = sections(args.rank);
    const int64_t idx_row_bytes = args.num_topk * args.idx_bytes, weights_row_bytes = args.num_topk * 4;
    fill(own.topk_idx, first * idx_row_bytes, args.fill_rows * idx_row_bytes, 0xffffffff);
    if (args.topk_weights != nullptr)
        fill(own.topk_weights, first * weights_row_bytes, args.fill_rows * weights_row_bytes, 0);
}

}  // namespace ep

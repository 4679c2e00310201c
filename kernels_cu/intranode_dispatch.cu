// Normal-mode dispatch within one NVLink domain: layout, counts, rows and their metadata in one launch.
//
// Protocol   every block counts its slice of the tokens by destination; the blocks add up, and rank r offers
// every
//            peer its row of the count matrix, the place in its slab where its own rows are to land and how
//            many fit. From the matrix every rank knows the final row of each of its tokens at every
//            destination (source rank, then source token) and stores it there, once per destination. When all
//            its rows have landed it says so to every peer, and waits until all say so.
// Order      offers are release stores: a peer's earlier reads of the offered place go before our stores to
// it.
//            Rows leave by bulk stores that are waited for by the thread that issued them, or by ordinary
//            stores; then block barrier, acq_rel count of finished blocks, release.sys word. Rows only pass
//            through shared memory from bulk load to bulk store, both of the async proxy, so a slot needs no
//            proxy fence.
// Work       rows are cut into pieces that warps take by ticket: SMs reach the links at very different speed.
//            The metadata of a block's slice is written by warps of their own, in runs that are contiguous
//            there.
// Cached     the positions come from an earlier call; offers then carry no counts, and there is no metadata.
// Overfull   rows that do not fit are not sent. All ranks see it in the same matrix.
// Bad ids    an expert id outside 0 .. num_experts - 1 is treated as -1: none.
// Launch     any number of blocks up to kMaxBlocks, all resident; dynamic shared memory for the stages, and
// at
//            least num_experts words.
#include "sync.cuh"

namespace ep {

struct IntranodeDispatchCfg {
    int num_threads, num_data_warps, num_stages, stage_bytes;
    int scale_bytes;  // of a slot, for the scale factors of a row
};

template <IntranodeDispatchCfg kCfg>
struct IntranodeDispatchArgs {
    HangRecord* hang;
    Workspace* workspace;
    DispatchResult* result;
    const uint8_t* x;
    const uint8_t* sf;
    const uint8_t* topk_idx;
    const float* topk_weights;
    const uint8_t* is_token_in_rank;  // read where there are no expert ids
    int32_t* send_row;                // [num_tokens, kMaxLocalRanks]
    SendPlan* send_plan;
    uint8_t* masks;       // [num_tokens], scratch
    int32_t* send_token;  // [kMaxLocalRanks, num_tokens], scratch: the tokens for each destination, in order
    uint64_t timeout_ns, call;
    uint32_t digest, recv_offset, recv_capacity;
    int32_t rank, num_ranks, num_tokens, num_topk, num_experts, row_bytes, sf_row_bytes, idx_bytes, is_cached;
    uint8_t* slabs[kMaxLocalRanks];
};

constexpr int kMaxWarps = 32;

template <IntranodeDispatchCfg kCfg>
struct DispatchShared {
    uint64_t loaded[kCfg.num_data_warps][kCfg.num_stages];
    int32_t tokens_here[kMaxLocalRanks];    // of this block's slice, by destination
    int32_t tokens_before[kMaxLocalRanks];  // of the slices of lower blocks
    int32_t tokens_total[kMaxLocalRanks];
    int32_t running[kMaxLocalRanks];
    int32_t warp_tokens[kMaxWarps][kMaxLocalRanks];
    int32_t recv_counts[kMaxLocalRanks];
    int64_t capacity[kMaxLocalRanks];
    uint8_t* place[kMaxLocalRanks];  // where the rows of each destination land
    SendPlan plan;
    uint32_t overfull_ranks;
    bool is_last;
};

// A block's part of the work that does not depend on other ranks.
template <IntranodeDispatchCfg kCfg>
struct DispatchBlock {
    const IntranodeDispatchArgs<kCfg>& args;
    sync::Call call;
    DispatchShared<kCfg>& shared;
    uint8_t* stages;
    int32_t first_token, last_token, num_local_experts, warp, lane;

    __device__ int32_t expert(int32_t token, int32_t k) const {
        const int64_t at = static_cast<int64_t>(token) * args.num_topk + k;
        const int64_t id = args.idx_bytes == 8 ? reinterpret_cast<const int64_t*>(args.topk_idx)[at]
                                               : reinterpret_cast<const int32_t*>(args.topk_idx)[at];
        return id >= 0 && id < args.num_experts ? static_cast<int32_t>(id) : -1;
    }

    // Bit d: the token has an expert on rank d.
    __device__ uint32_t destinations(int32_t token) const {
        uint32_t mask = 0;
        if (args.topk_idx != nullptr) {
            for (int32_t k = 0; k < args.num_topk; ++k) {
                const int32_t id = expert(token, k);
                if (id >= 0) mask |= 1u << (id / num_local_experts);
            }
        } else {
            for (int32_t d = 0; d < args.num_ranks; ++d)
                mask |= uint32_t{args.is_token_in_rank[static_cast<int64_t>(token) * args.num_ranks + d] != 0}
                        << d;
        }
        return mask;
    }

    __device__ void count_tokens() {
        for (int32_t begin = first_token; begin < last_token; begin += blockDim.x) {
            const int32_t token = begin + threadIdx.x;
            uint32_t mask = 0;
            if (token < last_token) args.masks[token] = mask = destinations(token);
#pragma unroll
            for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
                const uint32_t takers = __ballot_sync(kFullWarp, mask >> d & 1);
                if (lane == d && takers) atomicAdd(&shared.tokens_here[d], __popc(takers));
            }
        }
        __syncthreads();
        if (threadIdx.x < kMaxLocalRanks)
            ptx::st_relaxed_gpu(&call.workspace->block_counts[blockIdx.x][threadIdx.x],
                                stamped(call.epoch, shared.tokens_here[threadIdx.x]));
    }

    // The tokens of all blocks, and of the lower ones, by destination.
    __device__ Reason add_up_blocks() {
        const uint64_t* counts = &call.workspace->block_counts[0][0];
        const int32_t num_words = gridDim.x * kMaxLocalRanks;
        const Reason reason = sync::wait_for_words<sync::kStamped>(
            call, num_words, [&](int32_t i) { return counts + i; }, [](int32_t) { return -1; },
            [&](uint64_t word) { return is_stamped(word, call.epoch); });
        if (reason != kNothing) return reason;
        for (int32_t i = threadIdx.x; i < num_words; i += blockDim.x) {
            const int32_t count = static_cast<int32_t>(ptx::ld_relaxed_gpu(counts + i));
            const int32_t d = i % kMaxLocalRanks;
            if (count) atomicAdd(&shared.tokens_total[d], count);
            if (count && i / kMaxLocalRanks < blockIdx.x) atomicAdd(&shared.tokens_before[d], count);
        }
        __syncthreads();
        return kNothing;
    }

    // To every peer, by the last warp of block 0: where our own rows may land.
    __device__ void offer_place() const {
        const int32_t peer = threadIdx.x - (blockDim.x - kWarpSize);
        if (peer < 0 || peer >= args.num_ranks) return;
        DispatchOffer* at = &call.exchange(peer)->dispatch[call.parity][args.rank];
        ptx::st_relaxed_sys(&at->capacity, stamped(call.epoch, args.recv_capacity));
        ptx::st_relaxed_sys(&at->digest, stamped(call.epoch, args.digest));
        ptx::st_release_sys(&at->offset, stamped(call.epoch, args.recv_offset));
    }

    // To every peer: how many tokens it and the others get.
    __device__ void offer_counts() const {
        for (int32_t i = threadIdx.x; i < args.num_ranks * kMaxLocalRanks; i += blockDim.x) {
            DispatchOffer* at = &call.exchange(i / kMaxLocalRanks)->dispatch[call.parity][args.rank];
            const int32_t d = i % kMaxLocalRanks;
            ptx::st_relaxed_sys(&at->counts[d], stamped(call.epoch, shared.tokens_total[d]));
        }
    }

    // The row of every token of the slice at each destination, counted from this rank's first one there.
    __device__ void place_tokens() {
        if (threadIdx.x < kMaxLocalRanks) shared.running[threadIdx.x] = shared.tokens_before[threadIdx.x];
        for (int32_t begin = first_token; begin < last_token; begin += blockDim.x) {
            const int32_t token = begin + threadIdx.x;
            const uint32_t mask = token < last_token ? args.masks[token] : 0;
            uint32_t takers[kMaxLocalRanks];
#pragma unroll
            for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
                takers[d] = __ballot_sync(kFullWarp, mask >> d & 1);
                if (lane == d) shared.warp_tokens[warp][d] = __popc(takers[d]);
            }
            __syncthreads();
            if (threadIdx.x < kMaxLocalRanks) {
                int32_t row = shared.running[threadIdx.x];
                for (int32_t w = 0; w < blockDim.x / kWarpSize; ++w) {
                    const int32_t count = shared.warp_tokens[w][threadIdx.x];
                    shared.warp_tokens[w][threadIdx.x] = row;
                    row += count;
                }
                shared.running[threadIdx.x] = row;
            }
            __syncthreads();
            if (token < last_token) {
                int32_t rows[kMaxLocalRanks];
#pragma unroll
                for (int32_t d = 0; d < kMaxLocalRanks; ++d) {
                    rows[d] = -1;
                    if (mask >> d & 1) {
                        rows[d] = shared.warp_tokens[warp][d] + __popc(takers[d] & ((1u << lane) - 1));
                        args.send_token[static_cast<int64_t>(d) * args.num_tokens + rows[d]] = token;
                    }
                }
                auto* at =
                    reinterpret_cast<int4*>(args.send_row + static_cast<int64_t>(token) * kMaxLocalRanks);
                at[0] = make_int4(rows[0], rows[1], rows[2], rows[3]);
                at[1] = make_int4(rows[4], rows[5], rows[6], rows[7]);
            }
            __syncthreads();
        }
    }

    // Adds the slice's experts to the rank's, in the memory of the stages, which no bulk load uses yet.
    __device__ void count_experts() {
        auto* histogram = reinterpret_cast<uint32_t*>(stages);
        for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) histogram[e] = 0;
        __syncthreads();
        for (int32_t token = first_token + threadIdx.x; token < last_token; token += blockDim.x) {
            for (int32_t k = 0; k < args.num_topk; ++k) {
                const int32_t id = expert(token, k);
                if (id >= 0) atomicAdd(&histogram[id], 1);
            }
        }
        __syncthreads();
        for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
            if (histogram[e]) atomicAdd(&call.workspace->expert_counts[call.set][e], histogram[e]);
    }

    // Ends the layout: the last block of the rank tells the experts' ranks; all wait for all positions.
    __device__ Reason publish_layout() {
        uint64_t* arrived = &call.workspace->arrived[call.set];
        __syncthreads();
        if (threadIdx.x == 0) shared.is_last = ptx::atom_add_acq_rel_gpu(arrived, 1) + 1 == gridDim.x;
        __syncthreads();
        if (shared.is_last && args.topk_idx != nullptr) {
            for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
                const uint32_t count = __ldcg(&call.workspace->expert_counts[call.set][e]);
                Exchange* owner = call.exchange(e / num_local_experts);
                ptx::st_relaxed_sys(&owner->expert_counts[call.parity][args.rank][e % num_local_experts],
                                    stamped(call.epoch, count));
            }
        }
        const int32_t num_blocks = gridDim.x;
        return sync::wait_for_words<sync::kAcquiring>(
            call, 1, [&](int32_t) { return arrived; }, [](int32_t) { return -1; },
            [&](uint64_t word) { return word >= num_blocks; });
    }

    // Waits for every rank's offer, and works out where our rows go.
    __device__ Reason read_offers() {
        const DispatchOffer* offers = call.exchange(args.rank)->dispatch[call.parity];
        const int32_t num_counts = args.is_cached ? 0 : kMaxLocalRanks;
        const int32_t num_words = 3 + num_counts;
        const Reason reason = sync::wait_for_words<sync::kAcquiring>(
            call, args.num_ranks * num_words,
            [&](int32_t i) {
                const DispatchOffer* from = &offers[i / num_words];
                const int32_t which = i % num_words;
                return which == 0   ? &from->offset
                       : which == 1 ? &from->capacity
                       : which == 2 ? &from->digest
                                    : &from->counts[which - 3];
            },
            [&](int32_t i) { return i / num_words; },
            [&](uint64_t word) { return is_stamped(word, call.epoch); });
        if (reason != kNothing) return reason;
        const int32_t peer = threadIdx.x;
        bool agrees = true;
        if (peer < args.num_ranks) {
            const auto value = [](const uint64_t& word) {
                return static_cast<uint32_t>(ptx::ld_relaxed_sys(&word));
            };
            agrees = value(offers[peer].digest) == args.digest;
            const int64_t capacity = value(offers[peer].capacity);
            int32_t base = 0, total = 0;
            if (args.is_cached) {
                base = args.send_plan->base[peer];
            } else {
                for (int32_t src = 0; src < args.num_ranks; ++src) {
                    const int32_t count = value(offers[src].counts[peer]);
                    if (src < args.rank) base += count;
                    total += count;
                }
            }
            shared.plan.base[peer] = base;
            shared.plan.limit[peer] = capacity > base ? static_cast<int32_t>(capacity - base) : 0;
            shared.capacity[peer] = capacity;
            shared.place[peer] =
                args.slabs[peer] + static_cast<int64_t>(value(offers[peer].offset)) * kOffsetUnit;
            shared.recv_counts[peer] = args.is_cached ? 0 : value(offers[peer].counts[args.rank]);
            if (total > capacity) atomicOr(&shared.overfull_ranks, 1u << peer);
        }
        // A peer may have given up since it made its offer: its memory is not ours to write then.
        const Reason mine = peer < args.num_ranks ? sync::contradiction(call, peer) : kNothing;
        return sync::agree(agrees ? mine : kDisagreed);
    }

    __device__ bool has_offer(int32_t peer) const {
        const DispatchOffer& from = call.exchange(args.rank)->dispatch[call.parity][peer];
        const auto is_there = [&](const uint64_t& word) {
            return is_stamped(ptx::ld_relaxed_sys(&word), call.epoch);
        };
        bool is_complete = is_there(from.offset) && is_there(from.capacity) && is_there(from.digest);
        for (int32_t d = 0; d < kMaxLocalRanks && !args.is_cached; ++d)
            is_complete &= is_there(from.counts[d]);
        return is_complete && static_cast<uint32_t>(from.digest) == args.digest;
    }

    __device__ bool has_experts(int32_t peer) const {
        const uint64_t* words = call.exchange(args.rank)->expert_counts[call.parity][peer];
        bool is_complete = true;
        for (int32_t e = 0; e < num_local_experts; ++e)
            is_complete &= is_stamped(ptx::ld_relaxed_sys(&words[e]), call.epoch);
        return is_complete;
    }

    // One warp of block 0, while others move rows: what the host, or the handle, is to know.
    __device__ Reason report() const {
        if (!args.is_cached) {
            if (lane < kMaxLocalRanks) {
                args.send_plan->base[lane] = shared.plan.base[lane];
                args.send_plan->limit[lane] = shared.plan.limit[lane];
                args.result->recv_counts[lane] = shared.recv_counts[lane];
            }
            const auto& words = call.exchange(args.rank)->expert_counts[call.parity];
            for (int32_t e = lane; e < num_local_experts && args.topk_idx != nullptr; e += kWarpSize) {
                uint32_t count = 0;
                for (int32_t src = 0; src < args.num_ranks; ++src) {
                    uint64_t word = 0;
                    const Reason reason = sync::poll(call, &words[src][e], src, word, [&](uint64_t seen) {
                        return is_stamped(seen, call.epoch);
                    });
                    if (reason != kNothing) return reason;
                    count += static_cast<uint32_t>(word);
                }
                args.result->expert_counts[e] = count;
            }
            if (lane == 0) {
                int32_t total = 0;
                for (int32_t src = 0; src < args.num_ranks; ++src) total += shared.recv_counts[src];
                args.result->num_recv_tokens = total;
                args.result->overfull_ranks = shared.overfull_ranks;
            }
        }
        return kNothing;
    }

    // The row of a token at a destination; -1 where it does not go, or does not fit.
    __device__ int32_t row_of(int32_t token, int32_t destination) const {
        if (destination >= args.num_ranks) return -1;
        const int32_t row =
            __ldcg(args.send_row + static_cast<int64_t>(token) * kMaxLocalRanks + destination);
        return row < 0 || row >= shared.plan.limit[destination] ? -1 : shared.plan.base[destination] + row;
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

    __device__ bool scales_ride() const;
    __device__ void send_rows();
    __device__ void send_metadata() const;
    __device__ void send_scales() const;
};

#ifdef EP_HAS_TMA
// Scale factors travel with the first piece of their row where bulk copies can carry them.
template <IntranodeDispatchCfg kCfg>
__device__ bool DispatchBlock<kCfg>::scales_ride() const {
    return args.sf_row_bytes % 16 == 0 && args.sf_row_bytes <= kCfg.scale_bytes;
}

// A piece is loaded once into a slot of the warp's ring and stored from there to every destination, by one
// lane each. kAhead loads are in flight; the stores of a slot have been read out before it is loaded again.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_rows() {
    constexpr int kStages = kCfg.num_stages, kAhead = kStages / 2;
    constexpr int kSlotBytes = kCfg.stage_bytes + kCfg.scale_bytes;
    const int32_t pieces_per_row = (args.row_bytes + kCfg.stage_bytes - 1) / kCfg.stage_bytes;
    const uint32_t num_pieces = static_cast<uint32_t>(args.num_tokens) * pieces_per_row;
    const int32_t scale_bytes = scales_ride() ? args.sf_row_bytes : 0;
    const int32_t destination = destination_of_lane();
    const Sections to = destination < args.num_ranks ? sections(destination) : Sections{};
    uint8_t* ring = stages + static_cast<int64_t>(warp) * kStages * kSlotBytes;
    int32_t token[kStages], offset[kStages], row[kStages];  // offset -1: no more pieces
    uint32_t ticket = sync::take_ticket(call, lane);
    uint32_t phases = 0;
    ptx::fence_proxy_async();  // our stores come after the peers' reads that the offers' acquire ordered

    const auto bytes_at = [&](int32_t at) { return min(kCfg.stage_bytes, args.row_bytes - at); };
    const auto fetch = [&](int slot) {
        const uint32_t piece = __shfl_sync(kFullWarp, ticket, 0);
        offset[slot] = -1;
        if (piece >= num_pieces) return;
        ticket = sync::take_ticket(call, lane);
        token[slot] = piece / pieces_per_row;
        offset[slot] = static_cast<int32_t>(piece - token[slot] * pieces_per_row) * kCfg.stage_bytes;
        ptx::bulk_wait_read<kStages - 1 - kAhead>();
        __syncwarp();
        if (lane == 0) {
            uint64_t* loaded = &shared.loaded[warp][slot];
            uint8_t* data = ring + slot * kSlotBytes;
            const int32_t num_bytes = bytes_at(offset[slot]);
            const bool with_scales = offset[slot] == 0 && scale_bytes > 0;
            ptx::mbarrier_arrive_expect(loaded, num_bytes + (with_scales ? scale_bytes : 0));
            ptx::bulk_load(data, args.x + int64_t{token[slot]} * args.row_bytes + offset[slot], num_bytes,
                           loaded);
            if (with_scales)
                ptx::bulk_load(data + kCfg.stage_bytes, args.sf + int64_t{token[slot]} * scale_bytes,
                               scale_bytes, loaded);
        }
        row[slot] = row_of(token[slot], destination);
    };

#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot);
    for (bool is_more = true; is_more;) {
#pragma unroll
        for (int slot = 0; slot < kStages; ++slot) {
            if (offset[slot] < 0) {
                is_more = false;
                break;
            }
            fetch((slot + kAhead) % kStages);
            while (!ptx::mbarrier_try_wait(&shared.loaded[warp][slot], phases >> slot & 1)) {
            }
            phases ^= 1u << slot;
            if (row[slot] >= 0) {
                const uint8_t* data = ring + slot * kSlotBytes;
                ptx::bulk_store(to.x + int64_t{row[slot]} * args.row_bytes + offset[slot], data,
                                bytes_at(offset[slot]));
                if (offset[slot] == 0 && scale_bytes > 0)
                    ptx::bulk_store(to.sf + int64_t{row[slot]} * scale_bytes, data + kCfg.stage_bytes,
                                    scale_bytes);
            }
            ptx::bulk_commit();
        }
    }
    ptx::bulk_wait_landed();
}
#else
template <IntranodeDispatchCfg kCfg>
__device__ bool DispatchBlock<kCfg>::scales_ride() const {
    return false;
}

// A piece is loaded once into registers and stored from there to every destination.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_rows() {
    constexpr int kVectors = 4;  // of 16 bytes, for each lane
    constexpr int32_t kPieceBytes = kVectors * kWarpSize * 16;
    const int32_t pieces_per_row = (args.row_bytes + kPieceBytes - 1) / kPieceBytes;
    const uint32_t num_pieces = static_cast<uint32_t>(args.num_tokens) * pieces_per_row;
    const int32_t destination = destination_of_lane();
    const uint8_t* base = destination < args.num_ranks ? sections(destination).x : nullptr;
    for (uint32_t ticket = sync::take_ticket(call, lane);;) {
        const uint32_t p = __shfl_sync(kFullWarp, ticket, 0);
        if (p >= num_pieces) return;
        ticket = sync::take_ticket(call, lane);
        const int32_t token = p / pieces_per_row;
        const int32_t offset = static_cast<int32_t>(p % pieces_per_row) * kPieceBytes;
        const int32_t num_vectors = min(kPieceBytes, args.row_bytes - offset) / 16;
        const auto* from =
            reinterpret_cast<const uint4*>(args.x + static_cast<int64_t>(token) * args.row_bytes + offset);
        uint4 values[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            if (v * kWarpSize + lane < num_vectors) values[v] = ptx::ld_stream(from + v * kWarpSize + lane);
        const int32_t row = row_of(token, destination);
        const auto address =
            row < 0 ? 0 : reinterpret_cast<uint64_t>(base + int64_t{row} * args.row_bytes + offset);
        for (int d = 0; d < args.num_ranks; ++d) {
            auto* to = reinterpret_cast<uint4*>(__shfl_sync(kFullWarp, address, d));
            if (to == nullptr) continue;
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                if (v * kWarpSize + lane < num_vectors) ptx::st_stream(to + v * kWarpSize + lane, values[v]);
        }
    }
}
#endif

// Expert ids (local, or -1) and weights (0 where the id is -1) of the slice's tokens, in the order of rows.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_metadata() const {
    const int32_t thread = threadIdx.x - kCfg.num_data_warps * kWarpSize;
    const int32_t num_threads = blockDim.x - kCfg.num_data_warps * kWarpSize;
    const int32_t num_topk = args.topk_idx == nullptr ? 0 : args.num_topk;
    for (int32_t shift = 1; shift <= args.num_ranks; ++shift) {
        const int32_t d = (args.rank + shift) % args.num_ranks;
        const int32_t first = shared.tokens_before[d];
        const int32_t count = min(shared.tokens_here[d], max(0, shared.plan.limit[d] - first));
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
            const int64_t at = base * num_topk + i;
            if (args.idx_bytes == 8)
                reinterpret_cast<int64_t*>(to.topk_idx)[at] = local;
            else
                reinterpret_cast<int32_t*>(to.topk_idx)[at] = local;
            if (args.topk_weights != nullptr)
                reinterpret_cast<float*>(to.topk_weights)[at] =
                    is_there ? args.topk_weights[static_cast<int64_t>(token) * num_topk + k] : 0.0f;
        }
    }
}

// Scale factors of the slice's tokens: a warp loads those of a token once and stores them to every
// destination.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::send_scales() const {
    const int32_t num_words = args.sf_row_bytes / 4;
    const int32_t num_warps = blockDim.x / kWarpSize - kCfg.num_data_warps;
    const int32_t destination = destination_of_lane();
    for (int32_t token = first_token + warp - kCfg.num_data_warps; token < last_token; token += num_warps) {
        const auto* from =
            reinterpret_cast<const uint32_t*>(args.sf) + static_cast<int64_t>(token) * num_words;
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
                if (to != nullptr && word < num_words) to[word] = value;
            }
        }
    }
}

template <IntranodeDispatchCfg kCfg>
__device__ void intranode_dispatch(const IntranodeDispatchArgs<kCfg>& args) {
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads <= kMaxWarps * kWarpSize);
    static_assert(kCfg.num_data_warps * kWarpSize < kCfg.num_threads && kCfg.stage_bytes % 16 == 0 &&
                  kCfg.scale_bytes % 16 == 0);
    constexpr uint64_t kLayout = 1, kOffers = 2, kReport = 3, kLanding = 4;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ DispatchShared<kCfg> shared;
    sync::Call call{.slabs = args.slabs,
                    .workspace = args.workspace,
                    .host_hang = args.hang,
                    .rank = args.rank,
                    .num_ranks = args.num_ranks};
    if (!sync::enter(call, kDispatch, args.timeout_ns)) return;

    const int32_t slice = (args.num_tokens + gridDim.x - 1) / gridDim.x;
    const int32_t first_token = min(args.num_tokens, static_cast<int32_t>(blockIdx.x) * slice);
    DispatchBlock<kCfg> block{.args = args,
                              .call = call,
                              .shared = shared,
                              .stages = stages,
                              .first_token = first_token,
                              .last_token = min(args.num_tokens, first_token + slice),
                              .num_local_experts = max(1, args.num_experts / args.num_ranks),
                              .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                              .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
    if (threadIdx.x < kMaxLocalRanks) {
        shared.tokens_here[threadIdx.x] = shared.tokens_before[threadIdx.x] = 0;
        shared.tokens_total[threadIdx.x] = shared.recv_counts[threadIdx.x] = 0;
        shared.plan.base[threadIdx.x] = shared.plan.limit[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) shared.overfull_ranks = 0;
#ifdef EP_HAS_TMA
    if (block.lane == 0 && block.warp < kCfg.num_data_warps)
        for (int slot = 0; slot < kCfg.num_stages; ++slot)
            ptx::mbarrier_init(&shared.loaded[block.warp][slot]);
    ptx::fence_mbarrier_init();
#endif
    __syncthreads();

    if (blockIdx.x == 0) block.offer_place();
    const auto none = [](int32_t) { return true; };
    Reason reason = kNothing;
    if (!args.is_cached) {
        block.count_tokens();
        reason = block.add_up_blocks();
        if (reason != kNothing) return sync::leave(call, reason, kLayout, none);
    }
    if (!args.is_cached) {
        if (blockIdx.x == 0) block.offer_counts();
        block.place_tokens();
        if (args.topk_idx != nullptr) block.count_experts();
        reason = block.publish_layout();
        if (reason != kNothing) return sync::leave(call, reason, kLayout, none);
    }
    reason = block.read_offers();
    const auto has_offer = [&](int32_t peer) { return block.has_offer(peer); };
    if (reason != kNothing) return sync::leave(call, reason, kOffers, has_offer);
#ifdef EP_HAS_TMA
    // The histogram lay where bulk loads go now.
    ptx::fence_proxy_async();
    __syncthreads();
#endif
    reason = kNothing;
    if (block.warp < kCfg.num_data_warps) {
        block.send_rows();
    } else {
        if (blockIdx.x == 0 && block.warp == blockDim.x / kWarpSize - 1) {
            reason = block.report();
            const bool is_complete = __all_sync(kFullWarp, reason == kNothing);
            __syncwarp();  // what the other lanes stored goes before the release
            if (block.lane == 0 && is_complete) ptx::st_release_sys(&args.result->call, args.call);
        }
        if (!args.is_cached) block.send_metadata();
        if (args.sf_row_bytes > 0 && !block.scales_ride()) block.send_scales();
    }
    reason = sync::agree(reason);
    if (reason != kNothing)
        return sync::leave(call, reason, kReport, [&](int32_t peer) { return block.has_experts(peer); });
    sync::finish(call, kLanding);
}

}  // namespace ep

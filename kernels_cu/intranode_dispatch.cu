// Normal-mode dispatch within one NVLink domain: layout, counts, rows and their metadata in one launch.
//
// Protocol   every rank offers every peer its row of the count matrix, the place in its slab where its own
//            rows are to land and how many fit. From the matrix every rank knows the final row of each of
//            its tokens at every destination (source rank, then source token) and stores it there, once per
//            destination. When all its rows have landed it says so to every peer, and waits until all say so.
// Order      the place is offered by release stores: a peer's earlier reads of it go before our stores to it.
//            Rows leave by bulk stores that are waited for by the thread that issued them, or by ordinary
//            stores; then block barrier, acq_rel count of finished blocks, release.sys word.
// Blocks     the last one offers the place, so that the fence of its release delays no counts; block 0 offers
//            the counts and reports to the host.
// Cached     the positions come from an earlier call; offers then carry no counts, and there is no metadata.
// Segmented  of several nodes, the ranks of one dispatch all tokens that have come to it: see `Segments`.
//            Rows are in the order of all ranks of all nodes: segment, then source rank, then token. Counts
//            are offered by segment, and known before the layout is: block 0 offers them first of all. Expert
//            ids are those of all nodes; the experts of this one count from first_expert. Without ids there
//            are masks, see internode_layout.cu.
//            Tokens of other nodes may still be on their way, see internode_exchange.cu: this kernel waits
//            for them, and ends after the exchange. Whoever waits for a peer here waits longer than the
//            exchange does, which knows the node that is late.
// Overfull   rows that do not fit are not sent. All ranks see it in the same matrix.
// Bad ids    an expert id outside 0 .. num_experts - 1 is treated as -1: none.
// Launch     any number of blocks up to kMaxBlocks, all resident; from sm_90 on dynamic shared memory for the
//            stages.
#include "intranode_dispatch_layout.cuh"
#include "intranode_dispatch_metadata.cuh"
#include "intranode_dispatch_rows.cuh"

namespace ep {

// To every peer, by the last warp: where our own rows may land. One lane per word, so that they leave
// together and no fence waits for another word.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::offer_place() const {
    constexpr int32_t kWords = 3;
    static_assert(kWords * kMaxLocalRanks <= kWarpSize);
    if (warp != kNumWarps - 1 || lane >= kWords * args.num_ranks) return;
    DispatchOffer* at = &call.exchange(lane / kWords)->dispatch[call.parity][args.rank];
    const int32_t which = lane % kWords;
    uint64_t* word = which == 0 ? &at->offset : which == 1 ? &at->capacity : &at->digest;
    const uint32_t value = which == 0 ? args.recv_offset : which == 1 ? args.recv_capacity : args.digest;
    ptx::st_release_sys(word, stamped(call.epoch, value));
}

// To every peer: how many tokens each rank gets. `total`: rank threadIdx.x % kMaxLocalRanks.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::offer_counts(int32_t total) const {
    const int32_t peer = threadIdx.x / kMaxLocalRanks;
    if (peer >= args.num_ranks) return;
    DispatchOffer* at = &call.exchange(peer)->dispatch[call.parity][args.rank];
    ptx::st_relaxed_sys(&at->counts[threadIdx.x % kMaxLocalRanks], stamped(call.epoch, total));
}

// To every expert's rank: how many pairs the expert gets.
template <IntranodeDispatchCfg kCfg>
template <class CountOf>
__device__ void DispatchBlock<kCfg>::offer_experts(CountOf count_of) const {
    for (int32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
        Exchange* owner = call.exchange(e / num_local_experts);
        ptx::st_relaxed_sys(&owner->expert_counts[call.parity][args.rank][e % num_local_experts],
                            stamped(call.epoch, count_of(e)));
    }
}

// To every peer: how many tokens of each segment every rank gets.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::offer_segments() const {
    const int32_t num_counts = args.segments->num * args.num_ranks;
    for (int32_t i = threadIdx.x; i < args.num_ranks * num_counts; i += blockDim.x) {
        const int32_t peer = i / num_counts, n = i % num_counts / args.num_ranks, d = i % args.num_ranks;
        ptx::st_relaxed_sys(&call.exchange(peer)->segment_counts[call.parity][args.rank][n][d],
                            stamped(call.epoch, args.segments->counts[n][d]));
    }
}

// Waits for every rank's offer, and works out where our rows go. A barrier.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::read_offers() {
    constexpr int32_t kWords = sizeof(DispatchOffer) / sizeof(uint64_t);
    static_assert(EP_OFFSETOF(DispatchOffer, counts) == 0 && kWords == kMaxLocalRanks + 3);
    const DispatchOffer* offers = call.exchange(args.rank)->dispatch[call.parity];
    const int32_t num_absent = kCfg.segmented || args.is_cached ? kMaxLocalRanks : 0;
    const int32_t num_words = kWords - num_absent;
    Reason reason = kNothing;
    for (int32_t i = threadIdx.x; i < args.num_ranks * num_words && reason == kNothing; i += blockDim.x) {
        const int32_t peer = i / num_words, which = num_absent + i % num_words;
        const uint64_t* word = reinterpret_cast<const uint64_t*>(&offers[peer]) + which;
        uint64_t seen = 0;
        reason =
            sync::poll(call, word, peer, seen, [&](uint64_t value) { return is_stamped(value, call.epoch); });
        if (reason != kNothing) break;
        reinterpret_cast<uint64_t*>(&shared.offers[peer])[which] = seen;
        // A peer may have given up since it made its offer: its memory is not ours to write then. Looked at
        // before the acquire, which comes once because it is dear: both are on their way together.
        const uint64_t signal = ptx::ld_relaxed_sys(&call.header(args.rank)->signals[peer]);
        ptx::ld_acquire_sys(word);
        const bool is_contradicted = sync::arrival_of(signal, call.word) == sync::Arrival::kContradicted;
        if (is_contradicted) reason = kContradicted;
        if (word == &offers[peer].digest && static_cast<uint32_t>(seen) != args.digest) reason = kDisagreed;
    }
    if constexpr (kCfg.segmented)
        if (reason == kNothing && !args.is_cached) reason = read_segments();
    reason = sync::agree(reason);
    if (reason == kNothing && threadIdx.x < args.num_ranks) plan_rows(threadIdx.x);
    if constexpr (kCfg.segmented)
        if (reason == kNothing) plan_segments();
    __syncthreads();
    return reason;
}

// Waits, as one thread, for its share of the counts by segment, and adds them up for the block.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::read_segments() {
    const auto& counts = segment_counts();
    const int32_t num_counts = args.segments->num * args.num_ranks;
    for (int32_t i = threadIdx.x; i < args.num_ranks * num_counts; i += blockDim.x) {
        const int32_t src = i / num_counts, n = i % num_counts / args.num_ranks, d = i % args.num_ranks;
        uint64_t seen = 0;
        const Reason reason = sync::poll(call, &counts[src][n][d], src, seen,
                                         [&](uint64_t value) { return is_stamped(value, call.epoch); });
        if (reason != kNothing) return reason;
        const int32_t count = static_cast<uint32_t>(seen);
        // For the handle, by the thread that has seen it: to others the word may still be an older one.
        if (blockIdx.x == 0 && d == args.rank) args.send_plan->segment_counts[n][src] = count;
        if (count == 0) continue;
        atomicAdd(&shared.segments.total[d], count);
        if (d == args.rank) atomicAdd(&shared.recv_counts[src], count);
        if (src != args.rank) atomicAdd(&shared.segments.others[n][d], count);
        if (src < args.rank) atomicAdd(&shared.segments.base[n][d], count);
    }
    return kNothing;
}

// Where the rows of a segment go, less their positions: behind those of all ranks in lower segments and of
// lower ranks in this one, where this rank's own in lower segments are positions already.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::plan_segments() {
    for (int32_t i = threadIdx.x; i < args.segments->num * kMaxLocalRanks; i += blockDim.x) {
        const int32_t segment = i / kMaxLocalRanks, d = i % kMaxLocalRanks;
        int32_t& base = shared.segments.base[segment][d];
        if (args.is_cached)
            base = args.send_plan->segment_base[segment][d];
        else
            for (int32_t lower = 0; lower < segment; ++lower) base += shared.segments.others[lower][d];
    }
}

// Where this rank's rows go at a peer, and how many come from it.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::plan_rows(int32_t peer) {
    const DispatchOffer& offer = shared.offers[peer];
    const int64_t capacity = static_cast<uint32_t>(offer.capacity);
    int32_t base = 0, total = 0;
    if constexpr (kCfg.segmented) {
        total = shared.segments.total[peer];
    } else if (args.is_cached) {
        base = args.send_plan->base[peer];
    } else {
        for (int32_t src = 0; src < args.num_ranks; ++src) {
            const int32_t count = static_cast<uint32_t>(shared.offers[src].counts[peer]);
            if (src < args.rank) base += count;
            total += count;
        }
    }
    shared.plan.base[peer] = base;
    shared.plan.limit[peer] = capacity > base ? static_cast<int32_t>(capacity - base) : 0;
    shared.capacity[peer] = capacity;
    shared.place[peer] = args.slabs[peer] + int64_t{static_cast<uint32_t>(offer.offset)} * kOffsetUnit;
    if constexpr (!kCfg.segmented)
        shared.recv_counts[peer] = args.is_cached ? 0 : static_cast<uint32_t>(offer.counts[args.rank]);
    if (total > capacity) atomicOr(&shared.overfull_ranks, 1u << peer);
}

// Tokens that come from ranks up to `last`.
template <IntranodeDispatchCfg kCfg>
__device__ int32_t DispatchBlock<kCfg>::recv_end(int32_t last) const {
    int32_t total = 0;
    for (int32_t src = 0; src <= last; ++src) total += shared.recv_counts[src];
    return total;
}

template <IntranodeDispatchCfg kCfg>
__device__ bool DispatchBlock<kCfg>::has_offer(int32_t peer) const {
    const DispatchOffer& from = call.exchange(args.rank)->dispatch[call.parity][peer];
    const auto is_there = [&](const uint64_t& word) {
        return is_stamped(ptx::ld_relaxed_sys(&word), call.epoch);
    };
    bool is_complete = is_there(from.offset) && is_there(from.capacity) && is_there(from.digest);
    if constexpr (kCfg.segmented) {
        const auto& counts = segment_counts()[peer];
        for (int32_t n = 0; n < args.segments->num && !args.is_cached; ++n)
            for (int32_t d = 0; d < args.num_ranks; ++d) is_complete &= is_there(counts[n][d]);
    } else {
        for (int32_t d = 0; d < kMaxLocalRanks && !args.is_cached; ++d)
            is_complete &= is_there(from.counts[d]);
    }
    return is_complete && static_cast<uint32_t>(ptx::ld_relaxed_sys(&from.digest)) == args.digest;
}

template <IntranodeDispatchCfg kCfg>
__device__ bool DispatchBlock<kCfg>::has_experts(int32_t peer) const {
    const uint64_t* words = call.exchange(args.rank)->expert_counts[call.parity][peer];
    bool is_complete = true;
    for (int32_t e = 0; e < num_local_experts; ++e)
        is_complete &= is_stamped(ptx::ld_relaxed_sys(&words[e]), call.epoch);
    return is_complete;
}

// What an expert of this rank gets from all ranks, whose words are on their way together.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::sum_expert(int32_t e, uint32_t& count) const {
    const auto& words = call.exchange(args.rank)->expert_counts[call.parity];
    uint32_t missing = (1u << args.num_ranks) - 1;
    for (uint32_t polls = 1; missing != 0; ++polls) {
        uint64_t seen[kMaxLocalRanks];
#pragma unroll
        for (int32_t src = 0; src < kMaxLocalRanks; ++src)
            if (missing >> src & 1) seen[src] = ptx::ld_relaxed_sys(&words[src][e]);
#pragma unroll
        for (int32_t src = 0; src < kMaxLocalRanks; ++src) {
            if (missing >> src & 1 && is_stamped(seen[src], call.epoch)) {
                count += static_cast<uint32_t>(seen[src]);
                missing ^= 1u << src;
            }
        }
        if (missing == 0 || polls % 64 != 0) continue;
        const int32_t src = polls / 64 % args.num_ranks;  // one after another is asked what it does
        const Reason reason = sync::trouble(call, missing >> src & 1 ? src : -1);
        if (reason != kNothing) return reason;
    }
    return kNothing;
}

// One warp: what the experts of this rank get. The same reason, or none, in some lane.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::sum_experts() const {
    int32_t end = 0;
    for (int32_t first = 0; first < num_local_experts; first += kWarpSize) {
        const int32_t e = first + lane;
        const bool is_expert = e < num_local_experts;
        uint32_t count = 0;
        const Reason reason = is_expert ? sum_expert(e, count) : kNothing;
        if (!__all_sync(kFullWarp, reason == kNothing)) return reason;
        const int32_t sum = sum_up_to(align_up(static_cast<int32_t>(count), args.expert_alignment), lane);
        if (is_expert) {
            args.result->expert_counts[e] = static_cast<int32_t>(count);
            args.send_plan->expert_ends[e] = end + sum;
        }
        end += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
    }
    return kNothing;
}

// One warp: where the rows of the segments go, for the handle.
template <IntranodeDispatchCfg kCfg>
__device__ void DispatchBlock<kCfg>::report_segments() const {
    for (int32_t i = lane; i < args.segments->num * kMaxLocalRanks; i += kWarpSize) {
        const int32_t n = i / kMaxLocalRanks, r = i % kMaxLocalRanks;
        args.send_plan->segment_base[n][r] = shared.segments.base[n][r];
    }
}

// One warp, while others move rows: what the host, or the handle, is to know.
template <IntranodeDispatchCfg kCfg>
__device__ Reason DispatchBlock<kCfg>::report() const {
    Reason reason = kNothing;
    if (!args.is_cached) {
        if (lane < kMaxLocalRanks) {
            args.send_plan->base[lane] = shared.plan.base[lane];
            args.send_plan->limit[lane] = shared.plan.limit[lane];
            args.send_plan->recv_counts[lane] = shared.recv_counts[lane];
            args.send_plan->recv_ends[lane] = recv_end(min(lane, args.num_ranks - 1));
        }
        if constexpr (kCfg.segmented) report_segments();
        if (lane == 0) {
            args.result->num_recv_tokens = num_recv_tokens();
            args.result->overfull_ranks = shared.overfull_ranks;
        }
        if (args.topk_idx != nullptr) reason = sum_experts();
    }
    const bool is_complete = __all_sync(kFullWarp, reason == kNothing);
    __syncwarp();  // what the other lanes stored goes before the release
    if (lane == 0 && is_complete) ptx::st_release_sys(&args.result->call, args.call);
    return reason;
}

template <IntranodeDispatchCfg kCfg>
__device__ void dispatch_within_node(const IntranodeDispatchArgs<kCfg>& args) {
    using Block = DispatchBlock<kCfg>;
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads <= 1024);
    static_assert(Block::kOtherWarps >= 2);  // of block 0, one reports
    static_assert(kCfg.stage_bytes % 16 == 0 && kCfg.scale_bytes % 16 == 0);
    constexpr uint64_t kLayout = 1, kOffers = 2, kReport = 3, kLanding = 4;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ DispatchShared<kCfg> shared;
    sync::Call call{.slabs = args.slabs,
                    .workspace = args.workspace,
                    .host_hang = args.hang,
                    .rank = args.rank,
                    .num_ranks = args.num_ranks};
    if (!sync::enter(call, kDispatch, kCfg.segmented ? sync::with_grace(args.timeout_ns) : args.timeout_ns))
        return;

    const int32_t num_tokens = num_tokens_of<kCfg.segmented != 0>(args);
    const int32_t slice = (num_tokens + gridDim.x - 1) / gridDim.x;
    const int32_t first_token = min(num_tokens, static_cast<int32_t>(blockIdx.x) * slice);
    const int32_t max_alone = min(args.max_redundant_tokens, kCfg.num_threads);
    Block block{.args = args,
                .call = call,
                .shared = shared,
                .stages = stages,
                .first_token = first_token,
                .last_token = min(num_tokens, first_token + slice),
                .num_local_experts = max(1, args.num_experts / args.num_ranks),
                .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize,
                .is_redundant = !args.is_cached && num_tokens <= max_alone};
    const bool is_data_warp = block.warp < kCfg.num_data_warps;
    if (blockIdx.x == gridDim.x - 1) block.offer_place();
    if (threadIdx.x < kMaxLocalRanks) {
        shared.tokens_here[threadIdx.x] = shared.tokens_before[threadIdx.x] = 0;
        shared.tokens_until[threadIdx.x] = shared.tokens_total[threadIdx.x] = 0;
    }
    if constexpr (kCfg.segmented) {
        if (blockIdx.x == 0 && !args.is_cached) block.offer_segments();
        shared.segments.index.load(*args.segments);
        for (int32_t i = threadIdx.x; i < kMaxNodes * kMaxLocalRanks; i += kCfg.num_threads) {
            shared.segments.base[i / kMaxLocalRanks][i % kMaxLocalRanks] = 0;
            shared.segments.others[i / kMaxLocalRanks][i % kMaxLocalRanks] = 0;
        }
        if (threadIdx.x < kMaxLocalRanks)
            shared.segments.total[threadIdx.x] = shared.recv_counts[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) shared.overfull_ranks = 0;
#ifdef EP_HAS_TMA
    if (block.lane == 0 && is_data_warp)
        for (int slot = 0; slot < kCfg.num_stages; ++slot)
            ptx::mbarrier_init(&shared.loaded[block.warp][slot]);
    ptx::fence_mbarrier_init();
#endif
    __syncthreads();

    Reason reason = kNothing;
    if constexpr (kCfg.segmented)
        if (args.waits_for_announced) reason = block.await_announced();
    if (reason != kNothing) return;
    if (block.is_redundant) {
        block.lay_out_alone();
    } else if (!args.is_cached) {
        reason = block.lay_out_together();
        if (reason != kNothing) return sync::leave(call, reason, kLayout, [](int32_t) { return true; });
    }
    RowSender<kCfg> sender(block);
    if (is_data_warp) sender.start();
    reason = block.read_offers();
    if (reason != kNothing) {
        if (is_data_warp) sender.abandon();
        return sync::leave(call, reason, kOffers, [&](int32_t peer) { return block.has_offer(peer); });
    }
    if (is_data_warp) {
        sender.send();
        if (sender.has_left) reason = kLeft;
    } else if (block.is_reporter()) {
        reason = block.report();
    } else {
        if (!args.is_cached) {
            block.send_metadata();
            block.fill_absent();
        }
        if (!kCfg.quantizes && args.sf_row_bytes > 0 && !block.scales_ride()) block.send_scales();
    }
    reason = sync::agree(reason);
    if (reason != kNothing)
        return sync::leave(call, reason, kReport, [&](int32_t peer) { return block.has_experts(peer); });
    if constexpr (kCfg.segmented) {
        uint64_t seen;
        const auto num_begun = static_cast<uint64_t>(args.num_exchange_blocks);
        if (threadIdx.x == 0)
            block.await_exchange(&call.workspace->begun[call.set], seen,
                                 [&](uint64_t value) { return value >= num_begun; });
    }
    sync::finish(call, kLanding);
}

template <IntranodeDispatchCfg kCfg>
__device__ void intranode_dispatch(const IntranodeDispatchArgs<kCfg>& args) {
    dispatch_within_node(args);
#ifdef EP_HAS_TMA
    if constexpr (kCfg.segmented) ptx::wait_for_prerequisites();
#endif
}

}  // namespace ep

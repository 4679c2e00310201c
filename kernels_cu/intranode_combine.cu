// Normal-mode combine within one NVLink domain: every rank pulls the rows of its tokens, and sums them.
//
// Protocol   rank r offers every peer the place in its slab where the rows that it received lie, changed by
//            its experts, and their weights. With all offers it reads, for each of its tokens, one row from
//            every rank the token went to, and stores the sum. When all its reads are done it says so to
//            every peer, and waits until all say so: then nobody reads its rows any more.
// Staging    rows that lie outside the slab are copied into it in chunks by the last blocks, which wait for
//            nobody: blocks of their own where they can be resident, else some that sum afterwards. Word
//            `staged` says how many chunks are there, and a reader waits for those that hold the rows of its
//            next token. Tokens are taken in order, and their rows lie in order.
// Segmented  of several nodes, the ranks of one sum the tokens of their lists: see `Segments`. Rows are in
//            the slab always, and there are no biases: y, bias, num_rows and num_stagers are not looked at.
//            The exchange that takes sums back may run at the same time: tokens of other nodes come first,
//            and each piece of theirs is counted behind its stores: __syncwarp, acq_rel add.
// Sum        float32, left to right: the rows in ascending rank, bias 0, bias 1; one rounding at the end. It
//            starts from its first term, so that a -0.0 stays; a token without any term is +0.0.
// Order      rows were written by earlier kernels of their rank's stream; the offer is a release.sys store
//            and read by acquire.sys. Bulk loads read in another proxy than the one that wrote: one
//            fence.proxy.async by every thread, after the offers and before its first bulk load.
//            Staged rows: bulk stores landed (wait_group 0), warps counted acq_rel, release.sys of `staged`;
//            acquire.sys of it and fence.proxy.async by the lane that loads.
//            At the end: loads complete, block barrier, acq_rel count of finished blocks, release.sys word.
// Refill     a stage is read by ordinary loads and refilled by a bulk load: a write after a read, in two
//            proxies. __syncwarp does not order them, and an mbarrier arrival would not: PTX ISA "Causality
//            order" preserves base causality only where both accesses use the generic proxy, or both the
//            same proxy in one block, and "Async proxy" asks for fence.proxy.async across the two. Only the
//            completion of a bulk copy brings its own fence: bulk load, then read, needs none. Combines
//            without the fence gave wrong sums (DeepEP issue 621, on GB200, fixed by its pull request 642;
//            NVIDIA/nccl-extensions issue 8). So every reader fences, then __syncwarp, then one lane refills.
//            Restricted to shared::cta it is a MEMBAR of the block (SASS of sm_90a and sm_100a); the dear one
//            of the prototype was unrestricted: a MEMBAR of the GPU, which waits for the output's stores too.
// Work       sums are cut into pieces of stage_bytes that warps take by ticket: SMs reach the links at very
//            different speed. Each warp has its own ring of stages and is its producer and its consumer.
//            A quarter of the warps sum the weights before they take their first ticket.
// Launch     any number of blocks, all resident. From sm_90 on num_threads / 32 * num_stages * stage_bytes
//            of dynamic shared memory; before, where terms are read straight into registers, none.
#include "intranode_combine_block.cuh"
#include "intranode_combine_stage.cuh"

namespace ep {

// Tells every peer where this rank's rows and weights lie. One thread per word, so that they leave together.
template <IntranodeCombineCfg kCfg>
__device__ void CombineBlock<kCfg>::offer() const {
    constexpr int kWords = 4;
    const int32_t peer = threadIdx.x / kWords;
    if (peer >= call.num_ranks) return;
    CombineOffer* at = &call.exchange(peer)->combine[call.parity][call.rank];
    const int32_t which = threadIdx.x % kWords;
    if (which == 3 && !kCfg.segmented && args.y != nullptr) return;  // told by those who stage
    uint64_t* word = which == 0   ? &at->offset
                     : which == 1 ? &at->weights_offset
                     : which == 2 ? &at->digest
                                  : &at->staged;
    const uint32_t value = which == 0   ? args.y_offset
                           : which == 1 ? args.weights_offset
                           : which == 2 ? args.digest
                                        : kAllStaged;
    ptx::st_release_sys(word, stamped(call.epoch, value));
}

// Waits for every rank's offer, and works out where the terms lie.
template <IntranodeCombineCfg kCfg>
__device__ Reason CombineBlock<kCfg>::read_offers() const {
    constexpr int kWords = 4;
    const CombineOffer* offers = call.exchange(call.rank)->combine[call.parity];
    const Reason reason = sync::wait_for_words<sync::kAcquiring>(
        call, call.num_ranks * kWords,
        [&](int32_t i) {
            const CombineOffer* from = &offers[i / kWords];
            const int32_t which = i % kWords;
            return which == 0   ? &from->offset
                   : which == 1 ? &from->weights_offset
                   : which == 2 ? &from->digest
                                : &from->staged;
        },
        [](int32_t i) { return i / kWords; }, [&](uint64_t word) { return is_stamped(word, call.epoch); },
        [&](int32_t i, uint64_t seen) {
            if (i % kWords == 3) shared.staged[i / kWords] = static_cast<uint32_t>(seen);
        });
    if (reason != kNothing) return reason;

    const int32_t term = threadIdx.x;
    bool agrees = true;
    if (term < call.num_ranks) {
        const auto value = [](const uint64_t& word) {
            return static_cast<uint32_t>(ptx::ld_relaxed_sys(&word));
        };
        agrees = value(offers[term].digest) == args.digest;
        const int64_t y = static_cast<int64_t>(value(offers[term].offset)) * kOffsetUnit;
        const int64_t weights = static_cast<int64_t>(value(offers[term].weights_offset)) * kOffsetUnit;
        const int64_t base = args.send_plan->base[term];
        shared.terms[term] = args.slabs[term] + y + base * args.row_bytes;
        shared.weights[term] =
            reinterpret_cast<const float*>(args.slabs[term] + weights) + base * args.num_topk;
        shared.limits[term] = args.send_plan->limit[term];
    } else if (term < kMaxTerms) {
        const bool is_bias = term >= kMaxLocalRanks && !kCfg.segmented;
        shared.terms[term] = is_bias ? args.bias[term - kMaxLocalRanks] : nullptr;
        shared.limits[term] = shared.terms[term] == nullptr ? 0 : args.num_tokens;
    }
    // A peer may have given up since it made its offer, and use its memory for something else.
    const Reason mine = term < call.num_ranks ? sync::contradiction(call, term) : kNothing;
    return sync::agree(agrees ? mine : kDisagreed);  // a block barrier
}

template <IntranodeCombineCfg kCfg>
__device__ bool CombineBlock<kCfg>::has_offer(int32_t peer) const {
    const CombineOffer& from = offer_of(peer);
    const auto is_there = [&](const uint64_t& word) {
        return is_stamped(ptx::ld_relaxed_sys(&word), call.epoch);
    };
    return is_there(from.offset) && is_there(from.weights_offset) && is_there(from.digest) &&
           is_there(from.staged) && static_cast<uint32_t>(ptx::ld_relaxed_sys(&from.digest)) == args.digest;
}

template <IntranodeCombineCfg kCfg>
__device__ bool CombineBlock<kCfg>::has_staged(int32_t peer) const {
    return ptx::ld_relaxed_sys(&offer_of(peer).staged) == stamped(call.epoch, kAllStaged);
}

// One element of the weights after another, each by one lane.
template <IntranodeCombineCfg kCfg>
__device__ void CombineBlock<kCfg>::sum_weights() const {
    const int32_t stride = args.num_pullers * kWeightWarps * kWarpSize;
    const int32_t first = (blockIdx.x * kWeightWarps + warp) * kWarpSize + lane;
    const int32_t num_elements = num_tokens() * args.num_topk;
    Tally<kCfg.counts != 0> tally;
    for (int32_t i = first; i < num_elements; i += stride) {
        const int32_t token = i / args.num_topk, k = i - token * args.num_topk;
        const auto* at =
            reinterpret_cast<const int4*>(args.send_row + static_cast<int64_t>(token) * kMaxLocalRanks);
        const int4 low = at[0], high = at[1];
        int32_t row[kMaxLocalRanks] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float term[kMaxLocalRanks];
        bool has_term = false;
#pragma unroll
        for (int32_t src = 0; src < kMaxLocalRanks; ++src) {
            term[src] = rows::kNoTerm;
            if constexpr (kCfg.segmented) row[src] = row_of(token, row[src], src);
            if (src < call.num_ranks && row[src] >= 0 && row[src] < shared.limits[src]) {
                term[src] =
                    ptx::ld_stream(shared.weights[src] + static_cast<int64_t>(row[src]) * args.num_topk + k);
                has_term = true;
                tally.add(src != call.rank, sizeof(float));
            }
        }
        float sum = rows::kNoTerm;
#pragma unroll
        for (int32_t src = 0; src < kMaxLocalRanks; ++src) sum += term[src];
        args.out_weights[i] = has_term ? sum : 0.0f;
    }
    tally.keep(args.workspace);
}

template <IntranodeCombineCfg kCfg>
__device__ __forceinline__ void CombineBlock<kCfg>::store(int32_t piece, const Sum& sum) const {
    const Place place = place_of(piece);
    const int32_t num_vectors = place.num_bytes / rows::kVectorBytes;
    auto* out = reinterpret_cast<uint4*>(out_of(place));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int32_t i = v * kWarpSize + lane;
        if (i < num_vectors) ptx::st_stream(out + i, rows::rounded<kCfg.element>(sum[v]));
    }
}

// The pieces that a warp takes, one after another. Ahead of the current piece, the rows of the next one and
// the ticket after that are on their way.
template <IntranodeCombineCfg kCfg>
struct Pieces {
    const CombineBlock<kCfg>& block;
    const uint8_t* rows;  // of this lane's term: row 0
    int32_t limit;
    int32_t num_pieces;

    int32_t piece;  // num_pieces or more: there are no more
    Place place;
    const uint8_t* from;  // this lane's term of it; nullptr: none
    uint32_t pending;     // lanes with a term that has not been taken

    int32_t next_piece, next_row, ticket;
    Place next_place;

    uint32_t staged;  // chunks of the rows of this lane's term that are acquired
    Reason reason;    // why there are no more; kNothing: all are done
    // Pieces of tokens of other nodes that are stored, and not counted yet; of the i-th, its token in lane i.
    static constexpr int32_t kCountedTogether = 4;
    int32_t num_stored = 0, stored = 0;
    Tally<kCfg.counts != 0> tally;

    __device__ Pieces(const CombineBlock<kCfg>& block, int32_t ticket) : block(block), ticket(ticket) {
        rows = block.lane < kMaxTerms ? block.shared.terms[block.lane] : nullptr;
        limit = block.lane < kMaxTerms ? block.shared.limits[block.lane] : 0;
        num_pieces = block.num_pieces();
        pending = 0;
        staged = block.lane < block.call.num_ranks ? block.shared.staged[block.lane] : kAllStaged;
        reason = kNothing;
        look_ahead();
    }

    __device__ __forceinline__ void look_ahead() {
        next_piece = __shfl_sync(kFullWarp, ticket, 0);
        next_row = -1;
        if (next_piece >= num_pieces) return;
        ticket = block.take_ticket();
        next_place = block.place_of(next_piece);
        if (rows == nullptr) return;
        next_row =
            block.lane >= kMaxLocalRanks
                ? next_place.token
                : block.args.send_row[static_cast<int64_t>(next_place.token) * kMaxLocalRanks + block.lane];
        if constexpr (kCfg.segmented) next_row = block.row_of(next_place.token, next_row, block.lane);
    }

    // The whole warp, once it has stored a piece.
    __device__ __forceinline__ void keep(int32_t kept) {
        if constexpr (kCfg.segmented) {
            const int32_t landed = block.shared.segments.index.landed(block.place_of(kept).token);
            if (landed < 0) return;
            if (block.lane == num_stored) stored = landed;
            if (++num_stored == kCountedTogether) count();
        }
    }
    __device__ void count() {
        __syncwarp();
        if (block.lane < num_stored) ptx::atom_add_acq_rel_gpu(&block.args.progress[stored], 1);
        num_stored = 0;
    }

    // Whether a term is a row of another rank.
    __device__ bool is_elsewhere(int32_t term) const {
        return term < kMaxLocalRanks && term != block.call.rank;
    }
    __device__ const uint64_t* word() const { return &block.offer_of(block.lane).staged; }
    __device__ static uint32_t staged_of(uint64_t word) { return static_cast<uint32_t>(word); }

    // Waits, as one warp, until the next rows are where they are read. Tokens come in order, and so do
    // chunks: who stages waits for nobody. False when the call cannot go on.
    __device__ bool await(bool is_term) {
        if constexpr (kCfg.segmented) return true;  // all is there
        const uint32_t needed = is_term && block.lane < kMaxLocalRanks ? chunk_of(next_row) + 1 : 0;
        if (!__any_sync(kFullWarp, needed > staged)) return true;
        if (needed > staged) {
            uint64_t seen;
            reason = sync::poll(block.call, word(), block.lane, seen,
                                [&](uint64_t value) { return staged_of(value) >= needed; });
            // Acquires the rows, and lets this lane's bulk loads see them.
            staged = staged_of(ptx::ld_acquire_sys(word()));
#ifdef EP_HAS_TMA
            ptx::fence_proxy_async();
#endif
        }
        __syncwarp();  // without bulk loads, all lanes read what one has acquired
        return __all_sync(kFullWarp, reason == kNothing);
    }

    // The whole warp. False when there are no more.
    __device__ __forceinline__ bool advance() {
        piece = next_piece;
        if (piece >= num_pieces) return false;
        place = next_place;
        const bool is_term = next_row >= 0 && next_row < limit;
        if (!await(is_term)) {
            next_piece = num_pieces;
            return false;
        }
        from = is_term ? rows + static_cast<int64_t>(next_row) * block.args.row_bytes + next_place.offset
                       : nullptr;
        pending = __ballot_sync(kFullWarp, is_term);
        look_ahead();
        return true;
    }
};

#ifdef EP_HAS_TMA
// Starts the load of the next term into a stage. Returns the piece that it completes, or one of these.
constexpr int32_t kMoreTerms = -1, kNoMore = -2;
template <IntranodeCombineCfg kCfg>
__device__ __forceinline__ int32_t load_next(Pieces<kCfg>& pieces, uint8_t* stage, uint64_t* loaded) {
    while (pieces.pending == 0) {
        if (!pieces.advance()) return kNoMore;
        if (pieces.pending == 0) {
            typename CombineBlock<kCfg>::Sum zero;
            CombineBlock<kCfg>::start(zero, 0.0f);
            pieces.block.store(pieces.piece, zero);
            pieces.keep(pieces.piece);
        }
    }
    const int32_t term = __ffs(pieces.pending) - 1;
    pieces.pending &= pieces.pending - 1;
    if (pieces.block.lane == term) {
        ptx::mbarrier_arrive_expect(loaded, pieces.place.num_bytes);
        ptx::bulk_load(stage, pieces.from, pieces.place.num_bytes, loaded);
        pieces.tally.add(pieces.is_elsewhere(term), pieces.place.num_bytes);
    }
    return pieces.pending == 0 ? pieces.piece : kMoreTerms;
}

// Terms flow through the ring in the order of addition, those of several pieces at a time. Every stage is
// filled and read once a round, so one parity serves them all. A bulk load waits for no peer: it ends like
// any load.
template <IntranodeCombineCfg kCfg>
__device__ Reason CombineBlock<kCfg>::sum_rows(int32_t ticket, uint8_t* ring, uint64_t* loaded) const {
    Pieces<kCfg> pieces(*this, ticket);
    int32_t completes = kNoMore;  // lane s: what load_next said of stage s
#pragma unroll 1
    for (int32_t s = 0; s < kCfg.num_stages; ++s) {
        const int32_t completed = load_next(pieces, ring + s * kCfg.stage_bytes, &loaded[s]);
        if (lane == s) completes = completed;
    }
    Sum sum;
    start(sum);
    uint32_t parity = 0;
#pragma unroll 1
    for (int32_t s = 0;;) {
        const int32_t completed = __shfl_sync(kFullWarp, completes, s);
        if (completed == kNoMore) break;
        uint8_t* stage = ring + s * kCfg.stage_bytes;
        while (!ptx::mbarrier_try_wait(&loaded[s], parity)) {
        }
        // Past the end of a short piece lies what an earlier one left: summed, never stored.
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            rows::add<kCfg.element>(sum[v], reinterpret_cast<const uint4*>(stage)[v * kWarpSize + lane]);
        ptx::fence_proxy_async_shared();
        __syncwarp();
        const int32_t refilled = load_next(pieces, stage, &loaded[s]);
        if (lane == s) completes = refilled;
        if (completed >= 0) {
            store(completed, sum);
            pieces.keep(completed);
            start(sum);
        }
        if (++s == kCfg.num_stages) {
            s = 0;
            parity ^= 1;
        }
    }
    if constexpr (kCfg.segmented) pieces.count();
    pieces.tally.keep(args.workspace);
    return pieces.reason;
}
#else
// Loads of all terms of a vector are in flight together, and no more: ten times 16 bytes of registers.
template <IntranodeCombineCfg kCfg>
__device__ Reason CombineBlock<kCfg>::sum_rows(int32_t ticket, uint8_t*, uint64_t*) const {
    Pieces<kCfg> pieces(*this, ticket);
    while (pieces.advance()) {
        const uint4* from[kMaxTerms];
#pragma unroll
        for (int term = 0; term < kMaxTerms; ++term) {
            const auto address = reinterpret_cast<unsigned long long>(pieces.from);
            from[term] = reinterpret_cast<const uint4*>(__shfl_sync(kFullWarp, address, term));
        }
        const float first = pieces.pending == 0 ? 0.0f : rows::kNoTerm;
        auto* out = reinterpret_cast<uint4*>(out_of(pieces.place));
#pragma unroll 1
        for (int32_t i = lane; i < pieces.place.num_bytes / rows::kVectorBytes; i += kWarpSize) {
            uint4 vectors[kMaxTerms];
#pragma unroll
            for (int term = 0; term < kMaxTerms; ++term)
                if (from[term] != nullptr) {
                    vectors[term] = ptx::ld_stream(from[term] + i);
                    pieces.tally.add(pieces.is_elsewhere(term), sizeof(uint4));
                }
            float sum[rows::kVectorElements<kCfg.element>];
            for (float& element : sum) element = first;
#pragma unroll
            for (int term = 0; term < kMaxTerms; ++term)
                if (from[term] != nullptr) rows::add<kCfg.element>(sum, vectors[term]);
            ptx::st_stream(out + i, rows::rounded<kCfg.element>(sum));
        }
        pieces.keep(pieces.piece);
    }
    if constexpr (kCfg.segmented) pieces.count();
    pieces.tally.keep(args.workspace);
    return pieces.reason;
}
#endif

template <IntranodeCombineCfg kCfg>
__device__ void intranode_combine(const IntranodeCombineArgs<kCfg>& args) {
    using Block = CombineBlock<kCfg>;
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads >= 4 * kMaxLocalRanks);
    static_assert(kCfg.stage_bytes % (kWarpSize * rows::kVectorBytes) == 0);
    static_assert(kCfg.num_stages >= 1 && kCfg.num_stages <= kWarpSize);
    constexpr uint64_t kOffers = 1, kStaging = 2, kReading = 3;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[Block::kNumWarps][kCfg.num_stages], copied[Block::kNumWarps][kCfg.num_stages];
    __shared__ CombineShared<kCfg> shared;
    sync::Call call{.slabs = args.slabs,
                    .workspace = args.workspace,
                    .host_hang = args.hang,
                    .rank = args.rank,
                    .num_ranks = args.num_ranks};
    if (!sync::enter(call, kCombine, args.timeout_ns)) return;

    const Block block{.args = args,
                      .call = call,
                      .shared = shared,
                      .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                      .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
    if constexpr (kCfg.segmented) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            args.workspace->pieces_per_row = block.pieces_per_row();
            args.workspace->num_weight_warps = args.num_topk > 0 ? gridDim.x * Block::kWeightWarps : 0;
            ptx::st_release_gpu(&args.workspace->returning, returning_word(call.epoch, call.set));
        }
#ifdef EP_HAS_TMA
        ptx::launch_dependents();
#endif
    }
    if (blockIdx.x == 0) block.offer();
    if constexpr (kCfg.segmented) {  // a barrier of read_offers goes before the first use
        shared.segments.index.load(*args.segments);
        shared.segments.others.load(*args.segments);
        for (int32_t i = threadIdx.x; i < args.segments->num * kMaxLocalRanks; i += kCfg.num_threads)
            shared.segments.base[i / kMaxLocalRanks][i % kMaxLocalRanks] =
                args.send_plan->segment_base[i / kMaxLocalRanks][i % kMaxLocalRanks];
    }
#ifdef EP_HAS_TMA
    if (block.lane < kCfg.num_stages) {
        ptx::mbarrier_init(&loaded[block.warp][block.lane]);
        ptx::mbarrier_init(&copied[block.warp][block.lane]);
    }
    ptx::fence_mbarrier_init();
    __syncwarp();  // for racecheck alone, which takes these lanes for one thread
#endif
    uint8_t* ring = stages + block.warp * kCfg.num_stages * kCfg.stage_bytes;
    if (!kCfg.segmented && block.stager() >= 0) {
        block.stage_rows(ring, copied[block.warp]);
        if (!block.is_puller()) return sync::finish(call, kReading);
    }
    const bool has_weights = args.num_topk > 0 && block.warp < Block::kWeightWarps;
    int32_t ticket = has_weights ? 0 : block.take_ticket();  // comes while the block waits
    Reason reason = block.read_offers();
    if (reason != kNothing)
        return sync::leave(call, reason, kOffers, [&](int32_t peer) { return block.has_offer(peer); });
#ifdef EP_HAS_TMA
    ptx::fence_proxy_async();
#endif
    if (has_weights) {
        block.sum_weights();
        __syncwarp();
        if (kCfg.segmented && block.lane == 0)
            ptx::atom_add_acq_rel_gpu(&args.workspace->announced[call.set], 1);
        ticket = block.take_ticket();
    }
    reason = sync::agree(block.sum_rows(ticket, ring, loaded[block.warp]));
    if (reason != kNothing)
        return sync::leave(call, reason, kStaging, [&](int32_t peer) { return block.has_staged(peer); });
    sync::finish(call, kReading);
}

}  // namespace ep

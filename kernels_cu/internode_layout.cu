// The layout of a two-level dispatch: which tokens go to which node, and what comes from there. One block.
//
// Protocol   tokens are numbered for each node, in order. Every rank tells the rank of the same local index
// on
//            each other node how many of its tokens come, and to how many each rank there belongs; from those
//            of all nodes it knows the list of tokens that it will dispatch within its own (Segments).
// Masks      without expert ids another node cannot tell to which of its ranks a token goes. A byte for each
//            node says so; they cross ahead of the rows, as ids do.
// Reuse      messages come in two sets, by parity of the call: who sends that of call c + 2 has heard from
//            the receiver in c + 1, which it entered after it had read all of c.
// Launch     one block of at least kMaxNodes threads, a multiple of 32.
#include "internode.cuh"

namespace ep {

struct InternodeLayoutCfg {
    int num_threads;
};

template <InternodeLayoutCfg kCfg>
struct InternodeLayoutArgs {
    HangRecord* hang;
    Workspace* workspace;
    NetworkArea* area;
    NetworkState* state;
    NetworkPlan* plan;
    const uint8_t* topk_idx;
    const uint8_t* is_token_in_rank;  // [num_tokens, all ranks], read where there are no expert ids
    uint8_t* node_masks;              // made of that, see IntranodeDispatchArgs
    int32_t* lists;                   // [num_nodes, num_tokens]: the tokens for each node, in order
    int32_t* positions;               // [num_tokens, num_nodes]: the number of a token there, or -1
    uint64_t timeout_ns;
    uint32_t digest;
    int32_t rank, num_ranks;  // of the node
    int32_t node, num_nodes, num_tokens, num_topk, num_experts, idx_bytes, node_masks_bytes;
    uint8_t* slabs[kMaxLocalRanks];
};

template <InternodeLayoutCfg kCfg>
struct InternodeLayout {
    static constexpr int kNumWarps = kCfg.num_threads / kWarpSize;

    static constexpr int kMaxAll = kMaxNodes * kMaxLocalRanks, kBatch = 8;

    struct Shared {
        uint32_t ranks[kMaxAll / 32][kCfg.num_threads];  // by thread: bit of each rank that its token goes to
        int32_t rank_tokens[kMaxAll];
        int32_t warp_tokens[kNumWarps][kMaxNodes];
        uint32_t missing;
    };

    const InternodeLayoutArgs<kCfg>& args;
    const internode::Session& session;
    Shared& shared;
    int32_t experts_per_rank, warp, lane;

    __device__ int32_t num_all() const { return args.num_nodes * args.num_ranks; }
    __device__ uint32_t& ranks(int32_t rank) const { return shared.ranks[rank / 32][threadIdx.x]; }

    __device__ int64_t id(int32_t token, int32_t k) const {
        const int64_t at = int64_t{token} * args.num_topk + k;
        return args.idx_bytes == 8 ? reinterpret_cast<const int64_t*>(args.topk_idx)[at]
                                   : reinterpret_cast<const int32_t*>(args.topk_idx)[at];
    }

    __device__ bool goes_to(int32_t token, int32_t rank) const {
        return args.is_token_in_rank[int64_t{token} * num_all() + rank] != 0;
    }

    // Finds out where a token goes. An id that does not exist is none.
    __device__ void find_ranks(int32_t token) const {
        for (int32_t rank = 0; rank < num_all(); rank += 32) ranks(rank) = 0;
        if (token >= args.num_tokens) return;
        if (args.topk_idx == nullptr) {
            for (int32_t n = 0; n < args.num_nodes; ++n) {
                const int32_t first = n * args.num_ranks;
                uint32_t mask = 0;
#pragma unroll
                for (int32_t r = 0; r < kMaxLocalRanks; ++r)
                    if (r < args.num_ranks) mask |= uint32_t{goes_to(token, first + r)} << r;
                args.node_masks[int64_t{token} * args.node_masks_bytes + n] = mask;
                for (int32_t r = 0; r < args.num_ranks; ++r)
                    ranks(first + r) |= (mask >> r & 1) << (first + r) % 32;
            }
            return;
        }
        for (int32_t first = 0; first < args.num_topk; first += kBatch) {
            int64_t ids[kBatch];  // on their way together
#pragma unroll
            for (int32_t i = 0; i < kBatch; ++i)
                ids[i] = first + i < args.num_topk ? id(token, first + i) : -1;
#pragma unroll
            for (int32_t i = 0; i < kBatch; ++i) {
                if (ids[i] < 0 || ids[i] >= args.num_experts) continue;
                const int32_t rank = static_cast<int32_t>(ids[i]) / experts_per_rank;
                ranks(rank) |= 1u << rank % 32;
            }
        }
    }

    // Bit n: the token of this thread goes to node n. Counts the tokens of the warp for every rank and node.
    __device__ uint32_t count_tokens() const {
        uint32_t mask = 0;
        for (int32_t n = 0; n < args.num_nodes; ++n) {
            bool goes = false;
            for (int32_t rank = n * args.num_ranks; rank < (n + 1) * args.num_ranks; ++rank) {
                const bool is_there = ranks(rank) >> rank % 32 & 1;
                const uint32_t takers = __ballot_sync(kFullWarp, is_there);
                if (lane == 0 && takers) atomicAdd(&shared.rank_tokens[rank], __popc(takers));
                goes |= is_there;
            }
            const uint32_t takers = __ballot_sync(kFullWarp, goes);
            if (lane == n) shared.warp_tokens[warp][n] = __popc(takers);
            if (goes) mask |= 1u << n;
        }
        return mask;
    }

    // Numbers the tokens of every node. `total`, in lane n of every warp: those that go to node n.
    __device__ void number_tokens(int32_t& total) const {
        total = 0;
        for (int32_t begin = 0; begin < args.num_tokens; begin += kCfg.num_threads) {
            const int32_t token = begin + static_cast<int32_t>(threadIdx.x);
            find_ranks(token);
            const uint32_t mask = count_tokens();
            __syncthreads();
            int32_t before = total;
            for (int32_t w = 0; w < kNumWarps && lane < args.num_nodes; ++w) {
                const int32_t count = shared.warp_tokens[w][lane];
                if (w < warp) before += count;
                total += count;
            }
            for (int32_t n = 0; n < args.num_nodes; ++n) {
                const bool goes = mask >> n & 1;
                const uint32_t takers = __ballot_sync(kFullWarp, goes);
                const int32_t position =
                    __shfl_sync(kFullWarp, before, n) + __popc(takers & ((1u << lane) - 1));
                if (token >= args.num_tokens) continue;
                args.positions[int64_t{token} * args.num_nodes + n] = goes ? position : -1;
                if (goes) args.lists[int64_t{n} * args.num_tokens + position] = token;
            }
            __syncthreads();
        }
    }

    // As thread n: tells node n what comes, and waits for what it says.
    __device__ Reason exchange(int32_t total, uint64_t call, CountMessage& theirs) const {
        const int32_t at = lane, parity = call & 1;
        if (at >= args.num_nodes) return kNothing;
        const int32_t* counts = &shared.rank_tokens[at * args.num_ranks];
        NetworkArea* area = args.area;
        if (at == args.node) {
            for (int32_t r = 0; r < kMaxLocalRanks; ++r)
                theirs.counts[r] = r < args.num_ranks ? counts[r] : 0;
            theirs.num_tokens = args.num_tokens;
            return kNothing;
        }
        CountMessage* message = &area->outgoing[parity][at];
        for (int32_t r = 0; r < kMaxLocalRanks; ++r) message->counts[r] = r < args.num_ranks ? counts[r] : 0;
        message->num_tokens = total;
        message->digest = args.digest;
        network::put_signal_thread(&area->incoming[parity][args.node], message, sizeof(CountMessage),
                                   &area->counted[parity][args.node], call, session.place.peer(at));
        const Reason reason = internode::await_signal(session, &area->counted[parity][at], call, at);
        if (reason != kNothing) return reason;
        theirs = area->incoming[parity][at];
        return theirs.digest == args.digest ? kNothing : kDisagreed;
    }

    // As the first warp, from what node `lane` has said.
    __device__ void keep(int32_t total, const CountMessage& theirs) const {
        NetworkPlan& plan = *args.plan;
        const bool is_node = lane < args.num_nodes, is_own = lane == args.node;
        const auto before = [&](int32_t value) { return sum_up_to(value, lane) - value; };
        const int32_t count = is_node ? theirs.num_tokens : 0;
        const int32_t first = before(count);
        const int32_t landed = before(is_own ? 0 : count), returned = before(is_node && !is_own ? total : 0);
        if (is_node) {
            for (int32_t r = 0; r < kMaxLocalRanks; ++r) plan.segments.counts[lane][r] = theirs.counts[r];
            plan.segments.first[lane] = first;
            plan.send_counts[lane] = total;
            plan.landed_first[lane] = landed;
            plan.returned_first[lane] = returned;
        }
        if (lane == args.num_nodes - 1) {
            plan.segments.first[args.num_nodes] = first + count;
            plan.segments.num_tokens = first + count;
            plan.segments.num = args.num_nodes;
            plan.segments.own = args.node;
        }
    }
};

template <InternodeLayoutCfg kCfg>
__device__ void internode_layout(const InternodeLayoutArgs<kCfg>& args) {
    using Layout = InternodeLayout<kCfg>;
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads >= kMaxNodes);
    constexpr uint64_t kPhase = 0;  // before all phases of the dispatch within the node
    __shared__ typename Layout::Shared shared;
    internode::Session session{.place = {args.node, args.num_nodes, args.rank, args.num_ranks},
                               .slabs = args.slabs,
                               .host_hang = args.hang,
                               .workspace = args.workspace,
                               .area = args.area,
                               .state = args.state};
    if (!internode::begin(session, session.own()->epoch + 1, kDispatch, args.timeout_ns)) return;
    const Layout layout{.args = args,
                        .session = session,
                        .shared = shared,
                        .experts_per_rank = max(1, args.num_experts / (args.num_nodes * args.num_ranks)),
                        .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                        .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
    for (int32_t i = threadIdx.x; i < Layout::kMaxAll; i += blockDim.x) shared.rank_tokens[i] = 0;
    if (threadIdx.x == 0) shared.missing = 0;
    __syncthreads();
    int32_t total;
    layout.number_tokens(total);
    __syncthreads();
    const uint64_t call = args.state->calls + 1;
    CountMessage theirs{};
    Reason reason = kNothing;
    if (layout.warp == 0) {
        reason = layout.exchange(total, call, theirs);
        if (reason != kNothing) atomicOr(&shared.missing, 1u << layout.lane);
        __syncwarp();
    }
    reason = sync::agree(reason);
    if (reason != kNothing) return internode::leave(session, reason, kPhase, shared.missing);
    if (layout.warp == 0) layout.keep(total, theirs);
    if (threadIdx.x == 0) args.state->calls = call;
}

}  // namespace ep

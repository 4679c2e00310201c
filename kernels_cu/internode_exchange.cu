// Rows to and from the ranks of the same local index on the other nodes, with what belongs to each row.
//
// Rings      between two ranks there is a ring for each channel and direction: slots in the sender's outbox
//            and, at the same place, in the receiver's inbox. Rows for a node go in chunks, dealt to the
//            channels in turn; the receiver knows from the counts which rows those are, so no row has a
//            header. Rows go on to their place at once, and the slot is free again.
// Passes     what goes beside the rows of a dispatch goes ahead of them, in chunks of its own: the layout
//            within the node needs it. The dispatch runs at the same time as this kernel: it is told how much
//            of that has come, and takes rows in the order in which they land. On the way back the combine
//            runs at the same time, and a chunk is sent when all pieces of its rows are counted.
// Credits    chunk k of a ring is put in slot k % num_slots once the receiver has said that it took chunk
//            k - num_slots out of it, which also means that the outbox has been read. Every slot has its own
//            words: so no two stores to one of them are under way.
// Progress   who sends waits for credits, and on the way back for sums of its own rank; who receives for
//            chunks alone; and all take nodes in turn, one chunk of each at a time: a wait is only ever for
//            somebody who is behind.
// Order      the block's stores into the outbox, barrier, put with signal; acquire of the signal by one
//            thread, barrier, loads from the inbox, barrier, credit. Where stores reach the peer, as over
//            NVLink or PCIe, rows go straight to its inbox: stores, barrier, release.sys of the word.
//            A row is announced to the dispatch behind its stores: proxy fence, for bulk loads; barrier;
//            fence and relaxed word. Epoch and counters of the call are read before a block says that it has
//            begun; the dispatch advances them when all blocks have.
// Counted    the sender adds up the records of its chunks, either way; not the words beside them. A record is
//            padded to 16 bytes behind each part, and only a put carries that.
// Launch     an even number of blocks, all resident: the first half send, the others receive.
#include "internode.cuh"

namespace ep {

struct InternodeExchangeCfg {
    int num_threads;
};

template <InternodeExchangeCfg kCfg>
struct InternodeExchangeArgs {
    HangRecord* hang;
    Workspace* workspace;
    NetworkArea* area;
    NetworkState* state;
    const NetworkPlan* plan;
    const int32_t* lists;  // [num_nodes, num_tokens], see internode_layout.cu; nullptr: the way back
    uint64_t* order;       // of the way out: which tokens have landed, in that order, stamped
    uint64_t* progress;    // of the way back, see IntranodeCombineArgs; left as zeros
    uint8_t *outbox, *inbox;
    uint64_t timeout_ns;
    int32_t rank, num_ranks;  // of the node
    int32_t node, num_nodes, num_tokens;
    int32_t num_channels, num_slots, slot_bytes;
    int32_t num_ahead, num_sections;  // sections; of the first pass
    int32_t ahead_bytes, row_bytes;   // of a record of the first pass, of the second
    Section sections[kMaxSections];
    uint8_t* slabs[kMaxLocalRanks];
};

template <InternodeExchangeCfg kCfg>
struct InternodeExchange {
    static constexpr int kDepth = 4;  // loads of a thread that are on their way together

    const InternodeExchangeArgs<kCfg>& args;
    const internode::Session& session;
    bool is_ahead;  // in the first pass
    int32_t set;    // of the workspace's counters

    __device__ int32_t first_section() const { return is_ahead ? 0 : args.num_ahead; }
    __device__ int32_t last_section() const { return is_ahead ? args.num_ahead : args.num_sections; }
    __device__ int32_t record_bytes() const { return is_ahead ? args.ahead_bytes : args.row_bytes; }

    // Rows [first, end) of those for a node, or from it, that chunk `chunk` of a channel carries in this
    // call.
    struct Stretch {
        int32_t first, end;
    };
    __device__ int32_t rows_per_chunk(int32_t count) const {
        return chunk_rows(count, args.num_channels, args.slot_bytes / record_bytes());
    }
    __device__ Stretch stretch(int32_t count, int32_t channel, int32_t chunk) const {
        const int64_t per_chunk = rows_per_chunk(count);
        const int64_t first = (int64_t{chunk} * args.num_channels + channel) * per_chunk;
        return {static_cast<int32_t>(min(int64_t{count}, first)),
                static_cast<int32_t>(min(int64_t{count}, first + per_chunk))};
    }
    __device__ int32_t num_chunks(int32_t count, int32_t channel) const {
        const int32_t per_chunk = rows_per_chunk(count), num_all = (count + per_chunk - 1) / per_chunk;
        return (num_all - channel + args.num_channels - 1) / args.num_channels;
    }

    __device__ bool is_back() const { return args.lists == nullptr; }
    __device__ int32_t landed_count(int32_t at) const {
        return args.plan->segments.first[at + 1] - args.plan->segments.first[at];
    }
    __device__ int32_t send_count(int32_t at) const {
        return is_back() ? landed_count(at) : args.plan->send_counts[at];
    }
    __device__ int32_t recv_count(int32_t at) const {
        return is_back() ? args.plan->send_counts[at] : landed_count(at);
    }
    // Where the i-th row for a node lies among those here, and where the i-th row from it goes.
    __device__ int64_t source(int32_t at, int32_t i) const {
        return is_back() ? args.plan->segments.first[at] + i : args.lists[int64_t{at} * args.num_tokens + i];
    }
    __device__ int64_t target(int32_t at, int32_t i) const {
        return (is_back() ? args.plan->returned_first[at] : args.plan->landed_first[at]) + i;
    }

    __device__ int64_t slot_offset(int32_t at, int32_t channel, int32_t slot) const {
        return ((int64_t{at} * args.num_channels + channel) * args.num_slots + slot) * args.slot_bytes;
    }

    // Copies one part of `num` rows, as one block: of short rows each vector by itself.
    template <class Vector, class From, class To>
    __device__ void copy_short(int32_t num, int32_t bytes, From from, To to) const {
        const int32_t per_row = bytes / static_cast<int32_t>(sizeof(Vector)), total = num * per_row;
        for (int32_t first = threadIdx.x; first < total; first += kDepth * kCfg.num_threads) {
            Vector values[kDepth];
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v) {
                const int32_t i = first + v * kCfg.num_threads;
                if (i < total) values[v] = reinterpret_cast<const Vector*>(from(i / per_row))[i % per_row];
            }
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v) {
                const int32_t i = first + v * kCfg.num_threads;
                if (i < total) reinterpret_cast<Vector*>(to(i / per_row))[i % per_row] = values[v];
            }
        }
    }
    // Of long ones a stretch by a warp: to work out where each vector belongs takes longer than to move it.
    template <class From, class To>
    __device__ void copy_long(int32_t num, int32_t per_row, From from, To to) const {
        constexpr int32_t kStretch = kDepth * kWarpSize, kNumWarps = kCfg.num_threads / kWarpSize;
        const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        const int32_t num_stretches = (per_row + kStretch - 1) / kStretch;
        for (int32_t i = warp; i < num * num_stretches; i += kNumWarps) {
            const int32_t row = i / num_stretches, first = i % num_stretches * kStretch + lane;
            const auto* source = reinterpret_cast<const uint4*>(from(row)) + first;
            auto* target = reinterpret_cast<uint4*>(to(row)) + first;
            uint4 values[kDepth];
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v)
                if (first + v * kWarpSize < per_row) values[v] = source[v * kWarpSize];
#pragma unroll
            for (int32_t v = 0; v < kDepth; ++v)
                if (first + v * kWarpSize < per_row) target[v * kWarpSize] = values[v];
        }
    }
    template <class From, class To>
    __device__ void copy_section(int32_t num, int32_t bytes, From from, To to) const {
        constexpr auto kVector = static_cast<int32_t>(sizeof(uint4));
        if (bytes % kVector != 0)
            copy_short<uint32_t>(num, bytes, from, to);
        else if (bytes < kWarpSize * kVector)
            copy_short<uint4>(num, bytes, from, to);
        else
            copy_long(num, bytes / kVector, from, to);
    }

    __device__ void gather(int32_t at, Stretch rows, uint8_t* slot) const {
        for (int32_t s = first_section(); s < last_section(); ++s) {
            const Section& section = args.sections[s];
            copy_section(
                rows.end - rows.first, section.bytes,
                [&](int32_t i) { return section.source + source(at, rows.first + i) * section.bytes; },
                [&](int32_t i) { return slot + int64_t{i} * record_bytes() + section.offset; });
        }
    }
    __device__ void scatter(int32_t at, Stretch rows, const uint8_t* slot) const {
        for (int32_t s = first_section(); s < last_section(); ++s) {
            const Section& section = args.sections[s];
            copy_section(
                rows.end - rows.first, section.bytes,
                [&](int32_t i) { return slot + int64_t{i} * record_bytes() + section.offset; },
                [&](int32_t i) { return section.target + target(at, rows.first + i) * section.bytes; });
        }
    }

    // Of a channel: chunks of each node's ring before this call, the word of each slot, and how many chunks
    // the word of a chunk's slot may be behind.
    struct Ring {
        uint64_t (*chunks)[kMaxChannels];
        uint64_t (*words)[kMaxChannels][kMaxSlots];
        uint64_t slack;
    };

    // As one block: `step(at, rows, slot, number)` for the chunks of a channel, those of all nodes in turn,
    // each once its slot's word has come, and what every thread awaits besides. `missing`: the nodes whose
    // word had not when it gave up.
    template <class Count, class Await, class Step>
    __device__ Reason each_chunk(int32_t channel, const Ring& ring, uint32_t& missing, Count count,
                                 Await await, Step step) const {
        const auto word_of = [&](int32_t at, uint64_t number) {
            return &ring.words[at][channel][number % args.num_slots];
        };
        for (int32_t chunk = 0;; ++chunk) {
            bool is_more = false;
            for (int32_t i = 1; i < args.num_nodes; ++i) {
                const int32_t at = (args.node + i) % args.num_nodes;
                const Stretch rows = stretch(count(at), channel, chunk);
                if (rows.first >= rows.end) continue;
                is_more = true;
                const uint64_t number = ring.chunks[at][channel] + 1 + chunk;
                Reason reason = kNothing;
                if (threadIdx.x == 0 && number > ring.slack)
                    reason = internode::await_signal(session, word_of(at, number), number - ring.slack, at);
                if (reason == kNothing) reason = await(at, rows);
                reason = sync::agree(reason);
                if (reason == kNothing) {
                    step(at, rows, static_cast<int32_t>(number % args.num_slots), number);
                    continue;
                }
                for (int32_t other = 0; other < args.num_nodes; ++other) {
                    const Stretch theirs = stretch(count(other), channel, chunk);
                    const uint64_t awaited = ring.chunks[other][channel] + 1 + chunk;
                    if (other == args.node || theirs.first >= theirs.end || awaited <= ring.slack) continue;
                    if (ptx::ld_relaxed_sys(word_of(other, awaited)) < awaited - ring.slack)
                        missing |= 1u << other;
                }
                return reason;
            }
            if (!is_more) break;
        }
        __syncthreads();  // all have read how many there were
        for (int32_t at = threadIdx.x; at < args.num_nodes; at += blockDim.x) {
            if (at == args.node) continue;
            ring.chunks[at][channel] += num_chunks(count(at), channel);
        }
        __syncthreads();  // the next pass begins there
        return kNothing;
    }

    // Tells the dispatch what has landed, as one block behind a barrier.
    __device__ void announce(int32_t at, Stretch rows) const {
        if (threadIdx.x >= kWarpSize) return;
        Workspace* workspace = args.workspace;
        const uint64_t num_rows = rows.end - rows.first;
        uint64_t first = 0;
        if (threadIdx.x == 0)
            first = ptx::atom_add_acq_rel_gpu(is_ahead ? &workspace->announced[set] : &workspace->landed[set],
                                              num_rows);
        if (is_ahead) return;
        first = __shfl_sync(kFullWarp, first, 0);
        __threadfence();
        for (uint64_t i = threadIdx.x; i < num_rows; i += kWarpSize)
            ptx::st_relaxed_gpu(&args.order[first + i],
                                stamped(session.epoch, target(at, rows.first + static_cast<int32_t>(i))));
    }

    // Waits, as one thread of those that share them, until rows for a node are summed. Nobody counts them any
    // more then, so the counters are ready for the next call.
    __device__ Reason await_sums(int32_t at, Stretch rows) const {
        const auto pieces = static_cast<uint64_t>(args.workspace->pieces_per_row);
        for (int32_t i = rows.first + static_cast<int32_t>(threadIdx.x); i < rows.end; i += blockDim.x) {
            uint64_t* counted = &args.progress[args.plan->landed_first[at] + i];
            uint64_t seen;
            if (!sync::await_beside(session.own(), counted, seen,
                                    [&](uint64_t value) { return value >= pieces; }))
                return kLeft;
            ptx::st_relaxed_gpu(counted, 0);
        }
        return kNothing;
    }

    __device__ Reason send(int32_t channel, uint32_t& missing) const {
        const Ring ring{args.state->sent, args.area->freed, static_cast<uint64_t>(args.num_slots)};
        return each_chunk(
            channel, ring, missing, [&](int32_t at) { return send_count(at); },
            [&](int32_t at, Stretch rows) { return is_back() ? await_sums(at, rows) : kNothing; },
            [&](int32_t at, Stretch rows, int32_t slot, uint64_t number) {
                const int32_t peer = session.place.peer(at);
                const int64_t num_bytes = int64_t{rows.end - rows.first} * record_bytes();
                if (threadIdx.x == 0) atomicAdd(&args.state->sent_bytes[at], num_bytes);
                uint8_t* to = args.inbox + slot_offset(args.node, channel, slot);
                uint64_t* landed = &args.area->landed[args.node][channel][slot];
                auto* there = static_cast<uint8_t*>(network::peer_pointer(to, peer));
                if (there != nullptr) {
                    gather(at, rows, there);
                    __syncthreads();
                    if (threadIdx.x == 0) internode::tell(session, landed, number, at);
                    return;
                }
                uint8_t* from = args.outbox + slot_offset(at, channel, slot);
                gather(at, rows, from);
                __syncthreads();
                network::put_signal_block(to, from, num_bytes, landed, number, peer);
            });
    }

    __device__ Reason receive(int32_t channel, uint32_t& missing) const {
        const Ring ring{args.state->received, args.area->landed, 0};
        return each_chunk(
            channel, ring, missing, [&](int32_t at) { return recv_count(at); },
            [](int32_t, Stretch) { return kNothing; },
            [&](int32_t at, Stretch rows, int32_t slot, uint64_t number) {
                scatter(at, rows, args.inbox + slot_offset(at, channel, slot));
#ifdef EP_HAS_TMA
                if (!is_back()) ptx::fence_proxy_async();
#endif
                __syncthreads();
                if (!is_back()) announce(at, rows);
                if (threadIdx.x == 0)
                    internode::tell(session, &args.area->freed[args.node][channel][slot], number, at);
            });
    }
};

// On the way back: waits, as one block, until the combine beside this kernel has begun, and has summed the
// weights. Then `word` is its returning_word. False when the call was given up. A barrier.
template <InternodeExchangeCfg kCfg>
__device__ bool await_combine(const InternodeExchangeArgs<kCfg>& args, const SlabHeader* own,
                              uint64_t& word) {
    __shared__ uint64_t begun;
    bool has_failed = false;
    if (threadIdx.x == 0) {
        const Workspace& workspace = *args.workspace;
        uint64_t announced;
        has_failed = !sync::await_beside(own, &workspace.returning, begun,
                                         [](uint64_t value) { return value != 0; }) ||
                     !sync::await_beside(
                         own, &workspace.announced[returning_set(begun)], announced, [&](uint64_t value) {
                             return value >= static_cast<uint64_t>(workspace.num_weight_warps);
                         });
    }
    if (__syncthreads_or(has_failed)) return false;
    word = begun;
    return true;
}

template <InternodeExchangeCfg kCfg>
__device__ void exchange_with_nodes(const InternodeExchangeArgs<kCfg>& args) {
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads >= kMaxNodes);
    // Before and after all phases of the calls within the node.
    constexpr uint64_t kComing = 0, kReturning = 9;
    internode::Session session{.place = {args.node, args.num_nodes, args.rank, args.num_ranks},
                               .slabs = args.slabs,
                               .host_hang = args.hang,
                               .workspace = args.workspace,
                               .area = args.area,
                               .state = args.state};
    InternodeExchange<kCfg> exchange{.args = args, .session = session};
    const bool is_back = exchange.is_back();
    uint64_t epoch, timeout_ns = args.timeout_ns;
    if (is_back) {
        uint64_t word;
        if (!await_combine(args, session.own(), word)) return;
        epoch = returning_epoch(word);
        exchange.set = returning_set(word);
        timeout_ns = sync::with_grace(timeout_ns);  // a rank that is late within a node is named there first
    } else {
        epoch = session.own()->epoch + 1;  // of the dispatch, which has not ended
        exchange.set = static_cast<int32_t>(args.workspace->calls & 1);
    }
    if (!internode::begin(session, epoch, is_back ? kCombine : kDispatch, timeout_ns)) return;
    if (!is_back && threadIdx.x == 0) ptx::atom_add_acq_rel_gpu(&args.workspace->begun[exchange.set], 1);
#ifdef EP_HAS_TMA
    ptx::launch_dependents();
#endif
    const int32_t num_each = gridDim.x / 2;
    const bool sends = blockIdx.x < num_each;
    Reason reason = kNothing;
    uint32_t missing = 0;
    for (int32_t pass = args.num_ahead > 0 ? 0 : 1; pass < 2; ++pass) {
        exchange.is_ahead = pass == 0;
        for (int32_t channel = blockIdx.x % num_each; channel < args.num_channels && reason == kNothing;
             channel += num_each)
            reason = sends ? exchange.send(channel, missing) : exchange.receive(channel, missing);
    }
    if (reason != kNothing) internode::leave(session, reason, is_back ? kReturning : kComing, missing);
}

template <InternodeExchangeCfg kCfg>
__device__ void internode_exchange(const InternodeExchangeArgs<kCfg>& args) {
    exchange_with_nodes(args);
#ifdef EP_HAS_TMA
    if (args.lists == nullptr) ptx::wait_for_prerequisites();
#endif
}

}  // namespace ep

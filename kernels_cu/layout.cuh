// The control words at the start of every slab, and what a signal word means. Twin of ep_rt/cuda/layout.py.
#pragma once
#include "base.cuh"

namespace ep {

constexpr int kMaxRanks = 128;  // of one NVLink domain

// The call that a signal belongs to. Ranks that are in different calls find out from each other's signals.
enum Operation : uint64_t {
    kNoOperation = 0,  // start and reset
    kBarrier = 1,
    kDispatch = 2,
    kCombine = 3,
    kExpand = 4,  // of one rank alone: never in a signal
    kLowLatencyDispatch = 5,
    kLowLatencyCombine = 6,
    kPing = 16,        // over NVSHMEM
    kGaveUp = 0xffff,  // the sender left the call; above every call, so that the word still grows
};

// Signals are words that only grow: the epoch counts the collective calls of a slab, the operation says which
// call the sender is in.
constexpr int kOperationBits = 16;
__host__ __device__ constexpr uint64_t signal_word(uint64_t epoch, uint64_t operation) {
    return epoch << kOperationBits | operation;
}
__host__ __device__ constexpr uint64_t signal_epoch(uint64_t word) { return word >> kOperationBits; }
__host__ __device__ constexpr uint64_t signal_operation(uint64_t word) {
    return word & ((uint64_t{1} << kOperationBits) - 1);
}

// Why a kernel left before its work was done.
enum Reason : uint64_t {
    kNothing = 0,
    kExpired = 1,       // the deadline passed
    kContradicted = 2,  // a peer's signal says that it gave up, or that it is in another call
    kDisagreed = 3,     // a peer's arguments are not those of this rank
    kLeft = 4,          // another block of this rank gave up; never recorded
    kOverfull = 5       // more rows for one expert than there is room for
};

// What a rank saw of one peer when it gave up. expected 0: it was not waiting for this peer.
struct PeerWait {
    uint64_t expected, seen;
};

// What a rank saw of all its peers: a rank that gave up is late for others, so one peer's name is not enough
// to blame it. `reason` is stored last. Written once, until the ranks reset together.
struct HangRecord {
    uint64_t reason, operation, phase, epoch;
    PeerWait waits[kMaxRanks];
};

constexpr int kMaxGridBlocks = 640;  // of any kernel that advances the epoch

struct SlabHeader {
    uint64_t signals[kMaxRanks];  // [src_rank]: stored by that rank; only grows

    // This rank's own; peers only look at them, from their hosts.
    uint64_t epoch;   // calls completed; advanced by the kernels, so that a graph can be replayed
    uint64_t failed;  // 1: a call was given up, and kernels that start leave at once; cleared by reset alone
    HangRecord hang;

    // The same epoch once for every block, for calls whose blocks never meet: each reads its own word and
    // advances its share of them, so none is written while another block may still read it.
    uint64_t block_epochs[kMaxGridBlocks];
};

// Normal mode within one NVLink domain.

constexpr int kMaxLocalRanks = 8;      // unrolled, one bit each in a byte
constexpr int kMaxLocalExperts = 512;  // of one rank
constexpr int kMaxBlocks = 256;        // of a kernel
constexpr int kMaxExpandTopk = 64;     // columns of the expert-major layout: two for each lane
constexpr int kMaxNodes = 32;          // of the two-level mode

// A word that carries the call it belongs to: who sees the epoch has the value, without a flag or a fence.
// Such words come in two sets, by parity of the epoch: a rank may be one call ahead of a peer that still
// reads, and not two, because every call ends by hearing from every rank.
__host__ __device__ constexpr uint64_t stamped(uint64_t epoch, uint32_t value) { return epoch << 32 | value; }
__host__ __device__ constexpr bool is_stamped(uint64_t word, uint64_t epoch) {
    return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(epoch);
}

constexpr int kOffsetUnit = 256;  // bytes; slab offsets travel as 32-bit multiples

// What a rank tells every peer before rows move. All words are stamped.
struct DispatchOffer {
    uint64_t counts[kMaxLocalRanks];  // tokens it sends to each rank
    uint64_t offset, capacity;        // where its own rows are to land, in kOffsetUnit, and how many fit
    uint64_t digest;                  // of everything that must be the same on all ranks
};

struct CombineOffer {
    uint64_t offset, weights_offset;  // where its rows and their weights lie, in kOffsetUnit
    uint64_t digest;
    uint64_t staged;  // chunks of its rows that lie there already; kAllStaged for all
};

// Rows that lie elsewhere are copied to where peers read them in chunks: chunk c holds rows
// [c * kChunkRows, (c + 1) * kChunkRows) of every source rank, the last one all from there on.
constexpr int kChunkRows = 128;
constexpr int kMaxChunks = 512;
constexpr uint32_t kAllStaged = 0xffffffffu;
__host__ __device__ constexpr int32_t chunk_of(int32_t row) {
    return row / kChunkRows < kMaxChunks ? row / kChunkRows : kMaxChunks - 1;
}

// Follows the header of a slab. Written by the peers.
struct Exchange {
    DispatchOffer dispatch[2][kMaxLocalRanks];                    // [epoch & 1][src_rank]
    CombineOffer combine[2][kMaxLocalRanks];                      // [epoch & 1][src_rank]
    uint64_t expert_counts[2][kMaxLocalRanks][kMaxLocalExperts];  // [epoch & 1][src_rank], stamped
    uint64_t arrivals[kMaxLocalRanks];  // [src_rank]: signal word; its part of the call is done; only grows
    // [epoch & 1][src_rank][segment][dst_rank], stamped
    uint64_t segment_counts[2][kMaxLocalRanks][kMaxNodes][kMaxLocalRanks];
};

constexpr int64_t kExchangeOffset = align_up<int64_t>(sizeof(SlabHeader), 128);
constexpr int64_t kPayloadOffset = align_up<int64_t>(kExchangeOffset + sizeof(Exchange), kOffsetUnit);

// Where the parts of what a rank receives lie, from the place it offers, for `capacity` rows. Rows come last,
// so that what the counts leave free can be given back.
struct ReceiveLayout {
    int64_t topk_idx, topk_weights, sf, x, end;
};
__host__ __device__ constexpr ReceiveLayout receive_layout(int64_t capacity, int32_t idx_row_bytes,
                                                           int32_t weights_row_bytes, int32_t sf_row_bytes,
                                                           int32_t row_bytes) {
    ReceiveLayout at{};
    at.topk_idx = 0;
    at.topk_weights = align_up<int64_t>(at.topk_idx + capacity * idx_row_bytes, kOffsetUnit);
    at.sf = align_up<int64_t>(at.topk_weights + capacity * weights_row_bytes, kOffsetUnit);
    at.x = align_up<int64_t>(at.sf + capacity * sf_row_bytes, kOffsetUnit);
    at.end = align_up<int64_t>(at.x + capacity * row_bytes, kOffsetUnit);
    return at;
}

// What a dispatch tells its host (pinned memory) or, in a graph, leaves on the device.
struct DispatchResult {
    uint64_t call;                            // DispatchArgs.call, stored last: the rest is complete
    int32_t num_recv_tokens;                  // sent here, also those that do not fit
    uint32_t overfull_ranks;                  // bit r: more tokens go to rank r than fit there
    int32_t expert_counts[kMaxLocalExperts];  // by local expert, (token, column) pairs
};

// Where this rank's tokens went, kept by the handle. Row of token t at rank d: base[d] + send_row[t][d],
// unless send_row is -1 or not below limit[d] (then it did not fit and was dropped).
// With segments base[d] is 0, and the row is segment_base[n][d] + send_row[t][d] for t in segment n, unless
// send_row is -1 or that row is not below limit[d].
struct SendPlan {
    int32_t base[kMaxLocalRanks], limit[kMaxLocalRanks];
    int32_t recv_counts[kMaxLocalRanks];    // rows that this rank got from each source, also dropped ones
    int32_t recv_ends[kMaxLocalRanks];      // from sources up to each; of interest to callers, as the next
    int32_t expert_ends[kMaxLocalExperts];  // pairs of local experts up to each, counts rounded up
    int32_t segment_base[kMaxNodes][kMaxLocalRanks];
    int32_t segment_counts[kMaxNodes][kMaxLocalRanks];  // as recv_counts, by segment and source
};

// Of one rank, in its own memory. Counters come in two sets, by parity of `calls`: block 0 of a call clears
// the set of the next one, which nobody uses between the end of the last call and the start of the next.
struct Workspace {
    uint64_t calls;        // that used it; advanced by the last block of each
    uint64_t tickets[2];   // rows handed out to warps
    uint64_t arrived[2];   // blocks whose positions are written
    uint64_t finished[2];  // blocks whose rows have landed
    uint64_t leaving;      // 1: a block is giving the call up; cleared by reset alone
    uint64_t block_counts[kMaxBlocks][kMaxLocalRanks];  // stamped
    uint32_t expert_counts[2][kMaxLocalRanks * kMaxLocalExperts];
    uint64_t staged[2][kMaxChunks];  // warps that have copied their part of a chunk
    // Of the exchange that a dispatch over several nodes runs beside: its blocks that have begun, tokens of
    // other nodes of which everything but the row has landed, and those whose row has. Of a combine: warps
    // that have summed their part of the weights are `announced`.
    uint64_t begun[2], announced[2], landed[2];
    // Of a combine over several nodes: see returning_word, 0 for none; pieces of each row, and warps that sum
    // weights, which are stored before that.
    uint64_t returning;
    int32_t pieces_per_row, num_weight_warps;
    uint64_t peer_bytes;  // see tally.cuh; only grows
};

// For the exchange that runs beside a combine: its epoch, and which set of counters.
__host__ __device__ constexpr uint64_t returning_word(uint64_t epoch, int32_t set) {
    return epoch << 1 | static_cast<uint64_t>(set);
}
__host__ __device__ constexpr uint64_t returning_epoch(uint64_t word) { return word >> 1; }
__host__ __device__ constexpr int32_t returning_set(uint64_t word) { return static_cast<int32_t>(word & 1); }

// Of one rank's kernels that wait for no other rank, one at a time. Counters come in two sets, as above.
struct LocalWorkspace {
    uint64_t calls;                                  // that used it; advanced by the last block of each
    uint64_t arrived[2];                             // blocks at the barrier of the grid
    uint64_t finished[2];                            // blocks whose work is done
    uint32_t tickets[2];                             // pieces handed out to warps
    uint64_t counts[kMaxBlocks * kMaxLocalExperts];  // [block][expert], stamped with the call
};

// Low-latency mode, over one NVLink domain or several nodes.

// Where rows land. A zone takes those of one call at a time; the host says which one, alternating.
constexpr int kLowLatencyZones = 4;  // two of dispatch, then two of combine
constexpr int kFirstCombineZone = 2;
constexpr int kMaxSendBlocks = 256;
constexpr int kMaxWaves = 4;  // of what a block sends, with a flag behind each
constexpr int kMaxClearBlocks = 32;
constexpr int kMaxLowLatencyRanks = 32;  // of all nodes, one bit each in a word

// Of calls of one shape, in the slab of every rank, or over several nodes in symmetric memory. Written by the
// peers. Uses of a zone are counted from 1; what is stamped carries the epoch of the call.
struct LowLatencyArea {
    uint64_t freed[kLowLatencyZones]
                  [kMaxLowLatencyRanks];  // [zone][peer]: uses that the peer no longer needs; only grows
    uint64_t
        beats[kMaxLowLatencyRanks];  // [src_rank]: changes now and then while that rank waits in a kernel
    uint64_t digests[kLowLatencyZones][kMaxLowLatencyRanks];     // [zone][src_rank]: stamped
    uint64_t num_tokens[kLowLatencyZones][kMaxLowLatencyRanks];  // [zone][src_rank]: stamped
    // [zone][src_rank][which][its block]: stamped; 0 says it of all that the block sent, others of its waves
    uint64_t flags[kLowLatencyZones][kMaxLowLatencyRanks][kMaxWaves][kMaxSendBlocks];

    // Over several nodes alone.
    uint64_t doing[kMaxLowLatencyRanks];      // [src_rank], of other nodes: the call that it is in
    uint64_t farewells[kMaxLowLatencyRanks];  // [src_rank]: 0, or that it gave a call up, and over whom
    uint64_t told_ids[kLowLatencyZones][kMaxLowLatencyRanks];  // [zone][src_rank]: stamped: they are there
    uint64_t told_weights[kLowLatencyZones][kMaxLowLatencyRanks];  // the same
};

// Of the calls of one shape on one rank, in its own memory.
struct LowLatencyState {
    uint64_t uses[kLowLatencyZones][kMaxGridBlocks];  // of the zone so far, once for every block as above
    uint64_t received[kLowLatencyZones];              // the last use whose receive phase has ended
    uint64_t decisions[kLowLatencyZones]
                      [kMaxLowLatencyRanks];               // [zone][src_rank]: stamped; 1 present, 2 absent
    uint64_t cleared[kFirstCombineZone][kMaxClearBlocks];  // [zone][block that clears]: stamped
    uint64_t listed[kFirstCombineZone]
                   [kMaxLowLatencyRanks];  // [zone][src_rank]: stamped; its tokens, with masks
    uint64_t posted[kLowLatencyZones][kMaxLowLatencyRanks];  // [zone][peer]: `freed` as told over the network
};

// Of one call, kept by its handle: written by its send phase.
struct LowLatencyRecord {
    uint64_t epoch, use;
    int64_t max_tokens;  // of any rank; written by the receive phase of a dispatch
};

// Where the row of a (source rank, token, column) lies among the rows of this rank's experts; row -1:
// elsewhere.
struct Route {
    int32_t row;
    float weight;
};

// Two-level mode: several NVLink domains, called nodes, on a network.

// The tokens that a rank dispatches within its node, in a list. Segment n holds those that came from the rank
// of the same local index on node n, in that rank's order; segment `own` all tokens of this rank itself, also
// those that go to other nodes alone.
struct Segments {
    int32_t num_tokens;                         // of all segments
    int32_t num, own;                           // segments, one for each node; the one of this rank's tokens
    int32_t first[kMaxNodes + 1];               // token at which each begins, and the end
    int32_t counts[kMaxNodes][kMaxLocalRanks];  // tokens of a segment that go to each rank of this node
};

constexpr int kMaxChannels = 32;  // rings between two ranks in one direction
constexpr int kMaxSlots = 8;      // of a ring

// Rows of a chunk where `count` cross, and a slot holds `max_rows`: chunk c goes through channel
// c % num_channels.
__host__ __device__ constexpr int32_t chunk_rows(int32_t count, int32_t num_channels, int32_t max_rows) {
    const int32_t share = (count + num_channels - 1) / num_channels;
    return share < 1 ? 1 : share < max_rows ? share : max_rows;
}

// The farewell of a rank that gave up the call of a signal word over the nodes, or ranks, whose bits are set.
__host__ __device__ constexpr uint64_t farewell_word(uint32_t missing, Reason reason, uint64_t word) {
    return uint64_t{missing} << 32 | static_cast<uint32_t>(word << 4) | reason;
}

// What a rank tells those that its tokens go to before they come.
struct CountMessage {
    int32_t counts[kMaxLocalRanks];  // tokens that go to each rank of the receiver's node
    int32_t num_tokens;              // tokens that go to any of them
    uint32_t digest;                 // of everything that must be the same on all ranks
};

// At the start of a rank's symmetric memory; the rings follow.
struct NetworkArea {
    uint64_t doing[kMaxNodes];       // [src_node]: the call that it is in
    uint64_t farewells[kMaxNodes];   // [src_node]: 0, or that it gave a call up, and over whom
    uint64_t counted[2][kMaxNodes];  // [call & 1][src_node]: the call of its CountMessage
    uint64_t landed[kMaxNodes][kMaxChannels][kMaxSlots];  // [src_node]: the chunk that lies in the slot
    uint64_t freed[kMaxNodes][kMaxChannels][kMaxSlots];   // [dst_node]: the chunk that it has taken out
    CountMessage incoming[2][kMaxNodes], outgoing[2][kMaxNodes];  // [call & 1]
};

// Of one rank, in its own memory. Chunks of a ring are counted from 1, over all calls.
struct NetworkState {
    uint64_t calls;  // layouts so far
    uint64_t sent[kMaxNodes][kMaxChannels], received[kMaxNodes][kMaxChannels];
    uint64_t sent_bytes[kMaxNodes];  // of records, to each node; only grows
};

// Which tokens cross the network, kept by the handle. Arrays of what came, or comes back, hold the parts of
// all nodes but this one, one after another.
struct NetworkPlan {
    Segments segments;
    int32_t send_counts[kMaxNodes];     // tokens of this rank that go to each node
    int32_t landed_first[kMaxNodes];    // where the tokens of each node begin
    int32_t returned_first[kMaxNodes];  // where the rows that each node sends back begin
};

// What belongs to a row: `bytes` of it, a multiple of 4, from here to there.
struct Section {
    const uint8_t* source;
    uint8_t* target;
    int32_t bytes;
    int32_t offset;  // within a record, a multiple of 16
};
constexpr int kMaxSections = 4;

}  // namespace ep

// Low-latency combine, within one NVLink domain or over several nodes: the experts' ranks push rows back, the
// tokens' ranks add.
//
// Protocol   the landing zone of a rank has slots for each of its tokens. By default an expert's rank weights
//            and adds what its own experts made of a token, in float32, and pushes that one row into the slot
//            of (token, rank); the token's rank adds those. Else every row travels, into the slot of (token,
//            column), and is weighted where it arrives. What belongs to whom stands in the routes that the
//            dispatch has left; weights came with the dispatch, or go ahead now as stamped words.
// Arrival    sums in bfloat16 are their own flags: a zone rests at a pattern that no converted sum has, and
//            its reader polls the words themselves and puts the pattern back. That holds because each slot is
//            read by one lane, because the next sender waits until the reader's kernel has ended (`freed`),
//            also when phases are split over streams, and because zones are made anew after a time-out. Rows
//            that travel as they are may hold any bits, FP8 and LogFMT do not fill their slots, and a rank
//            that comes too late to be waited for (masks) leaves rows that nobody takes: all these use flags,
//            one for each block of a sender.
// Order      rows leave by ordinary stores; block barrier, release.sys flag. Polled data are relaxed words.
// Blocks     in this order: one that tells the peers where this rank is; R that send weights, if they have
//            to; those that send rows; those that add, which may find a place only when others have ended.
// Sums       products and sums in float32, each rounded by itself, in ascending order: of columns on the
//            experts' rank, of ranks on the token's.
#include "low_latency_combine_receive.cuh"
#include "low_latency_combine_send.cuh"

namespace ep {

template <LowLatencyCombineCfg kCfg>
__device__ void low_latency_combine(const LowLatencyCombineArgs<kCfg>& args) {
    using Block = LowLatencyCombineBlock<kCfg>;
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads <= 1024);
    static_assert(kCfg.num_threads >= 2 * kWarpSize);
    __shared__ LowLatencyCombineShared<kCfg> shared;
    low_latency::Session<Block::kOverNetwork> session;
    const int64_t most_tokens = args.dispatch_record->max_tokens;  // on its way while the block begins
    if constexpr (Block::kWire == wire::kLogFmt) logfmt::fill_block_table();
    if (!low_latency::begin(session, shared.found, args, kLowLatencyCombine)) return;
    const bool sends = (args.phases & low_latency::kSends) != 0;
    if (low_latency::speaks()) {
        // The rows that were dispatched have done their service, if they are still the last ones of their
        // zone.
        const int32_t zone = args.dispatch_zone;
        const bool is_last = zone >= 0 && args.dispatch_record->use == args.state->uses[zone][0];
        low_latency::post_freed(session, sends && is_last ? zone : -1);
        return low_latency::end(session, shared.found, kNothing, low_latency::kFreeing);
    }

    Block block{.args = args,
                .session = session,
                .shared = shared,
                .num_local_experts = args.num_experts / args.num_ranks,
                .num_vectors = args.hidden / low_latency::kVectorChannels,
                .num_pieces = (args.hidden + low_latency::kPieceChannels - 1) / low_latency::kPieceChannels,
                .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize,
                .slot_bytes = wire::slot_bytes(args.hidden)};
    // The same on every rank. With masks they may disagree about the tokens of one that is left out.
    block.max_tokens = args.masks != nullptr ? args.num_max_tokens : static_cast<int32_t>(most_tokens);
    // Few tokens: more turns, so that more warps have one.
    const int64_t num_turns = int64_t{block.max_tokens} * block.num_pieces;
    const bool is_split = args.masks == nullptr &&
                          num_turns * args.num_ranks <= int64_t{args.few_send_blocks} * Block::kNumWarps;
    block.sources_per_turn = is_split ? 1 : args.num_ranks;
    block.num_groups = is_split ? args.num_ranks : 1;
    block.num_row_blocks =
        max(1, low_latency::num_combine_blocks(num_turns * block.num_groups, Block::kNumWarps,
                                               args.few_send_blocks, args.max_send_blocks));

    int32_t number = low_latency::block_number();
    const int32_t num_weight_blocks = args.sends_weights ? args.num_ranks : 0;
    const int32_t num_senders = sends ? num_weight_blocks + args.max_send_blocks : 0;
    Reason reason = kNothing;
    uint64_t phase = low_latency::kFreeing;
    if (number < num_senders) {
        reason = low_latency::await_zone(session, shared.found);
        number -= num_weight_blocks;
        if (reason == kNothing && number < 0) {
            const int32_t dst = number + num_weight_blocks;
            if (shared.found.ranks >> dst & 1) block.send_weights(dst);
        } else if (reason == kNothing && number < block.num_row_blocks) {
            const int32_t peer = threadIdx.x;
            if (number == 0 && peer < args.num_ranks && (shared.found.ranks >> peer & 1))
                session.tell(
                    peer, [&](LowLatencyArea* area) { return &area->digests[args.zone][args.rank]; },
                    stamped(session.call.epoch, args.digest));
            reason = block.send_rows(number);
        }
    } else if ((args.phases & low_latency::kReceives) && number - num_senders < args.num_sum_blocks) {
        phase = low_latency::kLanding;
        reason = block.sum_tokens(number - num_senders, args.num_sum_blocks);
    }
    low_latency::end(session, shared.found, reason, phase);
}

}  // namespace ep

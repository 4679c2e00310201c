// Low-latency dispatch, within one NVLink domain or over several nodes: every token once to each rank that
// owns an expert of it, into fixed slots, so that rows leave before anybody has counted anything.
//
// Protocol   the landing zone of a rank has a slot for each (source rank, source token). A sender stores rows
//            there, and a flag for each of its blocks when what that block stored has landed. Before that it
//            tells every rank all its expert ids, in stamped words, and each the weights of the pairs that it
//            gets. From the ids of all ranks a receiver works out where each row belongs among those of its
//            expert: source rank, then token, then column.
// Layouts    with layout "rank" the result is the landing zone itself, with lists of its rows for each
//            expert. Else warps copy the rows to their experts. Each sees by itself whether a row is ours,
//            loads it as soon as the flags of its pieces are there, and asks last where it belongs, so that
//            no row waits for lists of others.
// Flags      and not data that is polled: bfloat16 rows may hold any bits, so no pattern says "not yet"; a
//            row that several experts want is read several times; and a row that came late, after a
//            time-out, must not be taken for one of a later call.
// Order      rows leave by ordinary stores; block barrier, release.sys flag. The receiver acquires the flag.
//            Ids and weights are relaxed words that carry all there is to know. Those who list learn by a
//            release.gpu word of each block that clears that it has, those who copy by a stamped word of
//            each pair; with masks, where those who list decide who takes part, by their words first.
// Blocks     in this order, so that none waits for one behind it that has no place yet: one that tells the
//            peers where this rank is; R that send ids, one for each rank, so that their words do not queue
//            behind rows, and then say what came for each expert; those that clear the lists, while ids
//            travel; those that send rows; those that make lists, some for each source rank; those that
//            copy. A phase that is not of this kernel has no blocks of its own.
// Bad ids    an expert id outside 0 .. num_experts - 1 is treated as -1: none. More than M pairs from one
//            rank to one expert, which takes an expert that is repeated in a row, fail the call.
#include "low_latency_dispatch_copies.cuh"
#include "low_latency_dispatch_lists.cuh"
#include "low_latency_dispatch_receive.cuh"
#include "low_latency_dispatch_send.cuh"

namespace ep {

template <LowLatencyDispatchCfg kCfg>
__device__ void low_latency_dispatch(const LowLatencyDispatchArgs<kCfg>& args) {
    using Block = LowLatencyDispatchBlock<kCfg>;
    static_assert(kCfg.num_threads % kWarpSize == 0 && kCfg.num_threads <= 1024);
    static_assert(kCfg.num_threads >= 2 * kWarpSize);
    __shared__ typename Block::Shared shared;
    low_latency::Session<Block::kOverNetwork> session;
    Block block{.args = args,
                .session = session,
                .shared = shared,
                .num_local_experts = args.num_experts / args.num_ranks,
                .num_vectors = args.hidden / low_latency::kVectorChannels,
                .num_pieces = (args.hidden + low_latency::kPieceChannels - 1) / low_latency::kPieceChannels,
                .warp = static_cast<int32_t>(threadIdx.x) / kWarpSize,
                .lane = static_cast<int32_t>(threadIdx.x) % kWarpSize};
    const int32_t number = low_latency::block_number();
    const bool sends = (args.phases & low_latency::kSends) != 0;
    const bool receives = (args.phases & low_latency::kReceives) != 0;
    const int32_t num_row_blocks = sends ? block.num_send_blocks(args.num_tokens) : 0;
    const int32_t num_clear_blocks = sends ? args.num_clear_blocks : 0;
    const bool tells = number >= 0 && number < args.num_ranks;
    const int32_t clear_block = number - args.num_ranks;
    const int32_t row_block = clear_block - num_clear_blocks, list_block = row_block - num_row_blocks;
    const int32_t copy_block = list_block - args.num_ranks * args.num_list_blocks;
    const bool sends_rows = row_block >= 0 && row_block < num_row_blocks;
    // On their way while the block begins.
    typename Block::PairsBatch pairs{};
    typename Block::Piece piece{};
    if (tells && sends) pairs = block.load_pairs(threadIdx.x);
    if (sends_rows) piece = block.load_piece(row_block + num_row_blocks * block.warp);
    if (!low_latency::begin(session, shared.found, args, kLowLatencyDispatch)) return;
    if (low_latency::speaks()) {
        // Until the next dispatch receives, a result may lie in its landing zone.
        low_latency::post_freed(session, receives ? args.zone ^ 1 : -1);
        return low_latency::end(session, shared.found, kNothing, low_latency::kFreeing);
    }
    Reason reason = kNothing;
    uint64_t phase = low_latency::kFreeing;
    if (tells && sends) reason = block.send_metadata(number, pairs);
    if (clear_block >= 0 && clear_block < num_clear_blocks) {
        block.clear_lists(clear_block);
    } else if (sends_rows) {
        reason = block.send_rows(row_block, num_row_blocks, piece);
    } else if (receives && copy_block < 0) {
        const auto share = tells ? Block::kNoShare : block.share_of(list_block);
        if (!tells && sends)
            reason = low_latency::await_blocks(session, session.state->cleared[args.zone], num_clear_blocks,
                                               [](int32_t, uint32_t) {});
        if (reason == kNothing) {
            phase = low_latency::kCounting;
            reason = block.read_sources(share);
        }
        if (reason == kNothing) reason = tells ? block.tell(number) : block.list(share);
    } else if (receives && copy_block < args.num_copy_blocks) {
        phase = low_latency::kLanding;
        reason = block.copy_rows(copy_block, args.num_copy_blocks);
    }
    low_latency::end(session, shared.found, reason, phase);
}

}  // namespace ep

// Threads of a block that meet: barriers of the block, and collectives of a warp.
//
// A barrier, and __syncwarp, tell every thread what all of them did before. Shuffles, votes and reductions
// exchange their operands and order no memory, as PTX says of shfl, vote, match and redux.
#include <algorithm>

#include "memory.h"

namespace emu {
namespace {

// Every one of the threads, all of one block, knows what each of them knew and did.
void merge(Fiber* const* threads, int num_threads) {
    Knowledge all = threads[0]->known;
    for (int i = 1; i < num_threads; ++i) learn(all, threads[i]->known);
    const int slot = threads[0]->slot;
    uint32_t* happened = copy_of_chunk(all.happened[slot]);
    uint32_t* fenced = copy_of_chunk(all.fenced[slot]);
    uint32_t* fenced_shared = copy_of_chunk(all.fenced_shared[slot]);
    for (int i = 0; i < num_threads; ++i) {
        Fiber* thread = threads[i];
        const uint32_t k = thread->agent % chunk_size;
        happened[k] = thread->clock++;
        fenced[k] = std::max(fenced[k], thread->fenced_until);
        fenced_shared[k] = std::max(fenced_shared[k], thread->fenced_shared_until);
    }
    const auto with_chunk = [slot](Clock clock, const uint32_t* chunk) {
        Chunk* changed = copy_of(clock);
        changed[slot] = chunk;
        return changed;
    };
    const Knowledge merged{with_chunk(all.happened, happened), with_chunk(all.fenced, fenced),
                           with_chunk(all.fenced_shared, fenced_shared)};
    for (int i = 0; i < num_threads; ++i) threads[i]->known = merged;
}

uint64_t reduced(const Meeting& meeting, Reduce operation, bool is_signed) {
    bool is_first = true;
    uint64_t sum = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        const uint64_t value = meeting.values[lane];
        const bool is_less =
            is_signed ? static_cast<int64_t>(value) < static_cast<int64_t>(sum) : value < sum;
        if (is_first) {
            sum = value;
        } else {
            switch (operation) {
                case Reduce::kAdd:
                    sum += value;
                    break;
                case Reduce::kMin:
                    if (is_less) sum = value;
                    break;
                case Reduce::kMax:
                    if (!is_less) sum = value;
                    break;
                case Reduce::kAnd:
                    sum &= value;
                    break;
                case Reduce::kOr:
                    sum |= value;
                    break;
                default:
                    sum ^= value;
            }
        }
        is_first = false;
    }
    return sum;
}

uint64_t answer(const Meeting& meeting, Collective kind, int lane, uint64_t value, uint32_t argument,
                bool is_signed) {
    uint64_t lanes = 0;
    switch (kind) {
        case Collective::kShuffle:
            return meeting.mask >> argument & 1 ? meeting.values[argument] : value;
        case Collective::kReduce:
            return reduced(meeting, static_cast<Reduce>(argument), is_signed);
        case Collective::kBallot:
            for (int other = 0; other < kWarpLanes; ++other)
                if (meeting.mask >> other & 1) lanes |= (meeting.values[other] & 1) << other;
            return lanes;
        case Collective::kMatch:
            for (int other = 0; other < kWarpLanes; ++other)
                if ((meeting.mask >> other & 1) && meeting.values[other] == meeting.values[lane])
                    lanes |= uint64_t{1} << other;
            return lanes;
        default:
            return 0;
    }
}

void complete(BlockBarrier& barrier) {
    merge(barrier.arrived.data(), static_cast<int>(barrier.arrived.size()));
    for (Fiber* thread : barrier.arrived) {
        thread->vote_result = thread->vote == Vote::kAnd     ? barrier.all
                              : thread->vote == Vote::kOr    ? barrier.any
                              : thread->vote == Vote::kCount ? barrier.count
                                                             : 0;
        if (thread->state == State::kAtBarrier) make_runnable(thread);
    }
    barrier.arrived.clear();
}

// Where the thread meets the others: a meeting of the same lanes that it has not come to yet, or a new one.
int meeting_for(std::vector<Meeting>& meetings, uint32_t mask, int lane, Collective kind) {
    int free = -1;
    for (int i = 0; i < static_cast<int>(meetings.size()); ++i) {
        const Meeting& meeting = meetings[i];
        if (meeting.is_complete && meeting.left == 0) free = i;
        if (meeting.is_complete || meeting.mask != mask || (meeting.arrived >> lane & 1)) continue;
        if (meeting.kind != kind)
            fail("collective", "lanes of a warp meet at different collectives",
                 access_of(current->agent, meeting.pc, "the first"),
                 access_of(current->agent, current->pc, "another"));
        return i;
    }
    if (free < 0) {
        free = static_cast<int>(meetings.size());
        meetings.emplace_back();
    }
    meetings[free] = {};
    meetings[free].mask = mask;
    meetings[free].kind = kind;
    meetings[free].pc = current->pc;
    return free;
}

}  // namespace

int block_barrier(int id, int num_threads, int value, Vote vote) {
    begin(EMU_PC());
    tick(4);
    Fiber* fiber = current;
    Slot& slot = slots[fiber->slot];
    BlockBarrier& barrier = slot.barriers[id];
    if (barrier.arrived.empty()) {
        barrier.all = 1;
        barrier.any = barrier.count = 0;
    }
    barrier.all &= value != 0;
    barrier.any |= value != 0;
    barrier.count += value != 0;
    fiber->vote = vote;
    barrier.arrived.push_back(fiber);
    if (num_threads == 0 && slot.num_alive != slot.num_threads)
        fail("collective", "a barrier of the block that some of its threads will not reach: they have ended",
             access_of(fiber->agent, fiber->pc, "barrier"));
    const int awaited = num_threads != 0 ? num_threads : slot.num_threads;
    if (static_cast<int>(barrier.arrived.size()) == awaited) {
        complete(barrier);
        tick(2);
    } else {
        block(State::kAtBarrier);
    }
    return fiber->vote_result;
}

uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, uint32_t argument, bool is_signed) {
    begin(EMU_PC());
    Fiber* fiber = current;
    Slot& slot = slots[fiber->slot];
    const int warp = fiber->thread / kWarpLanes, lane = fiber->thread % kWarpLanes;
    const int num_lanes = std::min(kWarpLanes, slot.num_threads - warp * kWarpLanes);
    if (num_lanes < kWarpLanes) mask &= (1u << num_lanes) - 1;
    if (!(mask >> lane & 1))
        fail("collective", "a lane outside of its own mask",
             access_of(fiber->agent, fiber->pc, "collective"));
    auto& meetings = slot.meetings[warp];
    const int number = meeting_for(meetings, mask, lane, kind);
    meetings[number].values[lane] = value;
    meetings[number].arrived |= 1u << lane;
    if (meetings[number].arrived == mask) {
        meetings[number].is_complete = true;
        meetings[number].left = mask;
        Fiber* threads[kWarpLanes];
        int num_threads = 0;
        for (int other = 0; other < kWarpLanes; ++other) {
            if (!(mask >> other & 1)) continue;
            Fiber* thread = &fibers[fiber->slot * geometry.max_threads + warp * kWarpLanes + other];
            threads[num_threads++] = thread;
            if (thread != fiber && thread->state == State::kAtCollective) make_runnable(thread);
        }
        if (kind == Collective::kSync) merge(threads, num_threads);
    } else {
        block(State::kAtCollective);
    }
    const uint64_t mine = answer(meetings[number], kind, lane, value, argument, is_signed);
    meetings[number].left &= ~(1u << lane);
    tick(8);
    return mine;
}

}  // namespace emu

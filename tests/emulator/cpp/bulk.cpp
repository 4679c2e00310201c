// Bulk copies and the barriers in shared memory that count their bytes.
//
// A copy happens in three steps, each at a random later time: it reads its source; writes one half of its
// destination; writes the other half and completes. Reading and writing are two agents with clocks of their
// own, of the async proxy, so that waiting for reads alone gives no knowledge of the writes. Completion, by a
// barrier or a group, implies the proxy fence for what it completes (PTX ISA, "Async proxy").
#include <algorithm>
#include <unordered_map>

#include "memory.h"

namespace emu {

struct BulkCopy {
    enum Stage { kIssued, kRead, kHalfWritten, kLanded } stage;
    bool is_load, writes_upper_half_first;
    uint8_t *source, *destination;
    uint32_t num_bytes, pc;
    std::vector<uint8_t> data;
    Knowledge known;
    uint32_t reader, reader_clock, writer, writer_clock;
    Fiber* fiber;
    uint64_t* mbarrier;
};

namespace {

struct Mbarrier {
    uint32_t count, pending, phase;
    int64_t expected_bytes;
    bool is_fenced;  // its initialisation, for the async proxy
    Knowledge arrived, completed;
    std::vector<Fiber*> waiting;
};

std::vector<BulkCopy*> copies;
std::vector<BulkCopy*> pool;
size_t num_used;
std::unordered_map<const void*, Mbarrier> mbarriers;

void complete_phase(Mbarrier& mbarrier) {
    if (mbarrier.pending != 0 || mbarrier.expected_bytes != 0) return;
    mbarrier.phase ^= 1;
    mbarrier.pending = mbarrier.count;
    mbarrier.completed = mbarrier.arrived;
    mbarrier.arrived = {};
    ++num_progress;
    wake(mbarrier.waiting);
}

// With the proxy fence that completion implies.
void learn_of(Knowledge& known, uint32_t agent, uint32_t clock) {
    known.happened = with(known.happened, agent, clock);
    known.fenced = with(known.fenced, agent, clock);
    known.fenced_shared = with(known.fenced_shared, agent, clock);
}

bool are_groups_done(const Fiber* fiber) {
    const auto needed = fiber->awaits_reads_alone ? BulkCopy::kRead : BulkCopy::kLanded;
    for (size_t g = 0; g + fiber->awaited_groups < fiber->groups.size(); ++g)
        for (const BulkCopy* copy : fiber->groups[g])
            if (copy->stage < needed) return false;
    return true;
}

void write_half(const BulkCopy& copy, bool is_upper) {
    const uint32_t middle = copy.num_bytes / 32 * 16;
    const uint32_t begin = is_upper ? middle : 0, end = is_upper ? copy.num_bytes : middle;
    memcpy(copy.destination + begin, copy.data.data() + begin, end - begin);
}

void step_one(size_t i) {
    BulkCopy& copy = *copies[i];
    ++num_progress;
    switch (copy.stage) {
        case BulkCopy::kIssued:
            check({copy.reader, copy.reader_clock, &copy.known, true, false, Scope::kWeak, copy.pc},
                  copy.source, copy.num_bytes, false);
            force(copy.source, copy.num_bytes, copy.known, nullptr);
            copy.data.assign(copy.source, copy.source + copy.num_bytes);
            copy.stage = BulkCopy::kRead;
            break;
        case BulkCopy::kRead:
            check({copy.writer, copy.writer_clock, &copy.known, true, false, Scope::kWeak, copy.pc},
                  copy.destination, copy.num_bytes, true);
            force(copy.destination, copy.num_bytes, copy.known, nullptr);
            copy.writes_upper_half_first = random_numbers.one_in(2);
            write_half(copy, copy.writes_upper_half_first);
            copy.stage = BulkCopy::kHalfWritten;
            break;
        default:
            write_half(copy, !copy.writes_upper_half_first);
            copy.stage = BulkCopy::kLanded;
            copies[i] = copies.back();
            copies.pop_back();
            free_async_agent(copy.reader);
            free_async_agent(copy.writer);
            if (copy.is_load) {
                Mbarrier& mbarrier = mbarriers[copy.mbarrier];
                mbarrier.expected_bytes -= copy.num_bytes;
                Knowledge known = copy.known;
                learn_of(known, copy.reader, copy.reader_clock);
                learn_of(known, copy.writer, copy.writer_clock);
                learn(mbarrier.arrived, known);
                complete_phase(mbarrier);
            }
    }
    if (copy.fiber->state == State::kAwaitingCopies && are_groups_done(copy.fiber)) make_runnable(copy.fiber);
}

BulkCopy* issue(bool is_load, void* destination, const void* source, uint32_t num_bytes, uint64_t* mbarrier,
                uint32_t pc) {
    Fiber* fiber = current;
    ++result.bulk_copies;
    const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source);
    if ((places | num_bytes) % 16 != 0)
        fail("align", "bulk copy of addresses or a size that are no multiples of 16",
             access_of(fiber->agent, pc, "bulk copy"));
    if (num_used == pool.size()) pool.push_back(new BulkCopy);
    BulkCopy* copy = pool[num_used++];
    copy->stage = BulkCopy::kIssued;
    copy->is_load = is_load;
    copy->source = static_cast<uint8_t*>(const_cast<void*>(source));
    copy->destination = static_cast<uint8_t*>(destination);
    copy->num_bytes = num_bytes;
    copy->fiber = fiber;
    copy->mbarrier = mbarrier;
    copy->pc = pc;
    copy->reader = take_async_agent(fiber, &copy->reader_clock);
    copy->writer = take_async_agent(fiber, &copy->writer_clock);
    copy->known = released(fiber);
    // The write follows the read, in one proxy.
    learn_of(copy->known, copy->reader, copy->reader_clock);
    copies.push_back(copy);
    return copy;
}

Mbarrier& mbarrier_at(uint64_t* address, uint32_t pc) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end())
        fail("uninit", "mbarrier before its initialisation", access_of(current->agent, pc, "mbarrier"));
    check(accessor(current, Scope::kCta, pc), reinterpret_cast<uint8_t*>(address), sizeof(*address), false);
    return found->second;
}

}  // namespace

uint32_t take_async_agent(Fiber* fiber, uint32_t* clock) {
    Slot& slot = slots[fiber->slot];
    int k = slot.next_async % kAsyncAgents;
    for (int tried = 0; slot.is_async_busy[k]; ++tried) {
        k = (k + 1) % kAsyncAgents;
        if (tried < kAsyncAgents) continue;
        // All are in use. Copies may complete at any time: also now. What never arrives shares its agent.
        if (!copies.empty())
            step_one(random_numbers.below(copies.size()));
        else if (!step_network())
            break;
    }
    slot.is_async_busy[k] = true;
    slot.next_async = k + 1;
    *clock = ++slot.async_clock[k];
    return static_cast<uint32_t>(fiber->slot * chunk_size + geometry.max_threads + k);
}

void free_async_agent(uint32_t agent) {
    slots[slot_of(agent)].is_async_busy[agent % chunk_size - geometry.max_threads] = false;
}

void reset_bulk() {
    copies.clear();
    mbarriers.clear();
    num_used = 0;
}

size_t num_copies() { return copies.size(); }
void step_copy() { step_one(random_numbers.below(copies.size())); }

bool await_mbarrier(const void* address, Fiber* fiber) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end()) return false;
    found->second.waiting.push_back(fiber);
    return true;
}

void check_end_of_thread(Fiber* fiber) {
    for (const BulkCopy* copy : copies) {
        if (copy->fiber != fiber) continue;
        const bool still_uses = copy->is_load || copy->stage == BulkCopy::kIssued;
        if (still_uses)
            fail("exit", "a thread ends while its bulk copy uses shared memory",
                 access_of(fiber->agent, copy->pc, "bulk copy"));
    }
}

void mbarrier_init(uint64_t* mbarrier, uint32_t count) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(4);
    acts();
    check(accessor(current, Scope::kWeak, pc), reinterpret_cast<uint8_t*>(mbarrier), sizeof(*mbarrier), true);
    mbarriers[mbarrier] = {count, count, 0, 0, false, {}, {}, {}};
    current->unfenced_mbarriers.push_back(mbarrier);
}

void mbarrier_fence_init() {
    begin(EMU_PC());
    tick(4);
    for (const void* mbarrier : current->unfenced_mbarriers) mbarriers[mbarrier].is_fenced = true;
    current->unfenced_mbarriers.clear();
}

void mbarrier_arrive(uint64_t* mbarrier, uint32_t expected_bytes) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(4);
    acts();
    Mbarrier& found = mbarrier_at(mbarrier, pc);
    found.expected_bytes += expected_bytes;
    if (found.pending == 0)
        fail("mbarrier", "more arrivals than its count", access_of(current->agent, pc, "mbarrier"));
    --found.pending;
    learn(found.arrived, released(current));
    complete_phase(found);
}

bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(2);
    while (true) {
        const Mbarrier& found = mbarrier_at(mbarrier, pc);
        const uint32_t phase = found.phase;
        if (phase != (parity & 1)) {
            acquire(current, found.completed, -1);
            acts();
            return true;
        }
        if (!sleeps_on(mbarrier, phase)) return false;
        current->pc = pc;
        if (mbarrier_at(mbarrier, pc).phase == phase) return false;
    }
}

void bulk_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* mbarrier) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(2);
    acts();
    if (!mbarrier_at(mbarrier, pc).is_fenced)
        fail("proxy", "the initialisation of the mbarrier is not fenced",
             access_of(current->agent, pc, "bulk load"));
    issue(true, shared, global, num_bytes, mbarrier, pc);
}

void bulk_store(void* global, const void* shared, uint32_t num_bytes) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(2);
    acts();
    BulkCopy* copy = issue(false, global, shared, num_bytes, nullptr, pc);
    current->open_group.push_back(copy);
}

void bulk_commit() {
    begin(EMU_PC());
    current->groups.push_back(std::move(current->open_group));
    current->open_group.clear();
}

void bulk_wait(int num_pending_groups, bool is_read_enough) {
    begin(EMU_PC());
    tick(2);
    acts();
    Fiber* fiber = current;
    fiber->awaited_groups = num_pending_groups;
    fiber->awaits_reads_alone = is_read_enough;
    if (!are_groups_done(fiber)) block(State::kAwaitingCopies);
    for (size_t g = 0; g + num_pending_groups < fiber->groups.size(); ++g) {
        for (const BulkCopy* copy : fiber->groups[g]) {
            learn_of(fiber->known, copy->reader, copy->reader_clock);
            if (!is_read_enough) learn_of(fiber->known, copy->writer, copy->writer_clock);
        }
    }
    if (!is_read_enough && static_cast<int>(fiber->groups.size()) > num_pending_groups)
        fiber->groups.erase(fiber->groups.begin(), fiber->groups.end() - num_pending_groups);
}

}  // namespace emu

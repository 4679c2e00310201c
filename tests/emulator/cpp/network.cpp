// A network between processing elements, behind the functions of nvshmem.h.
//
// Put         reads its source at any time, and writes its destination at any later time, in two halves. Its
//             own signal follows its data. Puts are delivered in any order, also those of one queue pair,
//             because adaptive routing reorders them; `orders_queue_pairs` is a network without it.
// Fence       what its thread puts to a processing element later arrives later.
// Quiet       waits until all puts of its thread have arrived. No deadline: NVSHMEM has none either.
// Proxies     what arrives was written by the generic proxy: bulk copies of it need the proxy fence.
// Loss        nothing crosses to or from a lost node any more, and what was on its way is lost as well.
#include <algorithm>

#include "memory.h"

namespace emu {
namespace {

struct Put {
    enum Stage { kIssued, kRead, kHalfWritten, kWritten } stage = kIssued;
    int from = 0, to = 0, queue_pair = 0;
    uint64_t fences = 0;  // of its thread, before it
    Fiber* fiber = nullptr;
    uint8_t *source = nullptr, *destination = nullptr;
    uint64_t num_bytes = 0;
    bool writes_upper_half_first = false;
    std::vector<uint8_t> data;
    uint64_t* signal = nullptr;
    uint64_t signal_value = 0;
    SignalOperation operation = SignalOperation::kNone;
    Knowledge known;
    uint32_t agent = 0, clock = 0, pc = 0;
};
std::vector<Put> puts;                      // in the order in which they were issued
std::vector<uint64_t> fences, outstanding;  // by thread

// A put that has arrived.
struct Arrived {
    int from, to, queue_pair;
    uint64_t fences;
    Fiber* fiber;
    uint32_t agent, clock;
    bool is_quiet;  // its thread knows
};
std::vector<Arrived> arrived;

bool crosses_to_lost(int from, int to) {
    if (options.lost_node < 0 || result.steps < options.lost_step || node_of(from) == node_of(to))
        return false;
    return node_of(from) == options.lost_node || node_of(to) == options.lost_node;
}

// Whether the network delivers `earlier`, which was issued before `put`, before it.
template <class Earlier>
bool is_ordered(const Earlier& earlier, const Put& put) {
    if (earlier.to != put.to) return false;
    if (earlier.fiber == put.fiber && earlier.fences < put.fences) return true;
    return options.orders_queue_pairs && earlier.from == put.from && earlier.queue_pair == put.queue_pair;
}

bool may_write(const Put& put) {
    for (const Put& earlier : puts) {
        if (&earlier == &put) break;
        if (is_ordered(earlier, put)) return false;
    }
    return true;
}

Accessor accessor_of(const Put& put) {
    return {put.agent, put.clock, &put.known, false, true, Scope::kWeak, put.pc};
}

void write_half(const Put& put, bool is_upper) {
    const uint64_t middle = put.num_bytes / 2;
    const uint64_t begin = is_upper ? middle : 0, end = is_upper ? put.num_bytes : middle;
    memcpy(put.destination + begin, put.data.data() + begin, end - begin);
}

void send_signal(const Put& put) {
    auto* word = reinterpret_cast<uint8_t*>(put.signal);
    Accessor who = accessor_of(put);
    who.scope = Scope::kSys;
    check(who, word, sizeof(uint64_t), true);
    force(word, sizeof(uint64_t), put.known, nullptr);
    const uint64_t before =
        put.operation == SignalOperation::kAdd ? current_value(word, sizeof(uint64_t)) : 0;
    publish_change(word, before + put.signal_value, sizeof(uint64_t), put.agent, put.clock, put.known);
}

void step_put(size_t i) {
    Put& put = puts[i];
    ++num_progress;
    if (put.stage == Put::kIssued) {
        // What a rank gets that is to stop counts for nothing: its peers do not wait until it has it.
        if (put.to != options.dead_rank) check(accessor_of(put), put.source, put.num_bytes, false);
        force(put.source, put.num_bytes, put.known, nullptr);
        put.data.assign(put.source, put.source + put.num_bytes);
        put.stage = Put::kRead;
        return;
    }
    if (put.stage == Put::kRead) {
        check(accessor_of(put), put.destination, put.num_bytes, true);
        force(put.destination, put.num_bytes, put.known, nullptr);
        put.writes_upper_half_first = random_numbers.one_in(2);
        write_half(put, put.writes_upper_half_first);
        put.stage = Put::kHalfWritten;
        return;
    }
    if (put.stage == Put::kHalfWritten) {
        write_half(put, !put.writes_upper_half_first);
        put.stage = Put::kWritten;
        if (put.signal != nullptr) return;
    }
    if (put.signal != nullptr) send_signal(put);
    Fiber* fiber = put.fiber;
    free_async_agent(put.agent);
    arrived.push_back({put.from, put.to, put.queue_pair, put.fences, fiber, put.agent, put.clock, false});
    puts.erase(puts.begin() + static_cast<std::ptrdiff_t>(i));
    if (--outstanding[fiber->id] == 0 && fiber->state == State::kAwaitingPuts) make_runnable(fiber);
}

}  // namespace

void reset_network() {
    puts.clear();
    fences.assign(fibers.size(), 0);
    outstanding.assign(fibers.size(), 0);
    arrived.clear();
}

size_t num_puts() { return puts.size(); }

bool step_network() {
    const size_t first = random_numbers.below(puts.size());
    for (size_t k = 0; k < puts.size(); ++k) {
        const size_t i = (first + k) % puts.size();
        const Put& put = puts[i];
        if (crosses_to_lost(put.from, put.to)) continue;
        if (put.stage >= Put::kRead && !may_write(put)) continue;
        step_put(i);
        return true;
    }
    return false;
}

void network_put(void* destination, const void* source, uint64_t num_bytes, uint64_t* signal,
                 uint64_t signal_value, SignalOperation operation, int pe, int queue_pair) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(2);
    acts();
    Fiber* fiber = current;
    ++result.puts;
    Put put;
    const EmuAccess here = access_of(fiber->agent, pc, "put");
    put.from = fiber->rank;
    put.to = pe;
    if (pe < 0 || pe >= geometry.num_ranks) fail("bounds", "no such processing element", here);
    put.destination = num_bytes == 0 ? nullptr : symmetric_address(destination, fiber->rank, pe);
    put.signal =
        reinterpret_cast<uint64_t*>(signal == nullptr ? nullptr : symmetric_address(signal, fiber->rank, pe));
    if ((num_bytes != 0 && put.destination == nullptr) || (signal != nullptr && put.signal == nullptr))
        fail("bounds", "a put outside of the symmetric heap", here, {}, destination);
    put.source = static_cast<uint8_t*>(const_cast<void*>(source));
    put.num_bytes = num_bytes;
    put.stage = num_bytes == 0 ? Put::kWritten : Put::kIssued;
    put.signal_value = signal_value;
    put.operation = operation;
    put.queue_pair = queue_pair;
    put.fences = fences[fiber->id];
    put.fiber = fiber;
    put.pc = pc;
    put.agent = take_async_agent(fiber, &put.clock);
    put.known = released(fiber);
    // Its signal follows its data, and what is ordered before it.
    put.known.happened = with(put.known.happened, put.agent, put.clock);
    const auto follow = [&put](const auto& earlier) {
        if (is_ordered(earlier, put))
            put.known.happened = with(put.known.happened, earlier.agent, earlier.clock);
    };
    for (const Put& earlier : puts) follow(earlier);
    for (const Arrived& earlier : arrived) follow(earlier);
    puts.push_back(put);
    ++outstanding[fiber->id];
}

uint64_t network_fetch_add(uint64_t* word, uint64_t value, int pe) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    tick(1);
    acts();
    Fiber* fiber = current;
    if (crosses_to_lost(fiber->rank, pe)) block(State::kAwaitingPuts);  // for ever
    uint8_t* remote = symmetric_address(word, fiber->rank, pe);
    if (remote == nullptr)
        fail("bounds", "an atomic outside of the symmetric heap", access_of(fiber->agent, pc, "atomic"), {},
             word);
    Accessor who = accessor(fiber, Scope::kSys, pc);
    who.is_network = true;
    check(who, remote, sizeof(uint64_t), true);
    force(remote, sizeof(uint64_t), fiber->known, fiber);
    const uint64_t old = current_value(remote, sizeof(uint64_t));
    publish_change(remote, old + value, sizeof(uint64_t), fiber->agent, fiber->clock,
                   fiber->released_by_fence);
    tick(1);
    return old;
}

void network_fence() {
    begin(EMU_PC());
    tick(2);
    acts();
    ++fences[current->id];
}

void network_quiet() {
    begin(EMU_PC());
    tick(2);
    acts();
    if (outstanding[current->id] != 0) block(State::kAwaitingPuts);
    for (Arrived& put : arrived) {
        if (put.fiber != current || put.is_quiet) continue;
        put.is_quiet = true;
        current->known.happened = with(current->known.happened, put.agent, put.clock);
    }
}

void* network_pointer(const void* symmetric, int pe) {
    if (pe < 0 || pe >= geometry.num_ranks || node_of(pe) != node_of(current->rank)) return nullptr;
    return symmetric_address(symmetric, current->rank, pe);
}

int network_pe() { return current->rank; }
int network_num_pes() { return geometry.num_ranks; }

}  // namespace emu

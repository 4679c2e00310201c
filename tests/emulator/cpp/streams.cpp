// What the hosts enqueue: kernels, copies and events, each stream in order. The end of a kernel is seen by
// what follows it on its stream as if everybody had fenced, proxies included.
#include <algorithm>

#include "memory.h"

namespace emu {

std::vector<Slot> slots;
std::vector<Stream> streams;

namespace {

struct Event {
    bool is_recorded = false;
    Knowledge known;
    std::vector<int> waiting;
};
std::vector<Event> events;

bool is_dead(int rank) { return rank == options.dead_rank && result.steps >= options.dead_step; }

// Gives the next block of a kernel a place.
void start_block(Stream& stream) {
    const int slot_number = stream.first_slot + stream.num_started++;
    for (int t = 0; t < slots[slot_number].num_threads; ++t)
        make_runnable(&fibers[slot_number * geometry.max_threads + t]);
}

void start_kernel(int number, const Launch& launch) {
    Stream& stream = streams[number];
    stream.num_alive = launch.num_blocks * launch.num_threads;
    stream.num_started = 0;
    num_live += stream.num_alive;
    for (int b = 0; b < launch.num_blocks; ++b) {
        const int slot_number = stream.first_slot + b;
        Slot& slot = slots[slot_number];
        slot.block = b;
        slot.num_threads = slot.num_alive = launch.num_threads;
        slot.library = launch.library;
        slot.shared_used = emu_shared_bytes(launch.library);
        begin_shared(slot_number);
        for (BlockBarrier& barrier : slot.barriers) barrier.arrived.clear();
        slot.meetings.resize((geometry.max_threads + kWarpLanes - 1) / kWarpLanes);
        for (auto& meetings : slot.meetings) meetings.clear();
        for (int t = 0; t < launch.num_threads; ++t) {
            Fiber& fiber = fibers[slot_number * geometry.max_threads + t];
            fiber.stream = number;
            const Clock before = stream.known.happened;
            fiber.known = {before, before, before};
            fiber.released_by_fence = fiber.awaiting_fence = {};
            fiber.fence_scope = fiber.awaiting_scope = Scope::kWeak;
            fiber.sc_order = zero_clock;
            ++fiber.clock;
            fiber.fenced_until = fiber.fenced_shared_until = fiber.clock - 1;
            fiber.capture.address = nullptr;
            fiber.num_polled = fiber.free_polls = 0;
            fiber.groups.clear();
            fiber.open_group.clear();
            fiber.unfenced_mbarriers.clear();
            fiber.priority = random_numbers.next() >> 1 | uint64_t{1} << 62;
            prepare(fiber);
        }
    }
    const int num_places = options.max_resident > 0 ? options.max_resident : launch.num_blocks;
    while (stream.num_started < std::min(num_places, launch.num_blocks)) start_block(stream);
}

// What is behind all that the kernel's threads know and did.
Knowledge end_of_kernel(const Stream& stream, const Launch& launch) {
    Clock known = stream.known.happened;
    for (int b = 0; b < launch.num_blocks; ++b)
        for (int t = 0; t < launch.num_threads; ++t)
            known = join(known, fibers[(stream.first_slot + b) * geometry.max_threads + t].known.happened);
    Chunk* behind = copy_of(known);
    for (int b = 0; b < launch.num_blocks; ++b) {
        uint32_t* chunk = copy_of_chunk(behind[stream.first_slot + b]);
        for (int t = 0; t < launch.num_threads; ++t)
            chunk[t] = fibers[(stream.first_slot + b) * geometry.max_threads + t].clock;
        behind[stream.first_slot + b] = chunk;
    }
    return {behind, behind, behind};
}

// By the first thread that the stream's kernels have: nobody else of them is there.
void copy(Stream& stream, const Launch& launch) {
    Fiber& fiber = fibers[stream.first_slot * geometry.max_threads];
    ++fiber.clock;
    const Accessor who{fiber.agent, fiber.clock, &stream.known, false, false, Scope::kWeak, 0};
    check(who, launch.source, launch.num_bytes, false);
    force(launch.source, launch.num_bytes, stream.known, nullptr);
    check(who, launch.destination, launch.num_bytes, true);
    force(launch.destination, launch.num_bytes, stream.known, nullptr);
    memcpy(launch.destination, launch.source, launch.num_bytes);
    const Clock behind = with(stream.known.happened, fiber.agent, fiber.clock);
    stream.known = {behind, behind, behind};
}

}  // namespace

std::pair<int, int> slots_of_rank(int rank) {
    int first = -1, last = -1;
    for (int s = 0; s < static_cast<int>(slots.size()); ++s) {
        if (slots[s].rank != rank) continue;
        if (first < 0) first = s;
        last = s + 1;
    }
    return {first, last};
}

void reset_streams() {
    size_t num_events = 0;
    for (Stream& stream : streams) {
        stream.next = 0;
        stream.num_alive = 0;
        stream.known = {zero_clock, zero_clock, zero_clock};
        for (const Launch& launch : stream.launches)
            num_events = std::max(num_events, static_cast<size_t>(launch.event) + 1);
    }
    events.assign(num_events, {});
    num_live = 0;
    for (Fiber& fiber : fibers) {
        fiber.state = State::kIdle;
        fiber.clock = 1;
        fiber.last_read.clear();
    }
    for (Slot& slot : slots) {
        std::fill_n(slot.async_clock, kAsyncAgents, 0);
        std::fill_n(slot.is_async_busy, kAsyncAgents, false);
        slot.next_async = 0;
    }
}

void start_threads() {
    for (size_t s = 0; s < streams.size(); ++s) advance(static_cast<int>(s));
    if (num_live == 0) leave_run();
    Fiber* first = pick();
    enter(first);
    leave_for(first->stack_pointer);
}

void advance(int number) {
    Stream& stream = streams[number];
    for (; stream.next < stream.launches.size(); ++stream.next) {
        if (is_dead(stream.rank)) return;
        const Launch& launch = stream.launches[stream.next];
        if (launch.kind == Launch::kKernel) return start_kernel(number, launch);
        if (launch.kind == Launch::kCopy) {
            copy(stream, launch);
        } else if (launch.kind == Launch::kRecord) {
            Event& event = events[launch.event];
            event.is_recorded = true;
            event.known = stream.known;
            for (const int waiting : std::exchange(event.waiting, {})) advance(waiting);
        } else {
            Event& event = events[launch.event];
            if (!event.is_recorded) {
                event.waiting.push_back(number);
                return;
            }
            learn(stream.known, event.known);
        }
    }
}

void run_thread() {
    const Stream& stream = streams[current->stream];
    const Launch& launch = stream.launches[stream.next];
    launch.entry(launch.args);
    begin(current->pc);
    check_end_of_thread(current);
    continue_beside(end_thread);
}

// What follows may begin the next kernel on the stack of the thread that has ended.
void end_thread() {
    Fiber* fiber = current;
    Stream& stream = streams[fiber->stream];
    ++num_progress;
    --num_live;
    remove_runnable(fiber, State::kDone);
    Slot& slot = slots[fiber->slot];
    --slot.num_alive;
    if (!slot.barriers[0].arrived.empty()) {
        const Fiber* waiting = slot.barriers[0].arrived[0];
        fail("collective", "a thread ends while others of its block are at a barrier",
             access_of(waiting->agent, waiting->pc, "barrier"),
             access_of(fiber->agent, fiber->pc, "the end"));
    }
    if (slot.num_alive == 0 && stream.num_started < stream.launches[stream.next].num_blocks)
        start_block(stream);
    if (--stream.num_alive == 0) {
        stream.known = end_of_kernel(stream, stream.launches[stream.next]);
        ++stream.next;
        advance(fiber->stream);
    }
    idle();
    Fiber* next = pick();
    enter(next);
    leave_for(next->stack_pointer);
}

}  // namespace emu

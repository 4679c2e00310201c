// Who runs next, who sleeps, and how time passes when nobody can run.
//
// Polling     a thread that reads the same value of the same word again, having done nothing in between, goes
//             to sleep until one of the words it polls has changed. Now and then one is woken without a
//             reason: it may wait for another thread of its block, or be about to look at its deadline.
// Idle        with nobody runnable first everything on its way arrives; then all sleepers look again; then
//             virtual time jumps, so that deadlines expire. So there is no false timeout, and a wait without
//             a deadline is found at once.
#include <algorithm>

#include "memory.h"

namespace emu {

Random random_numbers;
uint32_t switch_rate;
bool delays_own_stores;
uint64_t num_progress;

namespace {

enum Strategy { kUniform, kChangePoints, kStarveOne, kRest };

constexpr int kFreePolls = 160;      // of a thread that is to look at its deadline, too
constexpr int kMaxIdleRounds = 12;   // without progress
constexpr uint32_t kWakeRate = 256;  // one sleeper, at one step in so many

std::vector<Fiber*> runnable, sleepers;
Strategy strategy;
uint32_t copy_rate, store_rate, network_rate;
uint64_t next_change, lowest_priority;
enum { kThread, kBlock, kRank };
int victim_kind, victim;
uint64_t rest_until;  // by kRest: the victim stays behind until then, and another one is chosen later
int idle_rounds;
uint64_t progress_at_idle;

int unit_of(const Fiber* fiber) {
    return victim_kind == kThread ? fiber->id : victim_kind == kBlock ? fiber->slot : fiber->rank;
}
bool is_victim(const Fiber* fiber) {
    return victim == unit_of(fiber) && (strategy == kStarveOne || result.steps < rest_until);
}

void fall_asleep(Fiber* fiber) {
    fiber->sleep_position = static_cast<int>(sleepers.size());
    sleepers.push_back(fiber);
}

void leave_sleepers(Fiber* fiber) {
    Fiber* last = sleepers.back();
    sleepers[fiber->sleep_position] = last;
    last->sleep_position = fiber->sleep_position;
    sleepers.pop_back();
}

void wake_one(Fiber* fiber) {
    leave_sleepers(fiber);
    fiber->num_polled = 0;
    make_runnable(fiber);
}

// Without a reason.
Fiber* wake_any() {
    Fiber* fiber = sleepers[random_numbers.below(sleepers.size())];
    if (random_numbers.one_in(4)) fiber->free_polls = kFreePolls;
    wake_one(fiber);
    return fiber;
}

void act_of_others() {
    if (num_copies() != 0 && random_numbers.one_in(copy_rate)) step_copy();
    if (num_pending != 0 && random_numbers.one_in(store_rate)) deliver_any();
    if (num_puts() != 0 && random_numbers.one_in(network_rate)) step_network();
    if (!sleepers.empty() && random_numbers.one_in(kWakeRate)) wake_any();
}

bool is_dying() {
    return options.dead_rank >= 0 && options.dead_step > 0 && result.steps == options.dead_step;
}

// The rank stops where it is. What its threads and copies have on the way still arrives.
void die() {
    for (Fiber& fiber : fibers) {
        if (fiber.rank != options.dead_rank || fiber.state == State::kIdle || fiber.state == State::kDone)
            continue;
        if (fiber.state == State::kPolling) leave_sleepers(&fiber);
        if (fiber.state == State::kRunnable)
            remove_runnable(&fiber, State::kDead);
        else
            fiber.state = State::kDead;
        --num_live;
    }
}

[[noreturn]] void report_hang() {
    static const char* const names[] = {"idle",
                                        "runnable",
                                        "polling",
                                        "at a barrier of its block",
                                        "at a collective",
                                        "waiting for bulk copies",
                                        "waiting for puts",
                                        "done",
                                        "dead"};
    std::string text = "nobody can go on:";
    EmuAccess where{};
    int num_shown = 0;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::kIdle || fiber.state == State::kDone || fiber.state == State::kDead)
            continue;
        const bool polls = fiber.state == State::kPolling || fiber.state == State::kRunnable;
        if (num_shown == 0 || polls) where = access_of(fiber.agent, fiber.pc, "waits");
        if (num_shown++ >= 3) continue;
        text += " rank " + std::to_string(fiber.rank) + " block " + std::to_string(slots[fiber.slot].block) +
                " thread " + std::to_string(fiber.thread) + " " + names[static_cast<int>(fiber.state)] + ";";
    }
    fail("hang", text, where);
}

}  // namespace

void reset_schedule() {
    runnable.clear();
    sleepers.clear();
    idle_rounds = 0;
    num_progress = progress_at_idle = 0;
    lowest_priority = uint64_t{1} << 61;
    // Most seeds keep someone behind: that finds most of what depends on the schedule alone.
    constexpr Strategy kDrawn[] = {kUniform, kChangePoints, kStarveOne, kStarveOne, kRest, kRest};
    strategy =
        options.strategy >= 0 ? static_cast<Strategy>(options.strategy) : kDrawn[random_numbers.below(6)];
    rest_until = 0;
    result.strategy = strategy;
    constexpr uint32_t kRates[] = {1, 8, 64, 100000};
    switch_rate = uint32_t{2} << 2 * random_numbers.below(3);
    copy_rate = kRates[random_numbers.below(4)];
    store_rate = kRates[random_numbers.below(4)];
    network_rate = kRates[random_numbers.below(4)];
    delays_own_stores = random_numbers.one_in(4);
    next_change = 1 + random_numbers.below(2000);
    victim_kind = static_cast<int>(random_numbers.below(3));
    const size_t num_victims = victim_kind == kThread  ? fibers.size()
                               : victim_kind == kBlock ? slots.size()
                                                       : geometry.num_ranks;
    victim = static_cast<int>(random_numbers.below(num_victims));
}

void make_runnable(Fiber* fiber) {
    fiber->state = State::kRunnable;
    fiber->run_position = static_cast<int>(runnable.size());
    runnable.push_back(fiber);
}

void remove_runnable(Fiber* fiber, State state) {
    Fiber* last = runnable.back();
    runnable[fiber->run_position] = last;
    last->run_position = fiber->run_position;
    runnable.pop_back();
    fiber->state = state;
}

Fiber* pick() {
    if (strategy == kChangePoints) {
        return *std::max_element(runnable.begin(), runnable.end(),
                                 [](const Fiber* a, const Fiber* b) { return a->priority < b->priority; });
    }
    Fiber* fiber = runnable[random_numbers.below(runnable.size())];
    if (strategy == kStarveOne || result.steps < rest_until)
        for (int i = 0; i < 12 && is_victim(fiber) && !random_numbers.one_in(512); ++i)
            fiber = runnable[random_numbers.below(runnable.size())];
    // Who waits for a victim looks at the deadline first, now and then.
    if (victim_kind == kThread && is_victim(fiber) && !sleepers.empty() && random_numbers.one_in(2))
        fiber = wake_any();
    return fiber;
}

void switch_to(Fiber* fiber) {
    if (fiber == current) return;
    ++result.switches;
    Fiber* before = current;
    enter(fiber);
    switch_from(&before->stack_pointer, fiber->stack_pointer);
}

void tick(uint32_t one_in) {
    now_ns += 1 + (random_numbers.state & 3);
    if (++result.steps > options.max_steps)
        fail("hang", "no end after the most steps", access_of(current->agent, current->pc, "runs"));
    act_of_others();
    if (is_dying()) {
        die();
        if (current->state == State::kDead) {
            if (runnable.empty()) idle();
            switch_to(pick());
        }
    }
    if (strategy == kChangePoints && result.steps >= next_change) {
        current->priority = lowest_priority--;
        next_change = result.steps + 1 + random_numbers.below(400);
    }
    if (random_numbers.one_in(one_in)) switch_to(pick());
}

void meet_others() {
    tick(2);
    if (strategy != kRest || result.steps < rest_until || !random_numbers.one_in(32)) return;
    victim_kind = static_cast<int>(random_numbers.below(3));
    victim = unit_of(current);
    rest_until = result.steps + random_numbers.below(size_t{1} << (6 + random_numbers.below(9)));
    switch_to(pick());
}

void block(State state) {
    remove_runnable(current, state);
    if (runnable.empty()) idle();
    switch_to(pick());
}

void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting)
        if (fiber->state == State::kPolling) wake_one(fiber);
    waiting.clear();
}

bool sleeps_on(const void* address, uint64_t value) {
    Fiber* fiber = current;
    if (fiber->free_polls > 0) {
        --fiber->free_polls;
        return false;
    }
    for (int i = 0; i < fiber->num_polled; ++i) {
        if (fiber->polled[i].address != address) continue;
        if (fiber->polled[i].value != value) {
            fiber->polled[i].value = value;
            return false;
        }
        for (int k = 0; k < fiber->num_polled; ++k)
            if (!await_word(fiber->polled[k].address, fiber)) await_mbarrier(fiber->polled[k].address, fiber);
        fall_asleep(fiber);
        block(State::kPolling);
        fiber->num_polled = 0;
        return true;
    }
    if (fiber->num_polled < 16) fiber->polled[fiber->num_polled++] = {address, value};
    return false;
}

void idle() {
    while (runnable.empty()) {
        const size_t num_waiting = num_copies() + num_pending + num_puts();
        if (num_waiting > 0) {
            const size_t chosen = random_numbers.below(num_waiting);
            if (chosen < num_copies()) {
                step_copy();
                continue;
            }
            if (chosen < num_copies() + num_pending) {
                deliver_any();
                continue;
            }
            if (step_network()) continue;
            if (num_copies() != 0) {
                step_copy();
                continue;
            }
            if (num_pending != 0) {
                deliver_any();
                continue;
            }
        }
        if (num_live == 0) leave_run();
        if (num_progress != progress_at_idle) idle_rounds = 0;
        if (++idle_rounds > kMaxIdleRounds) report_hang();
        if (idle_rounds > 1) now_ns += options.timeout_ns / 4;
        while (!sleepers.empty()) {
            sleepers.back()->free_polls = kFreePolls;
            wake_one(sleepers.back());
        }
        progress_at_idle = num_progress;
        if (runnable.empty()) report_hang();
    }
}

uint64_t nanoseconds() {
    begin(EMU_PC());
    now_ns += 5;
    return now_ns;
}

void sleep(uint32_t ns) {
    begin(EMU_PC());
    now_ns += ns / 16;
    tick(1);
}

}  // namespace emu

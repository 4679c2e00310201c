// Words that strong operations read and write, with what they held before, and what every value released.
//
// A strong load may see an older value of its word, but none that what the thread knows hides, and never one
// older than it has seen. Changes of one word chain: who reads the last acquires what all of them released.
#include <algorithm>
#include <unordered_map>

#include "memory.h"

namespace emu {
namespace {

constexpr uint32_t kNobody = ~0u;

struct Version {
    uint64_t value;
    uint32_t agent, clock;
    Knowledge known;
    Scope scope;
};
struct Word {
    std::vector<Version> history;
    std::vector<Fiber*> waiting;
};
std::unordered_map<const void*, Word> words;
Clock sc_order;  // what sequentially consistent fences have ordered so far

// The history of a word, up to date with ordinary stores to it.
Word& word_at(const void* address, int size) {
    Word& word = words[address];
    const uint64_t value = current_value(address, size);
    if (word.history.empty() || word.history.back().value != value)
        word.history.push_back({value, kNobody, 0, {}, Scope::kWeak});
    return word;
}

bool reaches(Scope scope, uint32_t from, const Fiber* to) {
    if (scope == Scope::kSys || from == kNobody) return true;
    if (scope == Scope::kGpu) return rank_of(from) == to->rank;
    return scope == Scope::kCta && slot_of(from) == to->slot;
}

// What reading `version` tells a thread.
void receive(Fiber* fiber, const Version& version, Order order, Scope scope) {
    if (!version.known) return;
    const bool are_in_scope =
        reaches(version.scope, version.agent, fiber) && reaches(scope, version.agent, fiber);
    const int from = rank_of(version.agent);
    if (order == Order::kAcquire || order == Order::kAcqRel) {
        if (are_in_scope) acquire(fiber, version.known, from);
        return;
    }
    if (!reaches(version.scope, version.agent, fiber)) return;
    // For an acquire fence. Whose proxy fences count is decided now.
    Knowledge& awaiting = fiber->awaiting_fence;
    if (!options.is_strict || from == fiber->rank) {
        learn(awaiting, version.known);
    } else {
        const auto [first, last] = slots_of_rank(fiber->rank);
        learn(awaiting, version.known, first, last);
    }
    fiber->awaiting_scope =
        std::max(fiber->awaiting_scope, rank_of(version.agent) == fiber->rank ? Scope::kGpu : Scope::kSys);
}

// The index of the version that a load sees.
uint32_t version_for(const Fiber* fiber, const Word& word, uint32_t oldest) {
    const auto newest = static_cast<uint32_t>(word.history.size()) - 1;
    if (newest == 0 || !random_numbers.one_in(4)) return newest;
    for (uint32_t i = newest; i > oldest; --i) {
        const Version& version = word.history[i];
        const bool is_known = version.agent == kNobody || version.agent == fiber->agent ||
                              clock_of(fiber->known.happened, version.agent) >= version.clock ||
                              clock_of(fiber->sc_order, version.agent) >= version.clock;
        if (!is_known) continue;
        oldest = i;
        break;
    }
    return oldest + random_numbers.below(newest - oldest + 1);
}

uint32_t& last_read_of(Fiber* fiber, const void* address) {
    for (auto& [word, version] : fiber->last_read)
        if (word == address) return version;
    return fiber->last_read.emplace_back(address, 0).second;
}

}  // namespace

void reset_words() {
    words.clear();
    sc_order = zero_clock;
}

uint64_t current_value(const void* address, int size) {
    uint64_t value = 0;
    memcpy(&value, address, size);
    return value;
}

void publish(uint8_t* address, uint64_t value, int size, uint32_t agent, uint32_t clock,
             const Knowledge& known, Scope scope) {
    Word& word = word_at(address, size);
    memcpy(address, &value, size);
    word.history.push_back({value, agent, clock, known, scope});
    ++num_progress;
    wake(word.waiting);
}

void publish_change(uint8_t* address, uint64_t value, int size, uint32_t agent, uint32_t clock,
                    const Knowledge& known) {
    const Knowledge earlier = word_at(address, size).history.back().known;
    Knowledge both = known;
    if (earlier && both) learn(both, earlier);
    publish(address, value, size, agent, clock, both ? both : earlier, Scope::kSys);
}

bool await_word(const void* address, Fiber* fiber) {
    const auto found = words.find(address);
    if (found == words.end()) return false;
    found->second.waiting.push_back(fiber);
    return true;
}

uint64_t load_word(const void* address, int size, Order order, Scope scope) {
    const uint32_t pc = EMU_PC();
    begin(pc);
    Fiber* fiber = current;
    meet_others();
    const auto* bytes = static_cast<const uint8_t*>(address);
    while (true) {
        check(accessor(fiber, scope, pc), bytes, size, false);
        force(bytes, size, fiber->known, fiber);
        uint32_t version;
        {
            const Word& word = word_at(address, size);
            version = version_for(fiber, word, last_read_of(fiber, address));
            const bool is_newest = version + 1 == word.history.size();
            const uint64_t value = word.history[version].value;
            if (is_newest && sleeps_on(address, value)) {
                fiber->pc = pc;
                if (word_at(address, size).history.size() != version + 1) continue;  // it has changed
            }
        }
        const Version seen = words[address].history[version];
        last_read_of(fiber, address) = version;
        receive(fiber, seen, order, scope);
        return seen.value;
    }
}

// What comes before a strong store, of whatever kind.
static Fiber* begin_store(void* address, int size, Scope scope, uint32_t pc) {
    begin(pc);
    Fiber* fiber = current;
    meet_others();
    acts();
    const auto* bytes = static_cast<const uint8_t*>(address);
    check(accessor(fiber, scope, pc), bytes, size, true);
    force(bytes, size, fiber->known, fiber);
    return fiber;
}

void store_word(void* address, uint64_t value, int size, Order order, Scope scope) {
    Fiber* fiber = begin_store(address, size, scope, EMU_PC());
    auto* bytes = static_cast<uint8_t*>(address);
    PendingStore store{fiber, fiber->clock,       bytes, static_cast<uint8_t>(size), {},
                       true,  fiber->fence_scope, {}};
    memcpy(store.data, &value, size);
    if (order == Order::kRelease) {
        store.known = released(fiber);
        store.scope = scope;
    } else {
        store.known = fiber->released_by_fence;
        store.scope = std::min(scope, fiber->fence_scope);
    }
    put_on_its_way(store);
}

uint64_t change_word(void* address, uint64_t operand, uint64_t other, int size, Rmw rmw, Order order,
                     Scope scope) {
    Fiber* fiber = begin_store(address, size, scope, EMU_PC());
    auto* bytes = static_cast<uint8_t*>(address);
    const uint64_t mask = size < 8 ? (uint64_t{1} << 8 * size) - 1 : ~uint64_t{0};
    operand &= mask;
    other &= mask;
    const bool releases = order == Order::kRelease || order == Order::kAcqRel;
    const uint32_t clock = fiber->clock;
    Knowledge known = releases ? released(fiber) : fiber->released_by_fence;
    if (releases) force_all(known, fiber);
    const Version previous = word_at(address, size).history.back();
    const uint64_t old = previous.value;
    uint64_t value = old;
    switch (rmw) {
        case Rmw::kAdd:
            value = old + operand;
            break;
        case Rmw::kIncrement:
            value = old >= operand ? 0 : old + 1;
            break;
        case Rmw::kExchange:
            value = operand;
            break;
        case Rmw::kCompareSwap:
            value = old == operand ? other : old;
            break;
        case Rmw::kMin:
            value = std::min(old, operand);
            break;
        case Rmw::kMax:
            value = std::max(old, operand);
            break;
        case Rmw::kAnd:
            value = old & operand;
            break;
        case Rmw::kOr:
            value = old | operand;
            break;
    }
    value &= mask;
    // Changes of one word chain: a later reader also acquires what earlier ones released.
    if (previous.known) {
        if (known)
            learn(known, previous.known);
        else
            known = previous.known;
    }
    const Scope reach = releases ? scope : previous.known ? previous.scope : fiber->fence_scope;
    publish(bytes, value, size, fiber->agent, clock, known, reach);
    receive(fiber, previous, order, scope);
    return old;
}

void fence(Order, Scope scope, bool is_sequentially_consistent) {
    begin(EMU_PC());
    Fiber* fiber = current;
    meet_others();
    acts();
    // What earlier fences of that kind ordered cannot be read stale any more; races are not judged by it.
    if (is_sequentially_consistent) fiber->sc_order = join(fiber->sc_order, sc_order);
    if (fiber->awaiting_fence && fiber->awaiting_scope <= scope) {
        learn(fiber->known, fiber->awaiting_fence);
        fiber->awaiting_fence = {};
        fiber->awaiting_scope = Scope::kWeak;
    }
    fiber->released_by_fence = released(fiber);
    fiber->fence_scope = scope;
    force_all(fiber->released_by_fence, fiber);
    if (is_sequentially_consistent) sc_order = join(sc_order, fiber->released_by_fence.happened);
}

void fence_proxy(bool is_shared_alone) {
    begin(EMU_PC());
    Fiber* fiber = current;
    tick(4);
    acts();
    const uint32_t until = fiber->clock++;
    fiber->known.fenced_shared = join(fiber->known.fenced_shared, fiber->known.happened);
    fiber->fenced_shared_until = until;
    if (is_shared_alone) return;
    fiber->known.fenced = join(fiber->known.fenced, fiber->known.happened);
    fiber->fenced_until = until;
}

}  // namespace emu

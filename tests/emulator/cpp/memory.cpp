// Stores on their way, and what threads know of each other's.
//
// Stores      ordinary, relaxed and release stores wait in one list and arrive in any order, except that
//             those of one address keep theirs, and that what happened before a release arrives before it.
// Loads       what happened before a load has arrived. For those of strong operations see words.cpp.
// Ordinary    stores are known by their address before they are made (see hooks.cpp). The bytes that stand
//             there are remembered; at the thread's next call the new ones are taken out and put on their
//             way. No other thread runs in between.
#include "memory.h"

namespace emu {
namespace {

constexpr size_t kMaxPending = 64;

std::vector<PendingStore> pending;

bool overlap(const PendingStore& store, const uint8_t* address, uint64_t num_bytes) {
    return store.address < address + num_bytes && address < store.address + store.size;
}

bool happened_before(const PendingStore& store, const Knowledge& known, const Fiber* self) {
    return store.fiber == self || clock_of(known.happened, store.fiber->agent) >= store.clock;
}

// Lets store `i` arrive, behind those that must be there first.
void deliver(size_t i) {
    const PendingStore store = pending[i];
    for (size_t k = 0; k < i;) {
        const PendingStore& other = pending[k];
        const bool is_released = store.known && happened_before(other, store.known, nullptr);
        const bool is_same = other.fiber == store.fiber && overlap(other, store.address, store.size);
        if (!is_released && !is_same) {
            ++k;
            continue;
        }
        const size_t before = pending.size();
        deliver(k);
        i -= before - pending.size();
        k = 0;
    }
    pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(i));
    num_pending = pending.size();
    if (store.is_strong) {
        uint64_t value = 0;
        memcpy(&value, store.data, store.size);
        publish(store.address, value, store.size, store.fiber->agent, store.clock, store.known, store.scope);
    } else {
        memcpy(store.address, store.data, store.size);
    }
}

}  // namespace

size_t num_pending;

void reset_stores() {
    pending.clear();
    num_pending = 0;
}

void force_all(const Knowledge& known, const Fiber* self) {
    for (size_t i = 0; i < pending.size();) {
        if (!happened_before(pending[i], known, self)) {
            ++i;
            continue;
        }
        deliver(i);
        i = 0;
    }
}

void put_on_its_way(const PendingStore& store) {
    pending.push_back(store);
    num_pending = pending.size();
    ++result.delayed_stores;
    if (pending.size() > kMaxPending) deliver_any();
}

void deliver_any() { deliver(random_numbers.below(pending.size())); }

void force(const uint8_t* address, uint64_t num_bytes, const Knowledge& known, const Fiber* self) {
    for (size_t i = 0; i < pending.size();) {
        if (!overlap(pending[i], address, num_bytes) || !happened_before(pending[i], known, self)) {
            ++i;
            continue;
        }
        deliver(i);
        i = 0;
    }
}

Knowledge released(Fiber* fiber) {
    const Knowledge known{with(fiber->known.happened, fiber->agent, fiber->clock),
                          with(fiber->known.fenced, fiber->agent, fiber->fenced_until),
                          with(fiber->known.fenced_shared, fiber->agent, fiber->fenced_shared_until)};
    ++fiber->clock;
    return known;
}

void acquire(Fiber* fiber, const Knowledge& other, int from_rank) {
    if (!options.is_strict || from_rank < 0 || from_rank == fiber->rank) {
        learn(fiber->known, other);
    } else {
        const auto [first, last] = slots_of_rank(fiber->rank);
        learn(fiber->known, other, first, last);
    }
}

void finish_capture() {
    Fiber* fiber = current;
    Capture& capture = fiber->capture;
    if (capture.address == nullptr) return;
    if (memcmp(capture.address, capture.before, capture.size) != 0) {
        PendingStore store{fiber, fiber->clock, capture.address, capture.size, {}, false, Scope::kWeak, {}};
        memcpy(store.data, capture.address, capture.size);
        memcpy(capture.address, capture.before, capture.size);
        capture.address = nullptr;
        put_on_its_way(store);
    } else if (++capture.age >= 2) {  // a copy of a struct calls twice before it stores
        capture.address = nullptr;
    }
}

void ordinary_access(void* address, uint64_t num_bytes, bool is_write, Scope scope, uint32_t pc) {
    finish_capture();
    Fiber* fiber = current;
    fiber->pc = pc;
    auto* bytes = static_cast<uint8_t*>(address);
    const bool is_capturing = fiber->capture.address != nullptr;
    if (!is_capturing) tick(switch_rate);
    if (is_write) acts();
    check(accessor(fiber, scope, pc), bytes, num_bytes, is_write);
    if (!pending.empty()) force(bytes, num_bytes, fiber->known, fiber);
    if (!is_write || is_capturing || num_bytes > sizeof(Capture::before) || is_shared(address)) return;
    if (!delays_own_stores && !is_mapped_by_peers(bytes)) return;
    Capture& capture = fiber->capture;
    capture.address = bytes;
    capture.size = static_cast<uint8_t>(num_bytes);
    capture.age = 0;
    capture.pc = pc;
    memcpy(capture.before, bytes, num_bytes);
}

}  // namespace emu

// Memory as the runtime sees it: pieces, accesses that are checked, stores on their way, words with
// histories.
#pragma once
#include "state.h"

namespace emu {

// All device memory lies at one address, so that runs can be repeated bit by bit.
inline uint8_t* const arena = reinterpret_cast<uint8_t*>(0x200000000000ull);
constexpr size_t kArenaBytes = 256ull << 20;
constexpr size_t kSharedOffset = 224ull << 20;  // shared memory of the slots, from here on
inline uint8_t* const shared_base = arena + kSharedOffset;

inline bool is_device(const void* address) {
    return static_cast<size_t>(static_cast<const uint8_t*>(address) - arena) < kArenaBytes;
}
inline bool is_shared(const void* address) { return static_cast<const uint8_t*>(address) >= shared_base; }

void open_memory();
void reset_memory();
void reset_stores();
void reset_words();

// Who accesses.
struct Accessor {
    uint32_t agent, clock;
    const Knowledge* known;
    bool is_async, is_network;
    Scope scope;
    uint32_t pc;
};
Accessor accessor(Fiber* fiber, Scope scope, uint32_t pc);
// Looks for races, missing proxy fences and accesses outside of what was allocated, and notes the access.
void check(const Accessor& who, const uint8_t* address, uint64_t num_bytes, bool is_write);
// Whether peers see the memory, so that stores to it travel.
bool is_mapped_by_peers(const uint8_t* address);
// Of a symmetric address as `from` sees it: the address at `to`, and nullptr for other memory.
uint8_t* symmetric_address(const void* address, int from, int to);

// A thread's clocks as they are now; what it does later is newer.
Knowledge released(Fiber* fiber);
void acquire(Fiber* fiber, const Knowledge& other, int from_rank);

// Stores on their way. `force` lets those arrive that happened before.
struct PendingStore {
    Fiber* fiber;
    uint32_t clock;
    uint8_t* address;
    uint8_t size;
    uint8_t data[16];
    bool is_strong;
    Scope scope;
    Knowledge known;  // that it releases
};
extern size_t num_pending;
void put_on_its_way(const PendingStore& store);
void force_all(const Knowledge& known, const Fiber* self);
void force(const uint8_t* address, uint64_t num_bytes, const Knowledge& known, const Fiber* self);
void deliver_any();
void finish_capture();
// Every call of the runtime by a kernel begins so.
inline void begin(uint32_t pc) {
    finish_capture();
    current->capture.address = nullptr;
    current->pc = pc;
}
void ordinary_access(void* address, uint64_t num_bytes, bool is_write, Scope scope, uint32_t pc);

// A word that is read or written by strong operations, as it arrives in memory.
void publish(uint8_t* address, uint64_t value, int size, uint32_t agent, uint32_t clock,
             const Knowledge& known, Scope scope);
// The same by who has read it: what earlier changes released passes on.
void publish_change(uint8_t* address, uint64_t value, int size, uint32_t agent, uint32_t clock,
                    const Knowledge& known);
uint64_t current_value(const void* address, int size);
bool await_word(const void* address, Fiber* fiber);  // false: it has no history

// Bulk copies. The agents of a block's copies and puts are lent.
uint32_t take_async_agent(Fiber* fiber, uint32_t* clock);
void free_async_agent(uint32_t agent);
void reset_bulk();
size_t num_copies();
void step_copy();
void check_end_of_thread(Fiber* fiber);
bool await_mbarrier(const void* address, Fiber* fiber);

// Reads that are allowed beside device memory and stacks: of constants and arguments.
void allow_reads(const void* first, size_t num_bytes);
bool is_stack(const void* address);

// Shared memory at the start of a block: nobody has written it.
void begin_shared(int slot);

// The network.
void reset_network();
size_t num_puts();
bool step_network();  // false: nothing could be delivered

uint32_t caller_pc(const void* return_address);
// Of the fiber's own call into the runtime, counted within its kernel's library.
#define EMU_PC() emu::caller_pc(__builtin_return_address(0))

}  // namespace emu

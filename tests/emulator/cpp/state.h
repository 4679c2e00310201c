// What the parts of the runtime share: threads, blocks, streams, memory, and how a run ends.
#pragma once
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "clocks.h"
#include "device.h"

namespace emu {

constexpr int kWarpLanes = 32;
constexpr int kAsyncAgents = 64;  // of a block: parts of bulk copies, which are agents of their own
constexpr int kBarriers = 16;     // of a block

inline uint64_t align_up(uint64_t value, uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}
uint8_t* reserve(size_t num_bytes, void* at = nullptr);
void give_back(uint8_t* pages, size_t num_bytes);

// Everything that is drawn in a run, in one sequence.
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    uint32_t below(size_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
    bool one_in(uint32_t n) { return n <= 1 || below(n) == 0; }
};
extern Random random_numbers;

enum class State : uint8_t {
    kIdle,
    kRunnable,
    kPolling,
    kAtBarrier,
    kAtCollective,
    kAwaitingCopies,
    kAwaitingPuts,
    kDone,
    kDead
};

using Entry = void (*)(const void*);
struct BulkCopy;

// An ordinary store between its hook, which comes before it, and the next one, which finds the new bytes.
struct Capture {
    uint8_t* address = nullptr;  // nullptr: none
    uint8_t size = 0, age = 0;
    uint32_t pc = 0;
    uint8_t before[16];
};

struct Fiber {
    void* stack_pointer;
    uint8_t* stack;
    int id, rank, slot, stream, thread;
    uint32_t agent;
    State state;
    int run_position, sleep_position;
    uint64_t priority;

    // Memory model. `clock` is of what the thread does now; `fenced_until` of its own accesses before a
    // fence.
    Knowledge known, released_by_fence, awaiting_fence;
    Scope fence_scope, awaiting_scope;
    Clock sc_order;
    uint32_t clock, fenced_until, fenced_shared_until;
    Capture capture;
    std::vector<std::pair<const void*, uint32_t>> last_read;  // index into a word's history
    std::vector<const void*> unfenced_mbarriers;

    // Polling: words that were read, and what they held, since the thread last did anything else.
    struct {
        const void* address;
        uint64_t value;
    } polled[16];
    int num_polled, free_polls;

    std::vector<BulkCopy*> open_group;
    std::vector<std::vector<BulkCopy*>> groups;
    int awaited_groups;
    bool awaits_reads_alone;

    Vote vote;
    int vote_result, meeting;
    uint32_t pc;
};
extern std::vector<Fiber> fibers;
extern Fiber* current;   // nullptr: the hosts are still enqueuing
extern bool is_running;  // what fails ends the run, and not the process

struct Meeting {
    uint32_t mask = 0, arrived = 0, left = 0, pc = 0;
    Collective kind;
    bool is_complete = false;
    uint64_t values[kWarpLanes];
};
struct BlockBarrier {
    std::vector<Fiber*> arrived;
    int all, any, count;
};
// A place for a block: blocks of a stream's kernels use it one after another.
struct Slot {
    int rank, block, num_threads, num_alive;
    int library;
    uint64_t shared_used;
    BlockBarrier barriers[kBarriers];
    std::vector<std::vector<Meeting>> meetings;  // by warp
    uint32_t async_clock[kAsyncAgents];
    bool is_async_busy[kAsyncAgents];
    int next_async;
};
extern std::vector<Slot> slots;

struct Launch {
    enum Kind { kKernel, kCopy, kRecord, kWait } kind;
    int library = 0;
    Entry entry = nullptr;
    const uint8_t* args = nullptr;
    int num_blocks = 0, num_threads = 0;
    uint8_t *destination = nullptr, *source = nullptr;
    uint64_t num_bytes = 0;
    int event = 0;
};
struct Stream {
    int rank, first_slot, max_blocks;
    std::vector<Launch> launches;
    size_t next;
    int num_alive;    // threads of the kernel that runs
    int num_started;  // its blocks that have had a place
    Knowledge known;  // behind what has ended
};
extern std::vector<Stream> streams;

extern EmuGeometry geometry;
extern EmuOptions options;
extern EmuResult result;
extern uint64_t run_number, now_ns;
extern int num_live;           // threads that have not ended
extern uint64_t num_progress;  // counts what may let a waiting thread go on

inline int node_of(int rank) { return rank / geometry.ranks_per_node; }
inline int slot_of(uint32_t agent) { return static_cast<int>(agent) / chunk_size; }
inline int rank_of(uint32_t agent) { return slots[slot_of(agent)].rank; }
// The slots of a rank are neighbours.
std::pair<int, int> slots_of_rank(int rank);

// What a report says of one access, and the end of a run that found something. `pc` counts within the library
// of the agent's block.
EmuAccess access_of(uint32_t agent, uint32_t pc, const char* what);
[[noreturn]] void fail(const char* kind, const std::string& text, const EmuAccess& first = {},
                       const EmuAccess& second = {}, const void* address = nullptr);

// Threads.
void open_fibers(int num_fibers);
void prepare(Fiber& fiber);  // to begin at `run_thread`
[[noreturn]] void run_thread();
void end_thread();
void start_threads();
void switch_from(void** save, void* to);
[[noreturn]] void leave_for(void* stack_pointer);
[[noreturn]] void continue_beside(void (*function)());  // on a stack that is nobody's
void enter(Fiber* fiber);                               // sets what the kernel reads of its place
[[noreturn]] void leave_run();
void start_run();  // returns when it ends

// Scheduler: where another thread may run, and waiting.
void reset_schedule();
void tick(uint32_t one_in);
void meet_others();  // the same at a strong operation, around which schedules matter most
void block(State state);
void make_runnable(Fiber* fiber);
void remove_runnable(Fiber* fiber, State state);
Fiber* pick();
void idle();
void wake(std::vector<Fiber*>& waiting);
// Whether the value was seen before, with nothing done in between; then the thread sleeps until something it
// polls has changed. True if it slept.
bool sleeps_on(const void* address, uint64_t value);
extern uint32_t switch_rate;    // at ordinary accesses, one in so many
extern bool delays_own_stores;  // those to memory of one rank, too
inline void acts() { current->num_polled = 0; }

// Streams.
void advance(int stream);
void reset_streams();

}  // namespace emu

// What Python calls, by ctypes. Twin of ../runtime.py.
#pragma once
#include <cstdint>

extern "C" {

// `kind`: 0 memory of one rank, 1 memory that the ranks of its node map, 2 NVSHMEM's symmetric heap.
enum { kOwn = 0, kSlab = 1, kSymmetric = 2 };

struct EmuGeometry {
    int32_t num_ranks, ranks_per_node, max_threads, num_streams;
    uint64_t shared_bytes;  // of a block, static and dynamic
};

struct EmuStream {
    int32_t rank, max_blocks;
};

struct EmuOptions {
    uint64_t seed, max_steps;
    int64_t timeout_ns;  // virtual time jumps by a part of it when nobody can go on otherwise
    int32_t strategy;  // -1: from the seed; 0 uniform, 1 priority change points, 2 starve one, 3 let one rest
    int32_t finds_races;            // the checks that need no wrong value to be seen
    int32_t is_strict;              // a receiver needs its own proxy fence after an acquire from another rank
    int32_t checks_uninitialised;   // reads of shared memory that nobody wrote
    int32_t orders_queue_pairs;     // the network delivers the puts of one queue pair in order
    int32_t dead_rank, lost_node;   // -1: none
    uint64_t dead_step, lost_step;  // when; 0 for before the start
    int32_t max_resident;           // blocks of a kernel that have a place at a time, in order; 0: all
};

struct EmuAccess {
    uint32_t pc;  // of the library `library`
    int32_t library, rank, block, thread;
    char what[32];
};

struct EmuResult {
    char kind[16];  // empty: nothing found
    char text[256];
    uint64_t address;
    EmuAccess first, second;
    uint64_t steps, switches, delayed_stores, bulk_copies, puts, virtual_ns;
    int32_t strategy;
};

// Sizes of the structs above, in their order, which Python compares.
uint64_t emu_struct_bytes(int32_t which);

void emu_open(const EmuGeometry* geometry, const EmuStream* streams);
uint64_t emu_allocate(int32_t rank, uint64_t num_bytes, int32_t kind);
int32_t emu_load(const char* path);  // a library of kernels, which stays; -1: see emu_load_error
const char* emu_load_error();
void* emu_entry(int32_t library, const char* name);
uint64_t emu_shared_bytes(int32_t library);

void emu_enqueue_kernel(int32_t stream, int32_t library, void* entry, const void* args, uint64_t args_bytes,
                        int32_t num_blocks, int32_t num_threads);
void emu_enqueue_copy(int32_t stream, uint64_t destination, uint64_t source, uint64_t num_bytes);
void emu_enqueue_record(int32_t stream, int32_t event);
void emu_enqueue_wait(int32_t stream, int32_t event);

void emu_save();                                             // memory as every run finds it
void emu_run(const EmuOptions* options, EmuResult* result);  // what was enqueued, from the saved memory
}

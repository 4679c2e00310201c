// What emulated kernels call: the runtime's side of every strong access, barrier, collective and bulk copy.
#pragma once
#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace emu {

enum class Order { kRelaxed, kAcquire, kRelease, kAcqRel };
enum class Scope : uint8_t { kWeak, kCta, kGpu, kSys };
enum class Collective { kShuffle, kBallot, kMatch, kReduce, kSync };
enum class Reduce { kNone, kAdd, kMin, kMax, kAnd, kOr, kXor };
enum class Rmw { kAdd, kIncrement, kExchange, kCompareSwap, kMin, kMax, kAnd, kOr };
enum class Vote { kNone, kAnd, kOr, kCount };

uint64_t load_word(const void* address, int size, Order order, Scope scope);
void store_word(void* address, uint64_t value, int size, Order order, Scope scope);
uint64_t change_word(void* address, uint64_t operand, uint64_t other, int size, Rmw rmw, Order order,
                     Scope scope);

template <class T>
inline __attribute__((always_inline)) T load(const T* address, Order order, Scope scope) {
    return static_cast<T>(load_word(address, sizeof(T), order, scope));
}
template <class T>
inline __attribute__((always_inline)) void store(T* address, T value, Order order, Scope scope) {
    store_word(address, static_cast<uint64_t>(value), sizeof(T), order, scope);
}
template <class T>
inline __attribute__((always_inline)) T change(Rmw rmw, T* address, T operand, Order order, Scope scope,
                                               T other = T{}) {
    return static_cast<T>(change_word(address, static_cast<uint64_t>(operand), static_cast<uint64_t>(other),
                                      sizeof(T), rmw, order, scope));
}

void fence(Order order, Scope scope, bool is_sequentially_consistent);
void fence_proxy(bool is_shared_alone);

void mbarrier_init(uint64_t* mbarrier, uint32_t count);
void mbarrier_fence_init();
void mbarrier_arrive(uint64_t* mbarrier, uint32_t expected_bytes);
bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity);

void bulk_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* mbarrier);
void bulk_store(void* global, const void* shared, uint32_t num_bytes);
void bulk_commit();
void bulk_wait(int num_pending, bool is_read_enough);

uint64_t nanoseconds();
void sleep(uint32_t ns);

// Barrier `id` of the block; num_threads 0: of all its threads.
int block_barrier(int id, int num_threads, int value, Vote vote);
// `argument`: the source lane of a shuffle, or a Reduce.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, uint32_t argument, bool is_signed);

// Of NVSHMEM, see nvshmem.h. `queue_pair` -1: the default one.
enum class SignalOperation { kNone, kSet, kAdd };
void network_put(void* destination, const void* source, uint64_t num_bytes, uint64_t* signal,
                 uint64_t signal_value, SignalOperation operation, int pe, int queue_pair);
uint64_t network_fetch_add(uint64_t* word, uint64_t value, int pe);
void network_fence();
void network_quiet();
void* network_pointer(const void* symmetric, int pe);
int network_pe();
int network_num_pes();

}  // namespace emu

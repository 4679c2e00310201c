// NVSHMEM's device functions that kernels use, over the simulated network. A variant for a warp or a block
// meets without ordering memory, as the specification promises no more; one thread of it puts.
#pragma once
#include "cuda.h"

enum { NVSHMEM_CMP_EQ, NVSHMEM_CMP_NE, NVSHMEM_CMP_GT, NVSHMEM_CMP_LE, NVSHMEM_CMP_LT, NVSHMEM_CMP_GE };
enum { NVSHMEM_SIGNAL_SET, NVSHMEM_SIGNAL_ADD };
using nvshmemx_qp_handle_t = int;

namespace emu {
constexpr int kDefaultQueuePair = -1;

__forceinline__ SignalOperation signal_operation(int operation) {
    return operation == NVSHMEM_SIGNAL_ADD ? SignalOperation::kAdd : SignalOperation::kSet;
}
__forceinline__ bool compares(uint64_t seen, int comparison, uint64_t value) {
    switch (comparison) {
        case NVSHMEM_CMP_EQ:
            return seen == value;
        case NVSHMEM_CMP_NE:
            return seen != value;
        case NVSHMEM_CMP_GT:
            return seen > value;
        case NVSHMEM_CMP_LE:
            return seen <= value;
        case NVSHMEM_CMP_LT:
            return seen < value;
        default:
            return seen >= value;
    }
}
}  // namespace emu

__forceinline__ int nvshmem_my_pe() { return emu::network_pe(); }
__forceinline__ int nvshmem_n_pes() { return emu::network_num_pes(); }
__forceinline__ void* nvshmem_ptr(const void* symmetric, int pe) {
    return emu::network_pointer(symmetric, pe);
}
__forceinline__ void nvshmem_fence() { emu::network_fence(); }
__forceinline__ void nvshmem_quiet() { emu::network_quiet(); }

__forceinline__ void nvshmem_putmem_nbi(void* destination, const void* source, size_t num_bytes, int pe) {
    emu::network_put(destination, source, num_bytes, nullptr, 0, emu::SignalOperation::kNone, pe,
                     emu::kDefaultQueuePair);
}
__forceinline__ void nvshmem_putmem_signal_nbi(void* destination, const void* source, size_t num_bytes,
                                               uint64_t* signal, uint64_t value, int operation, int pe) {
    emu::network_put(destination, source, num_bytes, signal, value, emu::signal_operation(operation), pe,
                     emu::kDefaultQueuePair);
}
__forceinline__ void nvshmemx_signal_op(uint64_t* signal, uint64_t value, int operation, int pe) {
    emu::network_put(nullptr, nullptr, 0, signal, value, emu::signal_operation(operation), pe,
                     emu::kDefaultQueuePair);
}
__forceinline__ void nvshmemx_qp_char_put_nbi(char* destination, const char* source, size_t num_bytes, int pe,
                                              nvshmemx_qp_handle_t qp) {
    emu::network_put(destination, source, num_bytes, nullptr, 0, emu::SignalOperation::kNone, pe, qp);
}
__forceinline__ void nvshmemx_qp_char_put_signal_nbi(char* destination, const char* source, size_t num_bytes,
                                                     uint64_t* signal, uint64_t value, int operation, int pe,
                                                     nvshmemx_qp_handle_t qp) {
    emu::network_put(destination, source, num_bytes, signal, value, emu::signal_operation(operation), pe, qp);
}
__forceinline__ void nvshmemx_qp_signal_op(uint64_t* signal, uint64_t value, int operation, int pe,
                                           nvshmemx_qp_handle_t qp) {
    emu::network_put(nullptr, nullptr, 0, signal, value, emu::signal_operation(operation), pe, qp);
}

__forceinline__ void nvshmemx_putmem_nbi_warp(void* destination, const void* source, size_t num_bytes,
                                              int pe) {
    __ballot_sync(~0u, 1);
    if (emu::lane() == 0) nvshmem_putmem_nbi(destination, source, num_bytes, pe);
    __ballot_sync(~0u, 1);
}
__forceinline__ void nvshmemx_putmem_signal_nbi_warp(void* destination, const void* source, size_t num_bytes,
                                                     uint64_t* signal, uint64_t value, int operation,
                                                     int pe) {
    __ballot_sync(~0u, 1);
    if (emu::lane() == 0)
        nvshmem_putmem_signal_nbi(destination, source, num_bytes, signal, value, operation, pe);
    __ballot_sync(~0u, 1);
}

__forceinline__ uint64_t nvshmem_uint64_atomic_fetch_add(uint64_t* word, uint64_t value, int pe) {
    return emu::network_fetch_add(word, value, pe);
}

__forceinline__ uint64_t nvshmem_signal_fetch(uint64_t* signal) {
    return emu::load(signal, emu::Order::kAcquire, emu::Scope::kSys);
}
__forceinline__ int nvshmem_uint64_test(uint64_t* word, int comparison, uint64_t value) {
    return emu::compares(nvshmem_signal_fetch(word), comparison, value);
}
__forceinline__ uint64_t nvshmem_signal_wait_until(uint64_t* signal, int comparison, uint64_t value) {
    while (true) {
        const uint64_t seen = nvshmem_signal_fetch(signal);
        if (emu::compares(seen, comparison, value)) return seen;
    }
}

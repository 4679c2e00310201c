// The emulated twin of kernels_cu/network.cuh, over the simulated network. What is ordered stands there. The
// variant for a block does not meet: one thread puts, whatever the others do.
#pragma once
#include "base.cuh"
#include "nvshmem.h"

namespace ep::network {

__device__ inline void put_signal_thread(void* destination, const void* source, int64_t num_bytes,
                                         uint64_t* signal, uint64_t value, int32_t peer) {
    nvshmem_putmem_signal_nbi(destination, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, peer);
}
__device__ inline void put_signal_warp(void* destination, const void* source, int64_t num_bytes,
                                       uint64_t* signal, uint64_t value, int32_t peer) {
    nvshmemx_putmem_signal_nbi_warp(destination, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, peer);
}
__device__ inline void put_signal_block(void* destination, const void* source, int64_t num_bytes,
                                        uint64_t* signal, uint64_t value, int32_t peer) {
    if (threadIdx.x == 0) put_signal_thread(destination, source, num_bytes, signal, value, peer);
}

__device__ inline void set_signal(uint64_t* signal, uint64_t value, int32_t peer) {
    nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_SET, peer);
}

__device__ inline void* peer_pointer(void* address, int32_t peer) { return nvshmem_ptr(address, peer); }

__device__ inline void acquire_signal(uint64_t* signal, uint64_t value) {
    nvshmem_uint64_test(signal, NVSHMEM_CMP_GE, value);
}

}  // namespace ep::network

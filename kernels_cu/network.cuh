// What kernels see of NVSHMEM: puts to any rank, over NVLink or the network, with a signal behind the data.
//
// Defined in network_bridge.cu, the one translation unit that includes NVSHMEM's headers; the linker joins
// the two with NVSHMEM's device library. A put stays a call, with up to 800 bytes of stack for a thread: it
// belongs into a kernel, or a warp role, that has registers to spare.
//
// Addresses   what is put, where it lands, and signals are symmetric memory; an address of this rank stands
//             for the same place at `peer`. A rank may be its own peer.
// Order       what came before a put in its threads' causality order goes with it. At the peer a signal is
//             stored after the data of its own put. Nothing orders two puts, or two signals.
// Completion  no call waits for the peer. The source may be reused when something that the peer sent says
//             that it has the data. NVSHMEM's quiet has no deadline: for a lost rank it would wait for ever.
#pragma once
#include "base.cuh"

namespace ep::network {

// Copies `num_bytes`, at least one, to `peer`, then stores `value` into *signal there. Called by one thread,
// by all threads of a warp, or by all threads of a block, with the same arguments.
__device__ void put_signal_thread(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                  uint64_t value, int32_t peer);
__device__ void put_signal_warp(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                uint64_t value, int32_t peer);
__device__ void put_signal_block(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                 uint64_t value, int32_t peer);

// Stores `value` into *signal at `peer`. Orders nothing.
__device__ void set_signal(uint64_t* signal, uint64_t value, int32_t peer);

// Where loads and stores of this rank find the symmetric `address` of `peer`; nullptr where only puts reach
// it.
__device__ void* peer_pointer(void* address, int32_t peer);

// What came with a signal that the network delivered is visible to this thread afterwards. To be called once
// ptx::ld_acquire_sys, which does the same for peers on NVLink, has seen that *signal is at least `value`.
__device__ void acquire_signal(uint64_t* signal, uint64_t value);

}  // namespace ep::network

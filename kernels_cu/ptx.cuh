// Every inline-asm statement. A wrapper is one instruction; its name says which, with order and scope, and
// its comment says what it pairs with. All of them exist on sm_70 and later.
#pragma once
#include "base.cuh"

namespace ep::ptx {

// Acquire load at system scope. Pairs with st_release_sys on any GPU of the NVLink domain.
__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// Release store at system scope. Pairs with ld_acquire_sys, and with an ordinary load on the x86 or Arm host
// that is followed by a wait for the stream.
__device__ __forceinline__ void st_release_sys(uint64_t* addr, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// Relaxed store at system scope: visible to every GPU and to the host, orders nothing.
__device__ __forceinline__ void st_relaxed_sys(uint64_t* addr, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// Nanoseconds since some moment, the same clock for all blocks of a GPU. Differs between GPUs.
__device__ __forceinline__ uint64_t globaltimer_ns() {
    uint64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
    return value;
}

}  // namespace ep::ptx

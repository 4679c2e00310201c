// Every inline-asm statement. A wrapper is one instruction; its name says which, with order and scope, and
// its comment says what it pairs with. Those that need Hopper are guarded by EP_HAS_TMA.
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

// Relaxed load at system scope: always from where peers store, orders nothing.
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// Four words at once, each by itself: visible to every GPU, in any order. Order nothing.
__device__ __forceinline__ void st_relaxed_sys(uint4* addr, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(addr), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ uint4 ld_relaxed_sys(const uint4* addr) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(addr)
                 : "memory");
    return v;
}

// Relaxed load and store among the blocks of one GPU. Order nothing.
__device__ __forceinline__ uint64_t ld_relaxed_gpu(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}
__device__ __forceinline__ void st_relaxed_gpu(uint64_t* addr, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// Release store among the blocks of one GPU.
__device__ __forceinline__ void st_release_gpu(uint64_t* addr, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(addr), "l"(value) : "memory");
}

// Acquire load among the blocks of one GPU. Pairs with st_release_gpu and atom_add_acq_rel_gpu.
__device__ __forceinline__ uint64_t ld_acquire_gpu(const uint64_t* addr) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(addr) : "memory");
    return value;
}

// Fetch-and-add among the blocks of one GPU: releases what came before, acquires what earlier adders
// released.
__device__ __forceinline__ uint64_t atom_add_acq_rel_gpu(uint64_t* addr, uint64_t value) {
    uint64_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(old)
                 : "l"(addr), "l"(value)
                 : "memory");
    return old;
}

// Compare-and-swap among the blocks of one GPU: releases what came before, acquires what was released with
// the word. Returns what was there.
__device__ __forceinline__ uint64_t atom_cas_acq_rel_gpu(uint64_t* addr, uint64_t expected, uint64_t value) {
    uint64_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "l"(addr), "l"(expected), "l"(value)
                 : "memory");
    return old;
}

// Counts up and returns what was there; orders nothing. For tickets that are fetched ahead: an addition of a
// uniform value becomes one of the whole warp (ptxas), which waits for the result at once. This does not.
__device__ __forceinline__ uint32_t atom_inc_relaxed_gpu(uint32_t* addr) {
    uint32_t old;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0xffffffff;" : "=r"(old) : "l"(addr) : "memory");
    return old;
}

// One float that is read once.
__device__ __forceinline__ float ld_stream(const float* addr) {
    float value;
    asm volatile("ld.global.cs.f32 %0, [%1];" : "=f"(value) : "l"(addr) : "memory");
    return value;
}

// 16 bytes that are read once, and 16 or 8 bytes that this GPU does not read again.
__device__ __forceinline__ uint4 ld_stream(const uint4* addr) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(addr)
                 : "memory");
    return v;
}
__device__ __forceinline__ void st_stream(uint4* addr, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(addr), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ void st_stream(uint2* addr, uint2 v) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(addr), "r"(v.x), "r"(v.y) : "memory");
}

// A float16 to float32, exactly, and two float32 to 16 bits: to nearest, ties to even, infinity beyond the
// largest. The low half comes first in memory. A bfloat16 is the upper half of its float32: no instruction.
__device__ __forceinline__ float cvt_f32_f16(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
__device__ __forceinline__ uint32_t cvt_rn_f16x2_f32(float low, float high) {
    uint32_t halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
    return halves;
}
__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float low, float high) {
    uint32_t halves;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
    return halves;
}

// A power of 2, roughly: to within 2^-22 of itself, but 0 where it would be subnormal.
__device__ __forceinline__ float ex2_approx_ftz(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define EP_HAS_E4M3 1
// Two float32 to e4m3: to nearest, ties to even, saturated to +-448; a NaN becomes 0x7f. The low byte comes
// first in memory.
__device__ __forceinline__ uint32_t cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
    unsigned short bytes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    return bytes;
}
#endif

#ifdef EP_HAS_TMA
// Lets the kernel behind this one on the stream start, if it was launched to, once every block has come here
// or ended. Orders nothing.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before this one has ended, and sees what it stored. Nothing to wait for where this
// one was not launched to start before that.
__device__ __forceinline__ void wait_for_prerequisites() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Generic accesses before it, accesses of the async proxy (bulk copies) after it, and the reverse.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same for the block's shared memory alone. It does not wait for the GPU to see stores to global memory,
// so it may come between every last read of a stage and its refill by a bulk load.
__device__ __forceinline__ void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One arrival completes a phase. Other threads and the async proxy see it after fence_mbarrier_init and a
// barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem_address(mbarrier)) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase wait for `bytes` of bulk loads.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* mbarrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(mbarrier)),
                 "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity is complete; waits a moment. Acquires what completed it.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity) {
    uint32_t is_complete;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(is_complete)
        : "r"(smem_address(mbarrier)), "r"(parity)
        : "memory");
    return is_complete != 0;
}

// Bulk load into shared memory; completes on `mbarrier`. Addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes,
                                          uint64_t* mbarrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            smem_address(smem)),
        "l"(global), "r"(bytes), "r"(smem_address(mbarrier))
        : "memory");
}

// Bulk store to any GPU's memory, in the calling thread's current group.
__device__ __forceinline__ void bulk_store(void* global, const void* smem, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(smem_address(smem)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups still read shared memory, and until they have also landed.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void bulk_wait_landed() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

// Nanoseconds since some moment, the same clock for all blocks of a GPU. Differs between GPUs.
__device__ __forceinline__ uint64_t globaltimer_ns() {
    uint64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
    return value;
}

}  // namespace ep::ptx

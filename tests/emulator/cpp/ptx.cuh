// The emulated twin of kernels_cu/ptx.cuh: the same functions, each in terms of the memory model. What they
// order, and what they pair with, stands there.
#pragma once
#include "base.cuh"
#include "numbers.h"

namespace ep::ptx {

using emu::Order;
using emu::Rmw;
using emu::Scope;

__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* addr) {
    return emu::load(addr, Order::kAcquire, Scope::kSys);
}
__device__ __forceinline__ void st_release_sys(uint64_t* addr, uint64_t value) {
    emu::store(addr, value, Order::kRelease, Scope::kSys);
}
__device__ __forceinline__ void st_relaxed_sys(uint64_t* addr, uint64_t value) {
    emu::store(addr, value, Order::kRelaxed, Scope::kSys);
}
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* addr) {
    return emu::load(addr, Order::kRelaxed, Scope::kSys);
}
__device__ __forceinline__ void st_relaxed_sys(uint4* addr, uint4 v) {
    emu::store(&addr->x, v.x, Order::kRelaxed, Scope::kSys);
    emu::store(&addr->y, v.y, Order::kRelaxed, Scope::kSys);
    emu::store(&addr->z, v.z, Order::kRelaxed, Scope::kSys);
    emu::store(&addr->w, v.w, Order::kRelaxed, Scope::kSys);
}
__device__ __forceinline__ uint4 ld_relaxed_sys(const uint4* addr) {
    return {
        emu::load(&addr->x, Order::kRelaxed, Scope::kSys), emu::load(&addr->y, Order::kRelaxed, Scope::kSys),
        emu::load(&addr->z, Order::kRelaxed, Scope::kSys), emu::load(&addr->w, Order::kRelaxed, Scope::kSys)};
}
__device__ __forceinline__ uint64_t ld_relaxed_gpu(const uint64_t* addr) {
    return emu::load(addr, Order::kRelaxed, Scope::kGpu);
}
__device__ __forceinline__ void st_relaxed_gpu(uint64_t* addr, uint64_t value) {
    emu::store(addr, value, Order::kRelaxed, Scope::kGpu);
}
__device__ __forceinline__ void st_release_gpu(uint64_t* addr, uint64_t value) {
    emu::store(addr, value, Order::kRelease, Scope::kGpu);
}
__device__ __forceinline__ uint64_t ld_acquire_gpu(const uint64_t* addr) {
    return emu::load(addr, Order::kAcquire, Scope::kGpu);
}
__device__ __forceinline__ uint64_t atom_add_acq_rel_gpu(uint64_t* addr, uint64_t value) {
    return emu::change(Rmw::kAdd, addr, value, Order::kAcqRel, Scope::kGpu);
}
__device__ __forceinline__ uint64_t atom_cas_acq_rel_gpu(uint64_t* addr, uint64_t expected, uint64_t value) {
    return emu::change(Rmw::kCompareSwap, addr, expected, Order::kAcqRel, Scope::kGpu, value);
}
__device__ __forceinline__ uint32_t atom_inc_relaxed_gpu(uint32_t* addr) {
    return emu::change(Rmw::kIncrement, addr, uint32_t{0xffffffff}, Order::kRelaxed, Scope::kGpu);
}

// Ordinary accesses, which g++ instruments where these are inlined.
__device__ __forceinline__ float ld_stream(const float* addr) { return *addr; }
__device__ __forceinline__ uint4 ld_stream(const uint4* addr) { return *addr; }
__device__ __forceinline__ void st_stream(uint4* addr, uint4 v) { *addr = v; }
__device__ __forceinline__ void st_stream(uint2* addr, uint2 v) { *addr = v; }

__device__ __forceinline__ float cvt_f32_f16(unsigned short half) { return emu::f32_of_f16(half); }
__device__ __forceinline__ uint32_t cvt_rn_f16x2_f32(float low, float high) {
    return emu::f16_of(low) | emu::f16_of(high) << 16;
}
__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float low, float high) {
    return emu::bf16_of(low) | emu::bf16_of(high) << 16;
}
__device__ __forceinline__ float ex2_approx_ftz(float value) { return emu::rough_exp2(value); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define EP_HAS_E4M3 1
__device__ __forceinline__ uint32_t cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
    return emu::e4m3_of(low) | emu::e4m3_of(high) << 8;
}
#endif

#ifdef EP_HAS_TMA
// What may run at the same time, and what waits for its end, is up to the streams.
__device__ __forceinline__ void launch_dependents() {}
__device__ __forceinline__ void wait_for_prerequisites() {}
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(reinterpret_cast<uint64_t>(pointer));
}
__device__ __forceinline__ void fence_proxy_async() { emu::fence_proxy(false); }
__device__ __forceinline__ void fence_proxy_async_shared() { emu::fence_proxy(true); }
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier) { emu::mbarrier_init(mbarrier, 1); }
__device__ __forceinline__ void fence_mbarrier_init() { emu::mbarrier_fence_init(); }
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* mbarrier, uint32_t bytes) {
    emu::mbarrier_arrive(mbarrier, bytes);
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity) {
    return emu::mbarrier_try_wait(mbarrier, parity);
}
__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes,
                                          uint64_t* mbarrier) {
    emu::bulk_load(smem, global, bytes, mbarrier);
}
__device__ __forceinline__ void bulk_store(void* global, const void* smem, uint32_t bytes) {
    emu::bulk_store(global, smem, bytes);
}
__device__ __forceinline__ void bulk_commit() { emu::bulk_commit(); }
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    emu::bulk_wait(kPending, true);
}
__device__ __forceinline__ void bulk_wait_landed() { emu::bulk_wait(0, false); }
#endif

__device__ __forceinline__ uint64_t globaltimer_ns() { return emu::nanoseconds(); }

}  // namespace ep::ptx

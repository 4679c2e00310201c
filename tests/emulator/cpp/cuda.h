// CUDA C++ as g++ sees it; included before every kernel source. Plain loads and stores are not here: g++
// instruments them, and hooks.cpp gets them.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device.h"

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__ thread_local  // the thread-local block is the CUDA block's shared memory, see hooks.cpp

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
__forceinline__ int2 make_int2(int x, int y) { return {x, y}; }
__forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
__forceinline__ int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
__forceinline__ uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
__forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

constexpr int warpSize = 32;

template <class A, class B>
__forceinline__ constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
__forceinline__ constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// Arithmetic. Compiled without contraction, so that every operation rounds by itself.
__forceinline__ unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
__forceinline__ float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
__forceinline__ float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ int __popc(unsigned value) { return __builtin_popcount(value); }
__forceinline__ int __ffs(int value) { return __builtin_ffs(value); }
__forceinline__ int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }

// CUDA's ignore a NaN, a signalling one too, which C's do not.
namespace emu {
__forceinline__ float maximum(float a, float b) { return !(a == a) || a < b ? (b == b ? b : a) : a; }
__forceinline__ float minimum(float a, float b) { return !(a == a) || b < a ? (b == b ? b : a) : a; }
}  // namespace emu
#define fmaxf emu::maximum
#define fminf emu::minimum

// Loads past the first cache: ordinary loads of the memory model.
template <class T>
__forceinline__ T __ldcg(const T* address) {
    return *address;
}

__forceinline__ void __syncthreads() { emu::block_barrier(0, 0, 0, emu::Vote::kNone); }
__forceinline__ int __syncthreads_and(int value) { return emu::block_barrier(0, 0, value, emu::Vote::kAnd); }
__forceinline__ int __syncthreads_or(int value) { return emu::block_barrier(0, 0, value, emu::Vote::kOr); }
__forceinline__ int __syncthreads_count(int value) {
    return emu::block_barrier(0, 0, value, emu::Vote::kCount);
}

namespace emu {
template <class T>
__forceinline__ uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
__forceinline__ T shuffle(uint32_t mask, T value, int source_lane) {
    const uint64_t bits = warp_collective(Collective::kShuffle, mask, bits_of(value), source_lane, false);
    T result;
    __builtin_memcpy(&result, &bits, sizeof(T));
    return result;
}
template <class T>
__forceinline__ T reduce(Reduce operation, uint32_t mask, T value) {
    return static_cast<T>(warp_collective(Collective::kReduce, mask, static_cast<uint64_t>(value),
                                          static_cast<uint32_t>(operation), std::is_signed_v<T>));
}
__forceinline__ int lane() { return threadIdx.x % warpSize; }
}  // namespace emu

__forceinline__ void __syncwarp(unsigned mask = ~0u) {
    emu::warp_collective(emu::Collective::kSync, mask, 0, 0, false);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int value) {
    return static_cast<unsigned>(emu::warp_collective(emu::Collective::kBallot, mask, value != 0, 0, false));
}
__forceinline__ int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
__forceinline__ int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, !value) == 0; }
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
    const int first = emu::lane() & ~(width - 1);
    return emu::shuffle(mask, value, first | (lane & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int other, int width = warpSize) {
    const int lane = emu::lane(), source = lane ^ other;
    return emu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
    const int lane = emu::lane(), source = lane - static_cast<int>(distance);
    return emu::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
    const int lane = emu::lane(), source = lane + static_cast<int>(distance);
    return emu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value) {
    return static_cast<unsigned>(
        emu::warp_collective(emu::Collective::kMatch, mask, emu::bits_of(value), 0, false));
}
template <class T>
__forceinline__ T __reduce_add_sync(unsigned mask, T value) {
    return emu::reduce(emu::Reduce::kAdd, mask, value);
}
template <class T>
__forceinline__ T __reduce_min_sync(unsigned mask, T value) {
    return emu::reduce(emu::Reduce::kMin, mask, value);
}
template <class T>
__forceinline__ T __reduce_max_sync(unsigned mask, T value) {
    return emu::reduce(emu::Reduce::kMax, mask, value);
}
__forceinline__ unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return emu::reduce(emu::Reduce::kAnd, mask, value);
}
__forceinline__ unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return emu::reduce(emu::Reduce::kOr, mask, value);
}
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return emu::reduce(emu::Reduce::kXor, mask, value);
}

__forceinline__ void __threadfence_block() { emu::fence(emu::Order::kAcqRel, emu::Scope::kCta, true); }
__forceinline__ void __threadfence() { emu::fence(emu::Order::kAcqRel, emu::Scope::kGpu, true); }
__forceinline__ void __threadfence_system() { emu::fence(emu::Order::kAcqRel, emu::Scope::kSys, true); }
__forceinline__ void __nanosleep(unsigned ns) { emu::sleep(ns); }
__forceinline__ long long clock64() { return static_cast<long long>(emu::nanoseconds()); }

// Atomics are relaxed, of the GPU's scope.
template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
    return emu::change(emu::Rmw::kAdd, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
    return emu::change(emu::Rmw::kExchange, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    return emu::change(emu::Rmw::kCompareSwap, address, compare, emu::Order::kRelaxed, emu::Scope::kGpu,
                       value);
}
template <class T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
    static_assert(std::is_unsigned_v<T>);
    return emu::change(emu::Rmw::kMin, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
    static_assert(std::is_unsigned_v<T>);
    return emu::change(emu::Rmw::kMax, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}
template <class T>
__forceinline__ T atomicAnd(T* address, std::type_identity_t<T> value) {
    return emu::change(emu::Rmw::kAnd, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}
template <class T>
__forceinline__ T atomicOr(T* address, std::type_identity_t<T> value) {
    return emu::change(emu::Rmw::kOr, address, value, emu::Order::kRelaxed, emu::Scope::kGpu);
}

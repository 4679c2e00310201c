// Integer types, and what differs between compilers. NVRTC has no <cstdint> and needs no header for these.
#pragma once
#ifdef __CUDACC_RTC__
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
// A constant in every NVRTC; __builtin_offsetof came with 13.4.
#define EP_OFFSETOF(type, field) __INTADDR__(&static_cast<type*>(nullptr)->field)
#else
#include <cstdint>
#define EP_OFFSETOF(type, field) __builtin_offsetof(type, field)
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EP_HAS_TMA 1
#endif

namespace ep {
constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T align_up(T value, T alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

// Of this lane and the lower ones, as a warp; right in the first `kLanes` lanes.
template <int kLanes = kWarpSize, class T>
__device__ __forceinline__ T sum_up_to(T value, int32_t lane) {
#pragma unroll
    for (int32_t shift = 1; shift < kLanes; shift *= 2) {
        const T lower = __shfl_up_sync(kFullWarp, value, shift);
        if (lane >= shift) value += lower;
    }
    return value;
}
}  // namespace ep

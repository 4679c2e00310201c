// The cast of bfloat16 to float8_e4m3fn with one float32 scale factor for every 128 channels, bit for bit as
// ep_rt/reference/fp8.py states it: float32 arithmetic, every step rounded by itself to nearest even. One
// kind of knowledge: the arithmetic, and which lane holds which channels.
#pragma once
#include "rows.cuh"

namespace ep::fp8 {

constexpr int kChannelsPerScale = 128;
constexpr int kScaleBytes = 4;
constexpr int kLanesPerScale =
    kChannelsPerScale / rows::kVectorElements<rows::kBfloat16>;  // that hold one vector each
constexpr int kScalesPerWarp = kWarpSize / kLanesPerScale;       // in one vector of every lane

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3MaxInv = 1.0f / kE4m3Max;  // rounded to 0x3b124925
constexpr float kAmaxMin = 1e-4f;

// The e4m3 nearest to a float32 given by its bits; as cvt.rn.satfinite. In integers, for GPUs before sm_89.
__host__ __device__ constexpr uint32_t e4m3_of(uint32_t bits) {
    constexpr uint32_t kInfinity = 0x7f800000, kMax = 0x43e00000 /* 448 */,
                       kHalfOfLeast = 0x3a800000 /* 2^-10 */;
    constexpr uint32_t kLeastNormal = 121;  // 2^-6, as float32 writes the exponent
    const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > kInfinity) return 0x7f;
    if (magnitude >= kMax) return sign | 0x7e;
    if (magnitude <= kHalfOfLeast) return sign;
    const uint32_t exponent = magnitude >> 23;
    // Subnormals have the spacing of the least normal binade; in all others the eighth part is the last
    // place.
    const uint32_t binade = exponent > kLeastNormal ? exponent : kLeastNormal;
    const uint32_t shift = 20 + binade - exponent;
    const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
    const uint32_t is_odd = significand >> shift & 1;
    const uint32_t rounded = (significand + (1u << (shift - 1)) - 1 + is_odd) >> shift;
    // The leading bit of a normal number adds one to the exponent, and so does a carry.
    return sign | (((binade - kLeastNormal) << 3) + rounded);
}

__device__ __forceinline__ uint32_t e4m3x2_of(float low, float high) {
#ifdef EP_HAS_E4M3
    return ptx::cvt_rn_satfinite_e4m3x2_f32(low, high);
#else
    return e4m3_of(__float_as_uint(low)) | e4m3_of(__float_as_uint(high)) << 8;
#endif
}

__device__ __forceinline__ float low_channel(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_channel(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// Two channels times `scale`. The clip to +-448 is the conversion's.
__device__ __forceinline__ uint32_t scaled(uint32_t word, float scale) {
    return e4m3x2_of(__fmul_rn(low_channel(word), scale), __fmul_rn(high_channel(word), scale));
}

// Which scale factor of the channels that a warp casts a lane returns; beyond the last one: none.
__device__ __forceinline__ int32_t scale_of_lane(int32_t lane) {
    return lane % kLanesPerScale * kScalesPerWarp + lane / kLanesPerScale;
}

// Casts, as a warp, channels of which lane l holds those of vector number v * kWarpSize + l in from[v]. Scale
// factors are those of whole groups of channels, so 16 lanes share one. Returns that of `scale_of_lane`.
template <int kVectors>
__device__ __forceinline__ float cast(const uint4 (&from)[kVectors], uint2 (&to)[kVectors], int32_t lane) {
    static_assert(kVectors <= kLanesPerScale);
    float amax_of_lane = kAmaxMin;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float amax = kAmaxMin;  // fmaxf ignores NaN
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = rows::word_of(from[v], i);
            amax = fmaxf(amax, fmaxf(fabsf(low_channel(word)), fabsf(high_channel(word))));
        }
#pragma unroll
        for (int shift = kLanesPerScale / 2; shift > 0; shift /= 2)
            amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, shift));
        if (lane % kLanesPerScale == v) amax_of_lane = amax;
    }
    const float scale_of_lane = __fdiv_rn(kE4m3Max, amax_of_lane);  // an infinity gives 0
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const float scale = __shfl_sync(kFullWarp, scale_of_lane, v, kLanesPerScale);
        to[v].x = scaled(from[v].x, scale) | scaled(from[v].y, scale) << 16;
        to[v].y = scaled(from[v].z, scale) | scaled(from[v].w, scale) << 16;
    }
    return __fmul_rn(amax_of_lane, kE4m3MaxInv);
}

// The same with 16 neighbouring channels in every lane, so that 8 lanes share a scale factor.
constexpr int kLanesPerPair = kLanesPerScale / 2;

// Casts them, as a warp, and gives the scale factor of this lane's channels; with `rounds` a power of two.
__device__ __forceinline__ uint4 cast_pair(const uint4 (&from)[2], bool rounds, float& factor) {
    float amax = kAmaxMin;  // fmaxf ignores NaN
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t word = rows::word_of(from[i / 4], i % 4);
        amax = fmaxf(amax, fmaxf(fabsf(low_channel(word)), fabsf(high_channel(word))));
    }
#pragma unroll
    for (int shift = kLanesPerPair / 2; shift > 0; shift /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, shift));
    factor = __fmul_rn(amax, kE4m3MaxInv);
    float scale = __fdiv_rn(kE4m3Max, amax);  // an infinity gives 0
    if (rounds) {
        const uint32_t bits = __float_as_uint(factor);
        const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
        factor = __uint_as_float(exponent << 23);
        scale = __uint_as_float(exponent == 255 ? 0 : (254 - exponent) << 23);
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = scaled(rows::word_of(from[i / 2], 2 * i % 4), scale) |
                   scaled(rows::word_of(from[i / 2], (2 * i + 1) % 4), scale) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// An e4m3 to float32, exactly: read as the upper bits of a float32 it is 2^120 times too small, also where it
// is subnormal.
__device__ __forceinline__ float value_of(uint32_t e4m3) {
    const uint32_t magnitude = e4m3 & 0x7f, sign = (e4m3 & 0x80) << 24;
    const float value = __fmul_rn(__uint_as_float(magnitude << 20), 0x1p120f);
    return __uint_as_float(sign | (magnitude == 0x7f ? 0x7fc00000 : __float_as_uint(value)));
}

}  // namespace ep::fp8

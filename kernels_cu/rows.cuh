// Sums of rows: vectors of 16 bytes to float32 and back. One kind of knowledge: what the elements are.
#pragma once
#include "ptx.cuh"

namespace ep::rows {

enum Element : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr int kVectorBytes = 16;
template <int kElement>
constexpr int kVectorElements = kElement == kFloat32 ? 4 : 8;

// Where a sum starts. Adding to it gives the first term as it is, -0.0 too, which +0.0 would not.
constexpr float kNoTerm = -0.0f;

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Adds to each element of a sum what `of` makes of that of the vector.
template <int kElement, class Of>
__device__ __forceinline__ void add(float (&sum)[kVectorElements<kElement>], const uint4& vector, Of of) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t word = word_of(vector, i);
        if constexpr (kElement == kFloat32) {
            sum[i] += of(__uint_as_float(word));
        } else if constexpr (kElement == kFloat16) {
            sum[2 * i] += of(ptx::cvt_f32_f16(static_cast<unsigned short>(word)));
            sum[2 * i + 1] += of(ptx::cvt_f32_f16(static_cast<unsigned short>(word >> 16)));
        } else {
            sum[2 * i] += of(__uint_as_float(word << 16));
            sum[2 * i + 1] += of(__uint_as_float(word & 0xffff0000u));
        }
    }
}
template <int kElement>
__device__ __forceinline__ void add(float (&sum)[kVectorElements<kElement>], const uint4& vector) {
    add<kElement>(sum, vector, [](float element) { return element; });
}

// Product and sum are rounded on their own: an explicit product is never fused with an addition.
template <int kElement>
__device__ __forceinline__ void add_product(float (&sum)[kVectorElements<kElement>], float weight,
                                            const uint4& vector) {
    add<kElement>(sum, vector, [weight](float element) { return __fmul_rn(weight, element); });
}

// To nearest, ties to even.
template <int kElement>
__device__ __forceinline__ uint4 rounded(const float (&sum)[kVectorElements<kElement>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kElement == kFloat32) words[i] = __float_as_uint(sum[i]);
        if constexpr (kElement == kFloat16) words[i] = ptx::cvt_rn_f16x2_f32(sum[2 * i], sum[2 * i + 1]);
        if constexpr (kElement == kBfloat16) words[i] = ptx::cvt_rn_bf16x2_f32(sum[2 * i], sum[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace ep::rows

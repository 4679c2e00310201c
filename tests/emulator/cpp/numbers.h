// Conversions that kernels leave to instructions: to nearest, ties to even.
#pragma once
#include <cmath>
#include <cstdint>

namespace emu {

constexpr uint32_t float_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// A float32, given by its sign-free bits, as a number of `mantissa_bits` whose least normal exponent is that
// of float32 `least_normal`, and whose subnormals follow below it. The caller handles what is too large.
constexpr uint32_t rounded_to(uint32_t magnitude, int mantissa_bits, uint32_t least_normal) {
    const uint32_t exponent = magnitude >> 23;
    if (exponent == 0) return 0;
    const uint32_t binade = exponent > least_normal ? exponent : least_normal;
    const uint32_t shift = 23 - mantissa_bits + binade - exponent;
    if (shift > 24) return 0;
    const uint64_t significand = (magnitude & 0x7fffff) | 0x800000;
    const uint64_t is_odd = significand >> shift & 1;
    const uint64_t rounded = (significand + (uint64_t{1} << (shift - 1)) - 1 + is_odd) >> shift;
    // The leading bit of a normal number, and a carry, add to the exponent.
    return static_cast<uint32_t>(((binade - least_normal) << mantissa_bits) + rounded);
}

constexpr uint32_t f16_of(float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    const uint32_t rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded_to(magnitude, 10, 113);
    return sign | (rounded > 0x7c00 ? 0x7c00 : rounded);
}

constexpr uint32_t bf16_of(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Saturates to +-448; a NaN is 0x7f.
constexpr uint32_t e4m3_of(float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7f;
    if (magnitude >= 0x43e00000) return sign | 0x7e;
    return sign | rounded_to(magnitude, 3, 121);
}

inline float f32_of_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
    if (exponent == 0) {  // exact: a multiple of 2^-24
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return __builtin_bit_cast(float, sign | float_bits(value));
    }
    const uint32_t wide = exponent == 31 ? 0xff : exponent + 112;
    return __builtin_bit_cast(float, sign | wide << 23 | mantissa << 13);
}

// As far off as it may be, to either side.
inline float rough_exp2(float value) {
    const double error = float_bits(value) * 0x9e3779b9u >> 31 ? 0x1p-22 : -0x1p-22;
    const auto power = static_cast<float>(std::exp2(static_cast<double>(value)) * (1.0 + error));
    return power < 0x1p-126f ? 0.0f : power;
}

}  // namespace emu

// LogFMT-10 as ep_rt/reference/logfmt.py states it, bit for bit: float32 arithmetic, every step rounded by
// itself, logarithms and powers the float32 nearest to the exact value. One kind of knowledge: the
// arithmetic.
//
// CUDA's own log2 and exp2 of doubles would do, and take longer than all else. Here logarithms are of
// bfloat16, of which a table has the fractions; the two functions of a step, which is small, are series; and
// powers come from the rough instruction unless they lie next to where the bfloat16 changes.
#pragma once
#include "base.cuh"
#include "ptx.cuh"

namespace ep::logfmt {

constexpr float kMaxCode = 511.0f;

__device__ __forceinline__ float bfloat16_value(uint32_t half) { return __uint_as_float(half << 16); }

// log2(1 + i / 128), in two numbers that are exact to 2^-48. Blocks look it up in shared memory: in global
// memory every look of a waiting thread at a flag would take it out of the L1 cache.
struct Log2Table {
    static constexpr int kSize = 128;
    struct alignas(8) Entry {
        float high, low;
    } entries[kSize];
};
__device__ constexpr Log2Table log2_table() {
    constexpr double kLn2 = 0.693147180559945309417;
    Log2Table table{};
    for (int i = 0; i < Log2Table::kSize; ++i) {
        const double z = i / (2.0 * Log2Table::kSize + i);  // atanh(z) is half the natural logarithm
        double sum = 0.0;
        for (int k = 24; k >= 0; --k) sum = sum * z * z + 1.0 / (2 * k + 1);
        const double log = 2.0 * z * sum / kLn2;
        table.entries[i].high = static_cast<float>(log);
        table.entries[i].low = static_cast<float>(log - table.entries[i].high);
    }
    return table;
}
static __device__ constexpr Log2Table kLog2Table = log2_table();
__device__ __forceinline__ Log2Table& block_table() {
    __shared__ Log2Table table;
    return table;
}
// Fills the block's table, as a block, before a barrier.
__device__ __forceinline__ void fill_block_table() {
    for (uint32_t i = threadIdx.x; i < Log2Table::kSize; i += blockDim.x)
        block_table().entries[i] = kLog2Table.entries[i];
}

// The logarithm of a magnitude that is given by its bits as bfloat16, to the nearest float32: so for all of
// them, with subnormals only if numbers are scaled, which are below 2^63 then. That of 0 is below -126, and
// -191 if it is scaled: further below those of a block than its range.
__device__ __forceinline__ float log2_of(uint32_t magnitude, bool is_scaled) {
    const uint32_t bits = __float_as_uint(bfloat16_value(magnitude) * (is_scaled ? 0x1p64f : 1.0f));
    const auto exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - (is_scaled ? 127 + 64 : 127));
    const Log2Table::Entry fraction = block_table().entries[bits >> 16 & (Log2Table::kSize - 1)];
    const float sum = __fadd_rn(exponent, fraction.high);
    const float rest = __fadd_rn(fraction.high, -__fadd_rn(sum, -exponent));
    return __fadd_rn(sum, __fadd_rn(rest, fraction.low));
}

// 2^x for 0 < x < 1/15, to the nearest float32.
__device__ __forceinline__ float exp2_of_step(float x) {
    constexpr double kLn2 = 0.693147180559945309417;
    const double y = x * kLn2;
    double sum = 1.0;
#pragma unroll
    for (int k = 9; k > 0; --k) sum = 1.0 + sum * y * (1.0 / k);
    return static_cast<float>(sum);
}
// log2(x) for 1 <= x < 1 + 1/40, to the nearest float32.
__device__ __forceinline__ float log2_near_one(float x) {
    constexpr double kLog2E = 1.442695040888963407360;
    const double y = x - 1.0;
    double sum = 0.0;
#pragma unroll
    for (int k = 12; k > 0; --k) sum = 1.0 / k - y * sum;
    return static_cast<float>(sum * y * kLog2E);
}

// Whether a block is cast, by the bits of its largest and least magnitude. Infinities and NaNs are beyond 1.
__device__ __forceinline__ bool is_cast(uint32_t amax, uint32_t amin) {
    constexpr uint32_t kOne = 0x3f80;
    return amax < kOne && amin < amax;
}

// Where the logarithms of a block lie; anything if it is not cast.
struct Grid {
    float log_amin, step;

    __device__ __forceinline__ Grid(uint32_t amax, uint32_t amin) {
        constexpr float kMaxLogRange = 32.0f;
        const float log_amax = log2_of(amax, true);
        log_amin = fmaxf(log2_of(amin, true), __fadd_rn(log_amax, -kMaxLogRange));
        step = __fdiv_rn(__fadd_rn(log_amax, -log_amin), kMaxCode - 1.0f);
    }
};

// Codes of a block that is cast.
struct Encoder {
    float step_inv, shift;
    bool is_scaled;  // else what is subnormal has code 0, with its logarithm or another one below -126

    __device__ __forceinline__ explicit Encoder(const Grid& grid) : is_scaled(grid.log_amin < -124.0f) {
        step_inv = __fdiv_rn(1.0f, grid.step);
        const float middle = __fmul_rn(__fadd_rn(1.0f, exp2_of_step(grid.step)), 0.5f);
        const float rounding = __fadd_rn(2.0f, -__fmul_rn(log2_near_one(middle), step_inv));
        shift = __fadd_rn(rounding, -__fmul_rn(grid.log_amin, step_inv));
    }

    __device__ __forceinline__ uint32_t code(uint32_t magnitude) const {
        const float position = __fadd_rn(__fmul_rn(log2_of(magnitude, is_scaled), step_inv), shift);
        return static_cast<uint32_t>(fminf(fmaxf(position, 0.0f), kMaxCode));
    }
};

// A code of a block that is cast, less 1: how many steps above the least magnitude it is. Negative for 0.
__device__ __forceinline__ float steps_of(uint32_t code) {
    return __fadd_rn(__uint_as_float(0x4b000000 | code), -0x1.000002p23f);  // the first number is 2^23 + code
}
__device__ __forceinline__ float exponent_of(float steps, const Grid& grid) {
    return __fadd_rn(__fmul_rn(steps, grid.step), grid.log_amin);
}
// The magnitude for the power that belongs to it, which is the upper half of a float32.
__device__ __forceinline__ uint32_t magnitude_of(float steps, float power) {
    return steps < 0.0f ? 0 : ptx::cvt_rn_bf16x2_f32(0.0f, power);
}

// Powers by the rough instruction; the exact ones where a bfloat16 may depend on it.
__device__ __forceinline__ float rough_power(float steps, const Grid& grid) {
    return ptx::ex2_approx_ftz(exponent_of(steps, grid));
}
__device__ __noinline__ static float exact_power(float steps, Grid grid) {
    return static_cast<float>(exp2(static_cast<double>(exponent_of(steps, grid))));
}
// How far a power lies from where the bfloat16 changes, modulo the distance of these places: for the rough
// one, which is off by 2^-22 of itself or 4 units of its last place, and by half a unit more from the exact
// one as float32, the bfloat16 is sure outside of a window.
constexpr uint32_t kSlack = 5;
__device__ __forceinline__ uint32_t margin_of(float power) {
    return (__float_as_uint(power) - (0x8000 - kSlack)) << 16;
}
__device__ __forceinline__ bool is_sure(uint32_t margin) { return margin > 2 * kSlack << 16; }
// Whether powers of a block may be subnormal, for which the instruction has 0. That of code 0 does not count.
__device__ __forceinline__ bool may_be_subnormal(const Grid& grid) { return grid.log_amin < -126.0f; }

}  // namespace ep::logfmt

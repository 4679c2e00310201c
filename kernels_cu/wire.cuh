// How rows travel in the low-latency combine: as bfloat16, as FP8 with a scale factor for every 128 channels,
// or as LogFMT-10. One kind of knowledge: what a lane holds of a piece of 512 channels, and where it lies in
// a slot.
//
// bfloat16   lane l holds vectors l and 32 + l of the piece, which lie as in the row.
// others     lane l holds the neighbours 2l and 2l + 1, so that 8 lanes share a block of 128 channels. A slot
//            has the blocks and, behind them, 4 bytes for each. FP8: blocks of 128 bytes; the scale factor.
//            LogFMT: of 256 bytes, of which 128 hold bits 0-7 of the codes and 32 bits 8 and 9, or all of
//            them the block as it was where it is not cast; amax and amin.
//
// LogFMT as ep_rt/reference/logfmt.py states it: float32 arithmetic, every step rounded by itself, logarithms
// and powers the float32 nearest to the exact value, hence the double ones here.
#pragma once
#include "fp8.cuh"
#include "low_latency.cuh"

namespace ep::wire {

enum Wire : int { kBfloat16 = 0, kFp8 = 1, kLogFmt = 2 };

template <int kWire>
constexpr int kChannelBytes = kWire == kFp8 ? 1 : 2;  // that a slot has for each channel
template <int kWire>
constexpr int kBlockBytes = kChannelBytes<kWire> * fp8::kChannelsPerScale;
constexpr int kNumChannels = 8;  // of a vector
using Channels = float[kNumChannels];

// Which vector of a row a lane holds as its v-th one.
template <int kWire>
__device__ __forceinline__ int32_t vector_of(int32_t piece, int32_t lane, int32_t v) {
    return piece * low_latency::kPieceVectors + (kWire == kBfloat16 ? v * kWarpSize + lane : 2 * lane + v);
}

// Bytes from the start of a slot that a row takes; bytes of a slot, whose twin is plan.slot_bytes.
template <int kWire>
__host__ __device__ constexpr int64_t row_bytes(int64_t hidden) {
    const int64_t num_blocks = kWire == kBfloat16 ? 0 : hidden / fp8::kChannelsPerScale;
    return kChannelBytes<kWire> * hidden + 4 * num_blocks;
}
__host__ __device__ constexpr int64_t slot_bytes(int64_t hidden) {
    const int64_t num_blocks = (hidden + fp8::kChannelsPerScale - 1) / fp8::kChannelsPerScale;
    return align_up<int64_t>(2 * hidden + 4 * num_blocks, 16);
}

__device__ __noinline__ static float nearest_log2(float value) {
    return static_cast<float>(log2(static_cast<double>(value)));
}
__device__ __noinline__ static float nearest_exp2(float value) {
    return static_cast<float>(exp2(static_cast<double>(value)));
}
__device__ __forceinline__ float bfloat16_value(uint32_t half) { return __uint_as_float(half << 16); }
__device__ __forceinline__ uint32_t bfloat16_at(const uint4& vector, int i) {
    return rows::word_of(vector, i / 2) >> (16 * (i % 2)) & 0xffff;
}

// The grid of the logarithms of a block; false where the block is not cast. From amax and amin as bfloat16.
__device__ __forceinline__ bool logfmt_grid(uint32_t amax, uint32_t amin, float& log_amin, float& step) {
    constexpr float kMaxLogRange = 32.0f, kNumSteps = 510.0f;
    const float log_amax = nearest_log2(bfloat16_value(amax));
    log_amin = fmaxf(nearest_log2(bfloat16_value(amin)), __fadd_rn(log_amax, -kMaxLogRange));
    step = __fdiv_rn(__fadd_rn(log_amax, -log_amin), kNumSteps);
    return log_amax < 0.0f && log_amin < log_amax;
}

// The largest and the least of the lanes that share a block.
__device__ __forceinline__ void extremes(const uint4 (&from)[2], uint32_t& amax, uint32_t& amin) {
    amax = 0;
    amin = 0x7fff;
#pragma unroll
    for (int i = 0; i < 2 * kNumChannels; ++i) {
        const uint32_t magnitude = bfloat16_at(from[i / kNumChannels], i % kNumChannels) & 0x7fff;
        amax = max(amax, magnitude);
        amin = min(amin, magnitude);
    }
#pragma unroll
    for (int shift = fp8::kLanesPerPair / 2; shift > 0; shift /= 2) {
        amax = max(amax, __shfl_xor_sync(kFullWarp, amax, shift));
        amin = min(amin, __shfl_xor_sync(kFullWarp, amin, shift));
    }
}

// Stores a lane's part of a piece into a slot, as a warp; lanes past the end of the row store nothing.
template <int kWire>
__device__ __forceinline__ void store(uint8_t* slot, int32_t hidden, int32_t piece, int32_t lane,
                                      const uint4 (&from)[2]) {
    static_assert(kWire != kBfloat16);
    const int32_t vector = vector_of<kWire>(piece, lane, 0);
    const bool is_there = vector < hidden / kNumChannels, is_first = lane % fp8::kLanesPerPair == 0;
    const int32_t block = vector / (2 * fp8::kLanesPerPair), part = lane % fp8::kLanesPerPair;
    uint8_t* at = slot + int64_t{block} * kBlockBytes<kWire>;
    auto* side = reinterpret_cast<uint32_t*>(slot + int64_t{hidden} * kChannelBytes<kWire>) + block;
    if constexpr (kWire == kFp8) {
        float factor;
        const uint4 cast = fp8::cast_pair(from, false, factor);
        if (!is_there) return;
        reinterpret_cast<uint4*>(at)[part] = cast;
        if (is_first) *side = __float_as_uint(factor);
    } else {
        uint32_t amax, amin;
        extremes(from, amax, amin);
        if (!is_there) return;
        if (is_first) *side = amax | amin << 16;
        float log_amin, step;
        if (!logfmt_grid(amax, amin, log_amin, step)) {
            reinterpret_cast<uint4*>(at)[2 * part] = from[0];
            reinterpret_cast<uint4*>(at)[2 * part + 1] = from[1];
            return;
        }
        const float step_inv = __fdiv_rn(1.0f, step);
        const float middle = __fmul_rn(__fadd_rn(1.0f, nearest_exp2(step)), 0.5f);
        const float rounding = __fadd_rn(2.0f, -__fmul_rn(nearest_log2(middle), step_inv));
        const float shift = __fadd_rn(rounding, -__fmul_rn(log_amin, step_inv));
        uint32_t low[4] = {0, 0, 0, 0}, high = 0;
#pragma unroll
        for (int i = 0; i < 2 * kNumChannels; ++i) {
            const uint32_t bits = bfloat16_at(from[i / kNumChannels], i % kNumChannels);
            const float position =
                __fadd_rn(__fmul_rn(nearest_log2(bfloat16_value(bits & 0x7fff)), step_inv), shift);
            const float code = fminf(floorf(fmaxf(position, 0.0f)), 511.0f);
            const uint32_t word = static_cast<uint32_t>(code) | (bits >> 15) << 9;
            low[i / 4] |= (word & 0xff) << (8 * (i % 4));
            high |= (word >> 8) << (2 * i);
        }
        reinterpret_cast<uint4*>(at)[part] = make_uint4(low[0], low[1], low[2], low[3]);
        reinterpret_cast<uint32_t*>(at + fp8::kChannelsPerScale)[part] = high;
    }
}

// A lane's part of a piece, as it lies in a slot.
struct Parcel {
    uint4 vectors[2];
    uint32_t high, side;
};

// Loads it; zero past the end of the row.
template <int kWire>
__device__ __forceinline__ Parcel load(const uint8_t* slot, int32_t hidden, int32_t piece, int32_t lane) {
    Parcel parcel{{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}, 0, 0};
    const int32_t vector = vector_of<kWire>(piece, lane, 0);
    if constexpr (kWire == kBfloat16) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int32_t i = vector_of<kWire>(piece, lane, v);
            if (i < hidden / kNumChannels) parcel.vectors[v] = reinterpret_cast<const uint4*>(slot)[i];
        }
    } else if (vector < hidden / kNumChannels) {
        const int32_t block = vector / (2 * fp8::kLanesPerPair), part = lane % fp8::kLanesPerPair;
        const uint8_t* at = slot + int64_t{block} * kBlockBytes<kWire>;
        parcel.side = reinterpret_cast<const uint32_t*>(slot + int64_t{hidden} * kChannelBytes<kWire>)[block];
        float log_amin, step;
        if (kWire == kFp8 || logfmt_grid(parcel.side & 0xffff, parcel.side >> 16, log_amin, step)) {
            parcel.vectors[0] = reinterpret_cast<const uint4*>(at)[part];
            if (kWire == kLogFmt)
                parcel.high = reinterpret_cast<const uint32_t*>(at + fp8::kChannelsPerScale)[part];
        } else {
            parcel.vectors[0] = reinterpret_cast<const uint4*>(at)[2 * part];
            parcel.vectors[1] = reinterpret_cast<const uint4*>(at)[2 * part + 1];
        }
    }
    return parcel;
}

// What it stands for, in float32.
template <int kWire>
__device__ __forceinline__ void decode(const Parcel& parcel, Channels (&to)[2]) {
    float log_amin = 0.0f, step = 1.0f;
    bool is_cast = false;
    if constexpr (kWire == kLogFmt)
        is_cast = logfmt_grid(parcel.side & 0xffff, parcel.side >> 16, log_amin, step);
#pragma unroll
    for (int i = 0; i < 2 * kNumChannels; ++i) {
        float& value = to[i / kNumChannels][i % kNumChannels];
        if constexpr (kWire == kFp8) {
            const uint32_t byte = rows::word_of(parcel.vectors[0], i / 4) >> (8 * (i % 4)) & 0xff;
            value = __fmul_rn(__uint_as_float(fp8::float_bits_of(byte)), __uint_as_float(parcel.side));
        } else if (is_cast) {
            const uint32_t high = parcel.high >> (2 * i) & 3;
            const uint32_t code =
                (rows::word_of(parcel.vectors[0], i / 4) >> (8 * (i % 4)) & 0xff) | (high & 1) << 8;
            const float exponent = __fadd_rn(__fmul_rn(static_cast<float>(code) - 1.0f, step), log_amin);
            const float magnitude = code == 0 ? 0.0f : nearest_exp2(exponent);
            const uint32_t half = ptx::cvt_rn_bf16x2_f32(magnitude, 0.0f) & 0xffff;
            value = bfloat16_value(half | (high >> 1) << 15);
        } else {
            value = bfloat16_value(bfloat16_at(parcel.vectors[i / kNumChannels], i % kNumChannels));
        }
    }
}

}  // namespace ep::wire

// How rows travel in the low-latency combine: as bfloat16, as FP8 with a scale factor for every 128 channels,
// or as LogFMT-10. One kind of knowledge: what a lane holds of a piece of 512 channels, and where it lies in
// a slot.
//
// bfloat16   lane l holds vectors l and 32 + l of the piece, which lie as in the row.
// others     lane l holds the neighbours 2l and 2l + 1, so that 8 lanes share a block of 128 channels. A slot
//            has the blocks and, behind them, 4 bytes for each. FP8: blocks of 128 bytes; the scale factor.
//            LogFMT: of 256 bytes, of which 128 hold bits 0-7 of the codes and 32 bits 8 and 9, or all of
//            them the block as it was where it is not cast; amax and amin.
#pragma once
#include "fp8.cuh"
#include "logfmt.cuh"
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

__device__ __forceinline__ uint32_t bfloat16_at(const uint4& vector, int i) {
    return rows::word_of(vector, i / 2) >> (16 * (i % 2)) & 0xffff;
}

__device__ __forceinline__ uint32_t byte_at(const uint4& vector, int i) {
    return rows::word_of(vector, i / 4) >> (8 * (i % 4)) & 0xff;
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

// Of a lane's part of a piece, in the slot of a row, which has blocks.
template <int kWire, class Byte>
struct Place {
    bool is_there;  // within the row
    int32_t part;   // which lane of the block
    Byte* block;
    Byte* side;  // what belongs to the block as a whole

    __device__ __forceinline__ Place(Byte* slot, int32_t hidden, int32_t piece, int32_t lane) {
        const int32_t vector = vector_of<kWire>(piece, lane, 0), number = vector / (2 * fp8::kLanesPerPair);
        is_there = vector < hidden / kNumChannels;
        part = lane % fp8::kLanesPerPair;
        block = slot + int64_t{number} * kBlockBytes<kWire>;
        side = slot + int64_t{hidden} * kChannelBytes<kWire> + int64_t{4} * number;
    }
};

// Out of line: it is long, and rows are stored from several places.
__device__ __noinline__ static void store_logfmt(uint8_t* slot, int32_t hidden, int32_t piece, int32_t lane,
                                                 uint4 first, uint4 second) {
    const Place<kLogFmt, uint8_t> at(slot, hidden, piece, lane);
    const uint4 from[2] = {first, second};
    uint32_t amax, amin;
    extremes(from, amax, amin);
    if (!at.is_there) return;
    if (at.part == 0) *reinterpret_cast<uint32_t*>(at.side) = amax | amin << 16;
    if (!logfmt::is_cast(amax, amin)) {
        reinterpret_cast<uint4*>(at.block)[2 * at.part] = first;
        reinterpret_cast<uint4*>(at.block)[2 * at.part + 1] = second;
        return;
    }
    const logfmt::Encoder encoder(logfmt::Grid(amax, amin));
    uint32_t low[4] = {0, 0, 0, 0}, high = 0;
#pragma unroll
    for (int i = 0; i < 2 * kNumChannels; ++i) {
        const uint32_t bits = bfloat16_at(from[i / kNumChannels], i % kNumChannels);
        const uint32_t code = encoder.code(bits & 0x7fff);
        low[i / 4] |= (code & 0xff) << (8 * (i % 4));
        high |= (code >> 8 | (bits >> 15) << 1) << (2 * i);
    }
    reinterpret_cast<uint4*>(at.block)[at.part] = make_uint4(low[0], low[1], low[2], low[3]);
    reinterpret_cast<uint32_t*>(at.block + fp8::kChannelsPerScale)[at.part] = high;
}

// Stores a lane's part of a piece into a slot, as a warp; lanes past the end of the row store nothing.
template <int kWire>
__device__ __forceinline__ void store(uint8_t* slot, int32_t hidden, int32_t piece, int32_t lane,
                                      const uint4 (&from)[2]) {
    static_assert(kWire != kBfloat16);
    if constexpr (kWire == kFp8) {
        const Place<kWire, uint8_t> at(slot, hidden, piece, lane);
        float factor;
        const uint4 cast = fp8::cast_pair(from, false, factor);
        if (!at.is_there) return;
        reinterpret_cast<uint4*>(at.block)[at.part] = cast;
        if (at.part == 0) *reinterpret_cast<uint32_t*>(at.side) = __float_as_uint(factor);
    } else {
        store_logfmt(slot, hidden, piece, lane, from[0], from[1]);
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
    if constexpr (kWire == kBfloat16) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int32_t i = vector_of<kWire>(piece, lane, v);
            if (i < hidden / kNumChannels) parcel.vectors[v] = reinterpret_cast<const uint4*>(slot)[i];
        }
    } else if (const Place<kWire, const uint8_t> at(slot, hidden, piece, lane); at.is_there) {
        parcel.side = *reinterpret_cast<const uint32_t*>(at.side);
        parcel.vectors[0] = reinterpret_cast<const uint4*>(at.block)[at.part];
        if constexpr (kWire == kLogFmt) {
            parcel.high = reinterpret_cast<const uint32_t*>(at.block + fp8::kChannelsPerScale)[at.part];
            if (!logfmt::is_cast(parcel.side & 0xffff, parcel.side >> 16)) {
                parcel.vectors[0] = reinterpret_cast<const uint4*>(at.block)[2 * at.part];
                parcel.vectors[1] = reinterpret_cast<const uint4*>(at.block)[2 * at.part + 1];
            }
        }
    }
    return parcel;
}

// Of a parcel in LogFMT that is cast: how many steps above the least magnitude an element is, and its value.
__device__ __forceinline__ float steps_at(const Parcel& parcel, int i) {
    return logfmt::steps_of(byte_at(parcel.vectors[0], i) | (parcel.high >> (2 * i) & 1) << 8);
}
__device__ __forceinline__ float signed_value(const Parcel& parcel, int i, float steps, float power) {
    return __uint_as_float(logfmt::magnitude_of(steps, power) | (parcel.high >> (2 * i + 1) & 1) << 31);
}

// Decodes one where rough powers do not do. Out of line and not unrolled: it is rare.
struct Decoded {
    float values[2 * kNumChannels];
};
__device__ __noinline__ static Decoded decode_exactly(const Parcel parcel, const logfmt::Grid grid) {
    Decoded decoded;
#pragma unroll 1
    for (int i = 0; i < 2 * kNumChannels; ++i) {
        const float steps = steps_at(parcel, i);
        float power = logfmt::rough_power(steps, grid);
        if (logfmt::may_be_subnormal(grid) || !logfmt::is_sure(logfmt::margin_of(power)))
            power = logfmt::exact_power(steps, grid);
        decoded.values[i] = signed_value(parcel, i, steps, power);
    }
    return decoded;
}

// What it stands for, in float32.
template <int kWire>
__device__ __forceinline__ void decode(const Parcel& parcel, Channels (&to)[2]) {
    const auto value = [&](int i) -> float& { return to[i / kNumChannels][i % kNumChannels]; };
    if constexpr (kWire == kFp8) {
#pragma unroll
        for (int i = 0; i < 2 * kNumChannels; ++i)
            value(i) = __fmul_rn(fp8::value_of(byte_at(parcel.vectors[0], i)), __uint_as_float(parcel.side));
        return;
    }
    const uint32_t amax = parcel.side & 0xffff, amin = parcel.side >> 16;
    if (kWire == kBfloat16 || !logfmt::is_cast(amax, amin)) {
#pragma unroll
        for (int i = 0; i < 2 * kNumChannels; ++i)
            value(i) =
                logfmt::bfloat16_value(bfloat16_at(parcel.vectors[i / kNumChannels], i % kNumChannels));
        return;
    }
    const logfmt::Grid grid(amax, amin);
    uint32_t least_margin = logfmt::may_be_subnormal(grid) ? 0 : ~0u;
#pragma unroll
    for (int i = 0; i < 2 * kNumChannels; ++i) {
        const float steps = steps_at(parcel, i), power = logfmt::rough_power(steps, grid);
        least_margin = min(least_margin, logfmt::margin_of(power));
        value(i) = signed_value(parcel, i, steps, power);
    }
    if (logfmt::is_sure(least_margin)) return;
    const Decoded decoded = decode_exactly(parcel, grid);
#pragma unroll
    for (int i = 0; i < 2 * kNumChannels; ++i) value(i) = decoded.values[i];
}

}  // namespace ep::wire

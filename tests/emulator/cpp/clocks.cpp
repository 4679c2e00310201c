#include "clocks.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace emu {
namespace {

constexpr size_t kHeapBytes = 6ull << 30;
constexpr size_t kKeptBytes = 64ull << 20;  // stay mapped between runs

uint8_t *heap, *top;

void* take(size_t num_bytes) {
    uint8_t* taken = top;
    top += align_up(num_bytes, 16);
    if (top > heap + kHeapBytes) fail("limit", "the vector clocks of a run do not fit");
    return taken;
}

Chunk zero_chunk;

}  // namespace

int num_chunks, chunk_size;
Clock zero_clock;

void open_clocks(int chunks, int size) {
    if (heap == nullptr) heap = reserve(kHeapBytes);
    num_chunks = chunks;
    chunk_size = size;
    reset_clocks();
}

void reset_clocks() {
    if (top > heap + kKeptBytes) give_back(heap + kKeptBytes, top - heap - kKeptBytes);
    top = heap;
    auto* chunk = static_cast<uint32_t*>(take(chunk_size * sizeof(uint32_t)));
    memset(chunk, 0, chunk_size * sizeof(uint32_t));
    zero_chunk = chunk;
    auto* clock = static_cast<Chunk*>(take(num_chunks * sizeof(Chunk)));
    std::fill_n(clock, num_chunks, zero_chunk);
    zero_clock = clock;
}

Chunk* copy_of(Clock clock) {
    auto* copy = static_cast<Chunk*>(take(num_chunks * sizeof(Chunk)));
    memcpy(copy, clock, num_chunks * sizeof(Chunk));
    return copy;
}

uint32_t* copy_of_chunk(Chunk chunk) {
    auto* copy = static_cast<uint32_t*>(take(chunk_size * sizeof(uint32_t)));
    memcpy(copy, chunk, chunk_size * sizeof(uint32_t));
    return copy;
}

Clock with(Clock clock, uint32_t agent, uint32_t value) {
    if (clock_of(clock, agent) >= value) return clock;
    Chunk* changed = copy_of(clock);
    uint32_t* chunk = copy_of_chunk(clock[agent / chunk_size]);
    chunk[agent % chunk_size] = value;
    changed[agent / chunk_size] = chunk;
    return changed;
}

Clock join(Clock a, Clock b, int first, int last) {
    if (b == nullptr || a == b) return a;
    if (a == nullptr) a = zero_clock;
    if (last < 0) last = num_chunks;
    Chunk* joined = nullptr;
    for (int i = first; i < last; ++i) {
        const Chunk mine = a[i], other = b[i];
        if (mine == other || other == zero_chunk) continue;
        bool is_above = false, is_below = false;
        for (int k = 0; k < chunk_size; ++k) {
            is_above |= other[k] > mine[k];
            is_below |= other[k] < mine[k];
        }
        if (!is_above) continue;
        if (joined == nullptr) joined = copy_of(a);
        if (!is_below) {
            joined[i] = other;
            continue;
        }
        uint32_t* chunk = copy_of_chunk(mine);
        for (int k = 0; k < chunk_size; ++k) chunk[k] = std::max(chunk[k], other[k]);
        joined[i] = chunk;
    }
    return joined != nullptr ? joined : a;
}

void learn(Knowledge& mine, const Knowledge& other) { learn(mine, other, 0, -1); }

void learn(Knowledge& mine, const Knowledge& other, int first, int last) {
    mine.happened = join(mine.happened, other.happened);
    mine.fenced = join(mine.fenced, other.fenced, first, last);
    mine.fenced_shared = join(mine.fenced_shared, other.fenced_shared, first, last);
}

}  // namespace emu

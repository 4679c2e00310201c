// Vector clocks: what a thread knows of every other. One chunk of clocks per block, immutable and shared, so
// that most joins compare pointers. Memory is taken from one heap and given back as a whole, run by run.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

using Chunk = const uint32_t*;
using Clock = const Chunk*;

extern int num_chunks, chunk_size;
extern Clock zero_clock;

void open_clocks(int chunks, int size);
void reset_clocks();

inline uint32_t clock_of(Clock clock, uint32_t agent) {
    return clock[agent / chunk_size][agent % chunk_size];
}
Clock with(Clock clock, uint32_t agent, uint32_t value);
// The chunks [first, last) of `b` joined into `a`.
Clock join(Clock a, Clock b, int first = 0, int last = -1);
Chunk* copy_of(Clock clock);
uint32_t* copy_of_chunk(Chunk chunk);

// What has happened before, and which of it a proxy fence has covered on the way: for all memory, and for the
// shared memory of a block.
struct Knowledge {
    Clock happened = nullptr, fenced = nullptr, fenced_shared = nullptr;

    explicit operator bool() const { return happened != nullptr; }
};
void learn(Knowledge& mine, const Knowledge& other);
// The same, but proxy fences count only for the chunks [first, last).
void learn(Knowledge& mine, const Knowledge& other, int first, int last);

}  // namespace emu

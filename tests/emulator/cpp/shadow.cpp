// What is known of every 4 bytes: who wrote them last, who has read them since, and to which piece they
// belong. An access that conflicts with one that did not happen before it is a race; one that did, but in
// another proxy and without a proxy fence between them, misses the fence.
#include <algorithm>

#include "memory.h"

namespace emu {
namespace {

constexpr size_t kCellBytes = 4, kCells = kArenaBytes / kCellBytes;
constexpr uint64_t kPieceAlign = 512;  // what cudaMalloc and CuPy's pool give

struct Access {
    uint32_t agent, clock, pc;
    uint8_t bytes;  // of the cell, one bit each
    Scope scope;
    bool is_async;
};
struct Cell {
    uint32_t run;
    uint8_t num_reads;
    bool has_write;
    int more_reads;  // in `overflow`; -1: none
    Access write, reads[2];
};
Cell* cells;
std::vector<std::vector<Access>> overflow;
size_t overflow_used;

struct Piece {
    uint8_t* address;
    uint64_t num_bytes;
    int rank, kind;
};
std::vector<Piece> pieces;  // 0 stands for what was not allocated
uint16_t* piece_of_cell;
uint8_t* next_piece;
std::vector<uint8_t> saved;

const char* name_of(bool is_write, bool is_async, Scope scope) {
    static const char* const writes[] = {"ordinary store", "store.cta", "store.gpu", "store.sys"};
    static const char* const reads[] = {"ordinary load", "load.cta", "load.gpu", "load.sys"};
    if (is_async) return is_write ? "copy writes" : "copy reads";
    return (is_write ? writes : reads)[static_cast<int>(scope)];
}

bool covers(Scope scope, uint32_t a, uint32_t b) {
    if (scope == Scope::kSys) return true;
    if (scope == Scope::kCta) return slot_of(a) == slot_of(b);
    return scope == Scope::kGpu && rank_of(a) == rank_of(b);
}

EmuAccess described(const Access& access, bool is_write) {
    return access_of(access.agent, access.pc, name_of(is_write, access.is_async, access.scope));
}
EmuAccess described(const Accessor& who, bool is_write) {
    return access_of(who.agent, who.pc, name_of(is_write, who.is_async, who.scope));
}

void compare(const Accessor& who, bool is_write, const Access& other, bool other_is_write,
             const uint8_t* address) {
    if (!options.finds_races) return;
    const bool is_own = !who.is_async && other.agent == who.agent;
    if (is_own && !other.is_async) return;
    if (is_own || clock_of(who.known->happened, other.agent) >= other.clock) {
        const Clock fenced = is_shared(address) ? who.known->fenced_shared : who.known->fenced;
        if (who.is_async != other.is_async && clock_of(fenced, other.agent) < other.clock)
            fail("proxy", "no proxy fence between two accesses", described(other, other_is_write),
                 described(who, is_write), address);
        return;
    }
    const bool are_strong = other.scope != Scope::kWeak && who.scope != Scope::kWeak;
    if (are_strong && covers(other.scope, other.agent, who.agent) &&
        covers(who.scope, other.agent, who.agent))
        return;
    fail("race", "race", described(other, other_is_write), described(who, is_write), address);
}

void note_read(Cell& cell, const Accessor& who, const Access& mine) {
    const auto replaces = [&](const Access& read) {
        return read.bytes == mine.bytes && read.scope == mine.scope && read.is_async == mine.is_async &&
               (read.agent == mine.agent || clock_of(who.known->happened, read.agent) >= read.clock);
    };
    for (int i = 0; i < cell.num_reads; ++i) {
        if (!replaces(cell.reads[i])) continue;
        cell.reads[i] = mine;
        return;
    }
    if (cell.num_reads < 2) {
        cell.reads[cell.num_reads++] = mine;
        return;
    }
    if (cell.more_reads < 0) {
        if (overflow_used == overflow.size()) overflow.emplace_back();
        cell.more_reads = static_cast<int>(overflow_used++);
        overflow[cell.more_reads].clear();
    }
    auto& more = overflow[cell.more_reads];
    const auto found = std::find_if(more.begin(), more.end(), replaces);
    if (found != more.end())
        *found = mine;
    else
        more.push_back(mine);
}

void note_write(Cell& cell, const Accessor& who, const Access& mine, const uint8_t* address) {
    for (int i = 0; i < cell.num_reads; ++i)
        if (cell.reads[i].bytes & mine.bytes) compare(who, true, cell.reads[i], false, address);
    if (cell.more_reads >= 0) {
        for (const Access& read : overflow[cell.more_reads])
            if (read.bytes & mine.bytes) compare(who, true, read, false, address);
        overflow[cell.more_reads].clear();
    }
    cell.num_reads = 0;
    cell.write = mine;
    cell.has_write = true;
}

// Whether `who` may touch the cell at all.
void check_place(const Accessor& who, size_t cell, const uint8_t* address, bool is_write) {
    const auto outside = [&](const char* text) {
        fail("bounds", text, described(who, is_write), {}, address);
    };
    const int rank = rank_of(who.agent);
    if (is_shared(address)) {
        const size_t offset = address - shared_base;
        const auto slot = static_cast<size_t>(slot_of(who.agent));
        if (offset / geometry.shared_bytes != slot) outside("shared memory of another block");
        if (offset % geometry.shared_bytes >= slots[slot].shared_used)
            outside("beyond the shared memory of the block");
        return;
    }
    const Piece& piece = pieces[piece_of_cell[cell]];
    if (piece.address == nullptr) outside("memory that was not allocated");
    const bool is_mapped = piece.kind != kOwn && node_of(piece.rank) == node_of(rank);
    if (piece.rank != rank && !is_mapped && !who.is_network) outside("memory of another rank");
    if (who.is_network && piece.kind != kSymmetric && piece.rank != rank)
        outside("memory outside of the symmetric heap");
}

}  // namespace

Accessor accessor(Fiber* fiber, Scope scope, uint32_t pc) {
    return {fiber->agent, fiber->clock, &fiber->known, false, false, scope, pc};
}

void check(const Accessor& who, const uint8_t* address, uint64_t num_bytes, bool is_write) {
    if (num_bytes == 0) return;
    if (!is_device(address) || !is_device(address + num_bytes - 1))
        fail("bounds", "not device memory", described(who, is_write), {}, address);
    const size_t begin = address - arena, end = begin + num_bytes;
    for (size_t number = begin / kCellBytes; number * kCellBytes < end; ++number) {
        const size_t at = number * kCellBytes;
        const uint8_t* here = arena + std::max(at, begin);
        check_place(who, number, here, is_write);
        const unsigned first = at < begin ? begin - at : 0;
        const unsigned last = at + kCellBytes > end ? end - at : kCellBytes;
        const auto bytes = static_cast<uint8_t>(((1u << last) - 1) & ~((1u << first) - 1));
        Cell& cell = cells[number];
        if (cell.run != static_cast<uint32_t>(run_number)) {
            cell.run = static_cast<uint32_t>(run_number);
            cell.num_reads = 0;
            cell.has_write = false;
            cell.more_reads = -1;
        }
        if (cell.has_write && (cell.write.bytes & bytes))
            compare(who, is_write, cell.write, true, here);
        else if (!cell.has_write && !is_write && options.checks_uninitialised && is_shared(here))
            fail("uninit", "shared memory that nobody has written", {}, described(who, is_write), here);
        const Access mine{who.agent, who.clock, who.pc, bytes, who.scope, who.is_async};
        if (is_write)
            note_write(cell, who, mine, here);
        else
            note_read(cell, who, mine);
    }
}

void begin_shared(int slot) {
    constexpr uint8_t kUnwritten = 0xcd;
    uint8_t* block = shared_base + slot * geometry.shared_bytes;
    memset(block, kUnwritten, slots[slot].shared_used);
    Cell* first = cells + (block - arena) / kCellBytes;
    for (size_t i = 0; i < slots[slot].shared_used / kCellBytes; ++i) first[i].run = 0;
}

bool is_mapped_by_peers(const uint8_t* address) {
    return pieces[piece_of_cell[(address - arena) / kCellBytes]].kind != kOwn;
}

uint8_t* symmetric_address(const void* address, int from, int to) {
    if (!is_device(address) || is_shared(address)) return nullptr;
    const auto* byte = static_cast<const uint8_t*>(address);
    const Piece& piece = pieces[piece_of_cell[(byte - arena) / kCellBytes]];
    if (piece.kind != kSymmetric || piece.rank != from) return nullptr;
    // Every rank has allocated the same pieces of the heap in the same order.
    int number = 0;
    for (const Piece& each : pieces) {
        if (each.kind != kSymmetric || each.rank != from) continue;
        if (each.address == piece.address) break;
        ++number;
    }
    for (const Piece& each : pieces)
        if (each.kind == kSymmetric && each.rank == to && number-- == 0)
            return each.address + (byte - piece.address);
    return nullptr;
}

void open_memory() {
    if (cells == nullptr) {
        reserve(kArenaBytes, arena);
        cells = reinterpret_cast<Cell*>(reserve(kCells * sizeof(Cell)));
        piece_of_cell = reinterpret_cast<uint16_t*>(reserve(kCells * sizeof(uint16_t)));
    }
    give_back(arena, kArenaBytes);
    give_back(reinterpret_cast<uint8_t*>(piece_of_cell), kCells * sizeof(uint16_t));
    pieces.assign(1, {});
    next_piece = arena + kPieceAlign;
    saved.clear();
    if (slots.size() * geometry.shared_bytes > kArenaBytes - kSharedOffset)
        fail("limit", "the shared memory of all blocks does not fit");
}

void reset_memory() {
    memcpy(arena, saved.data(), saved.size());
    overflow_used = 0;
}

}  // namespace emu

uint64_t emu_allocate(int32_t rank, uint64_t num_bytes, int32_t kind) {
    using namespace emu;
    uint8_t* address = next_piece;
    next_piece += align_up(num_bytes, kPieceAlign) + kPieceAlign;  // nothing lies between two pieces
    if (next_piece > shared_base || pieces.size() > 0xffff) return 0;
    std::fill_n(piece_of_cell + (address - arena) / kCellBytes, align_up(num_bytes, kCellBytes) / kCellBytes,
                static_cast<uint16_t>(pieces.size()));
    pieces.push_back({address, num_bytes, rank, kind});
    return reinterpret_cast<uint64_t>(address);
}

void emu_save() { emu::saved.assign(emu::arena, emu::next_piece); }

// What g++ calls for code that it compiled with -fsanitize=thread. No sanitiser is linked: these are ours.
//
// A hook comes before its access, and does not know the value of a store. Thread-local variables are the
// shared memory of the block that runs: objcopy lets the kernels call `emu_shared_address` for their places.
#include <link.h>

#include "memory.h"

namespace emu {
namespace {

struct Range {
    uintptr_t first, last;
};
std::vector<Range> images;

// Of a kernel's constants, and of its arguments, which are the host's.
bool is_constant(uintptr_t address) {
    for (const Range& range : images)
        if (address >= range.first && address < range.last) return true;
    return false;
}

void access(void* address, uint64_t num_bytes, bool is_write, Scope scope, const void* return_address) {
    if (current == nullptr) return;
    const uint32_t pc = caller_pc(return_address);
    if (is_device(address)) return ordinary_access(address, num_bytes, is_write, scope, pc);
    if (is_stack(address)) return;
    if (!is_write && is_constant(reinterpret_cast<uintptr_t>(address))) return;
    fail("bounds", is_write ? "a store outside of device memory" : "a load outside of device memory",
         access_of(current->agent, pc, is_write ? "ordinary store" : "ordinary load"), {}, address);
}

}  // namespace

void allow_reads(const void* first, size_t num_bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(first);
    images.push_back({begin, begin + num_bytes});
}

}  // namespace emu

using emu::Scope;

extern "C" {

struct TlsIndex {
    unsigned long module, offset;
};
void* emu_shared_address(const TlsIndex* index) {
    return emu::shared_base + emu::current->slot * emu::geometry.shared_bytes + index->offset;
}

void* emu_memcpy(void* destination, const void* source, unsigned long num_bytes) {
    emu::access(const_cast<void*>(source), num_bytes, false, Scope::kWeak, __builtin_return_address(0));
    emu::access(destination, num_bytes, true, Scope::kWeak, __builtin_return_address(0));
    emu::current->capture.address = nullptr;
    return memcpy(destination, source, num_bytes);
}
void* emu_memset(void* destination, int value, unsigned long num_bytes) {
    emu::access(destination, num_bytes, true, Scope::kWeak, __builtin_return_address(0));
    emu::current->capture.address = nullptr;
    return memset(destination, value, num_bytes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define EMU_HOOK(name, num_bytes, is_write, scope)                                     \
    void __tsan_##name##num_bytes(void* address) {                                     \
        emu::access(address, num_bytes, is_write, scope, __builtin_return_address(0)); \
    }
#define EMU_HOOKS(num_bytes)                                 \
    EMU_HOOK(read, num_bytes, false, Scope::kWeak)           \
    EMU_HOOK(write, num_bytes, true, Scope::kWeak)           \
    EMU_HOOK(unaligned_read, num_bytes, false, Scope::kWeak) \
    EMU_HOOK(unaligned_write, num_bytes, true, Scope::kWeak) \
    EMU_HOOK(volatile_read, num_bytes, false, Scope::kSys)   \
    EMU_HOOK(volatile_write, num_bytes, true, Scope::kSys)
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_read_range(void* address, unsigned long num_bytes) {
    emu::access(address, num_bytes, false, Scope::kWeak, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long num_bytes) {
    emu::access(address, num_bytes, true, Scope::kWeak, __builtin_return_address(0));
}
}

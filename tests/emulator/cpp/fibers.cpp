// Threads of a GPU as fibers of one thread of the host: a stack each, and a switch of six registers.
#include <sys/mman.h>

#include <cstdlib>

#include "memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr int kMaxFibers = 24576;
constexpr int kSavedRegisters = 6;

uint8_t *stacks, *spare_stack;
int num_stacks;
void* main_stack_pointer;

// The stack pointer from which a switch begins `function`, which does not return.
void* prepared(uint8_t* stack, void (*function)()) {
    auto** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // its return address
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    return top;
}

}  // namespace

std::vector<Fiber> fibers;
Fiber* current;
bool is_running;

void open_fibers(int num_fibers) {
    constexpr size_t kStride = kStackBytes + kGuardBytes;
    if (num_fibers > kMaxFibers) fail("limit", "more threads than there are stacks");
    if (stacks == nullptr) {
        stacks = reserve(kMaxFibers * kStride);
        spare_stack = reserve(kStackBytes);
        allow_reads(&threadIdx, sizeof(threadIdx));
        allow_reads(&blockIdx, sizeof(blockIdx));
        allow_reads(&blockDim, sizeof(blockDim));
        allow_reads(&gridDim, sizeof(gridDim));
    }
    for (; num_stacks < num_fibers; ++num_stacks)
        mprotect(stacks + num_stacks * kStride, kGuardBytes, PROT_NONE);
    fibers.clear();
    fibers.resize(num_fibers);
    for (int i = 0; i < num_fibers; ++i) {
        Fiber& fiber = fibers[i];
        fiber.id = i;
        fiber.slot = i / geometry.max_threads;
        fiber.rank = slots[fiber.slot].rank;
        fiber.thread = i % geometry.max_threads;
        fiber.agent = static_cast<uint32_t>(fiber.slot * chunk_size + fiber.thread);
        fiber.stack = stacks + i * kStride + kGuardBytes;
    }
}

bool is_stack(const void* address) {
    return static_cast<size_t>(static_cast<const uint8_t*>(address) - stacks) <
           kMaxFibers * (kStackBytes + kGuardBytes);
}

void prepare(Fiber& fiber) { fiber.stack_pointer = prepared(fiber.stack, run_thread); }

void leave_for(void* stack_pointer) {
    void* abandoned;
    emu_switch(&abandoned, stack_pointer);
    abort();
}

void continue_beside(void (*function)()) { leave_for(prepared(spare_stack, function)); }

void switch_from(void** save, void* to) { emu_switch(save, to); }

void enter(Fiber* fiber) {
    current = fiber;
    const Slot& slot = slots[fiber->slot];
    const Stream& stream = streams[fiber->stream];
    threadIdx = {static_cast<unsigned>(fiber->thread), 0, 0};
    blockIdx = {static_cast<unsigned>(slot.block), 0, 0};
    blockDim = {static_cast<unsigned>(slot.num_threads), 1, 1};
    gridDim = {static_cast<unsigned>(stream.launches[stream.next].num_blocks), 1, 1};
}

void start_run() {
    is_running = true;
    emu_switch(&main_stack_pointer, prepared(spare_stack, start_threads));
    is_running = false;
    current = nullptr;
}

void leave_run() { leave_for(main_stack_pointer); }

}  // namespace emu

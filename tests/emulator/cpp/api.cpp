// The runtime as Python drives it: opened for a geometry, loaded with kernels, then run from seeds.
#include "api.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "memory.h"

namespace emu {

EmuGeometry geometry;
EmuOptions options;
EmuResult result;
uint64_t run_number, now_ns;
int num_live;

namespace {

struct Library {
    void* handle;
    uintptr_t base;
    uint64_t shared_bytes;
};
std::vector<Library> libraries;
std::string load_error;

constexpr size_t kParameterBytes = 64ull << 20;
uint8_t* parameters;
size_t parameters_used;

// Where a library lies, and how much shared memory, its thread-local block, the kernels in it have.
int describe(dl_phdr_info* info, size_t, void* data) {
    auto& library = *static_cast<Library*>(data);
    if (info->dlpi_addr != library.base) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_TLS) library.shared_bytes = align_up(header.p_memsz, 128);
        if (header.p_type == PT_LOAD)
            allow_reads(reinterpret_cast<void*>(info->dlpi_addr + header.p_vaddr), header.p_memsz);
    }
    return 1;
}

void copy_text(char* to, size_t size, const std::string& text) { snprintf(to, size, "%s", text.c_str()); }

}  // namespace

uint8_t* reserve(size_t num_bytes, void* at) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at != nullptr ? MAP_FIXED_NOREPLACE : 0);
    void* pages = mmap(at, num_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return static_cast<uint8_t*>(pages);
}

void give_back(uint8_t* pages, size_t num_bytes) { madvise(pages, num_bytes, MADV_DONTNEED); }

uint32_t caller_pc(const void* return_address) {
    const uintptr_t base = libraries[slots[current->slot].library].base;
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - base);
}

EmuAccess access_of(uint32_t agent, uint32_t pc, const char* what) {
    const Slot& slot = slots[slot_of(agent)];
    const int thread = static_cast<int>(agent) % chunk_size;
    EmuAccess access{pc, slot.library, slot.rank, slot.block, thread < geometry.max_threads ? thread : -1,
                     {}};
    copy_text(access.what, sizeof(access.what), what);
    return access;
}

void fail(const char* kind, const std::string& text, const EmuAccess& first, const EmuAccess& second,
          const void* address) {
    copy_text(result.kind, sizeof(result.kind), kind);
    copy_text(result.text, sizeof(result.text), text);
    result.address = reinterpret_cast<uint64_t>(address);
    result.first = first;
    result.second = second;
    if (!is_running) {
        fprintf(stderr, "emulator: %s\n", text.c_str());
        abort();
    }
    leave_run();
}

}  // namespace emu

using namespace emu;

uint64_t emu_struct_bytes(int32_t which) {
    constexpr uint64_t kBytes[] = {sizeof(EmuGeometry), sizeof(EmuStream), sizeof(EmuOptions),
                                   sizeof(EmuAccess), sizeof(EmuResult)};
    return kBytes[which];
}

void emu_open(const EmuGeometry* wanted, const EmuStream* wanted_streams) {
    geometry = *wanted;
    slots.clear();
    streams.clear();
    for (int s = 0; s < geometry.num_streams; ++s) {
        Stream stream{};
        stream.rank = wanted_streams[s].rank;
        stream.first_slot = static_cast<int>(slots.size());
        stream.max_blocks = wanted_streams[s].max_blocks;
        streams.push_back(stream);
        for (int b = 0; b < stream.max_blocks; ++b) {
            slots.emplace_back();
            slots.back().rank = stream.rank;
        }
    }
    open_clocks(static_cast<int>(slots.size()), geometry.max_threads + kAsyncAgents);
    open_memory();
    open_fibers(static_cast<int>(slots.size()) * geometry.max_threads);
    if (parameters == nullptr) {
        parameters = reserve(kParameterBytes);
        allow_reads(parameters, kParameterBytes);
    }
    parameters_used = 0;
}

int32_t emu_load(const char* path) {
    Library library{dlopen(path, RTLD_NOW | RTLD_LOCAL), 0, 0};
    if (library.handle == nullptr) {
        load_error = dlerror();
        return -1;
    }
    link_map* map = nullptr;
    dlinfo(library.handle, RTLD_DI_LINKMAP, &map);
    library.base = map->l_addr;
    dl_iterate_phdr(describe, &library);
    libraries.push_back(library);
    return static_cast<int32_t>(libraries.size()) - 1;
}

const char* emu_load_error() { return load_error.c_str(); }
void* emu_entry(int32_t library, const char* name) { return dlsym(libraries[library].handle, name); }
uint64_t emu_shared_bytes(int32_t library) { return libraries[library].shared_bytes; }

void emu_enqueue_kernel(int32_t stream, int32_t library, void* entry, const void* args, uint64_t args_bytes,
                        int32_t num_blocks, int32_t num_threads) {
    Launch launch{Launch::kKernel};
    launch.library = library;
    launch.entry = reinterpret_cast<Entry>(entry);
    launch.args = parameters + parameters_used;
    memcpy(parameters + parameters_used, args, args_bytes);
    parameters_used += align_up(args_bytes, 64);
    launch.num_blocks = num_blocks;
    launch.num_threads = num_threads;
    streams[stream].launches.push_back(launch);
}

void emu_enqueue_copy(int32_t stream, uint64_t destination, uint64_t source, uint64_t num_bytes) {
    Launch launch{Launch::kCopy};
    launch.destination = reinterpret_cast<uint8_t*>(destination);
    launch.source = reinterpret_cast<uint8_t*>(source);
    launch.num_bytes = num_bytes;
    streams[stream].launches.push_back(launch);
}

void emu_enqueue_record(int32_t stream, int32_t event) {
    Launch launch{Launch::kRecord};
    launch.event = event;
    streams[stream].launches.push_back(launch);
}

void emu_enqueue_wait(int32_t stream, int32_t event) {
    Launch launch{Launch::kWait};
    launch.event = event;
    streams[stream].launches.push_back(launch);
}

void emu_run(const EmuOptions* wanted, EmuResult* found) {
    options = *wanted;
    result = {};
    ++run_number;
    now_ns = 1'000'000;
    random_numbers.state = options.seed * 0x9e3779b97f4a7c15ull + 12345;
    reset_clocks();
    reset_memory();
    reset_stores();
    reset_words();
    reset_bulk();
    reset_network();
    reset_streams();
    reset_schedule();
    start_run();
    result.virtual_ns = now_ns;
    *found = result;
}

// A network of one host: a remote transport of NVSHMEM for tests on machines without a network card.
//
// NVSHMEM's proxy thread brings every put and every signal of the device. They are carried out by the copy
// engines, through CUDA IPC mappings of the peers' symmetric memory; with NVSHMEM_DISABLE_P2P=1 no rank
// reaches a peer in another way.
//
// Order      what a put with a signal brings, its puts and then the signal, is a message and stays in order.
//            Messages are held back and overtake each other at random, as on a network with several ways,
//            unless a fence or a quiet stands between them. Never does one wait for later ones.
// Atomics    signals and atomics that set, add or increment; those are atomic among the transports of a host,
//            as with a network card, and not beside atomics of kernels.
// Interface  plugins of major version 3, which NVSHMEM 3.3 and 3.4 load. It takes the place of "ucx":
//            loaded before NVSHMEM starts, it is what that name finds.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace {

// ------------------------------------------------------------------ the CUDA driver, found at run time

using Address = unsigned long long;
struct IpcHandle {
    char reserved[64];
};

struct Cuda {
    int (*cuCtxGetCurrent)(void**);
    int (*cuCtxSetCurrent)(void*);
    int (*cuStreamCreate)(void**, unsigned flags);
    int (*cuStreamSynchronize)(void*);
    int (*cuMemcpyAsync)(Address to, Address from, size_t num_bytes, void* stream);
    int (*cuMemHostAlloc)(void**, size_t num_bytes, unsigned flags);
    int (*cuMemFreeHost)(void*);
    int (*cuMemGetAddressRange)(Address* base, size_t* num_bytes, Address);
    int (*cuIpcGetMemHandle)(IpcHandle*, Address);
    int (*cuIpcOpenMemHandle)(Address*, IpcHandle, unsigned flags);
    int (*cuIpcCloseMemHandle)(Address);
};
constexpr unsigned kNonBlocking = 1, kPortable = 1, kLazyPeerAccess = 1;

// ------------------------------------------------------------------ NVSHMEM's interface for plugins, version
// 3

constexpr int kFailed = 7, kUnsupported = 3;

struct MemoryHandle {
    char reserved[512];
};
struct RmaVerb {
    int kind, is_nbi, is_stream;
    void* stream;
};
struct RmaMemory {
    void* pointer;
    uint64_t offset;
    MemoryHandle* handle;
};
struct RmaBytes {
    size_t num_elements;
    int element_bytes;
    ptrdiff_t source_stride, destination_stride;
};
struct AtomicVerb {
    int kind, fetches, has_value, has_compare;
};
struct AtomicMemory {
    RmaMemory remote;
    uint64_t return_flag;
    void *return_pointer, *value_pointer, *compare_pointer;
    uint64_t value, compare;
    MemoryHandle* return_handle;
};
struct AtomicBytes {
    int type, element_bytes;
};
struct Plugin;
struct Operations {
    int (*can_reach_peer)(int* access, void* peer, Plugin*);
    int (*connect_endpoints)(Plugin*, int*, int);
    int (*get_mem_handle)(MemoryHandle*, void* memory, size_t num_bytes, Plugin*, bool is_local);
    int (*release_mem_handle)(MemoryHandle*, Plugin*);
    int (*finalize)(Plugin*);
    int (*show_info)(Plugin*, int);
    int (*progress)(Plugin*);
    int (*rma)(Plugin*, int peer, RmaVerb, RmaMemory* remote, RmaMemory* local, RmaBytes, int is_proxy);
    int (*amo)(Plugin*, int peer, void*, AtomicVerb, AtomicMemory*, AtomicBytes, int is_proxy);
    int (*fence)(Plugin*, int peer, int is_proxy);
    int (*quiet)(Plugin*, int peer, int is_proxy);
    int (*enforce_cst)(Plugin*);
    int (*enforce_cst_at_target)(Plugin*);
    int (*add_device_remote_mem_handles)(Plugin*, int stride, MemoryHandle*, uint64_t offset,
                                         size_t num_bytes);
};
struct Plugin {
    int version, type;
    int* capabilities;
    Operations operations;
    void *bootstrap, *state, *shared_state, *cache;
    char** device_paths;
    int attributes, num_devices;
    bool atomics_complete_on_quiet, is_initialized, has_no_proxy;
    void* heap;
    size_t log2_granularity;
    uint64_t max_bytes;
    uint32_t atomic_host_endian_min_bytes;
    int index, rank, num_ranks;
    void *aliases, *egm;
};
constexpr int kCpuWrite = 1 << 4, kCpuRead = 1 << 5, kCpuAtomics = 1 << 6, kIsConnected = 2;
enum Rma { kPut = 1, kPutValue = 2, kGet = 4, kGetValue = 5 };
enum Atomic { kIncrement = 2, kSet = 3, kAdd = 4, kSignal = 8, kSignalSet = 9, kSignalAdd = 10 };

// ------------------------------------------------------------------ state of a rank, under one lock

constexpr uint64_t kMagic = 0x6570727463706f6c;
constexpr size_t kMaxHeld = 16;  // messages; beyond, half of them leave
constexpr int kPatience = 64;    // looks without a new message, after which all leave
constexpr size_t kNumSlots =
    4096;  // values on their way: more than there are operations before they are awaited

// What a rank tells of a piece of its memory, inside a MemoryHandle.
struct Piece {
    uint64_t magic, address, offset;
    int64_t process;
    IpcHandle ipc;
};
static_assert(sizeof(Piece) <= sizeof(MemoryHandle));

struct Mapping {
    Piece piece;
    Address base;
};

struct Copy {
    Address to, from;
    size_t num_bytes;
};

// Ends with a value that is set, added to what is there, or absent.
struct Message {
    uint64_t number;
    std::vector<Copy> copies;
    bool adds;
    Address word;
    size_t word_bytes;
    uint64_t value;
};

std::mutex lock;
Cuda cuda;
void *context, *stream;
uint64_t* slots;
size_t next_slot;
std::vector<Mapping> mappings;
std::vector<Copy> unsigned_puts;  // since the last message ended
std::vector<Message> held;
std::mt19937 random_bits;
int lock_file = -1, num_looks;
uint64_t num_messages, num_bytes_moved, num_progresses, num_overtaken, newest_delivered;

int fail(const char* what, int status) {
    std::fprintf(stderr, "loopback, process %d: %s failed with %d\n", getpid(), what, status);
    return kFailed;
}
#define EP_TRY(call) \
    if (const int status = (call)) return fail(#call, status)

// The lock, and CUDA for this thread, whichever it is.
struct Turn {
    Turn() {
        lock.lock();
        cuda.cuCtxSetCurrent(context);
    }
    ~Turn() { lock.unlock(); }
};

template <typename Function>
bool find(void* library, const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library, name));
    if (*function == nullptr) std::fprintf(stderr, "loopback: the driver has no %s\n", name);
    return *function != nullptr;
}

bool load_cuda() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
        std::fprintf(stderr, "loopback: %s\n", dlerror());
        return false;
    }
    return find(library, "cuCtxGetCurrent", &cuda.cuCtxGetCurrent) &&
           find(library, "cuCtxSetCurrent", &cuda.cuCtxSetCurrent) &&
           find(library, "cuStreamCreate", &cuda.cuStreamCreate) &&
           find(library, "cuStreamSynchronize", &cuda.cuStreamSynchronize) &&
           find(library, "cuMemcpyAsync", &cuda.cuMemcpyAsync) &&
           find(library, "cuMemHostAlloc", &cuda.cuMemHostAlloc) &&
           find(library, "cuMemFreeHost", &cuda.cuMemFreeHost) &&
           find(library, "cuMemGetAddressRange_v2", &cuda.cuMemGetAddressRange) &&
           find(library, "cuIpcGetMemHandle", &cuda.cuIpcGetMemHandle) &&
           find(library, "cuIpcOpenMemHandle_v2", &cuda.cuIpcOpenMemHandle) &&
           find(library, "cuIpcCloseMemHandle", &cuda.cuIpcCloseMemHandle);
}

// Where this process reaches an address of a peer.
int reach(const MemoryHandle* handle, uint64_t address, Address* here) {
    Piece piece;
    std::memcpy(&piece, handle, sizeof(piece));
    if (piece.magic != kMagic) return fail("reading a peer's handle", kFailed);
    if (piece.process == getpid()) {
        *here = address;
        return 0;
    }
    for (const Mapping& each : mappings) {
        if (each.piece.process == piece.process &&
            !std::memcmp(&each.piece.ipc, &piece.ipc, sizeof(IpcHandle))) {
            *here = each.base + piece.offset + (address - piece.address);
            return 0;
        }
    }
    Address base;
    EP_TRY(cuda.cuIpcOpenMemHandle(&base, piece.ipc, kLazyPeerAccess));
    mappings.push_back({piece, base});
    *here = base + piece.offset + (address - piece.address);
    return 0;
}

// A value in memory that copies can read, until the next `kNumSlots` values.
Address in_slot(uint64_t value) {
    uint64_t* slot = &slots[next_slot++ % kNumSlots];
    *slot = value;
    return reinterpret_cast<Address>(slot);
}

// ------------------------------------------------------------------ messages

int add_to_word(const Message& message) {
    flock(lock_file, LOCK_EX);
    uint64_t* slot = &slots[next_slot++ % kNumSlots];
    const Address at = reinterpret_cast<Address>(slot);
    *slot = 0;
    int status = cuda.cuMemcpyAsync(at, message.word, message.word_bytes, stream);
    if (status == 0) status = cuda.cuStreamSynchronize(stream);
    *slot += message.value;
    if (status == 0) status = cuda.cuMemcpyAsync(message.word, at, message.word_bytes, stream);
    if (status == 0) status = cuda.cuStreamSynchronize(stream);
    flock(lock_file, LOCK_UN);
    return status == 0 ? 0 : fail("an atomic", status);
}

// The stream keeps the order within a message.
int deliver(const Message& message) {
    for (const Copy& copy : message.copies) {
        EP_TRY(cuda.cuMemcpyAsync(copy.to, copy.from, copy.num_bytes, stream));
        num_bytes_moved += copy.num_bytes;
    }
    num_overtaken += message.number < newest_delivered;
    newest_delivered = std::max(newest_delivered, message.number);
    if (message.word == 0) return 0;
    if (message.adds) return add_to_word(message);
    EP_TRY(cuda.cuMemcpyAsync(message.word, in_slot(message.value), message.word_bytes, stream));
    return 0;
}

// `count` of the messages that are held, at random.
int deliver_some(size_t count) {
    num_looks = 0;
    if (count == 0) return 0;
    std::shuffle(held.begin(), held.end(), random_bits);
    for (size_t i = 0; i < count; ++i) {
        if (const int status = deliver(held[held.size() - 1 - i])) return status;
    }
    held.resize(held.size() - count);
    EP_TRY(cuda.cuStreamSynchronize(stream));
    return 0;
}

int hold(bool adds, Address word, size_t word_bytes, uint64_t value) {
    held.push_back({++num_messages, std::move(unsigned_puts), adds, word, word_bytes, value});
    unsigned_puts.clear();
    num_looks = 0;
    // Who is never asked to go on must not keep anything back.
    if (num_progresses == 0) return deliver_some(held.size());
    return held.size() > kMaxHeld ? deliver_some(held.size() / 2) : 0;
}

int deliver_all() {
    if (!unsigned_puts.empty()) {
        if (const int status = hold(false, 0, 0, 0)) return status;
    }
    return deliver_some(held.size());
}

// ------------------------------------------------------------------ what NVSHMEM calls

int can_reach_peer(int* access, void*, Plugin*) {
    *access = kCpuWrite | kCpuRead | kCpuAtomics;
    return 0;
}

int get_mem_handle(MemoryHandle* handle, void* memory, size_t, Plugin*, bool is_local) {
    const Turn turn;
    Piece piece = {kMagic, reinterpret_cast<uint64_t>(memory), 0, getpid(), {}};
    if (!is_local) {
        Address base;
        size_t num_bytes;
        EP_TRY(cuda.cuMemGetAddressRange(&base, &num_bytes, piece.address));
        piece.offset = piece.address - base;
        EP_TRY(cuda.cuIpcGetMemHandle(&piece.ipc, base));
    }
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &piece, sizeof(piece));
    return 0;
}

// Called before kernels run. To map memory later could wait for a kernel, and that for what we would bring.
int map_peers(Plugin* plugin, int stride, MemoryHandle* handles, uint64_t, size_t) {
    const Turn turn;
    for (int rank = 0; rank < plugin->num_ranks; ++rank) {
        const MemoryHandle* handle = &handles[rank * stride + plugin->index];
        Piece piece;
        std::memcpy(&piece, handle, sizeof(piece));
        Address unused;
        if (piece.magic == kMagic && reach(handle, piece.address, &unused) != 0) return kFailed;
    }
    return 0;
}

int rma(Plugin*, int, RmaVerb verb, RmaMemory* remote, RmaMemory* local, RmaBytes bytes, int is_proxy) {
    const Turn turn;
    Address there;
    if (const int status = reach(remote->handle, reinterpret_cast<uint64_t>(remote->pointer), &there))
        return status;
    const Address here = reinterpret_cast<Address>(local->pointer);
    const size_t num_bytes = bytes.num_elements * bytes.element_bytes;
    switch (verb.kind) {
        case kPut:
            unsigned_puts.push_back({there, here, num_bytes});
            break;
        case kPutValue: {
            uint64_t value = 0;
            std::memcpy(&value, local->pointer, std::min(num_bytes, sizeof(value)));
            unsigned_puts.push_back({there, in_slot(value), num_bytes});
            break;
        }
        case kGet:
        case kGetValue:
            if (const int status = deliver_all()) return status;
            EP_TRY(cuda.cuMemcpyAsync(here, there, num_bytes, stream));
            EP_TRY(cuda.cuStreamSynchronize(stream));
            return 0;
        default:
            return fail("an operation that is not served", verb.kind);
    }
    return is_proxy ? 0 : deliver_all();
}

int amo(Plugin*, int, void*, AtomicVerb verb, AtomicMemory* memory, AtomicBytes bytes, int is_proxy) {
    const Turn turn;
    Address word;
    const uint64_t address = reinterpret_cast<uint64_t>(memory->remote.pointer);
    if (const int status = reach(memory->remote.handle, address, &word)) return status;
    bool adds = false;
    uint64_t value = memory->value;
    switch (verb.kind) {
        case kSet:
        case kSignal:
        case kSignalSet:
            break;
        case kIncrement:
            adds = true;
            value = 1;
            break;
        case kAdd:
        case kSignalAdd:
            adds = true;
            break;
        default:
            return fail("an atomic that is not served", verb.kind);
    }
    if (const int status = hold(adds, word, bytes.element_bytes, value)) return status;
    return is_proxy ? 0 : deliver_all();
}

int progress(Plugin*) {
    const std::lock_guard guard(lock);
    ++num_progresses;
    if ((held.empty() && unsigned_puts.empty()) || ++num_looks < kPatience) return 0;
    cuda.cuCtxSetCurrent(context);
    return deliver_all();
}

int complete(Plugin*, int, int) {
    const Turn turn;
    return deliver_all();
}

int finalize(Plugin* plugin) {
    const Turn turn;
    const int status = deliver_all();
    for (const Mapping& each : mappings) cuda.cuIpcCloseMemHandle(each.base);
    mappings.clear();
    cuda.cuMemFreeHost(slots);
    close(lock_file);
    std::fprintf(stderr, "loopback, rank %d: %llu messages, %llu bytes, %llu overtaken\n", plugin->rank,
                 static_cast<unsigned long long>(num_messages),
                 static_cast<unsigned long long>(num_bytes_moved),
                 static_cast<unsigned long long>(num_overtaken));
    delete plugin;
    return status;
}

}  // namespace

extern "C" int nvshmemt_init(Plugin** plugin, void*, int version) {
    if (version / 10000 != 3) {
        std::fprintf(stderr, "loopback: NVSHMEM asks for plugins of version %d, this one is of 30000\n",
                     version);
        return kUnsupported;
    }
    if (!load_cuda()) return kFailed;
    EP_TRY(cuda.cuCtxGetCurrent(&context));
    if (context == nullptr) return fail("finding a current context", kFailed);
    EP_TRY(cuda.cuStreamCreate(&stream, kNonBlocking));
    EP_TRY(cuda.cuMemHostAlloc(reinterpret_cast<void**>(&slots), kNumSlots * sizeof(*slots), kPortable));
    const char* folder = std::getenv("TMPDIR");
    const std::string path =
        std::string(folder ? folder : "/tmp") + "/ep_rt_loopback." + std::to_string(getuid());
    lock_file = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (lock_file < 0) return fail("opening the lock file", lock_file);
    random_bits.seed(getpid());
    *plugin = new Plugin{};
    (*plugin)->version = version;
    (*plugin)->attributes = kIsConnected;
    (*plugin)->is_initialized = true;
    Operations& operations = (*plugin)->operations;
    operations.can_reach_peer = can_reach_peer;
    operations.connect_endpoints = [](Plugin*, int*, int) { return 0; };
    operations.get_mem_handle = get_mem_handle;
    operations.release_mem_handle = [](MemoryHandle*, Plugin*) { return 0; };
    operations.finalize = finalize;
    operations.show_info = [](Plugin*, int) { return 0; };
    operations.progress = progress;
    operations.rma = rma;
    operations.amo = amo;
    operations.fence = operations.quiet = complete;
    operations.enforce_cst = [](Plugin*) { return 0; };
    operations.add_device_remote_mem_handles = map_peers;
    return 0;
}

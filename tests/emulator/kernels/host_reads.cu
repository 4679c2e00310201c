// What a host does with the result of an exact dispatch: it polls the first word, then reads the rest.
#include "layout.cuh"
#include "ptx.cuh"

namespace ep {

struct HostReadsCfg {
    int num_threads;
};

template <HostReadsCfg kCfg>
struct HostReadsArgs {
    const DispatchResult* result;
    DispatchResult* copy;
    uint64_t call, timeout_ns;
};

template <HostReadsCfg kCfg>
__device__ void host_reads(const HostReadsArgs<kCfg>& args) {
    if (threadIdx.x != 0) return;
    const uint64_t deadline_ns = ptx::globaltimer_ns() + args.timeout_ns;
    while (ptx::ld_acquire_sys(&args.result->call) != args.call)
        if (ptx::globaltimer_ns() > deadline_ns) return;
    *args.copy = *args.result;
}

}  // namespace ep

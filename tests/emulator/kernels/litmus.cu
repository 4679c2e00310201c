// Litmus tests of the memory model: every rank plays a role, with one thread. What may come out stands in
// test_model.py.
#include "layout.cuh"
#include "ptx.cuh"

namespace ep {

struct LitmusCfg {
    int num_threads;
};

template <LitmusCfg kCfg>
struct LitmusArgs {
    uint64_t *x, *y, *z;
    uint64_t* out;
    int32_t test, role;
};

template <LitmusCfg kCfg>
__device__ void litmus(const LitmusArgs<kCfg>& args) {
    using namespace ptx;
    enum {
        kRelaxed,
        kReleaseRelaxed,
        kReleaseAcquire,
        kPlain,
        kBuffering,
        kBufferingFenced,
        kChain,
        kCoherence,
        kIndependent,
        kTwoWrites,
        kIncrements,
        kScopes
    };
    uint64_t *x = args.x, *y = args.y, *z = args.z, *out = args.out;
    switch (args.test * 10 + args.role) {
        // Message passing.
        case kRelaxed * 10:
            st_relaxed_sys(x, 1);
            st_relaxed_sys(y, 1);
            break;
        case kReleaseRelaxed * 10:
        case kReleaseAcquire * 10:
            st_relaxed_sys(x, 1);
            st_release_sys(y, 1);
            break;
        case kRelaxed * 10 + 1:
        case kReleaseRelaxed * 10 + 1:
            out[0] = ld_relaxed_sys(y);
            out[1] = ld_relaxed_sys(x);
            break;
        case kReleaseAcquire * 10 + 1:
            out[0] = ld_acquire_sys(y);
            out[1] = ld_relaxed_sys(x);
            break;
        case kPlain * 10:
            *x = 1;
            st_relaxed_sys(y, 1);
            break;
        case kPlain * 10 + 1:
            out[0] = ld_relaxed_sys(y);
            out[1] = *x;
            break;
        // Store buffering.
        case kBuffering * 10:
            st_relaxed_sys(x, 1);
            out[0] = ld_relaxed_sys(y);
            break;
        case kBuffering * 10 + 1:
            st_relaxed_sys(y, 1);
            out[1] = ld_relaxed_sys(x);
            break;
        case kBufferingFenced * 10:
            st_relaxed_sys(x, 1);
            __threadfence_system();
            out[0] = ld_relaxed_sys(y);
            break;
        case kBufferingFenced * 10 + 1:
            st_relaxed_sys(y, 1);
            __threadfence_system();
            out[1] = ld_relaxed_sys(x);
            break;
        // A release passes on what its thread has acquired.
        case kChain * 10:
            *x = 1;
            st_release_sys(y, 1);
            break;
        case kChain * 10 + 1:
            out[0] = ld_acquire_sys(y);
            st_release_sys(z, out[0]);
            break;
        case kChain * 10 + 2:
            out[1] = ld_acquire_sys(z);
            out[2] = out[1] ? *x : 1;
            break;
        // Loads of one word do not go back.
        case kCoherence * 10:
            st_relaxed_sys(x, 1);
            st_relaxed_sys(x, 2);
            break;
        case kCoherence * 10 + 1:
            out[0] = ld_relaxed_sys(x);
            out[1] = ld_relaxed_sys(x);
            break;
        // Readers may see independent writes in different order.
        case kIndependent * 10:
            st_relaxed_sys(x, 1);
            break;
        case kIndependent * 10 + 1:
            st_relaxed_sys(y, 1);
            break;
        case kIndependent * 10 + 2:
            out[0] = ld_relaxed_sys(x);
            out[1] = ld_relaxed_sys(y);
            break;
        case kIndependent * 10 + 3:
            out[2] = ld_relaxed_sys(y);
            out[3] = ld_relaxed_sys(x);
            break;
        case kTwoWrites * 10:
            st_relaxed_sys(x, 1);
            st_relaxed_sys(y, 2);
            break;
        case kTwoWrites * 10 + 1:
            st_relaxed_sys(y, 1);
            st_relaxed_sys(x, 2);
            break;
        // No increment is lost.
        case kIncrements * 10:
        case kIncrements * 10 + 1:
        case kIncrements * 10 + 2:
            atom_add_acq_rel_gpu(y, 1);
            break;
        // A release of the GPU's scope says nothing to another one.
        case kScopes * 10:
            st_relaxed_sys(x, 1);
            __threadfence();
            st_relaxed_sys(y, 1);
            break;
        case kScopes * 10 + 1:
            out[0] = ld_acquire_sys(y);
            out[1] = ld_relaxed_sys(x);
            break;
    }
}

}  // namespace ep

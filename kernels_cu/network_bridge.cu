// The functions of network.cuh in terms of NVSHMEM's. A translation unit of its own: NVSHMEM's headers take
// seconds to compile, and kernels that include none of them some hundredths of one.
#include "device/nvshmem_defines.h"
#include "device/nvshmemx_defines.h"
#include "network.cuh"
#include "non_abi/nvshmem_version.h"

// NVSHMEM's device library was compiled where uint64_t is unsigned long; here it is unsigned long long, as in
// all of CUDA's headers for NVRTC. The two have different mangled names. One function that takes a uint64_t
// is left to the library, the put with a signal: it is declared here by the name that the library has, and
// what the headers declare is defined by it.
#define EP_NVSHMEM_VERSION (NVSHMEM_VENDOR_MAJOR_VERSION * 100 + NVSHMEM_VENDOR_MINOR_VERSION)
#if EP_NVSHMEM_VERSION >= 308
#define EP_PUT_SIGNAL nvshmemi_transfer_put_signal_dispatch
#define EP_IN_LIBRARY(scope) \
    _Z37nvshmemi_transfer_put_signal_dispatchIL13threadgroup_t##scope##EEvPvS1_mS1_m14nvshmemi_amo_tibi
#elif EP_NVSHMEM_VERSION >= 305
#define EP_PUT_SIGNAL nvshmemi_transfer_put_signal
#define EP_IN_LIBRARY(scope) \
    _Z28nvshmemi_transfer_put_signalIL13threadgroup_t##scope##EEvPvS1_mS1_m14nvshmemi_amo_tibi
#else
#define EP_PUT_SIGNAL nvshmemi_transfer_put_signal
#define EP_IN_LIBRARY(scope) \
    _Z28nvshmemi_transfer_put_signalIL13threadgroup_t##scope##EEvPvS1_mS1_m14nvshmemi_amo_tib
#endif
#if EP_NVSHMEM_VERSION >= 305  // from then on with a queue pair
#define EP_QP_PARAMETER , nvshmemx_qp_handle_t qp
#define EP_QP_ARGUMENT , qp
#else
#define EP_QP_PARAMETER
#define EP_QP_ARGUMENT
#endif

extern "C" {
__device__ void EP_IN_LIBRARY(0)(void*, void*, size_t, void*, unsigned long, nvshmemi_amo_t, int,
                                 bool EP_QP_PARAMETER);
__device__ void EP_IN_LIBRARY(1)(void*, void*, size_t, void*, unsigned long, nvshmemi_amo_t, int,
                                 bool EP_QP_PARAMETER);
__device__ void EP_IN_LIBRARY(3)(void*, void*, size_t, void*, unsigned long, nvshmemi_amo_t, int,
                                 bool EP_QP_PARAMETER);
}

template <threadgroup_t kScope>
__device__ void EP_PUT_SIGNAL(void* destination, void* source, size_t num_bytes, void* signal, uint64_t value,
                              nvshmemi_amo_t operation, int pe, bool is_nbi EP_QP_PARAMETER) {
    constexpr int kThread = 0, kWarp = 1;
    if constexpr (static_cast<int>(kScope) == kThread) {
        EP_IN_LIBRARY(0)(destination, source, num_bytes, signal, value, operation, pe, is_nbi EP_QP_ARGUMENT);
    } else if constexpr (static_cast<int>(kScope) == kWarp) {
        EP_IN_LIBRARY(1)(destination, source, num_bytes, signal, value, operation, pe, is_nbi EP_QP_ARGUMENT);
    } else {
        EP_IN_LIBRARY(3)(destination, source, num_bytes, signal, value, operation, pe, is_nbi EP_QP_ARGUMENT);
    }
}

namespace ep::network {

__device__ void put_signal_thread(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                  uint64_t value, int32_t peer) {
    nvshmem_putmem_signal_nbi(destination, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, peer);
}
__device__ void put_signal_warp(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                uint64_t value, int32_t peer) {
    nvshmemx_putmem_signal_nbi_warp(destination, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, peer);
}
__device__ void put_signal_block(void* destination, const void* source, int64_t num_bytes, uint64_t* signal,
                                 uint64_t value, int32_t peer) {
    nvshmemx_putmem_signal_nbi_block(destination, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, peer);
}

__device__ void set_signal(uint64_t* signal, uint64_t value, int32_t peer) {
    nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_SET, peer);
}

__device__ void* peer_pointer(void* address, int32_t peer) { return nvshmem_ptr(address, peer); }

// Of the functions that look at a word, in every version this one ends with what makes the data visible.
__device__ void acquire_signal(uint64_t* signal, uint64_t value) {
    nvshmem_ulonglong_test(signal, NVSHMEM_CMP_GE, value);
}

}  // namespace ep::network

"""Products that leave SMs, beside a kernel that holds these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import IS_UNDER_MPI, device_count

from ep_rt import leaving_sms

if device_count():
    import cupy

SIZE = 4096
NUM_SMS = 16
HELD_NS = 500_000_000

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_UNDER_MPI, reason="needs no peers"),
    pytest.mark.skipif(device_count() == 0, reason="no GPU"),
]


class Holder:
    """A kernel with an SM to itself for each of `NUM_SMS` blocks, for `HELD_NS`."""

    _SOURCE = r"""
    __device__ unsigned long long now_ns() {
        unsigned long long value;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
        return value;
    }
    extern "C" __global__ void hold(unsigned long long for_ns) {
        extern __shared__ char memory[];
        memory[0] = 0;
        const unsigned long long end_ns = now_ns() + for_ns;
        while (now_ns() < end_ns) {
        }
    }
    """

    def __init__(self) -> None:
        self._shared_bytes = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
        self._kernel = cupy.RawKernel(self._SOURCE, "hold")
        self._kernel.max_dynamic_shared_size_bytes = self._shared_bytes
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._hold(0)
        self._stream.synchronize()

    def start(self) -> None:
        self._hold(HELD_NS)

    def is_holding(self) -> bool:
        return not self._stream.done

    def wait(self) -> None:
        self._stream.synchronize()

    def _hold(self, for_ns: int) -> None:
        with self._stream:
            self._kernel((NUM_SMS,), (1,), (np.uint64(for_ns),), shared_mem=self._shared_bytes)


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_product_ends_beside_a_kernel_that_holds_sms(framework: str) -> None:
    library: Any = pytest.importorskip(framework)
    ones = library.ones((SIZE, SIZE), dtype=library.float16)
    if framework == "torch":
        ones = ones.cuda()
    ones @ ones  # loads its kernel and takes memory
    with leaving_sms(NUM_SMS, framework=framework):
        ones @ ones
    cupy.cuda.runtime.deviceSynchronize()
    holder = Holder()
    holder.start()
    with leaving_sms(NUM_SMS, framework=framework):
        product = ones @ ones
    done = library.cuda.Event()
    done.record()
    done.synchronize()
    assert holder.is_holding()
    holder.wait()
    assert bool((product == SIZE).all())

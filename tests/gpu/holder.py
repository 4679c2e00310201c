"""A kernel that keeps SMs from all others for a while."""

from __future__ import annotations

import cupy
import numpy as np


class Holder:
    """A kernel whose blocks have an SM each to themselves, for 0.5 s. Loads it when it is made."""

    _HELD_NS = 500_000_000
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

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms
        self._shared_bytes = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
        self._kernel = cupy.RawModule(code=self._SOURCE).get_function("hold")
        self._kernel.max_dynamic_shared_size_bytes = self._shared_bytes
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._hold(0)
        self._stream.synchronize()

    def start(self) -> None:
        """Hold them from now on. Nothing else may be running."""
        self._hold(self._HELD_NS)

    def is_holding(self) -> bool:
        return not self._stream.done

    def wait(self) -> None:
        """Until they are free."""
        self._stream.synchronize()

    def _hold(self, for_ns: int) -> None:
        with self._stream:
            self._kernel((self._num_sms,), (1,), (np.uint64(for_ns),), shared_mem=self._shared_bytes)

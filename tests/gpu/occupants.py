"""Kernels that take SMs from all others."""

from __future__ import annotations

import cupy
import numpy as np
from device_arrays import fetch, overwrite, put
from low_latency_cases import loaded

_NOW_NS = r"""
    __device__ unsigned long long now_ns() {
        unsigned long long value;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
        return value;
    }
"""


class Holder:
    """A kernel whose blocks have an SM each to themselves, for 0.5 s. Loads it when it is made."""

    _HELD_NS = 500_000_000
    _SOURCE = r"""
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
        self._kernel = loaded(_NOW_NS + self._SOURCE, "hold")
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


class Filler:
    """A kernel that needs all SMs of the device, and all shared memory of each, at the same time.

    Its blocks wait for each other, but not for long: it ends also where they are never there together. Loads
    its kernel when it is made.
    """

    LIMIT_NS = 20_000_000
    _SOURCE = r"""
    extern "C" __global__ void fill(unsigned* num_arrived, unsigned goal, unsigned* num_alone,
                                    unsigned long long limit_ns) {
        extern __shared__ char memory[];
        if (threadIdx.x != 0) return;
        const unsigned long long end_ns = now_ns() + limit_ns;
        memory[0] = 0;
        atomicAdd(num_arrived, 1u);
        while (atomicAdd(num_arrived, 0u) < goal) {
            if (now_ns() < end_ns) continue;
            atomicAdd(num_alone, 1u);
            return;
        }
    }
    """

    def __init__(self) -> None:
        attributes = cupy.cuda.Device().attributes
        self._num_blocks = int(attributes["MultiProcessorCount"])
        self._shared_bytes = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self._kernel = loaded(_NOW_NS + self._SOURCE, "fill")
        self._kernel.max_dynamic_shared_size_bytes = self._shared_bytes
        self._num_arrived, self._num_alone = (put(np.zeros(1, np.int32)) for _ in range(2))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._num_runs = 0

    def fills(self) -> bool:
        """Run it on a stream of its own, wait for it, and say whether it had all SMs."""
        self._num_runs += 1
        with self._stream:
            goal = np.uint32(self._num_runs * self._num_blocks)
            args = (self._num_arrived, goal, self._num_alone, np.uint64(self.LIMIT_NS))
            self._kernel((self._num_blocks,), (32,), args, shared_mem=self._shared_bytes)
            num_arrived, num_alone = fetch(self._num_arrived), fetch(self._num_alone)
        assert int(num_arrived[0]) == goal
        overwrite(self._num_alone, np.zeros(1, np.int32))
        return int(num_alone[0]) == 0

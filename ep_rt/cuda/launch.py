"""Kernels on the current device: loaded once, arguments packed once, one driver call per launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArrayError, DeviceError
from . import jit
from .kernels import KernelSpec
from .layout import Struct


class Kernel:
    """A kernel compiled for the current device and loaded there.

    Raises:
        CompileError, BackendError: see `jit.cubin`.
    """

    def __init__(self, spec: KernelSpec, *, cache_dir: Path | None = None) -> None:
        import cupy

        self.spec = spec
        self.device: int = cupy.cuda.runtime.getDevice()
        make_context_current()
        capability = cupy.cuda.Device().compute_capability
        self.architecture = jit.architecture((int(capability[:-1]), int(capability[-1])))
        path = jit.cubin(spec, self.architecture, cache_dir=cache_dir)
        # The raw kernel keeps its module loaded.
        self._raw = cupy.RawModule(path=str(path)).get_function(spec.name)
        self.function: int = self._raw.kernel.ptr

    def max_resident_blocks(self) -> int:
        """Blocks of this kernel that run at the same time on an otherwise idle device."""
        import cupy

        per_sm = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self.function, self.spec.cfg.num_threads, 0
        )
        return int(per_sm) * int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def bind(self, args: NDArray[Any], *, num_blocks: int) -> Launch:
        """Fix the arguments and the grid.

        Args:
            args: from `pack`. Changing it in place changes later launches.

        Raises:
            DeviceError: `num_blocks` cannot all be resident, which kernels that wait need; the grid is never
                made smaller.
        """
        limit = self.max_resident_blocks()
        if num_blocks > limit:
            raise DeviceError(
                f"{self.spec.name}: {num_blocks} blocks cannot run at once on device {self.device}, "
                f"which holds {limit}"
            )
        return Launch(self, args, num_blocks)


class Launch:
    """A kernel with its arguments. Calling it enqueues it: one driver call, no allocation."""

    def __init__(self, kernel: Kernel, args: NDArray[Any], num_blocks: int) -> None:
        from cuda.bindings import driver

        self._keep_alive = (kernel, args)
        self._params = np.array([args.ctypes.data], np.uint64)
        grid = (num_blocks, 1, 1, kernel.spec.cfg.num_threads, 1, 1)
        self._before_stream = (driver.CUfunction(kernel.function), *grid, 0)
        self._params_address = self._params.ctypes.data
        self._launch_kernel = driver.cuLaunchKernel
        self._success = driver.CUresult.CUDA_SUCCESS
        self._no_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._name = kernel.spec.name

    def __call__(self, stream: int) -> None:
        """Enqueue on a stream of the kernel's device, which must be current in this thread.

        Raises:
            DeviceError: the driver refused.
        """
        (status,) = self._launch_kernel(*self._before_stream, stream, self._params_address, 0)
        if status == self._no_context:  # this thread has not used CUDA yet
            make_context_current()
            (status,) = self._launch_kernel(*self._before_stream, stream, self._params_address, 0)
        if status != self._success:
            raise DeviceError(f"launching {self._name}: {status.name}")


def make_context_current() -> None:
    """What the CUDA runtime does for a thread at its first call, and the driver does not."""
    import cupy

    cupy.cuda.runtime.free(0)


def pack(struct: Struct, **values: Any) -> NDArray[Any]:
    """An argument struct [1] from all its fields. What a sequence does not fill of an array field is zero."""
    if set(values) != set(struct.names or ()):
        raise ValueError(f"fields {sorted(values)} given, {sorted(struct.names or ())} needed")
    record = np.zeros(1, struct)
    for name, value in values.items():
        if record.dtype[name].shape:
            record[name][0, : len(value)] = value
        else:
            record[name] = value
    return record


def stream_pointer(stream: Any) -> int:
    """The ``cudaStream_t`` behind an int, or an object with ``__cuda_stream__`` (else `.ptr`, older CuPy).

    Raises:
        ArrayError: neither.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "ptr"):
        return int(stream.ptr)
    raise ArrayError(f"stream={stream!r} is neither an integer nor an object with __cuda_stream__")

"""NumPy arrays to a GPU and back, bit by bit, for CuPy, torch and JAX alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from ep_rt import Buffer, arrays
from ep_rt.cuda.inputs import is_contiguous
from ep_rt.exchange import Group

Array = NDArray[Any]


def put(array: Array, framework: str = "cupy") -> Any:
    """The same bits on the current device."""
    # While ranks that share a GPU wait for each other, nothing may load a kernel or take pinned memory.
    contiguous = np.ascontiguousarray(array)
    memory = cupy.cuda.alloc(max(1, contiguous.nbytes))
    stream = cupy.cuda.get_current_stream()
    cupy.cuda.runtime.memcpyAsync(
        memory.ptr,
        contiguous.ctypes.data,
        contiguous.nbytes,
        cupy.cuda.runtime.memcpyHostToDevice,
        stream.ptr,
    )
    stream.synchronize()
    device = cupy.cuda.runtime.getDevice()
    return arrays.cuda_to_framework(
        memory.ptr,
        array.shape,
        arrays.dtype_name(array.dtype),
        device=f"cuda:{device}",
        framework=framework,
        owner=memory,
    )


def fetch(array: Any, dtype: Any = None) -> Array:
    """The same bits on the host, once the current stream has made them. `dtype` for float8 in CuPy."""
    stream = cupy.cuda.get_current_stream()
    seen = arrays.view(array, stream=stream.ptr)
    if seen.stream not in (None, stream.ptr):
        cupy.cuda.runtime.streamSynchronize(seen.stream)
    kind = arrays.np_dtype(seen.dtype)
    raw = np.empty(int(np.prod(seen.shape)) * kind.itemsize, np.uint8)
    # A copy to ordinary host memory waits inside the driver, where the process's other ranks would wait too.
    stream.synchronize()
    if raw.size:
        assert is_contiguous(seen)
        cupy.cuda.runtime.memcpyAsync(
            raw.ctypes.data, seen.pointer, raw.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, stream.ptr
        )
        stream.synchronize()
    result: Array = raw.view(kind).reshape(seen.shape)
    return result if dtype is None else result.view(dtype)


class Mismatches:
    """Counts, on the device, words of results that are not what they must be: thousands can be compared.

    Loads its kernel when it is made, which must not happen while ranks on this GPU wait for each other.
    """

    _SOURCE = r"""
    extern "C" __global__ void compare(const unsigned* got, const unsigned* expected, const char* rows,
                                       long long num_words, long long row_words, unsigned long long* count) {
        for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += gridDim.x * blockDim.x)
            if ((rows == nullptr || rows[i / row_words]) && got[i] != expected[i]) atomicAdd(count, 1ull);
    }
    """

    def __init__(self) -> None:
        self._kernel = cupy.RawModule(code=self._SOURCE).get_function("compare")
        self._kernel.kernel  # noqa: B018
        self._count = put(np.zeros(1, np.int64))

    def add(self, got: Any, expected: Any, rows: Any = None) -> None:
        """Enqueue a comparison of arrays of as many bytes, a multiple of 4.

        Args:
            rows: uint8, which parts of equal size count; None for all.
        """
        one, other = arrays.view(got), arrays.view(expected)
        assert is_contiguous(one)
        num_words = int(np.prod(one.shape)) * arrays.np_dtype(one.dtype).itemsize // 4
        assert num_words * 4 == int(np.prod(other.shape)) * arrays.np_dtype(other.dtype).itemsize
        row_words = num_words if rows is None else num_words // rows.size
        where = np.uint64(0) if rows is None else rows
        args = np.uint64(one.pointer), np.uint64(other.pointer), where
        self._kernel((8,), (256,), (*args, np.int64(num_words), np.int64(row_words), self._count))

    def total(self) -> int:
        """So far. Waits for the current stream."""
        return int(fetch(self._count)[0])


def overwrite(array: Any, value: Array) -> None:
    """Other contents for a device array, in the order of the current stream."""
    stream = cupy.cuda.get_current_stream()
    contiguous = np.ascontiguousarray(value)
    cupy.cuda.runtime.memcpyAsync(
        arrays.view(array).pointer,
        contiguous.ctypes.data,
        contiguous.nbytes,
        cupy.cuda.runtime.memcpyHostToDevice,
        stream.ptr,
    )
    stream.synchronize()


def copy(target: Any, source: Any) -> None:
    """Enqueue a copy between device arrays of as many bytes, on the current stream. Also in a capture."""
    one, other = arrays.view(target), arrays.view(source)
    assert is_contiguous(one)
    assert is_contiguous(other)
    num_bytes = int(np.prod(one.shape)) * arrays.np_dtype(one.dtype).itemsize
    assert num_bytes == int(np.prod(other.shape)) * arrays.np_dtype(other.dtype).itemsize
    runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
    runtime.memcpyAsync(one.pointer, other.pointer, num_bytes, runtime.memcpyDeviceToDevice, stream.ptr)


@contextmanager
def cuda_buffer(group: Group, **options: Any) -> Iterator[Buffer]:
    """A buffer, with a non-blocking stream of this rank current."""
    options = {"backend": "cuda", "num_nvl_bytes": 64 << 20, "timeout_s": 20.0, **options}
    group.barrier()  # short deadlines are for what the test does
    with cupy.cuda.Stream(non_blocking=True), Buffer(group, **options) as buffer:
        # As in the engine: no allocation by the driver while ranks on this GPU wait for each other.
        cupy.cuda.alloc(256 << 20)
        group.barrier()
        yield buffer
        cupy.cuda.get_current_stream().synchronize()


def poison(buffer: Buffer, value: int) -> None:
    """Fill the free memory of the slab. Nothing is held, and no call is under way on any rank."""
    domain = buffer._engine._domain  # type: ignore[union-attr]
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.get_current_stream()
    cupy.cuda.runtime.memsetAsync(domain.base, value, domain.pool.num_bytes, stream.ptr)
    stream.synchronize()
    buffer.group.barrier()

"""Arrays of CuPy and of producers that nobody knows, written late on a stream that is theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from host_cases import same_bits
from numpy.typing import NDArray
from ranks import device_count

from ep_rt import Buffer, arrays, dlpack

if device_count():
    import cupy
    from device_arrays import fetch, put

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
# Of a GPU's clock: about 30 ms, much longer than all else that tests enqueue.
SLOW_CYCLES = 60_000_000

# One thread is busy: kernels of ranks on the same GPU, which wait for each other, have room beside it.
_SOURCE = r"""
extern "C" __global__ void spin(long long cycles, const volatile int* gate) {
    const long long start = clock64();
    while (clock64() - start < cycles && (gate == nullptr || *gate == 0)) __nanosleep(500);
}
extern "C" __global__ void twice(const float* x, float* out, long long count, int width, long long stride) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        out[i / width * stride + i % width] = 2 * x[i];
}
"""


class Interface:
    """A CuPy array known by its ``__cuda_array_interface__`` alone."""

    def __init__(self, array: Any, **stream: int | None) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "strides": None if array.flags.c_contiguous else array.strides,
            "typestr": array.dtype.str,
            "data": (array.data.ptr, False),
            **stream,
        }


class Exported:
    """A CuPy array known by its DLPack export alone.

    Attributes:
        stream: where its contents are made; the consumer's comes after that.
        asked: the consumer's, of each export.
    """

    def __init__(self, array: Any, stream: Any) -> None:
        self._array = array
        self.stream = stream
        self.asked: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._array.data.device_id

    def __dlpack__(self, *, stream: Any = None, **_: object) -> object:
        self.asked.append(stream)
        if stream != -1:
            event = cupy.cuda.Event(disable_timing=True)
            event.record(self.stream)
            cupy.cuda.runtime.streamWaitEvent(stream or 1, event.ptr)
        # Not every CuPy exports bfloat16.
        capsule = self._array.view(f"u{self._array.dtype.itemsize}").__dlpack__(stream=-1)
        dtype = arrays.dtype_name(self._array.dtype)
        dlpack.relabel(capsule, cuda_index=self._array.data.device_id, dtype=dtype)
        return capsule


@dataclass(frozen=True, kw_only=True)
class Way:
    """How inputs are given.

    Attributes:
        give: makes what a call takes, of a CuPy array and the stream that writes it.
        has_own_stream: that one is never current.
        names_bfloat16: else such arrays are given as CuPy's, written on the current stream.
        is_strided: rows lie apart.
    """

    give: Callable[[Any, Any], Any]
    has_own_stream: bool = True
    names_bfloat16: bool = True
    is_strided: bool = False


def _with_stream(array: Any, stream: Any) -> Interface:
    return Interface(array, stream=stream.ptr)


WAYS = {
    "cupy": Way(give=lambda array, stream: array, has_own_stream=False),
    "interface": Way(give=_with_stream, names_bfloat16=False),
    "interface-strided": Way(give=_with_stream, names_bfloat16=False, is_strided=True),
    "interface-of-no-stream": Way(
        give=lambda array, stream: Interface(array, stream=None), has_own_stream=False, names_bfloat16=False
    ),
    "dlpack": Way(give=Exported),
    "dlpack-strided": Way(give=Exported, is_strided=True),
}


class Input:
    """An array on the device that holds 0xFF but while it is written and not yet spoiled.

    Attributes:
        array: as CuPy has it; `given`, as calls get it.
        stream: that writes it.
    """

    def __init__(self, values: Array, stream: Any, give: Callable[[Any, Any], Any], is_strided: bool) -> None:
        whole = values
        if is_strided:
            whole = np.zeros((len(values), 5 + values[0].size), values.dtype)
            whole[:, 3:-2] = values.reshape(len(values), -1)
        self._contents = put(whole)
        self._memory = put(np.full(whole.nbytes, 0xFF, np.uint8).view(whole.dtype).reshape(whole.shape))
        cut = self._memory[:, 3:-2] if is_strided else self._memory
        self.array = cut[:, 0] if cut.ndim > values.ndim else cut
        self.stream = stream
        self.given = give(self.array, stream)

    def write(self) -> None:
        """Enqueue the contents."""
        source, memory = self._contents.data.ptr, self._memory
        kind = cupy.cuda.runtime.memcpyDeviceToDevice
        cupy.cuda.runtime.memcpyAsync(memory.data.ptr, source, memory.nbytes, kind, self.stream.ptr)

    def spoil(self) -> None:
        """Enqueue the end of the contents."""
        cupy.cuda.runtime.memsetAsync(self._memory.data.ptr, 0xFF, self._memory.nbytes, self.stream.ptr)


class Writer:
    """Makes inputs, and writes them late. Collective; no calls are under way.

    Attributes:
        main: the stream that is current, on which calls are made.
        own: the one that writes.
    """

    def __init__(self, how: str, buffer: Buffer) -> None:
        self._way = WAYS[how]
        self._buffer = buffer
        self._gate_memory = cupy.cuda.alloc_pinned_memory(4)
        self._gate = np.frombuffer(self._gate_memory, np.int32, 1)
        module = cupy.RawModule(code=_SOURCE)
        self._spin, self._twice = module.get_function("spin"), module.get_function("twice")
        self.main = cupy.cuda.get_current_stream()
        self.own = cupy.cuda.Stream(non_blocking=True) if self._way.has_own_stream else self.main
        self._exports: list[Exported] = []
        # What is enqueued for the first time may be loaded then, for which the driver may wait.
        self.hold(self.own, cycles=0)
        some = self.input(np.zeros((1, 4), np.float32))
        some.write()
        self.double(put(np.zeros((1, 4), np.float32)), some)
        some.spoil()
        cupy.cuda.runtime.deviceSynchronize()
        buffer.group.barrier()

    def input(self, values: Array, *, is_contiguous: bool = False) -> Input:
        """An input with these contents, to be written."""
        way = self._way
        if values.dtype == BF16 and not way.names_bfloat16:
            return Input(values, self.main, lambda array, _: array, False)
        made = Input(values, self.own, way.give, way.is_strided and not is_contiguous)
        if isinstance(made.given, Exported):
            self._exports.append(made.given)
        return made

    def hold(self, stream: Any, *, cycles: int, is_gated: bool = False) -> None:
        """Let later work of a stream come late: after so many cycles, or when the gate is open."""
        gate = self._gate_memory.ptr if is_gated else 0
        with stream:
            self._spin((1,), (1,), (np.int64(cycles), np.uint64(gate)))

    def shut(self) -> None:
        """The gate of all kernels that come."""
        self._gate[0] = 0

    def open(self) -> None:
        self._gate[0] = 1

    def write(self, *inputs: Input, is_late: bool) -> None:
        """Enqueue contents where the calls so far have read what was there."""
        self._begin(is_late)
        for each in inputs:
            each.write()

    def write_twice(self, x: Any, y: Input, *, is_late: bool) -> None:
        """The same for contents made of a result: float32 [N, W], doubled."""
        self._begin(is_late)
        self.double(x, y)

    def double(self, x: Any, y: Input) -> None:
        out = y.array
        assert x.shape == out.shape, f"{x.shape} came where {out.shape} were sent"
        where = np.uint64(x.data.ptr), np.uint64(out.data.ptr), np.int64(x.size)
        with y.stream:
            self._twice((8,), (256,), (*where, np.int32(x.shape[1]), np.int64(out.strides[0] // 4)))

    def spoil(self, *inputs: Input) -> None:
        """As soon as the calls so far let what comes after them go on."""
        follow(self.own, self.main)
        for each in inputs:
            each.spoil()

    def wrong(self, results: Results) -> list[str]:
        """See `Results`, once nothing is written any more: memory goes to the next inputs."""
        self.own.synchronize()
        return results.wrong()

    def asked(self) -> set[Any]:
        """Streams that DLPack exports were asked for, but those that calls run on."""
        allowed = self.main.ptr, self._buffer.get_comm_stream().ptr
        return {stream for export in self._exports for stream in export.asked if stream not in allowed}

    def _begin(self, is_late: bool) -> None:
        follow(self.own, self.main)
        if is_late:
            self.hold(self.own, cycles=SLOW_CYCLES)


def follow(later: Any, earlier: Any) -> None:
    """Let a stream wait for what is enqueued on another one so far."""
    if later.ptr != earlier.ptr:
        event = cupy.cuda.Event(disable_timing=True)
        event.record(earlier)
        later.wait_event(event)


class Results:
    """Copies of results, made on the current stream at once, and what they must be."""

    def __init__(self) -> None:
        self._copies: list[tuple[str, Any, Array, Any]] = []

    def add(self, name: str, result: Any, expected: Array | None, where: Any = ...) -> None:
        """Enqueue the copy of a C-contiguous result, of which `where` says which part counts."""
        assert expected is not None
        copy = cupy.ndarray(result.shape, result.dtype)
        stream = cupy.cuda.get_current_stream()
        kind = cupy.cuda.runtime.memcpyDeviceToDevice
        cupy.cuda.runtime.memcpyAsync(copy.data.ptr, result.data.ptr, result.nbytes, kind, stream.ptr)
        self._copies.append((name, copy, expected, where))

    def wrong(self) -> list[str]:
        """Names of results that are not bit for bit what they must be. Waits for the current stream."""
        return [
            name
            for name, copy, expected, where in self._copies
            if not same_bits(np.ascontiguousarray(fetch(copy)[where]), np.ascontiguousarray(expected[where]))
        ]

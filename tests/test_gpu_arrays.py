"""Device arrays of CuPy, torch and JAX: same memory in and out, streams honoured."""

from __future__ import annotations

import gc
import os
import time
import weakref
from typing import Any

import numpy as np
import pytest

from ep_rt import arrays
from ep_rt.cuda_arrays import Column, ResultArrays
from ep_rt.errors import ArrayError

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "uint8", "int32", "int64", "bool")
ROWS, COLUMNS = 6, 64
SLOW_CYCLES = 300_000_000  # about 0.15 s


@pytest.fixture(scope="module")
def cupy() -> Any:
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy


@pytest.fixture(scope="module")
def torch(cupy: Any) -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch


@pytest.fixture(scope="module")
def jax(cupy: Any) -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no CUDA device")
    return jax


class Slab:
    """Device memory with numbered elements, owned by an object of ours."""

    def __init__(self, cupy: Any, dtype: str, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> None:
        self.expected = (np.arange(np.prod(shape)) % 97).reshape(shape).astype(arrays.np_dtype(dtype))
        self.memory = cupy.asarray(np.ascontiguousarray(self.expected).view(np.uint8))
        cupy.cuda.Device().synchronize()
        self.pointer = int(self.memory.data.ptr)
        self.shape, self.dtype = shape, dtype

    def give(self, framework: str, stream: int | None = None) -> Any:
        return arrays.cuda_to_framework(
            self.pointer,
            self.shape,
            self.dtype,
            device="cuda:0",
            framework=framework,
            owner=self,
            stream=stream,
        )


class CudaArray:
    """A CuPy array known by its __cuda_array_interface__ only."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


class Producer:
    """An array known by its DLPack export only."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.asked: dict[str, Any] = {}

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return self.array.__dlpack__(**asked)


def fetch(cupy: Any, seen: arrays.ArrayView, stream: Any = None) -> Any:
    """Copy what a view shows to the host, ordered by nothing but the view's own stream."""
    itemsize = arrays.np_dtype(seen.dtype).itemsize
    strides = tuple(stride * itemsize for stride in seen.strides)
    reach = sum((n - 1) * stride for n, stride in zip(seen.shape, strides, strict=True)) + itemsize
    memory = cupy.cuda.UnownedMemory(seen.pointer, reach, seen.owner, 0)
    array = cupy.ndarray(seen.shape, f"u{itemsize}", cupy.cuda.MemoryPointer(memory, 0), strides)
    stream = stream or cupy.cuda.Stream(non_blocking=True)
    if seen.stream is not None and seen.stream != stream.ptr:
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, seen.stream)
        stream.wait_event(event)
    with stream:
        return array.get(stream=stream).view(arrays.np_dtype(seen.dtype))


def same(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy_in_and_out(dtype: str, cupy: Any) -> None:
    slab = Slab(cupy, dtype)
    array = slab.give("cupy")
    carried = "uint8" if dtype == "float8_e4m3fn" else dtype  # CuPy has no float8
    assert (array.data.ptr, array.shape, arrays.dtype_name(array.dtype)) == (
        slab.pointer,
        slab.shape,
        carried,
    )
    seen = arrays.view(array)
    assert (seen.pointer, seen.strides, seen.dtype) == (slab.pointer, (COLUMNS, 1), carried)
    assert (seen.device, seen.framework, seen.stream) == ("cuda:0", "cupy", arrays.CUDA_STREAM_LEGACY)
    same(fetch(cupy, seen), slab.expected.view(arrays.np_dtype(carried)))
    part = arrays.view(array[::2, 8:40])
    assert (part.shape, part.strides) == ((3, 32), (2 * COLUMNS, 1))
    same(fetch(cupy, part), slab.expected.view(arrays.np_dtype(carried))[::2, 8:40])


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_arrays_as_cupy_makes_them(dtype: str, is_swapped: bool, cupy: Any) -> None:
    slab = Slab(cupy, dtype)
    rows = ROWS // 2, 2, COLUMNS
    results = ResultArrays(
        [Column(dtype, rows[1:], is_swapped), None, Column("uint8", ())], device=0, framework="cupy"
    )
    array, absent, numbers = results.over(
        slab.pointer, slab.memory.nbytes, slab, [(0, rows[0]), (0, 0), (3, 5)]
    )
    like = slab.give("cupy").reshape(rows)
    if is_swapped:
        like = like.swapaxes(1, 2)
    assert (absent, numbers.shape, numbers.data.ptr) == (None, (5,), slab.pointer + 3)
    assert type(array) is cupy.ndarray
    assert array.data.ptr == like.data.ptr
    for name in ("dtype", "shape", "strides", "size", "nbytes", "ndim"):
        assert getattr(array, name) == getattr(like, name)
    assert str(array.flags).split("OWNDATA")[0] == str(like.flags).split("OWNDATA")[0]
    gone = weakref.ref(slab)
    part = array[1:]
    del slab, like, array, numbers
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_tensors_over_one_allocation(dtype: str, is_swapped: bool, torch: Any, cupy: Any) -> None:
    slab = Slab(cupy, dtype)
    rows = ROWS // 2, 2, COLUMNS
    results = ResultArrays(
        [Column(dtype, rows[1:], is_swapped), None, Column("uint8", ())], device=0, framework="torch"
    )
    tensor, absent, numbers = results.over(
        slab.pointer, slab.memory.nbytes, slab, [(0, rows[0]), (0, 0), (3, 5)]
    )
    like = slab.give("torch").reshape(rows)
    if is_swapped:
        like = like.swapaxes(1, 2)
    assert (absent, numbers.shape, numbers.data_ptr()) == (None, (5,), slab.pointer + 3)
    for name in ("dtype", "shape", "device"):
        assert getattr(tensor, name) == getattr(like, name)
    assert (tensor.data_ptr(), tensor.stride()) == (like.data_ptr(), like.stride())
    gone = weakref.ref(slab)
    part = tensor[1:]
    del slab, like, tensor, numbers
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_and_out(dtype: str, cupy: Any, torch: Any) -> None:
    slab = Slab(cupy, dtype)
    tensor = slab.give("torch")
    assert (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) == (
        slab.pointer,
        slab.shape,
        getattr(torch, dtype),
    )
    assert tensor.device == torch.device("cuda:0")
    seen = arrays.view(tensor)
    assert (seen.pointer, seen.strides, seen.dtype) == (slab.pointer, (COLUMNS, 1), dtype)
    assert (seen.device, seen.framework, seen.stream) == ("cuda:0", "torch", arrays.CUDA_STREAM_LEGACY)
    same(fetch(cupy, seen), slab.expected)
    same(fetch(cupy, arrays.view(tensor[1::2, 5:9])), slab.expected[1::2, 5:9])
    same(tensor.to(torch.float32).cpu().numpy(), slab.expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "int64"])
def test_jax_in_and_out(dtype: str, cupy: Any, jax: Any) -> None:
    slab = Slab(cupy, dtype)
    array = slab.give("jax")
    assert isinstance(array, jax.Array)
    assert (array.unsafe_buffer_pointer(), array.shape, array.dtype) == (
        slab.pointer,
        slab.shape,
        slab.expected.dtype,
    )
    seen = arrays.view(array)
    assert (seen.pointer, seen.strides, seen.dtype) == (slab.pointer, (COLUMNS, 1), dtype)
    assert (seen.device, seen.framework, seen.readonly) == ("cuda:0", "jax", True)
    same(fetch(cupy, seen), slab.expected)
    same(np.asarray(array), slab.expected)


def test_jax_int64(cupy: Any, jax: Any) -> None:
    slab = Slab(cupy, "int64")
    same(np.asarray(slab.give("jax")), slab.expected.astype(np.int32))
    jax.config.update("jax_enable_x64", True)
    try:
        assert slab.give("jax").unsafe_buffer_pointer() == slab.pointer
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_empty(framework: str, cupy: Any, torch: Any, jax: Any) -> None:
    for pointer in (0, Slab(cupy, "bfloat16").pointer):
        array = arrays.cuda_to_framework(
            pointer, (0, 64), "bfloat16", device="cuda:0", framework=framework, owner=None
        )
        assert tuple(array.shape) == (0, 64)
        seen = arrays.view(array)
        assert (seen.shape, seen.dtype, seen.device) == ((0, 64), "bfloat16", "cuda:0")


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_owner_lives_as_long_as_the_result(framework: str, cupy: Any, torch: Any, jax: Any) -> None:
    slab = Slab(cupy, "bfloat16")
    gone = weakref.ref(slab)
    array = slab.give(framework)
    part = array[1:] if framework != "jax" else array
    del slab, array
    gc.collect()
    assert gone() is not None
    del part
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


def test_plain_producers(cupy: Any, torch: Any) -> None:
    slab = Slab(cupy, "float32")
    array = slab.give("cupy")[::2]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        seen = arrays.view(CudaArray(array))
        assert (seen.pointer, seen.strides, seen.device) == (slab.pointer, (2 * COLUMNS, 1), "cuda:0")
        assert (seen.framework, seen.stream) == ("cupy", stream.ptr)
        same(fetch(cupy, seen), slab.expected[::2])
    for dtype in DTYPES:
        tensor = Slab(cupy, dtype).give("torch")[:, 3:]
        producer = Producer(tensor)
        seen = arrays.view(producer)
        assert (seen.pointer, seen.strides, seen.dtype) == (tensor.data_ptr(), (COLUMNS, 1), dtype)
        assert seen.stream == producer.asked["stream"] == arrays.CUDA_STREAM_LEGACY
        assert arrays.view(producer, stream=stream.ptr).stream == producer.asked["stream"] == stream.ptr
        same(fetch(cupy, seen), tensor.view(torch.uint8).cpu().numpy().view(arrays.np_dtype(dtype)))


def test_gpu_array_is_refused_by_host(cupy: Any, torch: Any, jax: Any) -> None:
    for array in (cupy.zeros(4, "f4"), torch.zeros(4, device="cuda"), jax.numpy.zeros(4)):
        with pytest.raises(
            ArrayError, match=r"^x is a .* on device cuda:0; the host backend takes CPU arrays"
        ):
            arrays.host(array)


def test_host_results_stay_on_the_cpu(jax: Any) -> None:
    result = arrays.empty_host((64, 64), "bfloat16")
    array = arrays.to_framework(result, "jax")
    assert array.unsafe_buffer_pointer() == result.ctypes.data
    assert {device.platform for device in array.devices()} == {"cpu"}
    assert arrays.host(array).ctypes.data == result.ctypes.data


def test_view_names_the_stream_of_slow_work(cupy: Any, torch: Any) -> None:
    side = torch.cuda.Stream()
    tensor = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLOW_CYCLES)
        tensor.fill_(3)
        seen = arrays.view(tensor)
    assert seen.stream == side.cuda_stream
    assert (fetch(cupy, seen) == 3).all()

    stream = cupy.cuda.Stream(non_blocking=True)
    array = cupy.zeros(1 << 20, "f4")
    cupy.cuda.Device().synchronize()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(SLOW_CYCLES)
    with stream:
        array.fill(4)
        seen = arrays.view(array)
        assert arrays.view(CudaArray(array)).stream == stream.ptr
    assert seen.stream == stream.ptr
    assert (fetch(cupy, seen) == 4).all()


@pytest.mark.parametrize("with_stream", [True, False])
def test_view_orders_slow_jax_work(with_stream: bool, cupy: Any, jax: Any) -> None:
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 300, lambda _, y: (x @ y) / x.shape[0], x)

    run = jax.jit(slow)
    run(jax.numpy.zeros((2048, 2048))).block_until_ready()
    array = run(jax.numpy.ones((2048, 2048)))
    was_pending = not array.is_ready()
    stream = cupy.cuda.Stream(non_blocking=True)
    seen = arrays.view(array, stream=stream.ptr if with_stream else None)
    assert seen.stream == (stream.ptr if with_stream else arrays.CUDA_STREAM_LEGACY)
    still_pending = not array.is_ready()
    found = fetch(cupy, seen, stream)
    np.testing.assert_allclose(found, 1, rtol=1e-2)
    assert was_pending
    assert still_pending  # the view did not make the host wait


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_results_come_after_slow_work(framework: str, cupy: Any, torch: Any, jax: Any) -> None:
    slab = Slab(cupy, "float32", (1024, 1024))
    stream = cupy.cuda.Stream(non_blocking=True)
    other = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(SLOW_CYCLES)
    with stream:
        slab.memory.view("f4").fill(5)
    with other, torch.cuda.stream(torch.cuda.ExternalStream(other.ptr)):
        array = slab.give(framework, stream=stream.ptr)
        assert not stream.done
        doubled = array + array
        found = (
            doubled.get()
            if framework == "cupy"
            else np.asarray(doubled.cpu() if framework == "torch" else doubled)
        )
    assert (found == 10).all()


def test_graph_capture(cupy: Any, torch: Any) -> None:
    slab = Slab(cupy, "bfloat16")
    tensor = slab.give("torch")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = arrays.view(tensor)
        inside = slab.give("torch") + 1
        assert seen.stream == torch.cuda.current_stream().cuda_stream
    graph.replay()
    torch.cuda.synchronize()
    same(inside.float().cpu().numpy(), slab.expected.astype(np.float32) + 1)


def test_buffers_inside_jit(cupy: Any, jax: Any) -> None:
    callback = pytest.importorskip("jax.experimental.buffer_callback")
    views: list[arrays.ArrayView] = []

    def copy(context: Any, out: Any, x: Any) -> None:
        source, target = (arrays.view(array, stream=context.stream) for array in (x, out))
        views.extend((source, target))
        cupy.cuda.runtime.memcpyAsync(target.pointer, source.pointer, ROWS * COLUMNS * 2, 3, context.stream)

    x = jax.numpy.arange(ROWS * COLUMNS, dtype=jax.numpy.bfloat16).reshape(ROWS, COLUMNS)
    call = callback.buffer_callback(copy, jax.ShapeDtypeStruct(x.shape, x.dtype))
    found = jax.jit(lambda x: call(x * 2) + 1)(x)
    same(np.asarray(found), np.asarray(x * 2 + 1))
    assert {(seen.shape, seen.strides, seen.dtype, seen.device) for seen in views} == {
        ((ROWS, COLUMNS), (COLUMNS, 1), "bfloat16", "cuda:0")
    }


def test_host_time(cupy: Any, torch: Any, jax: Any, record_property: Any, capsys: Any) -> None:
    slab = Slab(cupy, "bfloat16")
    given = {framework: slab.give(framework) for framework in ("cupy", "torch", "jax")}
    for framework, array in given.items():
        took = {}
        for way, call in (("in", lambda a=array: arrays.view(a)), ("out", lambda f=framework: slab.give(f))):
            for _ in range(20):
                call()
            start = time.perf_counter()
            for _ in range(500):
                call()
            took[way] = (time.perf_counter() - start) / 500 * 1e6
            record_property(f"{framework}_{way}_us", took[way])
        with capsys.disabled():
            print(f" {framework}: in {took['in']:.1f} us, out {took['out']:.1f} us;", end="")
        assert max(took.values()) < 1000

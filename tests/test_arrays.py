"""Arrays of NumPy, torch and JAX on the host: same memory in and out, and clear refusals."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ep_rt import arrays, cuda_arrays, dlpack
from ep_rt.errors import ArrayError

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "uint8", "int32", "int64", "bool")
ROWS, COLUMNS = 6, 64


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


def numbered(dtype: str, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> NDArray[Any]:
    """Elements that say where they are, as far as the dtype can tell them apart."""
    array = arrays.empty_host(shape, dtype)
    array[...] = (np.arange(array.size) % 97).reshape(shape).astype(array.dtype)
    return array


def same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Producer:
    """An array known by its DLPack export only."""

    def __init__(self, array: Any, *, with_version: bool = True, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.with_version, self.device = array, with_version, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **asked: Any) -> Any:
        if not self.with_version and "max_version" in asked:
            raise TypeError("unexpected keyword max_version")
        return self.array.__dlpack__(**asked)


class CudaProducer:
    """The same over what looks like memory of the third GPU; never dereferenced.

    Attributes:
        asked: the streams that consumers named.
    """

    def __init__(self, dtype: str, *, with_version: bool = True) -> None:
        self.array, self.dtype, self.with_version = numbered(dtype), dtype, with_version
        self.asked: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 2

    def __dlpack__(self, *, stream: Any, **asked: Any) -> Any:
        if not self.with_version and "max_version" in asked:
            raise TypeError("unexpected keyword max_version")
        self.asked.append(stream)
        capsule = self.array.view(f"u{self.array.itemsize}").__dlpack__()
        dlpack.relabel(capsule, cuda_index=2, dtype=self.dtype)
        return capsule


class CudaArray:
    """Looks like device memory; never dereferenced."""

    def __init__(self, typestr: str = "<f4", **facts: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (4, 8),
            "typestr": typestr,
            "data": (4096, False),
            "version": 3,
            **facts,
        }


# -- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_names_round_trip(dtype: str, torch: Any, jax: Any) -> None:
    kind = arrays.np_dtype(dtype)
    for spelling in (dtype, kind, kind.type, getattr(torch, dtype), getattr(jax.numpy, dtype, kind)):
        assert arrays.dtype_name(spelling) == dtype


@pytest.mark.parametrize(
    "dtype", ["float64", ">f4", "int8", "nonsense", np.float64, object, np.dtype(">i4"), 7]
)
def test_dtype_refused(dtype: Any) -> None:
    with pytest.raises(ArrayError, match=r"accepted dtypes are float32, .*bool"):
        arrays.dtype_name(dtype)


def test_np_dtype_takes_names_only() -> None:
    assert arrays.np_dtype("bfloat16") == ml_dtypes.bfloat16
    with pytest.raises(ArrayError, match="'float64'"):
        arrays.np_dtype("float64")


@pytest.mark.parametrize("shape", [(), (0, 128), (1,), (3, 5), (1000, 7)])
def test_empty_host_is_aligned(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        array = arrays.empty_host(shape, dtype)
        assert array.shape == shape
        assert array.dtype == arrays.np_dtype(dtype)
        assert array.size == 0 or address(array) % 128 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert arrays.empty_host((2, 3), np.dtype(np.float64)).dtype == np.float64


# -- NumPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_and_out(dtype: str) -> None:
    array = numbered(dtype)
    seen = arrays.view(array)
    assert (seen.shape, seen.strides) == ((ROWS, COLUMNS), (COLUMNS, 1))
    assert (seen.dtype, seen.device, seen.framework) == (dtype, "cpu", "numpy")
    assert seen.pointer == address(array)
    assert seen.owner is array
    assert seen.stream is None
    assert arrays.host(array) is array
    assert arrays.to_framework(array, "numpy") is array


def test_numpy_strides() -> None:
    array = numbered("bfloat16")
    for part in (array[::2, 8:40], array.T, array[::-1], np.broadcast_to(array[0], (5, COLUMNS)), array[2:2]):
        seen = arrays.view(part)
        assert seen.shape == part.shape
        if part.size:
            assert seen.strides == tuple(stride // 2 for stride in part.strides)
            assert seen.pointer == address(part)
        same(arrays.host(part), part)


def test_numpy_read_only() -> None:
    array = numbered("float32")
    array.flags.writeable = False
    assert arrays.view(array).readonly
    assert arrays.host(array) is array
    with pytest.raises(ArrayError, match=r"out is a read-only numpy.ndarray"):
        arrays.host(array, name="out", writable=True)


def test_numpy_subclass_becomes_plain(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(4, 8))
    found = arrays.host(mapped)
    assert type(found) is np.ndarray
    assert address(found) == address(mapped)


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros(4), "numpy.ndarray of dtype float64"),
        (np.zeros(4, ">f4"), "of dtype >f4"),
        (np.zeros(4, object), "of dtype object"),
        (np.zeros(4, np.int8), "of dtype int8"),
        (np.zeros(4, np.complex64), "of dtype complex64"),
        (np.zeros(4, [("a", "f4")]), "of dtype void32"),
        (np.zeros(9, np.uint8)[1:].view(np.float32), "not aligned to 4 bytes"),
        (np.zeros(4, [("a", "u1"), ("b", "f4")])["b"], "not aligned to 4 bytes"),
        (np.ma.masked_array(np.zeros(4, np.float32)), "without the mask"),
        ([1.0, 2.0], "is a list; expected an array"),
        (None, "is a NoneType; expected an array"),
        (3.0, "is a float; expected an array"),
        (memoryview(b"abc"), "is a memoryview; expected an array"),
    ],
)
def test_refused_with_the_name(given: Any, said: str) -> None:
    with pytest.raises(ArrayError, match=r"^topk_weights is a ") as caught:
        arrays.host(given, name="topk_weights")
    assert said in str(caught.value)
    assert "accepted dtypes are float32" in str(caught.value) or "dtype" not in said


def test_cuda_array_is_refused_by_host() -> None:
    with pytest.raises(ArrayError, match=r"x is a .*CudaArray on device cuda.*host backend takes CPU arrays"):
        arrays.host(CudaArray())


def test_cuda_array_interface_facts() -> None:
    seen = arrays.view(CudaArray(strides=(64, 4), stream=77, data=(8192, True)))
    assert (seen.shape, seen.strides, seen.dtype) == ((4, 8), (16, 1), "float32")
    assert (seen.pointer, seen.stream, seen.readonly) == (8192, 77, True)
    assert seen.device.startswith("cuda")
    assert arrays.view(CudaArray()).strides == (8, 1)
    assert arrays.view(CudaArray()).stream is None
    for given, said in (
        (CudaArray("<f8"), "float64"),
        (CudaArray("<V2"), "void16"),
        (CudaArray("?!"), r"\?!"),
    ):
        with pytest.raises(ArrayError, match=f"of dtype {said}; accepted"):
            arrays.view(given)
    with pytest.raises(ArrayError, match="without the mask"):
        arrays.view(CudaArray(mask=np.zeros(4)))


@pytest.mark.parametrize(("said", "waited_for"), [(None, None), (0, 1), (1, 1), (2, 2), (4096, 4096)])
def test_cuda_array_interface_names_its_stream(said: int | None, waited_for: int | None) -> None:
    """0 is the legacy default stream by another name. Whoever reads the array is not asked."""
    for consumer in (None, 77):
        assert arrays.view(CudaArray(stream=said), stream=consumer).stream == waited_for


def test_unknown_framework() -> None:
    array = numbered("float32")
    with pytest.raises(ArrayError, match="not to 'cupy'"):
        arrays.to_framework(array, "cupy")
    for device in ("cpu", "cuda", "cuda:x"):
        with pytest.raises(ArrayError, match="cuda:N"):
            arrays.cuda_to_framework(4096, (4,), "float32", device=device, framework="cupy", owner=None)
    with pytest.raises(ArrayError, match="not to 'tensorflow'"):
        arrays.cuda_to_framework(4096, (4,), "float32", device="cuda:0", framework="tensorflow", owner=None)


# -- torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_and_out(dtype: str, torch: Any) -> None:
    expected = numbered(dtype)
    tensor = arrays.to_framework(expected, "torch")
    assert tensor.dtype == getattr(torch, dtype)
    assert tuple(tensor.shape) == expected.shape
    assert tensor.data_ptr() == address(expected)

    own = tensor.clone()
    seen = arrays.view(own)
    assert (seen.dtype, seen.device, seen.framework) == (dtype, "cpu", "torch")
    assert (seen.pointer, seen.strides) == (own.data_ptr(), (COLUMNS, 1))
    found = arrays.host(own, writable=True)
    assert address(found) == own.data_ptr()
    same(found, expected)
    found[0, 0] = 1
    assert own[0, 0].to(torch.float32) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_strides_and_gradients(dtype: str, torch: Any) -> None:
    expected = numbered(dtype)
    tensor = arrays.to_framework(expected, "torch").clone()
    cuts: list[Callable[[Any], Any]] = [
        lambda a: a[::2, 8:40],
        lambda a: a[1:, 3],
        lambda a: a.T,
        lambda a: a[2:2],
    ]
    for cut in cuts:
        found = arrays.host(cut(tensor))
        same(found, cut(expected))
        if found.size:
            assert address(found) == cut(tensor).data_ptr()
    if dtype in ("float32", "float16", "bfloat16"):
        wanted = tensor.requires_grad_()
        assert address(arrays.host(wanted)) == wanted.data_ptr()
        assert address(arrays.host(torch.nn.Parameter(tensor.detach()))) == tensor.data_ptr()


def test_torch_memory_outlives_the_tensor(torch: Any) -> None:
    tensor = torch.full((1 << 16,), 7.0)
    storage_gone = weakref.ref(tensor)
    found = arrays.host(tensor)[5:]
    del tensor
    gc.collect()
    assert storage_gone() is not None
    assert found[0] == 7.0
    del found
    gc.collect()
    assert storage_gone() is None


def test_undisturbed_by_modes_of_torch(torch: Any) -> None:
    x = torch.ones(3)
    asked = []

    class Listening(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            return func(*args, **(kwargs or {}))

    assert cuda_arrays.undisturbed(x.stride, 0) == 1
    with Listening():
        assert cuda_arrays.undisturbed(x.stride, 0) == 1
        assert not asked
        x.stride(0)
        assert len(asked) == 1


def test_torch_refusals(torch: Any) -> None:
    given = {
        "of dtype float64": torch.zeros(4, dtype=torch.float64),
        "of dtype float8_e5m2": torch.zeros(4, dtype=torch.float8_e5m2),
        "on device meta": torch.zeros(4, device="meta"),
        "layout torch.sparse_coo": torch.zeros(4, 4).to_sparse(),
        "pending negation": torch.zeros(4, dtype=torch.complex64).conj().imag,
    }
    for said, tensor in given.items():
        with pytest.raises(ArrayError, match=f"^y is a torch.Tensor .*{said}"):
            arrays.host(tensor, name="y")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_torch_fake_tensor_has_no_memory(torch: Any) -> None:
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        tensor = torch.zeros(4)
    with pytest.raises(ArrayError, match="memory of its own"):
        arrays.host(tensor)


# -- JAX ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "int64"])
def test_jax_in_and_out(dtype: str, jax: Any) -> None:
    for shape in ((ROWS, COLUMNS), (1,), (), (3, 5), (2000, 129)):
        expected = numbered(dtype, shape)
        array = arrays.to_framework(expected, "jax")
        assert isinstance(array, jax.Array)
        assert array.shape == shape
        assert array.dtype == expected.dtype
        assert array.unsafe_buffer_pointer() == address(expected)

        own = jax.numpy.array(expected)
        seen = arrays.view(own)
        assert (seen.dtype, seen.device, seen.framework, seen.readonly) == (dtype, "cpu", "jax", True)
        assert seen.pointer == own.unsafe_buffer_pointer()
        found = arrays.host(own)
        assert address(found) == own.unsafe_buffer_pointer()
        assert not found.flags.writeable
        same(found, expected)


def test_jax_rows_of_a_result_are_shared(jax: Any) -> None:
    buffer = numbered("bfloat16")
    array = arrays.to_framework(buffer[2:], "jax")
    assert array.unsafe_buffer_pointer() == address(buffer[2:])
    same(np.asarray(arrays.to_framework(buffer[:, 3:5], "jax")), buffer[:, 3:5])  # a copy, but right


def test_jax_empty(jax: Any) -> None:
    array = arrays.to_framework(arrays.empty_host((0, 64), "bfloat16"), "jax")
    assert (array.shape, array.dtype) == ((0, 64), jax.numpy.bfloat16)
    assert arrays.host(array).shape == (0, 64)


def test_jax_int64(jax: Any) -> None:
    indices = numbered("int64")
    narrow = arrays.to_framework(indices, "jax")
    assert narrow.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(narrow), indices)
    indices[0, 0] = 1 << 40
    with pytest.raises(ArrayError, match="jax_enable_x64"):
        arrays.to_framework(indices, "jax")
    jax.config.update("jax_enable_x64", True)
    try:
        wide = arrays.to_framework(indices, "jax")
        assert wide.dtype == np.int64
        assert wide.unsafe_buffer_pointer() == address(indices)
        assert address(arrays.host(wide)) == address(indices)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_jax_waits_for_the_computation(jax: Any) -> None:
    start = jax.numpy.ones((600, 600))
    pending = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: (x @ y) / 600, x))(start)
    same(arrays.host(pending), np.ones((600, 600), np.float32))


def test_jax_cannot_donate_what_is_viewed(jax: Any) -> None:
    array = jax.numpy.arange(1 << 14, dtype=np.float32)
    found = arrays.host(array)
    jax.jit(lambda x: x * 0, donate_argnums=0)(array).block_until_ready()
    del array
    gc.collect()
    np.testing.assert_array_equal(found, np.arange(1 << 14, dtype=np.float32))


def test_jax_keeps_our_memory(jax: Any) -> None:
    array = arrays.to_framework(numbered("float32", (512, 512)), "jax")
    gc.collect()
    junk = [arrays.empty_host((512, 512), "float32") for _ in range(4)]
    for other in junk:
        other[...] = -1
    same(np.asarray(array), numbered("float32", (512, 512)))


def test_jax_result_mixes_with_others(jax: Any) -> None:
    array = arrays.to_framework(numbered("float32"), "jax")
    same(np.asarray(jax.jit(lambda x, y: x + y)(array, jax.numpy.ones_like(array))), numbered("float32") + 1)


def test_jax_refusals(jax: Any) -> None:
    deleted = jax.numpy.ones(4)
    deleted.delete()
    with pytest.raises(ArrayError, match=r"x is a .* deleted or donated"):
        arrays.host(deleted)
    with pytest.raises(ArrayError, match=r"of dtype .*accepted dtypes"):
        arrays.host(jax.numpy.ones(4, np.int8))
    with pytest.raises(ArrayError, match="read-only"):
        arrays.host(jax.numpy.ones(4), writable=True)
    with pytest.raises(ArrayError, match="traced"):
        jax.jit(arrays.host)(jax.numpy.ones(4))


def test_jax_array_over_two_devices(jax: Any) -> None:
    code = (
        "import jax, ep_rt.arrays as arrays, numpy as np\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "mesh = jax.make_mesh((2,), ('i',))\n"
        "spread = jax.device_put(np.ones(4, np.float32), jax.NamedSharding(mesh, jax.P('i')))\n"
        "try: arrays.host(spread)\n"
        "except arrays.ArrayError as error: assert 'spread over 2 devices' in str(error), error\n"
        "else: raise SystemExit('accepted')\n"
        "second = jax.device_put(np.ones(4, np.float32), jax.devices()[1])\n"
        "found = arrays.to_framework(arrays.host(spread.addressable_shards[1].data), 'jax')\n"
        "assert (second[:2] + found).devices() == {jax.devices()[1]}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- other DLPack producers --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_version", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack_producer(dtype: str, with_version: bool, torch: Any) -> None:
    tensor = arrays.to_framework(numbered(dtype), "torch")[::2, 8:40]
    found = arrays.host(Producer(tensor, with_version=with_version))
    assert address(found) == tensor.data_ptr()
    same(found, numbered(dtype)[::2, 8:40])
    assert arrays.view(Producer(tensor)).framework == "numpy"


def test_dlpack_producer_of_read_only_memory() -> None:
    array = numbered("float32")
    array.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("this NumPy exports no read-only memory")
    assert not arrays.host(Producer(array)).flags.writeable


@pytest.mark.parametrize("with_version", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack_producer_on_a_gpu_orders_the_stream_of_the_consumer(dtype: str, with_version: bool) -> None:
    producer = CudaProducer(dtype, with_version=with_version)
    seen = arrays.view(producer, stream=77)
    assert (seen.shape, seen.strides, seen.dtype) == ((ROWS, COLUMNS), (COLUMNS, 1), dtype)
    assert (seen.device, seen.framework, seen.pointer) == ("cuda:2", "cupy", address(producer.array))
    assert producer.asked == [seen.stream] == [77]
    # Without one it is the legacy default stream, which DLPack has no other number for.
    for nobody in (None, 0):
        assert arrays.view(producer, stream=nobody).stream == arrays.CUDA_STREAM_LEGACY
    assert producer.asked == [77, arrays.CUDA_STREAM_LEGACY, arrays.CUDA_STREAM_LEGACY]


def test_dlpack_memory_is_released() -> None:
    base = numbered("float32")
    gone = weakref.ref(base)
    found = arrays.host(Producer(base))[1:]
    del base
    gc.collect()
    assert gone() is not None
    assert found[0, 0] == COLUMNS
    del found
    gc.collect()
    assert gone() is None


def test_dlpack_refusals(torch: Any) -> None:
    given: dict[str, Callable[[], Producer]] = {
        "of dtype .DLPack code 2, 64 bits": lambda: Producer(np.zeros(4)),
        "DLPack device type 10": lambda: Producer(np.zeros(4, np.float32), device=(10, 0)),
        "DLPack cannot export": lambda: Producer(torch.zeros(4, requires_grad=True)),
    }
    for said, make in given.items():
        with pytest.raises(ArrayError, match=f"bias is a .*Producer .*{said}"):
            arrays.host(make(), name="bias")


# -- loading -----------------------------------------------------------------------------------------------


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, numpy as np, ep_rt.arrays as arrays\n"
        "arrays.host(np.zeros((2, 3), np.float32))\n"
        "found = {'torch', 'jax', 'cupy'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {found}' if found else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

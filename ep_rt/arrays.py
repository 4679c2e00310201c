"""Arrays of any framework in, arrays of the caller's framework out, nothing copied.

The only room that knows frameworks. They are recognised by what is loaded already and imported only
inside the functions that use them. Every array becomes an `ArrayView` (an address with a shape); the
host backend reads it as NumPy through `host`, the CUDA engine takes the address.

What is zero copy, by framework (tests compare pointers):

===============  =============================================  =================================
framework        in                                             out
===============  =============================================  =================================
NumPy            every dtype, any strides, read-only too        the array itself
torch, CPU       every dtype, any strides, ``requires_grad``    every dtype
JAX, CPU         every dtype; the view is read-only and keeps   every dtype, C-contiguous and
                 JAX from donating the memory                   64-byte aligned; else copied
other DLPack     every dtype, any strides                       comes back as NumPy or CuPy
CuPy             every dtype, any strides                       all but float8, which stays uint8
torch, CUDA      every dtype, any strides, ``requires_grad``    every dtype
JAX, CUDA        every dtype                                    every dtype
===============  =============================================  =================================

One conversion narrows: int64 becomes int32 in JAX unless ``jax_enable_x64`` is set, as everywhere in JAX.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import dlpack
from .errors import ArrayError

HOST_ALIGN_BYTES = 128
CUDA_STREAM_LEGACY = 1

_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "float32": np.dtype(np.float32),
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "uint8": np.dtype(np.uint8),
        "int32": np.dtype(np.int32),
        "int64": np.dtype(np.int64),
        "bool": np.dtype(np.bool_),
    }
)
_BITS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(f"u{dtype.itemsize}") for name, dtype in _DTYPES.items()}
)
_NAMES: Mapping[np.dtype[Any], str] = MappingProxyType({dtype: name for name, dtype in _DTYPES.items()})


@dataclass(frozen=True, slots=True)
class ArrayView:
    """Any framework's array, seen without a copy.

    `strides` count elements. `owner` keeps the memory alive. `stream` is the CUDA stream (an integer, never
    0: the legacy default stream is 1) that must be waited for before the contents are read; None when there
    is nothing to wait for. `framework` names where results go back to: plain producers get NumPy or CuPy.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    pointer: int
    framework: str
    owner: object
    stream: int | None = None
    readonly: bool = False

    def numpy(self) -> NDArray[Any]:
        """CPU memory as a NumPy array (ml_dtypes for bfloat16 and float8_e4m3fn) that keeps `owner` alive."""
        if not self.pointer:  # NumPy takes no null address, and an empty array needs none
            return np.empty(self.shape, _DTYPES[self.dtype])
        return np.asarray(_Memory(self)).view(_DTYPES[self.dtype])


def np_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype (ml_dtypes for bfloat16 and float8_e4m3fn) called `name`; ArrayError if unknown."""
    if name not in _DTYPES:
        raise _dtype_error(f"dtype {name!r} is not known")
    return _DTYPES[name]


def dtype_name(dtype: object) -> str:
    """The name of a dtype of NumPy, torch or JAX, or of a string; ArrayError if ep_rt does not carry it."""
    if isinstance(dtype, str):
        found = dtype
    elif type(dtype).__module__ == "torch":
        found = _torch_dtype_name(dtype)
    else:
        try:
            found = _numpy_dtype_name(np.dtype(dtype))  # type: ignore[call-overload]
        except TypeError:
            found = repr(dtype)
    if found not in _DTYPES:
        raise _dtype_error(f"dtype {found!r} is not accepted")
    return found


def empty_host(shape: Sequence[int], dtype: str | np.dtype[Any]) -> NDArray[Any]:
    """Uninitialised C-contiguous array, 128-byte aligned, so that JAX can take it over without a copy."""
    kind = np_dtype(dtype) if isinstance(dtype, str) else dtype
    num_bytes = prod(shape) * kind.itemsize
    raw = np.empty(num_bytes + HOST_ALIGN_BYTES, np.uint8)
    offset = -raw.ctypes.data % HOST_ALIGN_BYTES
    return raw[offset : offset + num_bytes].view(kind).reshape(shape)


def view(obj: object, *, name: str = "x", stream: int | None = None) -> ArrayView:
    """See an array of any framework as address, shape, strides, dtype and device.

    Args:
        obj: NumPy, CuPy, torch or JAX array, or a producer of DLPack or ``__cuda_array_interface__``;
            float32, float16, bfloat16, float8_e4m3fn, uint8, int32, int64 or bool. On CPU or CUDA.
        name: of the argument, for the message.
        stream: CUDA stream of the consumer. JAX and DLPack producers order their work before it; without it
            they do so before the legacy default stream. Where the producer has a current stream (CuPy, torch)
            or declares one, nothing is enqueued and that stream is returned instead.

    Returns:
        ArrayView. Its `stream`, if not None, must be waited for, which costs nothing when it is `stream`.

    Raises:
        ArrayError: not an array, or of a dtype, layout or device ep_rt does not carry.

    Host wait: for JAX CPU arrays still being computed; else none.
    """
    what = f"{name} is a {_kind(obj)}"
    if isinstance(obj, np.ndarray):
        return _view_numpy(obj, what)
    if _is(obj, "torch", "Tensor"):
        return _view_torch(obj, what)
    if _is(obj, "cupy", "ndarray"):
        return _view_cupy(obj, what)
    if _is(obj, "jax", "Array"):
        return _view_jax(obj, what, stream)
    if hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__"):
        return _view_dlpack(obj, what, stream)
    if isinstance(obj, ArrayView):
        return obj
    if hasattr(obj, "__cuda_array_interface__"):
        return _view_cuda_array_interface(obj, what)
    raise ArrayError(
        f"{what}; expected an array of NumPy, CuPy, PyTorch or JAX, "
        "or an object with __dlpack__ or __cuda_array_interface__"
    )


def host(obj: object, *, name: str = "x", writable: bool = False) -> NDArray[Any]:
    """The same memory as a NumPy array (ml_dtypes for bfloat16 and float8_e4m3fn), strides kept.

    Args:
        obj: CPU array of any framework, see `view`.
        name: of the argument, for the message.
        writable: the caller will write into it; JAX arrays and read-only NumPy arrays are then refused.

    Raises:
        ArrayError: see `view`; or `obj` lies on a GPU; or it cannot be written and must be.
    """
    seen = view(obj, name=name)
    if seen.device != "cpu":
        raise ArrayError(
            f"{name} is a {_kind(obj)} on device {seen.device}; the host backend takes CPU arrays: "
            "move it to the CPU, or use backend='cuda'"
        )
    if writable and seen.readonly:
        raise ArrayError(f"{name} is a read-only {_kind(obj)}; it is written to, so pass a writable array")
    return np.asarray(obj) if isinstance(obj, np.ndarray) else seen.numpy()


def to_framework(array: NDArray[Any], framework: str) -> Any:
    """Hand a host result to the caller's framework: "numpy", "torch" or "jax". Shares memory.

    JAX arrays are immutable and may hold this very memory, so nobody writes to `array` afterwards. JAX shares
    C-contiguous, 64-byte aligned memory (whole arrays from `empty_host`) and copies anything else. Where JAX
    runs on CPUs the result is uncommitted, so it mixes with arrays on any of its devices.

    Raises:
        ArrayError: unknown framework; or an int64 value that JAX without ``jax_enable_x64`` cannot hold.
    """
    if framework == "numpy":
        return array
    if framework == "torch":
        torch = _load("torch")
        dtype = dtype_name(array.dtype)
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if dtype == "float8_e4m3fn":
            return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(array)
    if framework == "jax":
        jax = _load("jax")
        if array.dtype == np.int64 and not jax.config.jax_enable_x64:
            narrow = empty_host(array.shape, "int32")
            narrow[...] = array
            if not np.array_equal(narrow, array):
                raise ArrayError("int64 values beyond int32 need jax_enable_x64 to become a JAX array")
            array = narrow
        with_accelerator = jax.default_backend() != "cpu"
        device = jax.local_devices(backend="cpu")[0] if with_accelerator else None
        # jnp.asarray copies NumPy memory whatever its alignment; device_put with may_alias takes it over.
        return jax.device_put(array, device, may_alias=True)
    raise ArrayError(f"host results go to numpy, torch or jax, not to {framework!r}")


def cuda_to_framework(
    pointer: int,
    shape: Sequence[int],
    dtype: str,
    *,
    device: str,
    framework: str,
    owner: object,
    stream: int | None = None,
) -> Any:
    """Hand device memory to the caller's framework: "cupy", "torch" or "jax". Shares memory.

    Args:
        pointer, shape, dtype: C-contiguous array; the address on `device`, ``"cuda:N"``.
        owner: kept alive as long as the result or any view of it. It may be released on any thread.
        stream: work enqueued there so far comes before what the framework enqueues on its current stream
            (JAX: on its own). None: the caller has ordered them.

    Returns:
        The array. CuPy has no float8: it gets the bytes as uint8. JAX without ``jax_enable_x64`` copies
        int64 into int32.

    Raises:
        ArrayError: unknown framework or device.

    Host wait: none.
    """
    index = cuda_index(device)
    if framework == "cupy":
        cupy = _load("cupy")
        if stream is not None:
            _order(stream, before=cupy.cuda.get_current_stream(index).ptr, device=index)
        kind = np_dtype("uint8" if dtype == "float8_e4m3fn" else dtype)
        memory = cupy.cuda.UnownedMemory(pointer, prod(shape) * kind.itemsize, owner, index)
        return cupy.ndarray(tuple(shape), kind, cupy.cuda.MemoryPointer(memory, 0))
    seen = ArrayView(tuple(shape), _contiguous_strides(shape), dtype, device, pointer, framework, owner)
    if framework == "torch":
        torch = _load("torch")
        if stream is not None:
            _order(stream, before=torch.cuda.current_stream(index).cuda_stream, device=index)
        # Through uint8, so that a torch older than DLPack's float8 takes it too.
        with_float8 = dtype == "float8_e4m3fn"
        tensor = torch.utils.dlpack.from_dlpack(_cuda_capsule(seen, "uint8" if with_float8 else dtype))
        return tensor.view(torch.float8_e4m3fn) if with_float8 else tensor
    if framework == "jax":
        return _load("jax.dlpack").from_dlpack(_DeviceExport(seen, after=stream))
    raise ArrayError(f"device results go to cupy, torch or jax, not to {framework!r}")


class TensorPlace(NamedTuple):
    """An array inside an allocation: `offset` in bytes, a multiple of its itemsize; `strides` in bytes, None
    where it is C-contiguous."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    strides: tuple[int, ...] | None = None


def torch_tensors(
    places: Sequence[TensorPlace | None], pointer: int, *, device: int, owner: object
) -> list[Any]:
    """`cuda_to_framework` for several torch tensors over one allocation, the shortest way.

    Each has a version counter of its own, as autograd wants it; views of one tensor would share one. None
    among the places gives None.
    """
    from_dlpack = _load("torch").utils.dlpack.from_dlpack
    whole = _FromHere.from_address(pointer)
    whole.owner = owner
    made: list[Any] = []
    for place in places:
        if place is None:
            made.append(None)
            continue
        shape, dtype, offset, strides = place
        with_float8 = dtype == "float8_e4m3fn"  # through uint8, as in `cuda_to_framework`
        capsule = np.ndarray(shape, _BITS[dtype], whole, offset, strides).__dlpack__()
        dlpack.relabel(capsule, cuda_index=device, dtype="uint8" if with_float8 else dtype)
        tensor = from_dlpack(capsule)
        made.append(tensor.view(_load("torch").float8_e4m3fn) if with_float8 else tensor)
    return made


def current_device() -> int | None:
    """The CUDA device that is current in this thread; None where no loaded framework uses one."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_device())
    try:
        return None if cupy is None else int(cupy.cuda.runtime.getDevice())
    except RuntimeError:  # no driver, or no device
        return None


def current_streams(device: int, framework: str | None = None) -> tuple[int, ...]:
    """CUDA streams that are current in this thread: of one framework, or of all that are loaded; distinct.

    JAX has none: it orders its arrays itself, when they are exported and imported.
    """
    streams = []
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if framework in (None, "torch") and torch is not None and torch.cuda.is_initialized():
        streams.append(torch.cuda.current_stream(device).cuda_stream)
    if framework in (None, "cupy") and cupy is not None:
        streams.append(cupy.cuda.get_current_stream(device).ptr)
    return tuple(dict.fromkeys(stream or CUDA_STREAM_LEGACY for stream in streams))


# -- recognising ---------------------------------------------------------------------------------------


def _is(obj: object, module: str, type_name: str) -> bool:
    # An array of a framework exists only after its module was imported.
    kind = getattr(sys.modules.get(module), type_name, None)
    return kind is not None and isinstance(obj, kind)


def _load(module: str) -> Any:
    return sys.modules.get(module) or importlib.import_module(module)


def _kind(obj: object) -> str:
    kind = type(obj)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _dtype_error(what: str) -> ArrayError:
    return ArrayError(f"{what}; accepted dtypes are {', '.join(_DTYPES)}")


def _numpy_dtype_name(dtype: np.dtype[Any]) -> str:
    # NumPy builds `name` anew each time, which takes longer than all else here.
    return _NAMES.get(dtype) or (dtype.name if dtype.isnative else str(dtype))


def _torch_dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def cuda_index(device: str) -> int:
    """N of the device ``"cuda:N"``."""
    if device.startswith("cuda:") and device[5:].isdigit():
        return int(device[5:])
    raise ArrayError(f"device {device!r} is not of the form 'cuda:N'")


# -- in ------------------------------------------------------------------------------------------------


def _strided(
    what: str,
    *,
    shape: Sequence[int],
    strides_bytes: Sequence[int] | None,
    dtype: str,
    device: str,
    pointer: int,
    framework: str,
    owner: object,
    stream: int | None = None,
    readonly: bool = False,
) -> ArrayView:
    if dtype not in _DTYPES:
        raise _dtype_error(f"{what} of dtype {dtype}")
    itemsize = _DTYPES[dtype].itemsize
    num_elements = prod(shape)
    if strides_bytes is None or num_elements == 0:
        strides = _contiguous_strides(shape)
    elif pointer % itemsize or any(stride % itemsize for stride in strides_bytes):
        raise ArrayError(f"{what} whose elements are not aligned to {itemsize} bytes; copy it")
    else:
        strides = tuple(stride // itemsize for stride in strides_bytes)
    if num_elements and not pointer:
        raise ArrayError(f"{what} without memory of its own (fake, lazy or distributed)")
    if stream == 0:
        stream = CUDA_STREAM_LEGACY
    return ArrayView(tuple(shape), strides, dtype, device, pointer, framework, owner, stream, readonly)


def _view_numpy(obj: NDArray[Any], what: str) -> ArrayView:
    if isinstance(obj, np.ma.MaskedArray):
        raise ArrayError(f"{what}; pass its data without the mask")
    return _strided(
        what,
        shape=obj.shape,
        strides_bytes=obj.strides,
        dtype=_numpy_dtype_name(obj.dtype),
        device="cpu",
        pointer=obj.ctypes.data,
        framework="numpy",
        owner=obj,
        readonly=not obj.flags.writeable,
    )


def _view_torch(obj: Any, what: str) -> ArrayView:
    device = obj.device.type
    if device not in ("cpu", "cuda"):
        raise ArrayError(f"{what} on device {obj.device}; accepted devices are cpu and cuda")
    if str(obj.layout) != "torch.strided":
        raise ArrayError(f"{what} of layout {obj.layout}; make it dense")
    if obj.is_neg():
        raise ArrayError(f"{what} with a pending negation; call resolve_neg() on it")
    try:
        pointer = obj.data_ptr()
    except RuntimeError as error:
        raise ArrayError(f"{what} without memory of its own: {error}") from error
    on_cuda = device == "cuda"
    return _strided(
        what,
        shape=tuple(obj.shape),
        strides_bytes=[stride * obj.element_size() for stride in obj.stride()],
        dtype=_torch_dtype_name(obj.dtype),
        device=f"cuda:{obj.device.index}" if on_cuda else "cpu",
        pointer=pointer,
        framework="torch",
        owner=obj,
        stream=_load("torch").cuda.current_stream(obj.device).cuda_stream if on_cuda else None,
    )


def _view_cupy(obj: Any, what: str) -> ArrayView:
    index = obj.device.id
    return _strided(
        what,
        shape=obj.shape,
        strides_bytes=obj.strides,
        dtype=_numpy_dtype_name(obj.dtype),
        device=f"cuda:{index}",
        pointer=obj.data.ptr,
        framework="cupy",
        owner=obj,
        stream=_load("cupy").cuda.get_current_stream(index).ptr,
    )


def _view_jax(obj: Any, what: str, stream: int | None) -> ArrayView:
    if _is(obj, "jax.core", "Tracer"):
        raise ArrayError(f"{what}, traced, so it has no memory yet; call outside jit")
    if obj.is_deleted():
        raise ArrayError(f"{what} that was deleted or donated")
    if len(obj.sharding.device_set) != 1:
        raise ArrayError(f"{what} spread over {len(obj.sharding.device_set)} devices; pass one shard")
    # The capsule holds a reference to the buffer, so JAX cannot donate it while the view lives.
    return _view_dlpack(obj, what, stream, framework="jax")


def _view_cuda_array_interface(obj: Any, what: str) -> ArrayView:
    facts = obj.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise ArrayError(f"{what} with a mask; pass its data without the mask")
    try:
        dtype = _numpy_dtype_name(np.dtype(facts["typestr"]))
    except TypeError:
        dtype = facts["typestr"]
    pointer, readonly = facts["data"]
    return _strided(
        what,
        shape=facts["shape"],
        strides_bytes=facts.get("strides"),
        dtype=dtype,
        device=_device_of(pointer),
        pointer=pointer,
        framework="cupy",
        owner=obj,
        stream=facts.get("stream"),
        readonly=readonly,
    )


def _device_of(pointer: int) -> str:
    try:
        return f"cuda:{_load('cupy').cuda.runtime.pointerGetAttributes(pointer).device}"
    except Exception:  # no CuPy or no driver: on some CUDA device, we cannot tell which
        return "cuda"


def _view_dlpack(obj: Any, what: str, stream: int | None, framework: str | None = None) -> ArrayView:
    device_type = int(obj.__dlpack_device__()[0])
    on_cuda = device_type in dlpack.CUDA_DEVICE_TYPES
    if not on_cuda and device_type not in dlpack.HOST_DEVICE_TYPES:
        raise ArrayError(f"{what} on DLPack device type {device_type}; accepted are CPU and CUDA")
    stream = (stream or CUDA_STREAM_LEGACY) if on_cuda else None
    ordered = {} if stream is None else {"stream": stream}
    try:
        try:
            capsule = obj.__dlpack__(max_version=(1, 1), **ordered)
        except TypeError:  # a producer older than DLPack 1.0
            capsule = obj.__dlpack__(**ordered)
    except Exception as error:
        raise ArrayError(f"{what} that DLPack cannot export: {error}") from error
    # The capsule is never consumed: it is the owner, and dropping it releases the producer's memory.
    tensor, readonly = dlpack.open_capsule(capsule)
    return _strided(
        what,
        shape=tensor.shape[: tensor.ndim],
        strides_bytes=tensor.strides_bytes(),
        dtype=tensor.dtype_name(),
        device=f"cuda:{tensor.device_id}" if on_cuda else "cpu",
        pointer=(tensor.data or 0) + tensor.byte_offset,
        framework=framework or ("cupy" if on_cuda else "numpy"),
        owner=capsule,
        stream=stream,
        readonly=readonly or framework == "jax",
    )


# -- out -----------------------------------------------------------------------------------------------


class _Memory:
    """What NumPy needs to see `seen` as an array, and to keep it alive."""

    def __init__(self, seen: ArrayView) -> None:
        itemsize = _DTYPES[seen.dtype].itemsize
        self.seen = seen
        self.__array_interface__ = {
            "version": 3,
            "data": (seen.pointer, seen.readonly),
            "shape": seen.shape,
            "strides": tuple(stride * itemsize for stride in seen.strides),
            "typestr": np.dtype(f"u{itemsize}").str,
        }


class _FromHere(ctypes.c_uint8 * (1 << 46)):  # type: ignore[misc]
    """Memory from an address on, longer than any; `owner` is kept.

    NumPy takes it in a fifth of the time that it takes an `__array_interface__`.
    """

    owner: object


def _cuda_capsule(seen: ArrayView, dtype: str) -> object:
    """A DLPack capsule over device memory.

    NumPy makes it, over the same address as if it were host memory, and only its device and type are set
    here: NumPy never touches the elements, and its C deleter holds the GIL and is safe while Python exits.
    """
    itemsize = _DTYPES[seen.dtype].itemsize
    if seen.pointer:
        capsule = np.asarray(_Memory(seen)).__dlpack__()
    else:
        capsule = np.empty(seen.shape, f"u{itemsize}").__dlpack__()
    dlpack.relabel(capsule, cuda_index=cuda_index(seen.device), dtype=dtype)
    return capsule


class _DeviceExport:
    """A producer over device memory, for consumers that hand over their stream."""

    def __init__(self, seen: ArrayView, *, after: int | None) -> None:
        self.seen = seen
        self.after = after

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA_DEVICE_TYPES[0], cuda_index(self.seen.device)

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        # -1: the consumer asks for no ordering.
        if self.after is not None and stream != -1:
            _order(self.after, before=stream or CUDA_STREAM_LEGACY, device=cuda_index(self.seen.device))
        return _cuda_capsule(self.seen, self.seen.dtype)


def _order(stream: int, *, before: int, device: int) -> None:
    """Let the stream `before` wait for the work enqueued on `stream` so far."""
    if stream == before:
        return
    cuda = _load("cupy").cuda
    with cuda.Device(device):
        event = cuda.Event(disable_timing=True)
        cuda.runtime.eventRecord(event.ptr, stream)
        cuda.runtime.streamWaitEvent(before, event.ptr)

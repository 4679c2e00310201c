"""Kernels on the current device: loaded once, arguments packed once, one driver call per launch."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ArrayError, BackendError, DeviceError
from . import jit
from .kernel_spec import KernelSpec
from .layout import Struct

# A block may have so much dynamic shared memory without asking for more.
_UNASKED_SHARED_BYTES: Final = 48 << 10

_INVALID_CONTEXT: Final = 201
_EARLY_DRIVER: Final = 12030  # from there on graphs can hold launches that start early


class ModuleOwner(Protocol):
    """What makes a loaded module ready for kernels that use NVSHMEM: an `nvshmem.Network`."""

    def adopt(self, module: Any) -> None: ...


class Kernel:
    """A kernel compiled for the current device and loaded there.

    Args:
        network: for a kernel that uses NVSHMEM, which must outlive its launches.

    Attributes:
        max_resident_blocks: blocks that run at the same time on an otherwise idle device.
        can_start_early: launches may run beside the kernel before them on the stream.

    Raises:
        CompileError, BackendError: see `jit.cubin`.
    """

    def __init__(
        self, spec: KernelSpec, *, cache_dir: Path | None = None, network: ModuleOwner | None = None
    ) -> None:
        import cupy

        if spec.uses_network and network is None:
            raise BackendError(f"{spec.name} uses NVSHMEM: it can be loaded with a network alone")
        self.spec = spec
        self.device: int = cupy.cuda.runtime.getDevice()
        make_context_current()
        capability = _capability()
        self.can_start_early = capability >= (9, 0) and cupy.cuda.runtime.driverGetVersion() >= _EARLY_DRIVER
        self.architecture = jit.architecture(capability)
        self.shared_bytes = spec.shared_bytes if capability >= (9, 0) else spec.shared_bytes_sm80
        path = jit.cubin(spec, self.architecture, cache_dir=cache_dir)
        # The raw kernel keeps its module loaded.
        module = cupy.RawModule(path=str(path))
        self._raw = module.get_function(spec.name)
        self.function: int = self._raw.kernel.ptr
        if spec.uses_network and network is not None:
            network.adopt(module.module)
        if self.shared_bytes > _UNASKED_SHARED_BYTES:
            _allow_shared_bytes(self.function, self.shared_bytes, spec.name)
        self._fields = fields_type(spec.args)
        per_sm = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self.function, spec.cfg.num_threads, self.shared_bytes
        )
        self.max_resident_blocks = int(per_sm) * int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def bind(
        self,
        args: NDArray[Any],
        *,
        num_blocks: int,
        num_resident: int | None = None,
        starts_early: bool = False,
    ) -> Launch:
        """Fix the place of the arguments and the most blocks.

        Args:
            args: from `pack`. Changing it in place changes later launches, not those enqueued.
            num_resident: blocks that need a place at a time, by default all. Fewer, if each waits for none
                with a higher number, on any rank: then they may take their places one after the other.
            starts_early: from Hopper on it runs beside the kernel before it on its stream, as soon as that
                one lets it, and ends after it, for which the kernel waits itself.

        Raises:
            DeviceError: so many cannot be resident, which kernels that wait need; the grid is never made
                smaller.
        """
        limit = self.max_resident_blocks
        needed = num_blocks if num_resident is None else num_resident
        if needed > limit:
            raise DeviceError(
                f"{self.spec.name}: {needed} blocks cannot run at once on device {self.device}, "
                f"which holds {limit}"
            )
        fields = self._fields.from_address(args.ctypes.data)
        return Launch(self, args, fields, num_blocks, starts_early=starts_early and self.can_start_early)


class Launch:
    """A kernel with its arguments. Calling it enqueues it: one driver call, no allocation.

    Attributes:
        args: the fields of the argument struct, to be assigned to before a call. Pointers are integers.
        max_blocks: that a call may have, and has by default.
    """

    def __init__(
        self, kernel: Kernel, args: NDArray[Any], fields: Any, num_blocks: int, *, starts_early: bool = False
    ) -> None:
        from cupy.cuda import driver

        params = np.array([args.ctypes.data], np.uint64)
        self._keep_alive = (kernel, args, params)
        self.args: Any = fields
        self.max_blocks = num_blocks
        self._error = driver.CUDADriverError
        where = kernel.function, kernel.spec.cfg.num_threads, kernel.shared_bytes, params.ctypes.data
        self._enqueue = _early_launch(*where, self._error) if starts_early else _launch(*where)
        self._name = kernel.spec.name

    def setter(self, *names: str) -> Callable[..., None]:
        """What assigns to fields that lie one after the other: a function of their values, in one step.

        An array takes as many values as it has elements.
        """
        return _setter(self.args, names)

    def saved(self) -> bytes:
        """The arguments as they are now, for `restore`."""
        return bytes(self.args)

    def restore(self, arguments: bytes) -> None:
        """Have all arguments as they were when they were saved."""
        ctypes.memmove(ctypes.addressof(self.args), arguments, len(arguments))

    def __call__(self, stream: int, num_blocks: int | None = None) -> None:
        """Enqueue on a stream of the kernel's device, which must be current in this thread.

        Args:
            num_blocks: at most, and by default, `max_blocks`.

        Raises:
            DeviceError: the driver refused, or there are more blocks than were bound.
        """
        if num_blocks is None:
            num_blocks = self.max_blocks
        elif num_blocks > self.max_blocks:
            raise DeviceError(f"launching {self._name}: {num_blocks} blocks, bound were {self.max_blocks}")
        try:
            self._enqueue(stream, num_blocks)
        except self._error as error:
            if error.status != _INVALID_CONTEXT:
                raise DeviceError(f"launching {self._name}: {error}") from error
            # This thread has not used CUDA yet.
            make_context_current()
            try:
                self._enqueue(stream, num_blocks)
            except self._error as again:
                raise DeviceError(f"launching {self._name}: {again}") from again


def _launch(function: int, num_threads: int, shared_bytes: int, params: int) -> Callable[[int, int], None]:
    """What enqueues a kernel: a function of the stream and the number of blocks."""
    from cupy.cuda import driver

    # Not that of cuda.bindings, which makes an object of every result and of every handle it is given.
    launch_kernel = driver.launchKernel

    def enqueue(stream: int, num_blocks: int) -> None:
        launch_kernel(function, num_blocks, 1, 1, num_threads, 1, 1, shared_bytes, stream, params, 0)

    return enqueue


def _early_launch(
    function: int, num_threads: int, shared_bytes: int, params: int, error: Callable[[int], Exception]
) -> Callable[[int, int], None]:
    """The same for a kernel that may start before the one in front of it ends, which CuPy has no launch for.

    A programmatic dependent launch: CUDA C++ Programming Guide.
    """
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.attrs, config.numAttrs = [attribute], 1
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX, config.sharedMemBytes = num_threads, shared_bytes
    kernel, success = driver.CUfunction(function), driver.CUresult.CUDA_SUCCESS
    launch_kernel = driver.cuLaunchKernelEx
    last_stream = None

    def enqueue(stream: int, num_blocks: int) -> None:
        nonlocal last_stream
        if stream != last_stream:
            config.hStream, last_stream = driver.CUstream(stream), stream
        config.gridDimX = num_blocks
        (status,) = launch_kernel(config, kernel, params, 0)
        if status != success:
            raise error(int(status))

    return enqueue


def current_architecture() -> str:
    """Of the current device, as `jit` takes it."""
    return jit.architecture(_capability())


def _capability() -> tuple[int, int]:
    import cupy

    digits = cupy.cuda.Device().compute_capability
    return int(digits[:-1]), int(digits[-1])


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
            if len(value):
                record[name][0, : len(value)] = value
        else:
            record[name] = value
    return record


def bind(kernel: Kernel, num_blocks: int, *fields: Mapping[str, Any], **how: Any) -> Launch:
    """A launch whose arguments are the first of `fields` that names them, and zero where none does.

    Args:
        how: see `Kernel.bind`.
    """
    args = kernel.spec.args
    values: dict[str, Any] = {}
    for name in args.names or ():
        absent = () if args[name].shape else 0
        values[name] = next((each[name] for each in fields if name in each), absent)
    return kernel.bind(pack(args, **values), num_blocks=num_blocks, **how)


def fields_type(struct: Struct) -> Any:
    """The ctypes twin of a struct: over a packed one its fields are attributes. NumPy's are slow."""
    names = struct.names or ()
    kinds = [(name, np.ctypeslib.as_ctypes_type(struct[name])) for name in names]
    twin: Any = type("Fields", (ctypes.Structure,), {"_fields_": kinds})
    assert ctypes.sizeof(twin) == struct.itemsize
    assert all(getattr(twin, name).offset == struct.fields[name][1] for name in names)  # type: ignore[index]
    return twin


def _setter(fields: Any, names: Sequence[str]) -> Callable[..., None]:
    """See `Launch.setter`."""
    kind = type(fields)
    types = dict(kind._fields_)
    first = getattr(kind, names[0]).offset
    letters = ""
    for name in names:
        each, count = types[name], 1
        if issubclass(each, ctypes.Array):
            each, count = each._type_, each._length_
        letters += count * each._type_
        end = getattr(kind, name).offset + getattr(kind, name).size
        assert struct.calcsize(letters) == end - first, f"{names} do not lie one after the other"
    return partial(struct.Struct(letters).pack_into, fields, first)


def _allow_shared_bytes(function: int, num_bytes: int, name: str) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuFuncSetAttribute(driver.CUfunction(function), attribute, num_bytes)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{name}: {num_bytes} bytes of shared memory: {status.name}")


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

"""Matrix products beside communication: how many SMs cuBLAS takes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from .errors import ConfigError, DeviceError


@contextmanager
def leaving_sms(num_sms: int, *, framework: str = "torch") -> Iterator[None]:
    """Let matrix products that are enqueued in the body leave some SMs to other kernels.

    A product takes all SMs with blocks that stay until it ends. Where communication holds some of them, the
    blocks meant for these begin when it is done, and the product ends that much later; where the product
    came first, communication begins when it ends. Told of fewer SMs, a product takes no others:

        out = buffer.dispatch(x, ..., config=Config(num_sms=16), async_finish=True)
        with out.event, ep_rt.leaving_sms(16):
            shared = a @ b

    Holds for products of this thread on the current GPU by cuBLAS, so for ``@`` of PyTorch and CuPy; in a
    CUDA graph for those that are captured in the body. Not for those that PyTorch gives to cuBLASLt (a
    `Linear` with bias, say), and not for JAX, whose compiler chooses. Nothing waits; nothing is collective.

    Args:
        num_sms: how many, from 0 up; a product keeps one at least.
        framework: whose products: "torch" or "cupy".

    Raises:
        ConfigError: another framework, one that is not installed or has no GPU, or more SMs than a product
            can leave.
        DeviceError: cuBLAS refuses.
    """
    cublas = _Cublas(framework)
    if not 0 <= num_sms < cublas.num_device_sms:
        raise ConfigError(f"num_sms={num_sms} of {cublas.num_device_sms} SMs cannot be left")
    before = cublas.sm_count_target()
    cublas.set_sm_count_target(cublas.num_device_sms - num_sms)
    try:
        yield
    finally:
        cublas.set_sm_count_target(before)


class _Cublas:
    """The library and the handle by which a framework multiplies, for this thread and the current GPU."""

    def __init__(self, framework: str) -> None:
        if framework not in ("torch", "cupy"):
            raise ConfigError(f"framework={framework!r}: products of 'torch' and 'cupy' can leave SMs")
        try:
            library: Any = import_module(framework)
        except ImportError as error:
            raise ConfigError(f"{framework} is not installed") from error
        if not library.cuda.is_available():
            raise ConfigError(f"no GPU for {framework}")
        if framework == "torch":
            self._handle = library.cuda.current_blas_handle()
            self.num_device_sms = library.cuda.get_device_properties().multi_processor_count
            cuda_major = library.version.cuda.partition(".")[0]
        else:
            self._handle = library.cuda.device.get_cublas_handle()
            self.num_device_sms = library.cuda.Device().attributes["MultiProcessorCount"]
            cuda_major = library.cuda.runtime.runtimeGetVersion() // 1000
        # By its soname, so this is the one that the framework has loaded.
        self._library = ctypes.CDLL(f"libcublas.so.{cuda_major}")

    def sm_count_target(self) -> int:
        """0: all SMs."""
        target = ctypes.c_int()
        self._call("cublasGetSmCountTarget", ctypes.byref(target))
        return target.value

    def set_sm_count_target(self, num_sms: int) -> None:
        self._call("cublasSetSmCountTarget", ctypes.c_int(num_sms))

    def _call(self, function: str, argument: Any) -> None:
        status = getattr(self._library, function)(ctypes.c_void_p(self._handle), argument)
        if status:
            raise DeviceError(f"{function} answered {status}")

"""NumPy, CuPy, PyTorch and JAX, made alike as far as the examples need it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from launch import Place
from numpy.typing import NDArray

import ep_rt

BF16 = np.dtype(ml_dtypes.bfloat16)
_MODULES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy"}


class Library:
    """An array library, and where its arrays lie.

    Args:
        name: "numpy", "cupy", "torch" or "jax".
        place: of this rank, if it is to compute on its GPU.

    Attributes:
        xp: the library's module. Examples use of it what all of them have by the same name.
        bfloat16: its dtype.
    """

    def __init__(self, name: str = "numpy", place: Place | None = None) -> None:
        self.name = name
        self.place = place
        self.xp: Any = importlib.import_module(_MODULES[name])
        self.bfloat16 = BF16 if name == "cupy" else getattr(self.xp, "bfloat16", BF16)
        self._device: Any = None
        if name == "torch":
            self._device = "cpu" if place is None else f"cuda:{place.gpu}"
        elif name == "jax":
            import jax

            # Float32 means float32: not TF32, which GPUs would use.
            jax.config.update("jax_default_matmul_precision", "highest")
            devices = jax.local_devices(backend="cpu" if place is None else "gpu")
            self._device = devices[0 if place is None else place.gpu]

    @classmethod
    def of(cls, buffer: ep_rt.Buffer, place: Place) -> Library:
        """The one that the flags ask for, or that suits the backend of `buffer`."""
        if buffer.backend == "cuda":
            return cls(place.gpu_framework, place)
        if place.framework == "cupy":
            raise ep_rt.ConfigError("--framework cupy needs GPUs, and this is the host backend")
        return cls(place.framework or "numpy")

    def put(self, array: NDArray[Any]) -> Any:
        """A NumPy array as one of this library, where it computes."""
        if self.name == "numpy":
            return array
        if self.name == "jax":
            import jax

            return jax.device_put(array, self._device)
        bits = np.ascontiguousarray(array).view(np.int16) if array.dtype == BF16 else array
        if self.name == "cupy":
            return self.xp.asarray(bits).view(array.dtype)
        tensor = self.xp.from_numpy(np.ascontiguousarray(bits)).to(self._device)
        return tensor.view(self.bfloat16) if array.dtype == BF16 else tensor

    def fetch(self, array: Any) -> NDArray[Any]:
        """An array of this library in NumPy, once it is computed."""
        if self.name == "cupy":
            self.wait_for(array)
            host: NDArray[Any] = array.get()
            return host
        if self.name == "torch":
            if array.dtype == self.bfloat16:
                bits: NDArray[Any] = array.view(self.xp.int16).cpu().numpy()
                return bits.view(BF16)
            array = array.cpu()
        return np.asarray(array)

    def assign(self, array: Any, where: Any, values: Any) -> Any:
        """`array` with other values at the index `where`: itself, but JAX's arrays do not change."""
        if self.name == "jax":
            return array.at[where].set(values)
        array[where] = values
        return array

    def wait_for(self, array: Any) -> None:
        """Let the host wait until an array is computed, and all that was enqueued before it."""
        if self.name == "jax":
            array.block_until_ready()
        if self.place is not None:
            import cupy

            if self.name == "jax":
                cupy.cuda.runtime.deviceSynchronize()  # JAX has streams of its own
            cupy.cuda.get_current_stream().synchronize()

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        """Around calls of a buffer: ranks that are threads come together before and afterwards.

        Their kernels wait for each other. Whatever makes the driver wait until a GPU is idle (allocating
        memory, loading a kernel at its first use, copying to ordinary host memory) keeps the other threads
        from starting theirs, so nothing else is done meanwhile. Processes with a GPU each need no such care.
        """
        if self.place is not None and self.place.has_threads_beside:
            self._come_together(self.place.group)
            yield
            self._come_together(self.place.group)
        else:
            yield

    def _come_together(self, group: ep_rt.Group) -> None:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        group.barrier()

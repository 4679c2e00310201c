"""Device arrays of a call in microseconds: what `arrays` finds out and makes, for what comes again and again.

A call sees the same shapes thousands of times. `fingerprint` says cheaply whether an array is like one that
`arrays.view` has already looked at; then its address is all that is new. `Parts` makes the arrays of a result
over one allocation.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, NamedTuple

from . import arrays
from .arrays import CUDA_STREAM_LEGACY


def fingerprint(obj: Any) -> tuple[Hashable, ...] | None:
    """All that `arrays.view` finds out about an array but its address and its stream.

    None where that takes a `view`: for JAX, NumPy, other producers, and subclasses that may be anything.
    """
    kind: Any = type(obj)
    return _fingerprint_of(kind)(obj)


@functools.cache
def _fingerprint_of(kind: Any) -> Callable[[Any], tuple[Hashable, ...] | None]:
    """The `fingerprint` of this very type. An array's type exists only after its framework was imported."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and kind is cupy.ndarray:
        # Hashing a NumPy dtype takes longer than all else here; its number says the same.
        return lambda obj: (kind, obj.shape, obj.strides, obj.dtype.num, obj.data.device_id)
    if torch is not None and (kind is torch.Tensor or kind is torch.nn.Parameter):
        strided = torch.strided

        def of_tensor(obj: Any) -> tuple[Hashable, ...] | None:
            if obj.layout is not strided or obj.is_neg():
                return None
            return kind, obj.shape, obj.stride(), obj.dtype, obj.device

        return of_tensor
    return lambda obj: None


def address(obj: Any) -> int:
    """Where the elements of an array lie that has a `fingerprint`."""
    kind: Any = type(obj)
    return _address_of(kind)(obj)


@functools.cache
def _address_of(kind: Any) -> Callable[[Any], int]:
    if hasattr(kind, "data_ptr"):
        address: Callable[[Any], int] = kind.data_ptr
        return address
    return lambda obj: obj.data.ptr


def current_stream(framework: str, device: int) -> int:
    """The CUDA stream that is current in this thread for "cupy" or "torch"; never 0."""
    if framework == "torch":
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        pointer = torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device)
    else:
        pointer = sys.modules["cupy"].cuda.get_current_stream(device).ptr
    return pointer or CUDA_STREAM_LEGACY


class Column(NamedTuple):
    """One array of a result: its dtype, and its shape behind the first axis."""

    dtype: str
    shape: tuple[int, ...]


class ResultArrays:
    """Makes the arrays of one result, C-contiguous, over an allocation that they keep alive together.

    Args:
        columns: the arrays; None gives None.
        framework: "cupy", "torch" or "jax".
        stream: for JAX, see `arrays.cuda_to_framework`; the others' streams wait already.
    """

    def __init__(
        self, columns: Sequence[Column | None], *, device: int, framework: str, stream: int | None = None
    ) -> None:
        self._columns = tuple(columns)
        self._device = device
        self._framework = framework
        self._stream = stream
        self._kinds: list[Any] = [None if column is None else self._kind(column) for column in columns]

    def over(
        self, pointer: int, num_bytes: int, owner: object, places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        """The arrays over an allocation. `owner` is kept as long as any of them.

        Args:
            places: of each column the offset in bytes, a multiple of its itemsize, and the number of rows.
        """
        if self._framework == "cupy":
            return self._over_cupy(pointer, num_bytes, owner, places)
        if self._framework == "torch" and num_bytes:
            return self._over_torch(pointer, num_bytes, owner, places)
        return [
            None
            if column is None
            else arrays.cuda_to_framework(
                pointer + offset,
                (num_rows, *column.shape),
                column.dtype,
                device=f"cuda:{self._device}",
                framework=self._framework,
                owner=owner,
                stream=self._stream,
            )
            for column, (offset, num_rows) in zip(self._columns, places, strict=True)
        ]

    def _over_cupy(
        self, pointer: int, num_bytes: int, owner: object, places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        cupy = sys.modules["cupy"]
        memory = cupy.cuda.UnownedMemory(pointer, num_bytes, owner, self._device)
        made: list[Any] = []
        for kind, (offset, num_rows) in zip(self._kinds, places, strict=True):
            if kind is None:
                made.append(None)
                continue
            at = cupy.cuda.MemoryPointer(memory, offset)
            made.append(cupy.ndarray((num_rows, *kind[1]), kind[0], at))
        return made

    def _over_torch(
        self, pointer: int, num_bytes: int, owner: object, places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        torch = sys.modules["torch"]
        whole = arrays.torch_bytes(pointer, num_bytes, device=self._device, owner=owner)
        storage, device = whole.untyped_storage(), whole.device
        made: list[Any] = []
        for kind, (offset, num_rows) in zip(self._kinds, places, strict=True):
            if kind is None:
                made.append(None)
                continue
            dtype, itemsize, shape, strides = kind
            # Each with a version counter of its own, as autograd wants it; views would share one.
            array = torch.empty(0, dtype=dtype, device=device)
            made.append(array.set_(storage, offset // itemsize, (num_rows, *shape), strides))
        return made

    def _kind(self, column: Column) -> Any:
        """What the framework wants to know of a column, worked out once."""
        kind = arrays.np_dtype(column.dtype)
        if self._framework == "cupy":
            return arrays.np_dtype("uint8") if column.dtype == "float8_e4m3fn" else kind, column.shape
        if self._framework == "torch":
            strides = tuple(prod(column.shape[axis:]) for axis in range(len(column.shape) + 1))
            return getattr(sys.modules["torch"], column.dtype), kind.itemsize, column.shape, strides
        return column

"""The arrays of one call as kernels want them: contiguous, aligned and, for peers, in the slab."""

from __future__ import annotations

from math import prod
from typing import Final

from .. import arrays
from ..arrays import ArrayView
from .domain import Call, Domain
from .layout import OFFSET_UNIT, PAYLOAD_OFFSET
from .memory import device_errors
from .operations import Operations
from .pool import Lease

ROW_ALIGN_BYTES: Final = 16


class Inputs:
    """Makes inputs readable. An input is an `ArrayView` that says what it is like, and its address.

    Attributes:
        num_copied: arrays that were not contiguous, or not aligned.
        num_staged: arrays that were copied into the slab.
    """

    def __init__(self, domain: Domain, operations: Operations) -> None:
        self._domain = domain
        self._operations = operations
        self.num_copied = self.num_staged = 0

    def readable(self, view: ArrayView | None, pointer: int, call: Call) -> int:
        """The address of the contents, contiguous and with aligned rows; 0 for None."""
        if view is None:
            return 0
        if 0 in view.shape:  # nothing is read, but the address says that the argument is there
            return self._domain.base
        if self.is_readable(view, pointer):
            return pointer
        block = self._domain.heap.take(view.shape[0] * row_bytes(view), is_capturing=call.is_capturing)
        self.copy(view, pointer, block.pointer, call.stream)
        self.num_copied += 1
        call.temporaries.append(block)
        return block.pointer

    def is_readable(self, view: ArrayView, pointer: int) -> bool:
        """Whether kernels can read it where it lies."""
        return pointer % ROW_ALIGN_BYTES == 0 and is_contiguous(view)

    def stage(self, view: ArrayView | None, pointer: int, name: str) -> Lease | None:
        """Room in the slab for an input that peers read, unless it lies there already. Enqueues nothing."""
        if view is None or self._offset_in_slab(view, pointer) is not None:
            return None
        return self._domain.take(view.shape[0] * row_bytes(view), f"a copy of {name}, which lies elsewhere")

    def slab_offset(self, view: ArrayView | None, pointer: int, staged: Lease | None, call: Call) -> int:
        """Where peers find the contents, in `OFFSET_UNIT`; copies them to `staged` if that is there."""
        if view is None:
            return 0
        if staged is None:
            return self._offset_in_slab(view, pointer) or 0
        self.copy(view, pointer, self._domain.address(staged), call.stream)
        self.num_staged += 1
        call.temporaries.append(staged)
        return self._domain.offset(staged)

    def copy(self, view: ArrayView, pointer: int, destination: int, stream: int) -> None:
        """Enqueue a contiguous copy of an array [N] or [N, W]."""
        if is_contiguous(view):
            runtime = self._domain.runtime
            num_bytes = view.shape[0] * row_bytes(view)
            with device_errors("copying an input"):
                runtime.memcpyAsync(destination, pointer, num_bytes, runtime.memcpyDeviceToDevice, stream)
            return
        element_bytes = itemsize(view)
        is_matrix = len(view.shape) == 2
        self._operations.contiguous(
            stream,
            source=pointer,
            destination=destination,
            num_rows=view.shape[0],
            num_columns=view.shape[1] if is_matrix else 1,
            row_stride_bytes=view.strides[0] * element_bytes,
            column_stride_bytes=view.strides[1] * element_bytes if is_matrix else 0,
            element_bytes=element_bytes,
        )

    def _offset_in_slab(self, view: ArrayView, pointer: int) -> int | None:
        """None where peers cannot read it as it is."""
        if 0 in view.shape:
            return 0
        offset = pointer - self._domain.base
        is_inside = 0 <= offset < self._domain.pool.num_bytes
        return (
            (PAYLOAD_OFFSET + offset) // OFFSET_UNIT
            if is_inside and offset % OFFSET_UNIT == 0 and is_contiguous(view)
            else None
        )


def itemsize(view: ArrayView) -> int:
    """Bytes of one element."""
    return arrays.np_dtype(view.dtype).itemsize


def row_bytes(view: ArrayView | None) -> int:
    """Bytes of one entry of the first axis; 0 for None."""
    return 0 if view is None else itemsize(view) * prod(view.shape[1:])


def is_contiguous(view: ArrayView) -> bool:
    """Whether the elements lie in C order without gaps."""
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True

"""The arrays of one call as kernels want them: contiguous, aligned and, for peers, in the slab."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Input:
    """What an array is like that calls read. Each call has an address for it.

    Attributes:
        view: without address and owner.
        num_bytes: of its elements.
        is_empty: nothing is read, but an address says that the argument is there.
    """

    view: ArrayView
    num_bytes: int
    is_contiguous: bool
    is_empty: bool

    @classmethod
    def of(cls, view: ArrayView) -> Input:
        """That of an array that was looked at."""
        return cls(
            replace(view, pointer=0, owner=None),
            num_bytes=view.shape[0] * row_bytes(view),
            is_contiguous=is_contiguous(view),
            is_empty=0 in view.shape,
        )

    def of_rows(self, num_rows: int) -> Input:
        """The same of another length. What is known of arrays of two rows and more holds for all of these."""
        view = self.view
        if num_rows == view.shape[0]:
            return self
        view = replace(view, shape=(num_rows, *view.shape[1:]))
        return Input(view, num_rows * row_bytes(view), self.is_contiguous, self.is_empty)

    def is_readable(self, pointer: int) -> bool:
        """Whether kernels can read it where it lies."""
        return pointer % ROW_ALIGN_BYTES == 0 and self.is_contiguous


class Inputs:
    """Makes inputs readable.

    Attributes:
        num_copied: arrays that were not contiguous, or not aligned.
        num_staged: arrays that were copied into the slab.
    """

    def __init__(self, domain: Domain, operations: Operations) -> None:
        self._domain = domain
        self._operations = operations
        self.num_copied = self.num_staged = 0

    def readable(self, given: Input | None, pointer: int, call: Call) -> int:
        """The address of the contents, contiguous and with aligned rows; 0 for None."""
        if given is None:
            return 0
        if given.is_empty:
            return self._domain.base
        if given.is_readable(pointer):
            return pointer
        block = self._domain.heap.take(given.num_bytes, is_capturing=call.is_capturing)
        self.copy(given, pointer, block.pointer, call.stream)
        self.num_copied += 1
        call.temporaries.append(block)
        return block.pointer

    def slab_place(self, given: Input, pointer: int, name: str) -> int | Lease:
        """Where peers find the contents, in `OFFSET_UNIT`, or room in the slab to `stage` them.

        Enqueues nothing.
        """
        if given.is_empty:
            return 0
        domain = self._domain
        offset = pointer - domain.base
        is_inside = 0 <= offset < domain.pool.num_bytes
        if is_inside and offset % OFFSET_UNIT == 0 and given.is_contiguous:
            return (PAYLOAD_OFFSET + offset) // OFFSET_UNIT
        return domain.take(given.num_bytes, f"a copy of {name}, which lies elsewhere")

    def stage(self, given: Input, pointer: int, room: Lease, call: Call) -> int:
        """Copy an input to its room in the slab. Where peers find it there, in `OFFSET_UNIT`."""
        self.copy(given, pointer, self._domain.address(room), call.stream)
        self.num_staged += 1
        call.temporaries.append(room)
        return self._domain.offset(room)

    def copy(self, given: Input, pointer: int, destination: int, stream: int) -> None:
        """Enqueue a contiguous copy of an array [N] or [N, W]."""
        if given.is_contiguous:
            runtime = self._domain.runtime
            with device_errors("copying an input"):
                runtime.memcpyAsync(
                    destination, pointer, given.num_bytes, runtime.memcpyDeviceToDevice, stream
                )
            return
        view = given.view
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

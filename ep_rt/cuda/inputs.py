"""The arrays of one call as kernels want them: contiguous, aligned and, for peers, in the slab."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Final

from .. import arrays
from ..arrays import ArrayView
from ..requests import Schedule
from .heap import Block, Heap
from .layout import OFFSET_UNIT, PAYLOAD_OFFSET
from .memory import Slab, device_errors
from .operations import Operations
from .pool import Lease
from .streams import CommStream

_ROW_ALIGN_BYTES: Final = 16


class Call:
    """One call under way.

    Attributes:
        inputs: arrays that are read.
        streams: on which they were made, and results are used.
        temporaries: memory that the call's work uses and nobody else holds.
    """

    __slots__ = ("inputs", "is_capturing", "schedule", "streams", "temporaries")

    def __init__(
        self, *, inputs: list[ArrayView], streams: tuple[int, ...], schedule: Schedule, is_capturing: bool
    ) -> None:
        self.inputs = inputs
        self.streams = streams
        self.schedule = schedule
        self.is_capturing = is_capturing
        self.temporaries: list[Lease | Block] = []

    def keep_with(self, result: Lease | Block, *others: Block) -> None:
        """In a capture, memory of the call must live as long as its results. Else stream order is enough."""
        if self.is_capturing:
            result.kept = (*self.temporaries, *others)


class Inputs:
    """Makes inputs readable. Whatever it enqueues goes to the communication stream.

    Args:
        take: a place in the slab of so many bytes; the text says what for.

    Attributes:
        num_copied: arrays that were not contiguous, or not aligned.
        num_staged: arrays that were copied into the slab.
    """

    def __init__(
        self,
        slab: Slab,
        comm: CommStream,
        heap: Heap,
        operations: Operations,
        *,
        take: Callable[[int, str], Lease],
    ) -> None:
        import cupy

        self._slab = slab
        self._base = slab.pointers[slab.group.rank]
        self._comm = comm
        self._heap = heap
        self._operations = operations
        self._take = take
        self._runtime = cupy.cuda.runtime
        self.num_copied = self.num_staged = 0

    def readable(self, view: ArrayView | None, call: Call) -> int:
        """The address of the contents, contiguous and with aligned rows; 0 for None."""
        if view is None:
            return 0
        if 0 in view.shape:  # nothing is read, but the address says that the argument is there
            return self._base + PAYLOAD_OFFSET
        if _is_contiguous(view) and view.pointer % _ROW_ALIGN_BYTES == 0:
            return view.pointer
        block = self._heap.take(view.shape[0] * row_bytes(view), is_capturing=call.is_capturing)
        self.copy(view, block.pointer)
        self.num_copied += 1
        call.temporaries.append(block)
        return block.pointer

    def stage(self, view: ArrayView | None, name: str) -> Lease | None:
        """Room in the slab for an input that peers read, unless it lies there already. Enqueues nothing."""
        if view is None or self._offset_in_slab(view) is not None:
            return None
        return self._take(view.shape[0] * row_bytes(view), f"a copy of {name}, which lies elsewhere")

    def slab_offset(self, view: ArrayView | None, staged: Lease | None, call: Call) -> int:
        """Where peers find the contents, in `OFFSET_UNIT`; copies them to `staged` if that is there."""
        if view is None:
            return 0
        if staged is None:
            return self._offset_in_slab(view) or 0
        self.copy(view, self._base + PAYLOAD_OFFSET + staged.offset)
        self.num_staged += 1
        call.temporaries.append(staged)
        return (PAYLOAD_OFFSET + staged.offset) // OFFSET_UNIT

    def copy(self, view: ArrayView, destination: int) -> None:
        """Enqueue a contiguous copy of an array [N] or [N, W]."""
        if _is_contiguous(view):
            with device_errors("copying an input"):
                self._runtime.memcpyAsync(
                    destination,
                    view.pointer,
                    view.shape[0] * row_bytes(view),
                    self._runtime.memcpyDeviceToDevice,
                    self._comm.pointer,
                )
            return
        element_bytes = itemsize(view)
        is_matrix = len(view.shape) == 2
        self._operations.contiguous(
            self._comm.pointer,
            source=view.pointer,
            destination=destination,
            num_rows=view.shape[0],
            num_columns=view.shape[1] if is_matrix else 1,
            row_stride_bytes=view.strides[0] * element_bytes,
            column_stride_bytes=view.strides[1] * element_bytes if is_matrix else 0,
            element_bytes=element_bytes,
        )

    def _offset_in_slab(self, view: ArrayView) -> int | None:
        """None where peers cannot read it as it is."""
        if 0 in view.shape:
            return 0
        offset = view.pointer - self._base
        is_inside = PAYLOAD_OFFSET <= offset < self._slab.num_bytes
        return (
            offset // OFFSET_UNIT
            if is_inside and offset % OFFSET_UNIT == 0 and _is_contiguous(view)
            else None
        )


def itemsize(view: ArrayView) -> int:
    """Bytes of one element."""
    return arrays.np_dtype(view.dtype).itemsize


def row_bytes(view: ArrayView | None) -> int:
    """Bytes of one entry of the first axis; 0 for None."""
    return 0 if view is None else itemsize(view) * prod(view.shape[1:])


def _is_contiguous(view: ArrayView) -> bool:
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True

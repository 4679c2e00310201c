"""Device arrays of a call in microseconds: what `arrays` finds out and makes, for what comes again and again.

A call sees the same shapes thousands of times. `glance` says cheaply whether arrays are like those that
`arrays.view` has already looked at; then their addresses are all that is new. `ResultArrays` makes the arrays
of a result over one allocation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from . import arrays
from .arrays import CUDA_STREAM_LEGACY, TensorPlace, torch_tensors

_Look = Callable[[Any], tuple[Hashable, int]]


def glance(objects: Sequence[Any]) -> tuple[tuple[Hashable, ...], list[int]] | None:
    """All that `arrays.view` finds out about arrays but their streams: facts to compare, and the addresses.

    None among the arrays stands for itself, with address 0. The answer is None where one of them takes a
    `view`: JAX, NumPy, other producers, and subclasses that may be anything.
    """
    facts: list[Hashable] = []
    pointers: list[int] = []
    for each in objects:
        if each is None:
            facts.append(None)
            pointers.append(0)
            continue
        kind = type(each)
        look = _LOOKS.get(kind) or _look_at(kind)
        if look is None:
            return None
        fact, pointer = look(each)
        if fact is None:
            return None
        facts.append(fact)
        pointers.append(pointer)
    return tuple(facts), pointers


_LOOKS: dict[Any, _Look] = {}


def _look_at(kind: Any) -> _Look | None:
    """How to look at arrays of this very type, which exists only once its framework was imported."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and kind is cupy.ndarray:

        def at_cupy(obj: Any) -> tuple[Hashable, int]:
            memory = obj.data
            # Hashing a NumPy dtype takes longer than all else here; its number says the same.
            return (kind, obj.shape, obj.strides, obj.dtype.num, memory.device_id), memory.ptr

        _LOOKS[kind] = at_cupy
    elif torch is not None and (kind is torch.Tensor or kind is torch.nn.Parameter):
        strided = torch.strided

        def at_torch(obj: Any) -> tuple[Hashable, int]:
            if obj.layout is not strided or obj.is_neg():
                return None, 0
            return (kind, obj.shape, obj.stride(), obj.dtype, obj.device), obj.data_ptr()

        _LOOKS[kind] = at_torch
    return _LOOKS.get(kind)


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

    def over(
        self, pointer: int, num_bytes: int, owner: object, places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        """The arrays over an allocation. `owner` is kept as long as any of them.

        Args:
            places: of each column the offset in bytes, a multiple of its itemsize, and the number of rows.
        """
        return self.placed(places)(pointer, num_bytes, owner)

    def placed(self, places: Sequence[tuple[int, int]]) -> Callable[[int, int, object], list[Any]]:
        """`over` for the same places again and again: a function of pointer, num_bytes and owner."""
        if self._framework == "cupy":
            return self._placed_cupy(places)
        if self._framework == "torch" and any(num_rows for _, num_rows in places):
            return self._placed_torch(places)

        def make(pointer: int, num_bytes: int, owner: object) -> list[Any]:
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

        return make

    def _placed_cupy(self, places: Sequence[tuple[int, int]]) -> Callable[[int, int, object], list[Any]]:
        cupy = sys.modules["cupy"]
        memory_of, at, array_of = cupy.cuda.UnownedMemory, cupy.cuda.MemoryPointer, cupy.ndarray
        device = self._device
        absent: list[Any] = [None] * len(self._columns)
        wanted: list[tuple[int, tuple[int, ...], Any, int]] = []
        for number, (column, (offset, num_rows)) in enumerate(zip(self._columns, places, strict=True)):
            if column is None:
                continue
            # CuPy has no float8.
            kind = arrays.np_dtype("uint8" if column.dtype == "float8_e4m3fn" else column.dtype)
            # By its letter CuPy finds a dtype faster, but for those that NumPy itself does not have.
            letter = kind.char if kind.isbuiltin == 1 else kind
            wanted.append((number, (num_rows, *column.shape), letter, offset))

        def make(pointer: int, num_bytes: int, owner: object) -> list[Any]:
            memory = memory_of(pointer, num_bytes, owner, device)
            made = absent.copy()
            for number, shape, kind, offset in wanted:
                made[number] = array_of(shape, kind, at(memory, offset))
            return made

        return make

    def _placed_torch(self, places: Sequence[tuple[int, int]]) -> Callable[[int, int, object], list[Any]]:
        device = self._device
        wanted = [
            None if column is None else TensorPlace((num_rows, *column.shape), column.dtype, offset)
            for column, (offset, num_rows) in zip(self._columns, places, strict=True)
        ]

        def make(pointer: int, num_bytes: int, owner: object) -> list[Any]:
            return torch_tensors(wanted, pointer, num_bytes, device=device, owner=owner)

        return make

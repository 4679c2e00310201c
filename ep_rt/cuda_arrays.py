"""Device arrays of a call in microseconds: what `arrays` finds out and makes, for what comes again and again.

A call sees the same shapes thousands of times. `glance` says cheaply whether arrays are like those that
`arrays.view` has already looked at; then their addresses are all that is new. `ResultArrays` makes the arrays
of a result over one allocation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeVar

from . import arrays
from .arrays import CUDA_STREAM_LEGACY, ArrayView, TensorPlace, torch_tensors

T = TypeVar("T")
Fact = tuple[Any, tuple[int, ...], Hashable, Hashable, Hashable]
"""Of an array: its type, shape, strides, dtype and device."""

_Look = Callable[[Any], tuple[Fact | None, int]]


def glance(objects: Sequence[Any]) -> tuple[tuple[Fact | None, ...], list[int]] | None:
    """All that `arrays.view` finds out about arrays but their streams: facts to compare, and the addresses.

    None among the arrays stands for itself, with address 0. The answer is None where one of them takes a
    `view`: JAX, NumPy, other producers, and subclasses that may be anything.
    """
    facts: list[Fact | None] = []
    pointers: list[int] = []
    cupy = sys.modules.get("cupy")
    cupy_type = None if cupy is None else cupy.ndarray
    for each in objects:
        if each is None:
            facts.append(None)
            pointers.append(0)
            continue
        kind = type(each)
        if kind is cupy_type:
            memory = each.data
            # Hashing a NumPy dtype takes longer than all else here; its number says the same.
            facts.append((kind, each.shape, each.strides, each.dtype.num, memory.device_id))
            pointers.append(memory.ptr)
            continue
        look = _LOOKS.get(kind) or _look_at(kind)
        if look is None:
            return None
        fact, pointer = look(each)
        if fact is None:
            return None
        facts.append(fact)
        pointers.append(pointer)
    return tuple(facts), pointers


def lasting_facts(views: Sequence[ArrayView | None]) -> Hashable:
    """What `without_lengths` leaves of the facts of arrays that were looked at."""
    split = without_lengths(
        [
            None if view is None else (view.framework, view.shape, view.strides, view.dtype, view.device)
            for view in views
        ]
    )
    return None if split is None else split[0]


def without_lengths(facts: Sequence[Fact | None]) -> tuple[tuple[Hashable, ...], list[int | None]] | None:
    """What is left of facts where arrays may be of any length, and the lengths of their first axes.

    Arrays of none and of one row stay apart from longer ones: their strides say less. The answer is None
    where an array has no axis.
    """
    left: list[Hashable] = []
    lengths: list[int | None] = []
    for fact in facts:
        if fact is None:
            left.append(None)
            lengths.append(None)
            continue
        kind, shape, *others = fact
        if not shape:
            return None
        left.append((kind, min(shape[0], 2), shape[1:], *others))
        lengths.append(shape[0])
    return tuple(left), lengths


_LOOKS: dict[Any, _Look] = {}


def _look_at(kind: Any) -> _Look | None:
    """How to look at arrays of this very type, not CuPy's, which exists only once its framework is loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and (kind is torch.Tensor or kind is torch.nn.Parameter):
        strided = torch.strided

        def at_torch(obj: Any) -> tuple[Fact | None, int]:
            if obj.layout is not strided or obj.is_neg():
                return None, 0
            return (kind, obj.shape, obj.stride(), obj.dtype, obj.device), obj.data_ptr()

        _LOOKS[kind] = at_torch
    return _LOOKS.get(kind)


def undisturbed(call: Callable[..., T], *args: Any) -> T:
    """``call(*args)``, in which nothing replaces torch's functions.

    A default device of torch is a mode that its functions ask what to do, and each look at a tensor is one:
    all together they take longer than a call.
    """
    # While torch is being imported, these may not be there yet.
    functions = getattr(sys.modules.get("torch"), "_C", None)
    num_modes = getattr(functions, "_len_torch_function_stack", None)
    if num_modes is None or num_modes() == 0:
        return call(*args)
    with functions.DisableTorchFunction():  # type: ignore[union-attr]
        return call(*args)


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
    """One array of a result: its dtype, and its shape behind the first axis.

    Attributes:
        is_swapped: the array is seen with its last two axes swapped; `shape` says how it lies.
    """

    dtype: str
    shape: tuple[int, ...]
    is_swapped: bool = False

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """The shape behind the first axis."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.is_swapped else self.shape

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Bytes, of all axes; None where it is C-contiguous."""
        if not self.is_swapped:
            return None
        itemsize = arrays.np_dtype(self.dtype).itemsize
        *outer, last, second = (itemsize * prod(self.shape[axis:]) for axis in range(len(self.shape) + 1))
        return (*outer, second, last)


class ResultArrays:
    """Makes the arrays of one result over an allocation that they keep alive together.

    Args:
        columns: the arrays, C-contiguous but where they are swapped; None gives None.
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
        self._cupy: _CupyColumns | None = None

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
            if self._cupy is None:
                self._cupy = _CupyColumns(self._columns, self._device)
            return partial(self._cupy.over, self._cupy.placed(places))
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

        return self._swapping(make)

    def _swapping(
        self, make: Callable[[int, int, object], list[Any]]
    ) -> Callable[[int, int, object], list[Any]]:
        swapped = [number for number, column in enumerate(self._columns) if column and column.is_swapped]
        if not swapped:
            return make

        def made(pointer: int, num_bytes: int, owner: object) -> list[Any]:
            results = make(pointer, num_bytes, owner)
            for number in swapped:
                results[number] = results[number].swapaxes(-1, -2)
            return results

        return made

    def _placed_torch(self, places: Sequence[tuple[int, int]]) -> Callable[[int, int, object], list[Any]]:
        device = self._device
        wanted = [
            None
            if column is None
            else TensorPlace((num_rows, *column.seen_shape), column.dtype, offset, column.strides)
            for column, (offset, num_rows) in zip(self._columns, places, strict=True)
        ]

        def make(pointer: int, num_bytes: int, owner: object) -> list[Any]:
            return torch_tensors(wanted, pointer, device=device, owner=owner)

        return make


_CupyPlace = tuple[int, tuple[int, ...], Any, int, tuple[int, ...] | None]


class _CupyColumns:
    """Makes CuPy arrays: what is known of them before anything but their columns is."""

    def __init__(self, columns: Sequence[Column | None], device: int) -> None:
        cupy = sys.modules["cupy"]
        self._memory_of, self._at = cupy.cuda.UnownedMemory, cupy.cuda.MemoryPointer
        self._array_of = _array_maker(cupy.ndarray)
        self._device = device
        self._absent: list[Any] = [None] * len(columns)
        self._wanted: list[tuple[int, tuple[int, ...], Any, tuple[int, ...] | None]] = []
        for number, column in enumerate(columns):
            if column is None:
                continue
            # CuPy has no float8.
            kind = arrays.np_dtype("uint8" if column.dtype == "float8_e4m3fn" else column.dtype)
            # By its letter CuPy finds a dtype faster, but for those that NumPy itself does not have.
            letter = kind.char if kind.isbuiltin == 1 else kind
            self._wanted.append((number, column.seen_shape, letter, column.strides))

    def placed(self, places: Sequence[tuple[int, int]]) -> list[_CupyPlace]:
        """The arrays with the places that `over` wants."""
        return [
            (number, (places[number][1], *shape), letter, places[number][0], strides)
            for number, shape, letter, strides in self._wanted
        ]

    def over(self, placed: Sequence[_CupyPlace], pointer: int, num_bytes: int, owner: object) -> list[Any]:
        """See `ResultArrays.over`."""
        memory = self._memory_of(pointer, num_bytes, owner, self._device)
        array_of, at = self._array_of, self._at
        made = self._absent.copy()
        for number, shape, letter, offset, strides in placed:
            made[number] = array_of(shape, letter, at(memory, offset), strides)
        return made


def _array_maker(ndarray: Any) -> Callable[[tuple[int, ...], Any, Any, tuple[int, ...] | None], Any]:
    """What makes a CuPy array of a shape and a dtype over a `MemoryPointer`, as the class ``ndarray`` does.

    Around what does the work, which is in C, the class calls two methods that are not and take as long.
    """
    if not hasattr(ndarray, "_init"):
        return ndarray  # type: ignore[no-any-return]
    blank = ndarray.__base__.__new__

    def make(shape: tuple[int, ...], kind: Any, memory: Any, strides: tuple[int, ...] | None) -> Any:
        array = blank(ndarray)
        array._init(shape, kind, memory, strides)
        return array

    return make

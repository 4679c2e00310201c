"""The host side of the low-latency mode over emulated memory: its plans, zones and arguments are launched.

What it needs of CUDA is replaced: memory comes from the machine, launches are enqueued there, and the result
arrays are NumPy's over emulated memory. One thread stands for all ranks, so areas are made without asking.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ep_rt import arrays
from ep_rt.cuda import kernels, low_latency_combine, low_latency_dispatch
from ep_rt.cuda.domain import Call
from ep_rt.cuda.kernel_spec import KernelSpec
from ep_rt.cuda.layout import LOW_LATENCY_STATE
from ep_rt.cuda.low_latency_areas import MASKS_BYTES, Area, Areas
from ep_rt.cuda.low_latency_plan import POISON, AreaLayout, AreaShape, max_combine_blocks, max_send_blocks
from ep_rt.events import EventOverlap
from ep_rt.requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, Place, Schedule

from .kernels import bound
from .machine import Array, EmulatedKernel
from .ranks import Ranks
from .runtime import Kind

PLACE = Place("cpu")


class _Results:
    """Stands for `ResultArrays`."""

    def __init__(self, columns: Sequence[Any]) -> None:
        self.columns = columns

    def placed(self, places: Sequence[tuple[int, int]]) -> Callable[[int, int, object], list[Any]]:
        def make(pointer: int, num_bytes: int, owner: object) -> list[Any]:
            made: list[Any] = []
            for column, (offset, num_rows) in zip(self.columns, places, strict=True):
                if column is None:
                    made.append(None)
                    continue
                kind, shape = arrays.np_dtype(column.dtype), (num_rows, *column.shape)
                size = kind.itemsize * int(np.prod(shape))
                assert offset + size <= num_bytes
                array = at(pointer + offset, size).view(kind).reshape(shape)
                made.append(array.swapaxes(-1, -2) if column.is_swapped else array)
            return made

        return make

    def over(
        self, pointer: int, num_bytes: int, owner: object, places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        return self.placed(places)(pointer, num_bytes, owner)


def at(address: int, num_bytes: int) -> Array:
    """Bytes of emulated memory."""
    raw = (ctypes.c_uint8 * max(1, num_bytes)).from_address(address)
    return np.frombuffer(memoryview(raw), np.uint8)[:num_bytes]


class _Launch:
    """Stands for `Launch`."""

    def __init__(self, ranks: Ranks, rank: int, kernel: EmulatedKernel, fields: dict[str, Any]) -> None:
        self._where = ranks, rank, kernel
        self._fields = fields
        self.args = SimpleNamespace()

    def setter(self, *names: str) -> Callable[..., None]:
        def assign(*values: Any) -> None:
            vars(self.args).update(zip(names, values, strict=True))

        return assign

    def saved(self) -> dict[str, Any]:
        return dict(vars(self.args))

    def restore(self, arguments: dict[str, Any]) -> None:
        self.args = SimpleNamespace(**arguments)

    def __call__(self, stream: int, num_blocks: int) -> None:
        ranks, rank, kernel = self._where
        unknown = set(vars(self.args)) - set(kernel.spec.args.names or ())
        assert not unknown, unknown
        args = bound(kernel, vars(self.args), self._fields, ranks.low_latency_common(rank))
        ranks.machine.launch(rank, kernel, args, num_blocks)


class _Load:
    """Stands for `LowLatencyKernels`."""

    def __init__(self, ranks: Ranks, rank: int, *, over_network: bool) -> None:
        self._ranks, self._rank = ranks, rank
        self._over_network = over_network

    def dispatch(self, *, quantizes: bool, **fields: Any) -> _Launch:
        spec = kernels.low_latency_dispatch(quantizes=quantizes, over_network=self._over_network)
        return self._bind(spec, fields)

    def combine(self, wire: str, **fields: Any) -> _Launch:
        return self._bind(kernels.low_latency_combine(wire, over_network=self._over_network), fields)

    def _bind(self, spec: KernelSpec, fields: dict[str, Any]) -> _Launch:
        assert set(fields) <= set(spec.args.names or ())
        return _Launch(self._ranks, self._rank, self._ranks.load.small(spec), fields)


class _Domain:
    """Stands for `Domain`."""

    def __init__(self, ranks: Ranks, rank: int, max_blocks: int) -> None:
        self.rank = rank
        self.device = 0
        self.comm = SimpleNamespace(pointer=0)
        self.max_blocks = max_blocks
        self.heap = SimpleNamespace(take=self._take)
        self._ranks = ranks

    def _take(self, num_bytes: int, *, is_capturing: bool = False) -> Any:
        memory = self._ranks.machine.allocate(self.rank, num_bytes, "block of the heap")
        memory.array(np.uint8)[:] = 0xA5
        return SimpleNamespace(pointer=memory.address, kept=None)

    def check(self) -> None: ...
    def order(self, call: Call) -> None: ...

    def results(self, columns: Sequence[Any], _framework: str) -> _Results:
        return _Results(columns)

    def begin(
        self,
        frameworks: tuple[str, ...],
        inputs: Sequence[object],
        schedule: Schedule,
        producers: tuple[int, ...] = (),
    ) -> Call:
        return Call(0, (0,), frameworks, inputs, schedule, False)

    def finish(self, call: Call) -> EventOverlap:
        return EventOverlap()

    def on_device(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


class _Areas(Areas):
    """Areas that one thread makes for all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        domain: _Domain,
        made: dict[AreaShape, list[int]],
        masks: int,
        reached: Array | None,
        is_alone: bool,
    ) -> None:
        self._ranks, self._domain, self._made = ranks, domain, made  # type: ignore[assignment]
        self._reached, self._is_alone = reached, is_alone
        self._places = SimpleNamespace(is_over_network=reached is not None)
        self.rank, self.num_ranks = domain.rank, ranks.num_ranks
        self._areas = {}
        self.masks = masks
        self.max_blocks = domain.max_blocks

    def _make(self, shape: AreaShape) -> Area:
        ranks, layout = self._ranks, AreaLayout.of(shape)
        if shape not in self._made:
            kind = Kind.SYMMETRIC if shape.over_network else Kind.SLAB
            pieces = [
                ranks.machine.allocate(rank, layout.num_bytes, "area", kind)
                for rank in range(ranks.num_ranks)
            ]
            for piece in pieces:
                for zone in layout.combine:
                    piece.array(np.uint8)[zone.rows : zone.end] = POISON
            self._made[shape] = [piece.address for piece in pieces]
        area = object.__new__(Area)
        rank, pointers = self.rank, self._made[shape]
        area.own = pointers[rank]
        if self._reached is not None:
            pointers = [at if there else 0 for at, there in zip(pointers, self._reached[rank], strict=True)]
        state = ranks.machine.allocate(rank, LOW_LATENCY_STATE.itemsize, "state")
        area._domain, area.piece = self._domain, None  # type: ignore[assignment]
        area.shape, area.layout, area.pointers = shape, layout, tuple(pointers)
        area.state = state.address
        area.is_alone = self._is_alone
        area.max_send_blocks = max_send_blocks(shape, max_blocks=self.max_blocks)
        area.max_combine_blocks = max_combine_blocks(
            shape, max_blocks=self.max_blocks, is_alone=area.is_alone
        )
        area.reset_pending()
        return area


class Engines:
    """The low-latency dispatches and combines of all ranks.

    Args:
        max_blocks: see `Domain.max_blocks`.
        is_alone: see `Area`.
        reached: of calls over the network, see `LowLatency`.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        max_blocks: int,
        is_alone: bool,
        with_masks: bool,
        reached: Array | None,
    ) -> None:
        self.ranks = ranks
        made: dict[AreaShape, list[int]] = {}
        self.dispatches, self.combines = [], []
        for rank in range(ranks.num_ranks):
            domain: Any = _Domain(ranks, rank, max_blocks)
            masks = ranks.machine.allocate(rank, MASKS_BYTES, "masks").address if with_masks else 0
            areas = _Areas(ranks, domain, made, masks, reached, is_alone)
            inputs: Any = SimpleNamespace(
                readable=lambda view, pointer, call, base=ranks.slabs[rank].address: (
                    0 if view is None else pointer or base
                )
            )
            load: Any = _Load(ranks, rank, over_network=reached is not None)
            self.dispatches.append(
                low_latency_dispatch.LowLatencyDispatch(domain, areas, load, inputs, owner=self)
            )
            self.combines.append(
                low_latency_combine.LowLatencyCombine(domain, areas, load, inputs, owner=self)
            )

    def dispatch(
        self, rank: int, given: tuple[Any, ...], options: tuple[Any, ...], *, with_hook: bool
    ) -> Any:
        def build(x: Any, ids: Any, stats: Any, waits: Any, weights: Any, *options: Any) -> Any:
            num_max_tokens, num_experts, use_fp8, round_scale, use_ue8m0, layout = options
            return LowLatencyDispatchRequest.of(
                x,
                ids,
                num_max_tokens,
                num_experts,
                stats,
                waits,
                use_fp8,
                round_scale,
                use_ue8m0,
                weights,
                layout,
                num_ranks=self.ranks.num_ranks,
                place=PLACE,
            )

        return self.dispatches[rank](given, options, build, with_hook, Schedule())

    def combine(
        self, rank: int, given: tuple[Any, ...], handle: Any, options: tuple[Any, ...], *, with_hook: bool
    ) -> Any:
        def build(x: Any, ids: Any, weights: Any, out: Any, waits: Any, handle: Any, *options: Any) -> Any:
            use_logfmt, zero_copy, use_fp8, reduce = options
            return LowLatencyCombineRequest.of(
                x,
                ids,
                weights,
                handle,
                use_logfmt,
                zero_copy,
                out,
                waits,
                use_fp8,
                reduce,
                owner=self,
                num_ranks=self.ranks.num_ranks,
                place=PLACE,
            )

        return self.combines[rank](given, handle, options, build, with_hook, Schedule())

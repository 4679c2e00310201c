"""Low-latency combine on one rank: what a call needs, worked out once per shape, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..cuda_arrays import Column, glance
from ..errors import ArrayError, ConfigError
from ..requests import LowLatencyCombineRequest, Schedule
from ..results import LowLatencyCombined, named
from . import low_latency_plan as plan
from .digest import low_latency_combine_digest
from .domain import Domain
from .heap import Block
from .inputs import ROW_ALIGN_BYTES, Input, Inputs, is_contiguous, itemsize
from .launch import Launch
from .layout import FIRST_COMBINE_ZONE, LOW_LATENCY_RECORD, OFFSET_UNIT, align_up
from .low_latency_areas import Area, Areas
from .low_latency_calls import CudaLowLatencyHandle, LowLatencyKernels, run
from .plans import Plans, producers, seen

# Of the result, behind the record of the call.
_OUT_OFFSET: Final = align_up(LOW_LATENCY_RECORD.itemsize, OFFSET_UNIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A combine of certain shapes: what holds for every call of it.

    Attributes:
        launches: by zone, from `FIRST_COMBINE_ZONE` on.
        set_pointers: the same, assign to their arguments.
        inputs: what ids and weights are like.
        is_readable: they need no copy where their addresses are aligned.
        num_bytes: of an allocation: the record, and where the caller has given no array, the result.
        is_zero_copy: the rows are those of `next_buffer`.
        make: combined_x over the allocation; None where the caller has given an array.
    """

    area: Area
    launches: tuple[Launch, ...]
    set_pointers: tuple[Callable[..., None], ...]
    inputs: tuple[Input | None, ...]
    is_readable: bool
    reads_weights: bool
    frameworks: tuple[str, ...]
    num_blocks: tuple[int, int, int]
    num_bytes: int
    is_zero_copy: bool
    make: Callable[[int, int, object], list[Any]] | None


class LowLatencyCombine:
    """The low-latency combines of one rank."""

    def __init__(
        self, domain: Domain, areas: Areas, load: LowLatencyKernels, inputs: Inputs, *, owner: object
    ) -> None:
        self._domain = domain
        self._areas = areas
        self._load = load
        self._inputs = inputs
        self._owner = owner
        self._plans: Plans[_Plan] = Plans()
        self._buffers: dict[tuple[int, ...], Block] = {}
        self.num_calls = 0

    def forget(self) -> None:
        """Areas of earlier calls are gone."""
        self._plans = Plans()

    def forget_buffers(self) -> None:
        """The buffer is being closed."""
        self._buffers.clear()

    def __call__(
        self,
        given: tuple[Any, ...],
        handle: Any,
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyCombineRequest],
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyCombined:
        """One combine. The device is current.

        Args:
            given: x, topk_idx, topk_weights, out and statistics; `build` makes a checked request of them, the
                handle and the options.
        """
        key: Hashable = None
        found = None
        objects: Sequence[Any] = given
        streams: tuple[int, ...] = ()
        is_mine = type(handle) is CudaLowLatencyHandle and handle.owner is self._owner
        if is_mine:
            handle.area.check_there()
        if is_mine and (glanced := glance(given)) is not None:
            facts, pointers = glanced
            key = (facts, options, handle.shape)
            found = self._plans.find(key)
        if found is None:
            request = build(*given, handle, *options)
            views = request.x, request.topk_idx, request.topk_weights, request.out, request.wait_stats
            pointers, objects = seen(*views)
            streams = producers(*views)
            found = self._plans.keep(key, self._prepare(request, schedule))
        if with_hook and found.frameworks[0] == "jax" and found.make is not None:
            raise ConfigError("return_recv_hook fills the result later, and JAX arrays are immutable")
        return self._run(found, pointers, objects, streams, given[3], handle, with_hook, schedule)

    def _prepare(self, request: LowLatencyCombineRequest, schedule: Schedule) -> _Plan:
        domain, handle, x = self._domain, request.handle, request.x
        assert isinstance(handle, CudaLowLatencyHandle)  # its owner is this buffer
        for view, name in (
            (x, "x"),
            (request.out, "out"),
            (request.wait_stats, "combine_wait_recv_cost_stats"),
        ):
            if view is not None and not is_contiguous(view):
                raise ArrayError(f"{name} must be contiguous")
        for view, name in ((request.out, "out"), (request.wait_stats, "combine_wait_recv_cost_stats")):
            if view is not None and view.readonly:
                raise ArrayError(f"{name} is read-only; it is written to, so pass a writable array")
        views = (x, request.topk_idx, request.topk_weights, request.out, request.wait_stats)
        present = [view for view in views if view is not None]
        frameworks = tuple(dict.fromkeys(view.framework for view in present))
        call = domain.begin(frameworks, [view.owner for view in present], schedule)
        at_source = request.reduce == "source"
        if at_source and handle.area.shape.over_network:
            raise ConfigError('reduce="source" is served within one node; over several, "rank" alone')
        wire = "fp8" if request.use_fp8 else "logfmt" if request.use_logfmt else "bfloat16"
        is_plain = wire == "bfloat16" and not at_source
        sizes = handle.sizes
        area = handle.area if is_plain else self._areas.get(self._areas.others(sizes), call)
        sends_weights = not at_source and request.topk_weights is not None
        num_tokens = handle.num_tokens
        num_sum_blocks = plan.num_sum_blocks(
            sizes,
            num_tokens,
            area.max_combine_blocks,
            max_blocks=self._areas.max_blocks,
            is_alone=area.is_alone,
        )
        results = domain.results([Column("bfloat16", (handle.hidden,))], frameworks[0])
        inputs = tuple(
            None if view is None else Input.of(view) for view in (request.topk_idx, request.topk_weights)
        )
        launches = tuple(
            self._load.combine(
                wire,
                state=area.state,
                masks=self._areas.masks,
                weights_offset=here.weights,
                rows_offset=here.rows,
                landed_offset=here.landed,
                out_weights_offset=here.out_weights,
                out_rows_offset=here.out_rows,
                digest=low_latency_combine_digest(
                    request, wire, FIRST_COMBINE_ZONE + number, area.max_combine_blocks
                ),
                num_tokens=num_tokens,
                num_topk=handle.num_topk,
                num_experts=handle.num_experts,
                num_max_tokens=handle.num_max_tokens_per_rank,
                hidden=handle.hidden,
                idx_bytes=itemsize(request.topk_idx),
                sends_weights=sends_weights,
                sums_at_source=at_source,
                polls_data=is_plain and self._areas.polls,
                num_slots=area.shape.num_slots,
                zone=FIRST_COMBINE_ZONE + number,
                few_send_blocks=area.max_send_blocks,
                max_send_blocks=area.max_combine_blocks,
                num_sum_blocks=num_sum_blocks,
                areas=area.pointers,
            )
            for number, here in enumerate(area.layout.combine)
        )
        return _Plan(
            area=area,
            launches=launches,
            set_pointers=tuple(
                launch.setter("y", "routes", "topk_idx", "topk_weights", "sent_ids", "out", "wait_stats")
                for launch in launches
            ),
            inputs=inputs,
            is_readable=all(
                given is None or (given.is_contiguous and not given.is_empty) for given in inputs
            ),
            reads_weights=request.topk_weights is not None,
            frameworks=frameworks,
            num_blocks=plan.combine_blocks(
                sizes, area.max_combine_blocks, num_sum_blocks, sends_weights=sends_weights
            ),
            num_bytes=_OUT_OFFSET + (0 if request.out is not None else 2 * num_tokens * handle.hidden),
            is_zero_copy=request.zero_copy,
            make=None if request.out is not None else results.placed(((_OUT_OFFSET, num_tokens),)),
        )

    def _run(
        self,
        found: _Plan,
        pointers: Sequence[int],
        objects: Sequence[Any],
        streams: tuple[int, ...],
        out_array: Any,
        handle: CudaLowLatencyHandle,
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyCombined:
        domain, area = self._domain, found.area
        domain.check()
        handle.check_received()
        area.check(first=FIRST_COMBINE_ZONE)
        x, ids, weights, out, wait_stats = pointers
        if found.is_zero_copy:
            x = self._buffer(handle).pointer
        call = domain.begin(found.frameworks, objects, schedule, streams)
        block = domain.heap.take(found.num_bytes, is_capturing=call.is_capturing)
        if found.make is not None:
            out = block.pointer + _OUT_OFFSET
        if (x | out) % ROW_ALIGN_BYTES:
            raise ArrayError(f"x and out must begin at multiples of {ROW_ALIGN_BYTES} bytes")
        domain.order(call)
        if not found.reads_weights:
            weights = 0
        if not found.is_readable or (ids | weights) % ROW_ALIGN_BYTES:
            ids = self._inputs.readable(found.inputs[0], ids, call)
            if weights:
                weights = self._inputs.readable(found.inputs[1], weights, call)
        zone = area.take_zone(first=FIRST_COMBINE_ZONE)
        base, at = handle.block.pointer, handle.at
        launch = found.launches[zone - FIRST_COMBINE_ZONE]
        args = launch.args
        args.record = block.pointer
        args.dispatch_record = base + at.record
        found.set_pointers[zone - FIRST_COMBINE_ZONE](
            x, base + at.routes, ids, weights, base + at.sent_ids, out, wait_stats
        )
        args.dispatch_zone = handle.zone if handle.area is area else -1
        if found.make is not None:
            call.keep_with(block, handle.block)
        elif call.is_capturing:
            # Nothing of this call's is returned, so what replays need lives with the handle.
            handle.block.kept = (handle.block.kept, block, *call.temporaries)
        event, hook = run(
            domain,
            call,
            launch,
            found.num_blocks,
            pending=area.postpone(zone) if with_hook else None,
            received=[],
            kept=(block, handle),
        )
        self.num_calls += 1
        if found.make is None:
            return named(LowLatencyCombined, (out_array, event, hook))
        (combined_x,) = found.make(block.pointer, found.num_bytes, block)
        return named(LowLatencyCombined, (combined_x, event, hook))

    def next_buffer(self, handle: Any) -> Any:
        """bfloat16 [El, R*M, hidden] that combines with ``zero_copy`` read, in the handle's framework."""
        if handle.framework == "jax":
            raise ConfigError("zero_copy writes into an array, and JAX arrays are immutable")
        block = self._buffer(handle, makes=True)
        shape = self._shape(handle)
        result = self._domain.results([Column("bfloat16", shape[1:])], handle.framework)
        num_bytes = 2 * shape[0] * shape[1] * shape[2]
        return result.over(block.pointer, num_bytes, block, [(0, shape[0])])[0]

    def _buffer(self, handle: Any, *, makes: bool = False) -> Block:
        shape = self._shape(handle)
        block = self._buffers.get(shape)
        if block is None:
            if not makes:
                raise ConfigError("zero_copy needs get_next_low_latency_combine_buffer(handle) first")
            # It stays, so graphs may read it.
            block = self._buffers[shape] = self._domain.heap.take(2 * shape[0] * shape[1] * shape[2])
        return block

    def _shape(self, handle: Any) -> tuple[int, int, int]:
        num_ranks = self._areas.num_ranks
        return (
            handle.num_experts // num_ranks,
            num_ranks * handle.num_max_tokens_per_rank,
            handle.hidden,
        )

"""Low-latency dispatch on one rank: what a call needs, worked out once per shape, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from .. import arrays
from ..arrays import ArrayView
from ..cuda_arrays import Column, glance
from ..errors import ArrayError, ConfigError
from ..handle import LowLatencyHandleShape
from ..requests import LowLatencyDispatchRequest, Schedule
from ..results import LowLatencyDispatched, named
from . import low_latency_plan as plan
from .digest import low_latency_digest
from .domain import Call, Domain
from .heap import Block
from .inputs import ROW_ALIGN_BYTES, Input, Inputs, is_contiguous, itemsize
from .launch import Launch
from .layout import FIRST_COMBINE_ZONE, MAX_LOCAL_EXPERTS, MAX_LOCAL_RANKS, OFFSET_UNIT, align_up
from .low_latency_areas import Area, Areas
from .low_latency_calls import CudaLowLatencyHandle, HandleLayout, LowLatencyKernels, run
from .low_latency_plan import AreaShape
from .plans import Plans, producers, seen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A dispatch of certain shapes: what holds for every call of it.

    Attributes:
        launches: by zone.
        set_pointers: by zone, assign to their arguments.
        inputs: what x, ids and weights are like; None where absent.
        num_blocks: of the send phase, of the receive phase, and of both in one.
        shape: of the handle.
        results_bytes: of the packed rows with their scale factors; 0 where they stay in the zone.
        sf_offset: of the scale factors there, or by zone in the area.
        make, make_count, make_lists: recv_x and recv_sf, for each zone; recv_count; the lists of the handle.
    """

    area: Area
    sizes: AreaShape
    launches: tuple[Launch, ...]
    set_pointers: tuple[Callable[..., None], ...]
    inputs: tuple[Input | None, ...]
    is_readable: bool
    frameworks: tuple[str, ...]
    num_blocks: tuple[int, int, int]
    at: HandleLayout
    shape: LowLatencyHandleShape
    results_bytes: int
    sf_offset: int
    make: tuple[Callable[[int, int, object], list[Any]], ...]
    make_count: Callable[[int, int, object], list[Any]]
    make_lists: Callable[[int, int, object], list[Any]]


class LowLatencyDispatch:
    """The low-latency dispatches of one rank.

    Args:
        owner: of the handles.
    """

    def __init__(
        self, domain: Domain, areas: Areas, load: LowLatencyKernels, inputs: Inputs, *, owner: object
    ) -> None:
        self._domain = domain
        self._areas = areas
        self._load = load
        self._inputs = inputs
        self._owner = owner
        self._plans: Plans[_Plan] = Plans()
        self.num_calls = 0

    def forget(self) -> None:
        """Areas of earlier calls are gone."""
        self._plans = Plans()

    def __call__(
        self,
        given: tuple[Any, ...],
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyDispatchRequest],
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyDispatched:
        """One dispatch. The device is current.

        Args:
            given, options: the caller's arguments; `build` makes a checked request of all of them.
        """
        key: Hashable = None
        found = None
        objects: Sequence[Any] = given
        streams: tuple[int, ...] = ()
        if (glanced := glance(given)) is not None:
            facts, pointers = glanced
            key = (facts, options)
            found = self._plans.find(key)
        if found is None:
            request = build(*given, *options)
            views = (
                request.x,
                request.topk_idx,
                request.recv_stats,
                request.wait_stats,
                request.topk_weights,
            )
            pointers, objects = seen(*views)
            streams = producers(*views)
            found = self._plans.keep(key, self._prepare(request, views, schedule))
        if with_hook and found.frameworks[0] == "jax":
            raise ConfigError("return_recv_hook fills the result later, and JAX arrays are immutable")
        return self._run(found, pointers, objects, streams, with_hook, schedule)

    def _prepare(
        self, request: LowLatencyDispatchRequest, views: tuple[ArrayView | None, ...], schedule: Schedule
    ) -> _Plan:
        domain = self._domain
        x, ids = request.x, request.topk_idx
        num_ranks, hidden = self._areas.num_ranks, x.shape[1]
        num_tokens, num_topk = ids.shape
        num_local_experts = request.num_experts // num_ranks
        if not 1 <= num_topk <= plan.MAX_TOPK:
            raise ConfigError(f"topk_idx has {num_topk} columns; low-latency calls take 1 to {plan.MAX_TOPK}")
        most = MAX_LOCAL_RANKS * MAX_LOCAL_EXPERTS
        if num_local_experts > MAX_LOCAL_EXPERTS or request.num_experts > most:
            raise ConfigError(
                f"num_experts={request.num_experts} on {num_ranks} ranks; at most {MAX_LOCAL_EXPERTS} on "
                f"each, and {most} in all"
            )
        for view, name in (
            (request.recv_stats, "cumulative_local_expert_recv_stats"),
            (request.wait_stats, "dispatch_wait_recv_cost_stats"),
        ):
            if view is not None and (view.readonly or not is_contiguous(view)):
                raise ArrayError(f"{name} is added to, so it must be contiguous and writable")
        sizes = AreaShape(
            num_ranks=num_ranks,
            num_max_tokens=request.num_max_tokens_per_rank,
            hidden=hidden,
            num_experts=request.num_experts,
            num_topk=num_topk,
        )
        present = [view for view in views if view is not None]
        frameworks = tuple(dict.fromkeys(view.framework for view in present))
        call = domain.begin(frameworks, [view.owner for view in present], schedule)
        area = self._areas.get(self._areas.main(sizes), call)

        is_packed = request.layout == "expert"
        scale_mode = 2 if request.use_ue8m0 else 1 if request.round_scale else 0
        scale_words = sizes.scale_words(packed=request.use_ue8m0) if request.use_fp8 else 0
        num_rows = num_ranks * sizes.num_max_tokens
        element = "float8_e4m3fn" if request.use_fp8 else "bfloat16"
        row_bytes = hidden * arrays.np_dtype(element).itemsize
        sf_type = "int32" if request.use_ue8m0 else "float32"
        # Packed, scale factors are made column-major, and seen with the last two axes swapped.
        inner = (num_rows, hidden) if is_packed else (sizes.num_max_tokens, hidden)
        sf_inner = (scale_words, num_rows) if is_packed else (sizes.num_max_tokens, scale_words)
        num_outer = num_local_experts if is_packed else num_ranks
        results = domain.results(
            [
                Column(element, inner),
                Column(sf_type, sf_inner, is_swapped=is_packed) if request.use_fp8 else None,
            ],
            frameworks[0],
        )
        sf_offset = align_up(num_outer * prod(inner[:-1]) * row_bytes, OFFSET_UNIT)
        at = HandleLayout.of(sizes, num_tokens, with_rows=not is_packed)
        shape = (num_rows,)
        count = domain.results([Column("int32", ())], frameworks[0])
        lists = domain.results(
            [
                Column("int32", shape),
                Column("int64", (num_ranks,)),
                None if is_packed else Column("int32", shape),
            ],
            frameworks[0],
        )
        max_blocks = self._areas.max_blocks
        num_clear_blocks = plan.num_clear_blocks(sizes, 1 if is_packed else 2, max_blocks=max_blocks)
        num_list_blocks = plan.num_list_blocks(sizes, max_blocks=max_blocks)
        num_copy_blocks = 0
        if is_packed:
            num_copy_blocks = plan.num_copy_blocks(sizes, area.max_send_blocks, max_blocks=max_blocks)
        dispatch_zones = area.layout.dispatch
        inputs = tuple(None if view is None else Input.of(view) for view in (x, ids, request.topk_weights))
        launches = tuple(
            self._load.dispatch(
                quantizes=request.use_fp8,
                state=area.state,
                masks=self._areas.masks,
                ids_offset=here.ids,
                weights_offset=here.weights,
                places_offset=here.places,
                rows_offset=here.rows,
                sf_offset=here.sf(area.shape),
                landed_offset=here.landed,
                out_ids_offset=here.out_ids,
                out_weights_offset=here.out_weights,
                out_rows_offset=here.out_rows,
                out_sf_offset=here.out_sf(area.shape),
                digest=low_latency_digest(request, zone, area.max_send_blocks),
                num_tokens=num_tokens,
                num_topk=num_topk,
                num_experts=request.num_experts,
                num_max_tokens=sizes.num_max_tokens,
                hidden=hidden,
                idx_bytes=itemsize(ids),
                scale_mode=scale_mode,
                has_weights=request.topk_weights is not None,
                zone=zone,
                max_send_blocks=area.max_send_blocks,
                num_clear_blocks=num_clear_blocks,
                num_list_blocks=num_list_blocks,
                num_copy_blocks=num_copy_blocks,
                areas=area.pointers,
            )
            for zone, here in enumerate(dispatch_zones[:FIRST_COMBINE_ZONE])
        )
        return _Plan(
            area=area,
            sizes=sizes,
            launches=launches,
            set_pointers=tuple(
                launch.setter(
                    *("x", "topk_idx", "topk_weights", "sent_ids", "recv_x", "recv_sf", "recv_count"),
                    *("src_info", "expert_rows", "layout_range", "routes", "recv_stats", "wait_stats"),
                )
                for launch in launches
            ),
            inputs=inputs,
            is_readable=all(
                given is None or (given.is_contiguous and not given.is_empty) for given in inputs
            ),
            frameworks=frameworks,
            num_blocks=plan.dispatch_blocks(
                sizes,
                num_tokens,
                area.max_send_blocks,
                num_clear_blocks,
                num_list_blocks,
                num_copy_blocks,
            ),
            at=at,
            shape=LowLatencyHandleShape(
                num_tokens=num_tokens,
                num_topk=num_topk,
                num_max_tokens_per_rank=sizes.num_max_tokens,
                hidden=hidden,
                num_experts=sizes.num_experts,
                framework=frameworks[0],
                layout=request.layout,
                has_weights=request.topk_weights is not None,
            ),
            results_bytes=sf_offset + 4 * num_outer * prod(sf_inner) if is_packed else 0,
            sf_offset=sf_offset,
            make=tuple(
                results.placed(
                    ((0, num_outer), (sf_offset if is_packed else here.sf(area.shape) - here.rows, num_outer))
                )
                for here in dispatch_zones
            ),
            make_count=count.placed(((at.recv_count, num_local_experts),)),
            make_lists=lists.placed(
                (
                    (at.src_info, num_local_experts),
                    (at.layout_range, num_local_experts),
                    (at.expert_rows, num_local_experts),
                )
            ),
        )

    def _run(
        self,
        found: _Plan,
        pointers: list[int],
        objects: Sequence[Any],
        streams: tuple[int, ...],
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyDispatched:
        domain, at, area = self._domain, found.at, found.area
        domain.check()
        area.check(first=0)
        call = domain.begin(found.frameworks, objects, schedule, streams)
        block = domain.heap.take(at.end, is_capturing=call.is_capturing)
        results: Block | None = None
        if found.results_bytes:
            results = domain.heap.take(found.results_bytes, is_capturing=call.is_capturing)
        domain.order(call)
        x, ids, recv_stats, wait_stats, weights = pointers
        if not found.is_readable or (x | ids | weights) % ROW_ALIGN_BYTES:
            x, ids, weights = self._readable(found, (x, ids, weights), call)
        zone = area.take_zone(first=0)
        here = area.layout.dispatch[zone]
        base = block.pointer
        rows = area.own + here.rows if results is None else results.pointer
        launch = found.launches[zone]
        if results is None:
            recv_x_at = recv_sf_at = 0
            expert_rows = base + at.expert_rows
            call.keep_with(block)
        else:
            recv_x_at, recv_sf_at, expert_rows = rows, rows + found.sf_offset, 0
            call.keep_with(block, results)
        launch.args.record = base + at.record
        found.set_pointers[zone](
            x,
            ids,
            weights,
            base + at.sent_ids,
            recv_x_at,
            recv_sf_at,
            base + at.recv_count,
            base + at.src_info,
            expert_rows,
            base + at.layout_range,
            base + at.routes,
            recv_stats,
            wait_stats,
        )
        received: list[bool] = []
        event, hook = run(
            domain,
            call,
            launch,
            found.num_blocks,
            pending=area.postpone(zone) if with_hook else None,
            received=received,
            kept=(block, results, area),
        )
        self.num_calls += 1
        # What lies in the zone belongs to the area, which lives as long as the buffer.
        owner: object = (area, block) if results is None else results
        num_bytes = here.end - here.rows if results is None else found.results_bytes
        recv_x, recv_sf = found.make[zone](rows, num_bytes, owner)
        if recv_sf is not None:
            recv_x = recv_x, recv_sf
        (recv_count,) = found.make_count(base, at.end, block)
        lists = partial(found.make_lists, base, at.end, block)
        # By position: names take longer than everything else here.
        handle = CudaLowLatencyHandle(
            self._owner, lists, found.shape, block, at, area, zone, found.sizes, received
        )
        return named(LowLatencyDispatched, (recv_x, recv_count, handle, event, hook))

    def _readable(self, found: _Plan, pointers: tuple[int, ...], call: Call) -> list[int]:
        return [
            self._inputs.readable(view, pointer, call)
            for view, pointer in zip(found.inputs, pointers, strict=True)
        ]

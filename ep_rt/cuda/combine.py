"""Combine on one rank: what a call needs, worked out once per shape, and the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cuda_arrays import Column, glance
from ..requests import CombineRequest, Schedule
from ..results import Combined, named
from . import plan
from .digest import along, combine_digest
from .domain import Call, Domain
from .expert_major import ExpertMajor, PlacesLayout
from .handle import SEND_PLAN_OFFSET, SEND_ROW_OFFSET, CudaDispatchHandle
from .inputs import Input, Inputs, row_bytes
from .internode import Internode, Returning
from .launch import Launch
from .layout import OFFSET_UNIT, align_up
from .operations import Operations
from .plans import Plans, seen
from .pool import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A combine of certain shapes: what holds for every call of it.

    Attributes:
        set_pointers, set_offsets: assign to the arguments of the launch.
        x, weights, biases: what the arrays are like.
        collapse: for layout "expert": makes the rows that peers pull, of `collapsed_bytes`.
        num_stagers: blocks besides `num_blocks`, for an x that lies outside the slab.
        out_bytes: of the allocation that holds the results, the weights' from `weights_offset` on; `make`
            makes them.
        returning: over several nodes, the way of their sums back.
    """

    launch: Launch
    set_pointers: Callable[..., None]
    set_offsets: Callable[..., None]
    collapse: Launch | None
    collapsed_bytes: int
    x: Input
    weights: Input | None
    biases: tuple[Input, ...]
    frameworks: tuple[str, ...]
    num_blocks: int
    num_stagers: int
    out_bytes: int
    weights_offset: int
    make: Callable[[int, int, object], list[Any]]
    digest: int
    num_sms: int
    returning: Returning | None


class Combine:
    """The combines of one rank.

    Args:
        internode: over several nodes.

    Attributes:
        num_calls: so far.
    """

    def __init__(
        self,
        domain: Domain,
        operations: Operations,
        expert_major: ExpertMajor,
        inputs: Inputs,
        *,
        owner: object,
        internode: Internode | None = None,
    ) -> None:
        self._domain = domain
        self._internode = internode
        self._operations = operations
        self._expert_major = expert_major
        self._inputs = inputs
        self._owner = owner
        self._plans: Plans[_Plan] = Plans()
        self.num_calls = 0

    def __call__(
        self, given: tuple[Any, ...], build: Callable[..., CombineRequest], schedule: Schedule
    ) -> Combined:
        """One combine. The device is current.

        Args:
            given: the caller's arguments; `build` makes a checked request of them.
        """
        x, handle, weights, bias = given
        objects: list[Any] = [x, weights]
        if bias is not None:
            biases = bias if type(bias) is tuple else (bias,)
            objects += [each for each in biases if each is not None]
        key: Hashable = None
        found = None
        is_mine = type(handle) is CudaDispatchHandle and handle.owner is self._owner
        if is_mine and (glanced := glance(objects)) is not None:
            facts, pointers = glanced
            key = (facts, schedule.num_sms, handle.facts)
            found = self._plans.find(key)
        if found is None:
            request = build(*given)
            pointers, objects = seen(request.x, request.topk_weights, *request.biases)
            found = self._plans.keep(key, self._prepare(request, schedule.num_sms))
        return self._run(found, pointers, objects, handle, schedule)

    def _prepare(self, request: CombineRequest, num_sms: int) -> _Plan:
        domain, x, weights = self._domain, request.x, request.topk_weights
        handle = request.handle
        assert isinstance(handle, CudaDispatchHandle)  # its owner is this buffer
        num_tokens = handle.num_tokens
        is_expert_major = handle.layout == "expert"
        # In that layout the weights multiply the rows on this rank, and do not travel.
        summed = None if is_expert_major else weights
        num_topk = 0 if summed is None else summed.shape[1]
        num_blocks = domain.num_blocks(num_sms)
        returning = None
        if self._internode is not None:
            returning = self._internode.returning(x, summed, num_tokens=num_tokens, element=x.dtype)
        views = (x, weights, *request.biases)
        frameworks = tuple(dict.fromkeys(view.framework for view in views if view is not None))
        weights_offset = align_up(num_tokens * row_bytes(x), OFFSET_UNIT)
        results = domain.results(
            [
                Column(x.dtype, x.shape[1:]),
                None if summed is None else Column(summed.dtype, summed.shape[1:]),
            ],
            frameworks[0],
        )
        launch = self._operations.combine(
            x.dtype,
            num_tokens=num_tokens if returning is None else returning.capacity,
            num_rows=x.shape[0],
            row_bytes=row_bytes(x),
            num_topk=num_topk,
            num_pullers=num_blocks,
        )
        return _Plan(
            launch=launch,
            set_pointers=launch.setter("send_row", "send_plan", "y", "bias", "out", "out_weights"),
            set_offsets=launch.setter("digest", "y_offset", "weights_offset"),
            collapse=self._expert_major.collapse(
                x.dtype,
                num_topk=handle.num_topk,
                row_bytes=row_bytes(x),
                row_capacity=handle.landed.num_landed_rows,
            )
            if is_expert_major
            else None,
            collapsed_bytes=handle.landed.num_landed_rows * row_bytes(x),
            x=Input.of(x),
            weights=None if weights is None else Input.of(weights),
            biases=tuple(Input.of(bias) for bias in request.biases),
            frameworks=frameworks,
            num_blocks=num_blocks,
            num_stagers=plan.num_stagers(num_blocks, x.shape[0] * row_bytes(x), max_blocks=domain.max_blocks),
            out_bytes=weights_offset + 4 * num_tokens * num_topk,
            weights_offset=weights_offset,
            make=results.placed(((0, num_tokens), (weights_offset, num_tokens))),
            digest=combine_digest(request),
            num_sms=num_sms,
            returning=returning,
        )

    def _run(
        self,
        found: _Plan,
        pointers: Sequence[int],
        objects: Sequence[Any],
        handle: CudaDispatchHandle,
        schedule: Schedule,
    ) -> Combined:
        domain, inputs = self._domain, self._inputs
        domain.check()
        call = domain.begin(found.frameworks, objects, schedule)
        x, weights = found.x, found.weights
        # Where peers find them, or where there is room for a copy that they find.
        x_at: int | Lease
        weights_at: int | Lease = 0
        if found.collapse is not None:
            x_at = domain.take(found.collapsed_bytes, "a row for each received token")
        else:
            x_at = inputs.slab_place(x, pointers[0], "x")
            if weights is not None:
                weights_at = inputs.slab_place(weights, pointers[1], "topk_weights")
        out = domain.heap.take(found.out_bytes, is_capturing=call.is_capturing)
        domain.order(call)

        args, routing = found.launch.args, handle.routing
        results = out.pointer, out.pointer + found.weights_offset
        biases: list[int] = []
        for number, bias in enumerate(found.biases):
            biases.append(inputs.readable(bias, pointers[2 + number], call))
        returning, here = found.returning, results
        first_bias = second_bias = returned = 0
        if returning is None:
            first_bias, second_bias, *_ = *biases, 0, 0
        else:
            here, returned = self._before_return(returning, handle, args, call)
        y = num_stagers = 0
        num_blocks = found.num_blocks
        if isinstance(weights_at, Lease):
            assert weights is not None
            weights_at = inputs.stage(weights, pointers[1], weights_at, call)
        if not isinstance(x_at, Lease):
            y_offset = x_at
        elif found.collapse is not None:
            self._collapse(found, found.collapse, pointers, handle, x_at, call)
            y_offset = domain.offset(x_at)
        elif returning is not None or not x.is_readable(pointers[0]):
            y_offset = inputs.stage(x, pointers[0], x_at, call)
        else:
            y = pointers[0]  # the kernel stages it
            y_offset = domain.offset(x_at)
            num_stagers = found.num_stagers or max(1, num_blocks // 2)
            num_blocks += found.num_stagers
            inputs.num_staged += 1
            call.temporaries.append(x_at)
        base = routing.pointer
        found.set_pointers(base + SEND_ROW_OFFSET, base + SEND_PLAN_OFFSET, y, first_bias, second_bias, *here)
        found.set_offsets(along(found.digest, handle.call), y_offset, weights_at)
        args.num_stagers = num_stagers
        found.launch(call.stream, num_blocks)
        self.num_calls += 1
        if returning is None:
            call.keep_with(out, routing)
        else:
            internode, crossing = self._internode, handle.crossing
            assert internode is not None
            assert crossing is not None
            internode.take_back(
                returning, crossing, here, returned, biases, results, call, num_sms=found.num_sms
            )
            call.keep_with(out, routing, crossing.block)
        event = domain.finish(call)
        combined_x, combined_weights = found.make(out.pointer, found.out_bytes, out)
        return named(Combined, (combined_x, combined_weights, event))

    def _before_return(
        self, returning: Returning, handle: CudaDispatchHandle, args: Any, call: Call
    ) -> tuple[tuple[int, int], int]:
        """Where the sums of this node go that others wait for, and theirs for this node."""
        assert handle.crossing is not None
        rows_at, weights_at, returned_at = returning.here_places
        num_bytes = returned_at + returning.returned_places[-1]
        block = self._domain.heap.take(num_bytes, is_capturing=call.is_capturing)
        call.temporaries.append(block)
        assert self._internode is not None
        args.segments, args.progress = handle.crossing.segments, self._internode.progress
        base = block.pointer
        return (base + rows_at, base + weights_at), base + returned_at

    def _collapse(
        self,
        found: _Plan,
        launch: Launch,
        pointers: Sequence[int],
        handle: CudaDispatchHandle,
        out: Lease,
        call: Call,
    ) -> None:
        """Enqueue the sums over the columns of what this rank received."""
        assert handle.places is not None
        at = PlacesLayout.of(
            row_capacity=handle.landed.num_landed_rows,
            num_topk=handle.num_topk,
            num_local_experts=handle.landed.num_local_experts,
        )
        args = launch.args
        args.num_recv_tokens = handle.num_recv_tokens_pointer
        args.expert_row = handle.places.pointer + at.expert_row
        args.y = self._inputs.readable(found.x, pointers[0], call)
        args.weights = self._inputs.readable(found.weights, pointers[1], call)
        args.out = self._domain.address(out)
        launch(call.stream, plan.num_local_blocks(found.num_blocks, max_blocks=self._domain.max_blocks))
        call.temporaries += (out, handle.places)

"""Combine on one rank: what a call needs, worked out once per shape, and the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..arrays import ArrayView
from ..cuda_arrays import Column, ResultArrays, glance
from ..requests import CombineRequest, Schedule
from ..results import Combined
from . import plan
from .digest import along, combine_digest
from .domain import Call, Domain
from .expert_major import ExpertMajor, PlacesLayout
from .handle import SEND_PLAN_OFFSET, SEND_ROW_OFFSET, CudaDispatchHandle
from .inputs import Inputs, row_bytes
from .launch import Launch
from .layout import OFFSET_UNIT, align_up
from .operations import Operations
from .plans import Plans, seen
from .pool import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A combine of certain shapes: what holds for every call of it.

    Attributes:
        inputs: what x, topk_weights and the biases are like; None where absent.
        collapse: for layout "expert": makes the rows that peers pull.
        num_stagers: blocks besides `num_blocks`, for an x that lies outside the slab.
        out_bytes: of the allocation that holds the results; `places` says where, the weights' from
            `weights_offset` on.
    """

    launch: Launch
    collapse: Launch | None
    inputs: tuple[ArrayView | None, ...]
    frameworks: tuple[str, ...]
    num_blocks: int
    num_stagers: int
    out_bytes: int
    weights_offset: int
    arrays: ResultArrays
    places: tuple[tuple[int, int], ...]
    digest: int


class Combine:
    """The combines of one rank.

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
    ) -> None:
        self._domain = domain
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
        biases = () if bias is None else bias if type(bias) is tuple else (bias,)
        objects: Sequence[Any] = (x, weights, *[each for each in biases if each is not None])
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
        views = (x, weights, *request.biases)
        frameworks = tuple(dict.fromkeys(view.framework for view in views if view is not None))
        weights_offset = align_up(num_tokens * row_bytes(x), OFFSET_UNIT)
        return _Plan(
            launch=self._operations.combine(
                x.dtype,
                num_tokens=num_tokens,
                num_rows=x.shape[0],
                row_bytes=row_bytes(x),
                num_topk=num_topk,
                num_pullers=num_blocks,
            ),
            collapse=self._expert_major.collapse(
                x.dtype,
                num_topk=handle.num_topk,
                row_bytes=row_bytes(x),
                row_capacity=handle.landed.num_landed_rows,
            )
            if is_expert_major
            else None,
            inputs=tuple(None if view is None else replace(view, pointer=0, owner=None) for view in views),
            frameworks=frameworks,
            num_blocks=num_blocks,
            num_stagers=plan.num_stagers(num_blocks, x.shape[0] * row_bytes(x), max_blocks=domain.max_blocks),
            out_bytes=weights_offset + 4 * num_tokens * num_topk,
            weights_offset=weights_offset,
            arrays=domain.results(
                [
                    Column(x.dtype, x.shape[1:]),
                    None if summed is None else Column(summed.dtype, summed.shape[1:]),
                ],
                frameworks[0],
            ),
            places=((0, num_tokens), (weights_offset, num_tokens)),
            digest=combine_digest(request),
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
        x, weights, *biases = found.inputs
        assert x is not None
        staged_x: Lease | None
        staged_weights: Lease | None = None
        if found.collapse is not None:
            num_bytes = handle.landed.num_landed_rows * row_bytes(x)
            staged_x = domain.take(num_bytes, "a row for each received token")
        else:
            staged_x = inputs.stage(x, pointers[0], "x")
            staged_weights = inputs.stage(weights, pointers[1], "topk_weights")
        out = domain.heap.take(found.out_bytes, is_capturing=call.is_capturing)
        domain.order(call)

        args = found.launch.args
        args.send_plan = handle.routing.pointer + SEND_PLAN_OFFSET
        args.send_row = handle.routing.pointer + SEND_ROW_OFFSET
        for number, (view, pointer) in enumerate(zip(biases, pointers[2:], strict=True)):
            args.bias[number] = inputs.readable(view, pointer, call)
        args.out = out.pointer
        args.out_weights = out.pointer + found.weights_offset
        args.digest = along(found.digest, handle.call)
        args.y = args.num_stagers = args.weights_offset = 0
        num_blocks = found.num_blocks
        if found.collapse is not None:
            assert staged_x is not None
            self._collapse(found, found.collapse, pointers, handle, staged_x, call)
            args.y_offset = domain.offset(staged_x)
        else:
            args.weights_offset = inputs.slab_offset(weights, pointers[1], staged_weights, call)
            if staged_x is None or not inputs.is_readable(x, pointers[0]):
                args.y_offset = inputs.slab_offset(x, pointers[0], staged_x, call)
            else:
                args.y = pointers[0]  # the kernel stages it
                args.y_offset = domain.offset(staged_x)
                args.num_stagers = found.num_stagers or max(1, num_blocks // 2)
                num_blocks += found.num_stagers
                inputs.num_staged += 1
                call.temporaries.append(staged_x)
        found.launch(call.stream, num_blocks)
        self.num_calls += 1
        call.keep_with(out, handle.routing)
        event = domain.finish(call)
        combined_x, combined_weights = found.arrays.over(out.pointer, found.out_bytes, out, found.places)
        return Combined(combined_x, combined_weights, event)

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
        x, weights = found.inputs[:2]
        at = PlacesLayout.of(
            row_capacity=handle.landed.num_landed_rows,
            num_topk=handle.num_topk,
            num_local_experts=handle.landed.num_local_experts,
        )
        args = launch.args
        args.num_recv_tokens = handle.num_recv_tokens_pointer
        args.expert_row = handle.places.pointer + at.expert_row
        args.y = self._inputs.readable(x, pointers[0], call)
        args.weights = self._inputs.readable(weights, pointers[1], call)
        args.out = self._domain.address(out)
        launch(call.stream, plan.num_local_blocks(found.num_blocks, max_blocks=self._domain.max_blocks))
        call.temporaries += (out, handle.places)

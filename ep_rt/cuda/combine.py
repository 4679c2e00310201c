"""Combine on one rank: what a call needs, worked out once per shape, and the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cuda_arrays import Column, Fact, ResultArrays, glance, lasting_facts, without_lengths
from ..requests import CombineRequest, Schedule
from ..results import Combined, named
from . import plan
from .digest import along, combine_digest
from .domain import Call, Domain
from .expert_major import ExpertMajor, PlacesLayout
from .handle import SEND_PLAN_OFFSET, SEND_ROW_OFFSET, CudaDispatchHandle
from .inputs import Input, Inputs, row_bytes
from .internode import Internode, Returning, ReturnPlaces
from .launch import Launch
from .layout import OFFSET_UNIT, align_up
from .operations import Operations
from .plans import Plans, producers, seen
from .pool import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Combines that differ in the number of tokens and of rows at most: what holds for every call of them.

    Attributes:
        set_pointers, set_offsets: assign to the arguments of the launch.
        x, weights, biases: what the arrays are like.
        collapse: for layout "expert": makes the rows that peers pull.
        num_topk: columns of weights that are summed, too.
        arrays: the results.
        returning: over several nodes, the way of their sums back.
    """

    launch: Launch
    set_pointers: Callable[..., None]
    set_offsets: Callable[..., None]
    collapse: Launch | None
    x: Input
    weights: Input | None
    biases: tuple[Input, ...]
    frameworks: tuple[str, ...]
    num_blocks: int
    row_bytes: int
    num_topk: int
    arrays: ResultArrays
    digest: int
    num_sms: int
    returning: Returning | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A combine of certain shapes.

    Attributes:
        num_listed: tokens that the kernel combines.
        x, weights: what the arrays are like.
        num_stagers: blocks besides `num_blocks`, for an x that lies outside the slab.
        out_bytes: of the allocation that holds the results, the weights' from `weights_offset` on; `make`
            makes them.
        places: over several nodes, memory for the sums that come back.
    """

    kind: _Kind
    num_tokens: int
    num_listed: int
    x: Input
    weights: Input | None
    num_stagers: int
    out_bytes: int
    weights_offset: int
    make: Callable[[int, int, object], list[Any]]
    places: ReturnPlaces | None


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
        self._kinds: Plans[_Kind] = Plans()
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
        kind_key: Hashable = None
        found = None
        streams: tuple[int, ...] = ()
        is_mine = type(handle) is CudaDispatchHandle and handle.owner is self._owner
        if is_mine and (glanced := glance(objects)) is not None:
            facts, pointers = glanced
            key = (facts, schedule.num_sms, handle.facts)
            found = self._plans.find(key)
            if found is None and (left := _without_lengths(facts, handle)) is not None:
                kind_key = (left, schedule.num_sms, handle.lasting_facts)
                kind = self._kinds.find(kind_key)
                if kind is not None:
                    found = self._plans.keep(key, self._sized(kind, handle))
        if found is None:
            request = build(*given)
            views = request.x, request.topk_weights, *request.biases
            pointers, objects = seen(*views)
            streams = producers(*views)
            if kind_key is None:
                kind_key = (lasting_facts(views), schedule.num_sms, handle.lasting_facts)
            kind = self._kinds.find(kind_key)
            if kind is None:
                kind = self._kinds.keep(kind_key, self._prepare(request, schedule.num_sms))
            found = self._plans.keep(key, self._sized(kind, handle))
        return self._run(found, pointers, objects, streams, handle, schedule)

    def _prepare(self, request: CombineRequest, num_sms: int) -> _Kind:
        domain, x, weights = self._domain, request.x, request.topk_weights
        handle = request.handle
        is_expert_major = handle.layout == "expert"
        # In that layout the weights multiply the rows on this rank, and do not travel.
        summed = None if is_expert_major else weights
        num_topk = 0 if summed is None else summed.shape[1]
        num_blocks = domain.num_blocks(num_sms)
        returning = None
        if self._internode is not None:
            returning = self._internode.returning(x, summed, element=x.dtype)
        views = (x, weights, *request.biases)
        frameworks = tuple(dict.fromkeys(view.framework for view in views if view is not None))
        columns = [
            Column(x.dtype, x.shape[1:]),
            None if summed is None else Column(summed.dtype, summed.shape[1:]),
        ]
        launch = self._operations.combine(
            x.dtype, row_bytes=row_bytes(x), num_topk=num_topk, num_pullers=num_blocks
        )
        return _Kind(
            launch=launch,
            set_pointers=launch.setter("send_row", "send_plan", "y", "bias", "out", "out_weights"),
            set_offsets=launch.setter("digest", "y_offset", "weights_offset"),
            collapse=self._expert_major.collapse(x.dtype, num_topk=handle.num_topk, row_bytes=row_bytes(x))
            if is_expert_major
            else None,
            x=Input.of(x),
            weights=None if weights is None else Input.of(weights),
            biases=tuple(Input.of(bias) for bias in request.biases),
            frameworks=frameworks,
            num_blocks=num_blocks,
            row_bytes=row_bytes(x),
            num_topk=num_topk,
            arrays=domain.results(columns, frameworks[0]),
            digest=combine_digest(request),
            num_sms=num_sms,
            returning=returning,
        )

    def _sized(self, kind: _Kind, handle: CudaDispatchHandle) -> _Plan:
        """The plan for the tokens and rows of a handle."""
        num_tokens, num_rows = handle.num_tokens, handle.num_recv_rows
        weights_offset = align_up(num_tokens * kind.row_bytes, OFFSET_UNIT)
        places = None
        if kind.returning is not None:
            assert self._internode is not None
            places = self._internode.return_places(kind.returning, num_tokens)
        return _Plan(
            kind,
            num_tokens,
            num_tokens if places is None else places.capacity,
            kind.x.of_rows(num_rows),
            None if kind.weights is None else kind.weights.of_rows(num_rows),
            plan.num_stagers(kind.num_blocks, num_rows * kind.row_bytes, max_blocks=self._domain.max_blocks),
            weights_offset + 4 * num_tokens * kind.num_topk,
            weights_offset,
            kind.arrays.placed(((0, num_tokens), (weights_offset, num_tokens))),
            places,
        )

    def _run(
        self,
        found: _Plan,
        pointers: Sequence[int],
        objects: Sequence[Any],
        streams: tuple[int, ...],
        handle: CudaDispatchHandle,
        schedule: Schedule,
    ) -> Combined:
        domain, inputs, kind = self._domain, self._inputs, found.kind
        domain.check()
        call = domain.begin(kind.frameworks, objects, schedule, streams)
        x, weights = found.x, found.weights
        # Where peers find them, or where there is room for a copy that they find.
        x_at: int | Lease
        weights_at: int | Lease = 0
        if kind.collapse is not None:
            num_bytes = handle.landed.num_landed_rows * kind.row_bytes
            x_at = domain.take(num_bytes, "a row for each received token")
        else:
            x_at = inputs.slab_place(x, pointers[0], "x")
            if weights is not None:
                weights_at = inputs.slab_place(weights, pointers[1], "topk_weights")
        out = domain.heap.take(found.out_bytes, is_capturing=call.is_capturing)
        domain.order(call)

        args, routing = kind.launch.args, handle.routing
        results = out.pointer, out.pointer + found.weights_offset
        biases: list[int] = []
        for number, bias in enumerate(kind.biases):
            biases.append(inputs.readable(bias.of_rows(found.num_tokens), pointers[2 + number], call))
        places, here = found.places, results
        first_bias = second_bias = returned = 0
        if places is None:
            first_bias, second_bias, *_ = *biases, 0, 0
        else:
            here, returned = self._before_return(places, handle, args, call)
        y = num_stagers = 0
        num_blocks = kind.num_blocks
        if isinstance(weights_at, Lease):
            assert weights is not None
            weights_at = inputs.stage(weights, pointers[1], weights_at, call)
        if not isinstance(x_at, Lease):
            y_offset = x_at
        elif kind.collapse is not None:
            self._collapse(found, kind.collapse, pointers, handle, x_at, call)
            y_offset = domain.offset(x_at)
        elif places is not None or not x.is_readable(pointers[0]):
            y_offset = inputs.stage(x, pointers[0], x_at, call)
        else:
            y = pointers[0]  # the kernel stages it
            y_offset = domain.offset(x_at)
            num_stagers = found.num_stagers or max(1, num_blocks // 2)
            num_blocks += found.num_stagers
            inputs.num_staged += 1
            call.temporaries.append(x_at)
        base = routing.pointer
        kind.set_pointers(base + SEND_ROW_OFFSET, base + SEND_PLAN_OFFSET, y, first_bias, second_bias, *here)
        kind.set_offsets(along(kind.digest, handle.call), y_offset, weights_at)
        args.num_tokens, args.num_rows, args.num_stagers = found.num_listed, handle.num_recv_rows, num_stagers
        kind.launch(call.stream, num_blocks)
        self.num_calls += 1
        if places is None:
            call.keep_with(out, routing)
        else:
            internode, crossing, returning = self._internode, handle.crossing, kind.returning
            assert internode is not None
            assert crossing is not None
            assert returning is not None
            internode.take_back(
                returning, places, crossing, here, returned, biases, results, call, num_sms=kind.num_sms
            )
            call.keep_with(out, routing, crossing.block)
        event = domain.finish(call)
        combined_x, combined_weights = found.make(out.pointer, found.out_bytes, out)
        return named(Combined, (combined_x, combined_weights, event))

    def _before_return(
        self, places: ReturnPlaces, handle: CudaDispatchHandle, args: Any, call: Call
    ) -> tuple[tuple[int, int], int]:
        """Where the sums of this node go that others wait for, and theirs for this node."""
        assert handle.crossing is not None
        rows_at, weights_at, returned_at = places.here
        num_bytes = returned_at + places.returned[-1]
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
        args.row_capacity = handle.landed.num_landed_rows
        args.num_recv_tokens = handle.num_recv_tokens_pointer
        args.expert_row = handle.places.pointer + at.expert_row
        args.y = self._inputs.readable(found.x, pointers[0], call)
        args.weights = self._inputs.readable(found.weights, pointers[1], call)
        args.out = self._domain.address(out)
        launch(call.stream, plan.num_local_blocks(found.kind.num_blocks, max_blocks=self._domain.max_blocks))
        call.temporaries += (out, handle.places)


def _without_lengths(facts: Sequence[Fact | None], handle: CudaDispatchHandle) -> Hashable:
    """What is left of facts where there may be any number of tokens and rows. None where the numbers of
    arrays and handle do not go together, so that the arguments must be looked at."""
    split = without_lengths(facts)
    if split is None:
        return None
    left, (num_rows, num_weights, *num_biases) = split
    num_recv_rows, num_tokens = handle.num_recv_rows, handle.num_tokens
    fits = num_rows == num_recv_rows and num_weights in (None, num_recv_rows)
    return left if fits and all(length == num_tokens for length in num_biases) else None

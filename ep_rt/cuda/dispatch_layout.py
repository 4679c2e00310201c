"""Where this rank's tokens go, counted on the device for who asks before a dispatch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cuda_arrays import Column, glance
from ..requests import LayoutRequest, Schedule
from ..results import DispatchLayout, named
from ..topology import Topology
from .domain import Domain
from .inputs import Input, Inputs, itemsize
from .launch import Launch
from .memory import device_errors
from .operations import Operations
from .plans import Plans, producers, seen


@dataclass(frozen=True, slots=True)
class _Plan:
    """A layout of certain shapes.

    Attributes:
        cleared_bytes: at the beginning of the results' memory: all counts.
        offsets: there, of the counts by rank, expert and node, and of the flags.
        shape: arguments of the launch.
        make: makes the results.
    """

    ids: Input
    frameworks: tuple[str, ...]
    num_bytes: int
    cleared_bytes: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    make: Callable[[int, int, object], list[Any]]


class DispatchLayouts:
    """The layouts of one rank, over the ranks of all nodes."""

    def __init__(self, domain: Domain, operations: Operations, inputs: Inputs, topology: Topology) -> None:
        self._domain = domain
        self._inputs = inputs
        self._topology = topology
        self._plans: Plans[_Plan] = Plans()
        self._launch: Launch = operations.dispatch_layout()
        self._set = self._launch.setter(
            *("topk_idx", "num_tokens_per_rank", "num_tokens_per_expert", "num_tokens_per_node"),
            "is_token_in_rank",
            *("num_ranks", "ranks_per_node", "num_tokens", "num_topk", "num_experts", "idx_bytes"),
        )

    def __call__(
        self,
        topk_idx: object,
        num_experts: int,
        build: Callable[[object, int], LayoutRequest],
        schedule: Schedule,
    ) -> DispatchLayout:
        """One layout. The device is current.

        Args:
            build: makes a checked request of the arguments before it.
        """
        key: Hashable = None
        found = None
        streams: tuple[int, ...] = ()
        objects: Sequence[object] = (topk_idx,)
        if (glanced := glance(objects)) is not None:
            facts, pointers = glanced
            key = (facts, num_experts)
            found = self._plans.find(key)
        if found is None:
            request = build(topk_idx, num_experts)
            pointers, objects = seen(request.topk_idx)
            streams = producers(request.topk_idx)
            found = self._plans.keep(key, self._prepare(request))
        return self._run(found, pointers[0], objects, streams, schedule)

    def _prepare(self, request: LayoutRequest) -> _Plan:
        ids, num_ranks = request.topk_idx, self._topology.num_ranks
        num_nodes = self._topology.num_nodes
        (num_tokens, num_topk), num_experts = ids.shape, request.num_experts
        per_expert = 4 * num_ranks
        per_node = per_expert + 4 * num_experts
        in_rank = per_node + 4 * num_nodes
        count = Column("int32", ())
        results = self._domain.results(
            [count, count if num_nodes > 1 else None, count, Column("bool", (num_ranks,))], ids.framework
        )
        places = (0, num_ranks), (per_node, num_nodes), (per_expert, num_experts), (in_rank, num_tokens)
        return _Plan(
            Input.of(ids),
            (ids.framework,),
            in_rank + num_tokens * num_ranks,
            in_rank,
            (0, per_expert, per_node, in_rank),
            (num_ranks, num_ranks // num_nodes, num_tokens, num_topk, num_experts, itemsize(ids)),
            results.placed(places),
        )

    def _run(
        self,
        found: _Plan,
        pointer: int,
        objects: Sequence[object],
        streams: tuple[int, ...],
        schedule: Schedule,
    ) -> DispatchLayout:
        domain = self._domain
        domain.check()
        call = domain.begin(found.frameworks, objects, schedule, streams)
        block = domain.heap.take(found.num_bytes, is_capturing=call.is_capturing)
        domain.order(call)
        base = block.pointer
        with device_errors("get_dispatch_layout"):
            domain.runtime.memsetAsync(base, 0, found.cleared_bytes, call.stream)
        ids = self._inputs.readable(found.ids, pointer, call)
        self._set(ids, *[base + offset for offset in found.offsets], *found.shape)
        self._launch(call.stream)
        call.keep_with(block)
        event = domain.finish(call)
        return named(DispatchLayout, (*found.make(base, found.num_bytes, block), event))

"""One rank's arrays and calls for one workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..buffer import Buffer
from ..config import Config
from ..cuda import plan
from ..cuda.layout import MAX_BLOCKS
from ..exchange import Group
from .options import Options
from .places import TIMEOUT_S, CudaPlace, Place
from .workload import Array, Element, Payload, Routing

_MIN_BUFFER_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An operation that can be repeated, with what it must be called with in mind.

    Attributes:
        run: enqueues one, or performs it.
        can_be_captured: in a CUDA graph.
        begin: for a call in two phases, the first one; what it returns has the hook that is the other one.
    """

    name: str
    run: Callable[[], Any]
    can_be_captured: bool
    begin: Callable[[], Any] | None = None


class Layer:
    """Arrays that live as long as the measurements of one (element, number of tokens).

    Attributes:
        salt: of the rows in `x`. What an expert at rank d returns has salt + d.
    """

    def __init__(
        self, group: Group, buffer: Buffer, place: Place, element: Element, routing: Routing, options: Options
    ) -> None:
        self.group, self.buffer, self.place = group, buffer, place
        self.element, self.routing = element, routing
        self.payload = Payload(element, options.hidden)
        self.num_experts = options.num_experts
        self.salt = 0
        self.tokens = np.arange(len(routing.topk_idx[group.rank]))
        self.src_rank, self.src_token = routing.received(group.rank)
        self.num_worst_tokens = group.size * len(self.tokens)
        self.config = Config()

        group.barrier()
        self._rows = place.put(self.rows())
        self._scales = place.put(self.scales()) if element.block else None
        self.ids = place.put(routing.topk_idx[group.rank])
        self.weights = place.put(routing.weights(group.rank))
        group.barrier()
        # Combines and repeated dispatches are of what was received, and not of the worst case.
        self.handle = self.dispatch_exact().handle
        place.synchronize()
        group.barrier()
        self._names = options.operations_of(element.name, buffer.backend)
        self.y = {name: self._empty(name, options.hidden) for name in self._names if "combine" in name}
        group.barrier()

    def use_sms(self, num_sms: int | None) -> None:
        """Let later calls use so many SMs; None on the host."""
        self.config = Config() if num_sms is None else Config(num_sms=num_sms)

    def max_sms(self, name: str) -> int | None:
        """SMs that an operation may take. None on the host, and over nodes, where two kernels run at once."""
        place = self.place
        if not isinstance(place, CudaPlace) or self.buffer.topology.num_nodes > 1:
            return None

        def blocks(num_sms: int) -> int:
            return plan.num_blocks(num_sms, num_device_sms=place.num_sms, num_sharing=place.num_sharing)

        num_sms = blocks(self.config.num_sms)
        if name != "combine-copied":
            return num_sms
        # Those that copy come besides, as many as the rows and the GPU allow.
        num_bytes = max(self.routing.traffic().received) * self.payload.hidden * self.element.dtype.itemsize
        most = blocks(min(place.num_sms, MAX_BLOCKS))
        return num_sms + plan.num_stagers(num_sms, num_bytes, max_blocks=most)

    def calls(self) -> list[Call]:
        """The operations that were asked for and that there are here."""
        dispatches = {
            "dispatch": self.dispatch_worst,
            "dispatch-cached": self.dispatch_cached,
            "dispatch-exact": self.dispatch_exact,
        }
        return [
            Call(
                name=name,
                run=dispatches[name] if name in dispatches else self._combine_of(name),
                can_be_captured=name != "dispatch-exact",
            )
            for name in self._names
        ]

    # Operations.

    @property
    def x(self) -> Any:
        return self._rows if self._scales is None else (self._rows, self._scales)

    def dispatch_worst(self) -> Any:
        return self._dispatch(num_worst_tokens=self.num_worst_tokens)

    def dispatch_exact(self) -> Any:
        return self._dispatch(num_worst_tokens=0)

    def dispatch_cached(self) -> Any:
        return self.buffer.dispatch(self.x, handle=self.handle, config=self.config)

    def _dispatch(self, num_worst_tokens: int) -> Any:
        return self.buffer.dispatch(
            self.x,
            topk_idx=self.ids,
            topk_weights=self.weights,
            num_worst_tokens=num_worst_tokens,
            num_experts=self.num_experts,
            config=self.config,
        )

    def _combine_of(self, name: str) -> Callable[[], Any]:
        y = self.y[name]
        return lambda: self.buffer.combine(y, self.handle, config=self.config)

    def _empty(self, name: str, hidden: int) -> Any:
        """Room for what the experts return: in communication memory, unless it is to be copied there."""
        shape = len(self.src_rank), hidden
        if name == "combine" and self.buffer.backend == "cuda":
            return self.buffer.empty(shape, "bfloat16")
        return self.place.put(np.zeros(shape, self.element.dtype))

    # Contents.

    def renew(self) -> None:
        """Other rows, so that what an earlier call left is not taken for what this one did."""
        self.salt += self.group.size
        self.place.write(self._rows, self.rows())
        if self._scales is not None:
            self.place.write(self._scales, self.scales())
        for y in self.y.values():
            self.place.write(y, self.payload.rows(self.src_rank, self.src_token, self.salt + self.group.rank))

    def rows(self) -> Array:
        """What this rank dispatches."""
        return self.payload.rows(self.group.rank, self.tokens, self.salt)

    def scales(self) -> Array:
        return self.payload.scales(self.group.rank, self.tokens, self.salt)


def open_buffer(
    group: Group,
    place: Place,
    routing: Routing,
    element: Element,
    options: Options,
    *,
    counts_bytes: bool = False,
    ranks_per_node: int | None = None,
) -> Buffer:
    """A buffer with room for what `Layer` holds at a time. The last two: see `Buffer`."""
    num_tokens = len(routing.topk_idx[0])
    metadata_bytes = 12 * options.num_topk
    # A result of the worst case, one on its way, what remains for one of exact size; rows of two combines.
    row_bytes = 3 * (element.row_bytes(options.hidden) + metadata_bytes) + 4 * options.hidden
    num_bytes = _MIN_BUFFER_BYTES + group.size * num_tokens * row_bytes
    return Buffer(
        group,
        num_bytes if place.setting.backend == "cuda" else 0,
        backend=place.setting.backend,
        timeout_s=TIMEOUT_S,
        counts_bytes=counts_bytes,
        ranks_per_node=ranks_per_node,
    )

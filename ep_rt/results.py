"""What the calls of `Buffer` return: named tuples in DeepEP's order.

Each call makes its own by `named`, from a tuple of the fields: the class itself takes twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .events import EventOverlap
from .handle import DispatchHandle, LowLatencyHandle

named: Final = tuple.__new__
"""``named(Combined, (x, None, event))`` is ``Combined(x, None, event)``."""


class DispatchLayout(NamedTuple):
    """See `Buffer.get_dispatch_layout`."""

    num_tokens_per_rank: Any
    num_tokens_per_rdma_rank: Any
    num_tokens_per_expert: Any
    is_token_in_rank: Any
    event: EventOverlap


class Dispatched(NamedTuple):
    """See `Buffer.dispatch`."""

    recv_x: Any
    recv_topk_idx: Any
    recv_topk_weights: Any
    num_recv_tokens_per_expert_list: Sequence[int]
    handle: DispatchHandle
    event: EventOverlap


class Combined(NamedTuple):
    """See `Buffer.combine`."""

    combined_x: Any
    combined_topk_weights: Any
    event: EventOverlap


class LowLatencyDispatched(NamedTuple):
    """See `Buffer.low_latency_dispatch`."""

    recv_x: Any
    recv_count: Any
    handle: LowLatencyHandle
    event: EventOverlap
    hook: Callable[[], None] | None


class LowLatencyCombined(NamedTuple):
    """See `Buffer.low_latency_combine`."""

    combined_x: Any
    event: EventOverlap
    hook: Callable[[], None] | None

"""What a dispatch on a GPU leaves for its combine or for a repeated dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..handle import DispatchHandle
from .heap import Block
from .layout import DISPATCH_RESULT, MAX_LOCAL_RANKS, SEND_PLAN, align_up

_RESULT_OFFSET: Final = SEND_PLAN.itemsize
_SEND_ROW_OFFSET: Final = align_up(_RESULT_OFFSET + DISPATCH_RESULT.itemsize, 256)


def routing_bytes(num_tokens: int) -> int:
    """Of the block that holds a dispatch's `SEND_PLAN`, its `DISPATCH_RESULT` and the rows of its tokens."""
    return _SEND_ROW_OFFSET + 4 * MAX_LOCAL_RANKS * num_tokens


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CudaDispatchHandle(DispatchHandle):
    """Of the CUDA backend.

    Attributes:
        call: the number of the dispatch, the same on every rank.
        routing: see `routing_bytes`.
        known_recv_tokens: None where only the device knows.
        read_result: fetches the `DISPATCH_RESULT` [1] at an address, once earlier calls are done.
    """

    call: int
    routing: Block = field(repr=False)
    known_recv_tokens: int | None = field(repr=False)
    read_result: Callable[[int], NDArray[Any]] = field(repr=False)

    @property
    def num_recv_tokens(self) -> int:
        if self.known_recv_tokens is not None:
            return self.known_recv_tokens
        return int(self.read_result(result_pointer(self.routing))["num_recv_tokens"][0])


def send_plan_pointer(routing: Block) -> int:
    return routing.pointer


def result_pointer(routing: Block) -> int:
    return routing.pointer + _RESULT_OFFSET


def send_row_pointer(routing: Block) -> int:
    return routing.pointer + _SEND_ROW_OFFSET


def empty_result() -> NDArray[Any]:
    """A `DISPATCH_RESULT` [1] of zeros."""
    return np.zeros(1, DISPATCH_RESULT)

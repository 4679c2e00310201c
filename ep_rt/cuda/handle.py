"""What a dispatch on a GPU leaves for its combine or for a repeated dispatch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from ..handle import DispatchHandle
from .heap import Block
from .layout import DISPATCH_RESULT, MAX_LOCAL_RANKS, SEND_PLAN, Struct, align_up, field_offset
from .plan import aligned

# Within the block that holds the routing of a dispatch.
SEND_PLAN_OFFSET: Final = 0
RESULT_OFFSET: Final = SEND_PLAN.itemsize
NUM_RECV_TOKENS_OFFSET: Final = RESULT_OFFSET + field_offset(DISPATCH_RESULT, "num_recv_tokens")
EXPERT_COUNTS_OFFSET: Final = RESULT_OFFSET + field_offset(DISPATCH_RESULT, "expert_counts")
RECV_COUNTS_OFFSET: Final = SEND_PLAN_OFFSET + field_offset(SEND_PLAN, "recv_counts")
SEND_ROW_OFFSET: Final = align_up(RESULT_OFFSET + DISPATCH_RESULT.itemsize, 256)

_INT32: Final[Struct] = np.dtype("<i4")
_INT64: Final[Struct] = np.dtype("<i8")


def routing_bytes(num_tokens: int) -> int:
    """Of the block that holds a dispatch's `SEND_PLAN`, its `DISPATCH_RESULT` and the rows of its tokens."""
    return SEND_ROW_OFFSET + 4 * MAX_LOCAL_RANKS * num_tokens


@dataclass(slots=True, eq=False, kw_only=True)
class CudaDispatchHandle(DispatchHandle):
    """Of the CUDA backend.

    Attributes:
        call: the number of the dispatch, the same on every rank.
        num_ranks: of the buffer.
        routing: see `routing_bytes`.
        num_local_experts: of the model; 0 where that is not known.
        num_landed_rows: that the peers could write, or wrote where that is known.
        known_recv_tokens: None where only the device knows.
        read: fetches a struct [1] from an address, once earlier calls are done.
        places: with layout "expert", see `expert_major.PlacesLayout`.
    """

    call: int
    num_ranks: int
    routing: Block = field(repr=False)
    num_local_experts: int = field(repr=False)
    expert_alignment: int = field(repr=False)
    num_landed_rows: int = field(repr=False)
    known_recv_tokens: int | None = field(repr=False)
    read: Callable[[int, Struct], NDArray[Any]] = field(repr=False)
    places: Block | None = field(default=None, repr=False)

    @property
    def facts(self) -> tuple[Hashable, ...]:
        """What decides, besides the arrays, how calls with this handle are made."""
        return (
            self.layout,
            self.num_tokens,
            self.num_recv_rows,
            self.num_landed_rows,
            self.num_topk,
            self.num_local_experts,
            self.expert_alignment,
        )

    @property
    def num_recv_tokens(self) -> int:
        if self.known_recv_tokens is not None:
            return self.known_recv_tokens
        return int(self.read(self.routing.pointer + NUM_RECV_TOKENS_OFFSET, _INT32)[0])

    @property
    def num_recv_tokens_per_rank(self) -> list[int]:
        counts = self.read(self.routing.pointer + RECV_COUNTS_OFFSET, np.dtype(("<i4", (self.num_ranks,))))
        per_rank: list[int] = counts[0].tolist()
        return per_rank

    @property
    def num_needed_rows(self) -> int:
        if self.places is None:
            return self.num_recv_tokens
        return int(self.read(self.places.pointer, _INT64)[0])

    @property
    def num_recv_tokens_pointer(self) -> int:
        """Where the device finds `num_recv_tokens`; 0 where it is `num_landed_rows`."""
        return 0 if self.known_recv_tokens is not None else self.routing.pointer + NUM_RECV_TOKENS_OFFSET


class LazyCounts(Sequence[int]):
    """Counts by expert that only the device knows. Looking at them waits for the calls so far, each time.

    Args:
        read: as in `CudaDispatchHandle`.
        routing: of the dispatch that counts.
        num_counts, alignment: how many there are, and what each is rounded up to.
    """

    __slots__ = ("_alignment", "_fetch", "_num_counts", "_routing")

    def __init__(
        self, read: Callable[[int, Struct], NDArray[Any]], routing: Block, num_counts: int, alignment: int
    ) -> None:
        self._fetch = read
        self._routing = routing
        self._num_counts = num_counts
        self._alignment = alignment

    def __len__(self) -> int:
        return self._num_counts

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._read()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._read() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _read(self) -> list[int]:
        pointer = self._routing.pointer + EXPERT_COUNTS_OFFSET
        counts = self._fetch(pointer, np.dtype(("<i4", (self._num_counts,))))[0]
        return aligned(counts.tolist(), self._alignment)

    def __repr__(self) -> str:
        return f"<{self._num_counts} counts on the device>"

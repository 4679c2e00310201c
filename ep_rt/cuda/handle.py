"""What a dispatch on a GPU leaves for its combine or for a repeated dispatch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ..cuda_arrays import Column
from ..handle import DispatchHandle
from .domain import Domain
from .heap import Block
from .internode import Crossing
from .layout import DISPATCH_RESULT, MAX_LOCAL_RANKS, SEND_PLAN, Struct, align_up, field_offset
from .plan import aligned

# Within the block that holds the routing of a dispatch.
SEND_PLAN_OFFSET: Final = 0
RECV_ENDS_OFFSET: Final = SEND_PLAN_OFFSET + field_offset(SEND_PLAN, "recv_ends")
EXPERT_ENDS_OFFSET: Final = SEND_PLAN_OFFSET + field_offset(SEND_PLAN, "expert_ends")
RESULT_OFFSET: Final = SEND_PLAN.itemsize
NUM_RECV_TOKENS_OFFSET: Final = RESULT_OFFSET + field_offset(DISPATCH_RESULT, "num_recv_tokens")
EXPERT_COUNTS_OFFSET: Final = RESULT_OFFSET + field_offset(DISPATCH_RESULT, "expert_counts")
SEND_ROW_OFFSET: Final = align_up(RESULT_OFFSET + DISPATCH_RESULT.itemsize, 256)

_INT32: Final[Struct] = np.dtype("<i4")
_INT64: Final[Struct] = np.dtype("<i8")
_ENDS: Final = Column("int32", ())


def routing_bytes(num_tokens: int) -> int:
    """Of the block that holds a dispatch's `SEND_PLAN`, its `DISPATCH_RESULT` and the rows of its tokens."""
    return SEND_ROW_OFFSET + 4 * MAX_LOCAL_RANKS * num_tokens


class CudaHandleShape(NamedTuple):
    """What besides `HandleShape` all handles of like dispatches have in common.

    Attributes:
        num_ranks: of the buffer.
        num_local_experts: of the model; 0 where that is not known.
        num_landed_rows: that the peers could write, or wrote where that is known.
    """

    num_ranks: int
    num_local_experts: int
    expert_alignment: int
    num_landed_rows: int


@dataclass(slots=True, eq=False)
class CudaDispatchHandle(DispatchHandle):
    """Of the CUDA backend.

    Attributes:
        landed: the shape of what landed.
        call: the number of the dispatch, the same on every rank.
        routing: see `routing_bytes`.
        known_recv_tokens: None where only the device knows.
        domain: reads what only the device knows, and makes arrays over it.
        framework: of x.
        places: with layout "expert", see `expert_major.PlacesLayout`.
        crossing: over several nodes, which tokens cross the network.
    """

    landed: CudaHandleShape = field(repr=False)
    call: int
    routing: Block = field(repr=False)
    known_recv_tokens: int | None = field(repr=False)
    domain: Domain = field(repr=False)
    framework: str = field(repr=False)
    places: Block | None = field(repr=False)
    crossing: Crossing | None = field(repr=False)

    @property
    def facts(self) -> Hashable:
        """What decides, besides the arrays, how calls with this handle are made."""
        return self.shape, self.landed

    @property
    def lasting_facts(self) -> Hashable:
        """Those of them that do not change with the number of tokens, sent or received."""
        (_, num_topk, _, layout), (num_ranks, num_local_experts, alignment, _) = self.shape, self.landed
        return num_topk, layout, num_ranks, num_local_experts, alignment

    @property
    def num_recv_tokens(self) -> int:
        if self.known_recv_tokens is not None:
            return self.known_recv_tokens
        return int(self.domain.read(self.routing.pointer + NUM_RECV_TOKENS_OFFSET, _INT32)[0])

    @property
    def num_recv_tokens_per_rank(self) -> list[int]:
        plan = self.domain.read(self.routing.pointer + SEND_PLAN_OFFSET, SEND_PLAN)
        num_ranks = self.landed.num_ranks
        per_rank: list[int] = plan["recv_counts"][0, :num_ranks].tolist()
        if self.crossing is not None:
            num_nodes = self.crossing.num_nodes
            per_rank = plan["segment_counts"][0, :num_nodes, : num_ranks // num_nodes].reshape(-1).tolist()
        return per_rank

    @property
    def psum_num_recv_tokens_per_local_rank(self) -> Any:
        return self._ends(RECV_ENDS_OFFSET, self.domain.group.size)

    @property
    def psum_num_recv_tokens_per_expert(self) -> Any:
        return self._ends(EXPERT_ENDS_OFFSET, self.landed.num_local_experts) if self.num_topk else None

    def _ends(self, offset: int, length: int) -> Any:
        arrays = self.domain.results([_ENDS], self.framework)
        [ends] = arrays.over(self.routing.pointer, RESULT_OFFSET, self.routing, [(offset, length)])
        return ends

    @property
    def num_needed_rows(self) -> int:
        if self.places is None:
            return self.num_recv_tokens
        return int(self.domain.read(self.places.pointer, _INT64)[0])

    @property
    def num_recv_tokens_pointer(self) -> int:
        """Where the device finds `num_recv_tokens`; 0 where it is that of `landed`."""
        return 0 if self.known_recv_tokens is not None else self.routing.pointer + NUM_RECV_TOKENS_OFFSET


class LazyCounts(Sequence[int]):
    """Counts by expert that only the device knows. Looking at them waits for the calls so far, each time.

    Args:
        read: fetches a struct [1] from an address, once earlier calls are done.
        routing: of the dispatch that counts.
        shape: says how many there are, and what each is rounded up to.
    """

    __slots__ = ("_fetch", "_routing", "_shape")

    def __init__(
        self, read: Callable[[int, Struct], NDArray[Any]], routing: Block, shape: CudaHandleShape
    ) -> None:
        self._fetch = read
        self._routing = routing
        self._shape = shape

    def __len__(self) -> int:
        return self._shape.num_local_experts

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
        counts = self._fetch(pointer, np.dtype(("<i4", (len(self),))))[0]
        return aligned(counts.tolist(), self._shape.expert_alignment)

    def __repr__(self) -> str:
        return f"<{len(self)} counts on the device>"

"""What a dispatch leaves for its combine or for a repeated dispatch."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.intp]


class HandleShape(NamedTuple):
    """What all handles of like dispatches have in common. See the attributes of `DispatchHandle`."""

    num_tokens: int
    num_topk: int
    num_recv_rows: int
    layout: str


@dataclass(slots=True, eq=False)
class DispatchHandle(abc.ABC):
    """The routing of one normal-mode dispatch as its rank saw it. Opaque to callers but for the counts.

    Never changed once made; not frozen, because that takes as long as the rest of a dispatch's bookkeeping.

    Attributes:
        shape: the first of what follows, as a whole.
        num_tokens: tokens this rank sent from.
        num_topk: columns of ``topk_idx``; 0 when the dispatch had none.
        num_recv_rows: rows of ``recv_x``: `num_needed_rows`, or ``num_worst_tokens`` when that was given.
        layout: "rank" or "expert", of the rows.
        num_recv_tokens_per_expert_list: as returned by the dispatch.
        psum_num_tokens_per_expert: with layout "expert" int32 [num_local_experts], where each expert's true
            rows end, at most `num_recv_rows`; an expert's rows begin at the first multiple of
            ``expert_alignment`` from the end of the one before, the first's at 0. In the framework of
            ``topk_idx``; on a GPU it lies there, and reading it there needs no host. None with "rank".
    """

    owner: Any = field(repr=False)
    shape: HandleShape
    num_recv_tokens_per_expert_list: Sequence[int]
    psum_num_tokens_per_expert: Any = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return self.shape.num_tokens

    @property
    def num_topk(self) -> int:
        return self.shape.num_topk

    @property
    def num_recv_rows(self) -> int:
        return self.shape.num_recv_rows

    @property
    def layout(self) -> str:
        return self.shape.layout

    @property
    @abc.abstractmethod
    def num_recv_tokens(self) -> int:
        """Tokens that were sent to this rank, dropped ones included.

        On a GPU, after a dispatch with ``num_worst_tokens``, reading it waits for the dispatch.
        """

    @property
    @abc.abstractmethod
    def num_recv_tokens_per_rank(self) -> list[int]:
        """The same by source rank. On a GPU reading it waits for the dispatch."""

    @property
    @abc.abstractmethod
    def psum_num_recv_tokens_per_local_rank(self) -> Any:
        """int32 [ranks of a node], tokens from all sources whose local rank is no higher; on one node by
        source rank. The last is `num_recv_tokens`.

        In the framework of ``x``; on a GPU it lies there, and reading it there needs no host.
        """

    @property
    @abc.abstractmethod
    def psum_num_recv_tokens_per_expert(self) -> Any:
        """int32 [num_local_experts], sums of `num_recv_tokens_per_expert_list` up to each, in the same place.

        None where the dispatch had no ``topk_idx``.
        """

    @property
    def num_needed_rows(self) -> int:
        """Rows that ``num_worst_tokens`` would have to be at least, for nothing to be dropped.

        With layout "rank" `num_recv_tokens`. With "expert" the padded segments of all experts together; that
        is a lower bound where more tokens arrived than ``num_worst_tokens``. Waits as `num_recv_tokens` does.
        """
        return self.num_recv_tokens

    @property
    def overflow(self) -> bool:
        """Whether ``num_worst_tokens`` left room for fewer rows than were needed; the last were dropped."""
        return self.num_needed_rows > self.num_recv_rows


class FlatShape(NamedTuple):
    """What a flat handle is besides its bytes: constants, for a graph. See `Buffer.flatten_handle`.

    Attributes:
        handle: of the handle.
        num_landed_rows: received tokens that it has room for: ``num_worst_tokens``, if that was given, and
            with layout "expert" no more than ``num_max_tokens_per_rank`` of each rank.
        num_local_experts, expert_alignment: of the dispatch.
        is_exact: whether the dispatch had no ``num_worst_tokens``.
    """

    handle: HandleShape
    num_landed_rows: int
    num_local_experts: int
    expert_alignment: int = 1
    is_exact: bool = False


class FlatField(NamedTuple):
    """Little-endian int32 numbers in a flat handle: `length` of them, from byte `offset` of array `array`."""

    array: int
    offset: int
    length: int


class FlatLayout(NamedTuple):
    """Where things are in a flat handle. After an exact dispatch only the last two are there.

    Attributes:
        num_bytes: of each of its arrays.
        num_recv_tokens, num_needed_rows: see `DispatchHandle`.
        expert_counts: [num_local_experts], pairs of tokens and local experts, of dropped rows too; rounded
            up to the alignment, or not yet.
        psum: with layout "expert" ``psum_num_tokens_per_expert``, else nothing.
        expert_row: with layout "expert" [num_landed_rows, num_topk], the row that each column of a received
            token became, negative for none. What lies behind the last received token is unspecified.
    """

    num_bytes: tuple[int, ...]
    num_recv_tokens: FlatField
    num_needed_rows: FlatField
    expert_counts: FlatField
    psum: FlatField
    expert_row: FlatField


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExpertRows:
    """What the rows of the expert-major layout stand for, on the host.

    Attributes:
        received_row, topk: int64 [num_recv_rows], the received token and its column; -1 in padding.
        num_received_rows: received tokens that are kept, in their own order.
        num_needed_rows: see `DispatchHandle`.
    """

    received_row: NDArray[np.int64]
    topk: NDArray[np.int64]
    num_received_rows: int
    num_needed_rows: int


@dataclass(slots=True, eq=False, kw_only=True)
class HostDispatchHandle(DispatchHandle):
    """Of the host backend.

    Attributes:
        is_token_in_rank: bool [num_tokens, num_ranks].
        send_tokens: tokens for each rank, ascending.
        recv_counts: tokens from each rank.
        local_ranks: of each rank, its number within its node.
        give: hands an array to the framework of ``x``.
        expert_rows: with layout "expert".
    """

    is_token_in_rank: NDArray[np.bool_] = field(repr=False)
    send_tokens: tuple[Tokens, ...] = field(repr=False)
    recv_counts: tuple[int, ...] = field(repr=False)
    local_ranks: tuple[int, ...] = field(repr=False)
    give: Callable[[NDArray[Any]], Any] = field(default=np.asarray, repr=False)
    expert_rows: ExpertRows | None = field(default=None, repr=False)

    @property
    def num_recv_tokens(self) -> int:
        return sum(self.recv_counts)

    @property
    def num_recv_tokens_per_rank(self) -> list[int]:
        return list(self.recv_counts)

    @property
    def psum_num_recv_tokens_per_local_rank(self) -> Any:
        counts = np.bincount(self.local_ranks, weights=self.recv_counts)
        return self.give(np.cumsum(counts).astype(np.int32))

    @property
    def psum_num_recv_tokens_per_expert(self) -> Any:
        if self.num_topk == 0:
            return None
        return self.give(np.cumsum(self.num_recv_tokens_per_expert_list, dtype=np.int32))

    @property
    def num_needed_rows(self) -> int:
        return self.num_recv_tokens if self.expert_rows is None else self.expert_rows.num_needed_rows


class LowLatencyHandleShape(NamedTuple):
    """What all handles of like dispatches have in common. See the attributes of `LowLatencyHandle`."""

    num_tokens: int
    num_topk: int
    num_max_tokens_per_rank: int
    hidden: int
    num_experts: int
    framework: str
    layout: str
    has_weights: bool


@dataclass(slots=True, eq=False)
class LowLatencyHandle:
    """The routing of one low-latency dispatch. Unpacks like DeepEP's tuple.

    Never changed once made; not frozen, because that takes longer than the rest of making it.

    Attributes:
        lists: src_info, layout_range and expert_rows, or what makes them when one is first asked for.
        shape: all of what follows.
        num_tokens, num_topk: shape of ``topk_idx``.
        num_max_tokens_per_rank, hidden, num_experts, layout: as given to the dispatch.
        framework: of ``x``.
        has_weights: whether the dispatch took ``topk_weights``.

    The arrays are in the framework of ``x`` and, on a GPU, lie there. With a receive hook the hook fills
    them.
    """

    owner: Any = field(repr=False)
    lists: Any = field(repr=False)
    shape: LowLatencyHandleShape

    @property
    def num_tokens(self) -> int:
        return self.shape.num_tokens

    @property
    def num_topk(self) -> int:
        return self.shape.num_topk

    @property
    def num_max_tokens_per_rank(self) -> int:
        return self.shape.num_max_tokens_per_rank

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def framework(self) -> str:
        return self.shape.framework

    @property
    def layout(self) -> str:
        return self.shape.layout

    @property
    def has_weights(self) -> bool:
        return self.shape.has_weights

    @property
    def src_info(self) -> Any:
        """int32 [num_local_experts, num_ranks * num_max_tokens_per_rank], source token of each row, -1 where
        there is none."""
        return self._list(0)

    @property
    def layout_range(self) -> Any:
        """int64 [num_local_experts, num_ranks], (first row << 32) | number of rows of a source."""
        return self._list(1)

    @property
    def expert_rows(self) -> Any:
        """int32, shape of `src_info`, with layout "rank": which row of ``recv_x``, counted over its first two
        axes, is each row of an expert, -1 where there is none. None with "expert"."""
        return self._list(2)

    def _list(self, which: int) -> Any:
        if callable(self.lists):
            self.lists = self.lists()
        return self.lists[which]

    def __iter__(self) -> Any:
        return iter(
            (self.src_info, self.layout_range, self.num_max_tokens_per_rank, self.hidden, self.num_experts)
        )


@dataclass(slots=True, eq=False, kw_only=True)
class HostLowLatencyHandle(LowLatencyHandle):
    """Of the host backend, where the arrays are NumPy's.

    Attributes:
        topk_idx: int32 [num_tokens, num_topk], as given to the dispatch.
        topk_weights: float32, the same; None if it had none.
    """

    topk_idx: NDArray[np.int32] = field(repr=False)
    topk_weights: NDArray[np.float32] | None = field(repr=False, default=None)

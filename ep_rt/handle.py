"""What a dispatch leaves for its combine or for a repeated dispatch."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DispatchHandle(abc.ABC):
    """The routing of one normal-mode dispatch as its rank saw it. Opaque to callers but for the counts.

    Attributes:
        num_tokens: tokens this rank sent from.
        num_topk: columns of ``topk_idx``; 0 when the dispatch had none.
        num_recv_rows: rows of ``recv_x``: `num_recv_tokens`, or ``num_worst_tokens`` when that was given.
        num_recv_tokens_per_expert_list: as returned by the dispatch.
    """

    owner: Any = field(repr=False)
    num_tokens: int
    num_topk: int
    num_recv_rows: int
    num_recv_tokens_per_expert_list: list[int]

    @property
    @abc.abstractmethod
    def num_recv_tokens(self) -> int:
        """Tokens that were sent to this rank, dropped ones included.

        On a GPU, after a dispatch with ``num_worst_tokens``, reading it waits for the dispatch.
        """

    @property
    def overflow(self) -> bool:
        """Whether more tokens arrived than ``num_worst_tokens`` left room for; the last ones were dropped."""
        return self.num_recv_tokens > self.num_recv_rows


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HostDispatchHandle(DispatchHandle):
    """Of the host backend.

    Attributes:
        is_token_in_rank: bool [num_tokens, num_ranks].
        send_tokens: tokens for each rank, ascending.
        recv_counts: tokens from each rank.
    """

    is_token_in_rank: NDArray[np.bool_] = field(repr=False)
    send_tokens: tuple[Tokens, ...] = field(repr=False)
    recv_counts: tuple[int, ...] = field(repr=False)

    @property
    def num_recv_tokens(self) -> int:
        return sum(self.recv_counts)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LowLatencyHandle:
    """The routing of one low-latency dispatch. Unpacks like DeepEP's tuple.

    Attributes:
        src_info: int32 [num_local_experts, num_ranks * num_max_tokens_per_rank], source token of each row,
            -1 where there is none.
        layout_range: int64 [num_local_experts, num_ranks], (first row << 32) | number of rows of a source.
        topk_idx: int32 [num_tokens, num_topk], as given to the dispatch.
        num_max_tokens_per_rank, hidden, num_experts: as given to the dispatch.

    With a receive hook, `src_info` and `layout_range` are filled by the hook.
    """

    owner: Any = field(repr=False)
    src_info: NDArray[np.int32] = field(repr=False)
    layout_range: NDArray[np.int64] = field(repr=False)
    topk_idx: NDArray[np.int32] = field(repr=False)
    num_max_tokens_per_rank: int
    hidden: int
    num_experts: int
    framework: str

    def __iter__(self) -> Any:
        return iter(
            (self.src_info, self.layout_range, self.num_max_tokens_per_rank, self.hidden, self.num_experts)
        )

"""Routings and payloads shared by the tests of the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from ep_rt import reference

Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

few = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Case:
    """A routing: topk_idx [T, K] of each rank, and the seed of what travels along it."""

    num_ranks: int
    num_local_experts: int
    topk_idx: list[Array]
    seed: int

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local_experts

    @property
    def num_tokens(self) -> list[int]:
        return [len(ids) for ids in self.topk_idx]

    @property
    def num_topk(self) -> int:
        return int(self.topk_idx[0].shape[1])

    def destinations(self, rank: int, token: int) -> set[int]:
        return {int(e) // self.num_local_experts for e in self.topk_idx[rank][token] if e >= 0}

    def sources(self, dst_rank: int) -> list[tuple[int, int]]:
        """(source rank, token) of every row that `dst_rank` is to receive, in order."""
        return [
            (rank, token)
            for rank in range(self.num_ranks)
            for token in range(self.num_tokens[rank])
            if dst_rank in self.destinations(rank, token)
        ]

    def origins(self, dtype: DTypeLike = np.float32) -> list[Array]:
        """Payload [T, 3] that names its origin: source rank, token, seed."""
        return [
            np.array([[rank, token, self.seed % 100] for token in range(count)], dtype).reshape(count, 3)
            for rank, count in enumerate(self.num_tokens)
        ]

    def integers(self, width: int, *, limit: int = 8, dtype: DTypeLike = np.float32) -> list[Array]:
        """Small integers [T, width]: their products and sums are exact."""
        rng = np.random.default_rng(self.seed)
        return [
            rng.integers(-limit, limit, (count, width), endpoint=True).astype(dtype)
            for count in self.num_tokens
        ]

    def weights(self) -> list[Array]:
        """Weights of one power of two per column, different between columns; of -1 too."""
        row = np.float32(2) ** -np.arange(1, self.num_topk + 1, dtype=np.float32)
        return [np.tile(row, (count, 1)) for count in self.num_tokens]


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_tokens: int = 5,
    distinct: bool = False,
    min_id: int = -1,
    num_ranks: int | None = None,
) -> Case:
    """Routings of 1-4 ranks with ragged, possibly empty, ranks; ids repeat in a row unless `distinct`."""
    num_ranks = num_ranks or draw(st.integers(1, 4))
    num_local_experts = draw(st.integers(1, 3))
    num_experts = num_ranks * num_local_experts
    num_topk = draw(st.integers(1, min(4, num_experts) if distinct else 4))
    ids = st.integers(min_id, num_experts - 1)
    row = st.lists(
        ids,
        min_size=num_topk,
        max_size=num_topk,
        unique_by=(lambda e: e if e >= 0 else object()) if distinct else None,
    )
    rows = st.lists(row, max_size=max_tokens)
    return Case(
        num_ranks=num_ranks,
        num_local_experts=num_local_experts,
        topk_idx=[np.array(draw(rows), np.int64).reshape(-1, num_topk) for _ in range(num_ranks)],
        seed=draw(st.integers(0, 2**31)),
    )


def example() -> Case:
    """Two ranks, two experts each, top-2."""
    ids = [[[0, 3], [1, 0], [-1, 2]], [[2, 3], [-1, -1]]]
    return Case(num_ranks=2, num_local_experts=2, topk_idx=[np.array(rows, np.int64) for rows in ids], seed=7)


def dispatch(case: Case, x: list[Array], **kwargs: Any) -> list[reference.Dispatched]:
    return reference.dispatch(x, case.topk_idx, num_experts=case.num_experts, **kwargs)


def same_bits(a: Array, b: Array) -> bool:
    """Equal shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def bf16(*values: float) -> Array:
    """One row [1, len(values)] of bfloat16; the values are exact."""
    row = np.array([values], BF16)
    assert np.array_equal(row.astype(np.float64), np.array([values]), equal_nan=True)
    return row

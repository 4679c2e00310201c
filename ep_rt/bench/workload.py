"""What is moved: routing, rows whose contents follow from where they come from, and byte counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..cuda.layout import ReceivedRow
from ..planner import Plan, Routes
from ..requests import FP8_BLOCK
from .options import Options

Array = NDArray[Any]

NAME_COLUMNS: Final = 8
"""The first columns of a row name its token, its rank and its salt."""

_BASE: Final = 32  # of the digits of a name
_DIGITS: Final = (3, 2, 3)  # of token, rank, salt
_NUM_PATTERNS: Final = 251


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """What rows consist of. FP8 travels as bytes, with a float32 scale factor for each block."""

    name: str
    dtype: np.dtype[Any]
    block: int  # 0: no scale factors

    def num_scales(self, hidden: int) -> int:
        """Scale factors of a row."""
        return -(-hidden // self.block) if self.block else 0

    def row_bytes(self, hidden: int) -> int:
        """Of a row with its scale factors."""
        return hidden * self.dtype.itemsize + 4 * self.num_scales(hidden)

    def received_row(self, operation: str, hidden: int, num_topk: int) -> ReceivedRow:
        """A row of an operation with what travels along: ids and weights where the dispatch is a new one."""
        num_columns = num_topk if operation in ("dispatch", "dispatch-exact") else 0
        return ReceivedRow(
            row_bytes=hidden * self.dtype.itemsize,
            sf_bytes=4 * self.num_scales(hidden),
            idx_bytes=8 * num_columns,
            weights_bytes=4 * num_columns,
        )


BF16: Final = Element(name="bf16", dtype=np.dtype(ml_dtypes.bfloat16), block=0)
FP8: Final = Element(name="fp8", dtype=np.dtype(np.uint8), block=FP8_BLOCK)
ELEMENTS: Final = {element.name: element for element in (BF16, FP8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Rows that one dispatch moves, by rank. A combine moves as many the other way."""

    received: tuple[int, ...]  # own rows included
    sent_away: tuple[int, ...]
    received_from_others: tuple[int, ...]

    @property
    def logical_rows(self) -> float:
        """Rows that a rank receives, from itself too; the mean over ranks."""
        return float(np.mean(self.received))

    @property
    def wire_rows(self) -> float:
        """Rows that leave a rank, the mean over ranks. As many arrive."""
        return float(np.mean(self.sent_away))

    @property
    def busiest(self) -> float:
        """Rows that cross the link of the busiest rank in its busier direction, relative to the mean."""
        most = max(*self.sent_away, *self.received_from_others)
        return most / self.wire_rows if self.wire_rows else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkBytes:
    """Bytes that one call sends over the network, [rank][node]."""

    counted: tuple[tuple[int, ...], ...]
    planned: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        """Of a rank, the mean over ranks."""
        return _bytes_text(*(np.sum(each, axis=1) for each in (self.counted, self.planned)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NvlinkBytes:
    """Bytes that one call stores to or loads from other ranks of the node, [rank]."""

    counted: tuple[int, ...]
    planned: tuple[int, ...]

    @property
    def text(self) -> str:
        """Of a rank, the mean over ranks."""
        return _bytes_text(self.counted, self.planned)


def _bytes_text(counted: Sequence[int] | Array, planned: Sequence[int] | Array) -> str:
    return f"{np.mean(counted) / 1e6:.3f} MB counted, {np.mean(planned) / 1e6:.3f} MB planned"


class Routing:
    """Which tokens of which rank go where.

    Attributes:
        topk_idx: int64 [T, K] per rank; -1 goes nowhere.
        destinations: bool [T, R] per rank.
    """

    def __init__(self, topk_idx: list[Array], num_experts: int) -> None:
        self.topk_idx = topk_idx
        self.num_experts = num_experts
        self.num_ranks = len(topk_idx)
        self.num_local_experts = num_experts // self.num_ranks
        ranks = np.arange(self.num_ranks)
        self.destinations: list[Array] = []
        for ids in topk_idx:
            owner = np.where(ids < 0, -1, ids // self.num_local_experts)
            self.destinations.append((owner[:, :, None] == ranks).any(axis=1))

    @classmethod
    def draw(
        cls,
        *,
        num_ranks: int,
        num_tokens: int,
        num_experts: int,
        num_topk: int,
        zipf_exponent: float = 0.0,
        num_groups: int = 1,
        num_topk_groups: int = 1,
        seed: int = 0,
    ) -> Routing:
        """Every token picks distinct experts, the same on every rank that draws.

        Args:
            zipf_exponent: s; the n-th most popular expert is picked with a weight of n**-s. 0: uniform.
            num_groups: of as many consecutive experts each.
            num_topk_groups: that a token picks first. All its experts are of these.
        """
        popularity = np.arange(1, num_experts + 1, dtype=np.float64) ** -zipf_exponent
        # Popular experts are spread over the ranks by chance, as they are in a model.
        popularity = np.random.default_rng([seed, num_experts]).permutation(popularity)
        topk_idx: list[Array] = []
        for rank in range(num_ranks):
            rng = np.random.default_rng([seed, num_tokens, rank])
            # The largest of log(weight) + Gumbel noise: draws without replacement.
            keys = np.log(popularity) + rng.gumbel(size=(num_tokens, num_experts))
            if num_topk_groups < num_groups:
                order = rng.random((num_tokens, num_groups)).argsort(axis=1).argsort(axis=1)
                keys[np.repeat(order >= num_topk_groups, num_experts // num_groups, axis=1)] = -np.inf
            chosen = np.argpartition(-keys, num_topk - 1, axis=1)[:, :num_topk]
            topk_idx.append(chosen.astype(np.int64))
        return cls(topk_idx, num_experts)

    @classmethod
    def of(cls, options: Options, num_ranks: int, num_tokens: int) -> Routing:
        """As the command line says."""
        return cls.draw(
            num_ranks=num_ranks,
            num_tokens=num_tokens,
            num_experts=options.num_experts,
            num_topk=options.num_topk,
            zipf_exponent=options.exponent,
            num_groups=options.groups[0],
            num_topk_groups=options.groups[1],
            seed=options.seed,
        )

    def received(self, rank: int) -> tuple[Array, Array]:
        """Source rank and source token of every row that `rank` receives, in order."""
        tokens = [np.flatnonzero(sent[:, rank]) for sent in self.destinations]
        return np.repeat(np.arange(self.num_ranks), [len(part) for part in tokens]), np.concatenate(tokens)

    def received_idx(self, rank: int) -> Array:
        """int64 [N, K]: the local expert ids of those rows, -1 for other ranks' experts."""
        src_rank, src_token = self.received(rank)
        local = self._gathered(self.topk_idx, src_rank, src_token) - rank * self.num_local_experts
        local[(local < 0) | (local >= self.num_local_experts)] = -1
        return local

    def weights(self, rank: int) -> Array:
        """float32 [T, K]: what `rank` dispatches as its weights."""
        num_tokens, num_topk = self.topk_idx[rank].shape
        return _fractions(np.full(num_tokens, rank), np.arange(num_tokens), num_topk, salt=0)

    def received_weights(self, rank: int) -> Array:
        """float32 [N, K]: the weights of the received rows, 0 for other ranks' experts."""
        src_rank, src_token = self.received(rank)
        weights = _fractions(src_rank, src_token, self.topk_idx[rank].shape[1], salt=0)
        weights[self.received_idx(rank) < 0] = 0
        return weights

    def traffic(self, *, by_column: bool = False) -> Traffic:
        """Rows that move, by rank.

        Args:
            by_column: one for each expert of a token, not for each rank.
        """
        rows = np.array([sent.sum(axis=0) for sent in self.destinations])
        if by_column:
            owners = [ids[ids >= 0] // self.num_local_experts for ids in self.topk_idx]
            rows = np.array([np.bincount(owner, minlength=self.num_ranks) for owner in owners])
        own = rows.diagonal()
        return Traffic(
            received=tuple(rows.sum(axis=0).tolist()),
            sent_away=tuple((rows.sum(axis=1) - own).tolist()),
            received_from_others=tuple((rows.sum(axis=0) - own).tolist()),
        )

    def plan(self, operation: str, element: Element, hidden: int, *, ranks_per_node: int) -> Plan:
        """What an operation must move."""
        routes = Routes.of(self.topk_idx, num_experts=self.num_experts, ranks_per_node=ranks_per_node)
        row = element.received_row(operation, hidden, self.topk_idx[0].shape[1])
        return routes.plan(operation, row)

    @staticmethod
    def _gathered(arrays: list[Array], src_rank: Array, src_token: Array) -> Array:
        rows = np.empty((len(src_rank), *arrays[0].shape[1:]), arrays[0].dtype)
        for rank, array in enumerate(arrays):
            from_rank = src_rank == rank
            rows[from_rank] = array[src_token[from_rank]]
        return rows


class Payload:
    """Rows that say where they come from, so that a wrong row is noticed and explains itself.

    The first columns name (token, rank, salt); the rest is one of many patterns that these select. Elements
    are whole numbers below 32, so sums over ranks are exact before they are rounded.
    """

    def __init__(self, element: Element, hidden: int) -> None:
        self.element = element
        self.hidden = hidden
        rng = np.random.default_rng(hidden)
        self._numbers = rng.integers(0, _BASE, (_NUM_PATTERNS, hidden), np.uint8)
        self._digits = _bits(np.arange(_BASE), element.dtype)
        self._patterns = self._digits[self._numbers]

    def rows(self, ranks: Array | int, tokens: Array, salt: int) -> Array:
        """[N, hidden]: what these ranks send for these tokens. Another `salt` makes other rows."""
        rows = self._patterns[_pattern(ranks, tokens, salt)]
        rows[:, :NAME_COLUMNS] = self._digits[_name(ranks, tokens, salt)]
        named: Array = rows.view(self.element.dtype)
        return named

    def scales(self, ranks: Array | int, tokens: Array, salt: int) -> Array:
        """float32 [N, S]: their scale factors."""
        num_scales = self.element.num_scales(self.hidden)
        return _fractions(np.broadcast_to(ranks, tokens.shape), tokens, num_scales, salt)

    def combined(self, rank: int, tokens: Array, destinations: Array, salt: int) -> Array:
        """[N, hidden]: the sums of `rank`'s tokens, when rank d returns ``rows(rank, tokens, salt + d)``.

        Args:
            destinations: bool [N, R].
        """
        total = np.zeros((len(tokens), self.hidden), np.uint16)
        for destination in range(destinations.shape[1]):
            there = np.flatnonzero(destinations[:, destination])
            term = self._numbers[_pattern(rank, tokens[there], salt + destination)]
            term[:, :NAME_COLUMNS] = _name(rank, tokens[there], salt + destination)
            total[there] += term
        largest = _BASE * destinations.shape[1]
        return _bits(np.arange(largest), self.element.dtype)[total].view(self.element.dtype)

    def origin(self, row: Array) -> str:
        """What the first columns of a row say, as text."""
        digits = row[:NAME_COLUMNS].astype(np.float32)
        if not np.isin(digits, np.arange(_BASE)).all():
            return "no row of this run"
        names, column = [], 0
        for what, length in zip(("token", "rank", "salt"), _DIGITS, strict=True):
            value = sum(int(digits[column + i]) * _BASE**i for i in range(length))
            names.append(f"{what} {value}")
            column += length
        return ", ".join(names)


def _bits(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """The numbers as `dtype`, as plain integers of its size, which NumPy gathers faster."""
    return numbers.astype(np.float32).astype(dtype).view(f"u{dtype.itemsize}")


def _pattern(ranks: Array | int, tokens: Array, salt: int) -> Array:
    return (ranks * np.int64(7919) + tokens * np.int64(104729) + np.int64(1299709) * salt) % _NUM_PATTERNS


def _name(ranks: Array | int, tokens: Array, salt: int) -> Array:
    """[N, NAME_COLUMNS]: the digits, lowest first."""
    columns = [
        np.broadcast_to(np.asarray(value) // _BASE**i % _BASE, tokens.shape)
        for value, length in zip((tokens, ranks, salt), _DIGITS, strict=True)
        for i in range(length)
    ]
    return np.stack(columns, axis=1)


def _fractions(ranks: Array, tokens: Array, num_columns: int, salt: int) -> Array:
    """float32 [N, num_columns] in [0.5, 1), from where they belong."""
    mixed = (
        ranks.astype(np.uint32)[:, None] * np.uint32(0x9E3779B1)
        + tokens.astype(np.uint32)[:, None] * np.uint32(0x85EBCA6B)
        + np.arange(num_columns, dtype=np.uint32) * np.uint32(0xC2B2AE35)
        + np.uint32(salt * 0x27D4EB2F & 0xFFFFFFFF)
    )
    fractions: Array = (mixed >> np.uint32(9) | np.uint32(0x3F000000)).view(np.float32)
    return fractions

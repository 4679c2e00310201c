"""The peers of one buffer: agreement before an operation, rows in flight during it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, EpError, on_all_ranks
from ..exchange import Group, Transfer
from ..handle import Tokens
from .memory import HostPool

T = TypeVar("T")

_MAX_IN_FLIGHT = 64
_NO_BYTES = np.empty(0, np.uint8)


def attempt(build: Callable[[], T]) -> T | EpError:
    """What `build` returns, or the error it raised: told to the peers before it is raised here."""
    try:
        return build()
    except EpError as error:
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a rank tells its peers on entering an operation.

    facts: values that must be the same on every rank, by the name a caller knows.
    payload: this rank's own numbers, for the peers to use.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    payload: Any = None


class Peers:
    """One buffer's use of its group."""

    def __init__(self, group: Group, timeout_s: float) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self.label = ""
        self.pool = HostPool()
        self._in_flight: list[Transfer] = []

    def agree(
        self,
        operation: str,
        mine: Announcement | EpError,
        *,
        ranks: Sequence[int] | None = None,
        skip_late: bool = False,
    ) -> list[Any]:
        """Exchange announcements. Nothing has moved when this raises, and it raises on every rank.

        Returns:
            Every rank's payload; None for ranks left out of `ranks`, `LATE` for late ones.
        """
        self._reap()
        answers = self.group.allgather(
            mine, op=f"{operation}{self.label}", timeout_s=self.timeout_s, ranks=ranks, skip_late=skip_late
        )
        for rank, answer in enumerate(answers):
            if isinstance(answer, EpError):
                error = type(answer)(f"{operation}: rank {rank}: {answer}")
                raise on_all_ranks(error)
        announced = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Announcement)}
        _compare_facts(operation, {rank: answer.facts for rank, answer in announced.items()})
        return [
            announced[rank].payload if rank in announced else answer for rank, answer in enumerate(answers)
        ]

    def send_rows(
        self,
        rows: NDArray[np.uint8],
        tokens: Sequence[Tokens],
        out: NDArray[np.uint8],
        counts: Sequence[int],
    ) -> Transfer:
        """Send ``rows[tokens[d]]`` to each rank d; what comes lands in `out`, by rank.

        Args:
            rows: [T, B]. Copied before this returns, so it may change afterwards.
            out: contiguous [sum(counts), B]. Complete once the transfer is received.
        """
        rank = self.group.rank
        recv = self._slices(out, counts)
        send = [
            recv[rank] if dst == rank else self.pool.empty((len(some), rows.shape[1]), np.uint8)
            for dst, some in enumerate(tokens)
        ]
        for some, packed in zip(tokens, send, strict=True):
            np.take(rows, some, axis=0, out=packed, mode="clip")  # "raise" would go through a copy
        return self._start(send, recv)

    def send_slices(
        self,
        rows: NDArray[np.uint8],
        send_counts: Sequence[int],
        out: NDArray[np.uint8],
        counts: Sequence[int],
    ) -> Transfer:
        """Send consecutive slices of `rows`, in rank order, without a copy; this rank's own slice stays.

        `rows` must not change before the transfer is finished.
        """
        return self._start(self._slices(rows, send_counts), self._slices(out, counts))

    def finish_all(self) -> None:
        """Wait until no rank needs another's bytes any more. Takes what a hook that was not called left."""
        for transfer in self._in_flight:
            if not transfer.is_received:
                transfer.receive(timeout_s=self.timeout_s)
        for transfer in self._in_flight:
            transfer.finish(timeout_s=self.timeout_s)
        self._in_flight.clear()

    def _start(self, send: list[NDArray[np.uint8]], recv: list[NDArray[np.uint8]]) -> Transfer:
        rank = self.group.rank
        send[rank] = recv[rank] = _NO_BYTES
        transfer = self.group.ialltoallv(
            [part.reshape(-1) for part in send], [part.reshape(-1) for part in recv]
        )
        self._in_flight.append(transfer)
        return transfer

    def _reap(self) -> None:
        self._in_flight = [
            transfer for transfer in self._in_flight if not (transfer.is_received and transfer.finished)
        ]
        while len(self._in_flight) > _MAX_IN_FLIGHT:
            self._in_flight.pop(0).finish(timeout_s=self.timeout_s)

    @staticmethod
    def _slices(rows: NDArray[np.uint8], counts: Sequence[int]) -> list[NDArray[np.uint8]]:
        ends = np.cumsum(counts)
        return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _compare_facts(operation: str, facts: Mapping[int, Mapping[str, object]]) -> None:
    for name in dict.fromkeys(name for mapping in facts.values() for name in mapping):
        by_value: dict[str, list[int]] = {}
        for rank, mapping in facts.items():
            by_value.setdefault(repr(mapping.get(name)), []).append(rank)
        if len(by_value) > 1:
            listing = "; ".join(f"{value} on rank {_listed(ranks)}" for value, ranks in by_value.items())
            raise on_all_ranks(ConfigError(f"{operation}: {name} differs between ranks: {listing}"))


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))

"""What dispatch and combine are compared with: packed rows through another library.

Tokens are packed by destination beforehand, and nothing is summed: what a layer needs besides (counts,
packing, unpacking, the sum of combine) is not in the times.
"""

from __future__ import annotations

import abc
import socket
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from ..exchange import Group
from .check import agree
from .measure import Times
from .places import CudaPlace, Place
from .workload import BF16, Array, Element, Payload, Routing

_SALT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What one rank sends and must receive.

    Attributes:
        rows: uint8 [N, row_bytes], by destination; a row has its scale factors behind it.
        expected: uint8 [M, row_bytes], by source.
        counts: int64 [R, R], rows from each rank (first index) to each. The same on every rank.
    """

    operation: str
    element: Element
    rows: Array
    expected: Array
    counts: Array

    @classmethod
    def dispatch(cls, element: Element, hidden: int, routing: Routing, rank: int) -> Packed:
        """Every token of a rank to the ranks of its experts, with its scale factors."""
        return cls(
            operation="dispatch",
            element=element,
            rows=_rows(element, hidden, rank, _sent_tokens(routing, rank)),
            expected=_rows(element, hidden, *routing.received(rank)),
            counts=_counts(routing),
        )

    @classmethod
    def combine(cls, hidden: int, routing: Routing, rank: int) -> Packed:
        """The rows of a bfloat16 dispatch back to where they came from."""
        return cls(
            operation="combine",
            element=BF16,
            rows=_rows(BF16, hidden, *routing.received(rank)),
            expected=_rows(BF16, hidden, rank, _sent_tokens(routing, rank)),
            counts=_counts(routing).T,
        )


class Library(abc.ABC):
    """One library over the ranks of a group. Construction, `measure` and `close` are collective.

    Attributes:
        option: its name on the command line and in the names of operations.
        label: its name in sentences.
        title: the line above its table, with its version.
        note: what a reader of its times must know; None if nothing.
    """

    option: ClassVar[str]
    label: ClassVar[str]
    title: str
    note: str | None = None

    def __init__(self, group: Group, place: CudaPlace, repeat: int) -> None:
        self._group, self._repeat = group, repeat

    @classmethod
    def absence(cls, place: Place) -> str | None:
        """Why it cannot be compared with here; None if it can. The same on every rank."""
        setting = place.setting
        if not isinstance(place, CudaPlace):
            return f"{cls.label} needs GPUs"
        if setting.ranks_are == "threads":
            run = f"mpirun -n N python -m ep_rt bench --compare {cls.option}"
            return f"{cls.label} needs processes: {run}"
        if setting.num_ranks < 2:
            return f"{cls.label} needs more than one GPU"
        return cls._missing()

    @classmethod
    @abc.abstractmethod
    def _missing(cls) -> str | None:
        """What is not installed; None if all is."""

    @abc.abstractmethod
    def measure(self, packed: Packed) -> Times:
        """Check what arrives, then time it.

        Raises:
            CheckError: on every rank.
        """

    @abc.abstractmethod
    def close(self) -> None: ...

    def _check(self, packed: Packed, received: Array) -> None:
        is_right = np.array_equal(received, packed.expected)
        agree(self._group, None if is_right else f"{self.label}'s {packed.operation} brought other rows")


def agreed_port(group: Group) -> int:
    """A port that is free on this host, the same on every rank."""
    port = 0
    if group.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return int(group.allgather(port, op="bench port")[0])


def _rows(element: Element, hidden: int, ranks: Array | int, tokens: Array) -> Array:
    payload = Payload(element, hidden)
    parts: list[Any] = [payload.rows(ranks, tokens, _SALT).view(np.uint8)]
    if element.block:
        parts.append(payload.scales(ranks, tokens, _SALT).view(np.uint8))
    return np.concatenate(parts, axis=1)


def _sent_tokens(routing: Routing, rank: int) -> Array:
    """Tokens of `rank` by destination; one that goes to several ranks is there several times."""
    destinations = routing.destinations[rank]
    return np.concatenate([np.flatnonzero(destinations[:, dst]) for dst in range(routing.num_ranks)])


def _counts(routing: Routing) -> Array:
    counts: Array = np.array([sent.sum(axis=0) for sent in routing.destinations])
    return counts

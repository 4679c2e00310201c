"""The ranks of one node as a group of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import ConfigError
from .exchange import Group


class NodeGroup:
    """Some ranks of a `Group`, numbered anew. They exchange values; bytes go another way.

    Whoever makes one makes as many calls as the other ranks of `group` do in their parts of it.

    Args:
        ranks: of `group`, ascending, this one among them.
    """

    def __init__(self, group: Group, ranks: Sequence[int]) -> None:
        self._group = group
        self._ranks = tuple(ranks)

    @property
    def rank(self) -> int:
        return self._ranks.index(self._group.rank)

    @property
    def size(self) -> int:
        return len(self._ranks)

    def __repr__(self) -> str:
        return f"NodeGroup(ranks={self._ranks} of {self._group!r})"

    def allgather(
        self,
        value: object,
        *,
        op: str = "allgather",
        timeout_s: float | None = None,
        ranks: Sequence[int] | None = None,
        skip_late: bool = False,
    ) -> list[Any]:
        """As `Group.allgather`; errors name ranks of the whole group."""
        among = self._ranks if ranks is None else [self._ranks[rank] for rank in ranks]
        values = self._group.allgather(value, op=op, timeout_s=timeout_s, ranks=among, skip_late=skip_late)
        return [values[rank] for rank in self._ranks]

    def barrier(self, *, timeout_s: float | None = None) -> None:
        self.allgather(None, op="barrier", timeout_s=timeout_s)

    def alltoallv(self, send: object, recv: object, **_: object) -> NoReturn:
        raise ConfigError("the ranks of a node exchange values only")

    ialltoallv = alltoallv

    def abort(self, error: BaseException) -> None:
        """As `Group.abort`, of the whole group."""
        self._group.abort(error)

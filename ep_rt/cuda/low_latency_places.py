"""The memory of low-latency areas: of the slab within a node, of NVSHMEM over several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError
from ..exchange import Group
from .domain import Domain
from .layout import OFFSET_UNIT, PAYLOAD_OFFSET, align_up

if TYPE_CHECKING:
    from .nvshmem import Network, SymmetricMemory


class Piece(Protocol):
    """Memory of an area on one rank, held as long as this is."""

    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Places(Protocol):
    """Where areas lie, and the ranks that call.

    Attributes:
        group: of all ranks.
        first_rank: of those that share a slab with this rank.
        is_over_network: stores may not reach all of them.
    """

    group: Group
    first_rank: int
    is_over_network: bool

    def keep(self, pieces: Iterable[Piece]) -> None:
        """Nothing uses the memory of other areas than these any more. The same on every rank."""

    def take(self, num_bytes: int) -> Piece:
        """Memory for an area. Raises `ConfigError` when there is no room."""

    def pointers(self, offsets: Sequence[int]) -> tuple[int, ...]:
        """The areas of all ranks, as this one sees them; 0 where stores do not reach."""

    def settle(self) -> None:
        """Collective: what was on its way has arrived."""


class SlabPlaces:
    """Areas in the slabs of one NVLink domain."""

    is_over_network = False
    first_rank = 0

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.group = domain.group

    def keep(self, pieces: Iterable[Piece]) -> None:
        """The others are given back with their last holder."""

    def take(self, num_bytes: int) -> Piece:
        return self._domain.take(num_bytes, "the landing zones of low-latency calls (num_rdma_bytes)")

    def pointers(self, offsets: Sequence[int]) -> tuple[int, ...]:
        bases = self._domain.slab.pointers
        return tuple(base + PAYLOAD_OFFSET + at for base, at in zip(bases, offsets, strict=True))

    def settle(self) -> None:
        """Nothing is under way once the devices are idle."""


@dataclass(frozen=True, slots=True)
class SymmetricPiece:
    """At the same offset on every rank."""

    offset: int
    num_bytes: int


class SymmetricPlaces:
    """Areas in NVSHMEM's symmetric memory, one behind the other, at the same places on every rank.

    Args:
        memory: of all areas.
        domain: of this node's ranks.
        with_stores: stores go to the ranks that they reach; else to this one alone.
    """

    is_over_network = True

    def __init__(
        self, network: Network, memory: SymmetricMemory, domain: Domain, *, with_stores: bool
    ) -> None:
        self.group = network.group
        self._network = network
        self._memory = memory
        self._end = 0
        self.first_rank = self.group.rank - domain.group.rank
        reached = network.pointers(memory) if with_stores else (0,) * self.group.size
        # Puts go to the address that memory has here.
        self._bases = tuple(
            memory.pointer if rank == self.group.rank else base for rank, base in enumerate(reached)
        )

    def keep(self, pieces: Iterable[Piece]) -> None:
        self._end = max((align_up(each.offset + each.num_bytes, OFFSET_UNIT) for each in pieces), default=0)

    def take(self, num_bytes: int) -> Piece:
        left = self._memory.num_bytes - self._end
        if num_bytes > left:
            raise ConfigError(
                f"no room for the landing zones of low-latency calls and their outbox: {num_bytes} bytes, "
                f"and {left} of {self._memory.num_bytes} are left (num_rdma_bytes)"
            )
        piece = SymmetricPiece(self._end, num_bytes)
        self._end += align_up(num_bytes, OFFSET_UNIT)
        return piece

    def pointers(self, offsets: Sequence[int]) -> tuple[int, ...]:
        assert len(set(offsets)) == 1  # the same calls on every rank
        return tuple(base and base + offsets[0] for base in self._bases)

    def settle(self) -> None:
        self._network.settle()

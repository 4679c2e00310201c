"""Which ranks share a node, that is, an NVLink domain or a host."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from .config import settings
from .errors import ConfigError, EpError, TopologyError, on_all_ranks
from .exchange import Group

_log = logging.getLogger("ep_rt")


class GpuPlace(NamedTuple):
    """The GPU that is current for a rank, and what is known of its links to others.

    Attributes:
        host, process: of the rank.
        bus_id: the GPU's PCI address.
        without_nvlink: GPUs of the host that NVLink does not join to this one. Where that cannot be found
            out they are left out, and count as joined.
        without_p2p: GPUs of the host that loads and stores of this one do not reach, as far as known.
        has_nvshmem: whether NVSHMEM is installed for the rank.
    """

    host: str
    process: int
    bus_id: str
    without_nvlink: frozenset[str] = frozenset()
    without_p2p: frozenset[str] = frozenset()
    has_nvshmem: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The node of every rank, seen from one of them.

    Nodes are numbered in the order of their first ranks; the ranks of one need not be consecutive.

    Attributes:
        lacks_nvlink: nodes are parts of hosts, because NVLink does not join all GPUs of some host.
    """

    rank: int
    node_of_rank: tuple[int, ...]
    lacks_nvlink: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"rank={self.rank} is not within 0..{self.num_ranks - 1}")
        if list(dict.fromkeys(self.node_of_rank)) != list(range(self.num_nodes)):
            raise ConfigError(
                f"node_of_rank={self.node_of_rank}: nodes are not numbered by their first ranks"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_of_rank))

    @property
    def node(self) -> int:
        """The node of this rank."""
        return self.node_of_rank[self.rank]

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this rank's node, in rank order, this one included."""
        return self.ranks_of(self.node)

    @property
    def local_rank(self) -> int:
        """This rank's place among `local_ranks`."""
        return self.local_ranks.index(self.rank)

    @property
    def local_rank_of_rank(self) -> tuple[int, ...]:
        """Of every rank, its place among those of its node."""
        return tuple(self.ranks_of(node).index(rank) for rank, node in enumerate(self.node_of_rank))

    @property
    def num_local_ranks(self) -> int:
        return len(self.local_ranks)

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """How many ranks each node has."""
        return tuple(len(self.ranks_of(node)) for node in range(self.num_nodes))

    @property
    def is_uniform(self) -> bool:
        """Whether all nodes have the same number of ranks."""
        return len(set(self.node_sizes)) == 1

    @property
    def hint(self) -> str:
        """For errors of calls over several nodes: what to do about nodes without NVLink, or nothing."""
        if not self.lacks_nvlink:
            return ""
        return (
            ". GPUs here have no NVLink between them, so the nodes are parts of a host; EP_RT_NVLINK=1 makes "
            "it one node, whose GPUs reach each other by loads and stores over PCIe"
        )

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """The ranks of `node`, in rank order."""
        return tuple(rank for rank, its_node in enumerate(self.node_of_rank) if its_node == node)

    def require_uniform(self, what: str) -> None:
        """Raise `TopologyError` on every rank if the nodes differ in size, which `what` cannot serve."""
        if not self.is_uniform:
            sizes = ", ".join(f"node {node}: {size}" for node, size in enumerate(self.node_sizes))
            raise on_all_ranks(
                TopologyError(
                    f"{what} needs the same number of ranks on every node; ranks per node are {sizes}. "
                    "Start as many ranks on each, or set ranks_per_node or EP_RT_RANKS_PER_NODE to a "
                    f"divisor of {self.num_ranks}"
                )
            )


def discover(
    group: Group,
    *,
    ranks_per_node: int | None = None,
    place: GpuPlace | None = None,
    timeout_s: float | None = None,
) -> Topology:
    """Find out which ranks of `group` share a node.

    Args:
        ranks_per_node: split the ranks into virtual nodes of so many consecutive ranks, the last one
            smaller if they do not divide. Default: ``EP_RT_RANKS_PER_NODE``, or else real nodes.
        place: of this rank's GPU. Given by all ranks, nodes are made of those that NVLink joins, see
            `ranks_joined`, or that ``EP_RT_NVLINK`` takes for joined. Default: nodes are hosts.

    Raises:
        ConfigError: on every rank, if `ranks_per_node` is not positive somewhere, or it or ``EP_RT_NVLINK``
            differs between ranks.

    Collective.
    """
    mine: tuple[int | None, bool | None, GpuPlace | None, str] | EpError
    try:
        mine = _checked(ranks_per_node), settings().nvlink, place, socket.gethostname()
    except EpError as error:
        mine = error
    answers = group.allgather(mine, op="topology", timeout_s=timeout_s)
    for rank, answer in enumerate(answers):
        if isinstance(answer, EpError):
            raise on_all_ranks(ConfigError(f"rank {rank}: {answer}"))
    sizes, nvlink, places, hosts = zip(*answers, strict=True)
    _check_equal("ranks_per_node", sizes)
    _check_equal("EP_RT_NVLINK", nvlink)
    size, lacks_nvlink = sizes[0], False
    if size is None and None not in places:
        size = ranks_joined(places, nvlink=nvlink[0])
        lacks_nvlink = size is not None
        if lacks_nvlink:
            _log.info("NVLink does not join all GPUs of a host: nodes of %d ranks", size)
    keys = list(hosts) if size is None else [rank // size for rank in range(group.size)]
    number = {key: node for node, key in enumerate(dict.fromkeys(keys))}
    return Topology(
        rank=group.rank, node_of_rank=tuple(number[key] for key in keys), lacks_nvlink=lacks_nvlink
    )


def ranks_joined(places: Sequence[GpuPlace], *, nvlink: bool | None = None) -> int | None:
    """How many consecutive ranks make a node; None where NVLink joins all ranks of each host.

    All nodes have as many ranks, as many as possible, and NVLink joins any two of a node. Ranks of one
    process or one GPU count as joined: loads and stores are all that they can use.

    Args:
        places: of all ranks.
        nvlink: what to take for granted of GPUs of one host instead of what is known of them.
    """
    hosts: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.host, []).append(rank)

    def are_joined(ranks: Sequence[int]) -> bool:
        return all(_is_joined(places[one], places[two], nvlink) for one, two in combinations(ranks, 2))

    if all(are_joined(ranks) for ranks in hosts.values()):
        return None
    num_ranks = len(places)
    divisors = (size for size in range(num_ranks // 2, 0, -1) if num_ranks % size == 0)
    return next(
        size
        for size in divisors
        if all(are_joined(range(first, first + size)) for first in range(0, num_ranks, size))
    )


def _is_joined(one: GpuPlace, two: GpuPlace, nvlink: bool | None) -> bool:
    if one.host != two.host:
        return False
    if one.process == two.process or one.bus_id == two.bus_id:
        return True
    if nvlink is not None:
        return nvlink
    return two.bus_id not in one.without_nvlink and one.bus_id not in two.without_nvlink


def _checked(ranks_per_node: int | None) -> int | None:
    if ranks_per_node is None:
        return settings().ranks_per_node
    if not isinstance(ranks_per_node, int) or isinstance(ranks_per_node, bool) or ranks_per_node < 1:
        raise ConfigError(f"ranks_per_node={ranks_per_node!r} is not a positive integer")
    return ranks_per_node


def _check_equal(name: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        listing = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        raise on_all_ranks(ConfigError(f"{name} differs between ranks: {listing}"))

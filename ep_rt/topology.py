"""Which ranks share a node, that is, an NVLink domain or a host."""

from __future__ import annotations

import socket
from collections.abc import Hashable
from dataclasses import dataclass

from .config import settings
from .errors import ConfigError, EpError, TopologyError, on_all_ranks
from .exchange import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The node of every rank, seen from one of them.

    Nodes are numbered in the order of their first ranks; the ranks of one need not be consecutive.
    """

    rank: int
    node_of_rank: tuple[int, ...]

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
    domain: Hashable | None = None,
    timeout_s: float | None = None,
) -> Topology:
    """Find out which ranks of `group` share a node.

    Args:
        ranks_per_node: split the ranks into virtual nodes of so many consecutive ranks, the last one
            smaller if they do not divide. Default: ``EP_RT_RANKS_PER_NODE``, or else real nodes.
        domain: this rank's node, equal on the ranks that share one; it must travel between processes.
            Default: the host's name.

    Raises:
        ConfigError: on every rank, if `ranks_per_node` is not positive somewhere or differs between
            ranks, or if only some ranks give a `domain`.

    Collective.
    """
    mine: tuple[int | None, Hashable | None, str] | EpError
    try:
        mine = _checked(ranks_per_node), domain, socket.gethostname()
    except EpError as error:
        mine = error
    answers = group.allgather(mine, op="topology", timeout_s=timeout_s)
    for rank, answer in enumerate(answers):
        if isinstance(answer, EpError):
            raise on_all_ranks(ConfigError(f"rank {rank}: {answer}"))
    sizes, domains, hosts = zip(*answers, strict=True)
    _check_equal("ranks_per_node", sizes)
    _check_equal("whether a domain is given", [its_domain is not None for its_domain in domains])
    if (size := sizes[0]) is not None:
        keys = [rank // size for rank in range(group.size)]
    else:
        keys = list(hosts if domains[0] is None else domains)
    number = {key: node for node, key in enumerate(dict.fromkeys(keys))}
    return Topology(rank=group.rank, node_of_rank=tuple(number[key] for key in keys))


def _checked(ranks_per_node: int | None) -> int | None:
    if ranks_per_node is None:
        return settings().ranks_per_node
    if not isinstance(ranks_per_node, int) or isinstance(ranks_per_node, bool) or ranks_per_node < 1:
        raise ConfigError(f"ranks_per_node={ranks_per_node!r} is not a positive integer")
    return ranks_per_node


def _check_equal(name: str, values: tuple[object, ...] | list[object]) -> None:
    if len(set(values)) > 1:
        listing = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        raise on_all_ranks(ConfigError(f"{name} differs between ranks: {listing}"))

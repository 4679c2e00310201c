"""`Buffer.runtime`: what programs ask of the object that DeepEP has there."""

from __future__ import annotations

from ..topology import Topology


class Runtime:
    """Of a buffer that was not destroyed. Nodes are those of `ep_rt.Buffer`, not of eight ranks each."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def is_available(self) -> bool:
        """True: a buffer can be used once it is made."""
        return True

    def is_internode_available(self) -> bool:
        """Whether calls of the normal mode cross a network."""
        return self._topology.num_nodes > 1

    def get_num_rdma_ranks(self) -> int:
        """How many nodes there are."""
        return self._topology.num_nodes

    def get_rdma_rank(self) -> int:
        """The number of this rank's node."""
        return self._topology.node

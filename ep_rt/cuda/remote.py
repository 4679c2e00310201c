"""What an engine has over the network: NVSHMEM's memory, and the kernels of both modes that put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BackendError, EpError, TopologyError, on_all_ranks
from ..exchange import Group
from ..network_options import NetworkOptions
from ..topology import Topology
from . import jit, kernels, plan
from .domain import Domain, together
from .internode import Internode
from .launch import current_architecture
from .layout import MAX_LOW_LATENCY_RANKS, OFFSET_UNIT, align_up
from .low_latency_calls import LowLatencyKernels
from .low_latency_places import SymmetricPlaces
from .operations import Operations


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSizes:
    """What calls over the network have memory for.

    Attributes:
        max_tokens: of any rank in one call of the normal mode.
        max_record_bytes: the most that one of its rows takes on the network, see `plan.record_bytes`.
        rings_bytes: at most, for its rings; 0 for what serves most.
        low_latency_bytes: for the areas of low-latency calls.
    """

    max_tokens: int
    max_record_bytes: int
    rings_bytes: int = 0
    low_latency_bytes: int = 0


class Remote:
    """The network of one engine. Construction and `close` are collective over all nodes.

    Args:
        group: of all nodes.
        domain: of this node's ranks.
        operations: of this node.
        options: see `Network`.
        with_low_latency: load the kernels of the low-latency calls.
        with_stores: in low-latency calls stores go to the ranks that they reach; else NVSHMEM puts to all.

    Attributes:
        internode: of normal calls; None on one node.
        places, low_latency: of low-latency calls; None if they were not asked for.
        num_bytes: of symmetric memory.

    Raises:
        ConfigError, TopologyError, BackendError, DeviceError: see `Network`; sizes that do not fit; a kernel
            that does not compile, or link. All on every rank.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        domain: Domain,
        operations: Operations,
        sizes: RemoteSizes,
        options: NetworkOptions | None = None,
        *,
        with_low_latency: bool,
        with_stores: bool,
    ) -> None:
        from .nvshmem import Network  # which programs of one node never load

        timeout_s = domain.timeout_s
        rings = together(
            group,
            "network sizes",
            lambda: plan.rings(topology.num_nodes, sizes.rings_bytes, sizes.max_record_bytes),
            timeout_s=timeout_s,
        )
        has_rings = topology.num_nodes > 1
        rings_bytes = Internode.num_bytes(topology, rings) if has_rings else 0
        areas_bytes = align_up(sizes.low_latency_bytes, OFFSET_UNIT) if with_low_latency else 0
        try:
            network = Network(
                group, num_bytes=rings_bytes + areas_bytes, options=options, timeout_s=timeout_s
            )
        except BackendError as failure:  # of all ranks
            raise on_all_ranks(BackendError(f"{failure}{topology.hint}")) from failure
        self._network = network
        self.num_bytes = rings_bytes + areas_bytes
        self.internode: Internode | None = None
        self.places: SymmetricPlaces | None = None
        self.low_latency: LowLatencyKernels | None = None
        try:
            rings_memory = network.allocate(rings_bytes) if has_rings else None
            if with_low_latency:
                memory = network.allocate(areas_bytes)
                self.places = SymmetricPlaces(network, memory, domain, with_stores=with_stores)

            def load() -> None:
                specs = kernels.two_level_network_specs() if has_rings else []
                if with_low_latency:
                    specs += kernels.low_latency_specs(over_network=True)
                jit.prepare(specs, current_architecture())
                if rings_memory is not None:
                    self.internode = Internode(
                        network,
                        rings_memory,
                        topology,
                        domain,
                        operations.common,
                        rings,
                        max_tokens=sizes.max_tokens,
                    )
                if self.places is not None:
                    self.low_latency = LowLatencyKernels(
                        operations, max_blocks=domain.max_blocks, places=self.places, network=network
                    )

            together(group, "network kernels", load, timeout_s=timeout_s)
        except EpError:  # of all ranks
            network.close()
            raise

    @staticmethod
    def check(topology: Topology, *, with_low_latency: bool) -> None:
        """Raise `TopologyError` on every rank for nodes that are not served."""
        Internode.check(topology)
        if with_low_latency and topology.num_ranks > MAX_LOW_LATENCY_RANKS:
            raise on_all_ranks(
                TopologyError(f"{topology.num_ranks} ranks: low-latency calls serve {MAX_LOW_LATENCY_RANKS}")
            )

    def close(self, absent: Sequence[int] = ()) -> None:
        """After the domain: no kernel uses the network any more. For `absent` see `Network.close`."""
        self._network.close(absent)

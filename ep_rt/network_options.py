"""What NVSHMEM is told through its environment: options of this package, and what is set when it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

from .errors import ConfigError

NETWORK_VARIABLES: Final[Mapping[str, str]] = {
    "NVSHMEM_IB_SL": "InfiniBand service level of all traffic",
    "NVSHMEM_IB_TRAFFIC_CLASS": "traffic class (RoCE: DSCP and ECN bits) of all traffic",
    "NVSHMEM_IB_GID_INDEX": "entry of the GID table, which selects the RoCE version",
    "NVSHMEM_HCA_LIST": "network cards to use, for instance mlx5_0:1,mlx5_1:1",
    "NVSHMEM_HCA_PE_MAPPING": "which card serves how many ranks of a host: mlx5_0:1:2,mlx5_1:1:2",
    "NVSHMEM_ENABLE_NIC_PE_MAPPING": "1: cards are given to the ranks of a host in turn, not by distance",
    "NVSHMEM_IB_ENABLE_IBGDA": "1: GPUs drive the cards themselves; 0: a thread of the host does",
    "NVSHMEM_IBGDA_NUM_RC_PER_PE": "queue pairs to each peer that GPUs drive",
    "NVSHMEM_IBGDA_RC_MAP_BY": "who shares one of these: cta, sm, warp or, in later versions, none",
    "NVSHMEM_IB_NUM_RC_PER_DEVICE": "queue pairs to each peer that the host's thread drives",
    "NVSHMEM_QP_DEPTH": "operations under way on a queue pair",
    "NVSHMEM_IBGDA_NIC_HANDLER": "who tells the card of new work: gpu, cpu or auto",
    "NVSHMEM_REMOTE_TRANSPORT": "how other hosts are reached: ibrc, ibdevx, libfabric, ucx or none",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "network interface over which ranks find each other",
    "NVSHMEM_DISABLE_P2P": "1: not even GPUs of one host reach each other directly",
    "NVSHMEM_DISABLE_NVLS": "1: no NVLink multicast",
    "NVSHMEM_DISABLE_NCCL": "1: collectives of NVSHMEM do not use NCCL",
    "NVSHMEM_SYMMETRIC_SIZE": "bytes of symmetric memory of each rank",
}
"""What decides over the network, with its meaning. NVSHMEM reads more; `network_environment` shows all."""

_SYMMETRIC_RESERVE_BYTES: Final = 64 << 20
"""For what NVSHMEM itself puts into symmetric memory, and for alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """Traffic isolation and network settings. None leaves what the environment says, or NVSHMEM's default.

    Each sets one variable of NVSHMEM's environment before it starts, and wins over what is there.

    Args:
        service_level: ``NVSHMEM_IB_SL``, 0 to 15. With virtual lanes of its own, expert traffic does not
            queue behind other traffic.
        traffic_class: ``NVSHMEM_IB_TRAFFIC_CLASS``, 0 to 255. The same for RoCE.
        hcas: ``NVSHMEM_HCA_LIST``.
        hca_mapping: ``NVSHMEM_HCA_PE_MAPPING``.
        num_qps_per_rank: ``NVSHMEM_IBGDA_NUM_RC_PER_PE``, at least 1.
        qp_depth: ``NVSHMEM_QP_DEPTH``, at least 1.
        ibgda: ``NVSHMEM_IB_ENABLE_IBGDA``.

    Raises:
        ConfigError: a number out of range.
    """

    service_level: int | None = None
    traffic_class: int | None = None
    hcas: str | None = None
    hca_mapping: str | None = None
    num_qps_per_rank: int | None = None
    qp_depth: int | None = None
    ibgda: bool | None = None

    def __post_init__(self) -> None:
        limits = {
            "service_level": (0, 15),
            "traffic_class": (0, 255),
            "num_qps_per_rank": (1, 1 << 20),
            "qp_depth": (1, 1 << 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}={value} is not within {low}..{high}")

    def variables(self) -> dict[str, str]:
        """What is to be set."""
        values = {
            "NVSHMEM_IB_SL": self.service_level,
            "NVSHMEM_IB_TRAFFIC_CLASS": self.traffic_class,
            "NVSHMEM_HCA_LIST": self.hcas,
            "NVSHMEM_HCA_PE_MAPPING": self.hca_mapping,
            "NVSHMEM_IBGDA_NUM_RC_PER_PE": self.num_qps_per_rank,
            "NVSHMEM_QP_DEPTH": self.qp_depth,
            "NVSHMEM_IB_ENABLE_IBGDA": None if self.ibgda is None else int(self.ibgda),
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def default_variables(*, symmetric_bytes: int, needs_transport: bool) -> dict[str, str]:
    """What is set unless the environment says something else.

    NVLink multicast stays off: nothing here uses it, and it needs more of a host than NVLink itself does.

    Args:
        symmetric_bytes: that will be asked for.
        needs_transport: loads and stores do not reach all ranks: some are on other hosts, or on GPUs that
            do not reach each other.
    """
    defaults = {
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_DISABLE_NCCL": "1",
        "NVSHMEM_SYMMETRIC_SIZE": str(symmetric_bytes + _SYMMETRIC_RESERVE_BYTES),
    }
    return defaults if needs_transport else {**defaults, "NVSHMEM_REMOTE_TRANSPORT": "none"}


def set_network_environment(
    options: NetworkOptions,
    *,
    symmetric_bytes: int,
    needs_transport: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> dict[str, str | None]:
    """Prepare the environment that NVSHMEM reads when it starts in this process.

    Returns:
        What was there of the variables that were set, for `restore_environment`; None for nothing.
    """
    defaults = default_variables(symmetric_bytes=symmetric_bytes, needs_transport=needs_transport)
    given = {
        **{name: value for name, value in defaults.items() if name not in environ},
        **options.variables(),
    }
    before = {name: environ.get(name) for name in given}
    environ.update(given)
    return before


def restore_environment(
    before: Mapping[str, str | None], environ: MutableMapping[str, str] = os.environ
) -> None:
    """Undo `set_network_environment`, so that NVSHMEM may start again with other options."""
    for name, value in before.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value


def network_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All that the environment tells NVSHMEM, by name."""
    return {name: environ[name] for name in sorted(environ) if name.startswith("NVSHMEM_")}

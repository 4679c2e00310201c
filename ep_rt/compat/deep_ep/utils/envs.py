"""Starting ranks, seeds, printing, and what joins the ranks, as DeepEP's tests and benchmarks import them."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
from functools import cache
from typing import Any, NamedTuple

from ep_rt import backend, topology
from ep_rt.compat.deep_ep.utils._launched import Launched
from ep_rt.errors import ConfigError
from ep_rt.groups import as_group

_log = logging.getLogger("ep_rt")


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple[int, int, Any]:
    """Start torch's process groups: over NCCL with a GPU for each rank of a node, over gloo without GPUs.

    Ranks meet at ``MASTER_ADDR`` and ``MASTER_PORT``, by default 127.0.0.1 and 8361. ``WORLD_SIZE`` counts
    nodes and ``RANK`` is the number of this one, by default 1 and 0: not what torchrun sets. From here on
    torch makes tensors in bfloat16, with GPUs on that of `local_rank`. Random numbers begin at `init_seed`.

    Args:
        local_rank: of this process on its node.
        num_local_ranks: processes of each node.

    Returns:
        The rank, the number of ranks, and a process group of all of them.

    Raises:
        ConfigError: there are GPUs, but fewer than `num_local_ranks`; nothing was started.

    Collective.
    """
    import torch
    import torch.distributed as dist

    launch = _launch()
    is_on_gpus, num_gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if is_on_gpus and num_local_ranks > num_gpus:
        raise ConfigError(f"num_local_ranks={num_local_ranks}; this node has {num_gpus} GPUs")
    num_ranks = launch.num_nodes * num_local_ranks
    options: dict[str, Any] = {}
    if is_on_gpus:
        torch.cuda.set_device(local_rank)
        options["device_id"] = torch.device("cuda", local_rank)
    dist.init_process_group(
        "nccl" if is_on_gpus else "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        world_size=num_ranks,
        rank=launch.node * num_local_ranks + local_rank,
        **options,
    )
    torch.set_default_dtype(torch.bfloat16)
    if is_on_gpus:
        torch.set_default_device("cuda")
    Launched.local_rank = local_rank
    init_seed(seed)
    return dist.get_rank(), num_ranks, dist.new_group(list(range(num_ranks)))


def init_seed(global_seed: int) -> None:
    """Begin the random numbers of torch and of Python anew, at `global_seed` plus the rank.

    After `init_dist`, or another start of torch's process groups.
    """
    import torch
    import torch.distributed as dist

    Launched.global_seed, Launched.local_seed = global_seed, global_seed + dist.get_rank()
    torch.manual_seed(Launched.local_seed)
    random.seed(Launched.local_seed)


def get_local_seed() -> int:
    """Where the random numbers of this rank began: the last `init_seed` plus the rank, or 0."""
    return Launched.local_seed


def get_global_seed() -> int:
    """What the last `init_seed` was given, the same on all ranks, or 0."""
    return Launched.global_seed


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Print a line, then meet the other ranks.

    Args:
        once_in_node: the first rank of each node prints, the others only meet it.

    Raises:
        ConfigError: before `init_dist`, which says who is the first.

    Collective.
    """
    import torch.distributed as dist

    if Launched.local_rank is None:
        raise ConfigError("dist_print needs init_dist to come first")
    if Launched.local_rank == 0 or not once_in_node:
        sys.stdout.write(f"{s}\n")  # at once: ranks share the terminal
        sys.stdout.flush()
    dist.barrier()


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """Nodes, and ranks of one: what `ElasticBuffer.get_physical_domain_size` would say.

    Args:
        group: as for `ElasticBuffer`.

    Raises:
        TopologyError: nodes differ in size; on every rank.

    Collective.
    """
    peers = as_group(group)
    place = None if backend.requested("auto") == "host" else backend.gpu_place()
    nodes = topology.discover(peers, place=place)
    nodes.require_uniform("get_physical_domain_size")
    return nodes.num_nodes, nodes.num_local_ranks


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """As `get_physical_domain_size`; without `allow_hybrid_mode` all ranks are one domain."""
    num_nodes, num_local_ranks = get_physical_domain_size(group)
    return (num_nodes, num_local_ranks) if allow_hybrid_mode else (1, num_nodes * num_local_ranks)


@cache
def get_nvlink_gbs(factor: float = 0.9) -> float:
    """GB/s one way over all NVLinks of the first GPU, times `factor`; 0.0 if ``nvidia-smi`` tells of none."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "nvlink", "-s"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("how fast NVLink is cannot be found out: %s", error)
        return 0.0
    of_gpus = re.split(r"^GPU \d+:", answer, flags=re.MULTILINE)
    return factor * sum(map(float, re.findall(r"Link \d+:\s*([\d.]+) GB/s", "".join(of_gpus[1:2]))))


class _Launch(NamedTuple):
    """Where ranks meet, and this node among the nodes."""

    address: str
    port: int
    num_nodes: int
    node: int


def _launch() -> _Launch:
    """Read the environment variables of `init_dist`."""
    return _Launch(
        os.getenv("MASTER_ADDR", "127.0.0.1"),
        int(os.getenv("MASTER_PORT", "8361")),
        int(os.getenv("WORLD_SIZE", "1")),
        int(os.getenv("RANK", "0")),
    )
